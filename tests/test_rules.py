"""Each illegal act of the contest, staged, and caught by its rule's name."""
import math
import os
import random
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, make_texts

from golf.artifact import export_artifact
from golf.averaging import build_average
from golf.blocks import SmearGate
from golf.calibrate import collect_hessians
from golf.config import (AverageConfig, ModelConfig, ScoreConfig,
                         load_run_config)
from golf.data import (BOS, Loader, TokenStream, byte_tables,
                       encode_documents, load_tokenizer, open_dataset,
                       target_bytes, train_tokenizer, val_targets,
                       write_split)
from golf.model import build_model
from golf.ranks import Ranks
from golf.rules import (RULES, RuleBook, RuleBreach, audit_hook,
                        check_byte_count, check_clock, check_disjoint,
                        check_size, future_leaks, log_mass, note_split,
                        open_ledger, probe_forward, probe_pass,
                        rules_section, text_guard)
from golf.windows import plan_windows, row_sums

V, L = 320, 32
SMALL = ModelConfig(layers=2, dim=32, heads=2, kv_heads=1, mlp_hidden=64,
                    vocab_size=V, smear=True, bigram_buckets=64,
                    bigram_dim=16, value_layers=(1,), value_dim=16,
                    xsa_layers=1)


@pytest.fixture(scope='module')
def dataset(shards): return open_dataset(shards)


@pytest.fixture(scope='module')
def tokens(dataset):
    return val_targets(dataset.val, L)[:2049].astype(np.int64)


@pytest.fixture(scope='module')
def model():
    "Every block there is, weights far from their quiet start."
    torch.set_num_threads(1)
    net, draw = build_model(SMALL, L), torch.Generator().manual_seed(0)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=.2, generator=draw)
    return net.eval()


def breach(rule, f, *args, **kw):
    "The call must break this rule, and no other."
    with pytest.raises(RuleBreach) as e: f(*args, **kw)
    assert e.value.rule == rule and str(e.value).startswith(f'{rule}: ')
    return str(e.value)


def enter(ledger, forward, tokens, plan):
    "Score rows into a ledger, as the scorer does."
    sums = row_sums(forward, tokens, plan, 16, Ranks())
    ledger.score(plan, sums, [1]*len(sums))
    return math.fsum(sums)


def cut(plan, a, b):
    return [w._replace(starts=w.starts[a:b], counts=w.counts[a:b])
            for w in plan]


def test_an_honest_pass(model, tokens):
    book, plan = RuleBook(), plan_windows(2048, L, L)
    ledger = open_ledger(book, 'plain', 2048)
    nats = enter(ledger, model, tokens, plan)
    assert ledger.close() == nats
    probe_forward(book, model, tokens, plan[0], 32, V, Ranks())
    assert set(book.checks.values()) == {'passed'}
    assert set(book.checks) == {'scored_once', 'score_first', 'causal',
                                'normalized'}


# --- the order of scores -------------------------------------------------

def test_rescoring(model, tokens):
    "#576: a second pass with weights that were trained on the text."
    book, plan = RuleBook(), plan_windows(2048, L, L)
    ledger = open_ledger(book, 'ttt', 2048)
    enter(ledger, model, tokens, plan)
    said = breach('scored_once', enter, ledger, model, tokens, plan)
    assert 'has its score already' in said
    assert book.checks['scored_once'] == 'failed'


def test_rescoring_part_of_a_chunk(model, tokens):
    plan = plan_windows(2048, L, L)
    ledger = open_ledger(RuleBook(), 'ttt', 2048)
    enter(ledger, model, tokens, cut(plan, 0, 20))
    breach('scored_once', enter, ledger, model, tokens, cut(plan, 19, 40))


def test_leaving_targets_out(model, tokens):
    "#137 drops the tail; hard targets might be forgotten as well."
    plan = plan_windows(2048, L, L)
    ledger = open_ledger(RuleBook(), 'plain', 2048)
    enter(ledger, model, tokens, cut(plan, 0, 20))
    breach('scored_once', enter, ledger, model, tokens, cut(plan, 21, None))
    enter(ledger, model, tokens, cut(plan, 20, 60))
    breach('scored_once', ledger.close)


