"""Formulas against counting, categories against made-up traces, and every
command once. No time is asserted."""
import json
import math
import os
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY, golf
from torch.utils._python_dispatch import TorchDispatchMode

from golf.bench import (CATEGORIES, Work, attention_work, busy_seconds,
                        by_name, by_shape, field_mark,
                        floor_of, golf_mark, list_work, measurement,
                        nest_events, optimizer_work, pace_of, plot_history,
                        plot_rows, product_shapes, product_work,
                        read_measurements, save_measurement, shape_guide,
                        step_work, train_row, watch_training)
from golf.cli import main
from golf.config import load_run_config
from golf.model import build_model
from golf.muon import build_optimizers
from golf.ranks import Ranks

FULL = '''{model: {layers: 3, dim: 48, heads: 3, kv_heads: 1, mlp_hidden: 80,
  vocab_size: 320, bigram_buckets: 64, bigram_dim: 16, smear: true,
  value_layers: [1, 2], value_dim: 24, xsa_layers: 2}, train: {seq_len: 64,
  batch_tokens: 256, micro_tokens: 128}, data: {spans: 1}}'''

# of the profile of a step of #137 on an H100: ms, calls, name
H100 = '''\
  12.374    9.0 cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16
   4.558   46.0 nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT
   2.667    9.0 triton_poi_fused__unsafe_view_mul_pow_relu_threshold_backward_view_2
   1.745    9.0 nvjet_sm90_tst_192x128_64x5_1x2_h_bz_coopB_splitK_NTT
   1.533    9.0 triton_per_fused__fused_rms_norm__fused_rms_norm_backward__to_copy__unsafe_view_add_cat_mul_neg_slice_transpose_unsqueeze_view_7
   1.357    9.0 void cudnn::fusion::compute_dot_do_o_specialized<true, 64>(void const*, void const*)
   1.226    9.0 triton_per_fused__fused_rms_norm__to_copy__unsafe_view_add_mul_10
   0.973   18.0 void cudnn::fusion::fmha_reduce_head<true>(void const*, void*)
   0.602    9.0 triton_red_fused_mul_sum_transpose_10
   0.392    9.0 triton_per_fused__fused_rms_norm__to_copy__unsafe_view_add_cat_mul_split_with_sizes_sub_unsqueeze_view_4
   0.324   35.0 void at::native::reduce_kernel<128, 4, at::native::ReduceOp<float> >
   0.211    1.0 triton_per_fused__fused_rms_norm__fused_rms_norm_backward__to_copy_add_embedding_dense_backward_mul_nll_loss_forward_select_sum_28
   0.199    1.0 triton_per_fused__log_softmax__log_softmax_backward_data__to_copy__unsafe_view_arange_div_eq_expand_mul_nll_loss_backward_nll_loss'''


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config(over=FULL): return load_run_config('smoke', overrides=over)[0]


class Count(TorchDispatchMode):
    "Sizes of every product: (FLOPs, bytes, is its result symmetric)."
    kinds = torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.baddbmm

    def __init__(self): super().__init__(); self.seen = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if op.overloadpacket in self.kinds:
            a, b = args[-2:]
            self.seen.append((2*out.numel()*a.shape[-1],
                              sum(t.nbytes for t in (a, b, out)),
                              out.shape == out.mT.shape
                              and torch.allclose(out, out.mT, atol=1e-4)))
        return out


def a_step(cfg):
    "The products of one forward and backward pass, both micro-batches."
    torch.manual_seed(0)
    model = build_model(cfg.model, 64)
    for i in range(2):
        ids = torch.randint(cfg.model.vocab_size, (2, 65))
        with Count() as seen:
            model(ids[:, :-1], ids[:, 1:]).mean().backward()
        yield model, seen.seen


def test_products_of_a_network_with_everything():
    cfg = config()
    counted = [sum(k) for k in zip(*(p[:2] for _, seen in a_step(cfg)
                                     for p in seen))]
    assert tuple(counted) == product_work(product_shapes(cfg.model), 256, 2,
                                          4)


def test_newton_schulz_by_its_symmetric_results():
    cfg = config()
    model = build_model(cfg.model, 64)
    for p in model.parameters(): p.grad = torch.randn_like(p)
    muon = build_optimizers(model.named_parameters(), cfg.optim).muon
    with Count() as seen: muon.step()
    flops = sum(f/2 if symmetric else f for f, _, symmetric in seen.seen)
    assert flops == optimizer_work(cfg)[0]
    assert sum(s for *_, s in seen.seen) == 2*len(seen.seen)/3


