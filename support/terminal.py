"""Lines and bars of progress."""

import os
import shutil
import sys
from collections.abc import Iterable


def clock(seconds: float) -> str:
    """h:mm:ss."""
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def progress(items: Iterable, what: str, shown: bool = True) -> Iterable:
    """The items, with a bar on standard error where that takes longer than five seconds."""
    try:
        from tqdm import tqdm
    except ImportError:  # it comes with datasets, which training does without
        return items
    return tqdm(items, desc=what, unit="batch", delay=5, leave=False, disable=not shown,
                mininterval=0.1 if sys.stderr.isatty() else 30)


def show(line: str, keep: bool = False) -> None:
    """On a terminal, lines that need not be kept overwrite each other, cut to its width."""
    if not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":
        print(line, flush=True)
    else:
        width = shutil.get_terminal_size().columns - 1
        print(f"\r{line if keep else line[:width]:<{width}}", end="\n" if keep else "", flush=True)
