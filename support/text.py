"""What a file is, and its documents: text, JSON lines, parquet and data sets as pieces of text.

A piece is (text, whether its document ends with it). Files are read a block at a time, so that
memory grows neither with a file nor with a document.
"""

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from support.errors import fail
from support.tokenizer import END_OF_TEXT

Piece = tuple[str, bool]

BLOCK = 1 << 20  # characters read at a time

# Where a long document may be cut without changing its tokens: before the first of some spaces,
# after a lone newline and before a word, or, as Chinese and Japanese have no spaces, after a letter
# and before one of their punctuation marks. In no vocabulary of tiktoken's does a token span these.
SAFE_CUT = re.compile(r"\S(?= )|\S\n(?=\w)|[^\W_](?=[\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f])")


# -----------------------------------------------------------------------------
# Plain text


def _decode(decoder: codecs.IncrementalDecoder, data: bytes, path: Path, end: int) -> str:
    """The bytes of a file before its byte `end` as text; an error names the file and the byte."""
    try:
        return decoder.decode(data, final=not data)
    except UnicodeDecodeError as error:  # error.object begins with bytes held back earlier
        fail(f"{path} is not UTF-8 text: byte {end - len(error.object) + error.start}")


def _blocks(path: Path) -> Iterator[str]:
    """A file in blocks of about BLOCK characters, ending at safe cuts, never in a separator."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    rest = ""
    with open(path, "rb") as file:
        while data := file.read(BLOCK):
            start = len(rest)
            rest += _decode(decoder, data, path, file.tell())
            cut = SAFE_CUT.search(rest, start) if len(rest) > BLOCK else None
            if cut:
                yield rest[:cut.end()]
                rest = rest[cut.end():]
        yield rest + _decode(decoder, b"", path, file.tell())


def text_pieces(path: Path) -> Iterator[Piece]:
    """A text file's documents. A separator takes one newline on each side along; documents that
    are only white space are left out."""
    begun = False
    for block in _blocks(path):
        parts = block.split(END_OF_TEXT)
        for i, text in enumerate(parts):
            ends = i < len(parts) - 1
            if i > 0:
                text = text.removeprefix("\r").removeprefix("\n")
            if ends:
                text = text.removesuffix("\n").removesuffix("\r")
            if begun or (text and not text.isspace()):
                yield text, ends
                begun = not ends
    if begun:
        yield "", True


def cut_in_two(pieces: Iterable[Piece], limit: int) -> Iterator[Piece]:
    """One document as two, the first of `limit` characters."""
    left = limit  # characters before the cut
    for text, ends in pieces:
        if 0 < left <= len(text):
            yield text[:left], True
            text, left = text[left:], 0
        elif left > 0:
            left -= len(text)
        yield text, ends


# -----------------------------------------------------------------------------
# Records: one document each


def record_pieces(texts: Iterable[Any], where: str) -> Iterator[Piece]:
    """One document for each record, even an empty one."""
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            fail(f"{where}: record {number} has {text!r:.40} for its text")
        yield text, True


def _check_field(field: str, names: Iterable[str], where: str) -> None:
    if field not in names:
        fail(f"{where} has no field {field}; --field chooses one of: {', '.join(names)}")


def _jsonl_texts(path: Path, field: str) -> Iterator[Any]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            source = _decode(codecs.getincrementaldecoder("utf-8")(), line, path, file.tell())
            if not source.strip():
                continue
            try:
                record = json.loads(source)
            except (ValueError, RecursionError) as error:
                fail(f"{where} is not JSON: {error}")
            _check_field(field, record if isinstance(record, dict) else {}, where)
            text = record[field]
            if b"\\ud" in line.lower() and isinstance(text, str):  # escaped halves of characters
                text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            yield text


def _parquet_texts(path: Path, field: str) -> Iterator[Any]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(path)
        _check_field(field, file.schema_arrow.names, str(path))
        for batch in file.iter_batches(batch_size=256, columns=[field]):
            yield from batch.column(0).to_pylist()
    except pyarrow.ArrowException as error:
        fail(f"{path} is not a parquet file that can be read: {str(error).splitlines()[0]}")


def dataset_pieces(dataset, where: str, field: str) -> Iterator[Piece]:
    """The rows of a `datasets.Dataset`, a few at a time."""
    _check_field(field, dataset.column_names, where)
    tables = dataset.select_columns([field]).with_format("arrow").iter(batch_size=256)
    return record_pieces((text for table in tables for text in table.column(0).to_pylist()), where)


# -----------------------------------------------------------------------------
# Files and folders

RECORDS = {".jsonl": _jsonl_texts, ".parquet": _parquet_texts}  # everything else is plain text


def file_pieces(files: Iterable[Path], field: str) -> Iterator[Piece]:
    """The documents of all files. field: the text's name in records."""
    for path in files:
        if path.suffix in RECORDS:
            yield from record_pieces(RECORDS[path.suffix](path, field), str(path))
        else:
            yield from text_pieces(path)


def list_files(inputs: Iterable[str]) -> list[Path]:
    """The files that are named; of a folder all but the hidden ones, sorted by path."""
    files: list[Path] = []
    for top in map(Path, inputs):
        if not top.exists():
            fail(f"no file or folder {top}")
        if not top.is_dir():
            files.append(top)
            continue
        for path in sorted(top.rglob("*")):
            hidden = any(part.startswith(".") for part in path.relative_to(top).parts)
            if path.is_file() and not hidden:
                files.append(path)
    return files