def test_the_loose_end_of_sliding_windows(model, tokens):
    "#198 to #576 keep windows while they hold any token."
    lead, rest = plan_windows(200, L, 8)
    for step, said in ((4, 'already'), (8, '204 scores of 200 targets')):
        loose = rest._replace(
            starts=np.append(rest.starts, rest.starts[-1] + step),
            counts=np.append(rest.counts, 4))
        assert said in breach(
            'scored_once', enter, open_ledger(RuleBook(), 'sliding', 200),
            model, tokens[:201], [lead, loose])


@pytest.mark.parametrize('times', [0, 2])
def test_ranks_that_share_a_row_or_forget_one(times):
    plan = plan_windows(320, L, L)
    ledger = open_ledger(RuleBook(), 'plain', 320)
    breach('scored_once', ledger.score, plan, [1.]*10,
           [1]*4 + [times] + [1]*5)


def test_training_on_a_chunk_before_scoring_it(model, tokens):
    "#402, #677."
    plan = plan_windows(2048, L, L)
    ledger = open_ledger(RuleBook(), 'ttt', 2048)
    breach('score_first', ledger.train, 0, 1024)
    enter(ledger, model, tokens, cut(plan, 0, 32))
    assert len(tokens[ledger.train(0, 1024)]) == 1025
    breach('score_first', ledger.train, 0, 1025)
    breach('score_first', ledger.train, 1024, 1)


def test_the_order_of_a_random_pass():
    "Any interleaving of scoring and training against a plain reference."
    rng = random.Random(0)
    for _ in range(200):
        n = rng.randint(1, 200)
        plan = plan_windows(n, rng.randint(1, 20), 1)
        ledger, scored, pos = open_ledger(RuleBook(), 'x', n), set(), 0
        rows = [(w, i) for w in plan for i in range(len(w.starts))]
        for w, i in rows:
            one = [w._replace(starts=w.starts[i:i+1], counts=w.counts[i:i+1])]
            ledger.score(one, [1.], [1])
            first = int(w.starts[i] + w.first)
            scored |= set(range(first, first + int(w.counts[i])))
            a = rng.randint(0, n); b = rng.randint(a, n)
            if set(range(a, b)) <= scored and b <= max(scored) + 1:
                assert ledger.train(a, b - a) == slice(a, b + 1)
            else: breach('score_first', ledger.train, a, b - a)
        assert ledger.close() == len(rows)


# --- choosing on validation text -----------------------------------------

def test_choosing_the_temperature_on_validation(model, tokens):
    "In the scorer: several passes, of which the best would be told."
    book, plan = RuleBook(), plan_windows(2048, L, 8)
    def at(T):
        model.temperature.fill_(T)
        return enter(open_ledger(book, 'sliding', 2048), model, tokens, plan)
    try:
        at(1.)
        breach('scored_once', at, .98)
    finally: model.temperature.fill_(1.)


def test_choosing_ema_or_swa_on_validation(model, dataset):
    "In training: the text does not open (#137, #576)."
    book, best = RuleBook(), {}
    with text_guard(book, 'train', dataset) as guard:
        averages = {m: build_average(AverageConfig(method=m),
                    model.named_parameters()) for m in ('ema', 'swa')}
        guard.enter('calibrate')
        for name in averages:
            breach('val_unseen', lambda: best.update(
                {name: val_targets(dataset.val, L)}))
    assert not best and not rules_section(book.checks)['legal']


def test_adapting_before_quantising_on_validation(model, dataset):
    "#1376, #1488: trained on the text, then packed."
    cfg, _ = load_run_config('smoke')
    book = RuleBook()
    with text_guard(book, 'pack', dataset):
        def pack():
            ids = torch.from_numpy(val_targets(dataset.val, L)
                                   .astype(np.int64))
            model(ids[None, :L], ids[None, 1:L + 1]).mean().backward()
            return export_artifact(model.state_dict(), cfg, '0'*64, 'fp32')
        breach('val_unseen', pack)
    assert book.checks['val_unseen'] == 'failed'


def test_warming_up_on_validation(dataset):
    "#1530: random tokens, or none."
    with text_guard(RuleBook(), 'train'):  # by the name of the shard alone
        breach('val_unseen', np.memmap, dataset.val[0], '<u2', 'r')


# --- training text after its clock ---------------------------------------

