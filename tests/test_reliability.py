"""Runs that are killed at any moment, that cannot write, that lose a process: what remains, and how
they go on. All in processes of their own (processes.py), with real signals and real errors.

The long ones are for `make torture`. TORTURE_SEED=2 draws other moments.
"""

import contextlib
import functools
import itertools
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, option_words, write_data
from faults import (
    at_step,
    crash,
    delete,
    die,
    hang,
    kill_at,
    limit_files,
    slow_save,
)
from processes import ROOT, Program, start_ranks
from test_train import TIMES, assert_same

from support.checkpoint import CHECKPOINTS, read_checkpoint, read_latest, read_shards
from support.data import WindowOrder
from support.errors import UserError

SEED = int(os.environ.get("TORTURE_SEED", 1))
SMALL = dict(template="nesterov", dropout=0.1, save_interval=1, eval_interval=3, init_from="auto",
             n_layer=1, max_iters=6, dataset="easy")  # on which every evaluation is the best
torture = pytest.mark.torture


def launch(argv, world=1, hook=None, **environment) -> list[Program]:
    if world == 1:
        return [Program(argv, hook=hook, **environment)]
    return start_ranks(argv, world, hook, **environment)


def finish(argv, world=1, hook=None) -> str:
    """Run to a good end; what rank 0 printed."""
    programs = launch(argv, world, hook)
    for program in programs:
        assert program.wait() == 0, program.output
    return programs[0].output


def kill(programs) -> None:
    for program in programs:
        program.process.kill()
    for program in programs:
        program.wait()


def until(condition, timeout=60.0):
    """Wait for it, and return it."""
    end = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)
    return found


def records(out) -> list[dict]:
    """The whole lines of log.jsonl, without what may differ."""
    path = Path(out, "log.jsonl")
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{k: v for k, v in r.items() if k not in TIMES | {"out_dir", "init_from"}}
            for r in found]


def steps_made(out) -> int:
    return max([r["iter"] + 1 for r in records(out) if r["type"] == "train"], default=0)


def state(out) -> dict:
    """All of the latest checkpoint that a resumed run must have in common with a whole one."""
    checkpoint = read_checkpoint(os.path.join(out, "ckpt.pt"))
    if "shards" in checkpoint:
        checkpoint["optimizer"] = read_shards(os.path.join(out, checkpoint.pop("shards")), "adamw")
    return {k: v for k, v in checkpoint.items() if k not in ("config", "log_length")}


def assert_equal_runs(ours, theirs) -> None:
    assert records(ours) == records(theirs)
    assert_same(state(ours), state(theirs))


def survey(out, interval=1) -> int:
    """What a run that was killed must have left. Returns the step of its latest checkpoint."""
    for name in CHECKPOINTS:
        path = os.path.join(out, name)
        if os.path.exists(path):
            weights = read_checkpoint(path)["model"].values()
            assert weights and all(w.isfinite().all() for w in weights), name
    saved = read_latest(str(out))["iter_num"] if Path(out, "ckpt.pt").exists() else 0
    done = steps_made(out)  # before its last step the save of all before was over, if due
    assert (done - 1) // interval * interval <= saved <= done
    return saved


def shards(out) -> set[str]:
    return {path.name for path in Path(out).glob("shards-*")}


def shards_named(out) -> set[str]:
    there = [os.path.join(out, name) for name in CHECKPOINTS]
    return {read_checkpoint(path)["shards"] for path in there if os.path.exists(path)}


def error_line(program: Program, *said: str) -> None:
    """It ended with code 2 and one line, which has these words."""
    assert program.wait(60) == 2, program.output
    lines = [line for line in program.output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in program.output, program.output
    assert all(word in lines[0] for word in said), lines[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data_dir) -> Path:
    """An undisturbed run of SMALL."""
    out = tmp_path_factory.mktemp("whole") / "out"
    finish(option_words(**{**TINY, **SMALL, "data_dir": data_dir, "out_dir": out}))
    return out


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, data_dir) -> Path:
    """Four steps of two processes."""
    out = tmp_path_factory.mktemp("sharded") / "out"
    finish(option_words(**{**TINY, **SMALL, "parallel": "fsdp", "data_dir": data_dir,
                           "out_dir": out, "max_iters": 4}), 2)
    return out


