"""The polynomials of Muon: how orthogonal they make, and how good they are."""
import pytest
import torch

from golf.config import OptimConfig
from golf.muon import (NS_COEFFICIENTS, build_optimizers, minimax_quintic,
                       newton_schulz, orthogonal_table, polar_express)


@pytest.mark.parametrize('kind', ['newton_schulz', 'polar_express'])
@pytest.mark.parametrize('shape', [(40, 40), (24, 60), (60, 24)])
@pytest.mark.parametrize('decades', [.5, 1, 2, 2.5])
def test_orthogonality_against_the_polar_factor(kind, shape, decades):
    "Each singular direction is kept, its value within the promised band."
    rng = torch.Generator().manual_seed(int(10*decades))
    n = min(shape)
    u, v = (torch.linalg.qr(torch.randn(s, n, generator=rng,
                                        dtype=torch.float64))[0]
            for s in shape)
    s = torch.logspace(0, -decades, n, dtype=torch.float64)
    out = newton_schulz((u*s) @ v.T, orthogonal_table(kind, 5))
    seen = u.T @ out @ v
    values = seen.diagonal()
    assert (seen - values.diag()).abs().max() < 1e-6
    share = s / s.norm()
    inside = values[share > .0016]
    low, high = dict(newton_schulz=(.68, 1.21),
                     polar_express=(.83, 1.14))[kind]
    assert low < inside.min() and inside.max() < high


@pytest.mark.parametrize('low', [1e-3, .05, .3, .9, .999, 1 - 1e-6])
@pytest.mark.parametrize('high', [.5, 1., 1.7])
def test_minimax_is_optimal(low, high):
    "Its error reaches one maximum four times, in turns (Chebyshev)."
    a, b, c = minimax_quintic(low*high, high)
    x = torch.linspace(low*high, high, 200_001, dtype=torch.float64)
    error = 1 - a*x - b*x**3 - c*x**5
    most = error.abs().max()
    if low < .95:  # beyond that, rounding is all there is
        peaks = error[error.abs() > most*(1 - 1e-5)].sign()
        assert (peaks.diff() != 0).sum() == 3
    assert most < 1 - low and (low < .99 or most < 1e-6)


@pytest.mark.parametrize('steps', [1, 3, 5, 8, 12])
def test_polar_express_draws_near_to_one(steps):
    "All of [0.001, 1] stays above 0, and its worst error shrinks."
    x, worst = torch.logspace(-3, 0, 20_001, dtype=torch.float64), []
    for a, b, c in polar_express(steps, safety=1):
        x = a*x + b*x**3 + c*x**5
        assert x.min() > 0
        worst.append((1 - x).abs().max())
    assert all(new < old or new < 1e-6 for old, new in zip(worst, worst[1:]))
    assert steps < 8 or worst[-1] < 1e-6


def step(kind, dtype):
    "(before, after, gradients) of a first step, by the config."
    rng = torch.Generator().manual_seed(3)
    named = {f'{n}.weight': torch.randn(12, 8, generator=rng, dtype=dtype)
             .requires_grad_() for n in 'ab'}
    named['skips'] = torch.ones(2, dtype=dtype, requires_grad=True)
    opt = build_optimizers(named.items(), OptimConfig(orthogonal=kind), dtype)
    first = [p.detach().clone() for p in named.values()]
    grads = [torch.randn(p.shape, generator=rng, dtype=dtype)
             for p in named.values()]
    for p, g in zip(named.values(), grads): p.grad = g.clone()
    opt.step(momentum=.5)
    return first, [p.detach() for p in named.values()], grads


@pytest.mark.parametrize('kind', ['newton_schulz', 'polar_express'])
def test_the_config_chooses_the_table(kind):
    "The first step is the table applied to 1.5 g, which is scaled away."
    table = dict(newton_schulz=5*(NS_COEFFICIENTS,),
                 polar_express=polar_express(5))[kind]
    for old, new, g in list(zip(*step(kind, torch.float64)))[:2]:
        want = old - .02*1.5**.5*newton_schulz(g, table)
        torch.testing.assert_close(new, want, rtol=0, atol=1e-8)


def test_only_the_two_kinds():
    assert OptimConfig().orthogonal == 'newton_schulz'
    with pytest.raises(ValueError, match='optim.orthogonal'):
        orthogonal_table('newton', 5)
