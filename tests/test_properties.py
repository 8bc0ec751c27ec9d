"""Properties that hold for any value: the config reader, the order of the data."""

import contextlib
import io
from dataclasses import asdict, dataclass, fields
from typing import Literal

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from config import read_config
from prepare import PrepareConfig
from sample import SampleConfig
from support.data import WindowOrder, evaluation_starts
from support.errors import UserError
from train import TrainConfig

settings.register_profile("ours", max_examples=100, deadline=None, derandomize=True,
                          suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.load_profile("ours")
AUTO, YES, NO = ("none", "auto"), ("true", "1", "yes"), ("false", "0", "no")


# -----------------------------------------------------------------------------
# The config reader


@dataclass
class Options:
    """One option of every type."""

    count: int = 1  # an integer
    rate: float = 0.5  # a number
    floor: float | None = None  # a number, perhaps
    limit: int | None = None  # an integer, perhaps
    name: str = "run"  # text
    stop: str | None = None  # text, perhaps
    fast: bool = False  # a switch
    quick: bool | None = None  # a switch, perhaps
    kind: Literal["cosine", "wsd"] = "cosine"  # a choice
    inputs: tuple[str, ...] = ()  # texts


INTEGERS = st.integers(-2**63, 2**63 - 1)  # all that fit
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
VALUES = {
    "count": INTEGERS, "rate": NUMBERS, "floor": st.none() | NUMBERS,
    "limit": st.none() | INTEGERS, "name": st.text(),
    "stop": st.none() | st.text().filter(lambda text: text.lower() not in AUTO),
    "fast": st.booleans(), "quick": st.none() | st.booleans(),
    "kind": st.sampled_from(["cosine", "wsd"]),
    "inputs": st.lists(st.text().filter(lambda text: not text.startswith("--")),
                       min_size=1).map(tuple)}
ASSIGNED = st.lists(st.sampled_from(sorted(VALUES)).flatmap(
    lambda name: st.tuples(st.just(name), VALUES[name])))


def words(name, value, apart=False) -> list[str]:
    """The command line's words for one option."""
    values = list(map(str, value)) if isinstance(value, tuple) else [str(value)]
    return [f"--{name}", *values] if apart else [f"--{name}={values[0]}", *values[1:]]


def same(ours, theirs) -> bool:
    """Equal, and of the same types."""
    return repr(asdict(ours)) == repr(asdict(theirs))


@given(ASSIGNED)
def test_what_is_written_is_read_and_the_later_wins(assigned):
    config, given_names = read_config(Options, [w for pair in assigned for w in words(*pair)])
    assert same(config, Options(**dict(assigned))) and given_names == dict(assigned).keys()


@given(ASSIGNED, ASSIGNED, ASSIGNED)
def test_presets_and_options_are_read_alike(tmp_path, first, preset, last):
    """In the order in which they stand."""
    path = tmp_path / "preset.py"
    path.write_text("".join(f"{name} = {value!r}\n" for name, value in preset), encoding="utf-8")
    argv = [*(w for pair in first for w in words(*pair)), "--fast=no", str(path),
            *(w for pair in last for w in words(*pair))]
    config, given_names = read_config(Options, argv)
    expected = dict(first) | {"fast": False} | dict(preset) | dict(last)
    assert same(config, Options(**expected)) and given_names == expected.keys()


@given(ASSIGNED)
def test_an_equals_sign_is_a_space(assigned):
    assigned = [(n, v) for n, v in assigned if not str(v).startswith("--")]
    together, apart = ([w for n, v in assigned for w in words(n, v, apart)]
                       for apart in (False, True))
    assert same(read_config(Options, together)[0], read_config(Options, apart)[0])


@given(st.sampled_from(YES + NO + AUTO), st.data())
def test_case_does_not_matter(word, data):
    word = "".join(data.draw(st.sampled_from([c.lower(), c.upper()])) for c in word)
    for join in ("=", " "):
        value = read_config(Options, f"--quick{join}{word}".split(" "))[0].quick
        assert value is {**dict.fromkeys(YES, True), **dict.fromkeys(NO, False)}.get(word.lower())


CLASSES = [(Options, None), (TrainConfig, None), (SampleConfig, None), (PrepareConfig, "corpus")]
NASTY = ["", "-", "--", "---", "-h", "=", "--=", "nan", "-inf", "1e400", "9" * 400, "9" * 5000,
         "1" + "0" * 400, "-0", "none", "auto", "true", "1_0", "٣", "0x1", "\x00", "\n", "\ud800",
         ".", "/", "config", "text", "scratch", "x.pt", "gpt2"]
OPTION_NAMES = sorted({f.name for cls, _ in CLASSES for f in fields(cls)})
WORD = st.one_of(st.text(), st.sampled_from(NASTY), st.integers().map(str), st.floats().map(str))
SOUP = st.lists(st.one_of(
    WORD, st.builds("--{}".format, st.sampled_from(OPTION_NAMES)),
    st.builds("--{}={}".format, st.sampled_from(OPTION_NAMES) | st.text(), WORD)), max_size=8)


@pytest.mark.parametrize("cls, positional", CLASSES, ids=lambda v: getattr(v, "__name__", v))
@given(SOUP)
@settings(max_examples=200)
def test_any_words_are_a_config_or_a_user_error(tmp_path, monkeypatch, cls, positional, soup):
    monkeypatch.chdir(tmp_path)  # without presets
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            config, given_names = read_config(cls, soup, positional)
    except UserError as error:
        assert str(error).strip()
    except SystemExit as stop:
        assert stop.code == 0 and {"-h", "--help"} & set(soup) and output.getvalue()
    else:
        assert isinstance(config, cls) and given_names <= {f.name for f in fields(cls)}


PYTHON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
    | st.complex_numbers() | st.sampled_from([10**400, -10**400]),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner)
    | st.dictionaries(st.integers(), inner, max_size=2), max_leaves=5)


def as_source(value) -> str:
    """An expression for it; nan and inf have no names of their own."""
    return f"eval({repr(value)!r}, {{'nan': float('nan'), 'inf': float('inf')}})"


@pytest.mark.parametrize("cls", [Options, TrainConfig])
@given(st.dictionaries(st.sampled_from(OPTION_NAMES) | st.just("other"), PYTHON, max_size=3))
@example({"count": -10**400, "learning_rate": 10**400, "rate": 10**400})
def test_any_preset_is_a_config_or_a_user_error(tmp_path, cls, assigned):
    path = tmp_path / "preset.py"
    path.write_text("".join(f"{n} = {as_source(v)}\n" for n, v in assigned.items()),
                    encoding="utf-8")
    with contextlib.suppress(UserError):
        read_config(cls, [str(path)])


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


