"""Shared by the tests: tiny data folders, and tiny runs of the trainer in this process."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: the models here are tiny

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

TINY = dict(n_layer=2, n_head=2, n_embd=32, block_size=16, batch_size=4, warmup_iters=2,
            gradient_accumulation_steps=2, max_iters=6, eval_interval=3, learning_rate=1e-3,
            device="cpu", dtype="float32")


def option_words(**options) -> list[str]:
    """n_layer=2 -> --n_layer=2."""
    return [f"--{name}={value}" for name, value in options.items()]


def write_data(folder, train, val=None, vocab_size=257, dtype="uint16", **meta) -> Path:
    """A data folder as prepare.py makes it, of these ids; `bytes` unless meta says else."""
    folder.mkdir(parents=True)
    meta = {"tokenizer": "bytes", "alphabet": "", "padded_vocab_size": vocab_size, **meta,
            "vocab_size": vocab_size, "dtype": dtype}
    for split, ids in (("train", train), ("val", train if val is None else val)):
        ids = np.asarray(ids).astype(np.dtype(dtype).newbyteorder("<"))
        ids.tofile(folder / f"{split}.bin")
        meta[split] = {"tokens": len(ids), "sha256": hashlib.sha256(ids.tobytes()).hexdigest()}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """tiny: random bytes, 20 windows of 16 (2.5 steps of TINY) an epoch; edge: 24 windows (3
    steps); count: 20 windows in which a token's id is its position; easy: eight ids in turn."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    write_data(root / "tiny", rng.integers(256, size=343), rng.integers(256, size=300))
    write_data(root / "edge", rng.integers(256, size=407), rng.integers(256, size=300))
    write_data(root / "easy", np.arange(343) % 8)
    write_data(root / "count", np.arange(343), vocab_size=343)
    return root


@pytest.fixture(scope="session", autouse=True)
def no_pictures():
    """Drawing loss.png takes longer than a tiny run: a test of it asks for `pictures`."""
    import train

    with pytest.MonkeyPatch.context() as patch:
        real = train.refresh_picture
        patch.setattr(train, "refresh_picture", lambda _: None)
        yield real


@pytest.fixture
def pictures(no_pictures, monkeypatch):
    """The runs of this test draw loss.png."""
    import train

    monkeypatch.setattr(train, "refresh_picture", no_pictures)


@pytest.fixture
def words(data_dir):
    """words(out_dir, **options): the command line of a tiny run."""
    def command_line(out, **options) -> list[str]:
        options = {"data_dir": data_dir, "dataset": "tiny", "out_dir": out, **TINY, **options}
        warmup = min(options["warmup_iters"], options["max_iters"])
        return option_words(**options | {"warmup_iters": warmup})

    return command_line


@pytest.fixture
def run(words):
    """run(out_dir, *words, **options) trains in this process and returns log.jsonl's records."""
    import train

    def go(out, *argv, **options):
        train.main([*words(out, **options), *argv])
        path = Path(out, "log.jsonl")
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    return go
