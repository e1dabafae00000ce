"""Bad input: one clear line, exit code 1, nothing half-written left."""
import shutil

import numpy as np
import pytest
from conftest import ROOT, TINY, golf


@pytest.fixture
def copy(shards, tmp_path):
    "A copy of the shards to damage."
    return shutil.copytree(shards, tmp_path/'data')


def refused(tmp_path, *args, **kw):
    "Run a command that must fail; its one line of error."
    def there(): return sorted([*tmp_path.rglob('*'), *ROOT.glob('*')])
    before = there()
    done = golf(*args, check=False, **kw)
    assert done.returncode == 1, (done.stdout, done.stderr)
    said = done.stderr.strip().splitlines()
    assert len(said) == 1 and said[0].startswith('golf: '), done.stderr
    assert there() == before, 'something was left behind'
    return said[0]


def train(tmp_path, data, overrides=TINY, config='smoke'):
    return refused(tmp_path, 'train', config, '--data', data,
                   '--overrides', overrides, '--out', tmp_path/'run')


def first(folder, split='train'):
    return sorted(folder.glob(f'fineweb_{split}_*.bin'))[0]


def test_missing_shards(copy, tmp_path):
    for path in copy.glob('fineweb_val_*'): path.unlink()
    assert 'val shards' in train(tmp_path, copy)
    assert 'no such folder' in train(tmp_path, tmp_path/'nowhere')


def test_truncated_shard(copy, tmp_path):
    path = first(copy)
    path.write_bytes(path.read_bytes()[:-100])
    said = train(tmp_path, copy)
    assert path.name in said and 'bytes' in said


def test_shard_too_short_for_its_header(copy, tmp_path):
    first(copy).write_bytes(b'\0' * 100)
    assert first(copy).name in train(tmp_path, copy)


def damage(path, index, value):
    "Set one int32 of a shard's header."
    raw = bytearray(path.read_bytes())
    raw[4*index:4*index + 4] = np.int32(value).tobytes()
    path.write_bytes(raw)


@pytest.mark.parametrize('index, value, word', [
    (0, 20240521, 'magic'), (1, 9, 'version'), (2, 3, 'tokens')])
def test_wrong_header(copy, tmp_path, index, value, word):
    damage(first(copy, 'val'), index, value)
    said = train(tmp_path, copy)
    assert word in said and first(copy, 'val').name in said


def test_ids_beyond_the_vocabulary(copy, tmp_path):
    path = first(copy)
    raw = bytearray(path.read_bytes())
    raw[1024 + 2*3000:1024 + 2*3001] = np.uint16(65_000).tobytes()
    path.write_bytes(raw)
    said = train(tmp_path, copy)
    assert '65000' in said and path.name in said and '320' in said


def test_a_tokenizer_that_is_not_the_datas(copy, tmp_path):
    from conftest import make_texts
    from golf.data import train_tokenizer
    other = tmp_path/'other.model'
    train_tokenizer(make_texts(300, 5), other, 320)
    over = TINY.replace('data: {', f'data: {{tokenizer: {other}, ')
    said = train(tmp_path, copy, over)
    assert "the tokenizer is not the data's" in said, said


@pytest.mark.parametrize('change, words', [
    ('optim: {matrix_rl: 0.1}', ['optim.matrix_rl', 'matrix_lr']),
    ('model: {heads: 7}', ['model.heads: 7', 'model.dim = 128']),
    ('model: {vocab_size: 512}', ['model.vocab_size is 512']),
    ('train: {batch_tokens: 1000}', ['train.batch_tokens: 1000']),
    ('train: {seconds: 5, steps: 7}', ['exactly one budget']),
    ('quant: {formats: [["block.*", int6]]}', ['block.*', 'no parameter']),
    ('quant: {formats: [["*.weight", int3]]}', ['int3']),
    ('score: {stride: 999}', ['score.stride: 999']),
    ('score: {seq_len: 100000}', ['too short']),
    ('train: {steps: [1', ['overrides', 'not YAML'])])
def test_impossible_config(shards, tmp_path, change, words):
    text = change if '[1' in change else '{' + change + '}'
    said = train(tmp_path, shards, text)
    assert all(w in said for w in words), said


def test_an_average_of_nothing(shards, tmp_path):
    "One line again; but the steps were taken, and their weights are kept."
    over = TINY[:-1] + ', average: {method: swa, every: 999}}'
    done = golf('train', 'smoke', '--data', shards, '--overrides', over,
                '--out', tmp_path/'run', check=False)
    assert done.returncode == 1 and 'no snapshot' in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    kept = tmp_path/'run.failed/checkpoint'
    assert (kept/'model.pt').is_file() and not (tmp_path/'run').exists()


def test_unknown_config(tmp_path):
    said = refused(tmp_path, 'describe', 'pr138')
    assert 'pr138' in said and 'did you mean pr137' in said


def test_cuda_asked_for_and_absent(shards, tmp_path):
    import torch
    if torch.cuda.is_available(): pytest.skip('there is a GPU')
    over = TINY.replace('train: {', 'train: {device: cuda, ')
    assert 'sees no GPU' in train(tmp_path, shards, over)


def test_a_folder_of_another_run(tiny_run, shards):
    text = (tiny_run/'params.yaml').read_text()
    said = refused(tiny_run.parent, 'train', 'smoke', '--data', shards,
                   '--overrides', TINY, '--seed', 8, '--out', tiny_run)
    assert 'seed' in said and str(tiny_run) in said
    assert (tiny_run/'params.yaml').read_text() == text


@pytest.mark.parametrize('how', ['cut', 'flip', 'other', 'missing'])
def test_damaged_artifact(tiny_run, shards, tmp_path, how):
    blob = bytearray((tiny_run/'model.golf').read_bytes())
    path = tmp_path/'model.golf'
    if how == 'cut': path.write_bytes(blob[:len(blob)//2])
    if how == 'flip': blob[len(blob)//3] ^= 4; path.write_bytes(blob)
    if how == 'other': path.write_bytes(b'PK' + bytes(blob))
    said = refused(tmp_path, 'score', '--artifact', path, '--data', shards)
    assert 'model.golf' in said


def test_a_text_of_another_tokenizer(tiny_run, tmp_path):
    said = refused(tmp_path, 'score', '--artifact', tiny_run/'model.golf',
                   '--data', 'embedded')
    assert 'tokenizer' in said and 'other text' in said


def test_scores_to_a_folder_that_is_not_there(tiny_run, shards, tmp_path):
    "Refused before the scoring, not after it."
    said = refused(tmp_path, 'score', '--artifact', tiny_run/'model.golf',
                   '--data', shards, '--json', tmp_path/'none/scores.json')
    assert 'no such folder' in said
