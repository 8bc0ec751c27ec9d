"""Text to training data: data/<name>/train.bin, val.bin and meta.json.

    python prepare.py tinystories | openwebtext | shakespeare | shakespeare_char | pydoc
    python prepare.py text --name=mine --input FILES, FOLDERS (text, JSON, parquet)
    python prepare.py hf --dataset=ID

Plain text is cut into documents at <|endoftext|>; a file is at least one. pydoc, the texts of
Python's own help(), needs no network. The text is read twice: first to count, so that a fault in it
shows before the hours of work; then it is encoded on all cores, in order. A run that was stopped or
killed goes on when the same command is given again, and the bins come out byte for byte the same.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import platform
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

from config import check_least, check_rules, read_config
from support.errors import UserError, cli, explain_failures, fail, printable, reason
from support.files import locked, rename, sha256, write_json
from support.meta import SPLITS, load_meta
from support.text import Piece, dataset_pieces, file_pieces, list_files, record_pieces
from support.tokenizer import Tokenizer

BATCH = 1 << 20         # characters encoded at a time
WORKER_SHARE = 8 << 20  # characters for which one more process pays
SAVE_EVERY = 5.0        # seconds of work that a killed run loses at most
# what this process may use: SLURM, docker and taskset may leave it fewer than there are
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

TINY_SHAKESPEARE = \
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
# What is special about a corpus; else: tokenizer gpt2, val_fraction 0.05, documents are marked
CORPORA: dict[str, dict[str, Any]] = {
    "tinystories": dict(dataset="roneneldan/TinyStories", val_split="validation",
                        val_fraction=0.005),
    # the Hub's own conversion, because the corpus's loading script no longer runs
    "openwebtext": dict(dataset="Skylion007/openwebtext", revision="refs/convert/parquet",
                        val_fraction=0.0005),  # and nanoGPT's documents
    "shakespeare": dict(url=TINY_SHAKESPEARE, val_fraction=0.1, mark=False),
    "shakespeare_char": dict(url=TINY_SHAKESPEARE, val_fraction=0.1, tokenizer="char"),
    "pydoc": dict(val_fraction=0.1, tokenizer="bytes"),
    "text": {},
    "hf": {},
}
OPENWEBTEXT_DOCUMENTS = 8_013_769

Source = Callable[[], Iterator[Piece]]  # reads a text from its start
Rule = Callable[[int], bool]            # whether document i is for validation
Labelled = tuple[str, str, bool]        # (split, text, whether its document ends here)


@dataclass
class PrepareConfig:
    corpus: Literal[tuple(CORPORA)] | None = None  # what to prepare: the first word
    name: str | None = None          # folder in data_dir (auto: the corpus, or the end of dataset)
    input: tuple[str, ...] = ()      # your copy of a corpus, or your own text: files or folders
    val_input: tuple[str, ...] = ()  # the same for the validation split
    dataset: str | None = None       # hf: name on the Hugging Face Hub, or a local folder
    subset: str | None = None        # hf: its configuration
    split: str = "train"             # what to read from the Hub; also a part, train[:1%]
    val_split: str | None = None     # what to validate on from the Hub (auto: tinystories has it)
    field: str = "text"              # the text's name in JSON lines, in parquet and on the Hub
    # gpt2 or another of tiktoken's, bytes, char, or that of data/NAME or of FILE.pt (auto: gpt2;
    # pydoc: bytes; shakespeare_char: char)
    tokenizer: str | None = None
    # Share of the text to validate on: documents drawn by a seeded hash; where these are less than
    # half or more than twice the share, the end of the text. auto: none if there is a validation
    # text (val_input, val_split); openwebtext: nanoGPT's documents; tinystories: 0.005;
    # shakespeare and pydoc: 0.1; other text: 0.05.
    # The YuriiFormer paper: 0.05 of openwebtext, 0.005 of tinystories' train split.
    val_fraction: float | None = None
    seed: int = 2357                 # of that draw
    data_dir: str = "data"           # where the folders of all data are
    num_proc: int | None = None      # processes (auto: one for each core, at most 60)
    overwrite: bool = False          # replace data made with other settings

    def __post_init__(self) -> None:
        """Check what is said, and fill in what is auto, but for val_fraction."""
        self.name = self.name or (self.dataset or self.corpus or "none").rstrip("/").split("/")[-1]
        check_rules(self)
        corpus = CORPORA.get(self.corpus, {})
        if not (self.val_split or self.input or self.val_fraction):
            self.val_split = corpus.get("val_split")
        self.tokenizer = self.tokenizer or corpus.get("tokenizer", "gpt2")
        self.num_proc = self.num_proc or min(60, CORES)  # of more, Windows cannot wait for all

    def rules(self, rule: Callable[[object, str], None]) -> None:
        share = self.val_fraction
        rule(self.input or self.corpus != "text", "text needs --input=FILES")
        rule(self.dataset or self.corpus != "hf", "hf needs --dataset=ID")
        rule(self.corpus not in ("hf", "pydoc") or not self.input,
             f"{self.corpus} takes no --input; text does")
        rule(self.corpus == "hf" or not (self.dataset or self.subset),
             "--dataset and --subset are hf's")
        rule(not self.val_split or (self.corpus != "pydoc" and not self.input),
             "--val_split is for text from the Hub")
        rule(self.split not in (self.val_split, str(self.val_split).partition("[")[0]),
             f"--val_split={self.val_split} is what is trained on")
        rule(self.input or not self.val_input, "--val_input needs --input")
        rule(share is None or not (self.val_input or self.val_split),
             "--val_fraction does not go with --val_input or --val_split")
        rule(share is None or 0 < share < 1,
             f"val_fraction={share}: expected more than 0 and less than 1")
        check_least(self, rule, 1, "num_proc")
        rule(0 <= self.seed < 2**63, f"seed={self.seed}: expected 0 to 2**63 - 1")
        rule(Path(self.name).name == self.name != "..",
             f"name={self.name}: expected a folder name without slashes")


# -----------------------------------------------------------------------------
# Where the text comes from


def source_name(config: PrepareConfig) -> str:
    """The source of the text, in words or as an address."""
    if config.corpus == "pydoc":
        return f"pydoc_data.topics of Python {platform.python_version()}"
    corpus = CORPORA[config.corpus]
    return " ".join(config.input) or config.dataset or corpus.get("url") or corpus["dataset"]


def find_files(config: PrepareConfig) -> list[list[Path]]:
    """The files of the text; and those of the validation text, if there is one."""
    texts = [list_files(inputs) for inputs in (config.input, config.val_input) if inputs]
    names: dict[tuple[int, int], list[Path]] = {}  # of each file, which links may give others
    for path in (path for files in texts for path in files):
        status = os.stat(path)
        names.setdefault((status.st_dev, status.st_ino), []).append(path)
    if again := [paths[0] for paths in names.values() if len(paths) > 1]:
        print(f"warning: files given more than once: {len(again)}, first {printable(again[0])}; "
              f"trained on and validated on, they make the loss too good", file=sys.stderr)
    return texts


def open_sources(config: PrepareConfig, texts: list[list[Path]]) -> list[Source]:
    """What reads the text; and what reads the validation text, if there is one."""
    if texts:
        return [functools.partial(file_pieces, files, config.field) for files in texts]
    if config.corpus == "pydoc":
        from pydoc_data.topics import topics

        pages = [topics[key] for key in sorted(topics)]
        return [functools.partial(record_pieces, pages, "pydoc")]
    where = source_name(config)
    try:
        if "url" in CORPORA[config.corpus]:
            with urllib.request.urlopen(where, timeout=60) as page:
                text = page.read().decode()
            return [functools.partial(record_pieces, [text], where)]
        from datasets import load_dataset, load_from_disk

        splits = [split for split in (config.split, config.val_split) if split]
        if splits == ["train"] and not config.subset and Path(where, "state.json").exists():
            saved = load_from_disk(where)  # by save_to_disk
            return [functools.partial(dataset_pieces, saved, where, config.field)]
        revision = CORPORA[config.corpus].get("revision")
        loaded = load_dataset(where, config.subset, revision=revision, split=splits)
    except Exception as error:  # the library's own, the network's, the disk's: anything
        message = f"cannot load {where}: {reason(error.__cause__ or error)}"
        if config.corpus != "hf":
            message += "; --input=FILES reads your own copy, without a network"
        fail(message)
    if loaded[0].builder_name == "text":
        print(f"warning: datasets reads plain text by lines: each line of {where} is a document, "
              f"without its newline; text --input=FILES reads it whole", file=sys.stderr)
    return [functools.partial(dataset_pieces, rows, f"{where}, {split}", config.field)
            for rows, split in zip(loaded, splits, strict=True)]


# -----------------------------------------------------------------------------
# Which documents are for validation


def hash_rule(fraction: float, seed: int) -> Rule:
    """Of document i: whether a hash of seed and i, as a number in [0, 1), is below `fraction`."""
    def below(i: int) -> bool:
        digest = hashlib.blake2b(f"{seed} {i}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2**64 < fraction

    return below


def nanogpt_rule(n: int, seed: int = 2357) -> Rule:
    """Of document i: whether nanoGPT validates on it (`datasets` drew these: 0.05 % of n)."""
    chosen = set(np.random.default_rng(seed).permutation(n)[:math.ceil(0.0005 * n)].tolist())
    return lambda i: i in chosen


def draw(pieces: Iterable[Piece], for_validation: Rule) -> Iterator[Labelled]:
    document = 0
    for text, ends in pieces:
        yield "val" if for_validation(document) else "train", text, ends
        document += ends


def cut_in_two(pieces: Iterable[Piece], limit: int) -> Iterator[Labelled]:
    """The first `limit` characters are to train on; there a document ends, and another begins."""
    split, begun = "train", False
    for text, ends in pieces:
        if split == "train" and limit < len(text):
            if limit > 0 or begun:
                yield split, text[:limit], True
            split, text = "val", text[limit:]
        limit -= len(text)
        yield split, text, ends
        begun = not ends


def split_pieces(config: PrepareConfig, pieces: Iterator[Piece], counts: list[tuple],
                 share: float) -> tuple[Iterator[Labelled], str]:
    """(pieces with their splits, that rule in words). counts: (documents, characters, those drawn)
    of the text, and of the validation text if there is one."""
    n, characters, chosen = counts[0]
    if len(counts) == 2:
        return draw(pieces, lambda i: i >= n), "a validation text of its own"
    if config.corpus == "openwebtext" and not config.val_fraction and n >= 20:
        return (draw(pieces, nanogpt_rule(n, config.seed)),
                f"nanoGPT's: default_rng({config.seed}).permutation({n}), the first 0.05 %")
    if share / 2 * characters <= chosen <= 2 * share * characters and chosen < characters:
        return (draw(pieces, hash_rule(share, config.seed)),
                f"documents whose hash with seed {config.seed} is below {share}")
    limit = int(characters * (1 - share))
    return cut_in_two(pieces, limit), f"the text, cut after {limit} characters"


# -----------------------------------------------------------------------------
# Encoding, on all cores


def make_batches(pieces: Iterable[Labelled]) -> Iterator[list[Labelled]]:
    """Lists with about BATCH characters, the last perhaps empty."""
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[1]) + 1
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    yield batch


def encode_batch(tokenizer: Tokenizer, mark: bool, batch: list[Labelled]) -> tuple[dict, int]:
    """In a worker: a batch -> ({split: (ids, documents that end)}, characters)."""
    encoded = {}
    for split in SPLITS:
        pieces = [(text, ends) for its_split, text, ends in batch if its_split == split]
        ids = tokenizer.encode_pieces(pieces, mark)
        if ids.size and ids.max() >= tokenizer.n_vocab:
            fail(f"the token id {ids.max()} does not fit a vocabulary of {tokenizer.n_vocab}")
        encoded[split] = ids.astype(tokenizer.dtype), sum(ends for _, ends in pieces)
    return encoded, sum(len(text) for _, text, _ in batch)


def start_worker() -> None:
    """Leave Ctrl-C to the parent, and die when it does, even if it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def map_in_order(function: Callable, items: Iterable, workers: int) -> Iterator:
    """`map` on some processes, with few items in flight: memory stays bounded."""
    if workers < 2:
        yield from map(function, items)
        return
    in_flight = deque()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, start_worker) as pool:
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


