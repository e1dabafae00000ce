"""Sliding windows: exact ones, ones that keep keys and values, their bits."""
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import golf
from torch._dynamo.testing import CompileCounter

from golf import attention
from golf.check import check_stage
from golf.config import ModelConfig, ScoreConfig, TttConfig
from golf.model import GPT, compile_model
from golf.ranks import Ranks
from golf.rules import RuleBook, open_ledger, probe_forward, probe_pass
from golf.score import (check_ends, score_stage, short_windows, sliding_plan)
from golf.ttt import score_ttt
from golf.windows import (batch_starts, plan_windows, row_losses, row_sums,
                          row_targets, send_part)

V, L = 96, 32
EVERY = dict(layers=5, dim=32, heads=4, kv_heads=2, mlp_hidden=64,
             vocab_size=V, smear=True, bigram_buckets=50, bigram_dim=8,
             value_layers=(3, 4), value_dim=8, xsa_layers=3, rope_dims=4,
             rope_ntk=2., ln_scale=True, activation='leaky_relu2')
SYSTEMS = [EVERY, EVERY | dict(layers=1, value_layers=(0,), xsa_layers=1),
           EVERY | dict(layers=2, kv_heads=4, value_layers=(), xsa_layers=2),
           dict(layers=4, dim=32, heads=4, kv_heads=1, mlp_hidden=64,
                vocab_size=V)]
EXACT = ScoreConfig(seq_len=L, stride=4, batch=8, threads=1)
KEPT = replace(EXACT, method='kept', kept_windows=3)


def random_model(system=EVERY, dtype=torch.float32, seed=0, size=1.5):
    "Random weights large enough for attention to be sharp."
    torch.manual_seed(seed)
    model = GPT(ModelConfig(**system), 4*L, dtype).to(dtype).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=size*p.size(-1)**-.5)
    return model


def make_tokens(n=700, seed=0):
    return np.random.default_rng(seed).integers(0, V, n + 1).astype(np.uint16)


def make_text(n=700):
    return SimpleNamespace(tokens=make_tokens(n), targets=n,
                           bpb=lambda nats: nats/n)


def all_losses(forward, tokens, plan, size=8):
    "Nats of each target, in order [n]."
    out = []
    for w in plan:
        ids, low = send_part(tokens, [w], 'cpu')
        for starts, counts in zip(*batch_starts(w, size)):
            with torch.no_grad(): losses = row_losses(
                forward, ids, w, torch.from_numpy(starts - low))
            out += [row[:n].numpy() for row, n in zip(losses, counts)]
    return np.concatenate(out)


class Alone:
    "One of `world` ranks, by itself."
    device = torch.device('cpu')
    def __init__(self, rank, world): self.rank, self.world = rank, world
    def sum_(self, x): return x


@pytest.mark.parametrize('system', SYSTEMS)
def test_the_end_of_a_row_is_part_of_the_row(system):
    "Float64: the last layer for the scored positions alone."
    model = random_model(system, torch.float64)
    x, y = torch.randint(0, V, (2, 3, L))
    whole = model(x, y)
    for first in (0, 1, 17, L - 1):
        end = model(x, y, first)
        assert end.shape == (3, L - first)
        assert (end - whole[:, first:]).abs().max() < 1e-4  # fp32 logits
        h = model.hidden(x, first) - model.hidden(x)[:, first:]
        assert h.abs().max() < 1e-12


def test_the_former_score():
    "In float32: whole rows of which the end is used."
    model, tokens = random_model(), make_tokens()
    plan = plan_windows(700, L, 4)
    now = all_losses(model, tokens, plan)
    then = all_losses(lambda x, y, first: model(x, y)[:, first:], tokens,
                      plan)
    assert len(now) == 700 and np.abs(now - then).max() < 1e-4
    assert abs(now.sum() / then.sum() - 1) < 1e-6


