"""Test-time training: what was scored, by which weights, on how many ranks."""
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT

from golf.config import ModelConfig, ScoreConfig, TttConfig
from golf.model import ByLayers, build_model
from golf.ranks import Ranks
from golf.score import deterministic
from golf.ttt import (chunk_targets, learning,
                      learning_parameters, plan_chunks, score_ttt)
from golf.windows import plan_windows, sum_losses, window_batch

SCORE = ScoreConfig(seq_len=32, stride=8, batch=8)
TTT = TttConfig(chunk_tokens=128, epochs=2, batch=3, lr=3e-3, blocks=1)


def small_model(seed=0):
    "Every block there is, with weights that do something."
    cfg = ModelConfig(layers=3, dim=32, heads=2, kv_heads=1, mlp_hidden=64,
                      vocab_size=128, smear=True, bigram_buckets=64,
                      bigram_dim=8, value_layers=(1, 2), value_dim=8,
                      residual_init='orthogonal', embed_std=.1)
    return build_model(cfg, 32, seed)


def make_text(n=640, seed=0):
    "Tokens with something to learn: a random order, with some noise."
    rng = np.random.default_rng(seed)
    ids = np.resize(rng.permutation(128)[:60], n + 1)
    noisy = rng.random(n + 1) < .2
    ids = np.where(noisy, rng.integers(0, 128, n + 1), ids)
    return SimpleNamespace(tokens=ids.astype(np.uint16), targets=n,
                           bpb=lambda nats: nats/n)


def targets_of(chunk):
    return [t for w in chunk for s, c in zip(w.starts, w.counts)
            for t in range(s + w.first, s + w.first + c)]


