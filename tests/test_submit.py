"""The generated train_gpt.py does what the package does, and nothing less."""
import ast
import builtins
import copy
import json
import os
import random
import shutil
import subprocess
import symtable
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from conftest import golf
from test_systems import shrink

from golf import onefile
from golf.artifact import byte_budget
from golf.cli import main
from golf.config import config_text, load_run_config, read_config
from golf.data import read_shard, write_split
from golf.layout import minified
from golf.onefile import (counted_once, file_nodes, self_extracting,
                          submission_bytes, submission_code)
from golf.report import build_result
from golf.settle import Fold, learn, pure_functions, read_units, units_of
from golf.submit import submit_runs

# golf may be installed where the tests run; the file must not need it
REFUSE = '''
import builtins, sys
real = builtins.__import__
def no(name, *a, **k):
    if name.split('.')[0] in ('golf', 'pydantic', 'matplotlib', 'yaml',
                              'papermill', 'nbdev', 'fastcore'):
        raise ImportError(f'{name} is not here')
    return real(name, *a, **k)
builtins.__import__ = no
'''


@pytest.fixture(scope='module')
def shards_small(shards, tmp_path_factory):
    "The shards with less to score."
    folder = tmp_path_factory.mktemp('few')/'fineweb_few'
    folder.mkdir()
    for path in shards.glob('fineweb_train_*.bin'):
        shutil.copy(path, folder)
    shutil.copy(next(shards.glob('*.model')), folder)
    write_split(folder, 'val', read_shard(
        next(shards.glob('fineweb_val_*.bin')))[:1500])
    return folder


def run_file(code, folder, data, nproc=1, args=()):
    "Run a train_gpt.py in a folder that holds nothing else; what it says."
    folder.mkdir()
    (folder/'train_gpt.py').write_bytes(code)
    (blocked := folder.parent/'blocked').mkdir(exist_ok=True)
    (blocked/'sitecustomize.py').write_text(REFUSE)
    head = [sys.executable] if nproc == 1 else [
        sys.executable, '-m', 'torch.distributed.run', '--standalone',
        '--nproc_per_node', str(nproc)]
    env = {k: v for k, v in os.environ.items() if not k.startswith('PYTHON')}
    done = subprocess.run(
        [*head, 'train_gpt.py', '--data', str(data), *args], cwd=folder,
        capture_output=True, text=True,
        env=env | dict(PYTHONPATH=str(blocked), OMP_NUM_THREADS='1'))
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def losses(lines):
    return [[m.get(k) for k in ('kind', 'step', 'loss', 'quantized_loss',
                                'lr', 'qat')] for m in map(json.loads, lines)
            if 'kind' in m]


def package_stages(run, data, out):
    "What `golf score` says of a run."
    main(['score', '--artifact', str(run/'model.golf'), '--data', str(data),
          '--device', 'cpu', '--json', str(out/'s.json')])
    stages = json.loads((out/'s.json').read_text())['stages']
    return {s['name']: (s['val_loss'], s['val_bpb']) for s in stages}


def file_stages(lines):
    return {s['name']: (s['val_loss'], s['val_bpb'])
            for s in map(json.loads, lines) if 'val_bpb' in s}


def compare(name, data, tmp_path, nproc=1, packed=False, more=None):
    "Package and file at the same seed: losses, artifact and scores."
    small = shrink(name)
    for k, values in (more or {}).items():
        small[k] = small.get(k, {}) | values
    small['train'] |= dict(steps=6, heldout_every=3)
    cfg, _ = load_run_config(name, 7, str(data), small)
    room = submission_bytes(cfg)
    code = submission_code(cfg, room)[0]
    code = self_extracting(code, room) if packed else code.encode()
    said = run_file(code, tmp_path/'empty', data, nproc, ['--seed', '7'])
    lines = [x for x in said.split('\n') if x[:1] == '{']
    ours = tmp_path/'ours'
    args = ('train', name, '--seed', '7', '--data', str(data), '--out',
            str(ours), '--overrides', json.dumps(small))
    main(args) if nproc == 1 else golf(*args, nproc=nproc)
    assert losses(lines) == losses((ours/'metrics.jsonl').read_text()
                                   .splitlines())
    assert ((tmp_path/'empty/model-s7.golf').read_bytes()
            == (ours/'model.golf').read_bytes())
    scores = file_stages(lines)
    assert scores == package_stages(ours, data, tmp_path)
    assert f'{len(code):,} bytes of' in said
    if packed: assert len(code) == room
    return scores


