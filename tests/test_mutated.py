"""Thousands of damaged artifacts: refused, or a model as declared, in bounds.

`python tests/test_mutated.py 5000` makes that many of each kind, with the
checksum as it was and with one that fits, and prints what became of them.
"""
import copy
import hashlib
import json
import random
import resource
import signal
import subprocess
import sys
import time
import tracemalloc

import pytest
import torch
import zstandard
from conftest import ROOT

from golf.artifact import (CHECKSUM_BYTES, MAGIC, PREFIX, VERSION,
                           ArtifactError, open_artifact, pack_artifact,
                           unpack_artifact)
from golf.quantize import dequantize_state, quantize_state

FREE = 256 << 20   # bytes of address space beyond what the imports took
FIXED = 8 << 20    # bytes that reading may take whatever it reads: tables
SLOW = 10          # seconds after which a file counts as a hang
NUMBERS = (0, 1, -1, 2, 255, 2**16, 2**31 - 1, 2**31, 2**40, 2**63, 2**64,
           10**30, -2**63, 0.5, 1e308, float('nan'), float('inf'), True)
JUNK = (None, '', 'x', 'zstd', 'int4', 'int8', 'fp16', 'float32', 'ans',
        'é\u202e', '\0', 'a'*300, [], {}, [[]], [1, 2], {'a': 1}, [None],
        [[[[[[[[1]]]]]]]])


def artifacts():
    "{name: a small artifact}: every format and every way to store codes."
    torch.manual_seed(0)
    shapes = {'tok_emb.weight': (64, 16), 'skips': (2, 16)}
    for i in range(2):
        shapes |= {f'blocks.{i}.attn.q.weight': (16, 16),
                   f'blocks.{i}.mlp.up.weight': (256, 16),
                   f'blocks.{i}.mlp.down.weight': (16, 48)}
    loud = torch.logspace(0, 2, 64)[:, None]
    state = {k: torch.randn(s) * (loud[:s[0]] if s[0] < 64 else 1)
             for k, s in shapes.items()}
    # columns that follow from those before them, for the coder's predictor
    for i in range(2):
        up = state[f'blocks.{i}.mlp.up.weight']
        up[:, 1:] = up[:, :1] + up[:, 1:]/10
    formats = {
        'int6': [('skips', 'float32'), ('*.weight', 'int6')],
        'int4': [('tok_emb.weight', 'fp16'), ('skips', 'fp16'),
                 ('*.up.weight', 'int5'), ('*.weight', 'int4')],
        'plain': [('tok_emb.weight', 'int8'), ('*.q.weight', 'float32'),
                  ('*', 'fp16')]}
    return {name: pack_artifact(quantize_state(state, f), dict(seed=1))
            for name, f in formats.items()}


