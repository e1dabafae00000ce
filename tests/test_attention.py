"""Attention kernels: the op under the real compiler, the choice, documents kept apart.

The kernels of a GPU cannot run here; what surrounds them can, with the formula in their place.
"""
import os
import shutil
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

import golf.attention as A
from golf.attention import (attention, attention_backends, attention_call, check_attention, document_layout,
                            document_room, fastest, pick_attention, plain_backward, plain_forward, unit_stride,
                            visible)
from golf.config import ModelConfig
from golf.data import BOS
from golf.model import build_model, choose_attention, compile_model
from golf.ranks import Ranks
from golf.rules import RuleBook, probe_forward
from golf.windows import plan_windows

CPU, BF16 = torch.device('cpu'), torch.bfloat16
SMALL = ModelConfig(layers=3, dim=64, heads=4, kv_heads=2, mlp_hidden=96, smear=True, bigram_buckets=97, bigram_dim=8,
                    value_layers=(2,), value_dim=8, xsa_layers=2, rope_dims=8, residual_init='orthogonal', vocab_size=300,
                    embed_std=0.5)
APART = replace(SMALL, isolate_documents=True)


@pytest.fixture(autouse=True)
def fixed():
    torch.manual_seed(0)


def inputs(B=2, T=48, H=4, H_kv=2, D=16, dtype=torch.float32):
    return [torch.randn(B, h, T, D, dtype=dtype, requires_grad=True) for h in (H, H_kv, H_kv)]


def some_opens(B=2, T=48, p=0.1, seed=0):
    return torch.rand(B, T, generator=torch.Generator().manual_seed(seed)) < p


# --- the op ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('parted', [False, True])
def test_op_compiles_whole_with_inductor(parted):
    "fullgraph, forward and backward: the same numbers as PyTorch's own kernel."
    q, k, v = inputs()
    opens = some_opens()
    layout = document_layout(opens, 'plain') if parted else None
    call = attention_call('plain')
    f = torch.compile(lambda q, k, v: call(q * 2, k, v, layout=layout).sin(), fullgraph=True, dynamic=False)
    y = f(q, k, v)
    z = attention(q * 2, k, v, layout=document_layout(opens, 'sdpa') if parted else None).sin()
    assert (y - z).abs().max() < 1e-5
    for a, b in zip(torch.autograd.grad(y.sum(), (q, k, v)), torch.autograd.grad(z.sum(), (q, k, v))):
        assert (a - b).abs().max() < 1e-4


def test_a_held_kernel_compiles_whole():
    "`sdpa_kernel` inside a compiled graph: PyTorch has a FlashAttention for the CPU, too."
    q, k, v = inputs(H_kv=4)
    y = torch.compile(attention_call('flash'), fullgraph=True, backend='aot_eager')(q, k, v)
    assert (y - attention(q, k, v)).abs().max() < 1e-6
    with pytest.raises(RuntimeError): attention(q, k, v, 'cudnn')


@pytest.mark.skipif(not shutil.which(os.environ.get('CXX', 'g++')), reason='no C++ compiler')
@pytest.mark.parametrize('how', ['on', 'layers'])
def test_a_held_kernel_is_found_in_the_cache(how, tmp_path, monkeypatch):
    "PyTorch keeps no graph with a function that it does not know, unless it is told what the function depends on."
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path))
    model = build_model(replace(SMALL, layers=1, value_layers=(), xsa_layers=0), 32, 0)
    model.attention = 'flash'
    seen = torch._dynamo.utils.counters['aot_autograd']
    for found in (False, True):
        torch.compiler.reset()
        seen.clear()
        compile_model(model, how)(*torch.randint(300, (2, 2, 32))).sum().backward()
        assert seen['total'] and seen['autograd_cache_bypass'] == 0
        assert seen['autograd_cache_hit'] == found*seen['total']
    torch.compiler.reset()


def test_a_part_of_a_wider_row_is_not_copied():
    "Queries, keys and values of one product are such parts; a library takes any strides but the last."
    whole = torch.randn(2, 3, 12)
    part, turned = whole[..., 4:8], whole.transpose(1, 2)
    assert unit_stride(part) is part
    assert unit_stride(turned).is_contiguous() and torch.equal(unit_stride(turned), turned)


