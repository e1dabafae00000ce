"""Fit: bytes are predicted, and no artifact is ever over its room."""
import random

import pytest
import torch

from golf.artifact import pack_artifact, unpack_artifact
from golf.config import (ModelConfig, build_config, config_text,
                         load_run_config, parse_yaml)
from golf.fit import (Sketch, check_knob, fit_export, lighten, open_formats,
                      predicted_bytes, prune_masks, quantize_pruned,
                      sketch_bytes, solve_reach, with_reach)
from golf.gptq import gptq_state
from golf.grid import dequantize_rows, qmax
from golf.model import build_model, parameter_shapes
from golf.qat import assign_grids, linears, refresh_clips
from golf.quantize import quantize_state

LAWS = {'gaussian': torch.distributions.Normal(0, 1),
        'laplace': torch.distributions.Laplace(0, 1),
        'tails': torch.distributions.StudentT(6.)}


def make_state(law, seed, dim=96, layers=2, vocab=256):
    "Random weights of a small GPT; with tails, rows differ in size too."
    torch.manual_seed(seed)
    cfg = ModelConfig(layers=layers, dim=dim, heads=2, kv_heads=1,
                      mlp_hidden=3*dim, vocab_size=vocab)
    out = {}
    for name, shape in parameter_shapes(cfg).items():
        w = .05*LAWS[law].sample(shape)
        if law == 'tails' and len(shape) == 2:
            w = w*torch.exp(.5*torch.randn(shape[0], 1))
        out[name] = w
    return out


def pack(tensors): return pack_artifact(tensors, {'seed': 1})


FORMATS = ['int8', 'int7', 'int6', 'int5', 'int4', 'int4 mse', 'int5 q0.999',
           'int4 sd2.2', 'int4 sd4.0', 'int5 sd3.0', 'int5 sd5.4',
           'int6 sd4.4', 'int6 sd12.85', 'int8 sd4.0', 'int8 sd40']


@pytest.mark.parametrize('law', LAWS)
def test_prediction_of_small_models(law):
    state = make_state(law, 0)
    for i, fmt in enumerate(FORMATS):
        table = ('fp16', 'int8')[i % 2]
        tensors = quantize_state(state, [('tok_emb.weight', table),
                                         ('blocks.*.weight', fmt)])
        real = len(pack(tensors))
        assert abs(predicted_bytes(tensors)/real - 1) < .02, fmt


@pytest.mark.parametrize('law', LAWS)
def test_prediction_of_long_streams(law):
    torch.manual_seed(1)
    state = {f'blocks.{i}.mlp.up.weight': .03*LAWS[law].sample((1024, 512))
             for i in range(2)}
    for fmt in ('int4 sd3.0', 'int5 sd5.4', 'int6'):
        tensors = quantize_state(state, [('*', fmt)])
        real = len(pack(tensors))
        assert abs(predicted_bytes(tensors)/real - 1) < .007, fmt


def test_prediction_of_tiny_models_and_of_float_ones():
    for formats in ([('*.weight', 'int5')], [('*', 'fp16')],
                    [('*', 'float32')]):
        state = make_state('gaussian', 2, dim=16, layers=2, vocab=64)
        tensors = quantize_state(state, formats)
        real = len(pack(tensors))
        assert abs(predicted_bytes(tensors)/real - 1) < .12


def test_a_sketch_of_everything_is_the_prediction():
    for law in LAWS:
        state = make_state(law, 3)
        for fmt in ('int4', 'int6 sd8.0', 'int5 mse'):
            formats = [('tok_emb.weight', 'fp16'), ('blocks.*.weight', fmt)]
            for fraction in (0., .35):
                exact = predicted_bytes(quantize_pruned(state, formats,
                                                        fraction))
                sketch = Sketch(state, formats)
                assert abs(sketch_bytes(sketch, formats, fraction)
                           - exact) < 20


OPEN = (('tok_emb.weight', 'int8'), ('*.mlp.*', 'int5 sd auto'),
        ('*.weight', 'int6 sd auto'))


def solve_formats(state, formats, room):
    """Settled formats, and what is known of them."""
    sketch = Sketch(state, formats)
    scale, ends = solve_reach(sketch, formats, room)
    solved = with_reach(formats, scale, ends)
    return solved, dict(predicted=sketch_bytes(sketch, solved), scale=scale, ends=ends)


