"""Every way of damaging a small artifact: refused, or read exactly as declared."""
import ast
import copy
import hashlib
import os
import random
from pathlib import Path

import pytest
import torch

import golf.artifact
from golf.artifact import (CHECKSUM_BYTES, PREFIX, VERSION, ArtifactError, OverLimit, byte_budget, check_limit, open_artifact,
                           pack_artifact, read_artifact, read_streams, same_tensor, seal, unpack_artifact, write_artifact)
from golf.grid import FORMATS, format_bits, qmax
from golf.quantize import QuantTensor, dequantize_state, quantize_state


def small_tensors():
    """One tensor of each format over three roles, with the values that are easiest to get wrong."""
    torch.manual_seed(0)
    out = {}
    for i, fmt in enumerate(f for f in FORMATS if format_bits(f)):
        top = qmax(format_bits(fmt))
        name = f"blocks.{i}.attn.q.weight" if i % 2 else f"blocks.{i}.mlp.up.weight"
        codes = torch.tensor([[top, -top - 1, 0], [1, -1, 0]], dtype=torch.int8)
        scale = torch.tensor([65504.0, [0.0, 2.0**-24][i % 2]], dtype=torch.float16)
        out[name] = QuantTensor(name, fmt, (2, 3), codes, scale)
    out["skips"] = QuantTensor("skips", "fp16", (1, 2, 2), values=torch.tensor([[[-0.0, 2.0**-24], [65504, 1 / 3]]]).half())
    out["gain"] = QuantTensor("gain", "float32", (3,), values=torch.tensor([-0.0, 1e-45, 3.4e38]))
    out["one"] = QuantTensor("one", "float32", (), values=torch.tensor(1.5))
    return out


@pytest.fixture(scope="module")
def blob():
    return pack_artifact(small_tensors(), {"config": "small", "seed": 1})


def resealed(blob, body):
    """The prefix of `blob` over another body, with a right checksum."""
    data = blob[:PREFIX.size] + body
    return data + hashlib.blake2b(data, digest_size=CHECKSUM_BYTES).digest()


def read_or_refused(blob):
    """None if refused in one line; else the tensors, which must be exactly what the file declares."""
    try:
        tensors, meta = unpack_artifact(blob)
    except ArtifactError as error:
        assert 0 < len(str(error)) < 600 and "\n" not in str(error)
        return None
    header, _ = open_artifact(blob)
    declared = {name: (fmt, tuple(shape)) for s in header["streams"] for name, fmt, shape in s["tensors"]}
    assert {name: (t.format, t.shape) for name, t in tensors.items()} == declared
    for name, w in dequantize_state(tensors).items():
        assert tuple(w.shape) == declared[name][1] and w.dtype == torch.float32 and bool(w.isfinite().all())
    assert meta == header["meta"]
    return tensors


def test_round_trip_bit_for_bit(blob):
    tensors = small_tensors()
    back, meta = unpack_artifact(blob)
    assert set(back) == set(tensors) and meta == {"config": "small", "seed": 1}
    assert all(same_tensor(back[name], tensors[name]) for name in tensors)
    assert pack_artifact(back, meta) == blob


def test_round_trip_of_random_models():
    gen = torch.Generator().manual_seed(os.getpid())
    for fmt in FORMATS:
        shapes = [(1, 1), (3, 7), (64, 33)]
        state = {f"blocks.{i}.attn.k.weight": torch.randn(s, generator=gen) for i, s in enumerate(shapes)}
        tensors = quantize_state(state, [("*", fmt)])
        back, _ = unpack_artifact(pack_artifact(tensors, {}))
        assert all(same_tensor(back[name], tensors[name]) for name in tensors)


def test_bytes_do_not_depend_on_threads(blob, monkeypatch):
    monkeypatch.setattr("golf.artifact.available_cores", lambda: 1)
    assert pack_artifact(small_tensors(), {"seed": 1, "config": "small"}) == blob


def test_cut_at_every_length(blob):
    assert len(blob) < 2000
    for n in range(len(blob)):
        with pytest.raises(ArtifactError):
            unpack_artifact(blob[:n])


