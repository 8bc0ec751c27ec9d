"""What a file is, and its documents: text, JSON lines, parquet and data sets as pieces of text.

A piece is (text, whether its document ends with it). Files are read a block at a time, so that
memory grows neither with a file nor with a document (but with a list of JSON).
"""

import atexit
import contextlib
import gzip
import io
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from support.errors import UserError, fail, reason
from support.meta import END_OF_TEXT

Piece = tuple[str, bool]

BLOCK = 1 << 20  # characters read at a time

# Where a long document may be cut without changing its tokens: before the first of some spaces,
# after a lone newline and before a word, or, as Chinese and Japanese have no spaces, after a letter
# and before one of their punctuation marks. In no vocabulary of tiktoken's does a token span these.
SAFE_CUT = re.compile(r"\S(?= )|\S\n(?=\w)|[^\W_](?=[\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f])")


# -----------------------------------------------------------------------------
# Plain text


def _open(path: Path) -> BinaryIO:
    """The bytes of a file, unpacked if they are gzip's."""
    with open(path, "rb") as file:
        magic = file.read(20)
    if magic.startswith(b"\x28\xb5\x2f\xfd"):
        fail(f"{path} is packed by zstd; unpack it: zstd -d {path} -o FILE")
    if magic == b"version https://git-":
        fail(f"{path} only stands for a file that git-lfs fetches: git lfs pull")
    return gzip.open(path) if magic.startswith(b"\x1f\x8b") else open(path, "rb")


@contextlib.contextmanager
def _open_text(path: Path) -> Iterator[TextIO]:
    """The text of a file: any line end as a newline, like nanoGPT, and no byte-order mark."""
    with _open(path) as file:
        try:
            yield io.TextIOWrapper(file, "utf-8-sig")
        except UnicodeDecodeError as error:  # error.object begins with bytes held back earlier
            fail(f"{path} is not UTF-8 text: byte {file.tell() - len(error.object) + error.start}")


def _blocks(path: Path) -> Iterator[str]:
    """A file in blocks of about BLOCK characters, ending at safe cuts, never in a separator."""
    rest = ""
    with _open_text(path) as file:
        while data := file.read(BLOCK):
            start = len(rest)
            rest += data
            if len(rest) > BLOCK and (cut := SAFE_CUT.search(rest, start)):
                yield rest[:cut.end()]
                rest = rest[cut.end():]
        yield rest


def text_pieces(path: Path) -> Iterator[Piece]:
    """A text file's documents. A separator takes one newline on each side along; documents that
    are only white space are left out."""
    begun = False
    for block in _blocks(path):
        if "\0" in block:
            fail(f"{path} has zero bytes, so it is no text; unpack it, or fetch it again")
        block = block.replace("\n" + END_OF_TEXT, END_OF_TEXT)
        parts = block.replace(END_OF_TEXT + "\n", END_OF_TEXT).split(END_OF_TEXT)
        for i, text in enumerate(parts):
            ends = i < len(parts) - 1
            if begun or (text and not text.isspace()):
                yield text, ends
                begun = not ends
    if begun:
        yield "", True


# -----------------------------------------------------------------------------
# Records: one document each


def record_pieces(texts: Iterable[Any], where: str) -> Iterator[Piece]:
    """One document for each record, even an empty one."""
    for number, text in enumerate(texts, 1):
        text = text.decode() if isinstance(text, bytes) else text  # of binary columns
        if not isinstance(text, str):
            fail(f"{where}: record {number} has {text!r:.40} for its text; take such records out")
        yield text, True


def _check_field(field: str, names: Iterable[str], where: str) -> None:
    if field not in names:
        remedy = f"--field chooses one of: {', '.join(names)}" if names else "it needs fields"
        fail(f"{where} has no field {field}; {remedy}")


def _json_texts(path: Path, field: str) -> Iterator[Any]:
    """The field of each record: by pyarrow, which is fast; what that refuses by `json`."""
    import pyarrow
    from pyarrow.json import ParseOptions, ReadOptions, read_json

    schema, done = pyarrow.schema([(field, pyarrow.string())]), 0
    options = ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    how = ReadOptions(use_threads=False, block_size=2**31 - 1)  # threads may abort a program's end
    with contextlib.suppress(pyarrow.ArrowException, UnicodeDecodeError), _open(path) as file:
        while lines := b"".join(file.readlines(BLOCK)):
            texts = read_json(pyarrow.BufferReader(lines), how, options)[field].to_pylist()
            if None in texts:
                raise pyarrow.ArrowInvalid("null, or no such field")
            yield from texts
            done += len(texts)
        return
    yield from itertools.islice(_slow_json_texts(path, field), done, None)


