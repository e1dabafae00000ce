"""Stages with real processes: they fail, are killed and are interrupted."""
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from golf.launch import (StageFailed, abandon_run, descendants, finish_run,
                         prepare_run, process_table, run_stage,
                         stage_command)

PROJECT = Path(__file__).resolve().parents[1]
PARAMS = 'name: tiny\nseed: 1\ntrain: {steps: 10}\n'

# Two ranks that add up a number every 10 ms; rank 1 fails as it is told.
WORKER = '''
import json, os, signal, sys, time, traceback
from pathlib import Path
import torch, torch.distributed as dist

how, folder = sys.argv[1], Path(sys.argv[2])
dist.init_process_group('gloo')
rank = dist.get_rank()
(folder/f'pid{rank}').write_text(str(os.getpid()))
try:
    for step in range(6000):
        dist.all_reduce(torch.ones(8))
        if rank == 0 and step % 10 == 0: print('step', step)
        if step == 30 and how == 'end': break
        if step == 30 and rank == 1:
            if how == 'raise': raise ValueError('shard 3 is\\ntoo short')
            if how == 'kill': os.kill(os.getpid(), signal.SIGKILL)
            if how == 'exit': os._exit(7)
        time.sleep(0.01)
except Exception as e:
    error = dict(rank=rank, error=f'{type(e).__name__}: {e}',
                 traceback=traceback.format_exc())
    (folder/f'error-rank{rank}.json').write_text(json.dumps(error))
    raise
dist.destroy_process_group()
'''


@pytest.fixture
def stage(tmp_path):
    "A function that runs the worker in two processes."
    (tmp_path/'worker.py').write_text(WORKER)
    def run(how, **kw):
        run_stage(stage_command('worker', [how, tmp_path], nproc=2),
                  tmp_path/'log.txt', env=environment(tmp_path), **kw)
    return run


def environment(folder):
    "Lets children find the worker and this package."
    return dict(PYTHONPATH=f'{folder}{os.pathsep}{PROJECT}',
                OMP_NUM_THREADS='1')


def workers(folder):
    "Pids of the two ranks."
    return {int((folder/f'pid{r}').read_text()) for r in (0, 1)}


def wait_for(condition, seconds=20):
    "Wait until a condition holds; does it?"
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline: time.sleep(0.05)
    return condition()


def test_two_ranks_end_well(stage, tmp_path):
    lines = []
    stage('end', on_line=lines.append)
    assert [x for x in lines if x.startswith('step')] == [
        'step 0', 'step 10', 'step 20', 'step 30']
    assert not workers(tmp_path) & set(process_table())


@pytest.mark.parametrize('how, cause', [
    ('raise', 'ValueError: shard 3 is'),
    ('kill', 'killed by SIGKILL; often the machine ran out of memory'),
    ('exit', 'exit code 7')])
def test_a_rank_dies(stage, tmp_path, how, cause):
    before = descendants(os.getpid())  # other tests' helpers
    with pytest.raises(StageFailed) as caught: stage(how)
    failed = caught.value
    assert (failed.stage, failed.rank) == (f'worker {how}', 1)
    assert failed.line == f'worker {how} failed on rank 1: {cause}'
    assert str(failed).startswith(failed.line + '\n')
    assert 0 < len(failed.tail) <= 12
    assert not any('torch/distributed/elastic' in x for x in failed.tail)
    assert 'step 30' in (tmp_path/'log.txt').read_text()
    assert not workers(tmp_path) & set(process_table())
    assert descendants(os.getpid()) <= before


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM,
                                    signal.SIGKILL])
def test_no_process_outlives_the_notebook(tmp_path, number):
    (tmp_path/'worker.py').write_text(WORKER)
    command = stage_command('worker', ['run', tmp_path], nproc=2)
    notebook = textwrap.dedent(f'''
        from golf.launch import run_stage
        run_stage({command!r}, {str(tmp_path/'log.txt')!r},
                  lambda line: print(line, flush=True))''')
    process = subprocess.Popen(
        [sys.executable, '-c', notebook], text=True, cwd=tmp_path,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env=os.environ | environment(tmp_path),
        # a background job of a shell starts with SIGINT ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    assert any(line.startswith('step') for line in process.stdout)
    family = descendants(process.pid)
    assert workers(tmp_path) < family
    process.send_signal(number)
    assert process.wait(20) != 0
    assert wait_for(lambda: not family & set(process_table()))


def test_a_stage_that_ignores_sigterm_is_killed(tmp_path):
    stubborn = ('import signal, time; '
                'signal.signal(signal.SIGTERM, signal.SIG_IGN); '
                'print("ready"); time.sleep(60)')
    def stop(line): raise KeyboardInterrupt
    before = descendants(os.getpid())
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_stage([sys.executable, '-c', stubborn], tmp_path/'log.txt', stop,
                  env=environment(tmp_path), grace=1)
    assert 1 < time.monotonic() - start < 20
    assert descendants(os.getpid()) <= before


def test_a_failed_swap_leaves_the_former_run(tmp_path, monkeypatch):
    out = tmp_path/'run'
    finish_run(prepare_run(out, PARAMS), out)
    (out/'mark').touch()
    partial, rename = prepare_run(out, PARAMS), os.rename
    def fails(a, b):
        if a == partial: raise OSError('disk full')
        rename(a, b)
    monkeypatch.setattr(os, 'rename', fails)
    with pytest.raises(OSError, match='disk full'): finish_run(partial, out)
    assert (out/'mark').exists() and partial.exists()
    assert {p.name for p in tmp_path.iterdir()} == {'run', partial.name}


def test_a_folder_taken_meanwhile_is_not_replaced(tmp_path):
    out = tmp_path/'run'
    partial = prepare_run(out, PARAMS)
    other = prepare_run(tmp_path/'other', PARAMS.replace('1', '2'))
    finish_run(other, out)
    with pytest.raises(ValueError, match='seed is 2 there and 1 here'):
        finish_run(partial, out)
    assert 'seed: 2' in (out/'params.yaml').read_text()
    abandon_run(partial, out)
    assert [p.name for p in tmp_path.iterdir()] == ['run']


def test_a_crashed_run_with_a_checkpoint_is_kept(tmp_path):
    crash = textwrap.dedent(f'''
        import os
        from golf.launch import prepare_run
        partial = prepare_run({str(tmp_path/'run')!r}, {PARAMS!r})
        (partial/'checkpoint').mkdir()
        (partial/'checkpoint'/'model.pt').touch()
        os.kill(os.getpid(), 9)''')
    subprocess.run([sys.executable, '-c', crash],
                   env=os.environ | environment(tmp_path))
    partial = prepare_run(tmp_path/'run', PARAMS)
    assert {p.name for p in tmp_path.iterdir()} == {partial.name,
                                                    'run.failed'}
    assert (tmp_path/'run.failed'/'checkpoint'/'model.pt').is_file()


def test_another_living_process_keeps_its_folder(tmp_path):
    hold = textwrap.dedent(f'''
        from golf.launch import prepare_run
        print(prepare_run({str(tmp_path/'run')!r}, {PARAMS!r}), flush=True)
        input()''')
    other = subprocess.Popen([sys.executable, '-c', hold], text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             env=os.environ | environment(tmp_path))
    theirs = Path(other.stdout.readline().strip())
    ours = prepare_run(tmp_path/'run', PARAMS)
    assert theirs.is_dir() and ours.is_dir() and theirs != ours
    other.communicate('\n')
    abandon_run(ours, tmp_path/'run')
    prepare_run(tmp_path/'run', PARAMS)
    assert not theirs.exists()
