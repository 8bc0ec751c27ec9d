"""What can happen to a process while it works: hooks for processes.Program, called in the child.

`kill_at` ends it with SIGKILL at a chosen moment of its work on files; `at_step` does one of the
other things when training comes to a step.
"""

import builtins
import io
import os
import resource
import signal
import sys
import time
from collections.abc import Callable

from conftest import rank as this_rank

SAVE = ("save", "clear_folder")  # of train.py
WRITE = ("write_bins", "write_json", "move_into_place")  # of prepare.py
OPERATIONS = ("fsync", "replace", "rename", "link", "remove", "unlink", "mkdir", "rmdir")


def die(last_words: str = "killed") -> None:
    print(last_words, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


class Watched:
    """A file being written. reached() is called in the middle of the 1st, 2nd, 4th, 8th, ... write,
    when all that came before is in the file."""

    def __init__(self, file, reached: Callable):
        self.file, self.reached, self.writes = file, reached, 0

    def __getattr__(self, name: str):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return self.file.__exit__(*error)

    def write(self, data) -> int:
        self.writes += 1
        half = 0
        if self.writes & (self.writes - 1) == 0:
            half = self.file.write(data[:len(data) // 2])
            self.file.flush()
            self.reached(f"within write {self.writes}")
        return half + self.file.write(data[half:])


def kill_at(fatal: int, program: str = "train", inside: tuple[str, ...] = SAVE,
            first: bool = False) -> None:
    """SIGKILL at the fatal-th moment (0: never) that is inside these functions of the program: on
    entering or leaving one, before or after an operation on a file or folder, or within a write.
    With `first` also at the step after the first save. Prints where; and at the end of each
    function the moments so far."""
    module = sys.modules[program]
    if this_rank() != 0:  # the others write nothing
        return
    count = depth = saves = 0

    def reached(where: str) -> None:
        nonlocal count
        if depth:
            count += 1
            if count == fatal:
                die(f"killed inside, at moment {count}: {where}")

    def watch(name: str, call: Callable) -> Callable:
        def operation(*args, **options):
            reached(f"before {name} {args[:1]}")
            result = call(*args, **options)
            reached(f"after {name} {args[:1]}")
            return result
        return operation

    def opened(path, mode="r", *args, **options):
        if not depth or mode[0] == "r":
            return plain_open(path, mode, *args, **options)
        reached(f"before opening {path}")
        return Watched(plain_open(path, mode, *args, **options), reached)

    def enter(function: Callable) -> Callable:
        def entered(*args, **options):
            nonlocal depth, saves
            depth += 1
            reached(f"entering {function.__name__}")
            result = function(*args, **options)
            reached(f"leaving {function.__name__}")
            depth -= 1
            saves += function.__name__ == "save"
            print(f"moments so far: {count}", flush=True)
            return result
        return entered

    def after_save(*args):
        if saves:
            die(f"killed after a save of {count} moments")
        return multiplier(*args)

    plain_open = builtins.open
    builtins.open = io.open = opened
    for name in OPERATIONS:
        setattr(os, name, watch(name, getattr(os, name)))
    for name in inside:
        setattr(module, name, enter(getattr(module, name)))
    if first:
        multiplier, module.lr_multiplier = module.lr_multiplier, after_save


def small_blocks(then: Callable | None = None) -> None:
    """prepare.py saves all the time, and has work for several processes."""
    import prepare
    from support import text

    text.BLOCK = prepare.BATCH = 1000
    prepare.SAVE_EVERY, prepare.WORKER_SHARE = 0.0, 1
    if then is not None:
        then()


def at_step(step: int | None, action: Callable, rank: int = 0, after: int | None = None) -> None:
    """action() in this rank when training comes to this step, or has made `after` steps."""
    import train

    if this_rank() != rank:
        return
    multiplier, begin = train.lr_multiplier, []

    def wrapped(now, config):
        begin.append(now)
        if now == (step if after is None else begin[0] + after):
            action()
        return multiplier(now, config)

    train.lr_multiplier = wrapped


def hang() -> None:
    time.sleep(1000)


def crash() -> None:
    raise ZeroDivisionError


def spoil_data() -> None:
    """The batches after those that were read already raise an error of the user's."""
    from support.data import Tokens
    from support.errors import fail

    Tokens.read = lambda *_: fail("train.bin has a fault")


def limit_files(size: int | None = None, log: str = "") -> None:
    """Let no file become longer than that, as if the disk were full; or than `log` almost is."""
    size = os.path.getsize(log) + 100 if log else size
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def slow_save() -> None:
    """Rank 0 writes for ever, and the others wait for it in a collective."""
    from support import resume

    def slowly(*args, **options):
        print("saving", flush=True)
        hang()

    resume.save_checkpoint = slowly


def without_hangups() -> None:
    """As nohup starts a program."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def lose_reader(step: int) -> None:
    """Standard output is a pipe, whose reader leaves at this step of training."""
    reader, writer = os.pipe()
    sys.stdout = open(writer, "w", buffering=1)
    at_step(step, lambda: os.close(reader))


def limit_resources(folder: str) -> None:
    """Work in this folder with 4 GiB of memory and four seconds of CPU (then SIGXCPU)."""
    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    resource.setrlimit(resource.RLIMIT_CPU, (4, 5))
