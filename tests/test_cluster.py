"""The script for Slurm, with a stand-in for Slurm: two launchers here."""
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT, TINY, golf

from golf.launch import descendants

SRUN = '''#!/bin/bash
# every "node" is this machine
pids=()
for node in 0 1; do "$@" & pids+=($!); done
for pid in "${pids[@]}"; do wait "$pid" || exit 1; done
'''
TORCHRUN = f'#!/bin/bash\nexec {sys.executable} -m torch.distributed.run "$@"\n'


def free_port():
    with socket.socket() as s:
        s.bind(('', 0))
        return s.getsockname()[1]


@pytest.fixture
def slurm(tmp_path):
    "Run the script as two nodes with one process each would."
    tools = tmp_path/'bin'
    tools.mkdir()
    for name, text in (('srun', SRUN), ('torchrun', TORCHRUN),
                       ('scontrol', '#!/bin/bash\necho 127.0.0.1\n')):
        (tools/name).write_text(text)
        (tools/name).chmod(0o755)
    env = {**os.environ, 'PATH': f'{tools}:{os.environ["PATH"]}',
           'SLURM_JOB_NUM_NODES': '2', 'SLURM_GPUS_ON_NODE': '1',
           'SLURM_JOB_NODELIST': 'here', 'SLURM_JOB_ID': '7',
           'OMP_NUM_THREADS': '1'}

    def run(background, *args):
        command = ['bash', 'slurm/golf.sbatch', *map(str, args)]
        more = dict(cwd=ROOT, text=True, env=env | {'PORT': str(free_port())})
        if background: return subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            **more)
        return subprocess.run(command, capture_output=True, timeout=300,
                              **more)
    return run


def lines(folder):
    return [json.loads(x) for x in
            (folder/'metrics.jsonl').read_text().splitlines()]


@pytest.mark.skipif(not shutil.which('bash'), reason='no bash here')
def test_two_launchers_are_one_run(slurm, tiny_run, shards, tmp_path):
    "The losses and the score of one process; then on from a snapshot."
    runs = tmp_path/'runs'
    more = TINY.replace('warmup_steps: 2', 'warmup_steps: 2, '
                        'snapshot_every: 8')
    out = runs/'whole'
    done = slurm(False, 'smoke', out, shards, '--overrides', more)
    assert done.returncode == 0, done.stderr[-2000:]
    for a, b in zip(lines(tiny_run), lines(out), strict=True):
        assert (a['kind'], a['step']) == (b['kind'], b['step'])
        assert abs(a['loss'] - b['loss']) < 1e-4
    golf('score', '--artifact', out/'model.golf', '--data', shards,
         '--json', tmp_path/'alone.json')
    alone = json.loads((tmp_path/'alone.json').read_text())
    shared = json.loads((out/'scores.json').read_text())
    for a, b in zip(alone['stages'], shared['stages'], strict=True):
        assert (a['name'], a['val_loss']) == (b['name'], b['val_loss'])


@pytest.mark.skipif(not shutil.which('bash'), reason='no bash here')
def test_a_requeued_job_goes_on(slurm, shards, tmp_path):
    "Killed, and started again on machines of other names."
    more = TINY.replace('steps: 20', 'steps: 60').replace(
        'warmup_steps: 2', 'warmup_steps: 2, snapshot_every: 4')
    ends = []
    for name in ('whole', 'cut'):
        out = tmp_path/'runs'/name
        job = slurm(name == 'cut', 'smoke', out, shards, '--overrides', more)
        if name == 'cut':
            while len(there := sorted(out.parent.glob(
                    '.cut.partial-*/snapshots/step-0000002*.pt'))) < 2:
                assert job.poll() is None, 'it ended before it was killed'
                time.sleep(.01)
            for pid in (job.pid, *descendants(job.pid)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            job.wait()
            os.rename(there[0].parent.parent, out.parent/'.cut.partial-far-1')
            job = slurm(False, 'smoke', out, shards, '--overrides', more)
        assert job.returncode == 0, job.stderr[-2000:]
        if name == 'cut': assert 'goes on after step' in job.stdout
        ends.append([(m['step'], m['loss']) for m in lines(out)])
    assert ends[0] == ends[1]
