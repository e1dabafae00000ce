"""Official data through the real client, from a server that plays the hub.

The hub of these tests serves the API and the files as the real one does:
commits, a listing with digests, large files by a redirect to a storage
address, and ranges. It is told by path which faults to have.
"""
import ast
import errno
import hashlib
import json
import re
import shutil
import socket
import struct
import threading
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants

import golf.hub
from golf.data import (encode_documents, load_tokenizer, open_dataset,
                       read_shard, write_shard)
from golf.hub import VARIANTS, download_variant, part_path
from conftest import make_texts

REPO = VARIANTS['sp1024'].repo
SHARDS = 'datasets/datasets/fineweb10B_sp1024'
TOKENIZER = 'datasets/tokenizers/fineweb_1024_bpe.model'
BIG = f'{SHARDS}/fineweb_train_000000.bin'
SMALL = f'{SHARDS}/fineweb_train_000001.bin'
CUT = 1_100_000                         # bytes of BIG that pass


@lru_cache
def digests(raw):
    "What git and what LFS call a content."
    return (hashlib.sha1(b'blob %d\0' % len(raw) + raw).hexdigest(),
            hashlib.sha256(raw).hexdigest())


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True              # 40 ms an answer

    def log_message(self, *args): pass

    def answer(self, status, body=b'', **headers):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace('_', '-'), value)
        self.send_header('Content-Length', len(body))
        self.end_headers()
        self.wfile.write(body)

    def parts(self, pattern):
        "The groups of a route, if it is one of this hub's repository."
        found = re.fullmatch(pattern.replace('REPO', REPO),
                             unquote(self.path.split('?')[0]))
        return found and (found.groups() or True)

    def do_GET(self):
        hub = self.server
        if hub.refusal: return self.answer(*hub.refusal[0], **hub.refusal[1])
        if self.parts('/api/datasets/REPO(?:/revision/main)?'):
            return self.answer(200, json.dumps(
                {'id': REPO, 'sha': hub.commit}).encode())
        if at := self.parts('/datasets/REPO/resolve/([^/]+)/(.+)'):
            return self.resolve(*at)
        if at := self.parts('/storage/([^/]+)/(.+)'):
            return self.content(*at)
        self.answer(404, X_Error_Code='RepoNotFound')

    def do_POST(self):
        hub = self.server
        form = self.rfile.read(int(self.headers['Content-Length'])).decode()
        at = self.parts('/api/datasets/REPO/paths-info/([^/]+)')
        if not at or at[0] not in hub.history:
            return self.answer(404, X_Error_Code='RevisionNotFound')
        listed = [hub.entry(*at, path) for path in parse_qs(form)['paths']
                  if path in hub.history[at[0]]]
        self.answer(200, json.dumps(listed).encode())

    def resolve(self, commit, path):
        if path not in self.server.history.get(commit, {}):
            return self.answer(404, X_Error_Code='EntryNotFound')
        entry = self.server.entry(commit, path)
        if lfs := entry.get('lfs'):
            return self.answer(302, Location=f'/storage/{commit}/{path}',
                               X_Repo_Commit=commit,
                               X_Linked_Size=lfs['size'],
                               X_Linked_Etag=f'"{lfs["oid"]}"')
        self.content(commit, path, X_Repo_Commit=commit,
                     ETag=f'"{entry["oid"]}"')

    def content(self, commit, path, **headers):
        "The bytes of a file from the offset asked for, or a fault."
        hub = self.server
        body = hub.served.get(path, hub.history[commit][path])
        found = re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range') or '')
        asked = int(found[1]) if found else None
        fault, sent = (hub.faults.get(path) or [('none', None)]).pop(0)
        start, status = asked or 0, 206 if found else 200
        if fault == 'whole': start, status = 0, 200  # as if not asked
        if fault == 'down': body, start, status = b'', 0, 503
        self.send_response(status)
        if status == 206:
            headers['Content_Range'] = \
                f'bytes {start}-{len(body) - 1}/{len(body)}'
        for key, value in headers.items():
            self.send_header(key.replace('_', '-'), value)
        self.send_header('Content-Length', len(body) - start)
        body = body[start:][:sent]
        hub.seen.append((path, asked, len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = fault in ('cut', 'reset')
        if fault == 'reset':                    # no orderly end
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                       struct.pack('ii', 1, 0))
            self.connection.close()


class Hub(ThreadingHTTPServer):
    """Serves the commits in `history`; `served` replaces what is sent.

    `faults[path]` are (what, bytes sent) pairs, one used up a request.
    """
    daemon_threads = True

    def __init__(self, files):
        super().__init__(('127.0.0.1', 0), Handler)
        self.commit, self.history = 'a' * 40, {'a' * 40: dict(files)}
        self.served, self.faults, self.refusal, self.seen = {}, {}, None, []
        self.url = f'http://127.0.0.1:{self.server_port}'

    @property
    def files(self): return self.history[self.commit]

    def handle_error(self, *args): pass         # it has cut a connection

    def push(self, path, raw):
        "A new commit with another content of a file."
        files = {**self.files, path: raw}
        self.commit = hashlib.sha1(self.commit.encode()).hexdigest()
        self.history[self.commit] = files

    def entry(self, commit, path):
        raw = self.history[commit][path]
        blob, sha256 = digests(raw)
        lfs = {'oid': sha256, 'size': len(raw), 'pointerSize': 134}
        return {'type': 'file', 'path': path, 'oid': blob, 'size': len(raw),
                **({'lfs': lfs} if path.endswith('.bin') else {})}

    def sent(self, path=''):
        "Bytes of content sent for paths that start so."
        return sum(n for p, _, n in self.seen if p.startswith(path))

    def set_manifest(self, n_train):
        self.files['datasets/manifest.json'] = json.dumps({
            'version': '10B',
            'tokenizers': [{
                'name': 'sp_bpe_1024', 'vocab_size': 1024,
                'model_path': 'tokenizers/fineweb_1024_bpe.model',
                'vocab_path': 'tokenizers/fineweb_1024_bpe.vocab'}],
            'datasets': [{
                'name': 'fineweb10B_sp1024', 'tokenizer_name': 'sp_bpe_1024',
                'path': 'datasets/fineweb10B_sp1024',
                'stats': {'files_val': 1, 'files_train': n_train}}],
        }).encode()


@pytest.fixture(scope='module')
def files(shards, tmp_path_factory):
    "Remote files: a big train shard, two small ones, the rest."
    room = tmp_path_factory.mktemp('files')
    model = (shards/'tiny_320_bpe.model').read_bytes()
    sp = load_tokenizer(shards/'tiny_320_bpe.model')
    ids = encode_documents(sp, make_texts(300, 1))
    lots = np.tile(ids, 1_000_000 // len(ids))
    out = {TOKENIZER: model}
    for name, part in (('train_000000', lots), ('train_000001', ids),
                       ('train_000002', ids[:-9]), ('val_000000', ids[:9000])):
        write_shard(room/name, part)
        out[f'{SHARDS}/fineweb_{name}.bin'] = (room/name).read_bytes()
    return out


@pytest.fixture
def hub(files, monkeypatch):
    "The server, and a client that nothing around it disturbs."
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    huggingface_hub.close_session()
    server = Hub(files)
    server.set_manifest(3)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def get(hub, tmp_path):
    "Download so many train shards to `get.folder`; says to `get.lines`."
    def get(n, variant='sp1024', **kw):
        get.lines = []
        return download_variant(variant, n, tmp_path/'data', **{
            'endpoint': hub.url, 'say': get.lines.append, 'pause': 0, **kw})
    get.folder = tmp_path/'data/datasets/fineweb10B_sp1024'
    return get


def names(folder):
    return sorted(p.relative_to(folder).as_posix()
                  for p in folder.rglob('*') if p.is_file())


def refused(error, get, *args, **kw):
    "The one line of error of a download that must fail."
    with pytest.raises(error) as caught: get(*args, **kw)
    assert '\n' not in str(caught.value)
    return str(caught.value)


def parts(folder): return [p for p in folder.rglob('*.part')]


def test_a_data_set_arrives(hub, get, tmp_path, files):
    folder = get(2)
    assert folder == get.folder
    assert names(tmp_path/'data') == [
        'datasets/fineweb10B_sp1024/fineweb_train_000000.bin',
        'datasets/fineweb10B_sp1024/fineweb_train_000001.bin',
        'datasets/fineweb10B_sp1024/fineweb_val_000000.bin',
        'datasets/fineweb10B_sp1024/source.json',
        'tokenizers/fineweb_1024_bpe.model']
    for path in folder.glob('*.bin'):
        assert path.read_bytes() == files[f'{SHARDS}/{path.name}']
    data = open_dataset(folder)
    assert len(data.train) == 2 and data.vocab_size == 320
    source = json.loads((folder/'source.json').read_text())
    assert (source['repo'], source['commit']) == (REPO, hub.commit)
    sizes = {path: e['size'] for path, e in source['files'].items()}
    assert sum(sizes.values()) == hub.sent() - hub.sent(
        'datasets/manifest.json')
    big = source['files']['datasets/fineweb10B_sp1024/'
                          'fineweb_train_000000.bin']
    assert big['sha256'] == hashlib.sha256(files[BIG]).hexdigest()
    assert len(get.lines) == 1 + 4 + 1 and 'MB' in get.lines[0]
    assert all(line.lstrip()[0] in '1234' for line in get.lines[1:5])


def test_a_second_call_downloads_nothing(hub, get, monkeypatch):
    folder = get(2)
    before = {p: p.stat().st_mtime_ns for p in folder.glob('*.bin')}
    hub.seen.clear()
    with monkeypatch.context() as m:           # nor is anything hashed
        m.setattr('golf.hub.check_file', None)
        get(2)
    assert {path for path, *_ in hub.seen} == {'datasets/manifest.json'}
    assert before == {p: p.stat().st_mtime_ns for p in folder.glob('*.bin')}
    hub.seen.clear()
    get(3)
    assert hub.sent(f'{SHARDS}') == len(hub.files[SMALL]) - 18


def test_files_of_another_tool_are_checked_and_kept(hub, get):
    folder = get(2)
    (folder/'source.json').unlink()
    hub.seen.clear()
    get(2)
    assert hub.sent(SHARDS) == 0 and sum(
        line.endswith('checked') for line in get.lines) == 4


def requests(hub, path):
    "(first byte asked for, bytes sent) of each request."
    return [(asked, sent) for p, asked, sent in hub.seen if p == path]


def test_a_cut_connection_goes_on(hub, get, files):
    hub.faults[BIG] = [('cut', CUT), ('cut', 0), ('cut', 100)]
    folder, whole = get(1), len(files[BIG])
    assert (folder/'fineweb_train_000000.bin').read_bytes() == files[BIG]
    assert requests(hub, BIG) == [(0, CUT), (CUT, 0), (CUT, 100),
                                  (CUT + 100, whole - CUT - 100)]
    assert sum('going on from byte' in line for line in get.lines) == 3


def test_a_reset_connection_goes_on(hub, get, files):
    "What was under way is lost with it, what had arrived is not."
    hub.faults[BIG] = [('reset', CUT), ('reset', 100)]  # never the whole
    folder = get(1)
    assert (folder/'fineweb_train_000000.bin').read_bytes() == files[BIG]
    asked = [asked for asked, _ in requests(hub, BIG)]
    assert len(asked) == 3 and asked == sorted(asked)


def test_a_body_that_ends_early(hub, get, files):
    "As long as announced, shorter than listed."
    hub.served[BIG] = files[BIG][:CUT]
    said = refused(OSError, get, 1)
    assert f'{CUT} of {len(files[BIG])} bytes' in said
    hub.served.clear()
    hub.seen.clear()
    get(1)
    assert requests(hub, BIG) == [(CUT, len(files[BIG]) - CUT)]


def test_the_next_call_goes_on(hub, get, files):
    hub.faults[BIG] = [('cut', CUT)] + [('down', 0)] * 5
    assert '503' in refused(ConnectionError, get, 1)
    assert 'fineweb_train_000000.bin' not in names(get.folder)
    assert [p.stat().st_size for p in parts(get.folder)] == [CUT]
    hub.seen.clear()
    get(1)
    path = get.folder/'fineweb_train_000000.bin'
    assert path.read_bytes() == files[BIG] and parts(get.folder) == []
    assert requests(hub, BIG) == [(CUT, len(files[BIG]) - CUT)]


def test_a_server_without_ranges(hub, get, files):
    hub.faults[BIG] = [('cut', CUT), ('whole', None)]
    assert (get(1)/'fineweb_train_000000.bin').read_bytes() == files[BIG]


def test_a_beginning_that_is_too_long(hub, get, files):
    get.folder.mkdir(parents=True)
    digest = hashlib.sha256(files[SMALL]).hexdigest()
    for d, more in ((digest, b'more'), ('0' * 64, b'')):
        path = get.folder/'fineweb_train_000001.bin'
        part_path(path, d).write_bytes(files[SMALL] + more)
    get(2)
    assert parts(get.folder) == [] and path.read_bytes() == files[SMALL]


def test_a_wrong_hash(hub, get, files):
    raw = bytearray(files[SMALL])
    raw[5000] ^= 1
    hub.served[SMALL] = bytes(raw)
    said = refused(ValueError, get, 2, workers=1)
    assert 'fineweb_train_000001.bin' in said and 'hash' in said
    assert parts(get.folder) == []
    assert 'fineweb_train_000001.bin' not in names(get.folder)
    hub.served.clear()
    hub.seen.clear()
    assert read_shard(get(2)/'fineweb_train_000001.bin')[0] == 1
    assert hub.sent(BIG) == 0


def test_a_small_file_is_checked_by_its_blob(hub, get):
    hub.served[TOKENIZER] = hub.files[TOKENIZER][::-1]
    assert 'fineweb_1024_bpe.model: hash' in refused(ValueError, get, 1)
    hub.served['datasets/manifest.json'] = b'{"datasets": []}'.ljust(
        len(hub.files['datasets/manifest.json']))
    assert 'manifest.json arrived damaged' in refused(ValueError, get, 1)


def test_what_is_no_shard_is_refused(hub, get):
    hub.files[SMALL] = b'\0' * 5000
    said = refused(ValueError, get, 2)
    assert said.startswith(SMALL.removeprefix('datasets/') + ': magic number')
    assert 'fineweb_train_000001.bin' not in names(get.folder)


@pytest.mark.parametrize('damage', [
    lambda raw: raw[:-1], lambda raw: raw[:-1] + b'\7', lambda raw: b''])
def test_a_damaged_file_is_replaced(hub, get, files, damage):
    path = get(2)/'fineweb_train_000001.bin'
    path.write_bytes(damage(files[SMALL]))
    hub.seen.clear()
    get(2)
    assert path.read_bytes() == files[SMALL]
    assert hub.sent(SHARDS) == len(files[SMALL])
    assert any('fetched again' in line for line in get.lines)


def test_a_stale_manifest_is_not_read(hub, get, tmp_path):
    stale = tmp_path/'data/manifest.json'
    stale.parent.mkdir()
    stale.write_text('{"datasets": []}')
    hub.set_manifest(2)
    assert 'has 2' in refused(ValueError, get, 3)
    get(2)
    hub.set_manifest(3)
    get(3)
    assert stale.read_text() == '{"datasets": []}'
    assert names(get.folder)[2] == 'fineweb_train_000002.bin'


def test_more_shards_than_there_are(hub, get, tmp_path):
    assert 'has 3; ask for 1 to 3' in refused(ValueError, get, 4)
    refused(ValueError, get, 0)
    hub.set_manifest(5)
    said = refused(FileNotFoundError, get, 5)
    assert 'fineweb_train_000003.bin' in said
    assert not (tmp_path/'data').exists()


def test_a_new_commit_brings_what_changed(hub, get, files):
    path = get(2)/'fineweb_train_000001.bin'
    hub.push(SMALL, files[f'{SHARDS}/fineweb_train_000002.bin'])
    hub.seen.clear()
    get(2)
    assert path.read_bytes() == hub.files[SMALL]
    assert hub.sent(SHARDS) == len(hub.files[SMALL])
    source = json.loads((get.folder/'source.json').read_text())
    assert source['commit'] == hub.commit


def test_a_push_in_the_middle_changes_nothing(hub, get, files, monkeypatch):
    listing = golf.hub.HubClient.listing

    def slow(*args):
        try: return listing(*args)
        finally: hub.push(SMALL, b'something else')
    monkeypatch.setattr(golf.hub.HubClient, 'listing', slow)
    path = get(2)/'fineweb_train_000001.bin'
    assert path.read_bytes() == files[SMALL]


def test_other_shards_in_the_folder(hub, get):
    folder = get(1)
    shutil.copy(folder/'fineweb_val_000000.bin',
                folder/'fineweb_val_000001.bin')
    assert 'fineweb_val_000001.bin' in refused(ValueError, get, 1)
    (folder/'fineweb_val_000001.bin').unlink()
    (folder/'manifest.json').write_text('{}')
    assert 'built here' in refused(ValueError, get, 1)


def test_a_disk_that_is_too_small(hub, get, monkeypatch):
    usage = shutil.disk_usage('/')._replace(free=1000)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage)
    said = refused(OSError, get, 1)
    assert '2.2 MB to download' in said and '1.0 kB free' in said
    assert names(get.folder) == [] and hub.sent(SHARDS) == 0


def test_a_disk_that_fills(hub, get, files, monkeypatch):
    write, room = golf.hub.PartFile.write, [CUT]

    def limited(self, chunk):
        written = write(self, chunk[:room[0]])
        room[0] -= written
        if written < len(chunk):
            raise OSError(errno.ENOSPC, 'No space left on device')
        return written
    monkeypatch.setattr(golf.hub.PartFile, 'write', limited)
    said = refused(OSError, get, 1, workers=1)
    assert 'disk is full' in said and 'fineweb_train_000000.bin' in said
    held = sum(p.stat().st_size for p in parts(get.folder))
    assert 0 < held < len(files[BIG])
    assert 'fineweb_train_000000.bin' not in names(get.folder)
    room[0] = 1 << 40
    hub.seen.clear()
    get(1)
    assert hub.sent(BIG) == len(files[BIG]) - held


def test_an_interrupt_goes_on(get, files):
    said = []

    def say(line):
        said.append(line)
        if line.startswith('  1/'): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): get(3, say=say)
    assert 'same command' in said[-1]
    source = json.loads((get.folder/'source.json').read_text())
    assert len(source['files']) == 1
    assert open_dataset(get(3)).train_tokens == sum(
        len(files[f'{SHARDS}/fineweb_train_{i:06d}.bin']) // 2 - 512
        for i in range(3))