# -----------------------------------------------------------------------------
# kill -9 while training


def campaign(words, tmp_path, kills, inside, world=1, interval=1, **options) -> None:
    """Kill a run `kills` times, `inside` of these within a save, then let it end."""
    rng, whole, out = random.Random(SEED), tmp_path / "whole", tmp_path / "killed"
    options = {**SMALL, **options, "save_interval": interval,
               "max_iters": 6 * (kills - inside) + 3 * interval * inside}
    said = finish(words(whole, **options), world, functools.partial(kill_at, 0))
    moments = int(said.split("moments so far: ")[-1].split()[0]) // options["max_iters"]
    plan = [True] * inside + [False] * (kills - inside)
    rng.shuffle(plan)
    saved, within, begun = 0, 0, time.monotonic()
    for number, in_a_save in enumerate(plan):
        rank = rng.randrange(world)
        if in_a_save:
            hook = functools.partial(kill_at, rng.randint(1, 2 * moments), rank=rank)
        else:
            hook = functools.partial(at_step, None, hang, after=6)
        programs = launch(words(out, **options), world, hook)
        if in_a_save:
            assert programs[rank].wait() == -signal.SIGKILL, programs[rank].output
            assert "killed inside" in programs[rank].output
            within += 1
            time.sleep(rng.choice((0, 0, 0.2)) if world > 1 else 0)  # alone, the others see it
        elif rng.random() < 0.5:
            time.sleep(rng.uniform(0, 0.6 * world))
        else:
            made = steps_made(out)
            until(lambda made=made, end=saved + 6: steps_made(out) not in {made} - {end})
            time.sleep(rng.uniform(0, 0.1 * world))
        kill(programs)
        before, saved = saved, survey(out, interval)
        assert before <= saved < options["max_iters"], number
    finish(words(out, **options), world)
    survey(out, interval)
    assert_equal_runs(out, whole)
    assert world == 1 or shards(out) == shards_named(out)
    assert not list(out.glob("*.partial"))
    print(f"\n{kills} kills of {world} process(es) survived, of these {within} inside a save "
          f"(about {moments} moments each); seed {SEED}, {time.monotonic() - begun:.0f} s")


def test_kill_9(words, tmp_path):
    campaign(words, tmp_path, 8, 5)


@torture
@pytest.mark.parametrize("interval", [1, 2])
def test_kill_9_fifty_times(words, tmp_path, interval):
    campaign(words, tmp_path, 50, 30, interval=interval)


@torture
def test_kill_9_sharded_a_dozen_times(words, tmp_path):
    campaign(words, tmp_path, 16, 11, world=2, parallel="fsdp")


SAVES = {"the first": (0, 1), "with a previous one": (1, 1), "at an evaluation": (2, 1),
         "the best alone": (2, 4), "the last": (3, 1)}


@torture
@pytest.mark.parametrize("kind", SAVES)
def test_every_moment_of_a_save(words, tmp_path, kind):
    """Killed before, within and after each operation of one save; each time from the same state."""
    (step, interval), start = SAVES[kind], tmp_path / "start"
    options = {**SMALL, "save_interval": interval, "max_iters": 4}
    finish(words(tmp_path / "whole", **options))
    start.mkdir()
    if step:
        (program,) = launch(words(start, **options), hook=functools.partial(at_step, step, die))
        assert program.wait() == -signal.SIGKILL
    for moment in itertools.count(1):
        out = tmp_path / f"killed-{moment}"
        shutil.copytree(start, out)
        (program,) = launch(words(out, **options),
                            hook=functools.partial(kill_at, moment, first=True))
        code = program.wait()
        assert code in (-signal.SIGKILL, 0), program.output
        saved = survey(out, interval)
        assert "killed inside" in program.output or saved == step + 1 or interval > 1
        if code:
            finish(words(out, **options))
        assert_equal_runs(out, tmp_path / "whole")
        assert not list(out.glob("*.partial"))
        if "killed inside" not in program.output:
            break
        shutil.rmtree(out)
    assert moment > 12
    print(f"\n{moment - 1} kills survived, all inside a save, {kind}")


