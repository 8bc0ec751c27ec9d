"""TODO."""

import os
import sys
import textwrap
from typing import Any, NoReturn


class UserError(Exception):
    """A mistake the user can mend: printed as it is, one problem a line, exit code 2."""


def fail(*problems: str) -> NoReturn:
    """Raise one UserError that names all the problems."""
    raise UserError("\n".join(map(printable, problems)))


def printable(value: Any) -> str:
    """str(value) in one line that cannot steer a terminal, whatever file it comes from."""
    try:
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(value))
    except ValueError:  # Python prints no int of more than 4300 digits
        return "an enormous number"


def reason(error: BaseException) -> str:
    """An exception in one line: its kind and the first line that says something. Of torch's
    CheckpointException, which has those of several processes: one of them."""
    error = next(iter(getattr(error, "failures", {}).values()), (error,))[0]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return textwrap.shorten(": ".join([type(error).__name__, *lines[:1]]), 160)


def cli(main) -> None:
    """Run `main(argv)` as a program: a UserError ends it with its lines and exit code 2."""
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character
    try:
        main(sys.argv[1:])
    except BrokenPipeError:  # the reader of our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except UserError as error:
        sys.stdout.flush()
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        sys.exit(2)
