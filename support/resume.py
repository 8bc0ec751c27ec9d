"""Where a run starts, and what it carries over an interruption."""

import os
import sys
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from model import GPT
from support.checkpoint import (
    CHECKPOINTS,
    check_tokenizer,
    read_checkpoint,
    read_latest,
    save_checkpoint,
)
from support.data import identity
from support.errors import fail, out_of_memory, reason
from support.foreign import GPT2S, holds_weights
from support.meta import TOKENIZER_KEYS, load_meta
from support.ranks import Ranks, part_of
from support.terminal import show

# options of the call or of the machine, and not of the run
THIS_CALL = {"init_from", "overwrite", "out_dir", "eval_only"}
NOT_STORED = THIS_CALL | {"device", "dtype", "compile", "fused", "backend", "parallel"}


@dataclass
class Progress:
    """What a resumed run carries beside its tensors."""

    step: int = 0  # optimiser steps made
    position: int = 0  # training windows read
    evaluated: int | None = None  # the step of the latest evaluation
    best_val_loss: float = 1e9  # of all evaluations
    best_saved_loss: float = 1e9  # of those at which best.pt could be written
    log_length: int | None = None  # bytes of log.jsonl; None: start a new one


# -----------------------------------------------------------------------------
# Where to start


def find_start(config: Any, given: dict[str, str]) -> tuple[Any, dict | None, bool]:
    """(options, checkpoint or None, whether it goes on) of a run that was asked for with these
    options; given: option -> the preset that set it, or "" for the command line."""
    c, folder = config, config.out_dir
    if c.init_from in ("resume", "auto"):
        checkpoint = read_latest(folder)
        if checkpoint is not None:
            return stored_options(c, given, checkpoint), checkpoint, True
        if c.init_from == "resume":
            fail(f"no ckpt.pt to resume in {folder}; drop --init_from=resume, or mend --out_dir")
    if holds_weights(folder) and not c.eval_only:
        fail(f"{folder} holds exported weights, which a run would spoil; choose another --out_dir")
    used = any(os.path.exists(os.path.join(folder, name)) for name in CHECKPOINTS)
    if used and not (c.overwrite or c.eval_only):
        fail(f"{folder} holds a run; go on with --init_from=resume (from a ckpt.pt), begin anew "
             f"with --overwrite, or choose another --out_dir")
    if c.init_from in ("scratch", "auto"):
        return c, None, False
    if c.init_from in GPT2S:  # before a download
        tokenizer = {"tokenizer": {"tokenizer": "gpt2"}}
        read_source(os.path.join(c.data_dir, c.dataset), tokenizer, resumed=False)
    return c, read_checkpoint(c.init_from), False


def stored_options(config: Any, given: dict[str, str], checkpoint: dict) -> Any:
    """The options of a run that goes on: its own, but for what the command line changes. What a
    preset would change is printed."""
    if "tokens_seen" in checkpoint or not {"iter_num", "config"} <= checkpoint.keys():
        fail(f"{config.out_dir} holds no run to resume, but weights alone or a run of an earlier "
             f"version, which read the windows in another order; start a run from its weights: "
             f"--init_from={config.out_dir}/ckpt.pt and another --out_dir")
    words = {name for name, preset in given.items() if not preset}
    stored = checkpoint["config"]
    values = {field.name: stored.get(field.name, field.default) for field in fields(config)}
    values |= {name: getattr(config, name) for name in NOT_STORED | words}
    if "eval_tokens" in words - {"eval_iters"}:
        values["eval_iters"] = None
    elif values["eval_iters"]:  # which says it, also for another batch_size
        values["eval_tokens"] = type(config).eval_tokens
    try:
        options = replace(config, **values)
    except (TypeError, ValueError) as error:
        fail(*(f"resuming {config.out_dir}: {line}" for line in str(error).splitlines()))

    def differences(names: set[str]) -> str:
        return " ".join(f"--{name}={'auto' if now is None else now} (was {stored[name]})"
                        for name in sorted(names & stored.keys() - THIS_CALL)
                        if (now := getattr(config, name)) != stored[name])

    if changed := differences(words | NOT_STORED):
        show(f"resuming with other options: {changed}", keep=True)
    if ignored := differences(given.keys() - words - NOT_STORED):
        show(f"the run keeps its own options; to change them, give: {ignored}", keep=True)
    return options


def without_tensors(start: tuple[Any, dict | None, bool]) -> tuple[Any, dict | None, bool]:
    """What the other processes get of `find_start`'s: weights and states come tensor by tensor."""
    options, checkpoint, resumed = start
    if checkpoint is not None:
        checkpoint = {k: v for k, v in checkpoint.items() if k not in ("model", "optimizer")}
    return options, checkpoint, resumed


def read_source(folder: str, checkpoint: dict | None, resumed: bool) -> tuple[dict, dict]:
    """(meta, identity) of the training data. UserError where the checkpoint's tokenizer is another
    one, or a run that goes on was trained on other data."""
    meta = load_meta(folder)
    source = identity(folder, meta)
    check_tokenizer(folder, meta, checkpoint or {})
    if resumed and checkpoint.get("data", source) != source:
        fail(f"{folder} is not the data that the run was trained on; to train on new data start "
             f"from its checkpoint, --init_from=FILE.pt, with another --out_dir")
    return meta, source


# -----------------------------------------------------------------------------
# The state of a run


def parameters(optimizer: torch.optim.Optimizer, model: GPT) -> list[tuple[str, torch.Tensor]]:
    """(name, parameter), in the order in which the optimiser numbers them."""
    names = {p: name for name, p in model.named_parameters()}
    return [(names[p], p) for group in optimizer.param_groups for p in group["params"]]


