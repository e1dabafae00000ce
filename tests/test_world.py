"""One process or two: the same run."""
import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import TINY, golf


def lines(folder):
    return [json.loads(x) for x in
            (folder/'metrics.jsonl').read_text().splitlines()]


def test_two_ranks_train_as_one(tiny_run, tmp_path):
    "Loss curves of 20 float32 steps within 1e-4."
    shutil.copy(tiny_run/'params.yaml', tmp_path)
    golf('train', '--folder', tmp_path, nproc=2)
    one, two = lines(tiny_run), lines(tmp_path)
    assert len(one) == len(two) >= 20
    for a, b in zip(one, two):
        assert (a['kind'], a['step']) == (b['kind'], b['step'])
        assert abs(a['loss'] - b['loss']) < 1e-4
    assert one[-1]['loss'] < one[0]['loss'] - .3, 'it did not learn'


def test_torchrun_makes_a_whole_run(tiny_run, shards, tmp_path):
    "From a config to a packed artifact; another config there is refused."
    args = ['train', 'smoke', '--data', shards, '--overrides', TINY,
            '--out', tmp_path/'run']
    golf(*args, nproc=2)
    assert [p.name for p in tmp_path.iterdir()] == ['run']
    assert (tmp_path/'run/model.golf').is_file()
    assert (tmp_path/'run/params.yaml').read_text() == \
        (tiny_run/'params.yaml').read_text()
    done = golf(*args, '--seed', 8, nproc=2, check=False, timeout=120)
    assert done.returncode != 0 and 'seed is 1337 there' in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ['run']


def test_ends_while_reading_ahead():
    "The reading thread never outlives the interpreter, which would abort."
    busy = ("import torch; from golf.data import ReadAhead\n"
            "a = ReadAhead((torch.ones(4, 5000)[:, 1:].reshape(-1, 1)"
            " for _ in range(10**9)), depth=10**6); a.get()")
    for _ in range(4):
        done = subprocess.run([sys.executable, '-c', busy], timeout=120,
                              capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, '')


def scores(tmp_path, *args, nproc):
    path = tmp_path/f'scores-{nproc}.json'
    golf('score', *args, '--json', path, nproc=nproc)
    found = json.loads(path.read_text())
    return found['data'], [(s['name'], s['val_loss'], s['val_bpb'])
                           for s in found['stages']]


@pytest.mark.parametrize('what', ['artifact', 'raw'])
def test_two_ranks_score_as_one(tiny_run, shards, tmp_path, what):
    "To the last digit, plain and sliding."
    source = tiny_run/'model.golf' if what == 'artifact' else tiny_run
    args = f'--{what}', source, '--data', shards
    one = scores(tmp_path, *args, nproc=1)
    assert one == scores(tmp_path, *args, nproc=2)
    assert len(one[1]) == (2 if what == 'artifact' else 1)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(os.environ.get('CXX', 'g++')),
                    reason='compiling for a CPU needs a C++ compiler')
@pytest.mark.parametrize('how', ['on', 'layers'])
def test_compiled_is_the_same_run(how, tiny_run, shards, tmp_path):
    "Compiled for the CPU: rounding proved live, no recompile, same losses."
    golf('train', 'smoke', '--data', shards, '--out', tmp_path/'run',
         '--overrides', TINY.replace('compile: off', f'compile: {how}'))
    for a, b in zip(lines(tiny_run), lines(tmp_path/'run')):
        assert abs(a['loss'] - b['loss']) < 1e-3


def test_a_compiler_that_fails_is_no_end(tiny_run, shards, tmp_path,
                                         monkeypatch):
    "Where nobody insisted on it, the run goes on eager, and says so."
    monkeypatch.setenv('CXX', shutil.which('false'))
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path/'cache'))
    done = golf('train', 'smoke', '--data', shards, '--out', tmp_path/'run',
                '--overrides', TINY.replace('compile: off', 'compile: auto'))
    assert 'compiled layer by layer' in done.stdout
    assert 'eager after all' in done.stdout
    assert lines(tmp_path/'run')[-1]['loss'] == lines(tiny_run)[-1]['loss']