def test_optimizer_bytes_by_hand():
    plain, ema = config(), config(FULL[:-1] + ', average: {method: ema}}')
    model = build_model(plain.model, 64)
    flat = {k: p.numel() for k, p in model.named_parameters()}
    matrices = sum(p.numel() for k, p in model.named_parameters()
                   if p.ndim == 2 and k.endswith('.weight')
                   and 'tok_emb' not in k and '.table' not in k)
    total = sum(flat.values())
    want = 4*total + 20*matrices + 28*(total - matrices)
    assert optimizer_work(plain)[1] == want
    assert optimizer_work(ema)[1] == want + 8*total


def test_attention_pair_by_pair():
    m, T, rows = config().model, 7, 2
    pairs = sum(1 for _ in range(rows*m.heads*m.layers)
                for t in range(T) for s in range(t + 1))
    products = 2 + 5  # forward; backward with the scores anew
    head = m.dim//m.heads
    assert attention_work(m, rows*T, T, 2)[0] == products*2*head*pairs


def test_work_grows_with_tokens_and_not_with_micro_batches():
    cfg = config()
    one, two = (step_work(config(FULL.replace('batch_tokens: 256',
                                              f'batch_tokens: {n}')))
                for n in (256, 512))
    for k in ('attention', 'stream', 'heads', 'activation'):
        assert two[k] == tuple(2*x for x in one[k]), k
    whole = step_work(config(FULL.replace('micro_tokens: 128',
                                          'micro_tokens: 256')))
    assert whole['products'][0] == step_work(cfg)['products'][0]
    assert whole['products'][1] < step_work(cfg)['products'][1]
    assert 2*whole['weights'][1] == step_work(cfg)['weights'][1]
    assert set(one) < set(CATEGORIES)


def test_floor_is_the_larger_time():
    assert floor_of(0, 0, dict(flops=1, bytes=1))[0] == 0
    assert floor_of(9, 4, dict(flops=3, bytes=1)) == (4, 'bytes')


def test_kernels_of_an_h100():
    sums = dict.fromkeys(CATEGORIES, 0.)
    for line in H100.splitlines():
        ms, _, name = line.split(maxsplit=2)
        sums[by_name(name) or 'other'] += float(ms)
    assert {k: round(v, 3) for k, v in sums.items() if v} == dict(
        attention=14.704, products=6.303, heads=2.527, stream=1.226,
        activation=2.667, ends=.41, other=.324)


@pytest.mark.parametrize('name, category', [
    ('kernel_cutlass_kernel_flash_attncuteflash_fwd_sm90', 'attention'),
    ('void cutlass::device_kernel<flash::FlashAttnFwdSm90<bf16> >',
     'attention'),
    ('sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64',
     'products'),
    ('void cublasLt::splitKreduce_kernel<32, 16, int, float>', 'products'),
    ('void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>',
     'optimizer'),
    ('triton_per_fused__to_copy_abs_amax_clamp_div_mul_round_sub_3',
     'weights'),
    ('triton_poi_fused__to_copy_7', 'weights'),
    ('triton_poi_fused_add_mul_sigmoid_3', 'stream'),
    ('triton_per_fused_clamp_div_mul_sub_sum_5', 'heads'),
    ('triton_poi_fused_leaky_relu_leaky_relu_backward_mul_pow_2',
     'activation'),
    ('void at::native::vectorized_elementwise_kernel<4>', None),
    ('Memset (Device)', None)])
def test_more_names(name, category): assert by_name(name) == category


def event(name, ts, dur, cat='cpu_op', tid=1, **args):
    return dict(ph='X', name=name, ts=ts, dur=dur, cat=cat, tid=tid,
                args=args)


def test_a_graph_launch_in_the_optimizer_owns_all_its_kernels():
    "One launch, many kernels; the mark is on another thread."
    events = [
        event('Optimizer.step#Muon.step', 10, 10, 'user_annotation', 1),
        event('cudaGraphLaunch', 12, 1, 'cuda_runtime', 2, correlation=5),
        *(event('nvjet_sm90', 30 + i, 1, 'kernel', 7, correlation=5)
          for i in range(3)),
        event('cudaLaunchKernel', 21, 1, 'cuda_runtime', 2, correlation=6),
        event('nvjet_sm90', 40, 1, 'kernel', 7, correlation=6)]
    found = [w.category for w in list_work(events, config().model)]
    assert found == ['optimizer']*3 + ['products']