def test_calibrating_after_the_clock(model, dataset):
    "#576: Hessians of training text, read after the last step."
    stream = TokenStream(dataset.train)
    with text_guard(RuleBook(), 'train', dataset) as guard:
        stream.read(0, L)
        said = breach('train_closed', guard.enter, 'pack')
        assert 'still held open' in said
        stream.maps.clear()
        guard.enter('pack')
        breach('train_closed', lambda: collect_hessians(
            model, stream.read(0, 4*L).reshape(4, L), Ranks(), 2))
        breach('train_closed', guard.enter, 'train')


def test_a_loader_that_goes_on(dataset):
    "Its thread reads ahead; the breach comes out with the next batch."
    book, ask = RuleBook(), threading.Event()
    loader = Loader(TokenStream(dataset.train), 4*L, 1, L)
    with text_guard(book, 'pack', dataset):
        breach('train_closed', loader.next_batch)
    loader.close()
    assert book.checks['train_closed'] == 'failed'


def test_other_ways_to_open(dataset, tmp_path):
    "By a link, by a descriptor, a copy, bytes for a name."
    shard = dataset.train[0]
    os.symlink(shard, tmp_path/'a'); os.link(shard, tmp_path/'b')
    with text_guard(RuleBook(), 'score', dataset):
        for f in (lambda: open(tmp_path/'a', 'rb'),
                  lambda: os.open(tmp_path/'b', os.O_RDONLY),
                  lambda: open(os.fsencode(shard)),
                  lambda: np.fromfile(str(shard), '<u2'),
                  lambda: __import__('shutil').copy(shard, tmp_path/'c')):
            breach('train_closed', f)
    with text_guard(RuleBook(), 'pack'):  # no dataset: names alone
        breach('train_closed', open, shard, 'rb')


def test_a_file_left_open(dataset):
    with open(dataset.val[0], 'rb'):
        with pytest.raises(RuleBreach, match='val_unseen'):
            with text_guard(RuleBook(), 'train', dataset): pass
    assert not audit_hook().guards


def test_what_may_be_opened(dataset, tmp_path):
    "The guard is in nobody's way."
    book = RuleBook()
    with text_guard(book, 'train', dataset) as guard:
        TokenStream(dataset.train).read(0, 9)
        (tmp_path/'fineweb_notes.txt').write_text('x')
        guard.enter('calibrate'); TokenStream(dataset.train).read(0, 9)
        guard.enter('pack'); (tmp_path/'model.golf').write_bytes(b'x')
        guard.enter('score'); val_targets(dataset.val, L)
    with pytest.raises(KeyError):
        with text_guard(book, 'train', dataset): raise KeyError
    assert not audit_hook().guards and book.checks['train_closed'] == 'passed'
    TokenStream(dataset.train).read(0, 9)


def test_one_hook_and_nothing_at_import():
    code = ('import sys; n = []; real = sys.addaudithook\n'
            'sys.addaudithook = lambda f: (n.append(f), real(f))\n'
            'from golf.rules import RuleBook, text_guard\n'
            'assert not n\n'
            'for _ in range(3):\n'
            '    with text_guard(RuleBook(), "pack"): pass\n'
            'assert len(n) == 1')
    subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT)


def test_compiled_code_does_not_notice(model):
    "No recompilation, though the hook is Python code."
    ids = torch.randint(V, (2, L + 1))
    net = torch.compile(model, backend='eager', fullgraph=True, dynamic=False)
    net(ids[:, :-1], ids[:, 1:]).mean().backward()
    with text_guard(RuleBook(), 'pack'), \
            torch.compiler.set_stance('fail_on_recompile'):
        net(ids[:, :-1], ids[:, 1:]).mean().backward()
        breach('train_closed', open, 'fineweb_train_000000.bin', 'rb')
    model.zero_grad()


@pytest.mark.parametrize('rule', ['train_clock', 'eval_clock'])
def test_the_clock_of_the_slowest_rank(rule):
    class Two(Ranks):
        def largest(self, value): return max(value, 601.15)  # #1908
    check_clock(RuleBook(), rule, 600., 600., Ranks())
    breach(rule, check_clock, RuleBook(), rule, 599., 600., Two())
    book = RuleBook()
    assert check_clock(book, rule, 1e6, None, Ranks()) == 1e6
    assert not book.checks


# --- the future, and the sum of probabilities ----------------------------

