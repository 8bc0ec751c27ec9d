"""TODO."""

import difflib
import json
import os
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from support.errors import fail

NAMED = ("tinystories", "openwebtext", "shakespeare", "shakespeare_char", "pydoc")
SPLITS = ("train", "val")
END_OF_TEXT = "<|endoftext|>"


class Tokenizer:
    """Text <-> token ids: `bytes`, `char` (with its alphabet), or one of tiktoken's encodings.

    n_vocab:      the number of ids
    padded_vocab: rows of an embedding table: n_vocab, for tiktoken's the next multiple of 128
    eot:          the id that ends a document; None for char
    dtype:        of the ids in the bins
    Raises UserError for a name that does not exist or cannot be downloaded.
    """

    def __init__(self, name: str, alphabet: str = ""):
        self.name, self.alphabet, self.bpe = name, alphabet, None
        self.ids = {character: i for i, character in enumerate(alphabet)}
        if name == "bytes":
            self.n_vocab, self.eot = 257, 256
        elif name == "char":
            self.n_vocab, self.eot = len(alphabet), None
        else:
            self.bpe = _tiktoken(name)
            self.n_vocab, self.eot = self.bpe.n_vocab, self.bpe.eot_token
        self.padded_vocab = -(-self.n_vocab // 128) * 128 if self.bpe else self.n_vocab
        self.dtype = np.dtype("<u2" if self.n_vocab <= 1 << 16 else "<u4")

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, in which <|endoftext|> is text like any other."""
        if self.bpe:
            return self.bpe.encode_ordinary(text)
        if self.name == "bytes":
            return list(text.encode("utf-8", "replace"))
        if unknown := set(text) - self.ids.keys():
            fail(f"this data's alphabet does not have {''.join(sorted(unknown))!r}")
        return [self.ids[character] for character in text]

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a prompt, in which <|endoftext|> is the end-of-text id, if there is one."""
        if self.eot is None:
            return self.encode(text)
        first, *others = map(self.encode, text.split(END_OF_TEXT))
        return first + [i for ids in others for i in (self.eot, *ids)]

    def encode_pieces(self, pieces: list[tuple[str, bool]], mark: bool) -> np.ndarray:
        """(text, whether its document ends here) -> ids (n,); with `mark`, eot after each end."""
        if self.bpe and mark and not any(END_OF_TEXT in text for text, _ in pieces):
            joined = "".join(text + END_OF_TEXT * ends for text, ends in pieces)  # one call: faster
            return self.bpe.encode_to_numpy(joined, allowed_special={END_OF_TEXT},
                                            disallowed_special=())
        return np.array([i for text, ends in pieces for i in
                         self.encode(text) + [self.eot] * (mark and ends)], dtype=np.int64)

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token, perhaps only a part of a character."""
        if token == self.eot:
            return END_OF_TEXT.encode()
        if self.name == "bytes":
            return bytes([token])
        if self.name == "char":
            return self.alphabet[token].encode("utf-8", "replace")
        try:
            return self.bpe.decode_single_token_bytes(token)
        except KeyError:  # some vocabularies have gaps
            return "\N{REPLACEMENT CHARACTER}".encode()

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def to_meta(self) -> dict[str, Any]:
        """What meta.json says of the tokenizer, for `from_meta`."""
        meta = {"tokenizer": self.name, "vocab_size": self.n_vocab,
                "padded_vocab_size": self.padded_vocab, "dtype": self.dtype.name}
        return meta | ({"alphabet": self.alphabet} if self.name == "char" else {})

    @classmethod
    def from_meta(cls, meta: dict[str, Any]) -> "Tokenizer":
        try:
            check_alphabet(meta)
        except (ValueError, KeyError, TypeError):
            fail(f"there is no such tokenizer: {str(meta)[:60]}")
        return cls(meta["tokenizer"], meta.get("alphabet", ""))


def check_alphabet(meta: dict[str, Any]) -> None:
    """Raises ValueError, KeyError or TypeError where these are not what `to_meta` says."""
    name, alphabet = meta["tokenizer"], meta.get("alphabet", "")
    if not isinstance(name, str) or not isinstance(alphabet, str) or (
            name == "char" and not 0 < len(set(alphabet)) == len(alphabet) == meta["vocab_size"]):
        raise ValueError(name)


def _tiktoken(name: str):
    import tiktoken

    names = ["bytes", "char", *tiktoken.list_encoding_names()]
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        fail(f"no tokenizer {name}; "
             + (f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"))
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # what it downloads with raises OSErrors
        fail(f"cannot download the tokenizer {name} ({type(error).__name__}): go online once, "
             f"or set TIKTOKEN_CACHE_DIR to a folder that has it, or use --tokenizer=bytes")


class _NoClasses(pickle.Unpickler):
    """nanoGPT's meta.pkl holds plain dicts; a class in it could run code."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def load_meta(folder: str | Path) -> dict[str, Any]:
    """meta.json of a data folder; or, where nanoGPT made the bins, what it would have said.

    At least tokenizer, vocab_size, padded_vocab_size, dtype, and tokens of "train" and "val";
    `Tokenizer.from_meta` takes it. Raises UserError if the data is missing, unfinished or damaged.
    """
    folder = Path(folder)
    missing = [split for split in SPLITS if not (folder / f"{split}.bin").is_file()]
    partial = folder / "partial"
    if (partial / "meta.json").exists() or (missing and partial.exists()):
        fail(f"{folder} is unfinished; if prepare.py was stopped there, run it again")
    if missing:
        named = folder.name in NAMED
        words = ("" if named else "text --input=FILES --name=") + folder.name
        if len(missing) == 1:
            fail(f"no {missing[0]}.bin in {folder}; make both with: python prepare.py {words} "
                 f"--overwrite")
        fail(f"no data in {folder}; make it with: python prepare.py {words}")
    sizes = {split: os.path.getsize(folder / f"{split}.bin") for split in SPLITS}
    if not (folder / "meta.json").exists():
        if odd := [split for split in SPLITS if sizes[split] % 2]:
            fail(f"{folder}/{odd[0]}.bin has {sizes[odd[0]]} bytes, and without a meta.json an id "
                 f"is two bytes, as nanoGPT's are: it is damaged; make it again")
        return _nanogpt_meta(folder) | {s: {"tokens": size // 2} for s, size in sizes.items()}
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        width = {"uint16": 2, "uint32": 4}[meta["dtype"]]
        wrong = [f"{s}.bin" for s in SPLITS if sizes[s] != meta[s]["tokens"] * width]
        rows, padded = meta["vocab_size"], meta["padded_vocab_size"]
        counts = rows, padded, *(meta[split]["tokens"] for split in SPLITS)
        if not all(type(n) is int for n in counts) or not 0 < rows <= padded < 2**31:
            raise ValueError(counts)
        check_alphabet(meta)
    except (ValueError, KeyError, TypeError, RecursionError):
        wrong = ["meta.json"]
    if wrong:
        fail(f"{folder} is damaged: {wrong[0]} does not fit the rest; make it again, --overwrite")
    return meta


def _nanogpt_meta(folder: Path) -> dict[str, Any]:
    """nanoGPT's ids are uint16: GPT-2's, or those of the table of characters in meta.pkl."""
    meta = {"tokenizer": "gpt2", "vocab_size": 50257, "padded_vocab_size": 50304}
    if (folder / "meta.pkl").exists():
        try:
            with open(folder / "meta.pkl", "rb") as file:
                itos = _NoClasses(file).load()["itos"]
            alphabet = "".join(itos[i] for i in range(len(itos)))
            if not 0 < len(alphabet) == len(set(alphabet)) == len(itos):
                raise ValueError("an entry is not a character")
        except Exception as error:  # a damaged pickle may raise anything
            fail(f"{folder}/meta.pkl is not a table of characters such as nanoGPT's: {error}")
        meta = Tokenizer("char", alphabet).to_meta()
    return meta | {"dtype": "uint16"}
TOKENIZER_KEYS = ("tokenizer", "vocab_size", "padded_vocab_size", "alphabet")  # of meta.json
