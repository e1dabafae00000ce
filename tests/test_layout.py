"""The architecture, read from the files: one road, no loops, no surprises."""
import ast
import configparser
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).resolve().parent.parent
NUMBER = {}    # module -> the number of its notebook, its place on the road
for path in sorted((ROOT/'nbs').glob('[0-9]*.ipynb')):
    for cell in json.loads(path.read_text('utf8'))['cells']:
        for line in cell['source']:
            if line.startswith('#| default_exp '):
                NUMBER[line.split()[2]] = int(path.name[:2])


def tree(module): return ast.parse((ROOT/'golf'/f'{module}.py').read_text())


def golf_imports(module):
    "Modules of this package that `module` imports (export makes them local)."
    return {node.module for node in ast.walk(tree(module))
            if isinstance(node, ast.ImportFrom) and node.level == 1}


def test_every_module_has_a_notebook():
    modules = {p.stem for p in (ROOT/'golf').glob('[a-z]*.py')}
    assert modules == set(NUMBER), 'a module without its notebook'


@pytest.mark.parametrize('module', sorted(NUMBER))
def test_imports_run_down_the_road(module):
    for other in golf_imports(module):
        assert NUMBER[other] < NUMBER[module], \
            f'golf.{module} ({NUMBER[module]}) imports golf.{other} ' \
            f'({NUMBER[other]}): an arrow against the road'


@pytest.mark.parametrize('module', sorted(NUMBER))
def test_imports_are_plain(module):
    "A single file is generated from the modules: names only, no aliases."
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            assert not any(a.name.startswith('golf') for a in node.names)
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.module and not any(
                a.asname or a.name == '*' for a in node.names)


def test_exported_names_are_unique():
    seen = {}
    for module in NUMBER:
        for node in tree(module).body:
            names = [getattr(node, 'name', None)]
            if isinstance(node, ast.Assign):
                names = [t.id for t in node.targets
                         if isinstance(t, ast.Name) and t.id != '__all__']
            for name in filter(None, names):
                assert name not in seen, \
                    f'{name} is in golf.{seen.get(name)} and golf.{module}'
                seen[name] = module


def closure(modules):
    found, todo = set(), list(modules)
    while todo:
        m = todo.pop()
        if m not in found:
            found.add(m); todo += golf_imports(m)
    return found


def test_training_and_scoring_need_no_validation_library():
    for module in closure({'train', 'score'}):
        for node in tree(module).body:    # imports at the top level
            for a in getattr(node, 'names', []):
                name = getattr(node, 'module', None) or a.name
                assert name.split('.')[0] not in (
                    'pydantic', 'yaml', 'fastcore', 'matplotlib'), module


def test_importing_does_no_work():
    "No module reads files, arguments or devices when it is imported."
    code = ('import sys, builtins, io; import torch, matplotlib.pyplot\n'
            'import numpy, sentencepiece, zstandard, json, multiprocessing\n'
            'import yaml, pydantic, torch.distributed, torch.profiler\n'
            'import matplotlib.figure, huggingface_hub, constriction\n'
            'def no(*a, **k): raise AssertionError("work at import")\n'
            'import subprocess; subprocess.Popen = no\n'
            'builtins.open = io.open = no\n'
            'torch.cuda.init = torch.manual_seed = no\n'
            'torch.cuda.is_available = torch.cuda.device_count = no\n'
            + '\n'.join(f'import golf.{m}' for m in NUMBER))
    subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT)


def test_systems_are_values():
    "No module compares anything with the name of a system."
    systems = {p.stem for p in (ROOT/'params').glob('*.yaml')}
    for module in NUMBER:
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.Compare):
                for c in ast.walk(node):
                    assert not (isinstance(c, ast.Constant)
                                and c.value in systems), module


def test_settings_agree():
    "settings.ini (nbdev 2) and pyproject.toml (nbdev 3) say the same."
    ini = configparser.ConfigParser()
    ini.read(ROOT/'settings.ini')
    ini = ini['DEFAULT']
    new = tomllib.loads((ROOT/'pyproject.toml').read_text())['tool']['nbdev']
    for key, value in new.items():
        if isinstance(value, bool): assert ini.getboolean(key) == value, key
        elif isinstance(value, list): assert ini[key].split() == value, key
        elif key != 'git_url': assert ini[key] == value, key


def test_every_system_says_what_it_is():
    for path in (ROOT/'params').glob('*.yaml'):
        head = path.read_text().split('\ndata:')[0].split('\nmodel:')[0]
        for word in ('What', 'Cost', 'Score', 'papermill', '-p config'):
            assert word in head or (word == '-p config'
                                    and path.stem == 'smoke'), (path, word)