@torture
@pytest.mark.parametrize("rank", [0, 1])
def test_moments_of_a_sharded_save(words, tmp_path, rank):
    """Every third. The folder that a killed save leaves is gone after the next."""
    options, start = {**SMALL, "parallel": "fsdp", "max_iters": 4}, tmp_path / "start"
    finish(words(tmp_path / "whole", **options), 2)
    programs = launch(words(start, **options), 2, functools.partial(at_step, 2, die))
    assert programs[0].wait() == -signal.SIGKILL
    kill(programs)
    left = 0
    for moment in itertools.count(1, 3):
        out = tmp_path / f"killed-{moment}"
        shutil.copytree(start, out)
        programs = launch(words(out, **options), 2,
                          functools.partial(kill_at, moment, first=True, rank=rank))
        assert programs[rank].wait() == -signal.SIGKILL, programs[rank].output
        kill(programs)
        survey(out)
        left += shards(out) > shards_named(out)
        if "killed inside" not in programs[rank].output:
            break
        programs = launch(words(out, **options), 2, functools.partial(kill_at, 0, first=True))
        code = programs[0].wait()
        kill(programs)
        assert code in (-signal.SIGKILL, 0) and shards(out) == shards_named(out)
        finish(words(out, **options), 2)
        assert_equal_runs(out, tmp_path / "whole")
        shutil.rmtree(out)
    assert left or rank
    print(f"\n{moment // 3} kills survived, all inside a save of rank {rank}; {left} left a folder")


def children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


# -----------------------------------------------------------------------------
# Disks that refuse


def test_a_file_that_cannot_grow(words, tmp_path, whole):
    """A real OSError in the middle of the second checkpoint."""
    out = tmp_path / "out"
    (program,) = launch(words(out, **SMALL), hook=functools.partial(
        at_step, 1, functools.partial(limit_files, 40_000)))
    error_line(program, str(out), "ckpt.pt", "File too large", "intact")
    assert survey(out) == 1 and not list(out.glob("*.partial"))
    finish(words(out, **SMALL))
    assert_equal_runs(out, whole)


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=torture),
                                  pytest.param(None, marks=torture)])
def test_shards_that_cannot_grow(sharded, words, tmp_path, rank):
    """In one process, or in both."""
    options, out = {**SMALL, "parallel": "fsdp"}, tmp_path / "out"
    shutil.copytree(sharded, out)
    there, before = shards(out), contents_of_files(out)
    for program in launch(words(out, **options), 2,
                          functools.partial(limit_files, 40_000, rank=rank)):
        error_line(program, "cannot write", "shards-5", "intact")
    assert contents_of_files(out) == before and survey(out) == 4 and shards(out) == there
    finish(words(out, **options), 2)
    assert survey(out) == 6


def contents_of_files(out) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(out).glob("*.pt*")}


def test_a_log_that_cannot_grow(words, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    options = {**SMALL, "max_iters": 70, "save_interval": 20, "eval_interval": 20}
    finish(words(whole, **options))
    (program,) = launch(words(out, **options), hook=functools.partial(
        at_step, 65, functools.partial(limit_files, log=str(out / "log.jsonl"))))
    error_line(program, str(out), "File too large")
    assert survey(out, 20) == 60
    finish(words(out, **options))
    assert_equal_runs(out, whole)


@contextlib.contextmanager
def mounted(folder, size):
    """A file system of its own; resize(bytes) lets it grow."""
    folder.mkdir()

    def mount(options):
        return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)],
                              capture_output=True).returncode

    if shutil.which("mount") is None or mount(f"size={size}"):
        pytest.skip("mounting a small disk is not permitted here")
    try:
        yield lambda options: mount(f"remount,{options}")
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_full(words, tmp_path, whole):
    """It holds one checkpoint, not two; then it is made larger."""
    size = (whole / "ckpt.pt").stat().st_size
    with mounted(tmp_path / "disk", int(1.6 * size)) as remount:
        out = tmp_path / "disk" / "out"
        for saved in 1, 1:
            (program,) = launch(words(out, **SMALL))
            error_line(program, str(out), "ckpt.pt")
            assert survey(out) == saved and not list(out.glob("*.partial"))
        assert remount(f"size={20 * size}") == 0
        finish(words(out, **SMALL))
        assert_equal_runs(out, whole)
        if remount("ro") == 0:
            before = contents_of_files(out)
            (program,) = launch(words(out, **SMALL | {"max_iters": 8}))
            error_line(program, str(out), "Read-only file system")
            assert contents_of_files(out) == before
            remount("rw")