def test_counted_once(tmp_path, monkeypatch):
    "By the next process neither, unless a value or the source is another."
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path))
    asked = []
    def count(cfg): asked.append(cfg); return 100 + len(asked)
    cfg, _ = load_run_config('pr137')
    assert counted_once(cfg, count) == counted_once(cfg, count) == 101
    elsewhere = replace(cfg, seed=7, data=replace(cfg.data, path=str(
        tmp_path/Path(cfg.data.path).name)))
    assert counted_once(elsewhere, count) == 101
    assert counted_once(replace(cfg, limit_bytes=10**6), count) == 102
    monkeypatch.setattr(onefile, 'source_hash', lambda: 'other')
    assert counted_once(cfg, count) == 103 and len(asked) == 3


def test_576_to_the_last_digit(shards_small, tmp_path):
    "EMA, GPTQ, a fitted grid, temperature and test-time training."
    scores = compare('pr576', shards_small, tmp_path)
    assert set(scores) == {'quantized', 'sliding', 'ttt'}


def test_137_packed_by_two_processes(shards_small, tmp_path):
    "torchrun, and the form that unpacks itself."
    scores = compare('pr137', shards_small, tmp_path, 2, packed=True)
    assert set(scores) == {'quantized', 'sliding'}


@pytest.mark.parametrize('more', [
    dict(model=dict(isolate_documents=True)),
    dict(model=dict(isolate_documents=True), train=dict(attention='plain')),
    dict(score=dict(method='kept', kept_windows=3))])
def test_what_the_config_settles(more, shards_small, tmp_path):
    "Documents apart, a kernel by its name, windows that keep their keys."
    compare('pr137', shards_small, tmp_path, packed=True, more=more)


def test_kernels_only_by_name():
    "None are measured, unless the config asks for one."
    code, _ = submission_code(load_run_config('pr137')[0])
    for name in ('flash', 'KERNELS', 'product_kernel', 'pick_attention',
                 'attend_kept', 'time_ms', 'document_numbers'):
        assert f' {name}' not in code, name
    code, _ = submission_code(load_run_config('pr137', overrides=dict(
        train=dict(attention='flash3', kernels='on')))[0])
    for name in ('flash3_forward', 'KERNELS', 'product_kernel'):
        assert f' {name}' in code, name
    for name in ('flash4_forward', 'plain_forward', 'pick_attention'):
        assert name not in code, name
    small, _ = minified(code.partition('\nif __name__')[0])
    assert '(a,b,out,saved,M,N,K,LEAKY,BACKWARD,UNIT,BM' in small


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(os.environ.get('CXX', 'g++')),
                    reason='compiling for a CPU needs a C++ compiler')
@pytest.mark.parametrize('how', ['on', 'layers'])
def test_compiled_both_ways(how, shards_small, tmp_path):
    "Training and scoring."
    compare('pr576', shards_small, tmp_path, packed=True, more=dict(
        train=dict(compile=how), score=dict(compile=how)))


@pytest.mark.slow
@pytest.mark.parametrize('name', ['pr219', 'pr314', 'pr469'])
def test_the_other_systems(name, shards_small, tmp_path):
    compare(name, shards_small, tmp_path)


@pytest.fixture(scope='module')
def codes():
    "{system: (its file, bytes by chapter)}."
    return {name: submission_code(load_run_config(name)[0])
            for name in ('pr137', 'pr469', 'pr576', 'smoke')}


@pytest.mark.parametrize('name', ['pr137', 'pr469', 'pr576', 'smoke'])
def test_every_name_is_there(name, codes):
    "Nothing that the file names was left out; nothing of golf is imported."
    code, sizes = codes[name]
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for a in node.names:
                top = (getattr(node, 'module', '') or a.name).split('.')[0]
                assert top in sys.stdlib_module_names | {
                    'torch', 'numpy', 'sentencepiece', 'zstandard',
                    'constriction', 'flash_attn',
                    'flash_attn_interface'}  # where there
    table = symtable.symtable(code, 'train_gpt.py', 'exec')
    here = {s.get_name() for s in table.get_symbols()} | {'__file__'}
    todo = [table]
    while todo:
        scope = todo.pop()
        todo += scope.get_children()
        taken = {s.get_name() for s in scope.get_symbols()
                 if s.is_global() and s.is_referenced()}
        assert taken <= here | set(dir(builtins))
    assert sum(sizes.values()) == len(code.encode())
    assert 'exec(' not in code