def test_bytes_fall_with_k_and_with_pruning_and_not_with_magnitude():
    state = make_state('tails', 4)
    sketch = Sketch(state, OPEN)
    at = [sketch_bytes(sketch, with_reach(OPEN, 1.1**i))
          for i in range(-5, 15)]
    assert all(b < a for a, b in zip(at, at[1:]))
    fixed = with_reach(OPEN, 1.)
    cut = [sketch_bytes(sketch, fixed, p/20) for p in range(19)]
    assert all(b <= a for a, b in zip(cut, cut[1:]))
    for factor in (.01, .3, 7.):
        other = Sketch({n: factor*w for n, w in state.items()}, OPEN)
        assert abs(sketch_bytes(other, fixed)/cut[0] - 1) < .01


def test_solved_formats_survive_the_text_of_a_config():
    for i in range(20):
        solved = with_reach(OPEN, .5 + 5.5*random.Random(i).random())
        cfg = load_run_config('smoke', overrides=dict(
            quant=dict(formats=solved)))[0]
        again = build_config(parse_yaml(config_text(cfg), 'x'), 'x')
        assert again.quant.formats == solved and not open_formats(solved)


def test_the_solved_grid_is_what_training_and_export_round_to():
    cfg = ModelConfig(layers=2, dim=64, heads=2, kv_heads=1, mlp_hidden=192,
                      vocab_size=256, residual_init='orthogonal')
    model = build_model(cfg, max_len=16)
    state = dict(model.named_parameters())
    room = int(.85*solve_formats(state, OPEN, 10**7)[1]['predicted'])
    solved, report = solve_formats(state, OPEN, room)
    assert report['scale'] > 1 and report['predicted'] <= room
    assign_grids(model, solved)
    refresh_clips(model)
    k = float(dict(solved)['*.mlp.*'].split('sd')[1])
    tensors = quantize_state(state, solved)
    for name, m in linears(model).items():
        t = tensors[name]
        m.round_on.fill_(1.)
        torch.testing.assert_close(m.rounded(), dequantize_rows(
            t.codes, t.scale), rtol=1e-6, atol=1e-7)
        if 'mlp' in name:
            wanted = k*m.weight.square().mean(1).sqrt()/qmax(5)
            torch.testing.assert_close(t.scale.float(), wanted, rtol=1e-3,
                                       atol=1e-6)
    assert with_reach(solved, 3.) == solved  # nothing is open now


def test_a_solution_uses_one_thread_and_leaves_the_others():
    before, seen = torch.get_num_threads(), []
    class Watched(Sketch):
        def grid(self, *args):
            seen.append(torch.get_num_threads())
            return super().grid(*args)
    try:
        torch.set_num_threads(2)
        solve_reach(Watched(make_state('gaussian', 9), OPEN), OPEN, 10**7)
        assert set(seen) == {1} and torch.get_num_threads() == 2
        with pytest.raises(ValueError): solve_formats(make_state('gaussian', 9), OPEN, 100)
        assert torch.get_num_threads() == 2
    finally: torch.set_num_threads(before)


def test_matrices_that_are_still_zero_count_as_gaussian():
    state = make_state('gaussian', 5)
    fresh = {n: torch.zeros_like(w) if 'attn.o' in n or 'down' in n else w
             for n, w in state.items()}
    a, b = (solve_formats(s, OPEN, 130_000)[1]['scale']
            for s in (state, fresh))
    assert abs(a/b - 1) < .02


def test_each_width_has_the_end_that_it_would_have_alone():
    state = make_state('laplace', 8)
    solved, report = solve_formats(state, OPEN, 10**7)
    for bits, part, other in ((5, 'mlp', 'attn'), (6, 'attn', 'mlp')):
        rest = [(f'*.{other}.*.weight', 'int6'), ('tok_emb.weight', 'int8')]
        alone = solve_formats(state, [*rest, (
            '*.weight', f'int{bits} sd auto')], 10**7)[1]
        assert alone['ends'] == {bits: report['ends'][bits]}
        assert f'int{bits} sd{report["ends"][bits]:.4f}' in dict(
            solved).values()


def test_the_optimum_is_taken_where_it_fits():
    state = make_state('laplace', 6)
    wide = solve_formats(state, OPEN, 10**7)[1]
    assert wide['scale'] == 1
    room = int(.8*wide['predicted'])
    tight = solve_formats(state, OPEN, room)[1]
    assert tight['ends'] == wide['ends'] and tight['scale'] > 1
    assert .998 < tight['predicted']/room <= 1
    with pytest.raises(ValueError, match='over the .* there are.*mlp.up'):
        solve_formats(state, OPEN, 30_000)


