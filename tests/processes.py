"""Runs of train.py and prepare.py in processes of their own, alone or as the ranks of a run.

A server that has imported torch once forks them, so that one starts in milliseconds.
"""

import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([  # and what a run imports later by itself
    "train", "sample", "torch.distributed.fsdp", "torch.distributed.checkpoint", "torch._dynamo",
    "torch._decomp.decompositions_for_rng", "numpy.random", "fsspec"])


def _program(program: str, argv: list[str], environment: dict[str, str], output: str,
             hook: Callable | None) -> None:
    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.argv = [f"{program}.py", *argv]
    from support.errors import cli

    module = __import__(program)
    if program == "train":
        module.refresh_picture = lambda _: None  # half a second
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


def start_ranks(argv: list[str], world: int = 2, hook: Callable | None = None,
                **environment: str) -> list[Program]:
    """The processes that torchrun would start for `train.py argv` on one machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [Program(argv, hook=hook, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                    MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **environment)
            for rank in range(world)]


def run_ranks(argv: list[str], world: int = 2, hook: Callable | None = None,
              **environment: str) -> str:
    """Run them to a good end; returns what rank 0 printed."""
    ranks = start_ranks(argv, world, hook, **environment)
    for rank in ranks:
        assert rank.wait() == 0, rank.output
    return ranks[0].output