@contextlib.contextmanager
def frozen(folder):
    """No file can be made or renamed in it; root needs a stronger means."""
    os.chmod(folder, 0o555)
    strong = os.access(folder, os.W_OK)
    try:
        if strong and (shutil.which("chattr") is None or subprocess.run(
                ["chattr", "+i", str(folder)], capture_output=True).returncode):
            pytest.skip("no folder is read-only for this user")
        yield
    finally:
        if strong and shutil.which("chattr"):
            subprocess.run(["chattr", "-i", str(folder)], capture_output=True)
        os.chmod(folder, 0o755)


@pytest.mark.parametrize("world, parallel", [
    (1, "ddp"), pytest.param(2, "fsdp", marks=torture)])
def test_a_folder_that_becomes_read_only(words, tmp_path, world, parallel):
    options, out = {**SMALL, "parallel": parallel}, tmp_path / "out"
    finish(words(out, **options | {"max_iters": 2}), world)
    before, there = contents_of_files(out), shards(out)
    with frozen(out):
        programs = launch(words(out, **options), world)
        error_line(programs[0], str(out))
        assert all(program.wait(60) == 2 for program in programs)
    assert contents_of_files(out) == before and shards(out) == there and survey(out) == 2
    finish(words(out, **options), world)
    assert survey(out) == 6


@pytest.mark.parametrize("world, parallel", [
    (1, "ddp"), pytest.param(2, "fsdp", marks=torture)])
def test_a_folder_deleted_meanwhile(words, tmp_path, world, parallel):
    """The next save makes it anew, and then the run ends, because its log is lost."""
    options = {**SMALL, "parallel": parallel}
    whole, out = tmp_path / "whole", tmp_path / "out"
    finish(words(whole, **options), world)
    programs = launch(words(out, **options), world, functools.partial(
        at_step, 3, functools.partial(delete, str(out))))
    error_line(programs[0], str(out), "deleted", "step 4", "--init_from=resume")
    assert all(program.wait(60) for program in programs)
    assert read_latest(str(out))["iter_num"] == 4 and not list(out.glob("*.partial"))
    finish(words(out, **options), world)
    assert_same(state(out), state(whole))


def test_data_deleted_meanwhile(words, tmp_path, data_dir, whole):
    """A run that has it open goes on; the next one says what is missing."""
    shutil.copytree(data_dir / "easy", tmp_path / "data/easy")
    options = {**SMALL, "data_dir": tmp_path / "data"}
    out = tmp_path / "out"
    (program,) = launch(words(out, **options), hook=functools.partial(
        at_step, 2, functools.partial(delete, str(tmp_path / "data/easy"))))
    assert program.wait() == 0, program.output
    assert_same(state(out), state(whole))
    before = contents_of_files(out)
    (program,) = launch(words(out, **options | {"max_iters": 8}))
    error_line(program, "no data in", str(tmp_path / "data/easy"), "prepare.py")
    assert contents_of_files(out) == before


# -----------------------------------------------------------------------------
# Signals


@pytest.mark.parametrize("parallel, rank, number", [
    ("fsdp", 0, signal.SIGINT), pytest.param("ddp", 1, signal.SIGTERM, marks=torture),
    pytest.param("ddp", 0, signal.SIGINT, marks=torture),
    pytest.param("fsdp", 1, signal.SIGTERM, marks=torture)])
