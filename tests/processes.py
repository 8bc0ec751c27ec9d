"""Runs of train.py and prepare.py in processes of their own, alone or as the ranks of a run, and
what such a run has left.

A server that has imported torch once forks the processes, so that one starts in milliseconds.
"""

import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from support.checkpoint import CHECKPOINTS, read_checkpoint, read_latest

ROOT = Path(__file__).parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([  # and what a run imports later by itself
    "conftest", "sample", "torch.distributed.fsdp", "torch._dynamo",
    "torch._decomp.decompositions_for_rng", "numpy.random", "fsspec"])
# on `easy` every evaluation is the best
SMALL = dict(template="nesterov", dropout=0.1, save_interval=1, eval_interval=3, init_from="auto",
             n_layer=1, max_iters=6, dataset="easy")
LEFT_ALONE = "another process of this run has ended"


def _program(program: str, argv: list[str], environment: dict[str, str], output: str,
             hook: Callable | None) -> None:
    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup, or a shell's &, ignores these
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.argv = [f"{program}.py", *argv]
    from support import log
    from support.errors import cli

    module = __import__(program)
    log.draw_losses = lambda _: None  # half a second
    if hook is not None:
        hook()
    cli(module.main)


class Program:
    """`python train.py argv` as a process; hook() is called in it before main. `environment` is
    added to its own."""

    def __init__(self, argv: list[str], program: str = "train", hook: Callable | None = None,
                 **environment: str):
        with tempfile.NamedTemporaryFile(delete=False) as file:
            self.path = file.name
        self.process = CONTEXT.Process(
            target=_program, args=(program, argv, environment, self.path, hook))
        os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"  # for the server
        self.process.start()

    def wait(self, timeout: float = 120.0) -> int:
        """Its exit code; minus the signal that ended it. AssertionError if it does not end."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"still running after {timeout} s:\n{self.output}")
        return self.process.exitcode

    @property
    def output(self) -> str:
        """What it has printed, on both streams."""
        return Path(self.path).read_text(errors="replace")

    @property
    def pid(self) -> int:
        return self.process.pid

    def refused(self, *words: str) -> None:
        """It ended with code 2 and one line, which has these words."""
        assert self.wait(60) == 2, self.output
        lines = [line for line in self.output.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "Traceback" not in self.output, self.output
        assert all(word in lines[0] for word in words), lines[0]


def start_ranks(argv: list[str], world: int = 2, hook: Callable | None = None,
                **environment: str) -> list[Program]:
    """The processes that torchrun would start for `train.py argv` on one machine; one: train.py
    by itself."""
    if world == 1:
        return [Program(argv, hook=hook, **environment)]
    if "MASTER_PORT" not in environment:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            environment["MASTER_PORT"] = str(free.getsockname()[1])
    return [Program(argv, hook=hook, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                    MASTER_ADDR="127.0.0.1", **environment)
            for rank in range(world)]


def run_ranks(argv: list[str], world: int = 2, hook: Callable | None = None,
              **environment: str) -> str:
    """Run them to a good end; returns what rank 0 printed."""
    ranks = start_ranks(argv, world, hook, **environment)
    for rank in ranks:
        assert rank.wait() == 0, rank.output
    return ranks[0].output


def kill(programs: list[Program]) -> None:
    for program in programs:
        program.process.kill()
    for program in programs:
        program.wait()


def until(condition: Callable, timeout: float = 60.0):
    """Wait for it, and return it."""
    end = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)
    return found


# -----------------------------------------------------------------------------
# What a run has left


def steps_made(out) -> int:
    """By the whole lines of its log, whose last may be cut off."""
    path = Path(out, "log.jsonl")
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    made = [json.loads(line) for line in lines if line.endswith("\n")]
    return max([r["iter"] + 1 for r in made if r["type"] == "train"], default=0)


def checkpoints(out) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(out).glob("*.pt*")}


def state(out) -> dict:
    """All of the latest checkpoint that a resumed run must have in common with a whole one."""
    checkpoint = read_checkpoint(os.path.join(out, "ckpt.pt"))
    del checkpoint["config"], checkpoint["run"]["log_length"]
    return checkpoint


def survey(out, interval: int = 1) -> int:
    """What a run that was killed must have left. Returns the step of its latest checkpoint."""
    for name in CHECKPOINTS:
        path = os.path.join(out, name)
        if os.path.exists(path):
            weights = read_checkpoint(path)["model"].values()
            assert weights and all(torch.isfinite(w).all() for w in weights), name
    saved = read_latest(str(out))["iter_num"] if Path(out, "ckpt.pt").exists() else 0
    done = steps_made(out)  # before its last step the save of all before was over, if due
    assert (done - 1) // interval * interval <= saved <= done
    return saved
