"""Muon's update must not depend on how many ranks share the work."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from golf.muon import Muon
from golf.ranks import start_ranks

ROOT = Path(__file__).resolve().parents[1]

# Stacks of 5, 3 and 1: none divides by 2, the last leaves rank 1 idle.
SHAPES = 5 * [(12, 12)] + 3 * [(20, 8)] + [(8, 20)]


VARIANTS = {"muon": {}, "normuon": dict(normuon=True),
            "polar": dict(orthogonal="polar_express")}


def train(variant, steps=8):
    "Parameters and this rank's state after some steps of made-up gradients."
    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(0)
    params = [torch.randn(s, generator=rng).requires_grad_() for s in SHAPES]
    opt = Muon(params, weight_decay=0.1, **VARIANTS[variant])
    for t in range(steps):
        opt.param_groups[0].update(lr=0.02 / (t + 1), momentum=0.85 + 0.01 * t)
        for p in params:
            p.grad = torch.randn(p.shape, generator=rng)
        opt.step()
    return [p.detach() for p in params], opt.state_dict()


def worker(folder):
    "What torchrun starts twice: one rank's work, left in files."
    with start_ranks("cpu", threads=1) as ranks:
        for variant in VARIANTS:
            params, state = train(variant)
            torch.save({"params": params, "state": state},
                       f"{folder}/{variant}{ranks.rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "What each of two ranks was left with, all variants."
    folder = tmp_path_factory.mktemp("world")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone",
         "--nproc-per-node", "2", __file__, folder], capture_output=True,
        text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1",
                                     "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_equal_one(folder, variant):
    alone, state = train(variant)
    ranks = [torch.load(folder / f"{variant}{r}.pt") for r in range(2)]

    # Both ranks hold bitwise the same model, and it is that of one process.
    for one, a, b in zip(alone, ranks[0]["params"], ranks[1]["params"]):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, one, rtol=0, atol=1e-6)

    # A rank keeps the state of its own share only; together they are whole.
    for key, whole in state["state"].items():
        for name, value in whole.items():
            parts = [r["state"]["state"][key][name] for r in ranks]
            assert len(parts[0]) == len(parts[1]) == -(-len(value) // 2)
            joined = torch.cat(parts)
            torch.testing.assert_close(joined[:len(value)], value,
                                       rtol=0, atol=1e-6)
            assert joined[len(value):].abs().sum() == 0


def test_state_of_another_world_is_refused():
    _, state = train("muon", steps=1)
    for entry in state["state"].values():
        entry["momentum"] = entry["momentum"][:1]
    params = [torch.zeros(s, requires_grad=True) for s in SHAPES]
    opt = Muon(params)
    opt.load_state_dict(state)
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="same world size"):
        opt.step()
    assert all(p.abs().sum() == 0 for p in params)


if __name__ == "__main__":
    worker(sys.argv[1])
