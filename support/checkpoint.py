"""Checkpoints: reading ours, nanoGPT's and other weights, and writing them whole or not at all."""

import contextlib
import functools
import os
import pickle
import re
import shutil
import sys
import textwrap
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode

from model import GPT, GPTConfig
from support.code import HERE, code_in
from support.errors import UserError, fail, printable, reason
from support.files import rename, write_json
from support.foreign import GPT2S, read_folder, read_pretrained

CHECKPOINTS = ("ckpt.pt", "ckpt_prev.pt", "best.pt")
HEAD, TABLE = "lm_head.weight", "transformer.wte.weight"  # tied, unless a fork unties them


# -----------------------------------------------------------------------------
# Reading


def read_checkpoint(path: str) -> dict:
    """A checkpoint file, a folder that bench.py export or transformers wrote, or a gpt2* of the
    Hub, on the CPU; tensors and plain Python only. UserError if it cannot be read."""
    try:
        if os.path.isdir(path):
            checkpoint = read_folder(path)
        elif os.path.exists(path):
            checkpoint = map_file(path)
        elif path in GPT2S:
            checkpoint = read_pretrained(path, {"tokenizer": "gpt2"})
        else:
            fail(f"no checkpoint {path}; train one, name the right folder, or of the Hub one of "
                 f"{', '.join(GPT2S)}")
    except UserError:
        raise
    except ImportError as error:
        fail(f"{path} needs {error.name}: pip install {error.name}")
    except pickle.UnpicklingError:
        fail(f"{path} is damaged or no checkpoint, or it holds more than tensors and plain Python, "
             f"which could run code: it was not loaded; of safetensors name the folder")
    except Exception as error:  # a damaged file raises nearly anything
        run = f"; of a run name the file: {path}/ckpt.pt" if os.path.isdir(path) else ""
        fail(f"cannot load {path}, which may be damaged or no checkpoint: {reason(error)}{run}")
    entries = checkpoint.items() if isinstance(checkpoint, dict) else ()
    checkpoint = {key: value for key, value in entries if value is not None}  # as if absent
    if not {"model", "model_args"} <= checkpoint.keys():
        fail(f"{path} holds no model; expected nanoGPT's keys model (its weights) and model_args; "
             f"of safetensors name the folder")
    for name in ("model", "model_args", "config", "tokenizer"):
        if not isinstance(checkpoint.get(name, {}), dict):
            fail(f"{path} is damaged: its {name} is no table of weights or options")
    return checkpoint


def map_file(path: str) -> dict:
    """A checkpoint file, mapped: what nobody uses is not read, as the optimiser's state when a
    model is sampled from."""
    while True:
        # torch maps neither files of before 1.6 nor names that are not UTF-8
        can_map = zipfile.is_zipfile(path) and printable(path) == str(path)
        written = os.path.getmtime(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=can_map)
        if written == os.path.getmtime(path):  # torch opens it twice, and a run may save
            return checkpoint


def read_latest(out_dir: str) -> dict | None:
    """The newest whole checkpoint of a run; None if there is none. A damaged one is named."""
    problems = []
    paths = (os.path.join(out_dir, name) for name in ("ckpt.pt", "ckpt_prev.pt"))
    for path in filter(os.path.exists, paths):
        try:
            checkpoint = read_checkpoint(path)
            for problem in problems:
                print(f"warning: {problem}; using {path}", file=sys.stderr)
            return checkpoint
        except UserError as error:
            problems.append(str(error))
    if problems:
        fail(*problems)
    return None


def check_tokenizer(folder: str, meta: dict, checkpoint: dict) -> None:
    """UserError where the data of a folder were made with another tokenizer than the checkpoint's,
    if that says which."""
    expected = checkpoint.get("tokenizer") or meta
    name, other = expected.get("tokenizer"), meta["tokenizer"]
    same = name == other or sorted((str(name), other)) == ["gpt2", "r50k_base"]  # two names of one
    if not same or expected.get("alphabet", "") != meta.get("alphabet", ""):
        other = "char with other characters" if name == other else other
        words = "CHECKPOINT.pt (char, with its alphabet)" if name == "char" else name
        fail(f"{folder} was made with another tokenizer, {other}, than the checkpoint's, {name}; "
             f"use that: python prepare.py text --input=FILES --tokenizer={words}")


