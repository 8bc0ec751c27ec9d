"""One-line errors for what a user can mend, and the wrapper that ends a program with them."""

import functools
import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, NoReturn


class UserError(Exception):
    """A mistake the user can mend: printed as it is, one problem a line, exit code 2."""


def fail(*problems: str) -> NoReturn:
    """Raise one UserError that names all the problems."""
    raise UserError("\n".join(map(printable, problems)))


def printable(value: Any) -> str:
    """str(value) in one line that cannot steer a terminal, whatever file it comes from."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(value))


def reason(error: BaseException) -> str:
    """An exception in one line: its kind and how what it says begins."""
    return textwrap.shorten(f"{type(error).__name__}: {error}".removesuffix(": "), 160)


def out_of_memory(error: BaseException) -> bool:
    """CUDA has an exception for it; its libraries, MPS and CPUs raise a plain RuntimeError."""
    words = ("out of memory", "can't allocate memory", "not enough memory", "status_alloc_failed")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


@contextmanager
def explain_failures(place: str, mend: str, shrink: str = "choose smaller sizes") -> Iterator[None]:
    """What the machine, or another process of a run, does to a program becomes a UserError: of the
    file or place, with how to mend that; of a full memory, with what to shrink."""
    try:
        yield
    except OSError as error:  # a full disk, a folder that may not be written to
        fail(f"{error.filename or place}: {error.strerror or error}; {mend}")
    except (RuntimeError, MemoryError) as error:
        if out_of_memory(error):
            fail(f"out of memory: {shrink}")
        kinds = [kind.__name__ for kind in type(error).__mro__]
        if "RANK" in os.environ and ("DistError" in kinds or "gloo" in str(error).lower()):
            said = str(error).rpartition("Last error:")[2]  # NCCL's, behind where it was raised
            fail(f"another process of this run has ended or does not answer; its own message, or "
                 f"torchrun's, says why ({textwrap.shorten(said, 160)})")
        raise


class Stream:
    """A standard stream, or nothing where it is closed. Where it fails (a full disk, a reader that
    has left), failed(error) is called, and what is written from then on goes nowhere."""

    def __init__(self, stream: Any):
        self.stream = stream or open(os.devnull, "w", encoding="utf-8", errors="replace")

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.stream, name)
        return functools.partial(self.attempt, found) if name in ("write", "flush") else found

    def attempt(self, method: Callable, *words: str) -> Any:
        try:
            return method(*words)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            self.failed(error)

    def failed(self, error: OSError) -> None:  # a program may set another
        if isinstance(error, BrokenPipeError):  # the reader of our output has left
            sys.exit(1)
        fail(f"standard output: {error.strerror}; print to another place")


def cli(main: Callable[[list[str]], None]) -> None:
    """Run `main(argv)` as a program: a UserError ends it with its lines and exit code 2."""
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # it may be closed
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character
    with redirect_stdout(Stream(sys.stdout)), redirect_stderr(Stream(sys.stderr)):
        sys.stderr.failed = lambda error: None
        try:
            try:
                main(sys.argv[1:])
            finally:
                sys.stdout.flush()
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)
        except UserError as error:
            for line in str(error).splitlines():
                print(f"error: {line}", file=sys.stderr)
            sys.exit(2)
