"""support/data.py: the order of the windows, those of an evaluation, ids, what tells data apart."""

import mmap
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused, write_data
from hypothesis import example, given, settings
from hypothesis import strategies as st

from support.data import Tokens, WindowOrder, evaluation_starts, identity, prefetch, to_device
from support.meta import load_meta

tried = settings(max_examples=100, deadline=None, derandomize=True)


@st.composite
def orders(draw):
    """(an order, N, T): at least one window of T + 1 tokens."""
    T = draw(st.integers(1, 40))
    N = draw(st.integers(T + 1, 12 * T + 50))
    return WindowOrder(N, T, draw(st.integers(0, 2**64))), N, T


@tried
@given(orders(), st.integers(0, 10**6))
def test_an_epoch_is_numpys_permutation_of_one_grid(order, epoch):
    """Every window once; the grid starts where its last window still fits, in epoch 0 at 0."""
    order, N, T = order
    W = max(1, (N - T) // T)
    starts = np.array(order.starts(epoch * W, W))
    drawn = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([order.seed, epoch])))
    assert order.per_epoch == W
    assert (starts - starts.min() == T * drawn.permutation(W)).all()
    assert 0 <= starts.min() <= N - 1 - W * T
    assert min(order.starts(0, W)) == 0


@tried
@given(orders(), st.integers(0, 5000), st.lists(st.integers(0, 30), max_size=6))
def test_positions_do_not_depend_on_the_cut(order, position, counts):
    order, N, T = order
    at_once = order.starts(position, sum(counts))
    pieces = [start for i, count in enumerate(counts)
              for start in order.starts(position + sum(counts[:i]), count)]
    assert pieces == at_once and all(0 <= start <= N - T - 1 for start in at_once)


@pytest.mark.parametrize("N, T", [(95, 32), (17, 16), (31, 16), (32, 16), (33, 16), (343, 16),
                                  (352, 16), (353, 16)])
def test_every_token_is_read_and_epochs_differ(N, T):
    order, read, orders_seen = WindowOrder(N, T, seed=1), set(), set()
    for epoch in range(400):
        starts = order.starts(epoch * order.per_epoch, order.per_epoch)
        orders_seen.add(tuple(starts))
        read.update(token for start in starts for token in range(start, start + T + 1))
    assert read == set(range(N))
    assert len(orders_seen) > 10 or N == T + 1
    assert WindowOrder(N, T, seed=2).starts(0, 400) != WindowOrder(N, T, 1).starts(0, 400) or N < 18


@tried
@given(st.integers(1, 50), st.integers(0, 3000), st.integers(1, 5000) | st.just(10**12))
@example(16, 1588, 1605)
@example(16, 1588, 1)
def test_evaluation_windows_are_even(T, more, eval_tokens):
    """The tail that fills no window is dropped."""
    N = T + 1 + more
    starts = evaluation_starts(N, T, eval_tokens)
    available = (N - 1) // T
    gaps = np.diff([s // T for s in starts] + [available])
    assert len(starts) == min(available, max(1, eval_tokens // T))
    assert starts[0] == 0 and starts[-1] <= N - T - 1 and all(s % T == 0 for s in starts)
    assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("dtype, ids", [
    ("uint16", [0, 1, 32767, 32768, 50256, 65535]), ("uint32", [0, 32768, 65535, 65536, 100_276]),
])
def test_ids_and_shifted_targets(tmp_path, dtype, ids):
    stream = np.tile(ids, 9)
    folder = write_data(tmp_path / "d", stream, dtype=dtype, vocab_size=max(ids) + 1)
    meta = load_meta(folder)
    tokens = Tokens(folder, "train", meta, 8)
    starts = [0, 5, len(stream) - 9]
    x, y = to_device(tokens.read(starts), torch.device("cpu"))
    assert len(tokens) == len(stream) and x.dtype == y.dtype == torch.int64
    assert x.tolist() == [stream[s:s + 8].tolist() for s in starts]
    assert y.tolist() == [stream[s + 1:s + 9].tolist() for s in starts]


def test_what_was_read_is_not_kept_in_memory(tmp_path):
    """256 MB, a window from each 64 KB. Cut short meanwhile, the file is an error."""
    folder, status = write_data(tmp_path / "d", [0]), Path("/proc/self/statm")
    os.truncate(folder / "train.bin", 2**28)
    tokens = Tokens(folder, "train", {"dtype": "uint16", "vocab_size": 1}, 64)
    resident = []
    for _ in range(2):
        resident.append(int(status.read_text().split()[1]) if status.exists() else 0)
        for start in range(0, 2**27, 2**15):
            tokens.read([start])
    assert (resident[1] - resident[0]) * mmap.PAGESIZE < 2**25
    os.truncate(folder / "train.bin", 2**20)
    refused(lambda: tokens.read([2**19 - 64]), "train.bin is shorter", "prepare the data again")


def test_prefetch_keeps_the_order_raises_here_and_ends():
    def items():
        yield from range(20)
        raise KeyError("the end")

    threads = threading.active_count()
    made = prefetch(items())
    assert [next(made) for _ in range(20)] == list(range(20))
    with pytest.raises(KeyError):
        next(made)
    half_read = prefetch(iter(range(1000)))
    assert next(half_read) == 0
    half_read.close()
    assert threading.active_count() == threads


def test_data_are_known_by_their_hash_or_by_their_ends(tmp_path):
    """The ends of a nanoGPT folder, a megabyte each, for it says nothing of itself."""
    tokens = np.zeros(1_500_000)
    folder = write_data(tmp_path / "ours", tokens)
    meta = load_meta(folder)
    assert identity(folder, meta) == {k: meta["train"][k] for k in ("tokens", "sha256")}
    (folder / "meta.json").unlink()
    meta = load_meta(folder)
    content, ends = (folder / "train.bin").read_bytes(), identity(folder, meta)
    assert ends["tokens"] == len(tokens)
    for place in (0, (1 << 20) - 1, len(content) // 2, len(content) - (1 << 20), len(content) - 1):
        changed = bytearray(content)
        changed[place] = 1
        (folder / "train.bin").write_bytes(changed)
        assert (identity(folder, meta) == ends) == (place == len(content) // 2), place