def test_names_do_not_leak_between_models():
    "Two models in a process: each keeps its kernel."
    one, two = build_model(SMALL, 32), build_model(SMALL, 32)
    choose_attention(one, 'plain', Ranks(), 2, 32)
    assert (one.attention, two.attention) == ('plain', 'sdpa')


def fake_package(monkeypatch, forward, backward):
    "A module in the place of FlashAttention-4's."
    module = ModuleType('flash_attn.cute.interface')
    module._flash_attn_fwd, module._flash_attn_bwd = forward, backward
    for name in ('flash_attn', 'flash_attn.cute'):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, 'flash_attn.cute.interface', module)


def as_flash4(seen):
    """The formula behind FlashAttention-4's interface.

    Arguments, layouts and returns as in flash_attn.cute.interface of 4.0.0b36: [B, T, H, D] and lse [B, H, T], or with
    cu_seqlens [total, H, D] and lse [H, total]; the forward returns five things, the backward takes `dout` fifth.
    """
    def apart(z, starts, T): return z if starts is None else z.unflatten(0, (-1, T))

    def forward(q, k, v, *, causal, return_lse, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None,
                max_seqlen_k=None):
        assert causal and return_lse and not q.requires_grad and cu_seqlens_q is cu_seqlens_k
        assert all(z.stride(-1) == 1 for z in (q, k, v)) and max_seqlen_q == max_seqlen_k
        seen.append('parted' if q.dim() == 3 else 'whole')
        out, lse = plain_forward(*(apart(z, cu_seqlens_q, max_seqlen_q) for z in (q, k, v)), cu_seqlens_q)
        if cu_seqlens_q is not None:
            assert cu_seqlens_q.dtype == torch.int32 and cu_seqlens_q[-1] == q.size(0) and (cu_seqlens_q.diff() >= 0).all()
            assert cu_seqlens_q.diff().max() <= max_seqlen_q
            out, lse = out.flatten(0, 1), lse.transpose(0, 1).flatten(1)
        return out, lse.float(), None, None, None

    def backward(q, k, v, out, dout, lse, *, causal, deterministic, cu_seqlens_q=None, cu_seqlens_k=None,
                 max_seqlen_q=None, max_seqlen_k=None):
        assert causal and deterministic == torch.are_deterministic_algorithms_enabled()
        s, T = cu_seqlens_q, max_seqlen_q
        if s is not None:
            assert lse.shape == (q.size(1), q.size(0))
            lse = lse.unflatten(1, (-1, T)).transpose(0, 1)
        dout, q, k, v, out = (apart(z, s, T) for z in (dout, q, k, v, out))
        found = plain_backward(dout, q, k, v, out, lse, s)
        return found if s is None else tuple(z.flatten(0, 1) for z in found)
    return forward, backward


@pytest.mark.parametrize('parted', [False, True])
def test_flash4_is_called_as_its_interface_asks(monkeypatch, parted):
    "Layouts, argument names and returns of the package, in a compiled graph."
    seen = []
    fake_package(monkeypatch, *as_flash4(seen))
    q, k, v = inputs()
    opens = some_opens()
    layout = document_layout(opens, 'flash4') if parted else None
    f = torch.compile(attention_call('flash4'), fullgraph=True, backend='aot_eager')
    y = f(q, k, v, layout=layout)
    z = attention(q, k, v, layout=document_layout(opens, 'sdpa') if parted else None)
    assert (y - z).abs().max() < 1e-5 and set(seen) == {'parted' if parted else 'whole'}
    grad = torch.randn_like(y)
    for a, b in zip(torch.autograd.grad(y, (q, k, v), grad), torch.autograd.grad(z, (q, k, v), grad)):
        assert (a - b).abs().max() < 1e-4