class Peek(SmearGate):
    "A blend with the token after, not before."
    def forward(self, x, opens=None):
        after = F.pad(x[:, 1:], (0, 0, 0, 1))
        return x + torch.sigmoid(self.gate) * (after - x)


def probe(forward, tokens, book=None, size=32):
    probe_forward(book or RuleBook(), forward, tokens,
                  plan_windows(2048, L, 8)[1], size, V, Ranks())


def test_smeargate_that_peeks(model, tokens):
    gate, model.smear = model.smear, Peek(32)
    try: breach('causal', probe, model, tokens)
    finally: model.smear = gate
    probe(model, tokens)


def test_a_faint_peek(model, tokens):
    "One part in a million of the next embedding, in the last position."
    def faint(x, y, first=0):
        h = model.hidden(x)
        h = h + 1e-6*F.pad(model.embed(x)[:, 1:], (0, 0, 0, 1))
        z = model.logits(h[:, first:])
        return F.cross_entropy(z.flatten(0, 1), y[:, first:].flatten(),
                               reduction='none').view(len(x), -1)
    breach('causal', probe, faint, tokens)


def test_attention_without_its_mask(model, tokens, monkeypatch):
    "Wherever it is called from."
    real = F.scaled_dot_product_attention
    def open_eyed(q, k, v, *a, is_causal=False, **kw):
        return real(q, k, v, *a, **kw)
    monkeypatch.setattr(F, 'scaled_dot_product_attention', open_eyed)
    breach('causal', probe, model, tokens)


def unigram_cache(tokens, ahead, row=64):
    "Nats under counts of a growing text; `ahead`: its row's own, too."
    counts, out = np.ones(V), []
    for i in range(1, len(tokens), row):
        part = tokens[i:i + row]
        if ahead: np.add.at(counts, part, 1)
        out.append(-np.log(counts[part] / counts.sum()))
        if not ahead: np.add.at(counts, part, 1)
    return np.concatenate(out)


def test_an_ngram_cache_that_peeks(tokens):
    "It counts the text of a row before the row is scored."
    few = tokens[:513]
    assert unigram_cache(few, True).mean() < unigram_cache(few, False).mean()
    probe_pass(RuleBook(), lambda t: unigram_cache(t, False), few, V,
               (70, 300))
    breach('causal', probe_pass, RuleBook(),
           lambda t: unigram_cache(t, True), few, V, (70, 300))


def test_a_cache_that_lifts_the_target_alone(model, tokens):
    "#659: the smaller of two losses. Causal, and no distribution."
    counts = np.bincount(tokens, minlength=V) + 1
    cache = torch.from_numpy(-np.log(counts / counts.sum())).float()
    def lifted(x, y, first=0):
        return torch.minimum(model(x, y, first), cache[y[:, first:]])
    said = breach('normalized', probe, lifted, tokens)
    assert 'sum' in said


@pytest.mark.parametrize('extra, fair', [(0., True), (1e-3, False)])
def test_an_unnormalised_mixture(model, tokens, extra, fair):
    "Weights that sum to a thousandth more than 1."
    def mixed(x, y, first=0):
        p = (-model(x, y, first)).exp()
        return -torch.log((.7 + extra)*p + .3/V)
    if fair: probe(mixed, tokens)
    else: breach('normalized', probe, mixed, tokens)


def test_a_normalised_tilt_is_fair(model, tokens):
    "#1514: p(v) exp(b [v = hint]) / Z with a hint from the prefix."
    def tilted(x, y, first=0):
        logp = model.logits(model.hidden(x)[:, first:]).log_softmax(-1)
        hint = F.one_hot(x[:, first:], V)  # the token itself, once more
        logp = (logp + .5*hint).log_softmax(-1)
        return -logp.gather(-1, y[:, first:, None])[..., 0]
    probe(tilted, tokens)


def test_no_number_is_no_distribution(model, tokens):
    def broken(x, y, first=0): return model(x, y, first)*math.nan
    with pytest.raises(RuleBreach): probe(broken, tokens)
    def tiny(x, y, first=0): return torch.full((len(x), L - first), 1e9)
    breach('normalized', probe, tiny, tokens)