@pytest.mark.parametrize('system', SYSTEMS)
@pytest.mark.parametrize('step, kept', [(4, 2), (8, 4), (32, 3), (1, 2)])
def test_kept_keys_by_their_mask(system, step, kept, monkeypatch):
    "Every layer with a full matrix of who sees whom."
    def by_mask(q, k, v, span, step):
        T, Q = k.size(2), q.size(2)
        i = torch.arange(T)
        end = span + step*((i - span)//step + 1).clamp(min=0)
        seen = (i <= i[:, None]) & (i >= end[:, None] - span)
        k, v = (z.repeat_interleave(q.size(1)//z.size(1), 1) for z in (k, v))
        s = (q @ k.mT / q.size(-1)**.5).masked_fill(~seen[T - Q:], -math.inf)
        return s.softmax(-1) @ v
    model = random_model(system, torch.float64)
    x = torch.randint(0, V, (3, kept*L))
    ours = model.hidden(x, L - step, (L, step))
    monkeypatch.setattr(attention, 'attend_kept', by_mask)
    assert (ours - model.hidden(x, L - step, (L, step))).abs().max() < 1e-12


def test_kept_windows_without_a_past_are_windows():
    "One layer: keys and values depend on two tokens at most."
    model = random_model(SYSTEMS[1], torch.float64)
    model.smear = model.bigram = None  # and now on one
    tokens = make_tokens()
    exact = all_losses(model, tokens, plan_windows(700, L, 4))
    kept = all_losses(model, tokens, plan_windows(700, L, 4, 3))
    assert np.abs(exact - kept).max() < 1e-4
    deep = random_model(dtype=torch.float64)
    exact = all_losses(deep, tokens, plan_windows(700, L, 4))
    kept = all_losses(deep, tokens, plan_windows(700, L, 4, 3))
    assert np.abs(exact - kept)[:L].max() == 0       # the first window
    assert .01 < np.abs(exact - kept).max()          # another function


@pytest.mark.parametrize('score', [EXACT, KEPT])
def test_no_loss_knows_what_comes_later(score):
    "To the last bit, at random places and at the edges of rows."
    model, tokens = random_model(), make_tokens().astype(np.int64)
    plan = sliding_plan(700, score)
    edges = (plan[1].starts[1:4] + plan[1].first - 1).tolist()
    at = [*np.random.default_rng().integers(0, 698, 6), L - 1, L, *edges]
    book = RuleBook()
    probe_pass(book, lambda t: all_losses(model, t, plan), tokens, V, at)
    for w in plan: probe_forward(book, model, tokens, w, 8, V, Ranks())
    assert book.checks == dict(causal='passed', normalized='passed')


def test_a_leak_in_kept_rows_is_found():
    "A mask that is one token too long."
    model, tokens = random_model(), make_tokens()
    def leaky(x, y, first=0, span=0):
        x = x.roll(-1, 1) if span else x
        return model(x, y, first, *([span] if span else []))
    w = sliding_plan(700, KEPT)[1]
    with pytest.raises(Exception, match='causal'):
        probe_forward(RuleBook(), leaky, tokens, w, 8, V, Ranks())
    with pytest.raises(RuntimeError, match='at 0'):
        check_ends(leaky, tokens, w, 8, torch.device('cpu'))


def test_blocks_in_a_wrong_order_are_found(monkeypatch):
    "The first block that has moved is compared, too."
    model, tokens = random_model(SYSTEMS[2], size=.9), make_tokens()
    w = sliding_plan(700, KEPT)[1]
    check_ends(model, tokens, w, 8, torch.device('cpu'))
    right = attention.attend_kept
    def wrong(q, k, v, span, step):
        y = right(q, k, v, span, step)
        n = y.size(2) - (k.size(2) - span)
        return torch.cat((y[:, :, :n], y[:, :, n:].flip(2)), 2)
    monkeypatch.setattr('golf.model.attend_kept', wrong)
    with pytest.raises(RuntimeError, match='at 4'):
        check_ends(model, tokens, w, 8, torch.device('cpu'))


def test_each_target_once():
    "Random sizes, strides and rows, through the ledger."
    rng = np.random.default_rng()
    for _ in range(300):
        n, m, S, kept = rng.integers(1, (400, 12, 6, 7))
        plan, book = plan_windows(n, m*S, S, kept), RuleBook()
        ledger = open_ledger(book, 'sliding', n)
        counts = row_targets(plan)
        ledger.score(plan, [1.]*len(counts), [1]*len(counts))
        ledger.close()
        assert min(counts) > 0
        for w in plan[1:]: assert (w.counts <= w.length - w.first).all()


@pytest.mark.parametrize('score', [EXACT, KEPT, replace(KEPT, stride=32)])
def test_any_number_of_ranks(score):
    "Each row's sum, to the last bit."
    model, tokens = random_model(), make_tokens()
    plan = sliding_plan(700, score)
    one = row_sums(model, tokens, plan, 8, Alone(0, 1))
    for world in (2, 3, 64):
        parts = [row_sums(model, tokens, plan, 8, Alone(r, world))
                 for r in range(world)]
        assert one == np.sum(parts, 0).tolist()
    assert math.isclose(math.fsum(one), all_losses(
        model, tokens, plan).astype(float).sum(), rel_tol=1e-6)


def test_stages_name_their_method():
    model, text = random_model(), make_text()
    exact, kept = (score_stage('sliding', model, text, s, Ranks())
                   for s in (EXACT, KEPT))
    assert exact['method'] == 'exact sliding window, 32 tokens, stride 4'
    assert kept['method'] == ('sliding window with kept keys and values, '
                              '32 tokens, stride 4, rows of 96')
    assert exact['along'][-1][0] == kept['along'][-1][0] == 700
    assert exact['val_loss'] != kept['val_loss']


def test_the_checker_follows_the_method():
    "By definition, each target in a row that ends in noise."
    model, text = random_model(), make_text()
    ids = text.tokens.astype(np.int64)
    for score in (EXACT, KEPT):
        stage = score_stage('sliding', model, text, score, Ranks())
        for along in (stage['along'], None):
            found = check_stage(model, ids, stage, along, score, 700, 0,
                                Ranks())
            assert found['off'] < 1e-4, (score.method, along)
        false = stage | dict(val_loss=stage['val_loss'] - .01)
        found = check_stage(model, ids, false, stage['along'], score, 700, 0,
                            Ranks())
        assert found['off'] > found['allowed']
        half = [[text.targets//2, stage['along'][-1][1]/2]]  # of the text
        false = stage | dict(val_loss=half[-1][1]/text.targets)
        found = check_stage(model, ids, false, half, score, 700, 0, Ranks())
        assert found['off'] is None


def test_test_time_training_stays_exact():
    text = make_text(640)
    ttt = TttConfig(enabled=True, chunk_tokens=128, epochs=1, batch=4)
    a, b = (score_ttt(m, m, text, s, ttt, Ranks()) for m, s in
            ((random_model(), EXACT), (random_model(), KEPT)))
    assert a['val_loss'] == b['val_loss'] and a['chunks'] == b['chunks']


@pytest.mark.parametrize('score', [EXACT, KEPT])
def test_two_graphs(score):
    "Plain rows and windows, whatever else is checked on the way."
    torch.compiler.reset()
    model, text = random_model(size=.5), make_text()
    counter = CompileCounter()
    forward = torch.compile(model, backend=counter, fullgraph=True,
                            dynamic=False)
    for w in sliding_plan(700, score):
        probe_forward(RuleBook(), forward, text.tokens, w, 8, V, Ranks())
        check_ends(forward, text.tokens, w, 8, torch.device('cpu'))
    for name in ('quantized', 'sliding'):
        score_stage(name, forward, text, score, Ranks())
    assert counter.frame_count == 2
    torch.compiler.reset()


def test_short_windows_keep_the_kind():
    for L, S, k in ((2048, 64, 2), (2048, 512, 4), (100, 30, 1), (8, 8, 1)):
        score = ScoreConfig(seq_len=L, stride=S, kept_windows=max(2, k),
                            method='exact' if k == 1 else 'kept')
        small = short_windows(score, 64)
        assert small.seq_len == min(64, L) and small.method == score.method
        assert (small.stride < small.seq_len) == (S < L)
        sliding_plan(5000, small)


def test_deterministic_mode(monkeypatch):
    model, text = random_model(), make_text()
    free = score_stage('sliding', model, text, KEPT, Ranks())['val_loss']
    torch.use_deterministic_algorithms(True)
    try: strict = score_stage('sliding', model, text, KEPT, Ranks())
    finally: torch.use_deterministic_algorithms(False)
    assert strict['val_loss'] == free


def test_the_command(tiny_run, shards, tmp_path):
    "--method and --stride; two ranks; the lines of wrong input."
    found = {}
    for name, nproc, args in (('own', 1, ()), ('wide', 1, ('--stride', 32)),
                              ('kept', 1, ('--method', 'kept')),
                              ('two', 2, ('--method', 'kept'))):
        golf('score', '--artifact', tiny_run/'model.golf', '--data', shards,
             '--device', 'cpu', '--json', tmp_path/name, *args, nproc=nproc)
        found[name] = json.loads((tmp_path/name).read_text())['stages'][1]
    assert 'stride 32' in found['wide']['method']
    assert 'kept' in found['kept']['method']
    assert found['kept']['val_bpb'] == found['two']['val_bpb']
    assert abs(found['kept']['val_bpb'] - found['own']['val_bpb']) < .01
    for args, said in ((('--method', 'kept', '--stride', 48), 'stride'),
                       (('--stride', 0), 'not positive')):
        done = golf('score', '--artifact', tiny_run/'model.golf', '--data',
                    shards, *args, check=False)
        assert done.returncode == 1 and said in done.stderr
        assert 'Traceback' not in done.stderr
    done = golf('score', '--raw', tiny_run, '--data', shards, '--stride', 32,
                check=False)
    assert done.returncode == 1 and '--raw' in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize('how', ['on', 'layers'])
@pytest.mark.parametrize('score', [EXACT, KEPT])
def test_compiled(score, how):
    "By Inductor, for the CPU: the same losses."
    torch.compiler.reset()
    model, text = random_model(size=.5), make_text()
    forward = compile_model(model, how)
    for w in sliding_plan(700, score): check_ends(
        forward, text.tokens, w, 8, torch.device('cpu'))
    a, b = (score_stage('sliding', f, text, score, Ranks())['val_loss']
            for f in (model, forward))
    assert abs(a - b) < 1e-5
    torch.compiler.reset()