def load_states(optimizers: dict, model: GPT, states: dict, ranks: Ranks) -> None:
    """Give the optimisers their states (optimiser -> name -> state), which rank 0 has."""
    for kind, optimizer in optimizers.items():
        plan = optimizer.state_dict()
        ours = isinstance(optimizer, (torch.optim.AdamW, torch.optim.Muon))
        for number, (name, p) in enumerate(parameters(optimizer, model)):
            state = ranks.first(lambda name=name, kind=kind: states[kind].get(name))
            if state is not None:
                plan["state"][number] = {key: fitted(value, p, ours)
                                         for key, value in state.items()}
        optimizer.load_state_dict(plan)


def fitted(value: Any, p: torch.Tensor, ours: bool) -> Any:
    """A value of p's state: a number as it is, of a cropped position table its rows, of a sharded
    parameter this process's part. A fork's optimiser may have lists and tensors of other shapes."""
    number = isinstance(value, (int, float, type(None)))
    if number or not (ours or getattr(value, "shape", ()) == p.shape) or not value.dim():
        return value
    return part_of(value[:len(p)].view(p.shape), p)


def restore(checkpoint: dict, config: Any, model: GPT, optimizers: dict[str, torch.optim.Optimizer],
            scaler: torch.amp.GradScaler, ranks: Ranks) -> Progress:
    """Put a checkpoint's optimisers, loss scale and generators back; returns how far it was."""
    master, rng = ranks.rank == 0, checkpoint.get("rng", ())
    try:
        states = deepcopy(checkpoint.get("optimizer") or {})  # of a file that will be replaced
        if "param_groups" in states and config.optimizer == "adamw":  # nanoGPT's, by number
            named = sorted(model.named_parameters(), key=lambda named: named[1].dim() < 2)
            states = {"adamw": {named[i][0]: s for i, s in states["state"].items()}}
        if ranks.first(lambda: states.keys() == optimizers.keys()):
            load_states(optimizers, model, states, ranks)
        elif master:
            show("warning: the checkpoint's optimiser is another one; its state starts anew", True)
        if scaler.is_enabled() and checkpoint.get("scaler"):
            scaler.load_state_dict(checkpoint["scaler"])
        if len(rng) == ranks.world:
            torch.set_rng_state(rng[ranks.rank]["cpu"])
            if ranks.device.type != "cpu" and "device" in rng[ranks.rank]:
                getattr(torch, ranks.device.type).set_rng_state(rng[ranks.rank]["device"])
        elif master:
            show("warning: the checkpoint has no states of random generators for this number of "
                 "processes; dropout, if there is any, starts anew from the seed", True)
        nanogpts = {"step": checkpoint["iter_num"],
                    "best_val_loss": float(checkpoint["best_val_loss"])}
        run = Progress(**checkpoint.get("run", nanogpts))
        # a shorter context has more windows for the same tokens
        run.position = run.position * checkpoint["model_args"]["block_size"] // config.block_size
    except (AttributeError, KeyError, IndexError, RuntimeError, TypeError, ValueError) as error:
        if out_of_memory(error):
            raise
        fail(f"the run, optimizer, scaler or rng of the checkpoint in {config.out_dir} is damaged: "
             f"{reason(error)}; remove it to use the one before")
    if master:
        show(f"resuming {config.out_dir} at step {run.step}", True)
    return run


def save(run: Progress, config: Any, model: GPT, optimizers: dict[str, torch.optim.Optimizer],
         scaler: torch.amp.GradScaler, ranks: Ranks, meta: dict, source: dict, best: bool,
         saved: int | None) -> None:
    """Write ckpt.pt (and best.pt): all processes bring their parts to rank 0, and wait while it
    writes. UserError where that fails. saved: the step of the checkpoint before."""
    parts = (p.to_local() if hasattr(p, "to_local") else p for p in model.parameters())
    if ranks.any(not all(p.isfinite().all() for p in parts)):
        fail(f"the loss is nan from step {run.step} on: the last update broke the weights; "
             f"{last_good(config.out_dir, saved)}; lower the learning rate (of Muon: --muon_lr)")
    table = model.state_dict(keep_vars=True)
    whole = {w: ranks.whole(w.detach()) for w in table.values()}  # a tied one once
    weights = {name: whole[w] for name, w in table.items()}
    states = {kind: {name: {key: ranks.whole(value) for key, value in optimizer.state[p].items()}
                     for name, p in parameters(optimizer, model) if p in optimizer.state}
              for kind, optimizer in optimizers.items()}
    rng = {"cpu": torch.get_rng_state()}
    if ranks.device.type != "cpu":
        rng["device"] = getattr(torch, ranks.device.type).get_rng_state()
    rng = ranks.gather(rng)

    def write() -> None:
        deleted = not os.path.isdir(config.out_dir)
        os.makedirs(config.out_dir, exist_ok=True)
        save_checkpoint({
            "model": weights, "model_args": asdict(model.config), "optimizer": states,
            "scaler": scaler.state_dict(), "rng": rng, "run": asdict(run), "iter_num": run.step,
            "best_val_loss": run.best_val_loss, "config": asdict(config), "data": source,
            "tokenizer": {key: meta[key] for key in TOKENIZER_KEYS if meta.get(key)},
            "versions": {"torch": str(torch.__version__), "python": sys.version.split()[0]}},
            config.out_dir, best)
        if deleted:
            fail(f"the folder {config.out_dir} was deleted while this run wrote to it; step "
                 f"{run.step} is saved there again, the log is lost; go on with "
                 f"--init_from=resume")

    ranks.first(write)


def last_good(out_dir: str, saved: int | None) -> str:
    """Where a run that broke can go on."""
    if saved is None:
        return "there is no checkpoint yet"
    return f"the last good checkpoint, of step {saved}, is {out_dir}/ckpt.pt"