def checkpoint_config(checkpoint: dict) -> GPTConfig:
    """The architecture of a checkpoint, ours or nanoGPT's. UserError if this version has none."""
    try:
        args = dict(checkpoint["model_args"])
        if args.get("vocab_size") == 50304:
            args.setdefault("vocab_used", 50257)  # nanoGPT's padded GPT-2 vocabulary
        return GPTConfig(**args)
    except (TypeError, ValueError) as error:
        fail(*(f"the checkpoint's model_args do not fit this version: {line}; the model.py that "
               f"made it is in its run's code_that_ran/" for line in str(error).splitlines()))


class ZeroParameters(TorchFunctionMode):
    """Parameters start as zeros, whatever torch.nn.init is to draw: they are about to be loaded."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        drawn = getattr(function, "__module__", "") == "torch.nn.init"
        if drawn and isinstance(kwargs.get("tensor"), Parameter):
            return torch.nn.init.zeros_(kwargs["tensor"])
        return function(*args, **kwargs)


def model_from(checkpoint: dict, **changes) -> GPT:
    """The model of a checkpoint, ours or nanoGPT's; changes: config values to replace. UserError
    where the weights do not fit. Without weights (rank 0 has them): as initialised."""
    config = replace(checkpoint_config(checkpoint), **changes)
    try:
        if "model" not in checkpoint:
            return GPT(config)
        with ZeroParameters():
            model = GPT(config)
        table, buffers = checkpoint["model"], dict(model.named_buffers())  # a fork's: of any type
        weights = named_weights({name: w for name, w in table.items() if name not in buffers})
        kinds = {w.dtype for w in weights.values()} or {torch.float32}
        widest = functools.reduce(torch.promote_types, kinds)
        for p in model.parameters():
            p.data = p.data.to(widest)
        model.load_state_dict(weights | {name: table[name] for name in buffers if name in table})
        if (model.transformer.wte.weight != weights[TABLE]).any():
            fail(f"the checkpoint's weights cannot be read: {HEAD} and {TABLE} differ, which are "
                 f"one table here (tied)")
    except (AttributeError, KeyError, MemoryError, RuntimeError, TypeError) as error:
        what = textwrap.shorten(str(error), 300)  # torch lists all that is missing or misshapen
        fail(f"the checkpoint's weights do not fit its model_args: {what}")
    return model


def named_weights(table: dict) -> dict[str, torch.Tensor]:
    """A checkpoint's weights under our names, without what torch.compile and DDP put before them
    and old causal masks; the table of tokens under both names. UserError where they are no good."""
    named = [(re.sub(r"^(_orig_mod\.|module\.)+", "", name), w) for name, w in table.items()
             if not (name.endswith(".attn.bias") and getattr(w, "ndim", 0) == 4)]  # causal masks
    for name, w in named:
        kind = getattr(w, "dtype", type(w).__name__)
        if kind not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            fail(f"the checkpoint's weights cannot be read: {name} is of {kind}; convert it to "
                 f"floats of 16 to 64 bits")
        if not all(end.isfinite() for end in w.aminmax()):
            fail(f"the checkpoint's weights are nan or infinite ({name}): its run broke; use "
                 f"another one, of an earlier step")
    weights = dict(named)
    if len(weights) < len(named):
        fail("the checkpoint's weights cannot be read: one name is there twice, with and without "
             "module. or _orig_mod.")
    twin = {HEAD: TABLE, TABLE: HEAD}  # of which one may be left out
    return {name: weights[twin[name]] for name in twin if twin[name] in weights} | weights


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
    if zipfile.is_zipfile(path):  # what a power failure damaged does not replace a whole one
        keep_previous(path, os.path.join(out_dir, "ckpt_prev.pt"))
    write_file(state, path)


def clear_folder(config, resumed: bool) -> None:
    """Prepare out_dir for a run: what an overwritten run and killed saves have left goes."""
    for name in os.listdir(config.out_dir):
        if name.endswith(".pt.partial") or (name in CHECKPOINTS and not resumed):
            os.remove(os.path.join(config.out_dir, name))
    write_json(os.path.join(config.out_dir, "config.json"), asdict(config))
    kept = Path(config.out_dir, "code_that_ran")
    if not resumed:
        shutil.rmtree(kept, ignore_errors=True)
    kept /= code_in()["hash"]
    kept.mkdir(parents=True, exist_ok=True)
    for name in ("model.py", "train.py"):
        shutil.copyfile(HERE / name, kept / name)
