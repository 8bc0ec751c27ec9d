"""Tokenizers, and the meta.json of a data folder, which says how its bins were made.

Text <-> ids by bytes, by characters, or by one of tiktoken's vocabularies. `load_meta` also reads
the folders that nanoGPT's scripts make, which have no meta.json.
"""

import difflib
import json
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from support.errors import fail

SPLITS = ("train", "val")
END_OF_TEXT = "<|endoftext|>"
TOKENIZER_KEYS = ("tokenizer", "vocab_size", "padded_vocab_size", "alphabet")  # of meta.json
CORPORA = ("tinystories", "openwebtext", "shakespeare", "shakespeare_char", "pydoc")  # have names


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
        *ended, last = text.split(END_OF_TEXT)
        pieces = [*((part, True) for part in ended), (last, False)]
        return self.encode_pieces(pieces, mark=True).tolist()

    def encode_pieces(self, pieces: list[tuple[str, bool]], mark: bool) -> np.ndarray:
        """(text, whether its document ends here) -> ids (n,); with `mark`, eot after each end."""
        if self.bpe and mark and not any(END_OF_TEXT in text for text, _ in pieces):
            joined = "".join(text + END_OF_TEXT if ends else text for text, ends in pieces)
            return self.bpe.encode_to_numpy(joined, allowed_special={END_OF_TEXT},
                                            disallowed_special=())  # one call: faster
        ids: list[int] = []
        for text, ends in pieces:
            ids += self.encode(text)
            if mark and ends:
                ids.append(self.eot)
        return np.array(ids, dtype=np.int64)

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
        if self.name == "char":
            meta["alphabet"] = self.alphabet
        return meta

    @classmethod
    def from_meta(cls, meta: dict[str, Any]) -> "Tokenizer":
        if not _is_tokenizer(meta):
            fail(f"there is no such tokenizer: {str(meta)[:60]}")
        return cls(meta["tokenizer"], meta.get("alphabet", ""))


def _is_tokenizer(meta: Any) -> bool:
    """Whether this is what `to_meta` says of one."""
    if not isinstance(meta, dict):
        return False
    name, alphabet = meta.get("tokenizer"), meta.get("alphabet", "")
    if not isinstance(name, str) or not isinstance(alphabet, str):
        return False
    return name != "char" or 0 < len(set(alphabet)) == len(alphabet) == meta.get("vocab_size")


def _tiktoken(name: str):
    import tiktoken

    names = ["bytes", "char", *tiktoken.list_encoding_names()]
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
        fail(f"no tokenizer {name}; {hint}")
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # what it downloads with raises OSErrors
        fail(f"cannot download the tokenizer {name} ({type(error).__name__}): go online once, "
             f"or set TIKTOKEN_CACHE_DIR to a folder that has it, or use --tokenizer=bytes")


# -----------------------------------------------------------------------------
# A data folder


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
    words = folder.name if folder.name in CORPORA else f"text --input=FILES --name={folder.name}"
    if len(missing) == 1:
        fail(f"no {missing[0]}.bin in {folder}; make both with: python prepare.py {words} "
             f"--overwrite")
    if missing:
        fail(f"no data in {folder}; make it with: python prepare.py {words}")
    sizes = {split: (folder / f"{split}.bin").stat().st_size for split in SPLITS}
    if not (folder / "meta.json").exists():
        return _nanogpt_meta(folder, sizes)
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        rows, padded = meta["vocab_size"], meta["padded_vocab_size"]
        tokens = {split: meta[split]["tokens"] for split in SPLITS}
        whole = all(type(n) is int for n in (rows, padded, *tokens.values()))
        if not (whole and 0 < rows <= padded < 2**31 and _is_tokenizer(meta)):
            raise ValueError(meta)
        width = {"uint16": 2, "uint32": 4}[meta["dtype"]]
        wrong = [f"{split}.bin" for split in SPLITS if sizes[split] != tokens[split] * width]
    except (ValueError, KeyError, TypeError, RecursionError):
        wrong = ["meta.json"]
    if wrong:
        fail(f"{folder} is damaged: {wrong[0]} does not fit the rest; make it again, --overwrite")
    return meta


def _nanogpt_meta(folder: Path, sizes: dict[str, int]) -> dict[str, Any]:
    """nanoGPT's ids are uint16: GPT-2's, or those of the table of characters in meta.pkl."""
    for split, size in sizes.items():
        if size % 2:
            fail(f"{folder}/{split}.bin has {size} bytes, and without a meta.json an id is two "
                 f"bytes, as nanoGPT's are: it is damaged; make it again")
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
    return meta | {"dtype": "uint16"} | {s: {"tokens": size // 2} for s, size in sizes.items()}


class _NoClasses(pickle.Unpickler):
    """nanoGPT's meta.pkl holds plain dicts; a class in it could run code."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")