def test_only_what_the_config_uses(codes):
    small, large = codes['pr137'][0], codes['pr576'][0]
    for name in ('SmearGate', 'BigramHash', 'ValueEmbedding', 'gptq_state',
                 'collect_hessians', 'Sketch', 'score_ttt',
                 'fit_temperature', 'ExponentialAverage', 'leaky_relu2'):
        assert f' {name}(' not in small and f' {name}(' in large, name
    for name in ('SnapshotAverage', 'normuon_rows', 'soft_quant',
                 'embedded_text', 'is_prose'):
        assert name not in large, name
    assert 'is_prose' in codes['smoke'][0]


def test_the_count_does_not_depend_on_seed_or_place(codes):
    cfg, code = load_run_config('pr137')[0], codes['pr137'][0]
    moved = replace(cfg, seed=42, data=replace(
        cfg.data, path='/somewhere/else/fineweb10B_sp1024'))
    assert submission_code(moved)[0] == code
    assert '123456' in submission_code(cfg, 123_456)[0]
    sizes = {len(self_extracting(code, room)) for room in (0, 123_456)}
    assert len(sizes) == 1


# ---- folding, on random programs

@dataclass(frozen=True)
class PartConfig:
    a: int = 0
    b: bool = False
    c: str = 'x'


@dataclass(frozen=True)
class ProgramConfig:
    part: PartConfig = PartConfig()
    d: int = 1


LEAVES = ('cfg.part.a', 'cfg.part.b', 'cfg.part.c', 'cfg.d', 'p.a', 'p.b',
          'n', 'm', 'x', 'y', '0', '1', '2', 'True', 'None', "'x'")


def random_expression(rng, depth):
    if depth == 0: return rng.choice(LEAVES)
    e = lambda: random_expression(rng, depth - 1)
    kind = rng.randrange(9)
    if kind == 8: return f'noted({e()})'
    if kind == 0: return f'({e()} == {e()})'
    if kind == 1: return f'({e()} and {e()})'
    if kind == 2: return f'({e()} or {e()})'
    if kind == 3: return f'(not {e()})'
    if kind == 4: return f'({e()} if {e()} else {e()})'
    if kind == 5: return f'helper({e()}, {e()})'
    if kind == 6: return f'other({e()}, b=noted({e()}))'
    return f'[{e()} for x in ({e()}, {e()})][0]'


def random_block(rng, depth, tab):
    lines = []
    for _ in range(rng.randint(1, 3)):
        e, kind = random_expression(rng, 2), rng.randrange(7)
        inner = lambda: random_block(rng, depth - 1, tab + '    ')
        if kind == 0 and depth:
            lines += [f'{tab}if {e}:', *inner()]
            if rng.random() < .6: lines += [f'{tab}else:', *inner()]
        elif kind == 1 and depth:
            lines += [f'{tab}for x in ({e}, 3):', *inner()]
        elif kind == 2 and rng.random() < .3: lines += [f'{tab}return {e}']
        elif kind == 3: lines += [f'{tab}x, y = {e}, {rng.choice(LEAVES)}']
        elif kind == 4: lines += [f'{tab}seen.append({e})']
        else: lines += [f'{tab}{rng.choice("xynm")} = {e}']
    return lines


def random_program(rng):
    "main(cfg, seen) and two functions that it calls."
    head = '    p, n, m, x, y = cfg.part, cfg.part.a, cfg.d, len(seen), 0'
    return '\n'.join([
        'log = []',
        'def noted(a):',
        '    log.append(a)',
        f'    return {rng.choice(["None", "1", "a"])}',
        'def helper(a, b=2):',
        f'    if {rng.choice(["a", "b", "a == b", "not a", "a is None"])}:',
        f'        return {rng.choice(["a", "b", "(a, b)", "1"])}',
        f'    return {rng.choice(["b", "0", "None", "a"])}',
        'def other(a, b=None, c=3):',
        f'    return {rng.choice(["a", "b", "c"])} if '
        f'{rng.choice(["a", "b is None", "c == 3"])} else helper(c)',
        'def main(cfg, seen):', head, *random_block(rng, 3, '    '),
        '    return (x, y, n, m)'])