def test_an_eager_kernel_is_known_by_who_launched_it():
    name = 'void at::native::vectorized_elementwise_kernel<4>'
    dims = [[4, 64, 3, 16], [64, 1, 16]], [[4, 64, 80]], [[1]]
    events = []
    for i, d in enumerate(dims):
        events += [event('aten::mul', 10*i, 9, **{'Input Dims': d}),
                   event('cudaLaunchKernel', 10*i + 1, 1, 'cuda_runtime',
                         correlation=i),
                   event(name, 100 + i, 1, 'kernel', 7, correlation=i)]
    events.append(event('autograd::evaluate: NllLossBackward0 nll_loss', 50,
                        9))
    events += [event('cudaLaunchKernel', 51, 1, 'cuda_runtime',
                     correlation=9),
               event(name, 120, 1, 'kernel', 7, correlation=9),
               event('Memcpy DtoH', 130, 1, 'gpu_memcpy', 7)]
    assert [w.category for w in list_work(events, config().model)] == [
        'heads', 'activation', 'other', 'ends', 'other']


def test_events_that_lack_what_they_should_have():
    "A trace has events of other kinds, and calls without a correlation."
    events = [dict(ph='M', name='process_name'), dict(ph='X', cat='Trace'),
              event('cudaDeviceSynchronize', 0, 1, 'cuda_runtime'),
              dict(event('nvjet', 5, 2, 'kernel', 7), args={})]
    work, = list_work(events, config().model)
    assert work.category == 'products' and list_work([], config().model) == []


def test_own_times_add_up():
    ops = nest_events([event('a', 0, 100), event('b', 10, 50),
                       event('c', 20, 10), event('d', 60, 40),
                       event('e', 0, 7, tid=2)])
    assert sum(op.own for op in ops) == 107
    assert {op.name: op.own for op in ops} == dict(a=10, b=40, c=10, d=40,
                                                   e=7)


def test_busy_is_a_union():
    rng = torch.Generator().manual_seed(1)
    at = torch.randint(0, 200, (40, 2), generator=rng).tolist()
    busy = {t for start, dur in at for t in range(start, start + dur)}
    work = [Work('', '', start, dur/1e6) for start, dur in at]
    assert math.isclose(busy_seconds(work), len(busy)/1e6, abs_tol=1e-12)


def test_shapes_of_nested_inputs():
    guide = shape_guide(config().model)
    assert by_shape([[[4, 64, 3, 8], [4, 64, 3, 8]], []], guide) == 'heads'
    assert by_shape([[], 'x', [48, 80]], guide) == 'weights'
    assert by_shape([[7, 7]], guide) is None


@pytest.mark.parametrize('line, mark', [
    ('step:500/20000 val_loss:2.9 val_bpb:1.7 train_time:49500ms '
     'step_avg:99.00ms', (500, 49500)),
    ('step:20/9000 train_loss:3.1 train_time:2000.5ms', (20, 2000.5)),
    ('0:step:7/10 train_time: 70 ms', (7, 70)),
    ('step 12/100 step_avg:10.5ms', (12, 126)),
    ('warmup_step:3/20', None), ('peak memory allocated: 9 MiB', None)])
def test_lines_of_the_field(line, mark): assert field_mark(line) == mark


def test_our_own_line_as_the_logger_prints_it(capsys):
    from golf.train import line_logger
    with open(os.devnull, 'w') as nowhere:
        line_logger(nowhere, print)(dict(kind='train', step=40, seconds=2.5,
                                         tokens=9, loss=3.))
    assert golf_mark(capsys.readouterr().out) == (40, 2500)


def test_pace():
    marks = [(1, 5000), (10, 6000), (10, 6000), (20, 6400), (40, 7600)]
    assert pace_of(marks) == dict(ms=1600/30, low=40, high=60, steps=30)
    with pytest.raises(ValueError, match='more seconds'): pace_of(marks[:3])


def alive(pid):
    "Is a process there, and not a zombie?"
    try:
        with open(f'/proc/{pid}/stat') as f:
            return f.read().rpartition(')')[2].split()[0] != 'Z'
    except OSError: return False


