"""Compare: no claim that the seeds do not carry, and the hand agrees."""
import json
import math
import re
from fractions import Fraction

import numpy as np
import pytest

from conftest import ROOT, golf
from golf.compare import (MARGIN, against_record, compare_runs, compare_text,
                          incomplete_beta, plot_seeds, read_runs,
                          seeds_needed, shared_level, summarize, t_power,
                          t_quantile, t_tail, t_test, verdict, welch)
from golf.config import config_text, load_run_config
from golf.report import loss_to_bpb

TARGETS, BYTES = 143_104, 392_474


def make_result(seed, loss, stages=('raw', 'sliding'), targets=TARGETS,
                nbytes=BYTES):
    "A made-up result that passes its own check."
    made = [dict(name=name, val_loss=loss, seconds=1.0, method='made up',
                 val_bpb=loss_to_bpb(loss, targets, nbytes))
            for name in stages]
    return dict(
        schema=1, config='smoke', seed=seed, n_params=723_216, commit='c'*40,
        hardware=dict(device='made up', world_size=1, torch='2.11.0',
                      attention='sdpa'),
        data=dict(name='made up', train_tokens=10**6, val_tokens=targets,
                  val_bytes=nbytes, tokenizer_sha256='a'*64,
                  vocab_size=1024, fingerprint='b'*64),
        train=dict(steps=100, tokens=409_600, seconds=10.0,
                   tokens_per_second=40_960.0, ms_per_step=100.0,
                   calibration_seconds=0.0, peak_memory_bytes=0),
        stages=made, bytes=dict(code=1, model=2, total=3, limit=16_000_000,
                                by_role=dict(mlp=2)),
        final=dict(stage=made[-1]['name'], val_loss=loss,
                   val_bpb=made[-1]['val_bpb']))


@pytest.fixture
def keep(tmp_path):
    "Keeps a made-up run: its folder."
    def keep(seed, loss, overrides='', change=None, params=True, **kw):
        folder = tmp_path/str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        result = make_result(seed, loss, **kw)
        if change: change(result)
        (folder/'result.json').write_text(json.dumps(result))
        cfg, _ = load_run_config('smoke', seed, overrides=overrides)
        if params: (folder/'params.yaml').write_text(config_text(cfg))
        return folder
    return keep


def keep_all(keep, losses, overrides='', **kw):
    return [keep(i, x, overrides, **kw) for i, x in enumerate(losses)]


OTHER = '{qat: {enabled: false}}'


# -- Student's t --------------------------------------------------------

def integral(t, df, steps=200_000):
    "The tail by its definition, with u = tan(angle)."
    angle = (np.arange(steps) + .5)/steps*math.pi - math.pi/2
    u = np.tan(angle)
    weight = (1 + u*u/df)**(-(df + 1)/2)*(1 + u*u)
    upper = weight[u >= t].sum()
    edge = math.atan(t)/math.pi*steps + steps/2  # the step that t cuts
    part = math.ceil(edge - .5) + .5 - edge - .5
    return (upper + part*weight[min(int(edge), steps - 1)])/weight.sum()


@pytest.mark.parametrize('seed', range(20))
def test_tail_is_the_integral_of_the_density(seed):
    rng = np.random.default_rng(seed)
    t, df = rng.normal(0, 3), math.exp(rng.uniform(math.log(1.01), 5))
    assert abs(t_tail(t, df) - integral(t, df)) < 2e-8
    assert math.isclose(t_tail(t, df) + t_tail(-t, df), 1, rel_tol=1e-12)


def test_tail_in_closed_form():
    for t in (1e-9, .01, .5, 1., 3., 40., 1e4, 1e7):
        one = math.atan2(1, t)/math.pi
        two = 1/(2 + t*t + t*math.sqrt(2 + t*t))
        assert math.isclose(t_tail(t, 1), one, rel_tol=1e-11)
        assert math.isclose(t_tail(t, 2), two, rel_tol=1e-11)
    u = 3/math.sqrt(13)
    assert math.isclose(t_tail(3, 4), .5 - u/4*(3 - u*u), rel_tol=1e-10)


def test_tail_at_its_ends():
    assert t_tail(0, 7) == .5
    assert t_tail(1e200, 3) == 0 and t_tail(-1e200, 3) == 1
    assert 0 < t_tail(1e8, 2) < 1e-15


