"""Own documents become official shards, or nothing at all."""
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import zstandard
from conftest import ROOT, make_texts

from golf.build import (CANONICAL, CanonicalSplit, Record, build_dataset,
                        document_fingerprint, documents_sha256,
                        encode_records, first_documents, inspect_dataset,
                        inspect_text, read_fingerprints, start_worker,
                        trainer_parts)
from golf.data import (encode_documents, load_tokenizer, open_dataset,
                       read_shard, write_split)

TEXTS = make_texts(60, seed=7)
ODD = ['', ' ', '  two  blanks\n\nand lines ', 'ﬁne ①Ａ 日本 🙂\u200d', 'a\0b',
       '<s> </s> <0x41> ▁', 'caf\u00e9 cafe\u0301', '\ufeffmark', 'x' * 5000]


@pytest.fixture(scope='session')
def model(shards): return shards/'tiny_320_bpe.model'


def quiet(line): pass


def jsonl(path, texts):
    "Write documents in the official form."
    rows = [json.dumps({'text': t, 'id': i}) for i, t in enumerate(texts)]
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text('\n'.join(rows) + '\n')
    return path


def build(sources, out, **kw):
    "A build on one process that says nothing, unless told otherwise."
    return build_dataset(sources, out, **{'workers': 1, 'say': quiet, **kw})


def ids_of(folder, split):
    return np.concatenate([read_shard(p) for p in
                           sorted(folder.glob(f'fineweb_{split}_*.bin'))])


def refused(tmp_path, error, *args, **kw):
    "A build that must fail and leave nothing: its line of error."
    before = sorted(tmp_path.rglob('*'))
    with pytest.raises(error) as caught: build(*args, **kw)
    assert sorted(tmp_path.rglob('*')) == before, 'something was left'
    assert multiprocessing.active_children() == []
    return str(caught.value)


# ---------------------------------------------------------------- the ids

@pytest.mark.parametrize('workers,chunk_bytes', [(1, 1), (1, 10**9),
                                                 (2, 1), (2, 3000), (3, 500)])
def test_bit_for_bit(model, tmp_path, workers, chunk_bytes):
    texts = TEXTS + ODD + make_texts(40, seed=8)
    sp = load_tokenizer(model)
    plain = tmp_path/'plain'
    write_split(plain, 'val', encode_documents(sp, texts[:30]), 5000)
    write_split(plain, 'train', encode_documents(sp, texts[30:]), 5000)
    build(jsonl(tmp_path/'d.jsonl', texts), tmp_path/'own', tokenizer=model,
          val_documents=30, workers=workers, chunk_bytes=chunk_bytes,
          shard_tokens=5000)
    names = {p.name for p in plain.iterdir()}
    assert len(names) > 4
    assert names == {p.name for p in (tmp_path/'own').glob('*_0*.bin')}
    for name in names:
        assert ((plain/name).read_bytes()
                == (tmp_path/'own'/name).read_bytes()), name


def test_every_form_gives_the_same(model, tmp_path):
    plain = jsonl(tmp_path/'a'/'all.jsonl', TEXTS)
    raw = plain.read_bytes()
    cut = raw.index(b'\n', 9000) - 5      # frames may end within a line
    zst = tmp_path/'b'/'all.jsonl.zst'
    zst.parent.mkdir()
    zst.write_bytes(zstandard.compress(raw[:cut])
                    + zstandard.compress(raw[cut:]))
    long = tmp_path/'c'/'long.jsonl.zst'
    long.parent.mkdir()
    params = zstandard.ZstdCompressionParameters.from_level(1, window_log=27)
    packer = zstandard.ZstdCompressor(compression_params=params).compressobj()
    long.write_bytes(packer.compress(raw) + packer.flush())
    for i, text in enumerate(TEXTS):
        path = tmp_path/'d'/f'{i // 25}'/f'{i:03}.txt'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    halves = [jsonl(tmp_path/'e'/'2.jsonl', TEXTS[:23]),
              jsonl(tmp_path/'e'/'1.jsonl', TEXTS[23:])]
    forms = [plain, str(zst), long, tmp_path/'d', halves, [plain.parent]]
    sets = [build(form, tmp_path/f'out{i}', tokenizer=model,
                  val_documents=9) for i, form in enumerate(forms)]
    assert len({s['fingerprint'] for s in sets}) == 1
    assert len({s['shards'] for s in sets}) == 1
    swapped = build(halves[::-1], tmp_path/'swapped', tokenizer=model,
                    val_documents=9)
    assert swapped['fingerprint'] != sets[0]['fingerprint']


