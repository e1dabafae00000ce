"""Small real data and small real runs for the tests."""
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from golf.data import (encode_documents, load_tokenizer, train_tokenizer,
                       write_split)

ROOT = Path(__file__).resolve().parent.parent

# #137's network, shrunk until a step takes milliseconds
TINY = '''{model: {layers: 3, dim: 32, heads: 2, kv_heads: 1,
  mlp_hidden: 64, vocab_size: 320}, data: {heldout_tokens: 4096, spans: 4},
  train: {steps: 20, batch_tokens: 1024, micro_tokens: 512, seq_len: 64,
    precision: fp32, compile: off, log_every: 1, heldout_every: 10,
    threads: 1, warmup_steps: 2},
  score: {seq_len: 64, stride: 16, batch: 16, threads: 1}}'''


def make_texts(n, seed):
    "Documents of a made-up language: words by rank, short sentences."
    rng = random.Random(seed)
    words = [''.join(rng.choices('abcdefghiklmnoprstu', k=rng.randint(2, 8)))
             for _ in range(400)]
    weights = [1/(i + 1) for i in range(400)]
    return ['. '.join(' '.join(rng.choices(words, weights, k=12)).capitalize()
                      for _ in range(10)) for _ in range(n)]


@pytest.fixture(scope='session')
def shards(tmp_path_factory):
    "A folder of official shards with their tokenizer, 320 pieces."
    folder = tmp_path_factory.mktemp('shards')
    texts = make_texts(300, 0)
    train_tokenizer(texts, folder/'tiny_320_bpe.model', 320)
    sp = load_tokenizer(folder/'tiny_320_bpe.model')
    write_split(folder, 'val', encode_documents(sp, texts[:30]))
    write_split(folder, 'train', encode_documents(sp, texts[30:]),
                max_tokens=20_000)
    return folder


def golf(*args, nproc=1, check=True, **kw):
    "Run the command line, as a user or torchrun would."
    head = [sys.executable, '-m']
    if nproc > 1:
        head += ['torch.distributed.run', '--standalone',
                 '--nproc-per-node', str(nproc), '-m']
    done = subprocess.run([*head, 'golf', *map(str, args)], cwd=ROOT,
                          capture_output=True, text=True,
                          env={**os.environ, 'OMP_NUM_THREADS': '1'}, **kw)
    if check: assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope='session')
def tiny_run(shards, tmp_path_factory):
    "A finished run of 20 steps: its folder."
    out = tmp_path_factory.mktemp('runs')/'tiny'
    golf('train', 'smoke', '--data', shards, '--overrides', TINY,
         '--out', out)
    return out
