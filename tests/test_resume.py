"""Runs that are killed and go on: the same curve, to the last bit."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY, golf

from golf.launch import descendants

MORE = ''', snapshot_every: 3},
  qat: {enabled: true, start_fraction: 0.4, rounding: soft, alpha_end: 9},
  average: {method: ema, decay: 0.9}, quant: {formats: [["*.weight", int5
  q0.999]]}'''
STEPS = 40


def overrides(steps=STEPS):
    "The tiny system with everything that has a state."
    return (TINY.replace('steps: 20', f'steps: {steps}')
            .replace('warmup_steps: 2}', 'warmup_steps: 2' + MORE))


def start(shards, out, nproc=1, said=subprocess.DEVNULL):
    "`golf train` in the background."
    head = [sys.executable, '-m']
    if nproc > 1:
        head += ['torch.distributed.run', '--standalone',
                 '--nproc-per-node', str(nproc), '-m']
    return subprocess.Popen(
        [*head, 'golf', 'train', 'smoke', '--data', str(shards),
         '--overrides', overrides(), '--out', str(out)], cwd=ROOT,
        stdout=said, stderr=said, text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1'})


def lines(folder):
    "The metrics in a folder, without what the clock says."
    path = folder/'metrics.jsonl'
    if not path.is_file(): return []
    rows = [json.loads(line) for line in path.read_text().splitlines()
            if line.endswith('}')]
    return [{k: v for k, v in row.items() if k not in ('seconds', 'ms')}
            for row in rows]


def reached(out):
    "The last step in the metrics of the run that is being built."
    there = [lines(p) for p in out.parent.glob(f'.{out.name}.partial-*')]
    return max((m['step'] for rows in there for m in rows), default=0)


def kill(process):
    "No process of it survives, and none can clean up."
    for pid in (process.pid, *descendants(process.pid)):
        try: os.kill(pid, signal.SIGKILL)
        except ProcessLookupError: pass
    process.wait()


def killed_at(process, out, step):
    "Kill it once it has got this far; False if it was faster."
    while process.poll() is None:
        if reached(out) >= step:
            kill(process)
            return True
        time.sleep(.005)
    return False


def same_end(a, b):
    "Two finished runs: the same curve and the same weights?"
    for name in ('model.pt', 'averaged.pt'):
        x, y = (torch.load(f/'checkpoint'/name) for f in (a, b))
        assert x.keys() == y.keys()
        assert all(torch.equal(x[k], y[k]) for k in x), name
    assert lines(a) == lines(b)
    assert (a/'model.golf').read_bytes() == (b/'model.golf').read_bytes()


@pytest.fixture(scope='module')
def whole(shards, tmp_path_factory):
    "The run that nobody disturbs."
    out = tmp_path_factory.mktemp('whole')/'run'
    assert start(shards, out).wait() == 0
    return out


def kills(shards, out, draw, n, nproc=1):
    "Let a run be killed n times and end; how often it was."
    done = 0
    while done < n:
        process = start(shards, out, nproc)
        at = reached(out) + draw.randint(1, max(1, 2*STEPS//n))
        if killed_at(process, out, min(at, STEPS)): done += 1
        else: break
    if done == n: assert start(shards, out, nproc).wait() == 0
    return done


@pytest.mark.parametrize('n', [
    3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_run_is_the_undisturbed_one(n, whole, shards, tmp_path):
    draw, done = random.Random(), 0
    while done < n:
        out = tmp_path/f'run{done}'
        done += kills(shards, out, draw, min(4, n - done))
        same_end(whole, out)
        assert not (out/'snapshots').exists()
        assert not list(tmp_path.glob('.*')), 'something is left'
    print(f'{done} kills')


def test_two_ranks_go_on(shards, tmp_path):
    "As for one, and one rank cannot take up what two have written."
    out = tmp_path/'whole'
    assert start(shards, out, nproc=2).wait() == 0
    cut = tmp_path/'cut'
    assert killed_at(start(shards, cut, nproc=2), cut, 13)
    alone = golf('train', 'smoke', '--data', shards, '--overrides',
                 overrides(), '--out', cut, check=False)
    assert 'the snapshots are of 2 processes' in alone.stderr
    assert start(shards, cut, nproc=2).wait() == 0
    same_end(out, cut)


def test_resume_names_what_is_there(shards, tmp_path):
    "A folder of another machine, and a folder with nothing to go on from."
    out = tmp_path/'run'
    assert killed_at(start(shards, out), out, 9)
    left, = tmp_path.glob('.run.partial-*')
    far = tmp_path/'.run.partial-elsewhere-7'
    os.rename(left, far)
    nothing = golf('train', 'smoke', '--data', shards, '--overrides',
                   overrides(), '--out', out, '--resume', tmp_path,
                   check=False)
    assert 'no snapshot to go on from' in nothing.stderr
    went = golf('train', 'smoke', '--data', shards, '--overrides',
                overrides(), '--out', out, '--resume', far)
    assert 'goes on after step' in went.stdout
    assert not far.exists() and (out/'model.golf').is_file()


def test_a_damaged_snapshot_is_named(shards, tmp_path):
    out = tmp_path/'run'
    assert killed_at(start(shards, out), out, 9)
    left, = tmp_path.glob('.run.partial-*')
    newest = sorted(left.glob('snapshots/*.pt'))[-1]
    newest.write_bytes(newest.read_bytes()[:-100])
    again = golf('train', 'smoke', '--data', shards, '--overrides',
                 overrides(), '--out', out, check=False)
    assert f'{newest.name}: damaged' in again.stderr
    shutil.rmtree(left, ignore_errors=True)