def test_validation_of_its_own_is_the_same(model, tmp_path):
    one = build(jsonl(tmp_path/'all.jsonl', TEXTS), tmp_path/'one',
                tokenizer=model, val_documents=9)
    two = build(jsonl(tmp_path/'t.jsonl', TEXTS[9:]), tmp_path/'two',
                tokenizer=model,
                val_sources=jsonl(tmp_path/'v.jsonl', TEXTS[:9]))
    assert one['fingerprint'] == two['fingerprint']
    cut = build(tmp_path/'t.jsonl', tmp_path/'cut', tokenizer=model,
                val_sources=tmp_path/'v.jsonl', val_documents=4)
    assert cut['val']['documents'] == 4


def test_the_set_opens_and_counts(model, tmp_path):
    texts = TEXTS + ['', 'again', 'Again ']
    own = build(jsonl(tmp_path/'d.jsonl', texts), tmp_path/'deep'/'own',
                tokenizer=model, val_documents=10, name='mine')
    data = open_dataset(tmp_path/'deep'/'own', vocab_size=320)
    assert data.name == 'mine' and data.fingerprint == own['fingerprint']
    assert data.train_tokens == own['train']['tokens']
    assert own['train']['documents'] == len(texts) - 10
    assert own['train']['empty'] == 1 and own['train']['repeated'] == 1
    assert own['train']['text_bytes'] == sum(
        len(t.encode()) for t in texts[10:])
    shard = next((tmp_path/'deep'/'own').glob('fineweb_train_*'))
    shard.write_bytes(shard.read_bytes()[:-2] + b'\5\0')
    with pytest.raises(ValueError, match='shards is'):
        open_dataset(tmp_path/'deep'/'own')


def test_workers_can_be_spawned(model):
    "Nothing in a job depends on what a forked process inherits."
    records = [Record('a.jsonl', 1, b'{"text": "a b"}')]
    context = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(1, context, start_worker) as pool:
        there = pool.submit(encode_records, str(model), records).result()
    here = encode_records(str(model), records)
    assert all(map(np.array_equal, there, here))


# ------------------------------------------------------------- duplicates

def test_copies_are_dropped_and_listed(model, tmp_path):
    val, train = TEXTS[:5], TEXTS[5:]
    copies = [val[2], val[4].upper().replace(' ', '\n '), val[2] + ' ']
    mixed = train[:3] + copies[:2] + train[3:] + copies[2:]
    path = jsonl(tmp_path/'t.jsonl', mixed)
    kw = dict(tokenizer=model, val_sources=jsonl(tmp_path/'v.jsonl', val))
    own = build(path, tmp_path/'own', chunk_bytes=2000, **kw)
    found = [(d['document'], d['val_document'], d['source'])
             for d in own['dropped']]
    assert found == [(3, 2, f'{path}:4'), (4, 4, f'{path}:5'),
                     (len(mixed) - 1, 2, f'{path}:{len(mixed)}')]
    assert own['dropped'][1]['text'] == copies[1][:80]
    sp = load_tokenizer(model)
    assert np.array_equal(ids_of(tmp_path/'own', 'train'),
                          encode_documents(sp, train))
    assert np.array_equal(ids_of(tmp_path/'own', 'val'),
                          encode_documents(sp, val))
    line = refused(tmp_path, ValueError, path, tmp_path/'no', strict=True,
                   workers=2, chunk_bytes=2000, **kw)
    assert f'{path}:4' in line and 'document 2' in line
    build(jsonl(tmp_path/'clean.jsonl', train), tmp_path/'strict',
          strict=True, **kw)


def test_train_must_not_end_up_empty(model, tmp_path):
    path = jsonl(tmp_path/'d.jsonl', TEXTS)
    same = jsonl(tmp_path/'same.jsonl', TEXTS[::-1])
    for kw in (dict(), dict(val_documents=60), dict(val_sources=same)):
        for tokenizer in (model, None):
            assert 'no documents' in refused(
                tmp_path, ValueError, path, tmp_path/'no',
                tokenizer=tokenizer, **kw)
    for n in (0, -1):
        assert 'at least one' in refused(
            tmp_path, ValueError, path, tmp_path/'no', tokenizer=model,
            val_documents=n)


def test_membership(model, tmp_path):
    build(jsonl(tmp_path/'d.jsonl', TEXTS), tmp_path/'own', tokenizer=model,
          val_documents=10)
    train = read_fingerprints(tmp_path/'own', 'train')
    assert train.tolist() == list(map(document_fingerprint, TEXTS[10:]))
    val = read_fingerprints(tmp_path/'own', 'val')
    assert document_fingerprint(TEXTS[3].swapcase()) in val
    assert document_fingerprint('something else') not in val