def test_flash3_is_called_as_its_interface_asks(monkeypatch):
    "Its backward fills the gradients that it is given, by position."
    module = ModuleType('flash_attn_interface')
    four, back = as_flash4([])

    def forward(q, k, v, *, causal, softmax_scale, **bounds):
        assert softmax_scale == q.size(-1)**-.5
        return four(q, k, v, causal=causal, return_lse=True, **bounds)[:4]

    def backward(dout, q, k, v, out, lse, cu_q, cu_k, used_q, used_k, max_q, max_k, dq, dk, dv, scale, causal, *,
                 deterministic):
        assert used_q is used_k is None and scale == q.size(-1)**-.5
        for to, z in zip((dq, dk, dv), back(q, k, v, out, dout, lse, causal=causal, deterministic=deterministic,
                                            cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=max_q,
                                            max_seqlen_k=max_k)): to.copy_(z)
        return torch.empty(0)
    module._flash_attn_forward, module._flash_attn_backward = forward, backward
    monkeypatch.setitem(sys.modules, 'flash_attn_interface', module)
    for parted in (False, True):
        assert check_attention('flash3', (2, 48, 4, 2, 16), CPU, torch.float32, parted) < 1e-4


def test_flash_of_pytorch_with_documents_has_its_arguments():
    "The schema of aten's FlashAttention: what we pass by position is what we mean."
    names = [a.name for a in torch.ops.aten._flash_attention_forward.default._schema.arguments]
    assert names[:10] == ['query', 'key', 'value', 'cum_seq_q', 'cum_seq_k', 'max_q', 'max_k', 'dropout_p', 'is_causal',
                          'return_debug_mask']
    names = [a.name for a in torch.ops.aten._flash_attention_backward.default._schema.arguments]
    assert names[:14] == ['grad_out', 'query', 'key', 'value', 'out', 'logsumexp', 'cum_seq_q', 'cum_seq_k', 'max_q',
                          'max_k', 'dropout_p', 'is_causal', 'rng_state', 'unused']


# --- the choice -----------------------------------------------------------------------------------------------------

def on_a_card(monkeypatch, names):
    monkeypatch.setattr(A, 'attention_backends', lambda *a: [*names, 'sdpa'])


SHAPE = (2, 48, 4, 2, 16)


def test_auto_never_takes_a_kernel_that_fails(monkeypatch):
    "One kernel is wrong, one is not installed after all, one is right: the log says so."
    forward, backward = as_flash4([])
    fake_package(monkeypatch, lambda *a, **k: [z * 1.1 if z is not None else z for z in forward(*a, **k)], backward)
    monkeypatch.setitem(sys.modules, 'flash_attn_interface', None)
    on_a_card(monkeypatch, ['flash4', 'flash3'])
    kernel, notes = pick_attention('auto', SHAPE, CPU, torch.float32)
    assert kernel == 'sdpa' and len(notes) == 3
    assert notes[0].startswith('attention: flash4 is not used: it is off by') and 'flash3 is not used' in notes[1]
    with pytest.raises(RuntimeError, match='flash4 is not used: it is off by'):
        pick_attention('flash4', SHAPE, CPU, torch.float32)


def test_a_wrong_gradient_is_seen_only_where_there_is_one(monkeypatch):
    forward, backward = as_flash4([])
    fake_package(monkeypatch, forward, lambda *a, **k: [z * 1.1 for z in backward(*a, **k)])
    on_a_card(monkeypatch, ['flash4'])
    assert pick_attention('flash4', SHAPE, CPU, torch.float32, backward=False)[0] == 'flash4'
    with pytest.raises(RuntimeError, match='is off by 10'): pick_attention('flash4', SHAPE, CPU, torch.float32)


def test_nan_is_no_small_error(monkeypatch):
    forward, backward = as_flash4([])
    fake_package(monkeypatch, lambda *a, **k: [z * torch.nan if z is not None else z for z in forward(*a, **k)], backward)
    on_a_card(monkeypatch, ['flash4'])
    with pytest.raises(RuntimeError, match='off by inf'): pick_attention('flash4', SHAPE, CPU, torch.float32)


def test_deterministic_runs_take_the_first_that_repeats(monkeypatch):
    "By the list and not by the clock; a kernel that differs from call to call is passed over."
    forward, backward = as_flash4([])
    fake_package(monkeypatch, forward, lambda *a, **k: [z * (1 + 1e-4*torch.rand(())) for z in backward(*a, **k)])
    on_a_card(monkeypatch, ['flash4', 'plain'])
    torch.use_deterministic_algorithms(True)
    try: kernel, notes = pick_attention('auto', SHAPE, CPU, torch.float32)
    finally: torch.use_deterministic_algorithms(False)
    assert kernel == 'plain' and 'differ from call to call' in notes[0]