def test_a_signal_to_one_of_two(words, tmp_path, parallel, rank, number):
    """Both make the step to its end; one checkpoint; resumed, the run is as if undisturbed."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    options = {**SMALL, "parallel": parallel, "eval_interval": 10**6, "save_interval": 10**6,
               "schedule": "constant"}
    programs = launch(words(out, **options | {"max_iters": 10**6}), 2)
    until(lambda: steps_made(out) > 2)
    os.kill(programs[rank].pid, number)
    for program in programs:
        assert program.wait(60) == 0, program.output
    assert "stopped by a signal" in programs[0].output
    saved = survey(out, 10**6)
    assert saved == steps_made(out) and not (out / "ckpt_prev.pt").exists()
    options["max_iters"] = saved + 2
    finish(words(out, **options), 2)
    finish(words(whole, **options), 2)
    assert records(out)[1:] == records(whole)[1:]  # but for max_iters in its config
    assert_same(state(out), state(whole))


@pytest.mark.parametrize("world, rank, second", [
    (1, 0, signal.SIGINT), (2, 1, signal.SIGTERM),
    pytest.param(1, 0, signal.SIGTERM, marks=torture),
    pytest.param(2, 0, signal.SIGINT, marks=torture)])
def test_a_second_signal_ends_it_at_once(words, tmp_path, world, rank, second):
    """While rank 0's save takes for ever, and rank 1 waits for it. At once after the first it
    counts as the same one."""
    out = tmp_path / "out"
    programs = launch(words(out, **SMALL), world, slow_save)
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


@torture
@pytest.mark.parametrize("parallel, rank", [("ddp", 1), ("fsdp", 0)])
def test_torchrun_starts_a_killed_run_again(words, tmp_path, parallel, rank):
    whole, out = tmp_path / "whole", tmp_path / "out"
    options = {**SMALL, "parallel": parallel, "init_from": "scratch", "max_iters": 300,
               "save_interval": 20}
    finish(words(whole, **options), 2)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                "--max-restarts=2", "train.py", *words(out, **options)]
    with open(tmp_path / "said", "w") as said, subprocess.Popen(
            torchrun, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT) as process:
        until(lambda: steps_made(out) > 30 or process.poll() is not None)
        workers = [pid for pid in children(process.pid) if b"train.py" in Path(
            f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(workers[rank], signal.SIGKILL)
        try:
            code = process.wait(120)
        finally:
            process.kill()
    said = (tmp_path / "said").read_text()
    assert len(workers) == 2 and code == 0, said
    assert steps_made(out) == 300 and said.count("model: ") == 2, said  # it began twice
    assert_equal_runs(out, whole)


# -----------------------------------------------------------------------------
# One process of two ends


LEFT_ALONE = "another process of this run has ended"


@pytest.mark.parametrize("parallel, rank, step", [
    ("ddp", 1, 2), pytest.param("fsdp", 0, 2, marks=torture),
    pytest.param("ddp", 0, 0, marks=torture), pytest.param("fsdp", 1, 3, marks=torture)])
def test_a_killed_process_ends_the_other(words, tmp_path, parallel, rank, step):
    options = {**SMALL, "parallel": parallel, "save_interval": 2}
    programs = launch(words(tmp_path, **options), 2, functools.partial(at_step, step, die, rank))
    assert programs[rank].wait(60) == -signal.SIGKILL
    error_line(programs[1 - rank], LEFT_ALONE)
    survey(tmp_path, 2)


@pytest.mark.parametrize("parallel, rank", [
    ("fsdp", 1), pytest.param("ddp", 0, marks=torture), pytest.param("ddp", 1, marks=torture),
    pytest.param("fsdp", 0, marks=torture)])
def test_an_exception_in_one_ends_the_other(words, tmp_path, parallel, rank):
    options = {**SMALL, "parallel": parallel}
    programs = launch(words(tmp_path, **options), 2, functools.partial(at_step, 2, crash, rank))
    assert programs[rank].wait(60) == 1 and "a fault of the test's" in programs[rank].output
    error_line(programs[1 - rank], LEFT_ALONE)
    survey(tmp_path)


@pytest.mark.parametrize("parallel, rank", [
    ("ddp", 1), pytest.param("ddp", 0, marks=torture), pytest.param("fsdp", 0, marks=torture),
    pytest.param("fsdp", 1, marks=torture)])
def test_a_mistake_in_ones_part_of_the_data(words, tmp_path, parallel, rank):
    """An id past the vocabulary, in the second step, in the micro-batch of one process."""
    ids = np.zeros(343, int)
    ids[WindowOrder(len(ids), 16, seed=1337).starts(8 + 4 * rank, 1)[0] + 5] = 300
    write_data(tmp_path / "data/wrong", ids, np.zeros(300))
    options = {**SMALL, "parallel": parallel, "data_dir": tmp_path / "data", "dataset": "wrong"}
    programs = launch(words(tmp_path / "out", **options), 2)
    error_line(programs[rank], "train.bin has the token id 300", "prepare the data again")
    error_line(programs[1 - rank], LEFT_ALONE)


def test_a_used_folder_ends_both(words, tmp_path):
    """Only one process looks, or holds the lock."""
    first = launch(words(tmp_path, **SMALL), 1, functools.partial(at_step, 2, hang))
    until(lambda: steps_made(tmp_path) > 1)
    programs = launch(words(tmp_path, **SMALL), 2)
    error_line(programs[0], "another run is writing")
    error_line(programs[1], LEFT_ALONE)
    kill(first)
    survey(tmp_path)


# -----------------------------------------------------------------------------
# Shards that were damaged


def shorten(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:len(data) // 2])


DAMAGE = {"no folder": shutil.rmtree,
          "no metadata": lambda folder: (folder / ".metadata").unlink(),
          "half a metadata": lambda folder: shorten(folder / ".metadata"),
          "no part": lambda folder: (folder / "__1_0.distcp").unlink(),
          "half a part": lambda folder: shorten(folder / "__0_0.distcp"),
          "an empty part": lambda folder: (folder / "__1_0.distcp").write_bytes(b"")}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_shards_are_named_and_the_previous_used(sharded, tmp_path, capsys, damage):
    out = tmp_path / "out"
    shutil.copytree(sharded, out)
    DAMAGE[damage](out / read_checkpoint(str(out / "ckpt.pt"), weights=False)["shards"])
    assert read_latest(str(out))["iter_num"] == 3
    warning = capsys.readouterr().err
    assert "ckpt.pt is damaged: its" in warning and "ckpt_prev.pt" in warning
    assert warning.count("\n") == 1 and "shards-4" in warning


@pytest.mark.parametrize("damage", ["half a part", pytest.param("no folder", marks=torture)])
def test_a_run_goes_on_from_the_previous(sharded, words, tmp_path, damage):
    out, options = tmp_path / "out", {**SMALL, "parallel": "fsdp", "max_iters": 4}
    shutil.copytree(sharded, out)
    DAMAGE[damage](out / "shards-4")
    assert "using" in finish(words(out, **options), 2)
    assert_equal_runs(out, sharded)
    assert shards(out) == shards_named(out)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("how", ["alone", "in the storage data"])
def test_a_pickle_in_the_shards_runs_nothing(sharded, words, tmp_path, capsys, how):
    """Neither when it is read nor when it is loaded."""
    out, made = tmp_path / "out", tmp_path / "made"
    shutil.copytree(sharded, out)
    path = out / "shards-4" / ".metadata"
    content = Malicious(str(made))
    if how != "alone":
        metadata = pickle.loads(path.read_bytes())
        metadata.planner_data, content = content, metadata
    path.write_bytes(pickle.dumps(content))
    assert read_latest(str(out))["iter_num"] == 3
    assert "ckpt.pt is damaged" in capsys.readouterr().err
    if how != "alone":
        finish(words(out, **{**SMALL, "parallel": "fsdp", "max_iters": 4}), 2)
    assert not made.exists()


def test_a_pickle_as_a_checkpoint_runs_nothing(tmp_path):
    made = tmp_path / "made"
    torch.save({"model": Malicious(str(made)), "model_args": {}}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="damaged or no checkpoint"):
        read_latest(str(tmp_path))
    assert not made.exists()
