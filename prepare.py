"""Text to training data: data/<name>/train.bin, val.bin and meta.json; and the tokenizers.

    python prepare.py tinystories | openwebtext | shakespeare | shakespeare_char | pydoc
    python prepare.py text --name=mine --input FILES, FOLDERS, *.jsonl, *.parquet
    python prepare.py hf --dataset=ID

Plain text is cut into documents at <|endoftext|>; a file is at least one. pydoc, the texts of
Python's own help(), needs no network. The text is read twice: first to count, so that a fault in it
shows before the hours of work; then it is encoded on all cores, in order. A run that was stopped or
killed goes on when the same command is given again, and the bins come out byte for byte the same.
"""

import codecs
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import signal
import sys
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from config import read_config
from support.errors import UserError, cli, fail
from support.files import locked, rename, sha256
from support.tokenizer import END_OF_TEXT, SPLITS, Tokenizer, load_meta

BLOCK = 1 << 20         # characters read, and encoded, at a time
WORKER_SHARE = 8 << 20  # characters for which one more process pays
SAVE_EVERY = 5.0        # seconds of work that a killed run loses at most

# Where a long document may be cut without changing its tokens: before the first of some spaces,
# after a lone newline and before a word, or, as Chinese and Japanese have no spaces, after a letter
# and before a mark of theirs. In no vocabulary of tiktoken's does a token span any of these.
SAFE_CUT = re.compile(r"\S(?= )|\S\n(?=\w)|[^\W_](?=[\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f])")

TINY_SHAKESPEARE = \
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
# What is special about a corpus; else: tokenizer gpt2, val_fraction 0.05, documents are marked
CORPORA: dict[str, dict[str, Any]] = {
    "tinystories": dict(dataset="roneneldan/TinyStories", val_split="validation",
                        val_fraction=0.005),
    # the Hub's own conversion, because the corpus's loading script no longer runs
    "openwebtext": dict(dataset="Skylion007/openwebtext", revision="refs/convert/parquet",
                        val_fraction="nanogpt"),
    "shakespeare": dict(url=TINY_SHAKESPEARE, val_fraction=0.1, mark=False),
    "shakespeare_char": dict(url=TINY_SHAKESPEARE, val_fraction=0.1, tokenizer="char"),
    "pydoc": dict(val_fraction=0.1, tokenizer="bytes"),
    "text": {},
    "hf": {},
}
OPENWEBTEXT_DOCUMENTS = 8_013_769


@dataclass
class PrepareConfig:
    corpus: Literal["tinystories", "openwebtext", "shakespeare", "shakespeare_char", "pydoc",
                    "text", "hf"] | None = None  # what to prepare: the first word
    name: str | None = None          # folder in data_dir (auto: the corpus, or the end of dataset)
    input: tuple[str, ...] = ()      # your copy of a corpus, or your own text: files or folders
    val_input: tuple[str, ...] = ()  # the same for the validation split
    dataset: str | None = None       # hf: name on the Hugging Face Hub, or a local folder
    subset: str | None = None        # hf: its configuration
    split: str = "train"             # what to read from the Hub; also a part, train[:1%]
    val_split: str | None = None     # what to validate on from the Hub (auto: tinystories has it)
    field: str = "text"              # the text's name in JSON lines, in parquet and on the Hub
    # gpt2 or another of tiktoken's, bytes, char (auto: gpt2; pydoc: bytes; shakespeare_char: char)
    tokenizer: str | None = None
    # Share of the documents to validate on, drawn by a seeded hash; if there is only one document,
    # its end. auto: none if there is a validation text (val_input, val_split); openwebtext:
    # nanoGPT's documents; tinystories: 0.005; shakespeare and pydoc: 0.1; other text: 0.05.
    # The YuriiFormer paper: 0.05 of openwebtext, 0.005 of tinystories' train split.
    val_fraction: float | None = None
    seed: int = 2357                 # of that draw
    data_dir: str = "data"           # where the folders of all data are
    num_proc: int | None = None      # processes (auto: one for each core)
    overwrite: bool = False          # replace data made with other settings


# -----------------------------------------------------------------------------
# Tokenizers


# -----------------------------------------------------------------------------
# A data folder as train.py, sample.py and bench.py see it


# -----------------------------------------------------------------------------
# Reading: all text becomes pieces, (text, whether its document ends here)

Piece = tuple[str, bool]