@pytest.mark.parametrize('want', ['flash3', 'flash4', 'cudnn', 'flash'])
def test_by_name_on_a_cpu_is_a_clear_error(want):
    with pytest.raises(ValueError, match=f'attention: {want} cannot be used here.*there is sdpa'):
        pick_attention(want, SHAPE, CPU, BF16)


def test_cpu_runs_nothing(monkeypatch):
    monkeypatch.setattr(A, 'try_attention', None)
    assert pick_attention('auto', SHAPE, CPU, BF16) == ('sdpa', [])
    assert attention_backends(CPU) == ['sdpa'] == attention_backends(torch.device('cuda'), torch.float32)


def test_nothing_passes_is_an_error():
    def trial(name): raise OSError('libfoo.so is missing\nmore lines')
    with pytest.raises(RuntimeError, match='^attention: a is not used: libfoo.so is missing; attention: b'):
        fastest(['a', 'b'], trial)


def test_ranks_share_one_choice():
    "What the first rank chose is used everywhere, and its op is there."
    model = build_model(SMALL, 32)
    second = SimpleNamespace(device=CPU, share=lambda make: ('plain', ['attention: plain']))
    assert choose_attention(model, 'auto', second, 2, 32) == ['attention: plain']
    assert model.attention == 'plain'
    model(torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, 8, dtype=torch.long))


# --- documents ------------------------------------------------------------------------------------------------------

def a_row(T, seed, p=0.06, vocab=300):
    draw = torch.Generator().manual_seed(seed)
    row = torch.randint(2, vocab, (1, T), generator=draw)
    row[torch.rand(1, T, generator=draw) < p] = BOS
    return row


def exact(cfg, T, kernel='sdpa'):
    "In float64, rotary tables too."
    model = build_model(cfg, T, 3, torch.float64).double()
    for block in model.blocks: block.attn.q_gain.data.fill_(3.)
    angle = A.rotary_angles(cfg.rope_base, T, cfg.rope_dims)
    model.rotary.cos, model.rotary.sin = angle.cos(), angle.sin()
    choose_attention(model, kernel, Ranks(), 1, T)
    return model


@pytest.mark.parametrize('kernel', ['sdpa', 'plain'])
@pytest.mark.parametrize('seed', [0, 1])
def test_documents_are_what_they_are_alone(kernel, seed):
    T = 100
    model, row = exact(APART, T, kernel), a_row(T, seed)
    ends = [0, *(row[0, 1:] == BOS).nonzero()[:, 0].add(1).tolist(), T]
    whole = model.logits(model.hidden(row)).double()
    for i, j in zip(ends, ends[1:]):
        alone = model.logits(model.hidden(row[:, i:j])).double()
        assert (whole[:, i:j] - alone).abs().max() < 1e-5  # logits are float32
        assert (model.hidden(row)[:, i:j] - model.hidden(row[:, i:j])).abs().max() < 1e-11


