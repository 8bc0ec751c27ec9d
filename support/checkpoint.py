"""Checkpoints: reading ours, nanoGPT's and other weights, and writing them whole or not at all."""

import contextlib
import json
import os
import pickle
import shutil
import sys
import textwrap
from dataclasses import asdict, replace

import torch

from model import GPT, GPTConfig
from support.code import HERE, code_in
from support.errors import UserError, fail, reason
from support.files import rename

CHECKPOINTS = ("ckpt.pt", "ckpt_prev.pt", "best.pt")


# -----------------------------------------------------------------------------
# Reading


def read_checkpoint(path: str) -> dict:
    """A checkpoint file, a folder that bench.py export or transformers wrote, or a gpt2* of the
    Hub, on the CPU; tensors and plain Python only. UserError if it cannot be read."""
    if not os.path.exists(path) and path.startswith("gpt2") and not path.endswith(".pt"):
        return read_pretrained(path)
    if not os.path.exists(path):
        fail(f"no checkpoint {path}; train one, or name the right folder")
    try:
        checkpoint = read_folder(path) if os.path.isdir(path) else torch.load(
            path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError:
        fail(f"{path} is damaged or no checkpoint, or it holds more than tensors and plain Python, "
             f"which could run code: it was not loaded")
    except Exception as error:  # a damaged file raises nearly anything
        fail(f"{path} is damaged or no checkpoint: {reason(error)}")
    if not isinstance(checkpoint, dict) or not {"model", "model_args"} <= checkpoint.keys():
        fail(f"{path} holds no model; expected nanoGPT's keys model and model_args")
    for name in ("model", "model_args", "config", "tokenizer"):
        if not isinstance(checkpoint.get(name), (dict, type(None))):
            fail(f"{path} is damaged: its {name} is no table of weights or options")
    return checkpoint


def read_latest(out_dir: str) -> dict | None:
    """The newest whole checkpoint of a run; None if there is none. A damaged one is named."""
    problems = []
    for name in ("ckpt.pt", "ckpt_prev.pt"):
        path = os.path.join(out_dir, name)
        if not os.path.exists(path):
            continue
        try:
            checkpoint = read_checkpoint(path)
        except UserError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            print(f"warning: {problem}; using {path}", file=sys.stderr)
        return checkpoint
    best = os.path.join(out_dir, "best.pt")
    if problems and os.path.exists(best):
        problems[-1] += f"; perhaps {best} is whole: --init_from={best}"
    if problems:
        fail(*problems)
    return None


def read_folder(folder: str) -> dict:
    """A checkpoint from a folder: bench.py export's model.safetensors and config.json, or a GPT-2
    that transformers saved."""
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            config = json.load(file)
        if config.get("model_type") == "gpt2":
            return read_pretrained(folder)
        kept = {"model_args": config["model_args"], "tokenizer": config.get("tokenizer")}
        from safetensors.torch import load_file

        table = load_file(os.path.join(folder, "model.safetensors"))
        table["lm_head.weight"] = table["transformer.wte.weight"]  # tied
    except UserError:
        raise
    except ImportError:
        fail(f"{folder} needs safetensors: pip install safetensors")
    except Exception as error:  # a damaged file raises nearly anything
        fail(f"{folder} holds no model of bench.py export, or a damaged one ({reason(error)}), and "
             f"no GPT-2 of transformers; of a run name the file: {os.path.join(folder, 'ckpt.pt')}")
    return kept | {"model": table}


def read_pretrained(name: str) -> dict:
    """A GPT-2 of the Hugging Face Hub, or a folder that transformers saved, as a checkpoint.
    UserError where it cannot be loaded, or computes something that ours does not."""
    try:
        model = GPT.from_pretrained(name)
    except ImportError:
        fail("GPT-2 weights need transformers: pip install transformers")
    except Exception as error:  # a damaged file raises nearly anything
        fail(f"cannot load {name}: {reason(error)}")
    return {"model": model.state_dict(), "model_args": asdict(model.config),
            "tokenizer": {"tokenizer": "gpt2"}}


def holds_weights(folder: str) -> bool:
    """Whether bench.py export or transformers may have written this folder."""
    names = os.listdir(folder) if os.path.isdir(folder) else ()
    return any(name.startswith(("model.safetensors", "pytorch_model")) for name in names)


def checkpoint_config(checkpoint: dict) -> GPTConfig:
    """The architecture of a checkpoint, ours or nanoGPT's. UserError if this version has none."""
    try:
        args = dict(checkpoint["model_args"])
        if args.get("vocab_size") == 50304:
            args.setdefault("vocab_used", 50257)  # nanoGPT's padded GPT-2 vocabulary
        return GPTConfig(**args)
    except (TypeError, ValueError) as error:
        fail(*(f"the checkpoint's model_args do not fit this version: {line}"
               for line in str(error).splitlines()))


def model_from(checkpoint: dict, **changes) -> GPT:
    """The model of a checkpoint, ours or nanoGPT's; changes: config values to replace. UserError
    where the weights do not fit. Without weights (rank 0 has them): as initialised."""
    config = replace(checkpoint_config(checkpoint), **changes)
    try:
        model = GPT(config)
        if "model" not in checkpoint:
            return model
        weights = {name.removeprefix("_orig_mod."): w for name, w in checkpoint["model"].items()
                   if not name.endswith(".attn.bias")}  # older nanoGPT's causal masks
        model.to(weights["lm_head.weight"].dtype)
        model.load_state_dict(weights)
    except (AttributeError, KeyError, MemoryError, RuntimeError, TypeError) as error:
        what = textwrap.shorten(str(error), 300)  # torch lists all that is missing or misshapen
        fail(f"the checkpoint's weights do not fit its model_args: {what}")
    return model


# -----------------------------------------------------------------------------
# Writing


def write_file(state: dict, path: str) -> None:
    """Write a checkpoint so that `path` is the old or the new one, whole, at every moment."""
    partial = f"{path}.partial"
    try:
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        rename(partial, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        with contextlib.suppress(OSError):
            os.remove(partial)
        full = "" if isinstance(error, OSError) else "the disk is full, it seems: "
        fail(f"cannot write {path}: {full}{reason(error)}; the checkpoints before it are intact")


def keep_previous(path: str, previous: str) -> None:
    """Give ckpt.pt a second name in one step, replacing what that named before; so ckpt.pt is never
    absent. A copy where there are no links."""
    if os.path.exists(previous) and os.path.samefile(path, previous):
        return  # for which POSIX renames nothing, and leaves the partial name
    partial = f"{previous}.partial"
    with contextlib.suppress(OSError):
        os.remove(partial)
    try:
        os.link(path, partial)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, partial)
    rename(partial, previous)


def save_checkpoint(state: dict, out_dir: str, best: bool) -> None:
    """ckpt.pt, keeping the one before as ckpt_prev.pt; and its weights alone as best.pt."""
    path, state = os.path.join(out_dir, "ckpt.pt"), state | {"code": code_in()}
    if best:  # first: a run killed in between comes here again
        names = ("model", "model_args", "config", "tokenizer", "iter_num", "best_val_loss",
                 "code")
        write_file({name: state[name] for name in names}, os.path.join(out_dir, "best.pt"))
    if os.path.exists(path):
        keep_previous(path, os.path.join(out_dir, "ckpt_prev.pt"))
    write_file(state, path)


def clear_folder(config, resumed: bool) -> None:
    """Prepare out_dir for a run: what an overwritten run and killed saves have left goes."""
    for name in os.listdir(config.out_dir):
        if name.endswith(".pt.partial") or (name in CHECKPOINTS and not resumed):
            os.remove(os.path.join(config.out_dir, name))
    with open(os.path.join(config.out_dir, "config.json"), "w", encoding="utf-8") as file:
        json.dump(asdict(config), file, indent=1)
    kept = os.path.join(config.out_dir, "code_that_ran")
    os.makedirs(kept, exist_ok=True)
    for name in ("model.py", "train.py"):
        shutil.copyfile(os.path.join(HERE, name), os.path.join(kept, name))
