"""The kernels: run in Triton's interpreter, compiled for a GPU that is not
here, and the decision to use them.

Triton reads TRITON_INTERPRET as it is imported, so whatever needs it runs in
a process of its own: this file, as a script, prints its figures as JSON.
"""
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TRITON = pytest.mark.skipif(find_spec('triton') is None, reason='Triton is '
                            "not installed (it is a part of '.[dev]')")
SHAPES = ((1, 8, 8), (129, 40, 136), (300, 72, 264))  # tokens, d, h


def figures(part, interpret):
    "What this file prints for a part, in a fresh process."
    env = {**os.environ, 'TRITON_INTERPRET': str(int(interpret)),
           'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join(
               [str(ROOT), os.environ.get('PYTHONPATH', '')])}
    done = subprocess.run([sys.executable, __file__, part], cwd=ROOT, env=env,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# ---- in the other process ------------------------------------------------

def relative(x, exact, size=None):
    size = (exact if size is None else size).norm()
    return ((x.double() - exact).norm() / size).item()


def mend_bf16():
    "The interpreter keeps bf16 as integers and multiplies those."
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter as ti
    def wide(x):
        if x.dtype.scalar != tl.bfloat16: return x
        data = (x.data.astype(np.uint32) << 16).view(np.float32)
        return ti.TensorHandle(data, tl.float32)
    dot = ti.InterpreterBuilder.create_dot
    ti.InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(
        self, wide(a), wide(b), *rest)


def interpreted():
    "Errors of each tile and direction against float64, fresh inputs."
    import torch
    from golf.kernels import TILES, last_bit, launch
    rows, seed = [], int.from_bytes(os.urandom(4), 'big')
    torch.manual_seed(seed)
    mend_bf16()
    for dtype in (torch.float32, torch.bfloat16):
        for tokens, d, h in SHAPES:
            for leaky in (False, True):
                x, up, g, down = (torch.randn(s).to(dtype) for s in (
                    (tokens, d), (h, d), (tokens, d), (d, h)))
                u = x.double() @ up.double().T
                inner = torch.where(u < 0, 0.5*leaky*u, u)
                slope = 2*inner * torch.where(u < 0, 0.5*leaky, 1.)
                back = g.double() @ down.double()
                for tile in range(len(TILES)):
                    a = launch(x, up, None, leaky, tile)
                    grad = launch(g, down, a, leaky, tile)
                    sure = u.abs() > 1e-3 * u.abs().mean()
                    bit = a.float().view(torch.int32) & last_bit(dtype) != 0
                    rows.append(dict(
                        dtype=str(dtype), leaky=leaky, tile=tile, seed=seed,
                        # relu may leave nothing, so the size is before it
                        forward=relative(a, inner**2, u**2),
                        backward=relative(grad, slope*back, 2*u*back),
                        sides=not leaky or bool(
                            (bit == (u <= 0))[sure].all())))
    return rows


def whole():
    "Errors of the MLP of a model, compiled, with rounded weights."
    import torch
    from golf.blocks import ACTIVATIONS, MLP
    from golf.grid import fake_quant
    from golf.kernels import kernel_ops
    kernel_ops()
    torch.manual_seed(int.from_bytes(os.urandom(4), 'big'))
    rows = []
    for name in ACTIVATIONS:
        mlp, x = MLP(24, 40, name), torch.randn(3, 37, 24)
        for m in (mlp.up, mlp.down):
            torch.nn.init.normal_(m.weight)
            m.bits = 6
            m.round_on.fill_(1.)
        mlp.tiles = 0, 1
        inputs = x.requires_grad_(), mlp.up.weight, mlp.down.weight
        y = torch.compile(mlp, fullgraph=True, backend='aot_eager')(x)
        g = torch.randn_like(y)
        ours = y, *torch.autograd.grad(y, inputs, g)
        exact = [t.detach().double().requires_grad_() for t in inputs]
        up, down = (fake_quant(w.detach(), 6, torch.tensor(1.)).double()
                    + w64 - w64.detach() for w, w64 in
                    zip(inputs[1:], exact[1:]))
        y = ACTIVATIONS[name](exact[0] @ up.T) @ down.T
        theirs = y, *torch.autograd.grad(y, exact, g.double())
        rows.append([relative(a, b.detach()) for a, b in zip(ours, theirs)])
        hooks = []
        mlp.down.register_forward_pre_hook(lambda *a: hooks.append(1))
        mlp(x)
        assert hooks, 'a plain call passes by the layers'
    return rows


def compiled():
    "Every tile through Triton's compiler, for a Hopper GPU."
    from unittest import mock
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    import golf.kernels as kernels
    here = mock.MagicMock()
    here.get_current_target = lambda: GPUTarget('cuda', 90, 32)
    here.get_current_device = here.get_current_stream = lambda *a: 0
    triton.runtime.driver.set_active(here)
    made, real = [], kernels.jitted
    class Compile:
        def __init__(self, kernel): self.kernel = real(kernel)
        def __getitem__(self, grid):
            return lambda *a, **k: made.append(
                self.kernel.warmup(*a, grid=grid, **k))
    kernels.jitted = Compile
    t = lambda *s: torch.empty(s, dtype=torch.bfloat16)
    for tile in range(len(kernels.TILES)):
        kernels.launch(t(98, 512), t(1792, 512), None, True, tile)
        kernels.launch(t(98, 512), t(512, 1792), t(98, 1792), True, tile)
    return [dict(shared=k.metadata.shared, ptx=k.asm['ptx'].count('wgmma'))
            for k in made]


# ---- in this one ---------------------------------------------------------

@TRITON
def test_tiles_agree_with_float64():
    for row in figures('interpreted', True):
        # three roundings to bf16, of 1/256 at most each
        most = 1e-6 if row['dtype'] == 'torch.float32' else 0.012
        assert row['forward'] < most and row['backward'] < most, row
        assert row['sides'], row


@TRITON
def test_the_mlp_of_a_model():
    for errors in figures('whole', True):
        assert max(errors) < 2e-6, errors


@TRITON
def test_tiles_compile_for_hopper():
    rows = figures('compiled', False)
    assert rows
    for row in rows:
        assert row['shared'] <= 227 * 1024, 'more than a multiprocessor has'
        assert row['ptx'] > 0, 'no tensor core instruction of Hopper'


def test_what_is_decided():
    import torch
    from golf.kernels import choose_mlp, decide
    at = torch.device('cpu'), torch.bfloat16, 64, 24, 40, True
    for wish in ('auto', 'off'): assert not choose_mlp(wish, True, *at).used
    with pytest.raises(ValueError, match='train.kernels: on, but'):
        choose_mlp('on', True, *at)
    works, fails = ((0.1, 2), {}), (None, {0: 'wrong by 1e+00'})
    assert decide('auto', 0.3, (works, works)).tiles == (2, 2)
    with pytest.raises(RuntimeError, match='wrong by'):
        decide('on', 0.3, (works, fails))


def test_config_knows_the_field():
    from golf.config import ConfigError, build_config, parse_yaml
    text = ((ROOT/'params'/'smoke.yaml').read_text()
            + '\n')
    tree = parse_yaml(text, 'smoke.yaml')
    tree.setdefault('train', {})['kernels'] = 'sometimes'
    with pytest.raises(ConfigError, match='train.kernels'):
        build_config(tree, 'smoke')


if __name__ == '__main__': print(json.dumps(globals()[sys.argv[1]]()))