def damaged(rng, data):
    "The bytes with something done to them."
    data, kind = bytearray(data), rng.randrange(9)
    a, b = sorted(rng.randrange(len(data) + 1) for _ in 'ab')
    n = min(b - a, rng.choice((1, 2, 8, 64)))
    some = slice(a, a + n)
    if kind == 0:
        for _ in range(rng.choice((1, 1, 2, 8))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 1: data[rng.randrange(len(data))] = rng.randrange(256)
    elif kind == 2: del data[b:]
    elif kind == 3: del data[some]
    elif kind == 4: data[a:a] = rng.randbytes(rng.choice((1, 2, 16, 300)))
    elif kind == 5: data[some] = bytes([rng.choice((0, 255))])*n
    elif kind == 6: data[a:a] = data[some]
    elif kind == 7: data[a:b] = data[(a + b)//2:b] + data[a:(a + b)//2]
    else: data += rng.randbytes(rng.choice((1, 16, 1000)))
    return bytes(data)


def places(value, path=()):
    "The path of every part of a JSON value, itself included."
    yield path
    parts = value.items() if isinstance(value, dict) else enumerate(
        value) if isinstance(value, list) else ()
    for k, x in parts: yield from places(x, (*path, k))


def edited(rng, header):
    "The header with one to three of its parts replaced."
    header = copy.deepcopy(header)
    for _ in range(rng.choice((1, 1, 2, 3))):
        paths = [p for p in places(header) if p]
        if not paths: break
        *path, key = rng.choice(paths)
        at = header
        for k in path: at = at[k]
        old, kind = at[key], rng.randrange(6)
        if kind == 0 and isinstance(at, dict): del at[key]
        elif kind == 1 and isinstance(at, list): at.append(rng.choice(at))
        elif kind == 2 and type(old) is int:
            at[key] = old + rng.choice((-1, 1, 8, -8, 2**20))
        elif kind == 3 and type(old) is int: at[key] = rng.choice(NUMBERS)
        elif kind == 4:
            other = rng.choice([p for p in places(header) if p])
            value = header
            for k in other: value = value[k]
            at[key] = copy.deepcopy(value)
        else: at[key] = rng.choice(NUMBERS + JUNK)
    return header


def sealed(head, frames):
    "A file of a packed header and streams, with a checksum that fits."
    total = PREFIX.size + len(head) + len(frames) + CHECKSUM_BYTES
    data = PREFIX.pack(MAGIC, VERSION, total, len(head)) + head + frames
    return data + hashlib.blake2b(data, digest_size=CHECKSUM_BYTES).digest()


def with_checksum(rng, blob):
    "A file that is damaged inside and says that all is well."
    header, frames = open_artifact(blob)
    head = blob[PREFIX.size:len(blob) - len(frames) - CHECKSUM_BYTES]
    kind = rng.randrange(5)
    if kind == 0:
        data = damaged(rng, blob[:-CHECKSUM_BYTES])
        return data + hashlib.blake2b(
            data, digest_size=CHECKSUM_BYTES).digest()
    if kind == 1: return sealed(damaged(rng, head), frames)
    if kind == 2: return sealed(head, damaged(rng, frames))
    if kind == 3:  # one stream changed in place, and its length told
        s = rng.choice(header['streams'])
        start = sum(x['packed'] for x in
                    header['streams'][:header['streams'].index(s)])
        part = damaged(rng, frames[start:start + s['packed']])
        frames = frames[:start] + part + frames[start + s['packed']:]
        s['packed'] = len(part)
    else: header = edited(rng, header)
    text = json.dumps(header).encode()
    return sealed(zstandard.compress(
        damaged(rng, text) if rng.random() < .2 else text, 3), frames)


def declared_bytes(blob):
    "What the streams say they hold, if that can be read at all."
    try: streams = open_artifact(blob)[0]['streams']
    except (ArtifactError, KeyError, TypeError): return 0
    sizes = [s.get('raw') for s in streams if isinstance(s, dict)] \
        if isinstance(streams, list) else []
    return sum(n for n in sizes if type(n) is int and 0 < n < 2**40)


def outcome(blob):
    "'error', or 'model' if all is as it declares; anything else raises."
    try: tensors, meta = unpack_artifact(blob)
    except ArtifactError as error:
        assert str(error) and '\n' not in str(error), repr(error)
        assert len(str(error)) < 1000
        return 'error'
    streams = open_artifact(blob)[0]['streams']
    shapes = {name: tuple(shape) for s in streams
              for name, _, shape in s['tensors']}
    weights = dequantize_state(tensors)
    assert {k: tuple(w.shape) for k, w in weights.items()} == shapes
    assert all(bool(w.isfinite().all()) for w in weights.values())
    return 'model'


def attempt(blob):
    "(outcome, seconds, bytes beyond twice the declared)."
    tracemalloc.reset_peak()
    before, began = tracemalloc.get_traced_memory()[0], time.perf_counter()
    signal.alarm(SLOW)
    try: found = outcome(blob)
    finally: signal.alarm(0)
    seconds = time.perf_counter() - began
    peak = tracemalloc.get_traced_memory()[1] - before
    return found, seconds, peak - 2*max(declared_bytes(blob), len(blob))


def hang(*args): raise TimeoutError(f'no end after {SLOW} s')


def main(count, seed=0):
    "Try so many of both kinds; what became of them, as JSON."
    torch.set_num_threads(1)
    blobs = list(artifacts().values())
    for blob in blobs: assert outcome(blob) == 'model'
    taken = int(open('/proc/self/statm').read().split()[0]) * \
        resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + FREE, taken + FREE))
    signal.signal(signal.SIGALRM, hang)
    tracemalloc.start()
    facts = dict(longest=0., beyond=0, crashes=[])
    for kind, change in (('as they are', damaged),
                         ('with a checksum', with_checksum)):
        facts[kind] = dict(error=0, model=0)
        for i in range(count):
            rng = random.Random(f'{kind} {seed} {i}')
            blob = rng.choice(blobs)
            while (new := change(rng, blob)) == blob: pass
            try: found, seconds, beyond = attempt(new)
            except Exception as error:
                facts['crashes'].append(
                    f'{kind} {i}: {type(error).__name__}: {error}'[:300])
                continue
            facts[kind][found] += 1
            facts['longest'] = max(facts['longest'], seconds)
            facts['beyond'] = max(facts['beyond'], beyond)
    facts['rss'] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    return facts


def run(count):
    "The same in a process of its own, whose memory is limited."
    done = subprocess.run([sys.executable, __file__, str(count)], cwd=ROOT,
                          capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def check(facts, count):
    assert not facts['crashes'], facts['crashes'][:5]
    assert facts['as they are'] == dict(error=count, model=0)
    both = facts['with a checksum']
    assert both['error'] + both['model'] == count
    assert both['error'] > count/4 and both['model'] > 0
    assert facts['beyond'] < FIXED and facts['longest'] < SLOW


def test_mutated():
    check(run(400), 400)


@pytest.mark.slow
def test_ten_thousand():
    check(run(5000), 5000)


def test_the_same_files_every_time():
    rng = [random.Random('x') for _ in 'ab']
    blob = artifacts()['int6']
    for _ in range(20):
        assert damaged(rng[0], blob) == damaged(rng[1], blob)
        assert with_checksum(rng[0], blob) == with_checksum(rng[1], blob)


if __name__ == '__main__':
    sys.path.insert(0, str(ROOT))
    print(json.dumps(main(int(sys.argv[1]))))