# -------------------------------------------------------------- bad input

BAD = {'not JSON': b'{"text": "a', 'not JSON ': b'',
       'not a JSON object': b'"text"', 'no string `text`': b'{"txt": "a"}',
       'no string `text` ': b'{"text": ["a"]}',
       'not UTF-8': b'{"text": "\xe9"}',
       'surrogate': b'{"text": "\\udc00"}'}


@pytest.mark.parametrize('what', BAD)
def test_a_bad_line_is_named(model, tmp_path, what):
    lines = jsonl(tmp_path/'d.jsonl', TEXTS).read_bytes().split(b'\n')
    (tmp_path/'d.jsonl').write_bytes(b'\n'.join(
        lines[:40] + [BAD[what]] + lines[40:]))
    for kw in (dict(tokenizer=model), dict(vocab_size=300)):
        line = refused(tmp_path, ValueError, tmp_path/'d.jsonl',
                       tmp_path/'no', val_documents=5, workers=2,
                       chunk_bytes=900, **kw)
        assert f"{tmp_path/'d.jsonl'}:41: {what.strip()}" in line or (
            'surrogate' in what and ':41:' in line), line


def test_a_bad_text_file_is_named(model, tmp_path):
    (tmp_path/'a.txt').write_bytes(b'latin \xe9')
    assert f"{tmp_path/'a.txt'}: not UTF-8" in refused(
        tmp_path, ValueError, tmp_path/'a.txt', tmp_path/'no',
        tokenizer=model)
    with open(tmp_path/'a.txt', 'wb') as f: f.truncate((1 << 23) + 1)
    assert 'more than' in refused(tmp_path, ValueError, tmp_path/'a.txt',
                                  tmp_path/'no', tokenizer=model)
    with open(tmp_path/'b.jsonl', 'wb') as f: f.truncate((1 << 23) + 1)
    assert 'b.jsonl:1: longer' in refused(
        tmp_path, ValueError, tmp_path/'b.jsonl', tmp_path/'no',
        tokenizer=model)


def test_a_damaged_archive_is_named(model, tmp_path):
    raw = jsonl(tmp_path/'d.jsonl', TEXTS).read_bytes()
    path, packed = tmp_path/'d.jsonl.zst', zstandard.compress(raw)
    params = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)
    wide = zstandard.ZstdCompressor(compression_params=params).compressobj()
    for bad, what in ((packed[:-1], 'ends within'), (raw, 'not zstd'),
                      (packed[:2000] + b'damage' + packed[2006:], 'damaged'),
                      (packed + packed[:50], 'ends within'),
                      (wide.compress(raw) + wide.flush(), 'memory')):
        path.write_bytes(bad)
        line = refused(tmp_path, ValueError, path, tmp_path/'no',
                       tokenizer=model, val_documents=5)
        assert str(path) in line and what in line


def test_bad_sources_tokenizers_and_folders(model, tmp_path):
    path = jsonl(tmp_path/'d.jsonl', TEXTS)
    (tmp_path/'empty').mkdir()
    (tmp_path/'d.csv').write_text('text')
    (tmp_path/'bad.model').write_bytes(b'no model')
    (tmp_path/'full').mkdir()
    (tmp_path/'full'/'a').write_text('something')
    for error, sources, out, kw, what in (
            (FileNotFoundError, 'nowhere', 'no', {}, 'nowhere: no such'),
            (ValueError, 'd.csv', 'no', {}, 'd.csv: not one of'),
            (ValueError, 'empty', 'no', {}, 'empty: no file of'),
            (ValueError, 'd.jsonl', 'no', {'val_sources': path}, 'twice'),
            (ValueError, 'd.jsonl', 'no', {'tokenizer': tmp_path/'bad.model'},
             'bad.model: not a SentencePiece'),
            (FileExistsError, 'd.jsonl', 'full', {}, 'full: already there'),
            (FileExistsError, 'd.jsonl', 'd.csv', {}, 'csv: already there'),
            (ValueError, 'd.jsonl', 'no', {'vocab_size': 100_000,
             'tokenizer': None}, '100000')):
        assert what in refused(
            tmp_path, error, tmp_path/sources, tmp_path/out,
            **{'tokenizer': model, 'val_documents': 5, **kw})
    build(path, tmp_path/'empty', tokenizer=model, val_documents=5)
    assert open_dataset(tmp_path/'empty').name == 'empty'


# ----------------------------------------------------------- interruption

