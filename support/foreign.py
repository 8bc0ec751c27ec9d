"""Weights in folders that bench.py export or transformers wrote, or on the Hugging Face Hub."""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

from model import GPT
from support.errors import fail
from support.meta import END_OF_TEXT

GPT2S = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # of the Hub
GPT2_TOKENS = "8f1c046ab87201d64780f75892556c8a0697aeb493efec91776b0cdf2e411d7b"  # their sha256


def holds_weights(folder: str) -> bool:
    """Whether bench.py export or transformers may have written this folder."""
    names = os.listdir(folder) if os.path.isdir(folder) else ()
    return any(name.startswith(("model.safetensors", "pytorch_model")) for name in names)


def read_folder(folder: str) -> dict:
    """A checkpoint from a folder: bench.py export's model.safetensors and config.json, or a GPT-2
    that transformers saved."""
    config = json.loads(Path(folder, "config.json").read_bytes())
    if config.get("model_type") == "gpt2":
        return read_pretrained(folder, tokenizer_of(folder, config))
    if "model_args" not in config:
        fail(f"{folder} holds no model of bench.py export, and of transformers' only gpt2 is known "
             f"here, not {config.get('model_type')}; of a run name the file: {folder}/ckpt.pt")
    from safetensors.torch import load_file

    return {"model_args": config["model_args"], "tokenizer": config.get("tokenizer"),
            "model": load_file(os.path.join(folder, "model.safetensors"))}


def tokenizer_of(folder: str, config: dict) -> dict | None:
    """That of a folder of transformers: GPT-2's where its table of tokens is GPT-2's, bytes or
    char where our export says so in config.json and the table has as many; without a file, what it
    says there, or GPT-2's where the model has its number of rows. None: not known. UserError: it
    is another."""
    names = sorted(name for name in os.listdir(folder)
                   if name.startswith(("tokenizer", "vocab", "merges", "spiece", "sentencepiece")))
    if not names:
        rows = config.get("vocab_size", 50257)
        return config.get("tokenizer") or ({"tokenizer": "gpt2"} if rows == 50257 else None)
    tokens = {}
    if "tokenizer.json" in names:
        tokens = dict(json.loads(Path(folder, "tokenizer.json").read_bytes())["model"]["vocab"])
    elif "vocab.json" in names:
        tokens = json.loads(Path(folder, "vocab.json").read_bytes())
    tokens.pop(END_OF_TEXT, None)
    said = config.get("tokenizer") or {}
    if said.get("tokenizer") in ("bytes", "char"):  # bytes have an id more: the end of a text
        if said["vocab_size"] - len(tokens) == (said["tokenizer"] == "bytes"):
            return said
    if hashlib.sha256(json.dumps(sorted(tokens.items())).encode()).hexdigest() != GPT2_TOKENS:
        fail(f"{folder} has a tokenizer of its own ({names[0]}): of transformers' only GPT-2's is "
             f"known here; choose a model with that one")
    return {"tokenizer": "gpt2"}


def read_pretrained(name: str, tokenizer: dict | None) -> dict:
    """A GPT-2 of the Hugging Face Hub, or a folder that transformers saved, as a checkpoint."""
    model = GPT.from_pretrained(name)
    return {"model": model.state_dict(), "model_args": asdict(model.config), "tokenizer": tokenizer}