def test_every_bit_flipped(blob):
    data = bytearray(blob)
    for bit in range(8 * len(blob)):
        data[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ArtifactError):
            unpack_artifact(bytes(data))
        data[bit // 8] ^= 1 << bit % 8
    assert bytes(data) == blob


def test_every_bit_flipped_and_the_checksum_made_good(blob):
    body = bytearray(blob[PREFIX.size:-CHECKSUM_BYTES])
    refused = 0
    for bit in range(8 * len(body)):
        body[bit // 8] ^= 1 << bit % 8
        refused += read_or_refused(resealed(blob, bytes(body))) is None
        body[bit // 8] ^= 1 << bit % 8
    assert refused > 0


def test_bytes_added_or_replaced(blob):
    rng = random.Random(3)
    body = blob[PREFIX.size:-CHECKSUM_BYTES]
    for wrong in (blob + b"x", b"x" + blob, resealed(blob, body + b"x"), rng.randbytes(500), b"GOLF" + rng.randbytes(500)):
        with pytest.raises(ArtifactError):
            unpack_artifact(wrong)
    for _ in range(300):
        at, n = rng.randrange(len(body)), rng.randrange(1, 20)
        read_or_refused(resealed(blob, (body[:at] + rng.randbytes(n) + body[at + n:])[:len(body)]))


def places(value, path=()):
    """Paths of all values nested in a JSON value, itself included."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield from places(child, (*path, key))


JUNK = [None, True, -1, 0, 1, 7, 2**31, 2**70, 1.5, "", "int3", "fp16", "a\nb", "\ud800", "../x", [], [1], [[2, 3]], {}, {"a": 1}]


def test_every_field_of_the_header_replaced(blob):
    header, body = open_artifact(blob)
    frames = [frame for _, _, frame in read_streams(header, body)]
    refused = total = 0
    for path in places(header["streams"]):
        for junk in JUNK + ["delete"]:
            changed = copy.deepcopy(header)
            at, key = changed, "streams"
            for step in path:
                at, key = at[key], step
            if junk == "delete":
                del at[key]
            else:
                at[key] = junk
            total += 1
            refused += read_or_refused(seal(changed, frames)) is None
    assert refused > 0.9 * total


@pytest.mark.parametrize("text", ['{"meta":{},"streams":[]', "[]", "null", '{"meta":{}}', '{"meta":{},"streams":[],"x":1}', '{"meta":[],"streams":[]}',
                                  '{"meta":{},"streams":{}}', '{"meta":{"a":NaN},"streams":[]}', "[" * 100_000, '{"meta":{},"streams":[' + "9" * 5000 + "]}"])
def test_header_texts(text):
    packed = golf.artifact.zstd_pack(text.encode())
    total = PREFIX.size + len(packed) + CHECKSUM_BYTES
    with pytest.raises(ArtifactError):
        unpack_artifact(resealed(PREFIX.pack(b"GOLF", VERSION, total, len(packed)), packed))


def test_no_bombs(blob):
    """Small files that would unpack to much more than they may."""
    bomb = golf.artifact.zstd_pack(bytes(2**26))
    assert len(bomb) < 10_000
    bomb = bytes(4) + bomb  # no codes before it
    stream = {"role": "control", "raw": 10, "packed": len(bomb), "tensors": [["skips", "fp16", [1, 5]]]}
    with pytest.raises(ArtifactError, match="67,108,864 bytes where 10"):
        unpack_artifact(seal({"meta": {}, "streams": [stream]}, [bomb]))
    huge = {**stream, "raw": 2**38, "tensors": [["skips", "fp16", [2**20, 2**17]]]}
    with pytest.raises(ArtifactError, match="exceed"):
        unpack_artifact(seal({"meta": {}, "streams": [huge]}, [bomb]))
    head = golf.artifact.zstd_pack(b" " * 2**26)
    with pytest.raises(ArtifactError, match="header is too large"):
        unpack_artifact(resealed(PREFIX.pack(b"GOLF", VERSION, PREFIX.size + len(head) + CHECKSUM_BYTES, len(head)), head))


def test_what_cannot_be_read_is_not_written():
    good = small_tensors()["blocks.2.mlp.up.weight"]
    wide = torch.full((2, 3), qmax(format_bits(good.format)) + 1, dtype=torch.int8)
    for bad in [QuantTensor(good.name, good.format, (2, 3), wide, good.scale), QuantTensor(good.name, good.format, (3, 2), good.codes, good.scale),
                QuantTensor(good.name, good.format, (2, 3), good.codes, -good.scale - 1), QuantTensor(good.name, "fp16", (2, 3), good.codes, good.scale),
                QuantTensor("gain", "fp16", (1,), values=torch.tensor([float("nan")]).half())]:
        with pytest.raises(ArtifactError, match=bad.name):
            pack_artifact({bad.name: bad}, {})
    with pytest.raises(ValueError):
        pack_artifact(small_tensors(), {"loss": float("nan")})


def test_a_failed_write_leaves_the_old_file(blob, tmp_path, monkeypatch):
    path = tmp_path / "model.golf"
    write_artifact(path, blob)
    def fail(*_):
        raise OSError("disk full")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_artifact(path, b"new")
    assert path.read_bytes() == blob and list(tmp_path.iterdir()) == [path]


def test_errors_of_files_begin_with_the_path(blob, tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.golf"):
        read_artifact(tmp_path / "absent.golf")
    path = tmp_path / "model.golf"
    path.write_bytes(blob[:-1])
    with pytest.raises(ArtifactError) as error:
        read_artifact(path)
    assert str(error.value).startswith(f"{path}: ")


def test_budget_and_limit(blob, tmp_path):
    write_artifact(tmp_path / "model.golf", blob)
    budget = byte_budget(blob)
    assert byte_budget(tmp_path / "model.golf") == budget and sum(budget.values()) == len(blob)
    assert set(budget) == {"header", "control", "attention.q", "mlp.up"}
    check_limit(len(blob), 10, len(blob) + 10, budget)
    with pytest.raises(OverLimit) as error:
        check_limit(len(blob), 10, len(blob) + 9, budget)
    for word in (*budget, "code", "over"):
        assert word in str(error.value)


def test_nothing_that_executes_is_imported():
    tree = ast.parse(Path(golf.artifact.__file__).read_text())
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not modules & {"pickle", "marshal", "shelve", "dill", "joblib"}
    called = {node.func.attr for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)}
    called |= {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not called & {"eval", "exec", "load", "__import__"}
