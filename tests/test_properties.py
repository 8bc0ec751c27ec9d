"""Properties that hold for any value: meta.json, the order of the data."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import write_data
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from support.data import WindowOrder, evaluation_starts
from support.errors import UserError
from support.tokenizer import Tokenizer, load_meta

settings.register_profile("ours", max_examples=100, deadline=None, derandomize=True,
                          suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.load_profile("ours")


# -----------------------------------------------------------------------------
# meta.json


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text()
    | st.sampled_from([0, 1, 257, -257, 10**400, "bytes", "char", "uint16", "uint32"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.text(max_size=3) | st.sampled_from(["tokens", "train", "dtype"]), inner, max_size=3),
    max_leaves=8)


@pytest.fixture(scope="module", params=["bytes", "char"])
def folder(request, tmp_path_factory) -> Path:
    char = dict(vocab_size=3, tokenizer="char", alphabet="ab\n")
    return write_data(tmp_path_factory.mktemp("meta") / "x", [0, 1, 2, 1],
                      **(char if request.param == "char" else {}))


def whole(value) -> bool:
    return type(value) is int


def assert_consistent(meta: dict, folder: Path) -> None:
    """What train.py and sample.py rely on."""
    assert isinstance(meta["tokenizer"], str) and meta["dtype"] in ("uint16", "uint32")
    assert whole(meta["vocab_size"]) and whole(meta["padded_vocab_size"])
    assert 0 < meta["vocab_size"] <= meta["padded_vocab_size"]
    for split in "train", "val":
        size = (folder / f"{split}.bin").stat().st_size
        assert whole(meta[split]["tokens"])
        assert meta[split]["tokens"] * np.dtype(meta["dtype"]).itemsize == size
    if meta["tokenizer"] == "char":
        assert isinstance(meta["alphabet"], str)
        assert len(set(meta["alphabet"])) == len(meta["alphabet"]) == meta["vocab_size"]
    if meta["tokenizer"] in ("bytes", "char"):
        tokenizer = Tokenizer.from_meta(meta)
        assert tokenizer.n_vocab <= meta["padded_vocab_size"]
        assert tokenizer.decode([0, 1]) and isinstance(meta.get("alphabet", ""), str)


def load(folder: Path, content: bytes) -> None:
    """load_meta gives something consistent, or one line."""
    path = folder / "meta.json"
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        assert_consistent(load_meta(folder), folder)
    except UserError as error:
        assert len(str(error).splitlines()) == 1 and "--overwrite" in str(error)
    finally:
        path.write_bytes(before)


@given(JSON)
def test_any_json_for_meta(folder, content):
    load(folder, json.dumps(content).encode())


@given(st.binary(max_size=40))
def test_any_bytes_for_meta(folder, content):
    load(folder, content)


@given(st.integers(0), st.integers(0), st.binary(max_size=4))
def test_a_meta_with_bytes_changed(folder, place, count, content):
    valid = (folder / "meta.json").read_bytes()
    place, count = place % len(valid), count % 8
    load(folder, valid[:place] + content + valid[place + count:])


@given(st.lists(st.tuples(
    st.sampled_from(["tokenizer", "vocab_size", "padded_vocab_size", "dtype", "alphabet", "train",
                     "val", "train.tokens", "val.tokens", "train.sha256", "settings"]),
    st.one_of(st.just("remove"), JSON, st.sampled_from([3.0, 257.0, True, 4, 8, "4", ["a", "b"]]))),
    min_size=1, max_size=3))
@settings(max_examples=300)
@example([("vocab_size", 257.0)])
@example([("vocab_size", True), ("alphabet", "a")])
@example([("train.tokens", 4.0)])
@example([("alphabet", "aab")])
@example([("alphabet", ["a", "b", "c"])])
@example([("tokenizer", 3)])
@example([("padded_vocab_size", float("inf"))])
def test_a_meta_with_values_changed(folder, changes):
    meta = json.loads((folder / "meta.json").read_text())
    for path, value in changes:
        *outer, key = path.split(".")
        inner = meta.get(outer[0]) if outer else meta
        if isinstance(inner, dict):
            inner[key] = value
            if value == "remove":
                del inner[key]
    load(folder, json.dumps(meta).encode())


# -----------------------------------------------------------------------------
# The order of the data


@st.composite
def orders(draw):
    """(an order, N, T): at least one window of T + 1 tokens."""
    T = draw(st.integers(1, 40))
    N = draw(st.integers(T + 1, 12 * T + 50))
    return WindowOrder(N, T, draw(st.integers(0, 2**64))), N, T


@given(orders(), st.integers(0, 10**6))
def test_every_epoch_visits_every_window_once(order, epoch):
    order, N, T = order
    W = max(1, (N - T) // T)
    starts = sorted(order.starts(epoch * W, W))
    assert order.per_epoch == W and len(starts) == W
    assert starts == [starts[0] + T * i for i in range(W)]  # one grid: none twice, none left out
    assert 0 <= starts[0] < T and starts[-1] <= N - T - 1
    assert order.starts(0, W) and min(order.starts(0, W)) == 0  # the first epoch's grid


@given(orders(), st.integers(0, 5000), st.lists(st.integers(0, 30), max_size=6))
def test_positions_do_not_depend_on_the_cut(order, position, counts):
    order, N, T = order
    at_once = order.starts(position, sum(counts))
    pieces = [start for i, count in enumerate(counts)
              for start in order.starts(position + sum(counts[:i]), count)]
    assert pieces == at_once and all(0 <= start <= N - T - 1 for start in at_once)
    assert at_once == [order.starts(position + i, 1)[0] for i in range(len(at_once))]


@given(orders(), st.integers(1, 8), st.integers(1, 6), st.integers(0, 10**4), st.integers(1, 4))
def test_the_ranks_share_the_windows(order, world, batch, first_step, per_rank):
    """Rank r takes micro-batches r, r + world, ... of every step: together all of them, each
    position once. (The trainer's own loop is checked in test_train.py.)"""
    order = order[0]
    windows_per_step = batch * world * per_rank
    position = first_step * windows_per_step
    taken = {}
    for rank in range(world):
        for micro_step in range(2 * per_rank):  # two steps
            first = position + (rank + micro_step * world) * batch
            for i, start in enumerate(order.starts(first, batch)):
                assert first + i not in taken
                taken[first + i] = start
    assert [taken[p] for p in sorted(taken)] == order.starts(position, 2 * windows_per_step)


@given(st.integers(1, 50), st.integers(0, 3000), st.integers(1, 5000) | st.just(10**12))
def test_evaluation_windows_are_even(T, more, eval_tokens):
    N = T + 1 + more
    starts = evaluation_starts(N, T, eval_tokens)
    there = (N - 1) // T
    assert len(starts) == min(there, max(1, eval_tokens // T))
    assert starts[0] == 0 and starts[-1] <= N - T - 1
    gaps = np.diff([s // T for s in starts] + [there])
    assert all(s % T == 0 for s in starts) and gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1