def _decode(decoder: codecs.IncrementalDecoder, data: bytes, path: Path, end: int) -> str:
    """The bytes of a file before its byte `end` as text; an error names the file and the byte."""
    try:
        return decoder.decode(data, final=not data)
    except UnicodeDecodeError as error:  # error.object begins with bytes held back earlier
        fail(f"{path} is not UTF-8 text: byte {end - len(error.object) + error.start}")


def _blocks(path: Path) -> Iterator[str]:
    """A file in blocks of about BLOCK characters, ending at safe cuts, never in a separator."""
    decoder, rest, data = codecs.getincrementaldecoder("utf-8")(), "", b"start"
    with open(path, "rb") as file:
        while data:
            data, start = file.read(BLOCK), len(rest)
            rest += _decode(decoder, data, path, file.tell())
            if len(rest) > BLOCK and (cut := SAFE_CUT.search(rest, start)):
                yield rest[:cut.end()]
                rest = rest[cut.end():]
    yield rest


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


def _record_pieces(texts: Iterable[Any], where: str) -> Iterator[Piece]:
    """One document for each record, even an empty one."""
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            fail(f"{where}: record {number} has {text!r:.40} for its text")
        yield text, True


def _check_field(field: str, there: Iterable[str], where: str) -> None:
    if field not in there:
        fail(f"{where} has no field {field}; --field chooses one of: {', '.join(there)}")


def _jsonl_texts(path: Path, field: str) -> Iterator[Any]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            text = _decode(codecs.getincrementaldecoder("utf-8")(), line, path, file.tell())
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                fail(f"{path}, line {number} is not JSON: {error}")
            _check_field(field, record if isinstance(record, dict) else {},
                         f"{path}, line {number}")
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


def _file_pieces(files: Iterable[Path], field: str) -> Iterator[Piece]:
    readers = {".jsonl": _jsonl_texts, ".parquet": _parquet_texts}
    for path in files:
        if path.suffix in readers:
            yield from _record_pieces(readers[path.suffix](path, field), str(path))
        else:
            yield from text_pieces(path)


def _list_files(inputs: Iterable[str]) -> list[Path]:
    """The files that are named; of a folder all but the hidden ones, sorted by path."""
    files: list[Path] = []
    for top in map(Path, inputs):
        if not top.exists():
            fail(f"no file or folder {top}")
        files += [top] if not top.is_dir() else sorted(
            p for p in top.rglob("*")
            if p.is_file() and not any(part[0] == "." for part in p.relative_to(top).parts))
    return files


def _dataset_pieces(dataset, where: str, field: str) -> Iterator[Piece]:
    """The rows of a `datasets.Dataset`, a few at a time."""
    _check_field(field, dataset.column_names, where)
    tables = dataset.select_columns([field]).with_format("arrow").iter(batch_size=256)
    return _record_pieces((text for t in tables for text in t.column(0).to_pylist()), where)


def _open_sources(c: PrepareConfig) -> list[Callable[[], Iterator[Piece]]]:
    """What reads the text from its start; and the same for the validation text, if there is one."""
    if c.input:
        return [functools.partial(_file_pieces, _list_files(inputs), c.field)
                for inputs in (c.input, c.val_input) if inputs]
    if c.corpus == "pydoc":
        from pydoc_data.topics import topics

        return [lambda: _record_pieces((topics[key] for key in sorted(topics)), "pydoc")]
    where, splits = _where(c), [split for split in (c.split, c.val_split) if split]
    try:
        if "url" in CORPORA[c.corpus]:
            with urllib.request.urlopen(where, timeout=60) as page:
                text = page.read().decode()
            return [lambda: _record_pieces([text], where)]
        from datasets import load_dataset

        revision = CORPORA[c.corpus].get("revision")
        loaded = load_dataset(where, c.subset, revision=revision, split=splits)
    except Exception as error:  # the library's own, the network's, the disk's: anything
        reason = next(iter(str(error).splitlines()), "")
        hint = "" if c.corpus == "hf" else "; --input=FILES reads your own copy, without a network"
        fail(f"cannot load {where}: {type(error).__name__}: {reason:.200}{hint}")
    return [functools.partial(_dataset_pieces, rows, f"{where}, {split}", c.field)
            for rows, split in zip(loaded, splits, strict=True)]


def _where(c: PrepareConfig) -> str:
    """The source of the text, in words or as an address."""
    if c.corpus == "pydoc":
        return f"pydoc_data.topics of Python {platform.python_version()}"
    corpus = CORPORA[c.corpus]
    return " ".join(c.input) or c.dataset or corpus.get("url") or corpus["dataset"]


# -----------------------------------------------------------------------------
# Which documents are for validation