# two printed tables: one-sided 0.01 and 0.005
TABLE = {1: (31.821, 63.657), 2: (6.965, 9.925), 3: (4.541, 5.841),
         4: (3.747, 4.604), 5: (3.365, 4.032), 6: (3.143, 3.707),
         8: (2.896, 3.355), 10: (2.764, 3.169), 15: (2.602, 2.947),
         30: (2.457, 2.750), 120: (2.358, 2.617)}


def test_quantiles_are_those_of_the_tables():
    for df, (one, half) in TABLE.items():
        assert round(t_quantile(.01, df), 3) == one
        assert round(t_quantile(.005, df), 3) == half
    for df in (1.3, 2, 9.7, 400):
        for p in (.4, .01, 1e-6):
            assert math.isclose(t_tail(t_quantile(p, df), df), p,
                                rel_tol=1e-9)


def test_incomplete_beta_identities():
    rng = np.random.default_rng(0)
    for a, b, x in rng.uniform([.5, .5, 0], [30, 30, 1], (50, 3)):
        ix = incomplete_beta(a, b, x, 1 - x)
        assert math.isclose(ix + incomplete_beta(b, a, 1 - x, x), 1)
        step = x**a*(1 - x)**b/a*math.exp(
            math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b))
        assert math.isclose(ix, incomplete_beta(a + 1, b, x, 1 - x) + step,
                            rel_tol=1e-9, abs_tol=1e-14)
        assert math.isclose(incomplete_beta(a, 1, x, 1 - x), x**a)


# -- tests of means -----------------------------------------------------

def hand(scores, target):
    "Student's t and p of three scores, exact but for two square roots."
    x = [Fraction(s) for s in scores]
    mean = sum(x)/3
    square = sum((a - mean)**2 for a in x)/2
    t = float(Fraction(target) - mean)/math.sqrt(square/3)
    return t, .5 - t/2/math.sqrt(2 + t*t)


def digits(x): return f'{x:.6g}'


@pytest.mark.parametrize('seed', range(5))
def test_three_seeds_reproduce_the_hand_calculation(keep, seed):
    rng = np.random.default_rng(seed)
    losses = 3.3 + .003*rng.normal(size=3)
    paths = keep_all(keep, losses)
    better, rule = compare_runs(paths, record=3.31)['tests']
    for test, target in ((better, Fraction(3.31)),
                         (rule, Fraction(3.31) - Fraction(MARGIN))):
        t, p = hand(losses, target)
        assert digits(test['t']) == digits(t) and test['df'] == 2
        assert digits(test['p']) == digits(p)
        assert test['significant'] == (p < .01)


def test_two_configs_reproduce_welch_by_hand(keep):
    rng = np.random.default_rng(1)
    a, b = 3.31 + .002*rng.normal(size=4), 3.30 + .004*rng.normal(size=3)
    facts = compare_runs(keep_all(keep, a) + keep_all(keep, b, OTHER))
    va, vb = a.var(ddof=1)/4, b.var(ddof=1)/3
    df = (va + vb)**2/(va**2/3 + vb**2/2)
    for test, margin in zip(facts['tests'], (0, MARGIN)):
        t = (a.mean() - b.mean() - margin)/math.sqrt(va + vb)
        assert digits(test['t']) == digits(t)
        assert digits(test['df']) == digits(df)
        assert abs(test['p'] - integral(t, df)) < 1e-7


def test_shift_and_scale_change_nothing():
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=5).tolist(), rng.normal(1, 2, 4).tolist()
    test = welch(a, b, .1)
    for k, c in ((3., 0.), (.01, 7.), (1000., -2.)):
        other = welch([k*x + c for x in a], [k*x + c for x in b], .1*k)
        for key in ('t', 'df', 'p'):
            assert math.isclose(other[key], test[key], rel_tol=1e-6)
    assert math.isclose(welch(b, a, -.1)['p'], 1 - test['p'])


def test_welch_of_a_very_sure_group_is_student():
    a, b = [3.0, 3.1, 3.3], [4 + 1e-9*x for x in (-1, 0, 1)]
    one, two = against_record(a, 4), welch(a, b)
    for key in ('t', 'df', 'p'):
        assert math.isclose(one[key], two[key], rel_tol=1e-6)


def test_errors_at_the_border_are_as_many_as_promised():
    rng = np.random.default_rng(3)
    p = [against_record(x, 0)['p'] for x in rng.normal(size=(4000, 3))]
    for level in (.01, .05, .3):
        sd = math.sqrt(level*(1 - level)/4000)
        assert abs(np.mean(np.array(p) < level) - level) < 4*sd


