"""Signals to a run: it makes its step to the end, saves, and leaves; a second one ends it at once,
whatever it waits for."""

import functools
import os
import signal
import time

import pytest
from conftest import assert_same, records, without_times
from faults import lose_reader, slow_save, without_hangups
from processes import SMALL, kill, run_ranks, start_ranks, state, steps_made, survey, until

torture = pytest.mark.torture


@pytest.mark.parametrize("world, parallel, rank, number", [
    (1, "ddp", 0, signal.SIGHUP), (2, "fsdp", 0, signal.SIGINT),
    pytest.param(2, "ddp", 1, signal.SIGTERM, marks=torture)])
def test_a_signal_stops_a_run(words, tmp_path, world, parallel, rank, number):
    """To one process of two: both make the step to its end; one checkpoint; resumed, the run is as
    if undisturbed."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    options = {**SMALL, "parallel": parallel, "eval_interval": 10**6, "save_interval": 10**6,
               "schedule": "constant"}
    programs = start_ranks(words(out, **options | {"max_iters": 10**6}), world)
    until(lambda: steps_made(out) > 2)
    os.kill(programs[rank].pid, number)
    for program in programs:
        assert program.wait(60) == 0, program.output
    assert "stopped by a signal" in programs[0].output
    saved = survey(out, 10**6)
    assert saved == steps_made(out) and not (out / "ckpt_prev.pt").exists()
    assert not (out / "best.pt").exists()
    options["max_iters"] = saved + 2
    run_ranks(words(out, **options), world)
    run_ranks(words(whole, **options), world)
    logs = [without_times(records(folder)) for folder in (out, whole)]
    assert logs[0][1:] == logs[1][1:]  # but for max_iters in its config
    assert_same(state(out), state(whole))


@pytest.mark.parametrize("world, parallel", [(1, "ddp"), (2, "fsdp")])
def test_a_reader_that_leaves_stops_a_run(words, tmp_path, world, parallel):
    """train.py | head: as SIGTERM does, after the step in which it left."""
    options = {**SMALL, "parallel": parallel, "eval_interval": 10**6, "save_interval": 10**6,
               "max_iters": 10**6}
    programs = start_ranks(words(tmp_path, **options), world, functools.partial(lose_reader, 3))
    for program in programs:
        assert program.wait(60) == 0, program.output
    assert "standard output: Broken pipe; stopping after this step" in programs[0].output
    assert survey(tmp_path, 10**6) == 4


def test_what_nohup_starts_survives_a_hangup(words, tmp_path):
    options = {**SMALL, "eval_interval": 10**6, "save_interval": 10**6, "max_iters": 100}
    (program,) = start_ranks(words(tmp_path, **options), 1, without_hangups)
    until(lambda: steps_made(tmp_path) > 2)
    os.kill(program.pid, signal.SIGHUP)
    assert program.wait(60) == 0 and "done: 100 steps" in program.output, program.output


@pytest.mark.parametrize("world, rank, second", [
    (2, 1, signal.SIGTERM), pytest.param(1, 0, signal.SIGINT, marks=torture),
    pytest.param(2, 0, signal.SIGINT, marks=torture)])
def test_a_second_signal_ends_it_at_once(words, tmp_path, world, rank, second):
    """While rank 0's save takes for ever, and rank 1 waits for it in a collective. At once after
    the first it counts as the same one."""
    out = tmp_path / "out"
    programs = start_ranks(words(out, **SMALL), world, slow_save)
    until(lambda: "saving" in programs[0].output)
    time.sleep(0.5)
    os.kill(programs[rank].pid, signal.SIGINT)
    os.kill(programs[rank].pid, signal.SIGTERM)
    time.sleep(1.5)
    assert programs[rank].process.is_alive(), programs[rank].output
    os.kill(programs[rank].pid, second)
    try:
        assert programs[rank].wait(20) == 128 + second
    finally:
        kill(programs)
    assert not (out / "ckpt.pt").exists()