def checked_fit(state, formats, room, knob, pack=pack, role='mlp.down'):
    "Export into a room; whatever happens, these hold."
    packed = []
    def counting(tensors):
        packed.append(pack(tensors))
        return packed[-1]
    blob, tensors, report = fit_export(state, quantize_pruned, counting,
                                       room, knob, role, formats)
    assert len(packed) <= 2 and blob in packed
    assert len(blob) == report['bytes'] <= room
    assert report['packs'] == [len(b) for b in packed]
    return blob, tensors, report


@pytest.mark.parametrize('seed', range(30))
def test_never_over_whatever_the_weights_and_the_room(seed):
    rng = random.Random(seed)
    knob = rng.choice(['prune', 'bits', 'open'])
    law = rng.choice(list(LAWS))
    state = make_state(law, seed, dim=rng.choice([32, 64, 96]))
    formats = OPEN if knob == 'open' else (
        ('tok_emb.weight', rng.choice(['int8', 'fp16'])),
        ('*.weight', rng.choice(['int6', 'int5 sd4.4', 'int6 sd9.0'])))
    start = formats if knob != 'open' else with_reach(OPEN, 1.)
    size = len(pack(quantize_state(state, start)))
    room = int(size*rng.uniform(.75, 1.05))
    blob, tensors, report = checked_fit(
        state, formats, room, 'prune' if knob == 'open' else knob)
    stored, _ = unpack_artifact(blob)
    assert all(torch.equal(stored[n].codes, t.codes)
               for n, t in tensors.items() if t.codes is not None)
    if report['moved']: assert report['bytes'] > .94*room


@pytest.mark.parametrize('knob', ['prune', 'bits', 'open'])
def test_where_it_had_to_move_it_lands_in_the_zone(knob):
    torch.manual_seed(7)
    state = {f'blocks.{i}.mlp.{part}.weight': .03*torch.randn(512, 512)
             for i in range(2) for part in ('up', 'down')}
    formats = (('*', 'int6 sd auto' if knob == 'open' else 'int6 sd5.0'),)
    size = predicted_bytes(quantize_state(state, formats))
    for part in (.995, .93):
        room = int(part*size)
        _, _, report = checked_fit(state, formats, room,
                                   'prune' if knob == 'open' else knob)
        assert report['moved'] and report['bytes'] > .96*room


def test_nothing_moves_where_it_fits():
    state = make_state('tails', 8)
    formats = (('tok_emb.weight', 'fp16'), ('*.weight', 'int6'))
    blob = pack(quantize_state(state, formats))
    for room in (len(blob), 2*len(blob)):
        for knob in ('prune', 'bits'):
            same, _, report = checked_fit(state, formats, room, knob)
            assert same == blob and not report['moved']
            assert report['fraction'] == 0 and len(report['packs']) == 1


@pytest.mark.parametrize('excess', [.9, .98, 1.02, 1.1])
def test_a_coder_that_differs_from_the_prediction(excess):
    state = make_state('gaussian', 9)
    formats = (('tok_emb.weight', 'int8'), ('*.weight', 'int6'))
    def other(tensors): # longer or shorter than what zstd makes
        blob = pack(tensors)
        n = int(excess*len(blob))
        return blob[:n] + bytes(max(0, n - len(blob)))
    size = len(other(quantize_state(state, formats)))
    for part in (.85, .95, .999, 1.0):
        report = checked_fit(state, formats, int(part*size), 'prune',
                             other)[2]
        assert report['moved'] or part == 1


def test_a_quantiser_whose_codes_are_longer():
    def noisy(state, formats, fraction): # as compensation does
        torch.manual_seed(0)
        moved = {n: w + .03*w.std()*torch.randn_like(w) if w.dim() == 2
                 else w for n, w in state.items()}
        return quantize_pruned(moved, formats, fraction)
    state = make_state('tails', 10)
    formats = (('tok_emb.weight', 'int8'), ('*.weight', 'int5 sd4.4'))
    size = len(pack(noisy(state, formats, 0.)))
    blob, _, report = fit_export(state, noisy, pack, int(.9*size),
                                 formats=formats)
    assert .95*report['room'] < len(blob) <= report['room']


def test_gptq_is_pruned_no_more_than_it_needs():
    torch.manual_seed(12)
    state = {f'blocks.{i}.mlp.{part}.weight': .03*torch.randn(512, 512)
             for i in range(2) for part in ('up', 'down')}
    inputs = torch.randn(512, 512)*torch.exp(torch.linspace(0, -4, 512))
    hessian = inputs.T @ inputs/512
    hessian += .01*hessian.diagonal().mean()*torch.eye(512)
    def rounded(state, formats, fraction):
        return gptq_state(state, dict.fromkeys(state, hessian), formats,
                          prune=fraction)
    formats = (('*', 'int5 sd4.6'),)
    near = {n: dequantize_rows(t.codes, t.scale) + .1*t.scale.float()[:, None]
            * torch.randn(t.shape)
            for n, t in quantize_state(state, formats).items()}
    for weights in (state, near): # as drawn; trained on the grid, on its codes
        size = len(pack(rounded(weights, formats, 0.)))
        for part in (.998, .99, .95): # the room's last 4 %: the landing zone
            blob, _, report = fit_export(weights, rounded, pack,
                                         int(part*size), formats=formats)
            assert .98*report['room'] < len(blob) <= report['room']


