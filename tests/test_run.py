"""The run notebook, through papermill, as a user starts it."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, TINY, golf

from golf.report import check_result


def start(to, **parameters):
    "Papermill on the run notebook; the process."
    args = [x for k, v in parameters.items() for x in ('-p', k, str(v))]
    return subprocess.Popen(
        [sys.executable, '-m', 'papermill', '--no-progress-bar',
         'nbs/99_run.ipynb', str(to), *args], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def run(to, **parameters):
    "(exit code, what it printed)"
    process = start(to, **parameters)
    said, _ = process.communicate()
    return process.returncode, said


def outputs(to):
    "All outputs of an executed notebook."
    cells = json.loads(to.read_text('utf8'))['cells']
    return [o for c in cells for o in c.get('outputs', [])]


def shown(to):
    "The text a reader of the notebook sees in its outputs."
    parts = []
    for o in outputs(to):
        parts += o.get('text', []) + o.get('traceback', [])
        parts += o.get('data', {}).get('text/markdown', [])
    return ''.join(parts)


@pytest.fixture(scope='module')
def finished(shards, tmp_path_factory):
    "The whole notebook on the small shards: (notebook, run folder)."
    tmp = tmp_path_factory.mktemp('first')
    code, said = run(tmp/'run.ipynb', config='smoke', data=shards,
                     out=tmp/'run', overrides=TINY)
    assert code == 0, said
    return tmp/'run.ipynb', tmp/'run'


def stages(result):
    return [(s['name'], s['val_loss'], s['val_bpb'])
            for s in result['stages']]


def test_what_a_run_leaves(finished):
    notebook, out = finished
    assert sorted(p.name for p in out.parent.iterdir()) == \
        ['run', 'run.ipynb'], 'something half-written is left'
    for name in ('params.yaml', 'metrics.jsonl', 'log.txt', 'model.golf',
                 'result.json', 'checkpoint/model.pt'):
        assert (out/name).is_file(), name
    result = json.loads((out/'result.json').read_text())
    check_result(result)
    assert [s['name'] for s in result['stages']] == \
        ['raw', 'quantized', 'sliding']
    assert result['bytes']['model'] == (out/'model.golf').stat().st_size
    assert result['train']['steps'] == 20


def test_the_notebook_shows_the_run(finished):
    notebook, out = finished
    pictures = [o for o in outputs(notebook)
                if 'image/png' in o.get('data', {})]
    assert len(pictures) >= 5
    text = shown(notebook)
    for word in ('xz -9e', 'order-0', 'untrained', 'quantized', 'sliding'):
        assert word in text, word
    assert not [o for o in outputs(notebook) if o.get('name') == 'stderr']


def test_scoring_again_gives_the_same_digits(finished, shards, tmp_path):
    "From the artifact alone, in a fresh process."
    _, out = finished
    golf('score', '--artifact', out/'model.golf', '--data', shards,
         '--json', tmp_path/'again.json')
    again = json.loads((tmp_path/'again.json').read_text())
    first = json.loads((out/'result.json').read_text())
    assert stages(again) == stages(first)[1:]
    assert again['data'] == first['data']


def test_the_same_seed_gives_the_same_run(finished, tiny_run):
    "Notebook and shell, in a budget of steps: equal to the last bit."
    _, out = finished
    assert (out/'model.golf').read_bytes() == \
        (tiny_run/'model.golf').read_bytes()
    losses = [[json.loads(x)['loss'] for x in
               (f/'metrics.jsonl').read_text().splitlines()]
              for f in (out, tiny_run)]
    assert losses[0] == losses[1]


def test_scored_anew_without_training(finished, shards, tmp_path):
    "The same weights, another window: only its stage is another."
    _, out = finished
    code, said = run(tmp_path/'run.ipynb', config='smoke', data=shards,
                     out=tmp_path/'run', trained=out, overrides=TINY.replace(
                         'stride: 16', 'stride: 32'))
    assert code == 0, said
    mine, first = (json.loads((f/'result.json').read_text())
                   for f in (tmp_path/'run', out))
    assert mine['train'] == first['train']
    assert stages(mine)[:2] == stages(first)[:2]
    assert stages(mine)[2] != stages(first)[2]


def test_another_config_in_its_folder_is_refused(finished, shards, tmp_path):
    _, out = finished
    before = (out/'result.json').read_bytes()
    code, said = run(tmp_path/'run.ipynb', config='smoke', data=shards,
                     out=out, seed=8, overrides=TINY)
    assert code != 0 and 'seed' in shown(tmp_path/'run.ipynb')
    assert (out/'result.json').read_bytes() == before


def test_one_rank_fails(shards, tmp_path):
    "A bad id that only rank 1 reads: all stop, the notebook says why."
    data = shutil.copytree(shards, tmp_path/'data')
    path = sorted(data.glob('fineweb_train_*'))[1]
    raw = bytearray(path.read_bytes())
    at = 25*4*257 + 2*257 + 50      # step 26, span 2 of 4: rank 1's first
    at = 1024 + 2*(at - 20_000)     # in the second shard
    raw[at:at + 2] = np.uint16(999).tobytes()
    path.write_bytes(raw)
    code, said = run(tmp_path/'run.ipynb', config='smoke', data=data,
                     out=tmp_path/'run', nproc=2,
                     overrides=TINY.replace('steps: 20', 'steps: 40'))
    text = shown(tmp_path/'run.ipynb')
    assert code != 0 and 'rank 1' in text and '999' in text
    assert not (tmp_path/'run').exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == \
        ['data', 'run.ipynb']


def workers(tmp_path):
    "Processes that train in a folder below `tmp_path`, by their rank."
    found = {}
    for pid in filter(str.isdigit, os.listdir('/proc')):
        try:
            line = open(f'/proc/{pid}/cmdline').read()
            env = open(f'/proc/{pid}/environ').read()
        except OSError: continue
        if str(tmp_path) in line and '\0golf\0' in line + '\0' or \
                (str(tmp_path) in line and 'golf/__main__' in line):
            for item in env.split('\0'):
                if item.startswith('RANK='): found[int(item[5:])] = int(pid)
    return found


@pytest.mark.skipif(not os.path.isdir('/proc'), reason='needs /proc')
def test_one_rank_is_killed(shards, tmp_path):
    "kill -9 on rank 1 in mid-training."
    long = TINY.replace('steps: 20', 'steps: 100000')
    process = start(tmp_path/'run.ipynb', config='smoke', data=shards,
                    out=tmp_path/'run', nproc=2, overrides=long)
    deadline = time.time() + 120
    while time.time() < deadline:
        if list(tmp_path.glob('.run*/metrics.jsonl')) and \
                1 in workers(tmp_path): break
        time.sleep(.3)
    time.sleep(1)
    os.kill(workers(tmp_path)[1], signal.SIGKILL)
    process.communicate(timeout=120)
    text = shown(tmp_path/'run.ipynb')
    assert process.returncode != 0
    assert 'rank 1' in text and 'SIGKILL' in text
    assert not workers(tmp_path), 'a process is still running'
    assert [p.name for p in tmp_path.iterdir()] == ['run.ipynb']


def test_a_model_over_the_limit(shards, tmp_path):
    "An error with a table of the bytes; the trained weights are kept."
    over = TINY.replace('{model:', '{limit_bytes: 22000, model:', 1)
    code, said = run(tmp_path/'run.ipynb', config='smoke', data=shards,
                     out=tmp_path/'run', overrides=over)
    text = shown(tmp_path/'run.ipynb')
    assert code != 0 and 'over the limit of 22,000' in text
    assert 'embedding' in text and 'code' in text
    assert not (tmp_path/'run').exists()
    assert (tmp_path/'run.failed/checkpoint/model.pt').is_file()


@pytest.mark.slow
def test_the_default_run_beats_xz(tmp_path):
    "`make run` on the embedded text: sliding BPB below that of xz -9e."
    from golf.corpus import embedded_dataset, text_baselines
    code, said = run(tmp_path/'run.ipynb', config='smoke',
                     out=tmp_path/'run')
    assert code == 0, said
    final = json.loads((tmp_path/'run/result.json').read_text())['final']
    assert final['stage'] == 'sliding'
    assert final['val_bpb'] < text_baselines(embedded_dataset())['xz']


def test_the_rules_of_a_finished_run(finished):
    "What the processes checked, together; a text of one's own is no contest."
    result = json.loads((finished[1]/'result.json').read_text())
    checks = result['rules']['checks']
    assert result['rules']['legal'] is True
    assert {k for k, v in checks.items() if v != 'passed'} == {
        'canonical_split', 'train_clock'}


def test_the_checker_agrees(finished, shards, tmp_path):
    "In a fresh process; and it does not agree with another number."
    run_ = shutil.copytree(finished[1], tmp_path/'run')
    golf('check', run_, '--data', shards)
    report = json.loads((run_/'check.json').read_text())
    assert report['ok'] and not report['breaches']
    result = json.loads((run_/'result.json').read_text())
    for s in (result['stages'][-1], result['final']):
        for key in ('val_loss', 'val_bpb'): s[key] *= .999
    (run_/'result.json').write_text(json.dumps(result))
    done = golf('check', run_, '--data', shards, check=False)
    assert done.returncode == 1 and 'sliding' in done.stderr