@pytest.mark.parametrize('kernel', ['sdpa', 'plain'])
@pytest.mark.parametrize('dtype', [torch.float32, BF16])
@pytest.mark.parametrize('T', [64, 1100])
def test_earlier_documents_change_no_bit(kernel, dtype, T):
    "Every token before a BOS is another one; every bit from it on is the same. T = 1,100: several blocks of keys."
    model = build_model(APART, T, 3, dtype)
    choose_attention(model, kernel, Ranks(), 1, T)
    row = torch.randint(2, 300, (2, T))
    at = 2*T//3
    row[:, at] = row[0, T//4] = BOS
    other = row.clone()
    other[:, :at] = torch.randint(0, 300, (2, at))  # BOS among them
    with torch.no_grad():
        a, b = (model.logits(model.hidden(x)) for x in (row, other))
    assert torch.equal(a[:, at:], b[:, at:]) and (a[:, :at] != b[:, :at]).any(-1).all()


@pytest.mark.parametrize('kernel', ['sdpa', 'plain'])
def test_later_tokens_change_nothing_before(kernel):
    "Causal, also where the later tokens open and close documents, and where there is no more room for them."
    T = 64
    model = build_model(APART, T, 3)
    choose_attention(model, kernel, Ranks(), 1, T)
    for p in (0.1, 0.7):
        row, other = a_row(T, 5, p), a_row(T, 6, p)
        for t in (1, 20, 40, 63):
            mixed = torch.cat((row[:, :t], other[:, t:]), 1)
            a, b = (model.logits(model.hidden(x)) for x in (row, mixed))
            assert torch.equal(a[:, :t], b[:, :t])


def test_masks_and_beginnings_agree():
    "Crowded rows, rows without a BOS, a BOS at the ends: both layouts are one rule."
    for seed in range(20):
        p = (0.02, 0.3, 0.9)[seed % 3]
        opens = some_opens(3, 40, p, seed)
        opens[0] = False
        opens[1, [0, 39]] = True
        starts, mask = document_layout(opens, 'plain'), document_layout(opens, 'sdpa')
        assert starts.dtype == torch.int32 and len(starts) == 3 * document_room(40) + 1
        assert torch.equal(visible(torch.empty(3, 40, 1, 1), starts), mask)
        number = torch.tensor([[int(opens[b, 1:t + 1].sum()) for t in range(40)] for b in range(3)]).clamp(max=15)
        slow = (number[:, :, None] == number[:, None]) & torch.ones(40, 40).tril().bool()
        assert torch.equal(mask[:, 0], slow)


def test_the_layout_of_a_compiled_model_is_static():
    "Rows with other documents do not compile again, and agree with the model as it is."
    model = build_model(APART, 32)
    choose_attention(model, 'plain', Ranks(), 1, 32)
    f = torch.compile(model, fullgraph=True, dynamic=False, backend='aot_eager')
    with torch.no_grad():
        f(a_row(32, 0), a_row(32, 1))
        with torch.compiler.set_stance('fail_on_recompile'):
            for seed in range(2, 6):
                x, y = a_row(32, seed, 0.05 * seed), a_row(32, seed + 1)
                assert (f(x, y) - model(x, y)).abs().max() < 1e-5


def test_the_probes_hold_on_such_a_model():
    "The scorer's own probes for leaks and for sums of one."
    tokens = np.concatenate([a_row(64, s)[0].numpy() for s in range(10)])
    for kernel in ('sdpa', 'plain'):
        model = build_model(APART, 64).eval()
        choose_attention(model, kernel, Ranks(), 8, 64)
        for w in plan_windows(len(tokens) - 1, 64, 16):
            probe_forward(RuleBook(), model, tokens, w, 8, 300, Ranks())


def test_off_means_as_before():
    "Without the option a BOS is a token like any other, and attention is PyTorch's causal kernel, bit for bit."
    model, row = build_model(SMALL, 48), a_row(48, 1)
    assert model.opens(row) is None
    q, k, v = inputs()
    assert torch.equal(attention(q, k, v), F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))


def test_an_artifact_is_scored_as_it_was_trained(tmp_path):
    "The option travels in the artifact with the model; the kernel does not."
    from golf.artifact import export_artifact, write_artifact
    from golf.config import Config, read_config
    from golf.score import artifact_model
    text = dict(name='t', model=dict(layers=2, dim=32, heads=2, kv_heads=1, mlp_hidden=32, vocab_size=300,
                                     isolate_documents=True),
                train=dict(steps=1, warmdown_steps=0, attention='plain', seq_len=32, batch_tokens=256, micro_tokens=256),
                score=dict(seq_len=32, stride=16))
    (tmp_path/'params.yaml').write_text(yaml.safe_dump(text))
    cfg = read_config(tmp_path/'params.yaml')
    model = build_model(cfg.model, 32)
    blob = export_artifact(model.state_dict(), cfg, '0'*64, 'fp32', 1., cfg.quant.formats)[0]
    write_artifact(tmp_path/'model.golf', blob)
    back, _, meta = artifact_model(tmp_path/'model.golf', CPU)
    assert back.isolate and back.attention == 'sdpa' and 'plain' not in str(meta)