def hash_rule(n: int, fraction: float, seed: int) -> Callable[[int], bool]:
    """Of document i: whether a hash of seed and i, as a number in [0, 1), is below `fraction`. Of
    the first documents the lowest is always for validation and the highest never."""
    def draw(i: int) -> float:
        digest = hashlib.blake2b(f"{seed} {i}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2**64

    lowest, *_, highest = sorted(range(min(n, 10_000)), key=draw)
    return lambda i: i == lowest or (i != highest and draw(i) < fraction)


def nanogpt_rule(n: int, seed: int = 2357) -> Callable[[int], bool]:
    """Of document i: whether nanoGPT validates on it (`datasets` drew these: 0.05 % of n)."""
    chosen = np.random.default_rng(seed).permutation(n)[:math.ceil(0.0005 * n)]
    return set(chosen.tolist()).__contains__


def _cut_in_two(pieces: Iterable[Piece], limit: int) -> Iterator[Piece]:
    """One document as two, the first of `limit` characters."""
    for text, ends in pieces:
        if 0 < limit <= len(text):
            yield text[:limit], True
            text, limit = text[limit:], 0
        limit -= len(text) if limit else 0
        yield text, ends


def _split(c: PrepareConfig, pieces: Iterator[Piece], n: list[int],
           characters: int) -> tuple[Iterator[Piece], Callable[[int], bool], str]:
    """(pieces, whether document i is for validation, that rule in words).

    n: documents of the text, and of the validation text if there is one.
    """
    if len(n) == 2:
        return pieces, lambda i: i >= n[0], "a validation text of its own"
    fraction = c.val_fraction or CORPORA[c.corpus].get("val_fraction", 0.05)
    if n[0] == 1:
        limit = int(characters * (1 - (0.0005 if fraction == "nanogpt" else fraction)))
        return _cut_in_two(pieces, limit), bool, f"one document, cut after {limit} characters"
    if fraction == "nanogpt":
        return pieces, nanogpt_rule(n[0], c.seed), \
            f"nanoGPT's: default_rng({c.seed}).permutation({n[0]}), the first 0.05 %"
    return pieces, hash_rule(n[0], fraction, c.seed), \
        f"documents whose hash with seed {c.seed} is below {fraction}"


# -----------------------------------------------------------------------------
# Encoding, on all cores


def _batches(pieces: Iterable[Piece], is_val: Callable[[int], bool]) -> Iterator[list]:
    """Lists of (split, text, whether its document ends here) with about BLOCK characters."""
    batch, size, document = [], 0, 0
    for text, ends in pieces:
        batch.append((SPLITS[is_val(document)], text, ends))
        size, document = size + len(text) + 1, document + ends
        if size >= BLOCK:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(name: str, alphabet: str, mark: bool, batch: list) -> tuple[dict, int]:
    """In a worker: a batch -> ({split: (ids, documents that end)}, characters)."""
    tokenizer, found = Tokenizer(name, alphabet), {}
    for split in SPLITS:
        pieces = [(text, ends) for s, text, ends in batch if s == split]
        ids = tokenizer.encode_pieces(pieces, mark)
        if ids.size and ids.max() >= tokenizer.n_vocab:
            fail(f"the token id {ids.max()} does not fit a vocabulary of {tokenizer.n_vocab}")
        found[split] = ids.astype(tokenizer.dtype), sum(ends for _, ends in pieces)
    return found, sum(len(text) for _, text, _ in batch)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and die when it does, even if it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _map(function: Callable, items: Iterable, workers: int) -> Iterator:
    """`map` on some processes, in order, with few items in flight: memory stays bounded."""
    if workers < 2:
        yield from map(function, items)
        return
    spawn, in_flight = multiprocessing.get_context("spawn"), deque()
    with ProcessPoolExecutor(workers, spawn, _start_worker) as pool:
        try:
            for item in items:
                in_flight.append(pool.submit(function, item))
                if len(in_flight) > 2 * workers:
                    yield in_flight.popleft().result()
            while in_flight:
                yield in_flight.popleft().result()
        except BrokenProcessPool:
            fail("a worker process died (out of memory?); the same command continues, perhaps "
                 "with a smaller --num_proc")
        finally:
            pool.shutdown(cancel_futures=True)


# -----------------------------------------------------------------------------
# Writing. name/partial holds growing bins and progress.json. When it holds meta.json as well they
# are complete, and move to name/, meta.json last; a killed move is finished by the next run


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """All of it or nothing."""
    new = path.with_suffix(".new")
    with open(new, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    rename(new, path)


def _move_into_place(partial: Path) -> None:
    (partial / "progress.json").unlink(missing_ok=True)
    for name in ("train.bin", "val.bin", "meta.json"):
        if (partial / name).exists():
            rename(partial / name, partial.parent / name)
    shutil.rmtree(partial)


def _find_complete(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The meta of data made with `settings`, None if there is no data, UserError if other data."""
    if not any((folder / f"{split}.bin").exists() for split in SPLITS):
        return None
    meta = load_meta(folder)
    old = meta.get("settings")
    old = old if isinstance(old, dict) else {}
    if other := [key for key in settings | old if settings.get(key) != old.get(key)]:
        what = "; ".join(f"{key}: {old.get(key)!r:.60}, now {settings.get(key)!r:.60}"
                         for key in other) if old else "by nanoGPT"
        fail(f"{folder} has other data ({what}); --overwrite replaces it, --name=NAME keeps both")
    return meta


def _load_progress(partial: Path, start: dict[str, Any], width: int) -> dict[str, Any]:
    """The state of an interrupted run for the same data, else `start`."""
    if not (partial / "progress.json").exists():
        return start
    try:
        old = json.loads((partial / "progress.json").read_text(encoding="utf-8"))
        if old["wanted"] == start["wanted"] and all(
                os.path.getsize(partial / f"{s}.bin") >= old[s]["tokens"] * width for s in SPLITS):
            if old["batches"]:
                print(f"continuing an interrupted run after {old['characters']:,} characters")
            return old
    except (OSError, ValueError, KeyError, TypeError):
        pass
    print("the interrupted run here had other settings or is damaged: starting anew")
    return start


def _progress_bar(what: str, total: int | None = None, done: int = 0):
    from tqdm import tqdm

    return tqdm(desc=what, total=total, initial=done, unit="char", unit_scale=True,
                mininterval=0.1 if sys.stderr.isatty() else 30)  # a log file wants few lines


def _write_bins(partial: Path, state: dict[str, Any], batches: Iterator[list], encode: Callable,
                workers: int, width: int) -> None:
    """Append to the bins from where `state` is, and keep it and progress.json up to date."""
    with contextlib.ExitStack() as stack:
        files = {s: stack.enter_context(open(partial / f"{s}.bin", "ab")) for s in SPLITS}
        for split, file in files.items():
            file.truncate(state[split]["tokens"] * width)

        def save() -> float:
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
            _write_json(partial / "progress.json", state)
            return time.monotonic()

        saved = save()
        bar = stack.enter_context(
            _progress_bar("encoding", state["wanted"]["characters"], state["characters"]))
        left = itertools.islice(batches, state["batches"], None)
        for found, characters in _map(encode, left, workers):
            for split, (ids, documents) in found.items():
                files[split].write(ids.tobytes())
                state[split]["tokens"] += len(ids)
                state[split]["documents"] += documents
            state["batches"] += 1
            state["characters"] += characters
            bar.update(characters)
            if time.monotonic() - saved >= SAVE_EVERY:
                saved = save()
        save()


# -----------------------------------------------------------------------------
# The command


def resolve(c: PrepareConfig) -> PrepareConfig:
    """`c` with its auto fields filled in (val_fraction apart). Raises UserError: all mistakes."""
    if c.corpus is None:
        fail(f"say what to prepare: python prepare.py {' | '.join(CORPORA)}")
    corpus = CORPORA[c.corpus]
    c = dataclasses.replace(
        c, name=c.name or (c.dataset or c.corpus).rstrip("/").split("/")[-1],
        tokenizer=c.tokenizer or corpus.get("tokenizer", "gpt2"),
        num_proc=os.cpu_count() or 1 if c.num_proc is None else c.num_proc,
        val_split=c.val_split or (corpus.get("val_split") if not c.input and not c.val_fraction
                                  else None))
    rules = {
        "text needs --input=FILES": c.corpus == "text" and not c.input,
        "hf needs --dataset=ID": c.corpus == "hf" and not c.dataset,
        f"{c.corpus} takes no --input; text does": c.corpus in ("hf", "pydoc") and c.input,
        "--dataset and --subset are hf's": c.corpus != "hf" and (c.dataset or c.subset),
        "--val_split is for text from the Hub": c.val_split and (c.input or c.corpus == "pydoc"),
        "--val_input needs --input": c.val_input and not c.input,
        "--val_fraction does not go with --val_input or --val_split":
            c.val_fraction is not None and (c.val_input or c.val_split),
        f"val_fraction={c.val_fraction}: expected more than 0 and less than 1":
            c.val_fraction is not None and not 0 < c.val_fraction < 1,
        f"num_proc={c.num_proc}: expected at least 1": c.num_proc < 1,
        f"seed={c.seed}: expected 0 to 2**63 - 1": not 0 <= c.seed < 2**63,
        f"name={c.name}: expected a folder name without slashes":
            Path(c.name).name != c.name or c.name == "..",
    }
    if any(rules.values()):
        fail(*(message for message, broken in rules.items() if broken))
    return c


def _settings(c: PrepareConfig) -> dict[str, Any]:
    """All that the bins depend on, for meta.json; files by name, size and time."""
    settings = {key: value for key, value in vars(c).items()
                if key not in ("name", "data_dir", "num_proc", "overwrite")}
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns)
             for path in _list_files((*c.input, *c.val_input))]
    settings["files"] = len(stats), hashlib.sha256(repr(stats).encode()).hexdigest()[:16]
    settings["source"] = _where(c)
    return json.loads(json.dumps(settings))  # tuples become lists, as in a file


def _count(source: Callable[[], Iterator[Piece]], alphabet: set[str] | None) -> tuple[int, int]:
    """(documents, characters); adds the characters that occur to `alphabet`."""
    documents = characters = 0
    with _progress_bar("reading") as bar:
        for text, ends in source():
            documents, characters = documents + ends, characters + len(text)
            bar.update(len(text))
            if alphabet is not None:
                alphabet.update(text)
    return documents, characters


def prepare(c: PrepareConfig) -> dict[str, Any]:
    """Make data_dir/name, unless it is complete; return its meta. Raises UserError, OSError."""
    c = resolve(c)
    folder = Path(c.data_dir, c.name)
    partial = folder / "partial"
    settings, alphabet = _settings(c), set() if c.tokenizer == "char" else None
    tokenizer = Tokenizer(c.tokenizer)  # the name exists
    if (partial / "meta.json").exists():
        _move_into_place(partial)
    if not c.overwrite and (meta := _find_complete(folder, settings)):
        print(f"{folder} is complete already")
        if partial.exists() and not (partial / "progress.json").exists():  # killed while it went
            with contextlib.suppress(UserError), locked(partial, "in use"):
                shutil.rmtree(partial)
        return meta

    sources = _open_sources(c)
    n, sizes = zip(*(_count(source, alphabet) for source in sources), strict=True)
    if not all(n):
        fail(f"there is no text in {settings['source']}")
    if c.corpus == "openwebtext" and n[0] != OPENWEBTEXT_DOCUMENTS:
        print(f"partial: {n[0]:,} of OpenWebText's {OPENWEBTEXT_DOCUMENTS:,} documents")
    tokenizer = Tokenizer(c.tokenizer, "".join(sorted(alphabet or ())))
    mark = tokenizer.eot is not None and CORPORA[c.corpus].get("mark", True)
    pieces, is_val, rule = _split(
        c, itertools.chain.from_iterable(source() for source in sources), n, sizes[0])

    start = {"wanted": settings | {"documents": sum(n), "characters": sum(sizes)}, "batches": 0,
             "characters": 0, **{split: {"tokens": 0, "documents": 0} for split in SPLITS}}
    partial.mkdir(parents=True, exist_ok=True)
    with locked(partial, f"another prepare.py is writing to {folder}"):
        state = _load_progress(partial, start, tokenizer.dtype.itemsize)
        _write_bins(partial, state, _batches(pieces, is_val),
                    functools.partial(_encode, tokenizer.name, tokenizer.alphabet, mark),
                    min(c.num_proc, sum(sizes) // WORKER_SHARE), tokenizer.dtype.itemsize)
        if not all(state[split]["tokens"] for split in SPLITS):
            shutil.rmtree(partial)
            fail(f"too little text to split in {settings['source']}")
        for split in SPLITS:
            state[split]["sha256"] = sha256(partial / f"{split}.bin")
            print(f"{split} has {state[split]['tokens']:,} tokens, "
                  f"{state[split]['documents']:,} documents")
        meta = tokenizer.to_meta() | {split: state[split] for split in SPLITS} | {
            "split_rule": rule, "settings": settings}
        _write_json(partial / "meta.json", meta)
        _move_into_place(partial)
    return meta


def main(argv: list[str]) -> None:
    config, _ = read_config(PrepareConfig, argv, positional="corpus", usage=__doc__)
    try:
        prepare(config)
    except KeyboardInterrupt:
        fail("interrupted; the same command continues")
    except OSError as error:
        fail(f"{error.filename or config.data_dir}: {error.strerror or error}; once that is "
             f"mended, the same command continues")


if __name__ == "__main__":
    cli(main)
