"""Runs that are killed at any moment, or lose a process: what remains, and how they go on.

The long series are for `make torture`. TORTURE_SEED=2 draws other moments.
"""

import functools
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import assert_same_end
from faults import at_step, crash, die, hang, kill_at, spoil_data
from processes import LEFT_ALONE, SMALL, kill, run_ranks, start_ranks, steps_made, survey, until

SEED = int(os.environ.get("TORTURE_SEED", 1))
torture = pytest.mark.torture


# -----------------------------------------------------------------------------
# kill -9


@pytest.mark.parametrize("kills, world, interval", [
    (4, 1, 1), (1, 2, 1),
    pytest.param(50, 1, 2, marks=torture), pytest.param(16, 2, 1, marks=torture)])
def test_kill_9(words, tmp_path, kills, world, interval):
    """Again and again, at any time; two processes are sharded. Then the run is let to its end."""
    rng, whole, out, saved = random.Random(SEED), tmp_path / "whole", tmp_path / "killed", 0
    options = {**SMALL, "save_interval": interval, "parallel": "ddp" if world == 1 else "fsdp",
               "max_iters": 6 * kills + 3}
    run_ranks(words(whole, **options), world)
    for _ in range(kills):
        programs = start_ranks(words(out, **options), world, functools.partial(
            at_step, None, hang, after=6))
        if rng.random() < 0.5:
            time.sleep(rng.uniform(0, 0.6 * world))
        else:
            made = steps_made(out)
            until(lambda made=made, end=saved + 6: steps_made(out) not in {made} - {end})
            time.sleep(rng.uniform(0, 0.1 * world))
        kill(programs)
        before, saved = saved, survey(out, interval)
        assert before <= saved < options["max_iters"]
    run_ranks(words(out, **options), world)
    survey(out, interval)
    assert_same_end(out, whole)
    assert not list(out.glob("*.partial"))


@pytest.mark.parametrize("step, every, world", [  # with a ckpt_prev.pt, but no best.pt
    (1, 9, 1), (2, 40, 2), *(pytest.param(step, 1, 1, marks=torture) for step in range(4)),
    pytest.param(2, 3, 2, marks=torture)])
def test_every_moment_of_a_save(words, tmp_path, step, every, world):
    """Killed before, within and after the operations of the save after a step: the first, one with
    a previous one, one with a best.pt, the last. Each time from the same state."""
    start = tmp_path / "start"
    options = {**SMALL, "parallel": "ddp" if world == 1 else "fsdp", "max_iters": 4}
    run_ranks(words(tmp_path / "whole", **options), world)
    start.mkdir()
    if step:
        programs = start_ranks(words(start, **options), world, functools.partial(
            at_step, step, die))
        assert programs[0].wait() == -signal.SIGKILL
        kill(programs)
    for moment in itertools.count(1, every):
        out = tmp_path / f"killed-{moment}"
        shutil.copytree(start, out)
        programs = start_ranks(words(out, **options), world, functools.partial(
            kill_at, moment, first=True))
        code = programs[0].wait()
        kill(programs)
        assert code in (-signal.SIGKILL, 0), programs[0].output  # the last save ends the run
        inside = "killed inside" in programs[0].output
        assert survey(out) == step + 1 or inside
        if code:
            run_ranks(words(out, **options), world)
        assert_same_end(out, tmp_path / "whole")
        assert not list(out.glob("*.partial"))
        if not inside:
            break
        shutil.rmtree(out)
    assert moment > 12


# -----------------------------------------------------------------------------
# torchrun starts a run again


FIRST_ATTEMPT_DIES = """
import os, train
from faults import at_step, die
from support.errors import cli
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    at_step(2, die, rank=1)
cli(train.main)
"""


def test_torchrun_starts_a_killed_run_again(words, tmp_path):
    """Its store outlives the processes, with the addresses of the dead."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    options = {**SMALL, "max_iters": 4}
    run_ranks(words(whole, **options), 2)
    (tmp_path / "run.py").write_text(FIRST_ATTEMPT_DIES)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         "--max-restarts=1", tmp_path / "run.py", *words(out, **options)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200)
    assert done.returncode == 0 and "resuming" in done.stdout, done.stdout
    assert_same_end(out, whole)


# -----------------------------------------------------------------------------
# One process of two ends


@pytest.mark.parametrize("parallel, rank, step, action, code, last_words", [
    ("ddp", 1, 2, die, -signal.SIGKILL, "killed"), ("fsdp", 1, 2, crash, 1, "ZeroDivisionError"),
    ("ddp", 0, 1, spoil_data, 2, "error: train.bin has a fault"),
    *(pytest.param(*row, marks=torture) for row in (
        ("fsdp", 0, 2, die, -signal.SIGKILL, "killed"), ("ddp", 0, 0, die, -signal.SIGKILL, ""),
        ("ddp", 0, 2, crash, 1, "Zero"), ("fsdp", 1, 1, spoil_data, 2, "has a fault")))])
def test_a_process_that_ends_takes_the_other_along(words, tmp_path, parallel, rank, step, action,
                                                   code, last_words):
    """Killed, by an exception, by a fault in its part of the data."""
    options = {**SMALL, "parallel": parallel, "save_interval": 2}
    programs = start_ranks(words(tmp_path, **options), 2, functools.partial(
        at_step, step, action, rank))
    assert programs[rank].wait(60) == code and last_words in programs[rank].output
    programs[1 - rank].refused(LEFT_ALONE)
    survey(tmp_path, 2)


def test_a_used_folder_ends_both(words, tmp_path):
    """Only one process looks, or holds the lock."""
    first = start_ranks(words(tmp_path, **SMALL), 1, functools.partial(at_step, 2, hang))
    until(lambda: steps_made(tmp_path) > 1)
    programs = start_ranks(words(tmp_path, **SMALL), 2)
    programs[0].refused("another run is writing")
    programs[1].refused(LEFT_ALONE)
    kill(first)
    survey(tmp_path)
