"""The meta.json of a data folder, which says how its bins were made; and nanoGPT's folders, which
have none."""

import json
import pickle
import sys
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from support.errors import fail

SPLITS = ("train", "val")
END_OF_TEXT = "<|endoftext|>"
LLM_C = [number.to_bytes(4, "little") for number in (20240520, 20240801)]  # begin llm.c's bins
TOKENIZER_KEYS = ("tokenizer", "vocab_size", "padded_vocab_size", "alphabet")  # of meta.json
CORPORA = ("tinystories", "openwebtext", "shakespeare", "shakespeare_char", "pydoc")  # have names


def is_tokenizer(meta: Any) -> bool:
    """Whether this is what `to_meta` says of one."""
    if not isinstance(meta, dict):
        return False
    name, alphabet = meta.get("tokenizer"), meta.get("alphabet", "")
    if not isinstance(name, str) or not isinstance(alphabet, (str, list)):
        return False
    if not all(isinstance(entry, str) for entry in alphabet):
        return False
    distinct = isinstance(alphabet, list) or len(set(alphabet)) == len(alphabet)
    return name != "char" or (distinct and 0 < len(alphabet) == meta.get("vocab_size"))


def load_meta(folder: str | Path) -> dict[str, Any]:
    """meta.json of a data folder; of nanoGPT's bins, what it would have said: at least tokenizer,
    vocab_size, padded_vocab_size, dtype, tokens of "train" and "val". UserError if something is
    missing, unfinished or damaged."""
    folder = Path(folder)
    missing = [split for split in SPLITS if not (folder / f"{split}.bin").is_file()]
    partial = folder / "partial"
    if (partial / "meta.json").exists() or (missing and partial.exists()):
        fail(f"{folder} is unfinished; if prepare.py was stopped there, run it again")
    words = folder.name if folder.name in CORPORA else f"text --input=FILES --name={folder.name}"
    if missing:
        what = "data"
        if len(missing) == 1:  # the other is there
            what, words = f"{missing[0]}.bin", f"{words} --overwrite"
        fail(f"no {what} in {folder}; mend its name, or make it as the preset's file says, or "
             f"with: python prepare.py {words}")
    sizes = {split: (folder / f"{split}.bin").stat().st_size for split in SPLITS}
    if not (folder / "meta.json").exists():
        return nanogpt_meta(folder, sizes)
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        rows, padded = meta["vocab_size"], meta["padded_vocab_size"]
        tokens = {split: meta[split]["tokens"] for split in SPLITS}
        whole = all(type(n) is int for n in (rows, padded, *tokens.values()))
        if not (whole and 0 < rows <= padded < 2**31 and is_tokenizer(meta)):
            raise ValueError(meta)
        width = {"uint16": 2, "uint32": 4}[meta["dtype"]]
        wrong = [f"{split}.bin" for split in SPLITS if sizes[split] != tokens[split] * width]
    except (ValueError, KeyError, TypeError, RecursionError):
        wrong = ["meta.json"]
    if wrong:
        fail(f"{folder} is damaged: {wrong[0]} does not fit the rest; make it again, --overwrite")
    return meta


def nanogpt_meta(folder: Path, sizes: dict[str, int]) -> dict[str, Any]:
    """nanoGPT's ids are uint16: GPT-2's, or those of the table in meta.pkl, whose entries may be of
    several characters, or missing. sizes: of the bins in bytes, where they are there."""
    for split, size in sizes.items():
        if size % 2:
            fail(f"{folder}/{split}.bin has {size} bytes, and without a meta.json an id is two "
                 f"bytes, as nanoGPT's are: it is damaged; make it again")
        words = np.fromfile(folder / f"{split}.bin", "<u2", 4096)
        if words[:2].tobytes() in LLM_C:
            fail(f"{folder}/{split}.bin begins with llm.c's header, which is no text; take it off: "
                 f"tail -c +1025 OLD > NEW")
        if len(words) >= 64 and words[1::2].max() < 4 <= words[::2].max():
            print(f"warning: {folder}/{split}.bin seems to have ids of four bytes; without its "
                  f"meta.json each is read as two", file=sys.stderr)
    meta = {"tokenizer": "gpt2", "vocab_size": 50257, "padded_vocab_size": 50304}
    if (folder / "meta.pkl").exists():
        try:
            with open(folder / "meta.pkl", "rb") as file:
                table = _NoClasses(file).load()
            itos = table.get("itos") or {i: entry for entry, i in table.get("stoi", {}).items()}
            names = itos if isinstance(itos, dict) else dict(enumerate(itos))
            size = table.get("vocab_size", len(names))
            alphabet = [names.get(i, f"<{i}>") for i in range(min(size, 1 << 16))]
            if all(len(entry) == 1 for entry in alphabet):
                alphabet = "".join(alphabet)
            meta = {"tokenizer": "char", "vocab_size": size, "padded_vocab_size": size,
                    "alphabet": alphabet}
            if not is_tokenizer(meta) or not {*names} <= {*range(size)}:
                raise ValueError("its ids are not 0 to vocab_size - 1, or its entries no strings")
        except Exception as error:  # a damaged pickle may raise anything
            fail(f"{folder}/meta.pkl is not a table of characters such as nanoGPT's: {error}")
    return meta | {"dtype": "uint16"} | {s: {"tokens": size // 2} for s, size in sizes.items()}


class _NoClasses(pickle.Unpickler):
    """nanoGPT's meta.pkl holds plain dicts; a class in it could run code."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}; write plain int and str")