def test_ctrl_c_in_the_middle(model, tmp_path):
    def interrupt(line): raise KeyboardInterrupt
    for workers in (1, 2):
        refused(tmp_path, KeyboardInterrupt,
                jsonl(tmp_path/'d.jsonl', TEXTS), tmp_path/'no',
                tokenizer=model, val_documents=5, workers=workers,
                chunk_bytes=900, say=interrupt)


def test_a_killed_worker_is_an_error(model, tmp_path):
    def kill(line):
        for child in multiprocessing.active_children(): child.kill()
    assert 'worker' in refused(
        tmp_path, RuntimeError, jsonl(tmp_path/'d.jsonl', TEXTS * 20),
        tmp_path/'no', tokenizer=model, val_documents=5, workers=2,
        chunk_bytes=900, say=kill)


def processes(group):
    "The processes of a group that are alive."
    found = []
    for pid in filter(str.isdigit, os.listdir('/proc')):
        try: line = open(f'/proc/{pid}/stat').read().rpartition(')')[2]
        except OSError: continue
        if int(line.split()[2]) == group and line.split()[0] != 'Z':
            found.append(int(pid))
    return found


def start_build(path, out, model):
    "A build in a process group of its own, which it leads."
    code = ('import sys; from golf.build import build_dataset\n'
            'build_dataset(*sys.argv[1:4], workers=2, val_documents=40,'
            ' say=lambda s: print(s, flush=True))')
    return subprocess.Popen(
        [sys.executable, '-c', code, path, out/'own', model], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
        # a background job of a shell starts with SIGINT ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


@pytest.mark.skipif(not os.path.isdir('/proc/self'), reason='reads /proc')
def test_real_signals(model, tmp_path):
    "Ctrl-C reaches the whole group; SIGKILL hits the parent alone."
    path = jsonl(tmp_path/'d.jsonl', TEXTS * 2000)
    outs = [tmp_path/'interrupted', tmp_path/'killed']
    for out in outs: out.mkdir()
    runs = [start_build(path, out, model) for out in outs]
    for run in runs:
        assert run.stdout.readline().startswith('val: 40 documents')
        assert len(processes(run.pid)) == 3
    os.killpg(runs[0].pid, signal.SIGINT)
    runs[1].kill()
    said = [run.communicate()[1] for run in runs]
    until = time.monotonic() + 10
    for run in runs:
        while processes(run.pid) and time.monotonic() < until:
            time.sleep(.05)
        assert processes(run.pid) == [], 'workers outlived the build'
        assert run.returncode != 0
    assert said[0].count('Traceback') == 1, said[0]
    assert 'KeyboardInterrupt' in said[0]
    assert list(outs[0].iterdir()) == []


# -------------------------------------------------- a tokenizer on the spot

def test_a_trained_tokenizer_never_sees_validation(tmp_path):
    "Signs of validation alone are no pieces, though train has copies."
    val = [t.replace('a', 'Ж') for t in TEXTS[:20]]
    train = TEXTS[20:] + [t.upper() + '\n' for t in val] * 2
    kw = dict(vocab_size=300, val_sources=jsonl(tmp_path/'v.jsonl', val))
    own = build(jsonl(tmp_path/'t.jsonl', train), tmp_path/'own', **kw)
    assert len(own['dropped']) == 40 and own['vocab_size'] == 300
    sp = load_tokenizer(tmp_path/'own'/'bpe_300.model')
    assert 'Ж' not in ''.join(map(sp.id_to_piece, range(300)))
    again = build(tmp_path/'t.jsonl', tmp_path/'again', workers=2,
                  chunk_bytes=900, **kw)
    assert own['fingerprint'] == again['fingerprint']
    alone = build(jsonl(tmp_path/'alone.jsonl', TEXTS[20:]),
                  tmp_path/'alone', **kw)
    assert alone['tokenizer_sha256'] == own['tokenizer_sha256']
    jsonl(tmp_path/'seen.jsonl', val + TEXTS[20:])
    seen = build(tmp_path/'seen.jsonl', tmp_path/'seen', vocab_size=300,
                 val_sources=jsonl(tmp_path/'w.jsonl', TEXTS[:20]))
    assert seen['tokenizer_sha256'] != own['tokenizer_sha256']


def test_long_documents_train_a_tokenizer_too(tmp_path):
    "Each document is over the 4,192 bytes at which the trainer skips."
    books = ['\n'.join(make_texts(12, seed)) for seed in range(6)]
    assert min(len(b) for b in books) > 4192
    assert max(len(p.encode()) for p in trainer_parts(books[0])) <= 4000
    own = build(jsonl(tmp_path/'d.jsonl', books), tmp_path/'own',
                vocab_size=320, val_documents=1)
    assert own['train']['documents'] == 5


# ---------------------------------------------------------------- inspect

@pytest.fixture
def whole(model, tmp_path):
    "A set, and a canonical split that its validation is."
    build(jsonl(tmp_path/'d.jsonl', TEXTS), tmp_path/'own', tokenizer=model,
          val_documents=30)
    sp = load_tokenizer(model)
    texts = [sp.decode(ids) for ids in sp.encode(TEXTS[:30])]
    n = len(ids_of(tmp_path/'own', 'val'))
    heads = tuple((k, documents_sha256(texts[:k])) for k in (1, 5, 29))
    return CanonicalSplit(30, heads, ((320, (n - 1) // 2048 * 2048),))


def test_verdicts(whole, model, tmp_path):
    def verdict(texts, name, **kw):
        val = jsonl(tmp_path/f'{name}.jsonl', texts)
        build(jsonl(tmp_path/'t.jsonl', TEXTS[40:]), tmp_path/name,
              val_sources=val, **{'tokenizer': model, **kw})
        facts = inspect_dataset(tmp_path/name, canonical=whole)
        assert facts['verdict'] in inspect_text(facts)
        return facts['canonical'], facts['verdict']
    facts = inspect_dataset(tmp_path/'own', canonical=whole)
    assert facts['canonical'] == 'canonical'
    assert f'{whole.targets[0][1]:,} targets' in facts['verdict']
    word, line = verdict(TEXTS[:20], 'prefix')
    assert word == 'prefix' and '20 of 30' in line and 'first 5' in line
    assert verdict(TEXTS[:31], 'longer')[0] == 'other'
    assert verdict(TEXTS[:31], 'unknown', tokenizer=None,
                   vocab_size=300)[0] == 'other'
    assert verdict(TEXTS[1:30], 'shifted')[0] == 'other'
    assert verdict(TEXTS[:7] + TEXTS[8:31], 'gap')[0] == 'other'
    assert verdict(TEXTS[:29] + ['b ' * 9000], 'end')[0] == 'other'
    assert verdict(TEXTS[:30], 'retold', tokenizer=None,
                   vocab_size=300)[0] == 'documents'


def test_inspect_counts(whole, model, tmp_path):
    facts = inspect_dataset(tmp_path/'own', count=2)
    assert facts['canonical'] == 'other'    # of the true canonical split
    sp = load_tokenizer(model)
    for split, texts in ('val', TEXTS[:30]), ('train', TEXTS[30:]):
        ids, part = ids_of(tmp_path/'own', split), facts[split]
        assert part['documents'] == len(texts)
        assert part['tokens'] == len(ids)
        size = sum(len(t.encode()) for t in texts)   # all plain ASCII
        assert part['charged_bytes_per_token'] == size / (len(ids) - 1)
        assert part['raw_bytes_per_token'] == size / len(ids)
        assert part['heads'] == [sp.decode(sp.encode(t)) for t in texts[:2]]


def test_inspect_of_plain_shards(shards, tmp_path):
    facts = inspect_dataset(shards)
    assert facts['val']['documents'] == 30 and facts['dropped'] is None
    assert facts['train']['shards'] > 1
    assert facts['train']['raw_bytes_per_token'] is None
    assert 'not the canonical split' in inspect_text(facts)
    texts = first_documents(load_tokenizer(shards/'tiny_320_bpe.model'),
                            sorted(shards.glob('fineweb_train_*')), 10**9)
    assert len(texts) == 270


def test_inspect_refuses_what_does_not_fit(whole, tmp_path):
    path = tmp_path/'own'/'manifest.json'
    manifest = json.loads(path.read_text())
    manifest['val']['documents'] += 1
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match='30 documents'):
        inspect_dataset(tmp_path/'own')
    manifest['val']['documents'] -= 1
    path.write_text(json.dumps(manifest))
    (tmp_path/'own'/'fingerprints_val.bin').write_bytes(b'\0' * 240)
    with pytest.raises(ValueError, match='fingerprints_val.bin'):
        inspect_dataset(tmp_path/'own')


def test_what_is_known_of_the_canonical_split():
    "Targets fill rows; the hashes are of rising numbers of documents."
    assert CANONICAL.documents == 50_000
    for _, targets in CANONICAL.targets: assert targets % 2048 == 0
    counts = [n for n, _ in CANONICAL.heads]
    assert counts == sorted(counts)
    assert len({sha for _, sha in CANONICAL.heads}) == len(counts)