def test_a_watched_script_leaves_nothing_behind(tmp_path):
    "It starts a child of its own, and is ended in the middle of its work."
    script = ('import subprocess, sys, time\n'
              'p = subprocess.Popen([sys.executable, "-c", "import time; '
              'time.sleep(600)"])\n'
              'open("pid", "w").write(str(p.pid))\n'
              'print("peak memory allocated: 77 MiB reserved: 80 MiB")\n'
              'for s in range(100):\n'
              '  print(f"step:{s}/100 train_time:{s*100}ms", flush=True)\n'
              'time.sleep(600)')
    seen = watch_training([sys.executable, '-c', script], field_mark,
                          dict(SOME='thing'), enough=3, folder=tmp_path)
    assert seen['marks'][-1] == (30, 3000)
    assert seen['peak_memory_bytes'] == 77*2**20
    pid = int((tmp_path/'pid').read_text())
    for _ in range(50):
        if not alive(pid): break
        time.sleep(.1)
    assert not alive(pid)


def test_a_script_that_fails_is_a_row():
    seen = watch_training([sys.executable, '-c', 'raise OSError("no card")'],
                          field_mark)
    row = train_row('theirs', seen, 1)
    assert seen['code'] == 1 and 'no card' in row['error']


def test_a_script_that_hangs_is_ended():
    seen = watch_training([sys.executable, '-c', 'import time; '
                           'time.sleep(600)'], field_mark, limit=1)
    assert seen['code'] != 0 and seen['marks'] == []


def test_files_are_numbered_and_whole(tmp_path):
    one = measurement('step', 'a+b', 'x: 1', Ranks(), categories={})
    for want in (1, 2, 3):
        path = save_measurement(tmp_path/'new', one)
        assert path.name.endswith(f'-step-a+b-{want}.json')
    path.unlink()
    other = measurement('step', 'a+b-9', 'x: 1', Ranks(), categories={})
    assert save_measurement(tmp_path/'new', other).stem.endswith('a+b-9-1')
    assert save_measurement(tmp_path/'new', one).stem.endswith('a+b-3')
    found = read_measurements(tmp_path/'new', 'step')
    assert len(found) == 4 and one['fingerprint'] in str(found)
    assert not list((tmp_path/'new').glob('.*'))


def test_a_later_schema_is_refused(tmp_path):
    (tmp_path/'x.json').write_text(json.dumps(dict(schema=99, what='step')))
    with pytest.raises(ValueError, match='schema 99'):
        read_measurements(tmp_path, 'step')


def test_kept_profiles():
    found = read_measurements(ROOT/'runs'/'bench', 'step')
    assert found
    for name, one in found.items():
        assert set(one['categories']) == set(CATEGORIES), name
        ms = sum(p['ms'] for p in one['categories'].values())
        assert math.isclose(ms, one['wall_ms'], rel_tol=.05), name
        assert name.rpartition('-')[0].endswith(one['config']), name
    assert plot_history(found).axes


def test_rows_without_figures_can_be_drawn():
    rows = [dict(name='a', ms=1.), dict(name='b', failed='no')]
    assert plot_rows(rows, 'name', ['ms'], 'ms', floor='floor').axes


# every command once, on a network whose step takes milliseconds

def bench(tmp_path, capsys, *args):
    "(what was printed, what was kept) by `golf bench`."
    main(['bench', *map(str, args), '--out', str(tmp_path/'kept')])
    path, = (tmp_path/'kept').glob('*.json')
    assert path.with_suffix('.png').read_bytes()[:4] == b'\x89PNG'
    one = json.loads(path.read_text())
    for key in ('device', 'torch', 'attention'): assert key in one['machine']
    assert one['schema'] == 1 and one['commit'] and one['fingerprint']
    return capsys.readouterr().out, one


def test_step(tmp_path, capsys):
    "Eager, though a compiler is there: fused kernels leave no events."
    over = TINY.replace('vocab_size: 320', 'vocab_size: 1024').replace(
        'compile: off', 'compile: auto')
    said, one = bench(tmp_path, capsys, 'step', 'smoke', '--overrides',
                      over, '--steps', 1, '--label', 'mine')
    assert 'matrix products' in said and one['label'] == 'mine'
    parts = one['categories']
    for k in ('attention', 'products', 'optimizer', 'ends', 'stream'):
        assert parts[k]['ms'] > 0 and parts[k]['floor_ms'] > 0, k
    assert parts['weights']['ms'] > 0, 'QAT is on'
    assert math.isclose(sum(p['ms'] for p in parts.values()),
                        one['wall_ms'], rel_tol=.01)


def test_same(shards, tmp_path, capsys):
    said, one = bench(tmp_path, capsys, 'same', 'smoke', '--overrides', TINY,
                      '--data', shards, '--steps', 6, '--fast',
                      '{train: {micro_tokens: 256}}')
    assert one['noise']['max'] == 0 < one['change']['max'] < .01
    assert len(one['runs']['fast']['losses']) == 6 and not one['same']
    assert 'two references' in said


