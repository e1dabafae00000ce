"""Every system of the seeds, shrunk, from training to its last score."""
import json
import math

import pytest
from conftest import ROOT, TINY, golf

from golf.cli import counted_code, describe, main
from golf.config import load_run_config, parse_yaml

PARAMS = dict(pr137=21_778_504, pr219=29_191_777, pr314=27_878_489,
              pr469=27_090_066, pr576=33_580_124)
# all layers stay, since some of them differ; what is wide becomes narrow
SMALL = parse_yaml(TINY, 'TINY') | dict(limit_bytes=16_000_000)


def shrink(name):
    "Overrides that leave a system its blocks and nothing of its size."
    full = load_run_config(name)[0]
    model = dict(dim=48, heads=6, kv_heads=6 * full.model.kv_heads
                 // full.model.heads, mlp_hidden=64, vocab_size=320)
    if full.model.rope_dims: model['rope_dims'] = 4
    if full.model.bigram_buckets:
        model |= dict(bigram_buckets=64, bigram_dim=16)
    if full.model.value_layers: model['value_dim'] = 16
    train = SMALL['train'] | dict(device='cpu', steps=12, heldout_every=6)
    return SMALL | dict(
        model=model, train=train, average=dict(every=2),
        optim=dict(momentum_warmup_steps=4), gptq=dict(tokens=2048),
        ttt=dict(chunk_tokens=512, batch=4))


def limited(extra):
    "Overrides of #576 with a limit of its code and so many bytes."
    small = shrink('pr576') | dict(fit=dict(margin=0))
    cfg, _ = load_run_config('pr576', overrides=small)
    return small | dict(limit_bytes=counted_code(cfg) + extra)


@pytest.mark.parametrize('name', PARAMS)
def test_has_the_parameters_of_its_log(name):
    "The exact number, and every file in params/ is one that we know."
    assert describe(load_run_config(name)[0])['n_params'] == PARAMS[name]
    files = {p.stem for p in (ROOT/'params').glob('*.yaml')}
    assert files == {*PARAMS, 'smoke', 'onegpu'}


@pytest.mark.parametrize('name', PARAMS)
def test_trains_packs_and_scores(name, shards, tmp_path, capsys):
    "Learns, rounds as it should, and comes back from its artifact."
    out, small = tmp_path/'run', shrink(name)
    main(['train', name, '--data', str(shards), '--out', str(out),
          '--overrides', json.dumps(small)])
    lines = [json.loads(x) for x in
             (out/'metrics.jsonl').read_text().splitlines()]
    losses = [m['loss'] for m in lines if m['kind'] == 'train']
    assert losses[-1] < losses[0] < math.log(320) + .1
    assert {m['qat'] for m in lines if m['kind'] == 'train'} >= {1}
    stages = {}
    for what, source in (('raw', out), ('artifact', out/'model.golf')):
        main(['score', f'--{what}', str(source), '--data', str(shards),
              '--device', 'cpu', '--json', str(tmp_path/'s.json')])
        found = json.loads((tmp_path/'s.json').read_text())['stages']
        stages |= {s['name']: s['val_bpb'] for s in found}
    cfg = load_run_config(name)[0]
    averages = cfg.average.method != 'none'
    assert set(stages) == {'raw', 'quantized', 'sliding'} | {
        *['averaged'] * averages, *['ttt'] * cfg.ttt.enabled}
    assert cfg.gptq.enabled == (out/'checkpoint/hessians.pt').is_file()
    if cfg.gptq.enabled:
        other = tmp_path/'nearest.golf'
        main(['pack', '--folder', str(out), '--artifact', str(other),
              '--overrides', '{gptq: {enabled: false}}'])
        assert other.read_bytes() != (out/'model.golf').read_bytes()
    exported = stages['averaged' if averages else 'raw']
    assert abs(stages['quantized'] - exported) < .2
    assert stages['sliding'] < stages['quantized'] + .1


def test_is_made_to_fit(shards, tmp_path):
    "A limit that its weights exceed by far: the grid gives way, once."
    out = tmp_path/'run'
    small = limited(100_000)
    main(['train', 'pr576', '--data', str(shards), '--out', str(out),
          '--overrides', json.dumps(small)])
    facts = json.loads((out/'checkpoint/train.json').read_text())
    assert 'auto' not in str(facts['formats'])
    assert 90_000 < (out/'model.golf').stat().st_size < 100_100


def test_says_how_much_is_too_much(shards, tmp_path, capsys):
    "No grid is wide enough: an error before the first step, no folder."
    small = limited(1000)
    with pytest.raises(SystemExit, match='over the'):
        main(['train', 'pr576', '--data', str(shards), '--out',
              str(tmp_path/'run'), '--overrides', json.dumps(small)])
    assert not (tmp_path/'run').exists()


@pytest.mark.parametrize('world', [
    2, pytest.param(8, marks=pytest.mark.slow)])
def test_many_ranks_do_all_of_it(world, shards, tmp_path):
    "#576 on several processes: the losses, the grid and the scores of one."
    small = limited(100_000)
    small['data'] = small['data'] | dict(spans=8)
    small['qat'] = dict(start_step=3, refresh_every=4)  # solved by step 7
    runs = []
    for nproc in (1, world):
        out = tmp_path/f'run{nproc}'
        golf('train', 'pr576', '--data', shards, '--out', out,
             '--overrides', json.dumps(small), nproc=nproc)
        lines = [json.loads(x) for x in
                 (out/'metrics.jsonl').read_text().splitlines()]
        facts = json.loads((out/'checkpoint/train.json').read_text())
        runs.append(([m['loss'] for m in lines], facts))
    (alone, one), (shared, many) = runs
    assert 'auto' not in str(one['formats'])
    worst = max(abs(a - b) for a, b in zip(alone, shared, strict=True))
    print(f'{world} ranks: losses within {worst:.1e}')
    assert worst < 1e-4
    assert one['formats'] == many['formats']
    assert many['temperature'] == pytest.approx(one['temperature'], rel=1e-2)
    scores = {(nproc, by): scored(tmp_path/f'run{nproc}', shards, by)
              for nproc, by in ((1, 1), (1, world), (world, 1))}
    assert list(scores[1, 1]) == ['quantized', 'sliding', 'ttt']
    for name, bpb in scores[1, world].items():  # of one artifact
        apart = abs(bpb - scores[1, 1][name])
        print(f'{name} by {world} ranks: within {apart:.1e}')
        assert apart < (1e-6 if name == 'ttt' else 1e-15)
    for name, bpb in scores[world, 1].items():  # of what they have trained
        assert bpb == pytest.approx(scores[1, 1][name], abs=1e-3)


def scored(run, shards, nproc):
    "{stage: BPB} of an artifact, scored by so many processes."
    path = run/f'scores-{nproc}.json'
    golf('score', '--artifact', run/'model.golf', '--data', shards,
         '--device', 'cpu', '--json', path, nproc=nproc)
    return {s['name']: s['val_bpb']
            for s in json.loads(path.read_text())['stages']}