# -- what the seeds do not carry ----------------------------------------

@pytest.mark.parametrize('losses', [
    [3.0], [3.0, 3.0], [3.0, 3.0 + 1e-12], [3.0, 3.0001], [3.0]*3,
    [3.3, 3.3 + 4e-16, 3.3]])
def test_no_verdict_and_no_nan(keep, losses):
    paths = keep_all(keep, losses)
    facts = compare_runs(paths, record=3.5)
    assert not any(t['significant'] for t in facts['tests'])
    assert all('no verdict' in t['verdict'] for t in facts['tests'])
    json.dumps(facts, allow_nan=False)
    assert not re.search(r'\b(nan|inf)\b', compare_text(facts), re.I)
    plot_seeds(facts)


def test_two_seeds_are_never_enough_on_either_side(keep):
    good, two = [3.0, 3.001, 3.002], [3.2, 3.20001]
    for a, b in ((good, two), (two, good)):
        facts = compare_runs(keep_all(keep, a)
                             + keep_all(keep, b, OTHER), record=9.)
        sides = [t for t in facts['tests'] if isinstance(t['against'], str)]
        assert len(sides) == 2 and not any(t['significant'] for t in sides)


def test_three_seeds_far_below_are_shown():
    test = against_record([3.0, 3.001, 3.002], 3.1, MARGIN)
    assert verdict(test, [3], .01) == (True, 'shown (p < 0.01)')
    assert not verdict(test, [2], .01)[0]
    assert not verdict(t_test(.1, [3.0]*3), [3], .01)[0]


def test_level_is_shared(keep):
    assert shared_level(1) == .01 and shared_level(0) == .01
    a, b, c = ([x + d for d in (0, .001, .002)] for x in (3.3, 3.29, 3.28))
    paths = keep_all(keep, a) + keep_all(keep, b, OTHER) + keep_all(
        keep, c, '{qat: {start_fraction: 0.5}}')
    facts = compare_runs(paths, record=3.3, looks=2)
    levels = {isinstance(t['against'], str): t['level']
              for t in facts['tests']}
    assert levels == {True: .01/4, False: .01/2/3}
    with pytest.raises(ValueError, match='looks is 0'):
        compare_runs(paths, looks=0)


# -- how many seeds -----------------------------------------------------

def test_power_of_no_gain_is_the_level():
    for n in (3, 4, 9, 50):
        assert abs(t_power(0, [1.], n) - .01) < 1e-5
        assert abs(t_power(0, [1., 1.], n) - .01) < 1e-5


def test_power_is_what_happens():
    rng = np.random.default_rng(4)
    for gain, n in ((2., 5), (1., 12), (5., 3)):
        x = rng.normal(size=(40_000, n))
        t = (gain - x.mean(1))/x.std(1, ddof=1)*math.sqrt(n)
        seen = (t >= t_quantile(.01, n - 1)).mean()
        assert abs(t_power(gain, [1.], n) - seen) < .012


def test_seeds_needed():
    counts = [seeds_needed(g, 1.) for g in (20, 4, 2, 1, .5, .2)]
    assert counts[0] == 3 and counts == sorted(counts)
    for gain, n in zip((2, 1, .5), counts[2:]):
        assert t_power(gain, [1.], n) >= .8 > t_power(gain, [1.], n - 1)
    # for many seeds, the Gaussian formula ((2.326 + 0.842)/gain)^2
    assert abs(counts[-1]/(3.168/.2)**2 - 1) < .02
    assert seeds_needed(.01, 1.) is None and seeds_needed(-1, 1.) is None
    assert seeds_needed(1, None) is None and seeds_needed(1, 0., 1.) is None
    assert seeds_needed(2, 1., 1.) > seeds_needed(2, 1.)
    assert seeds_needed(2, 1., level=.001) > seeds_needed(2, 1.)


def test_needed_seeds_are_said(keep):
    facts = compare_runs(keep_all(keep, [3.30, 3.302, 3.304]), record=3.309)
    rule = facts['tests'][1]
    assert not rule['significant'] and rule['seeds_needed'] > 3
    more = rule['seeds_needed'] - 3
    text = ' '.join(compare_text(facts).split())
    assert f'{rule["seeds_needed"]} seeds, {more} more, would do' in text
    assert 'looks=2' in text


# -- which runs belong together -----------------------------------------