def _slow_json_texts(path: Path, field: str) -> Iterator[Any]:
    """The same by `json`: a line is a record, or the file is a list of them, and read whole."""
    with _open_text(path) as file:
        is_list = file.read(4096).lstrip().startswith("[")
        file.seek(0)
        for number, words in enumerate([file.read()] if is_list else file, 1):
            if not words.strip():
                continue
            try:
                found = json.loads(words)
            except (json.JSONDecodeError, RecursionError) as error:
                line = number + getattr(error, "lineno", 1) - 1
                fail(f"{path}, line {line} is not JSON: {str(error).partition(': line')[0]}")
            for record in found if is_list else [found]:
                _check_field(field, record if isinstance(record, dict) else {},
                             f"{path}, {'a record' if is_list else f'line {number}'}")
                text = record[field]
                if isinstance(text, str):  # perhaps with escaped halves of characters
                    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
                yield text


def _parquet_texts(path: Path, field: str) -> Iterator[Any]:
    from pyarrow.parquet import ParquetFile

    file = ParquetFile(_open(path), pre_buffer=False)  # and no threads, either
    _check_field(field, file.schema_arrow.names, str(path))
    for batch in file.iter_batches(256, columns=[field], use_threads=False):
        yield from batch.column(0).to_pylist()


def dataset_pieces(dataset, where: str, field: str) -> Iterator[Piece]:
    """The rows of a `datasets.Dataset`, a few at a time."""
    _check_field(field, dataset.column_names, where)
    tables = dataset.select_columns([field]).with_format("arrow").iter(batch_size=256)
    texts = (text for table in tables for text in table.column(0).to_pylist())
    with _naming(where):
        yield from record_pieces(texts, where)


# -----------------------------------------------------------------------------
# Files and folders


@contextlib.contextmanager
def _naming(where: object) -> Iterator[None]:
    """What goes wrong in here names the source."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # a damaged file raises nearly anything
        fail(f"{where} cannot be read: {reason(error)}")


def _pieces(path: Path, field: str) -> Iterator[Piece]:
    """The documents of a file. What it is, its content says; names only keep what is damaged from
    passing for text."""
    with _open(path) as file:
        head = file.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()
    name = path.name.lower().removesuffix(".gz")
    if head.startswith(b"PAR1") or name.endswith(".parquet"):
        return record_pieces(_parquet_texts(path, field), str(path))
    begins = rb'\{[ \t]*"|\[\s*["{]|\[\]|\{(?=\s*").*"%b"\s*:' % re.escape(field.encode())
    if re.match(begins, head, re.DOTALL) or name.endswith((".jsonl", ".ndjson", ".jsonlines")):
        read = _slow_json_texts if head.startswith(b"[") else _json_texts
        return record_pieces(read(path, field), str(path))
    return text_pieces(path)


def file_pieces(files: Iterable[Path], field: str) -> Iterator[Piece]:
    """The documents of all files. field: the text's name in records."""
    for path in files:
        with _naming(path):
            yield from _pieces(path, field)


def list_files(inputs: Iterable[str]) -> list[Path]:
    """The files that are named; of a folder all but the hidden ones, sorted by path, behind links
    too (broken ones fail); of a pipe, which can be read only once, a copy that goes when we end."""
    files: list[Path] = []
    for top in map(Path, inputs):
        if top.is_dir():
            files += sorted(_files_in(top)) or fail(f"there is no text in {top}")
        elif top.is_file():
            files.append(top)
        elif top.exists():
            with (_naming(f"{top}, which is copied to {tempfile.gettempdir()} (TMPDIR),"),
                  open(top, "rb") as pipe,
                  tempfile.NamedTemporaryFile(prefix="pipe-", delete=False) as copy):
                atexit.register(os.remove, copy.name)
                shutil.copyfileobj(pipe, copy)
            files.append(Path(copy.name))
        else:
            fail(f"no file or folder {top}")
    return files


def _files_in(top: Path) -> Iterator[Path]:
    folders, seen = [top], set()
    for folder in folders:  # grows on the way; links may lead back
        if folder.resolve() not in seen:
            seen.add(folder.resolve())
            visible = [path for path in sorted(folder.iterdir()) if path.name[0] != "."]
            folders += [path for path in visible if path.is_dir()]
            yield from (path for path in visible if path.is_file() or not path.exists())
