"""Locks on folders, and files that are written whole or not at all, whatever dies meanwhile."""

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

from support.errors import fail

try:
    import fcntl
except ImportError:  # Windows has no flock: there, nothing keeps two runs apart
    fcntl = None


@contextlib.contextmanager
def locked(folder: str | os.PathLike, message: str) -> Iterator[None]:
    """Hold a folder, made if need be, for this process; the operating system lets go when it dies,
    however it dies. UserError(message) if another process holds it."""
    os.makedirs(folder, exist_ok=True)
    if fcntl is None:  # an open file would only be in the way: Windows does not remove it
        yield
        return
    with open(os.path.join(folder, ".lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(message)
        except OSError as error:  # some shared file systems have no locks
            print(f"warning: {folder} cannot be locked ({error.strerror}): nothing keeps two runs "
                  f"apart there", file=sys.stderr)
        yield


def rename(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Rename a file over another so that it survives a power failure, where the system can."""
    os.replace(source, target)
    with contextlib.suppress(OSError):  # bring the name to the disk
        opened = os.open(os.path.dirname(target) or ".", os.O_RDONLY)
        os.fsync(opened)
        os.close(opened)


def write_text(path: str | os.PathLike, text: str) -> None:
    """All of it or nothing. What is not UTF-8, as in a file's name, is written as \\udcXX."""
    new = f"{path}.new"
    with open(new, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    rename(new, path)


def write_json(path: str | os.PathLike, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False))


def finite(content: Any) -> Any:
    """For JSON, which has no NaN and no infinity: null in their place."""
    return json.loads(json.dumps(content), parse_constant=lambda _: None)


def sha256(path: str | os.PathLike) -> str:
    """Of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
