"""Text <-> token ids: by bytes, by characters, or by one of tiktoken's vocabularies."""

import difflib
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from support.errors import fail
from support.meta import END_OF_TEXT, is_tokenizer, load_meta

Alphabet = str | list[str]  # entry i is token i; one of several characters is never encoded


class Tokenizer:
    """Text <-> token ids: `bytes`, `char` (with its alphabet), or one of tiktoken's encodings.

    n_vocab:      the number of ids
    padded_vocab: rows of an embedding table: n_vocab, for tiktoken's the next multiple of 128
    eot:          the id that ends a document; None for char
    dtype:        of the ids in the bins
    Raises UserError for a name that does not exist or cannot be downloaded.
    """

    def __init__(self, name: str, alphabet: Alphabet = ""):
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
            fail(f"the alphabet does not have {''.join(sorted(unknown))!r}; give text without it "
                 f"(to sample.py by --start), or use a model of --tokenizer=bytes")
        return [self.ids[character] for character in text]

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a prompt, in which <|endoftext|> is the end-of-text id, if there is one."""
        if self.eot is None:
            return self.encode(text)
        *ended, last = text.split(END_OF_TEXT)
        ids = [token for part in ended for token in (*self.encode(part), self.eot)]
        return ids + self.encode(last)

    def divide(self, pieces: Iterable[tuple[str, bool]]) -> Iterator[tuple[str, bool]]:
        """(text, whether its document ends here), as it is to be encoded: without an end-of-text
        id every document but the first begins with a newline."""
        begin = ""
        for text, ends in pieces:
            yield begin + text, ends
            begin = "\n" if ends and self.eot is None else ""

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
        return {"tokenizer": self.name, "vocab_size": self.n_vocab, "alphabet": self.alphabet,
                "padded_vocab_size": self.padded_vocab, "dtype": self.dtype.name}

    @classmethod
    def from_meta(cls, meta: dict[str, Any]) -> "Tokenizer":
        if not is_tokenizer(meta):
            fail(f"there is no such tokenizer: {str(meta)[:60]}")
        return cls(meta["tokenizer"], meta.get("alphabet", ""))

    @classmethod
    def find(cls, name: str) -> "Tokenizer":
        """Of this name; of a path, that of the checkpoint or of the data folder there."""
        if os.path.basename(name) == name and not name.endswith(".pt"):
            return cls(name)
        if os.path.isdir(name):
            return cls.from_meta(load_meta(name))
        from support.checkpoint import read_checkpoint  # imports torch

        meta = read_checkpoint(name).get("tokenizer")
        if not meta:
            fail(f"{name} does not say its tokenizer; its data do: --tokenizer=data/NAME")
        return cls.from_meta(meta)


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
             f"or set TIKTOKEN_CACHE_DIR to a folder that has it, or prepare data with "
             f"--tokenizer=bytes")