@pytest.mark.parametrize('seed', range(5))
def test_folding_changes_nothing(seed):
    "Random programs do the same before and after, whatever their input."
    rng, shrunk = random.Random(seed), 0
    for _ in range(150):
        text = random_program(rng)
        cfg = ProgramConfig(PartConfig(rng.randrange(3), rng.random() < .5,
                                       rng.choice('xy')), rng.randrange(3))
        units, _ = units_of(text, '00_toy')
        live = learn(units, cfg, 'main').live
        fold = Fold(pure_functions({k: u.node for k, u in live.items()}))
        kept = [fold.visit(copy.deepcopy(u.node)) for u in live.values()]
        after = '\n'.join(map(ast.unparse, kept))
        shrunk += len(after) < len(ast.unparse(ast.parse(text)))
        for start in ([], [5], [5, 6]):
            results = []
            for source in (text, after):
                space, seen = {}, list(start)
                exec(source, space)
                try: out = space['main'](cfg, seen)
                except TypeError as e: out = type(e)
                results.append(repr((out, seen, space.get('log', []))))
            assert results[0] == results[1], f'{text}\n---\n{after}'
    assert shrunk > 50


def test_short_names_change_nothing():
    "Random programs again; names in the functions are made to clash."
    for seed in range(150):
        rng = random.Random(seed)
        text = random_program(rng)
        small, names = minified(text)
        assert len(small) < len(text)
        cfg = ProgramConfig(PartConfig(rng.randrange(3), True, 'x'), 2)
        results = []
        for source, name in ((text, str), (small, names.get)):
            space, seen = {}, [5]
            exec(source, space)
            try: out = space[name('main')](cfg, seen)
            except TypeError as e: out = type(e)
            results.append(repr((out, seen, space[name('log')])))
        assert results[0] == results[1], f'{text}\n---\n{small}'


def test_checks_go_and_effects_stay():
    text = '''
def note(log): log.append(1)
def count(x): return len(x)
def check(x):
    if count(x) > 2: raise ValueError('long')
def main(cfg, log, x):
    check(x)
    if note(log): raise ValueError('never')
    if (n := count(x)) > 5: raise ValueError(n)
    unread = count(x)
    made = log.pop()
    return made
'''
    units, _ = units_of(text, '00_toy')
    nodes = file_nodes(units, ProgramConfig(), 'main')
    assert set(nodes) == {'main', 'note'}
    code = '\n'.join(map(ast.unparse, nodes.values()))
    # `note` gives None, so nothing is raised; that it was called, stays
    assert '\n    note(log)\n' in code and 'raise' not in code
    assert 'unread' not in code and 'log.pop()' in code
    kept = file_nodes(units, ProgramConfig(), 'main', checks=True)
    assert set(kept) == {'main', 'note', 'check'}
    assert 'if len(x) > 2' in ast.unparse(kept['check'])  # `count` of it


def test_attributes_by_string_are_refused():
    units, _ = units_of('def main(cfg, x): setattr(x, "a", 1)', '00_toy')
    with pytest.raises(ValueError, match='setattr'):
        learn(units, ProgramConfig(), 'main')


def test_two_definitions_of_a_name_are_refused(tmp_path):
    for name in 'ab':
        (tmp_path/f'{name}.py').write_text(
            f'# File to edit: ../nbs/0{name}_x.ipynb\ndef f(): pass\n')
    with pytest.raises(ValueError, match='f is defined in'):
        read_units(tmp_path)


# ---- the folder

@pytest.fixture(scope='module')
def tiny_scores(tiny_run, shards, tmp_path_factory):
    "What the scorer says of the tiny run."
    path, found = tmp_path_factory.mktemp('scores')/'s.json', []
    for what, source in (('raw', tiny_run),
                         ('artifact', tiny_run/'model.golf')):
        main(['score', f'--{what}', str(source), '--data', str(shards),
              '--device', 'cpu', '--json', str(path)])
        found.append(json.loads(path.read_text()))
    return found[0]['data'], [s for f in found for s in f['stages']]


@pytest.fixture
def three_runs(tiny_run, tiny_scores, tmp_path):
    "Three seeds' folders, from one run and its scores."
    cfg = read_config(tiny_run/'params.yaml')
    facts = json.loads((tiny_run/'checkpoint/train.json').read_text())
    folders = [tmp_path/f'run{seed}' for seed in (1, 2, 3)]
    for seed, folder in enumerate(folders, 1):
        shutil.copytree(tiny_run, folder)
        (folder/'params.yaml').write_text(config_text(
            replace(cfg, seed=seed)))
        (folder/'log.txt').write_text('== /opt/x/python -m golf\nok\n')
        result = build_result(
            cfg.name, seed, facts, *tiny_scores,
            byte_budget(folder/'model.golf'), 70_000, cfg.limit_bytes)
        (folder/'result.json').write_text(json.dumps(
            result | dict(commit='a'*40)))
    return folders