def test_threads(shards, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('golf.bench.available_cores', lambda: 1)
    said, one = bench(tmp_path, capsys, 'threads', 'smoke', '--overrides',
                      TINY, '--data', shards, '--seconds', .01, '--eager')
    assert {'fp32', 'bf16'} == {r['precision'] for r in one['rows']}
    assert one['fastest'] in said and torch.get_num_threads() == 1


def test_train_against_a_script(shards, tmp_path, capsys):
    theirs = tmp_path/'theirs.py'
    theirs.write_text(
        'import os\npace = int(os.environ["PACE"])\n'
        'for s in range(0, 90, 10):\n'
        '  print(f"step:{s}/90 train_time:{s*pace}ms", flush=True)\n')
    said, one = bench(
        tmp_path, capsys, 'train', 'smoke', '--overrides', TINY, '--data',
        shards, '--seconds', 2, '--repeat', 1, '--against', theirs,
        '--against-tokens', 512, '--env', 'PACE=40')
    mine, other = one['rows']
    assert 'error' not in other, other
    assert other['ms'] == 40 and other['tokens_per_second'] == 12_800
    assert 'error' not in mine and mine['steps'] > 0, mine
    assert math.isclose(one['ratio'], mine['tokens_per_second']/12_800)
    assert 'ratio of medians' in said


def test_sliding(tiny_run, shards, tmp_path, capsys):
    said, one = bench(tmp_path, capsys, 'sliding', tiny_run, '--data',
                      shards, '--stride', 32, 64)
    assert [r['variant'] for r in one['rows']] == ['stride 32', 'stride 64']
    assert all(r['bpb'] > 0 and r['seconds'] > 0 for r in one['rows'])
    assert 'BPB' in said


def test_ttt(tiny_run, shards, tmp_path, capsys):
    said, one = bench(
        tmp_path, capsys, 'ttt', tiny_run, '--data', shards, '--stride', 32,
        '--tries', '{lr: 1e-3, chunk_tokens: 1024, batch: 4}', '{lr: 0.3}')
    none, good, bad = one['rows']
    assert none['variant'] == 'no learning' and 'gain_mbpb' not in none
    assert good['gain_mbpb'] > bad['gain_mbpb'] and good['seconds'] > 0
    assert one['best'] == good['variant'] and f'best: {one["best"]}' in said


def wrong(*args):
    "The one line that a wrong command ends with."
    with pytest.raises(SystemExit) as e: main(['bench', *map(str, args)])
    assert '\n' not in str(e.value)
    return str(e.value)


def test_wrong_questions(tiny_run, shards, tmp_path):
    out = '--out', tmp_path/'kept'
    assert 'no such file' in wrong('train', 'smoke', '--against',
                                   'nowhere.py', *out)
    assert 'K=V' in wrong('train', 'smoke', '--env', 'PACE', *out)
    assert 'nowhere' in wrong('sliding', tmp_path/'nowhere.golf', *out)
    for tries, fault in (
            ('{rate: 1}', 'ttt.rate'), ('lr', '--tries'),
            ('{blocks: 0, small: false}', 'nothing learns')):
        assert fault in wrong('ttt', tiny_run, '--data', shards, '--tries',
                              tries, *out)
    assert not (tmp_path/'kept').exists()


def test_the_list_of_kernels(tmp_path, capsys):
    out, found = bench(tmp_path, capsys, 'kernels', 'smoke', '--device', 'cpu')
    assert len(found['rows']) > 3
    for row in found['rows']:
        assert row['plain_ms'] > 0 and row['name'] in out
        assert (row['max_relative_error'] or 0) < .02  # no kernel: None


def test_two_ranks_are_measured(tmp_path):
    "Alone and together, under torchrun; one file, by the first."
    golf('bench', 'ranks', 'smoke', '--steps', 2, '--out', tmp_path,
         '--overrides', TINY.replace('vocab_size: 320', 'vocab_size: 1024'),
         nproc=2)
    found, = read_measurements(tmp_path, 'ranks').values()
    assert found['world'] == found['machine']['world_size'] == 2
    assert [r['bytes'] for r in found['sums']] == [2**16, 2**20, 2**24, 2**27]
    assert list(found['predicted']) == ['1', '2', '4', '8']
    for key in 'alone', 'together':
        assert found[key]['ms'] > 0 and found[key]['muon_ms'] > 0