def move_into_place(partial: Path) -> None:
    (partial / "progress.json").unlink(missing_ok=True)
    for name in ("train.bin", "val.bin", "meta.json"):
        if (partial / name).exists():
            rename(partial / name, partial.parent / name)
    shutil.rmtree(partial)


def find_complete(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The meta of data made with `settings`, None if there is no data, UserError if other data."""
    if not any((folder / f"{split}.bin").exists() for split in SPLITS):
        return None
    meta = load_meta(folder)
    old = meta.get("settings") or {}
    changes = [f"{key}: {old.get(key)!r:.60}, now {settings.get(key)!r:.60}"
               for key in settings | old if settings.get(key) != old.get(key)]
    if changes:
        what = "; ".join(changes) if old else "by nanoGPT"
        fail(f"{folder} has other data ({what}); --overwrite replaces it, --name=NAME keeps both")
    return meta


def load_progress(partial: Path, start: dict[str, Any], width: int) -> dict[str, Any]:
    """The state of an interrupted run for the same data, else `start`."""
    if not (partial / "progress.json").exists():
        return start
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # it may be damaged
        old = json.loads((partial / "progress.json").read_text(encoding="utf-8"))
        if old["wanted"] == start["wanted"] and all(
                os.path.getsize(partial / f"{s}.bin") >= old[s]["tokens"] * width for s in SPLITS):
            if old["batches"]:
                print(f"continuing an interrupted run after {old['characters']:,} characters")
            return old
    print("the interrupted run here had other settings or is damaged: starting anew")
    return start


def progress_bar(what: str, total: int | None = None, done: int = 0):
    from tqdm import tqdm

    return tqdm(desc=what, total=total, initial=done, unit="char", unit_scale=True,
                mininterval=0.1 if sys.stderr.isatty() else 30)  # a log file wants few lines


def write_bins(partial: Path, state: dict[str, Any], batches: Iterator[list], encode: Callable,
               workers: int, width: int) -> None:
    """Append to the bins from where `state` is, and keep it and progress.json up to date."""
    with contextlib.ExitStack() as stack:
        files = {s: stack.enter_context(open(partial / f"{s}.bin", "ab")) for s in SPLITS}
        for split, file in files.items():
            file.truncate(state[split]["tokens"] * width)

        def save() -> None:
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
            write_json(partial / "progress.json", state)

        save()
        saved_at = time.monotonic()
        bar = stack.enter_context(
            progress_bar("encoding", state["wanted"]["characters"], state["characters"]))
        remaining = itertools.islice(batches, state["batches"], None)
        for encoded, characters in map_in_order(encode, remaining, workers):
            for split, (ids, documents) in encoded.items():
                files[split].write(ids.tobytes())
                state[split]["tokens"] += len(ids)
                state[split]["documents"] += documents
            state["batches"] += 1
            state["characters"] += characters
            bar.update(characters)
            if time.monotonic() - saved_at >= SAVE_EVERY:
                save()
                saved_at = time.monotonic()
        save()


# -----------------------------------------------------------------------------
# The command


def data_settings(config: PrepareConfig, tokenizer: Tokenizer,
                  texts: list[list[Path]]) -> dict[str, Any]:
    """All that the bins depend on, for meta.json; files by name, size and time."""
    settings = {key: value for key, value in vars(config).items()
                if key not in ("name", "data_dir", "num_proc", "overwrite")}
    folders = [config.dataset] if config.dataset and os.path.isdir(config.dataset) else []
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns)
             for files in [*texts, list_files(folders)] for path in files]
    settings["files"] = len(stats), hashlib.sha256(repr(stats).encode()).hexdigest()[:16]
    settings["source"] = source_name(config)
    settings["tokenizer"], settings["alphabet"] = tokenizer.name, tokenizer.alphabet or None
    return json.loads(json.dumps(settings))  # tuples become lists, as in a file


def count(source: Source, alphabet: set[str] | None, drawn: Rule) -> tuple[int, int, int]:
    """(documents, characters, those in drawn documents); adds what occurs to `alphabet`."""
    documents = characters = chosen = 0
    with progress_bar("reading") as bar:
        for text, ends in source():
            characters += len(text)
            chosen += len(text) * drawn(documents)
            documents += ends
            bar.update(len(text))
            if alphabet is not None:
                alphabet.update(text)
    return documents, characters, chosen


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Make data_dir/name, unless it is complete; return its meta. Raises UserError, OSError."""
    if config.corpus is None:
        fail(f"say first what to prepare: python prepare.py {' | '.join(CORPORA)}")
    folder = Path(config.data_dir, config.name)
    partial = folder / "partial"
    texts = find_files(config)
    tokenizer = Tokenizer.find(config.tokenizer)
    settings = data_settings(config, tokenizer, texts)
    if (partial / "meta.json").exists():
        move_into_place(partial)
    if not config.overwrite and (meta := find_complete(folder, settings)):
        print(f"{folder} is complete already")
        if partial.exists() and not (partial / "progress.json").exists():  # its removal was killed
            with contextlib.suppress(UserError), locked(partial, "in use"):
                shutil.rmtree(partial)
        return meta

    sources = open_sources(config, texts)
    sources = [lambda read=source, divide=tokenizer.divide: divide(read()) for source in sources]
    alphabet = set() if tokenizer.name == "char" else None
    share = config.val_fraction or CORPORA[config.corpus].get("val_fraction", 0.05)
    counts = [count(source, alphabet, hash_rule(share, config.seed)) for source in sources]
    documents, characters, _ = zip(*counts, strict=True)
    if not all(documents):
        fail(f"there is no text in {settings['source']}")
    if config.corpus == "openwebtext" and documents[0] != OPENWEBTEXT_DOCUMENTS:
        print(f"partial: {documents[0]:,} of OpenWebText's {OPENWEBTEXT_DOCUMENTS:,} documents")
    if tokenizer.alphabet:  # given: it has all that occurs, or says what not
        tokenizer.encode("".join(alphabet))
    elif alphabet is not None:
        tokenizer = Tokenizer("char", "".join(sorted(alphabet)))
    mark = tokenizer.eot is not None and CORPORA[config.corpus].get("mark", True)
    pieces = itertools.chain.from_iterable(source() for source in sources)
    labelled, rule = split_pieces(config, pieces, counts, share)
    wanted = settings | {"documents": sum(documents), "characters": sum(characters), "rule": rule}
    start = {"wanted": wanted, "batches": 0, "characters": 0,
             **{split: {"tokens": 0, "documents": 0} for split in SPLITS}}

    with locked(partial, f"another prepare.py is writing to {folder}"):
        state = load_progress(partial, start, tokenizer.dtype.itemsize)
        write_bins(partial, state, make_batches(labelled),
                   functools.partial(encode_batch, tokenizer, mark),
                   min(config.num_proc, sum(characters) // WORKER_SHARE), tokenizer.dtype.itemsize)
        if not all(state[split]["tokens"] for split in SPLITS):
            shutil.rmtree(partial)
            fail(f"too little text to split in {settings['source']}")
        for split in SPLITS:
            state[split]["sha256"] = sha256(partial / f"{split}.bin")
            print(f"{split} has {state[split]['tokens']:,} tokens, "
                  f"{state[split]['documents']:,} documents")
        meta = tokenizer.to_meta() | {split: state[split] for split in SPLITS} | {
            "split_rule": rule, "settings": settings}
        write_json(partial / "meta.json", meta)
        move_into_place(partial)
    return meta


def main(argv: list[str]) -> None:
    config, _ = read_config(PrepareConfig, argv, positional="corpus", usage=__doc__)
    sys.stdout.failed = lambda error: None  # whoever reads what it prints, the data are made
    with explain_failures(config.data_dir, "once that is mended, the same command continues",
                          "lower --num_proc; the same command continues"):
        prepare(config)


if __name__ == "__main__":
    cli(main)