@pytest.mark.parametrize('size', [1, 7, 320, 500])
def test_any_batch_finds_the_same(model, tokens, size):
    x, y = (torch.from_numpy(tokens[None, k:k + L]) for k in (0, 1))
    z = model.logits(model.hidden(x)).double()
    assert log_mass(model, x, V, size, 24).shape == (8,)
    assert log_mass(model, x, V, size, 0).abs().max() < 1e-5
    assert future_leaks(model, x, y, V, size, 24) == []
    loose = lambda x, y, first=0: model(x, y, first) - .01
    assert torch.allclose(log_mass(loose, x, V, size, 0),
                          torch.full((L,), .01).double(), atol=1e-5)


# --- bytes ---------------------------------------------------------------

def test_a_space_counted_twice(dataset, tokens):
    "#1545, #1576, #1632, #1672."
    sp = load_tokenizer(dataset.tokenizer)
    tables = byte_tables(sp, V)
    fair = target_bytes(tables, tokens[:-1], tokens[1:])
    check_byte_count(RuleBook(), sp, tokens, fair)
    breach('byte_count', check_byte_count, RuleBook(), sp, tokens,
           fair + tables.lead[tokens[1:]])


def test_bytes_of_odd_text(dataset):
    "Emoji, scripts without pieces, an empty document, a cut character."
    sp = load_tokenizer(dataset.tokenizer)
    ids = encode_documents(sp, ['naïve 🙂🙂 日本', 'a▁b', '', '  x  y ',
                                'zzz 日本']).astype(np.int64)[:-1]
    charged = target_bytes(byte_tables(sp, V), ids[:-1], ids[1:])
    check_byte_count(RuleBook(), sp, ids, charged)
    for t in range(3):  # any byte more or less of the first document
        other = charged.copy(); other[t] += 1
        breach('byte_count', check_byte_count, RuleBook(), sp, ids, other)


def test_a_tokenizer_without_a_lone_space(tmp_path, tokens):
    "#897: each lone space would weigh three bytes."
    texts = [t.replace(' ', '').replace('. ', '.') for t in make_texts(60, 1)]
    sp = train_tokenizer(texts, tmp_path/'no.model', 300)
    ids = np.array([BOS, *sp.encode('one two')], np.int64)
    breach('byte_count', check_byte_count, RuleBook(), sp, ids,
           np.ones(len(ids) - 1, np.int64))


def test_an_oversized_artifact():
    "#469's third seed; #219's three."
    check_size(RuleBook(), 15_900_000, 100_000, 16_000_000)
    for model, code in ((16_016_882, 0), (15_900_000, 100_001)):
        breach('size', check_size, RuleBook(), model, code, 16_000_000)


# --- the split -----------------------------------------------------------

@pytest.mark.parametrize('leaked, fair', [(0, True), (1, False),
                                          (16, False)])
def test_validation_documents_in_training(shards, tmp_path, leaked, fair):
    "#2127: the tool's default split puts most of them there."
    sp = load_tokenizer(shards/'tiny_320_bpe.model')
    texts = make_texts(60, 5)
    val, train = texts[:20], texts[20:] + texts[:leaked]
    random.Random(0).shuffle(train)
    data = SimpleNamespace(
        val=write_split(tmp_path, 'val', encode_documents(sp, val)),
        train=write_split(tmp_path, 'train', encode_documents(sp, train)))
    book = RuleBook()
    if fair: assert check_disjoint(book, data) == 0
    else: breach('disjoint_split', check_disjoint, book, data)


def test_the_split_is_named():
    for word, outcome in (('canonical', 'passed'), ('documents', 'passed'),
                          ('prefix', 'failed'), ('other', 'not_checked')):
        book = RuleBook()
        note_split(book, word)
        assert book.checks == {'canonical_split': outcome}


# --- what a result says --------------------------------------------------

def test_one_failure_in_any_process_is_enough():
    fine = {name: 'passed' for name in RULES}
    assert rules_section(fine) == dict(legal=True, checks=fine)
    for rule, entry in RULES.items():
        assert not rules_section(fine, {rule: 'failed'})['legal']
        missing = {k: v for k, v in fine.items() if k != rule}
        section = rules_section(missing)
        assert section['checks'][rule] == 'not_checked'
        assert section['legal'] == (not entry.always)


def test_a_breach_that_is_swallowed_is_remembered(dataset):
    book = RuleBook()
    with text_guard(book, 'pack', dataset):
        try: open(dataset.val[0], 'rb')
        except Exception: pass
    assert book.checks['val_unseen'] == 'failed'