@pytest.mark.parametrize('part', (.985, .97, .95))
def test_pruning_that_is_free_for_long_and_then_dear(part):
    # as GPTQ's is for weights that sit on their codes; the sketch expects
    # bytes to fall earlier, and its fraction frees far too much
    state, formats = make_state('gaussian', 13), (('*.weight', 'int5 sd4.0'),)
    room = int(part*len(pack(quantize_state(state, formats))))
    sketch = Sketch(state, formats)
    thought = lighten(sketch, formats, part*sketch_bytes(sketch, formats),
                      'prune', '')[1]
    def steep(state, formats, fraction):
        real = 10*max(0., fraction - .8*thought)
        return quantize_pruned(state, formats, min(.9, real))
    blob, _, report = fit_export(state, steep, pack, room, formats=formats)
    assert report['moved'] and .975*room < len(blob) <= room


def test_pruning_is_exact_and_of_the_smallest():
    state = make_state('tails', 11)
    formats = [('*.weight', 'int5 sd4.0')]
    tensors = quantize_state(state, formats)
    masks = prune_masks(state, tensors, .25)
    steps = torch.cat([(state[n].abs()/tensors[n].scale.float()[:, None]
                        ).flatten() for n in masks])
    mask = torch.cat([m.flatten() for m in masks.values()])
    assert mask.sum() == round(.25*len(mask))
    assert steps[mask].max() <= steps[~mask].min()*(1 + 1e-6)
    again = prune_masks(state, tensors, .25)
    assert all(torch.equal(again[n], m) for n, m in masks.items())


def test_bits_come_off_the_named_role_only():
    state = make_state('gaussian', 12)
    formats = (('tok_emb.weight', 'int8'), ('*.weight', 'int6 sd5.0'))
    size = predicted_bytes(quantize_state(state, formats))
    _, tensors, report = checked_fit(state, formats, int(.93*size), 'bits',
                                     role='mlp.up')
    assert report['moved']
    less = {n for n, t in tensors.items() if t.format == 'int5'}
    assert less and all('mlp.up' in n for n in less)


@pytest.mark.parametrize('change, said', [
    (dict(room=10_000), 'over the'),
    (dict(knob='bits', role='nothing'), "role 'nothing'"),
    (dict(knob='bits', role='embedding', formats=[('*.weight', 'int4')],
          room=60_000),
     'no bit to lose')])
def test_refusals(change, said):
    state = make_state('gaussian', 13)
    asked = dict(formats=[('*.weight', 'int6')], room=100_000) | change
    with pytest.raises(ValueError, match=said) as error:
        fit_export(state, quantize_pruned, pack, **asked)
    assert '\n' not in str(error.value)


def test_a_knob_that_could_not_move_is_refused_beforehand():
    shapes = {n: tuple(w.shape) for n, w in make_state('gaussian', 0).items()}
    check_knob(shapes, [('*.weight', 'int5')], 'bits', 'mlp.down')
    check_knob(shapes, [('*.weight', 'int4')], 'prune', 'mlp.down')
    check_knob(shapes, OPEN, 'bits', 'nothing')  # the grid is the knob
    for fmt, knob, role in (('int5', 'x', 'mlp.up'),
                            ('int4', 'bits', 'mlp.up'),
                            ('int5', 'bits', 'control')):
        with pytest.raises(ValueError, match='^fit'):
            check_knob(shapes, [('*.weight', fmt)], knob, role)


def test_a_useless_role_does_no_harm_where_the_model_fits():
    state = make_state('gaussian', 0)
    _, _, report = checked_fit(state, [('*.weight', 'int4')], 10**7, 'bits')
    assert not report['moved']


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_a_gpu_solves_the_same_grid():
    state = make_state('tails', 14, dim=256)
    there = {n: w.cuda() for n, w in state.items()}
    room = int(.8*solve_formats(state, OPEN, 10**8)[1]['predicted'])
    assert solve_formats(state, OPEN, room)[0] == solve_formats(
        there, OPEN, room)[0]
    assert lighten(Sketch(there, OPEN), OPEN, room, 'prune', '')[1] == 0