def closed_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def test_nobody_answers(get, tmp_path, monkeypatch):
    url = f'http://127.0.0.1:{closed_port()}'
    said = refused(ConnectionError, get, 1, endpoint=url)
    for part in (REPO, url, 'network', 'HF_ENDPOINT', 'embedded',
                 'golf data build'): assert part in said
    refused(OSError, get, 1, endpoint='huggingface.invalid')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert 'HF_HUB_OFFLINE' in refused(OSError, get, 1)
    assert not (tmp_path/'data').exists()


@pytest.mark.parametrize('status, headers, words', [
    (404, {'X_Error_Code': 'RepoNotFound'}, 'not there'),
    (401, {}, 'hf auth login'),
    (403, {'X_Error_Code': 'GatedRepo'}, 'ask for access'),
    (500, {}, '500'),
    (200, {'Content_Type': 'text/html'}, 'login page')])
def test_a_hub_that_refuses(hub, get, tmp_path, status, headers, words):
    hub.refusal = (status, b'<html>no</html>'), headers
    said = refused(OSError, get, 1)
    assert words in said and REPO in said and hub.url in said
    assert not (tmp_path/'data').exists()


def test_a_missing_repository(hub, get):
    assert VARIANTS['sp8192'].repo in refused(OSError, get, 1, 'sp8192')


def test_the_import_is_cheap():
    body = ast.parse(Path(golf.hub.__file__).read_text()).body
    found = {alias.name for node in body if isinstance(node, ast.Import)
             for alias in node.names} | {
                 node.module for node in body
                 if isinstance(node, ast.ImportFrom)}
    assert 'golf.data' in found or 'data' in found
    assert not any(name.startswith('huggingface') for name in found)