def first_pass(model, text, ttt=TTT, score=SCORE):
    "(losses in the text's order, the rows trained on, the stage)."
    seen, trained = [], []
    def record(x, y, first=0):
        losses = model(x, y, first)
        (trained if torch.is_grad_enabled() else seen).append(
            x if torch.is_grad_enabled() else losses)
        return losses
    stage = score_ttt(record, model, text, score, ttt, Ranks())
    counts = [window_batch(text.tokens, w, b, score.batch)[2]
              for chunk in plan_chunks(text.targets, score.seq_len,
                                       score.stride, ttt.chunk_tokens)
              for w in chunk for b in range(-(-len(w.starts)//score.batch))]
    assert len(counts) == len(seen), 'a forward that the plan does not need'
    return torch.cat([row[:n] for losses, ns in zip(seen, counts)
                      for row, n in zip(losses, ns)]), trained, stage


def test_each_target_once():
    "In order, by the windows of the plain plan, in the right chunk."
    rng = np.random.default_rng()
    for _ in range(500):
        n, length, size = rng.integers(1, (400, 50, 120))
        stride = rng.integers(1, length + 1)
        chunks = plan_chunks(n, length, stride, size)
        assert sum(map(targets_of, chunks), []) == list(range(n))
        starts = [s for chunk in chunks for w in chunk for s in w.starts]
        assert starts == [s for w in plan_windows(n, length, stride)
                          for s in w.starts]
        homes = [{(s + w.first)//size for w in chunk for s in w.starts}
                 for chunk in chunks]
        assert all(len(h) == 1 for h in homes)
        assert len(set.union(*homes)) == len(homes)
        assert [chunk_targets(c) for c in chunks] == [
            (targets_of(c)[0], len(targets_of(c))) for c in chunks]
    with pytest.raises(ValueError, match='1 at least'):
        plan_chunks(10, 4, 2, 0)


@pytest.mark.parametrize('ttt', [
    TTT, TttConfig(chunk_tokens=96, epochs=1, batch=8, lr=.05,
                   optimizer='sgd', blocks=3, embedding=True)])
def test_losses_know_only_what_came_before(ttt):
    "Other tokens after a target leave the losses up to it, bit by bit."
    text, rng = make_text(), np.random.default_rng()
    losses, _, _ = first_pass(small_model(), text, ttt)
    assert len(losses) == text.targets
    for t in [*rng.integers(0, text.targets - 1, 8), 127, 128]:
        other = make_text()
        shift = rng.integers(1, 128, text.targets - t - 1)
        other.tokens[t + 2:] = (other.tokens[t + 2:] + shift) % 128
        changed = first_pass(small_model(), other, ttt)[0] != losses
        assert not changed[:t + 1].any() and changed[t + 1:].any(), t


def test_trained_rows_were_scored():
    "Every row trained on lies in a chunk scored before; the last in none."
    text, model = make_text(), small_model()
    text.tokens = np.arange(641, dtype=np.int64)    # each token its place
    at = []
    def record(x, y, first=0):
        if torch.is_grad_enabled(): at.append((y.max().item(), done[0]))
        else: done[0] = max(done[0], y.max().item())
        return model(x % 128, y % 128, first)
    done = [0]
    score_ttt(record, model, text, SCORE, TTT, Ranks())
    assert at and all(last <= scored for last, scored in at)
    assert max(last for last, _ in at) == 512 < done[0] == 640
    assert len(at) == 4 * TTT.epochs * 2        # chunks, epochs, steps


def test_everything_is_put_back():
    "Weights, gradients, temperature: after a pass, and after an error."
    model, text = small_model(), make_text()
    model.skips.requires_grad_(False)
    model.temperature.fill_(.9)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    calls = []
    def fails(x, y, first=0):
        calls.append(model.temperature.item())
        if len(calls) > 12: raise KeyboardInterrupt
        return model(x, y, first)
    for forward in (model, fails):
        try: score_ttt(forward, model, text, SCORE, TTT, Ranks())
        except KeyboardInterrupt: assert forward is fails
        for k, v in model.state_dict().items():
            assert torch.equal(v, before[k]), k
        assert [k for k, p in model.named_parameters()
                if not p.requires_grad] == ['skips']
        assert all(p.grad is None for p in model.parameters())
        assert model.temperature.item() == pytest.approx(.9)
    assert 1. in calls and calls[0] == pytest.approx(.9)


def test_divergence_is_an_error():
    model, wild = small_model(), TttConfig(chunk_tokens=128, lr=1e30,
                                           optimizer='sgd')
    with pytest.raises(RuntimeError, match='lower ttt.lr'):
        score_ttt(model, model, make_text(), SCORE, wild, Ranks())


def test_without_learning_it_is_the_sliding_score():
    model, text = small_model(), make_text()
    stage = score_ttt(model, model, text, SCORE,
                      TttConfig(chunk_tokens=128, lr=1e-30), Ranks())
    alone = [sum_losses(model, text.tokens, chunk, SCORE.batch, Ranks())
             for chunk in plan_chunks(640, 32, 8, 128)]
    assert [r['nats'] for r in stage['chunks']] == alone
    whole = sum_losses(model, text.tokens, plan_windows(640, 32, 8),
                       SCORE.batch, Ranks())
    assert stage['val_loss'] == pytest.approx(whole/640, rel=1e-6)


def test_it_learns_and_says_how():
    "On a text with a pattern the later chunks gain, and the first nothing."
    model, text = small_model(), make_text(1280)
    still = score_ttt(model, model, text, SCORE,
                      TttConfig(chunk_tokens=128, lr=1e-30), Ranks())
    stage = score_ttt(model, model, text, SCORE, TTT, Ranks())
    gain = [a['nats'] - b['nats']
            for a, b in zip(still['chunks'], stage['chunks'])]
    assert gain[0] == 0 and min(gain[2:]) > 0
    assert sum(r['nats'] for r in stage['chunks']) == pytest.approx(
        stage['val_loss'] * 1280, rel=1e-12)
    assert {'name', 'val_loss', 'val_bpb', 'seconds', 'method',
            'chunks'} == set(stage)
    for part in ('128 targets', '2 epochs', 'adamw', '0.003', '1 blocks'):
        assert part in stage['method']
    json.dumps(stage)


def test_only_what_is_named_moves():
    model = small_model()
    names = learning_parameters(model, TTT)
    assert 'blocks.2.attn.q.weight' in names and 'bigram.scale' in names
    assert not {'tok_emb.weight', 'blocks.1.attn.q.weight',
                'bigram.table.weight', 've.proj.weight'} & set(names)
    with learning(model, names):
        model(*torch.randint(128, (2, 2, 32))).mean().backward()
    assert {k for k, p in model.named_parameters()
            if p.grad is not None} == set(names)


@pytest.mark.parametrize('layers', [False, True])
def test_scoring_keeps_its_graph(layers):
    "After a sliding pass, training adds graphs and scoring none."
    model, text, graphs = small_model(), make_text(), []
    def count(graph, inputs):
        graphs.append(torch.is_grad_enabled())
        return graph
    torch._dynamo.reset()
    compiled = (ByLayers(model, backend=count) if layers else
                torch.compile(model, fullgraph=True, dynamic=False,
                              backend=count))
    sum_losses(compiled, text.tokens, plan_windows(640, 32, 8), SCORE.batch,
               Ranks())
    before = len(graphs)
    score_ttt(compiled, model, text, SCORE, TTT, Ranks())
    new = graphs[before:]
    assert new and all(new) and (layers or len(new) == 1)
    assert not any(graphs[:before])
    torch._dynamo.reset()


def test_deterministic_is_put_back():
    on = torch.are_deterministic_algorithms_enabled
    with deterministic(False): assert not on()
    with pytest.raises(KeyError):
        with deterministic(True):
            assert on()
            raise KeyError
    assert not on()


TWO = '''
import json, sys
sys.path.insert(0, 'tests')
from test_ttt import *
from golf.ranks import start_ranks
with start_ranks('cpu', threads=1) as ranks:
    found = []
    for kw in json.loads(sys.argv[1]):
        model = small_model()
        stage = score_ttt(model, model, make_text(), SCORE,
                          TttConfig(chunk_tokens=128, **kw), ranks)
        found.append([r['nats'] for r in stage['chunks']])
    if ranks.first: print(json.dumps(found))
'''


def test_two_ranks_adapt_as_one(tmp_path):
    "Steps that do not divide, and steps with fewer rows than ranks."
    settings = [dict(batch=3, lr=3e-3), dict(batch=1, epochs=1, lr=1e-3),
                dict(batch=3, lr=.1, optimizer='sgd', blocks=3,
                     embedding=True)]
    (tmp_path/'two.py').write_text(TWO)
    found = []
    for start in ([], ['-m', 'torch.distributed.run', '--standalone',
                       '--nproc-per-node', '2']):
        done = subprocess.run(
            [sys.executable, *start, tmp_path/'two.py', json.dumps(settings)],
            cwd=ROOT, capture_output=True, text=True, timeout=300,
            env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': '.'})
        assert done.returncode == 0, done.stderr
        found.append(np.array(json.loads(done.stdout)) / 128)
    one, two = found
    assert np.abs(one - two).max() < 1e-6, np.abs(one - two).max(1)
    assert (one[:, 0] == two[:, 0]).all() and (one[:, 0] != one[:, 1]).all()