def test_groups_are_by_settings_not_by_name(keep):
    paths = [keep(1, 3.0), keep(2, 3.1), keep(1, 3.2, OTHER),
             keep(1, 3.3, params=False),
             keep(1, 3.4, change=lambda r: r['data'].update(
                 fingerprint='f'*64))]
    groups = read_runs(paths)
    assert [len(g) for g in groups.values()] == [2, 1, 1, 1]
    labels = list(groups)
    assert 'qat.enabled=False' in labels[1]
    assert 'params.yaml=missing' in labels[2]
    assert 'data.fingerprint=fff' in labels[3]
    assert len(set(labels)) == 4


def test_seed_place_and_logging_do_not_part_runs(keep):
    paths = [keep(1, 3.0), keep(2, 3.1, '{train: {log_every: 1}}'),
             keep(3, 3.2, '{data: {path: /elsewhere}}')]
    (label, runs), = read_runs(paths).items()
    assert label == 'smoke' and [r.result['seed'] for r in runs] == [1, 2, 3]


def test_flops_are_those_of_the_config(keep):
    one, bare = (compare_runs([keep(1, 3.0, params=p)])['configs'][0]
                 ['seeds'][0] for p in (True, False))
    # 4 blocks of q, k, v, o and the MLP, the tied head, and attention
    block = 2*128*128 + 2*128*64 + 2*128*384
    a_token = 6*(4*block + 1024*128) + 6*4*256*128
    assert one['flops'] == a_token*409_600 and 'flops' not in bare
    assert '?' in compare_text(compare_runs([keep(1, 3.0, params=False)]))


def test_params_of_another_version_are_no_obstacle(keep):
    path = keep(1, 3.0)
    (path/'params.yaml').write_text('what: this was once a key\n')
    assert len(read_runs([path])) == 1


def damage(path, text): (path/'result.json').write_text(text)


def test_refusals(keep, tmp_path):
    a, b = keep(1, 3.0), keep(2, 3.1)
    def refused(match, *paths, **kw):
        with pytest.raises((ValueError, FileNotFoundError),
                           match=match) as e:
            compare_runs(list(paths), **kw)
        assert '\n' not in str(e.value)
    refused('no runs')
    refused('no result.json', a, tmp_path/'nowhere')
    refused('same config and seed 1', a, b, a)
    refused('same config and seed 1', a, keep(1, 3.05))
    refused("unit is 'bits'", a, unit='bits')
    refused('no stage .ttt., only raw, sliding', a, stage='ttt')
    for record in (math.nan, math.inf, 0, -1.2):
        refused('record is', a, record=record)
    # of one config: scores of two stages, or made in two ways
    refused('name raw or sliding', a, keep(3, 3.0, stages=('raw',)))
    refused('method', a, keep(3, 3.0, change=lambda r: r['stages'][-1]
                              .update(method='another')))
    # two texts
    refused('different texts', a, keep(1, 3.0, OTHER, nbytes=BYTES + 5000))
    other = dict(change=lambda r: r['data'].update(tokenizer_sha256='e'*64))
    refused('different tokenizers', a, keep(1, 3.0, OTHER, **other))
    # damaged files, named
    (b/'params.yaml').write_text(config_text(load_run_config('smoke', 9)[0]))
    refused('params.yaml is of smoke seed 9', a, b)
    damage(b, '{"schema": 1')
    refused('result.json', a, b)
    damage(b, '{"schema": 1}')
    refused('result.config is missing', a, b)
    damage(b, json.dumps(make_result(2, 3.1) | dict(quant_gap_bpb=.5)))
    refused('quant_gap_bpb', a, b)


# -- what is said beside the numbers ------------------------------------

def notes_of(*paths, **kw): return ' | '.join(compare_runs(paths, **kw)
                                              ['notes'])


@pytest.mark.parametrize('section, key, value, said', [
    ('hardware', 'device', 'a toaster', 'hardware.device: a toaster'),
    ('hardware', 'world_size', 8, 'hardware.world_size: 1, 8'),
    ('train', 'tokens', 800_000, '0.4096 to 0.8 million training tokens'),
    ('bytes', 'limit', 2, 'over the limit'),
    ('commit', None, 'd'*40, 'cccccccccccc, dddddddddddd'),
    ('rules', None, dict(legal=False, checks=dict(one_pass='failed')),
     'breaks a rule')])