def change(folder, **keys):
    path = folder/'result.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def test_a_records_folder(three_runs, tmp_path):
    out = tmp_path/'records/mine'
    sizes = submit_runs(three_runs, out, 'N. N.', 'nn', 'Name', 'What.',
                        any_code=True)
    assert {p.name for p in out.iterdir()} == {
        'README.md', 'submission.json', 'requirements.txt', 'train_gpt.py',
        'train_gpt_readable.py',
        'train_seed1.log', 'train_seed2.log', 'train_seed3.log',
        'loss.png', 'scores.png', 'bytes.png'}
    facts = json.loads((out/'submission.json').read_text())
    assert {'author', 'github_id', 'name', 'blurb', 'date', 'val_loss',
            'val_bpb', 'bytes_total', 'bytes_code'} <= facts.keys()
    size = (out/'train_gpt.py').stat().st_size
    assert size == facts['bytes_code']
    assert sizes['packed'] == size < sizes['readable']/2
    final = json.loads((three_runs[0]/'result.json').read_text())
    assert facts['val_bpb'] == pytest.approx(final['final']['val_bpb'])
    assert facts['bytes_total'] == size + final['bytes']['model']
    readme = (out/'README.md').read_text()
    assert '± 0.0000' in readme and f'{size:,}' in readme
    assert '/opt' not in (out/'train_seed1.log').read_text()
    assert 'torch==' in (out/'requirements.txt').read_text()
    assert [p.name for p in out.parent.iterdir()] == ['mine']


def test_the_readable_form(three_runs, tmp_path):
    out = tmp_path/'mine'
    sizes = submit_runs(three_runs, out, readable=True, any_code=True)
    assert (out/'train_gpt.py').stat().st_size == sizes['readable']
    assert not (out/'train_gpt_readable.py').exists()


@pytest.mark.parametrize('break_it, says', [
    (lambda a, b: (b/'log.txt').unlink(), 'no log.txt'),
    (lambda a, b: (b/'result.json').write_text('{'), 'not JSON'),
    (lambda a, b: change(b, schema=2), 'schema'),
    (lambda a, b: change(b, commit='b'*40), 'differ in commit'),
    (lambda a, b: shutil.copy(a/'params.yaml', b), 'both of seed 1'),
    (lambda a, b: (b/'params.yaml').write_text(
        (b/'params.yaml').read_text().replace('steps: 20', 'steps: 21')),
     'differ in train'),
    (lambda a, b: [change(x, commit='a'*40 + '-dirty') for x in
                   (a, b, a.parent/'run3')], '-dirty'),
    (lambda a, b: None, 'the code here is another'),
])
def test_what_does_not_fit_is_refused(three_runs, tmp_path, break_it, says):
    "One line, and nothing is left behind."
    break_it(*three_runs[:2])
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        submit_runs(three_runs, tmp_path/'mine')
    assert says in str(error.value) and '\n' not in str(error.value)
    assert not [p for p in tmp_path.iterdir() if 'mine' in p.name]


def test_over_the_limit_and_in_the_way(three_runs, tmp_path):
    for run in three_runs:
        text = (run/'params.yaml').read_text()
        (run/'params.yaml').write_text(text.replace('limit_bytes: 16000000',
                                                    'limit_bytes: 15000'))
    with pytest.raises(ValueError, match='over 15,000'):
        submit_runs(three_runs, tmp_path/'mine', any_code=True)
    (tmp_path/'mine').mkdir()
    with pytest.raises(FileExistsError, match='there already'):
        submit_runs(three_runs, tmp_path/'mine', any_code=True)


def test_a_crash_leaves_nothing(three_runs, tmp_path, monkeypatch):
    import golf.submit
    monkeypatch.setattr(golf.submit, 'plot_scores', lambda runs: 1/0)
    with pytest.raises(ZeroDivisionError):
        submit_runs(three_runs, tmp_path/'mine', any_code=True)
    assert not [p for p in tmp_path.iterdir() if 'mine' in p.name]