def test_notes_on_one_config(keep, section, key, value, said):
    def change(result):
        if key: result[section][key] = value
        else: result[section] = value
    assert notes_of(keep(1, 3.0), keep(2, 3.1)) == ''
    assert said in notes_of(keep(3, 3.0), keep(4, 3.1, change=change))


def test_a_copied_score_is_noticed(keep):
    paths = keep_all(keep, [3.0, 3.1, 3.1])
    assert 'to the last digit' in notes_of(*paths)


def test_notes_on_two_configs(keep):
    a = keep(1, 3.0)
    assert notes_of(a, keep(1, 3.1, OTHER)) == ''
    plain = keep(1, 3.1, OTHER, stages=('raw',))
    assert 'name of the scores differs: smoke' in notes_of(a, plain)
    assert notes_of(a, plain, stage='raw') == ''
    sha = dict(change=lambda r: r['data'].update(tokenizer_sha256='e'*64))
    assert 'not quite the same' in notes_of(
        a, keep(1, 3.1, OTHER, **sha), unit='bpb')
    assert 'not quite the same' in notes_of(
        a, keep(1, 3.1, OTHER, targets=TARGETS - 256))
    shards = dict(change=lambda r: r['data'].update(fingerprint='e'*64))
    assert 'other shards' in notes_of(a, keep(1, 3.1, OTHER, **shards))
    def faster(r):
        r['hardware']['device'] = 'faster'
        r['train']['tokens'] *= 3
    assert 'equal tokens' in notes_of(a, keep(1, 3.1, OTHER, change=faster))
    assert 'far from the scores' in notes_of(a, record=1.58)


# -- output -------------------------------------------------------------

def test_both_units_agree(keep):
    paths = keep_all(keep, [3.30, 3.303, 3.304]) + keep_all(
        keep, [3.29, 3.291, 3.2905], OTHER)
    one = loss_to_bpb(1.0, TARGETS, BYTES)
    nats = compare_runs(paths, record=3.31)
    bpb = compare_runs(paths, record=3.31*one, unit='bpb')
    assert len(nats['tests']) == len(bpb['tests']) == 6
    for a, b in zip(nats['tests'], bpb['tests']):
        assert math.isclose(a['t'], b['t'], rel_tol=1e-6)
        assert math.isclose(a['gain']*one, b['gain'], abs_tol=1e-12)
        assert a['verdict'] == b['verdict']
        assert a.get('seeds_needed') == b.get('seeds_needed')
    for c in nats['configs']:
        assert math.isclose(c['nats']['sd']*one, c['bpb']['sd'])


def test_json_and_text_hold_every_seed(keep):
    losses = [3.30, 3.303, 3.304]
    facts = compare_runs(keep_all(keep, losses), record=3.31)
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    text = compare_text(facts)
    assert max(map(len, text.splitlines())) <= 78
    for x in losses: assert f'{x:.6f}' in text
    assert f'{summarize(losses)["sd"]:.6f}' in text
    assert facts['configs'][0]['nats'] == summarize(losses)


def test_plot_shows_every_seed_and_both_units(keep):
    paths = keep_all(keep, [3.30, 3.303, 3.304]) + keep_all(
        keep, [3.29, 3.291], OTHER)
    for unit, key in (('nats', 'val_loss'), ('bpb', 'val_bpb')):
        fig = plot_seeds(compare_runs(paths, unit=unit))
        ax = fig.axes[0]
        drawn = [x for line in ax.lines if line.get_marker() == 'o'
                 for x in line.get_xdata()]
        assert drawn == [json.loads((p/'result.json').read_text())['final']
                         [key] for p in paths]
        low, high = ax.get_xlim()
        assert all(low < x < high for x in drawn)
        fig.canvas.draw()


@pytest.mark.parametrize('path', sorted(ROOT.glob('runs/*/result.json')),
                         ids=lambda p: p.parent.name)
def test_kept_runs_can_be_compared(path):
    facts = compare_runs([path], record=3.0)
    assert compare_text(facts) and facts['configs'][0]['seeds'][0]['flops']


def test_command_line(keep):
    paths = keep_all(keep, [3.30, 3.303, 3.304])
    facts = compare_runs(list(map(str, paths)), record=3.31)
    said = golf('compare', *paths, '--record', 3.31)
    assert said.stdout.strip() == compare_text(facts)
    said = golf('compare', *paths, '--record', 3.31, '--json')
    assert json.loads(said.stdout) == facts
    bad = golf('compare', paths[0], paths[0], check=False)
    assert bad.returncode == 1 and 'one seed is one sample' in bad.stderr
