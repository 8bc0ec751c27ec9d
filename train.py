"""Train a GPT, a HourglassFFN model or a YuriiFormer on one device or many.

    python train.py config/tinystories_cpu.py
    torchrun --standalone --nproc_per_node=8 train.py config/yurii_owt.py --out_dir=out-yurii

The first names a preset; every option of TrainConfig can follow as --name=value. Writes to out_dir:
ckpt.pt (latest), ckpt_prev.pt (the one before), best.pt (lowest evaluation loss), log.jsonl,
config.json, loss.png. To go on after an interruption, add --init_from=resume.
"""

import contextlib
import ctypes
import itertools
import json
import math
import os
import queue
import re
import shutil
import signal
import socket
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from config import (
    UserError,
    cli,
    fail,
    locked,
    read_config,
    reason,
    replace,
    sync_folder,
)
from model import (
    GPT,
    GPTConfig,
    autocast,
    can_compile,
    checkpoint_config,
    out_of_memory,
    pick_device,
    pick_dtype,
    read_checkpoint,
    read_latest,
    shard_reader,
)
from prepare import load_meta, sha256


@dataclass
class TrainConfig(GPTConfig):
    """Every option of a run: the model's (GPTConfig) and these."""

    # what nanoGPT's trainer sets otherwise than its model
    bias: bool = False  # biases in linears and LayerNorms, as GPT-2 has; False is a bit better
    vocab_size: int | None = None  # rows of the token table; auto: the data's, padded
    # data and output
    dataset: str = "openwebtext"  # folder in data_dir that prepare.py made
    data_dir: str = "data"  # where the data folders are
    check_data: bool = False  # first compare the bins with the sha256 that meta.json has of them
    out_dir: str = "out"  # checkpoints and logs
    # scratch, resume, auto (resume if possible); or weights: gpt2*, a .pt file, an exported folder
    init_from: str = "scratch"
    # start from scratch although out_dir holds a checkpoint; in bench.py, replace what was written
    overwrite: bool = False
    # batch
    batch_size: int = 12  # micro-batch: sequences per device and forward pass
    gradient_accumulation_steps: int = 40  # micro-batches per step, the total over all ranks
    # optimiser
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: the blocks' matrices; AdamW the rest
    learning_rate: float = 6e-4  # AdamW's peak
    muon_lr: float = 0.02  # Muon's peak
    muon_weight_decay: float = 0.0  # decoupled, of the matrices under Muon
    scalar_lr: float | None = None  # peak for mu, beta, gamma, nu; auto: 5 x learning_rate
    weight_decay: float = 0.1  # of matrices and tables under AdamW
    beta1: float = 0.9  # AdamW's
    beta2: float = 0.95  # AdamW's
    grad_clip: float = 1.0  # global gradient norm; 0 turns clipping off
    nan: Literal["stop", "skip"] = "stop"  # what a step does whose loss or gradient is not finite
    # schedule: one multiplier for every rate
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"  # wsd: warm-up, stable, decay
    decay_lr: bool = True  # False: the peak from the first step to the last (nanoGPT's)
    max_iters: int = 600_000  # optimiser steps
    warmup_iters: int = 2000  # linear warm-up
    lr_decay_iters: int | None = None  # the decay ends here; auto: max_iters
    decay_fraction: float = 0.2  # wsd: this share of lr_decay_iters decays, linearly
    min_lr: float | None = None  # floor of learning_rate; auto: learning_rate / 10
    # evaluation, checkpoints, logs
    eval_interval: int = 2000  # steps between evaluations
    eval_tokens: int = 4_915_200  # validation tokens, capped at the split
    eval_iters: int | None = None  # nanoGPT's: converted to eval_tokens
    eval_only: bool = False  # evaluate once and stop
    save_interval: int | None = None  # steps between checkpoints; auto: eval_interval
    always_save_checkpoint: bool = True  # False: sample.py takes best.pt rather than ckpt.pt
    log_interval: int = 1  # steps between log lines
    wandb_log: bool = False  # log to Weights & Biases
    wandb_project: str = "nanoyurii"  # its project
    wandb_run_name: str = "run"  # its run
    tensorboard: bool = False  # log to out_dir/tensorboard
    # machine
    device: str | None = None  # cpu, cuda, cuda:1, mps; auto: the best there is
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None  # auto: bf16 if fast
    compile: bool | None = None  # torch.compile; auto: on CUDA, where it works
    backend: Literal["nccl", "gloo"] | None = None  # of torchrun's processes; auto: nccl on CUDA
    parallel: Literal["ddp", "fsdp"] = "ddp"  # each process has the whole model, or its share of it
    activation_checkpointing: bool = False  # compute blocks again going back: less memory, slower
    loss_chunk: int | None = None  # head and loss for so many tokens at a time: less memory
    seed: int = 1337  # of the initial weights, the data order and dropout

    def __post_init__(self) -> None:
        super().__post_init__()
        self.convert_eval_iters()

    def convert_eval_iters(self) -> None:
        """nanoGPT counts evaluations in batches, we in tokens."""
        if self.eval_iters is not None:
            self.eval_tokens = self.eval_iters * self.batch_size * self.block_size

    def adopt(self, model_config: GPTConfig) -> None:
        """Say what the model is, where its shape comes from a checkpoint or from the data."""
        for field in fields(GPTConfig):
            setattr(self, field.name, getattr(model_config, field.name))
        self.convert_eval_iters()

    def _rules(self) -> list[tuple[bool, str, str, str]]:
        counts = ("batch_size", "gradient_accumulation_steps", "loss_chunk", "max_iters",
                  "lr_decay_iters", "eval_interval", "eval_iters", "eval_tokens", "save_interval",
                  "log_interval")
        amounts = ("learning_rate", "muon_lr", "scalar_lr", "weight_decay", "muon_weight_decay",
                   "grad_clip", "min_lr", "warmup_iters", "seed")
        one = [(n, v) for n in counts if (v := getattr(self, n)) is not None]
        zero = [(n, v) for n in amounts if (v := getattr(self, n)) is not None]
        most = dict(batch_size=1_000_000)
        custom_tokens = self.eval_tokens != TrainConfig.eval_tokens
        end = min(self.max_iters, self.lr_decay_iters or self.max_iters)
        return super()._rules() + [
            *((not 1 <= value <= most.get(name, 2**53), f"{name}={value}",
               f"must be at least 1, at most {most.get(name, 2**53)}", "choose another count")
              for name, value in one),
            *((value < 0, f"{name}={value}", "must not be negative", "choose 0 or more")
              for name, value in zero),
            *((not 0 <= beta < 1, f"{name}={beta}", "must lie in [0, 1)", "the default is usual")
              for name, beta in (("beta1", self.beta1), ("beta2", self.beta2))),
            (self.decay_lr and self.warmup_iters > end > 0, f"warmup_iters={self.warmup_iters}",
             f"must not exceed max_iters or lr_decay_iters, {end}", "warm up for fewer steps"),
            (self.vocab_used is not None, f"vocab_used={self.vocab_used}", "comes from the data",
             "drop it"),
            (not 0 < self.decay_fraction <= 1, f"decay_fraction={self.decay_fraction}",
             "is a share of lr_decay_iters", "use 0 < decay_fraction <= 1"),
            (self.eval_iters is not None and custom_tokens, "eval_iters and eval_tokens",
             "say the same thing twice", "drop one (--eval_iters=auto)"),
            (self.init_from not in ("scratch", "resume", "auto")
             and not self.init_from.startswith("gpt2") and not self.init_from.endswith(".pt")
             and not holds_weights(self.init_from), f"init_from={self.init_from}",
             "names no weights", "use scratch, resume, auto, gpt2, gpt2-medium, gpt2-large, "
             "gpt2-xl, a .pt file, or a folder that bench.py export or transformers wrote"),
        ]


def tune_allocator(ours: bool = True) -> None:
    """What glibc does with freed memory, a tenth of a training step on a CPU. Ours: the heap keeps
    small tensors, where it would give them back and fault them in again at every step; from 4 MB
    on, where the heap would keep pieces, they go back (and come in huge pages: see model.py).
    False: glibc's own setting, as it settles. Without glibc nothing happens."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**22 if ours else 2**25)  # M_MMAP_THRESHOLD: whatever is larger goes back
        mallopt(-1, 2**27 if ours else 2**26)  # M_TRIM_THRESHOLD: so much the heap may keep


def holds_weights(folder: str) -> bool:
    """Whether bench.py export or transformers may have written this folder."""
    names = os.listdir(folder) if os.path.isdir(folder) else ()
    return any(name.startswith(("model.safetensors", "pytorch_model")) for name in names)


# -----------------------------------------------------------------------------
# Data: a memory-mapped stream of tokens, read in windows of T + 1


class Tokens:
    """One split of a data folder with this meta. read(starts) gives rows of T + 1 raw ids."""

    def __init__(self, folder: str, split: str, meta: dict, block_size: int):
        self.path, kind = os.path.join(folder, f"{split}.bin"), np.dtype(meta["dtype"])
        empty = os.path.getsize(self.path) < kind.itemsize  # which memmap refuses
        self.data = np.zeros(0) if empty else np.memmap(self.path, kind.newbyteorder("<"), mode="r")
        self.block_size, self.vocab_size = block_size, meta["vocab_size"]
        if len(self) <= block_size:
            fail(f"{self.path} has {len(self)} tokens, and a window of block_size={block_size} "
                 f"needs {block_size + 1}; lower --block_size or prepare more text")

    def __len__(self) -> int:
        return len(self.data)

    def read(self, starts: Iterable[int]) -> torch.Tensor:
        """(len(starts), T + 1), in the signed type as wide as the bin's: two bytes a token."""
        rows = np.stack([self.data[s:s + self.block_size + 1] for s in starts])
        if rows.max() >= self.vocab_size:
            fail(f"{self.path} has the token id {rows.max()}, and its vocabulary only "
                 f"{self.vocab_size}; prepare the data again")
        return torch.from_numpy(rows.view(f"<i{rows.itemsize}"))


def check_bins(folder: str, meta: dict) -> None:
    """Compare the bins with what meta.json says of them. Raises UserError if they differ."""
    for split in ("train", "val"):
        path = os.path.join(folder, f"{split}.bin")
        if "sha256" not in meta[split]:
            fail(f"check_data=True: {folder} has no meta.json with the sha256 of its bins; drop "
                 f"the option, or make the data with prepare.py")
        if sha256(path) != meta[split]["sha256"]:
            fail(f"{path} is not what prepare.py wrote: its sha256 differs from meta.json's; "
                 f"prepare the data again, with --overwrite")


def to_device(rows: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Raw rows (B, T + 1) -> inputs and targets (B, T) int64 on the device."""
    mask = (1 << 8 * rows.element_size()) - 1  # the bins are unsigned
    ids = rows.to(device, non_blocking=device.type == "cuda").long() & mask
    return ids[:, :-1].contiguous(), ids[:, 1:].clone()  # of a single row both would be views


def mix(x: np.ndarray, key: np.uint64) -> np.ndarray:
    """A hash of uint64 (splitmix64's)."""
    x = x + key
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permuted(x: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """A keyed permutation of range(n), entry by entry, so that none need be stored: a Feistel
    network on the cells of a rectangle; who lands on a cell beyond n goes through it again."""
    columns = np.uint64(math.isqrt(n - 1) + 1)
    rows = np.uint64(-(-n // int(columns)))
    row, column = np.divmod(x.astype(np.uint64), columns)
    for key in keys.reshape(-1, 2):
        row = (row + mix(column, key[0])) % rows
        column = (column + mix(row, key[1])) % columns
    x = row * columns + column
    beyond = x >= n
    if beyond.any():
        x[beyond] = permuted(x[beyond], n, keys)
    return x


class WindowOrder:
    """The order in which training visits the windows, as arithmetic on one integer.

    An epoch is a seeded permutation of W = (N - T) // T non-overlapping windows (one if N < 2T);
    their grid starts at 0 in epoch 0 and at a seeded offset in [0, T) later. Position p is window
    p % W of epoch p // W, whatever the micro-batch or the number of ranks.
    """

    def __init__(self, n_tokens: int, block_size: int, seed: int):
        self.n_tokens, self.block_size, self.seed = n_tokens, block_size, seed
        self.per_epoch = max(1, (n_tokens - block_size) // block_size)

    def starts(self, position: int, count: int) -> list[int]:
        """First tokens of the windows position .. position + count - 1."""
        found: list[int] = []
        while count > 0:
            epoch, index = divmod(position, self.per_epoch)
            here = min(count, self.per_epoch - index)
            keys = np.random.SeedSequence([self.seed, epoch]).generate_state(9, np.uint64)
            room = min(self.block_size, self.n_tokens - self.block_size)
            offset = int(keys[8]) % room if epoch else 0
            windows = permuted(np.arange(index, index + here), self.per_epoch, keys[:8])
            found += (offset + self.block_size * windows.astype(np.int64)).tolist()
            position, count = position + here, count - here
        return found


def evaluation_starts(n_tokens: int, block_size: int, eval_tokens: int) -> list[int]:
    """Evenly spaced windows of the split that hold eval_tokens tokens, or all of them if fewer."""
    there = (n_tokens - 1) // block_size
    count = min(there, max(1, eval_tokens // block_size))
    return [i * there // count * block_size for i in range(count)]


def prefetch(batches: Iterator, depth: int = 4) -> Iterator:
    """The same items, made `depth` ahead by a thread; its exception is raised here."""
    ready: queue.Queue = queue.Queue(depth)
    closed = threading.Event()

    def put(item) -> bool:
        while not closed.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return True
        return False

    def work() -> None:
        try:
            for batch in batches:
                if not put((batch, None)):
                    return
        except Exception as error:
            put((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            batch, error = ready.get()
            if error is not None:
                raise error
            yield batch
    finally:
        closed.set()
        thread.join()  # a thread inside torch would abort the exit of the interpreter


# -----------------------------------------------------------------------------
# Optimisers and schedule


def newton_schulz(x: torch.Tensor, group: dict) -> torch.Tensor:
    """Each of the matrices x (n, rows, columns), rows <= columns, made nearly orthogonal, in bf16:
    torch.optim.Muon's iteration on all of them at once."""
    a, b, c = group["ns_coefficients"]
    x = x.bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = x @ x.mT  # (n, rows, rows)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.Muon):
    """torch.optim.Muon, to bf16's rounding, but with Newton-Schulz of all matrices of a shape at
    once, and under DDP divided over the processes: each does its share and gives it to the others.
    Its own goes on one matrix at a time, in every process all of them."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list] = {}  # rows <= columns -> matrices and their updates
            for p in (p for p in group["params"] if p.grad is not None):
                if p not in self.state:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
                momentum = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(momentum, group["momentum"])
                update = update.mT if p.size(0) > p.size(1) else update
                shapes.setdefault(update.shape, []).append((p, update))
            for pairs in shapes.values():
                updates = share_out(lambda x, g=group: newton_schulz(x, g),
                                    torch.stack([update for _, update in pairs]).bfloat16())
                for (p, _), update in zip(pairs, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update.mT if p.size(0) > p.size(1) else update,
                           alpha=-group["lr"] * max(1, p.size(0) / p.size(1)) ** 0.5)


def share_out(function: Callable, x: torch.Tensor) -> torch.Tensor:
    """function(x), along the first dimension divided over the processes, which all get it all."""
    if not dist.is_initialized():
        return function(x)
    rank, world = dist.get_rank(), dist.get_world_size()
    n = -(-len(x) // world)
    part = torch.zeros(n, *x.shape[1:], dtype=x.dtype, device=x.device)
    own = x[rank * n:(rank + 1) * n]
    if len(own):
        part[:len(own)] = function(own)
    whole = x.new_empty(n * world, *x.shape[1:])
    dist.all_gather_into_tensor(whole, part)
    return whole[:len(x)]


def make_optimizers(model: GPT, config: TrainConfig, device: torch.device,
                    ) -> dict[str, torch.optim.Optimizer]:
    """AdamW over everything, or Muon for the blocks' matrices and AdamW for the rest. Every group
    keeps its peak rate in "peak_lr"."""
    c = config
    scalar_lr = 5 * c.learning_rate if c.scalar_lr is None else c.scalar_lr
    roles = model.parameter_roles()
    muon = list(roles.pop("matrix").items()) if c.optimizer == "muon" else []
    adamw = model.configure_optimizers(c.weight_decay, c.learning_rate, (c.beta1, c.beta2),
                                       device.type, scalar_lr, roles=tuple(roles))
    optimizers: dict[str, torch.optim.Optimizer] = {"adamw": adamw}
    if muon:
        kind = torch.optim.Muon if c.parallel == "fsdp" else Muon  # torch's takes shards
        optimizers["muon"] = kind(muon, lr=c.muon_lr, momentum=0.95, nesterov=True, ns_steps=5,
                                  weight_decay=c.muon_weight_decay)
    for group in (g for o in optimizers.values() for g in o.param_groups):
        group["peak_lr"] = group["lr"]
    held = [p for o in optimizers.values() for g in o.param_groups for p in g["params"]]
    assert len(held) == len(set(held)) == len(list(model.parameters())), "not a partition"
    return optimizers


def lr_multiplier(step: int, config: TrainConfig) -> float:
    """Share of its peak that every learning rate has at a step; warm-up is nanoGPT's formula."""
    c = config
    if not c.decay_lr:
        return 1.0
    if step < c.warmup_iters:
        return (step + 1) / (c.warmup_iters + 1)
    if c.schedule == "constant":
        return 1.0
    floor = 0.1 if c.min_lr is None else c.min_lr / (c.learning_rate or 1.0)
    end = c.max_iters if c.lr_decay_iters is None else c.lr_decay_iters
    if step >= end:
        return floor
    if c.schedule == "wsd":
        decay_iters = max(1, round(c.decay_fraction * end))
        return floor + (1 - floor) * min(1.0, (end - step) / decay_iters)
    progress = (step - c.warmup_iters) / (end - c.warmup_iters)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def named_states(optimizers: dict[str, torch.optim.Optimizer]) -> dict:
    """optimiser -> parameter name -> its state."""
    return {kind: {name: o.state[p] for g in o.param_groups
                   for name, p in zip(g["param_names"], g["params"], strict=True) if p in o.state}
            for kind, o in optimizers.items()}


def load_states(optimizers: dict[str, torch.optim.Optimizer], states: dict) -> None:
    """The inverse of named_states; cuts the state of a position table that was cropped, and keeps
    of a sharded parameter's this process's part."""
    def fit(value: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        if not isinstance(value, torch.Tensor) or not value.dim() or hasattr(value, "to_local"):
            return value
        value = value[:len(p)]
        if hasattr(p, "to_local") and value.shape == p.shape:  # a DTensor
            from torch.distributed.tensor import distribute_tensor

            value = distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)
        return value

    for kind, o in optimizers.items():
        plan = o.state_dict()  # numbers the parameters in the order of the groups
        named = {n: p for g in o.param_groups
                 for n, p in zip(g["param_names"], g["params"], strict=True)}
        numbers = [i for g in plan["param_groups"] for i in g["params"]]
        for i, (n, p) in zip(numbers, named.items(), strict=True):
            if n in states[kind]:
                fitted = {k: fit(v, p) for k, v in states[kind][n].items()}
                if bad := [k for k, v in fitted.items() if not isinstance(v, torch.Tensor)
                           or (v.dim() and v.shape != p.shape)]:
                    fail(f"the checkpoint's {kind} state {bad[0]} of {n} does not fit its "
                         f"parameter; start from the weights alone: --init_from=FILE.pt and "
                         f"another --out_dir")
                plan["state"][i] = fitted
        o.load_state_dict(plan)


def nanogpt_states(model: GPT, state: dict) -> dict:
    """nanoGPT's optimiser state, numbered in its order (matrices and tables, then the rest), by
    name."""
    named = list(model.named_parameters())
    names = [n for n, p in named if p.dim() >= 2] + [n for n, p in named if p.dim() < 2]
    return {"adamw": {names[i]: s for i, s in state["state"].items()}}


# -----------------------------------------------------------------------------
# Checkpoints


def write_file(state: dict, path: str) -> None:
    """Write a checkpoint so that `path` is the old or the new one, whole, at every moment."""
    partial = f"{path}.partial"
    try:
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        with contextlib.suppress(OSError):
            os.remove(partial)
        full = "" if isinstance(error, OSError) else "the disk is full, it seems: "
        fail(f"cannot write {path}: {full}{reason(error)}; ckpt.pt and the others of before are "
             f"intact")


def link(source: str, target: str) -> None:
    """Give the file `source` a second name in one step, replacing what `target` named before."""
    if os.path.exists(target) and os.path.samefile(source, target):
        return  # for which POSIX renames nothing, and leaves the partial name
    with contextlib.suppress(OSError):
        os.remove(f"{target}.partial")
    try:
        os.link(source, f"{target}.partial")
        replace(f"{target}.partial", target)
    except OSError:  # a file system without hard links
        write_file(read_checkpoint(source, weights=False), target)


CHECKPOINTS = ("ckpt.pt", "ckpt_prev.pt", "best.pt")


def save_checkpoint(state: dict, out_dir: str, latest: bool, best: bool) -> None:
    """ckpt.pt, keeping the one before as ckpt_prev.pt, and best.pt, which may be the same file."""
    path, best_path = os.path.join(out_dir, "ckpt.pt"), os.path.join(out_dir, "best.pt")
    if best:  # first: a run killed in between comes here again
        write_file(state, best_path)
    if latest:
        if os.path.exists(path):
            link(path, os.path.join(out_dir, "ckpt_prev.pt"))
        if best:
            link(best_path, path)
        else:
            write_file(state, path)


def tensors_by_name(model: GPT, optimizers: dict[str, torch.optim.Optimizer]) -> dict:
    """model/parameter and optimiser/parameter/state -> tensor, or this process's part of it."""
    weights = {f"model/{name}": p.detach() for name, p in model.named_parameters()}
    return weights | {f"{kind}/{name}/{key}": value for kind, of in named_states(optimizers).items()
                      for name, state in of.items() for key, value in state.items()}


def save_shards(tensors: dict[str, torch.Tensor], out_dir: str, step: int, ranks: "Ranks") -> str:
    """Every process writes its parts to a new folder of out_dir, whose name is returned: it counts
    once a checkpoint has that name."""
    import torch.distributed.checkpoint as dcp

    names = (f"shards-{step}" + (f"-{i}" if i else "") for i in itertools.count())
    name = ranks.gather(next(n for n in names if not os.path.exists(os.path.join(out_dir, n))))[0]
    folder = os.path.join(out_dir, name)
    try:
        dcp.save(tensors, checkpoint_id=folder)
    except dcp.CheckpointException as error:
        shutil.rmtree(folder, ignore_errors=True)
        fail(f"cannot write {folder}: {reason(error)}; what was there before is intact")
    sync_folder(folder)
    return name


def load_shards(folder: str, model: GPT) -> dict:
    """Fill the model, however many processes wrote the shards and whether it is sharded now or not;
    return the optimisers' states, as named_states has them, in tensors like the parameters."""
    import torch.distributed.checkpoint as dcp

    reader = shard_reader(folder)
    there = reader.read_metadata().state_dict_metadata
    tensors = {f"model/{name}": p.detach() for name, p in model.named_parameters()}
    if sorted(tensors) != sorted(name for name in there if name.startswith("model/")) or any(
            there[name].size != p.shape for name, p in tensors.items()):
        fail(f"{folder} has another model's weights; drop the options that change the model")
    states: dict = {}
    for full_name in sorted(there.keys() - tensors.keys()):
        kind, name, key = full_name.split("/")
        p, shape = tensors[f"model/{name}"], there[full_name].size
        value = torch.zeros_like(p) if shape == p.shape else torch.zeros(shape)
        tensors[full_name] = value
        states.setdefault(kind, {}).setdefault(name, {})[key] = value
    try:
        dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    except dcp.CheckpointException as error:
        fail(f"{folder} is damaged: {reason(error)}; remove the checkpoint that needs it")
    return states


def remove_remains(out_dir: str) -> None:
    """What killed saves have left: partial files, and shards that no checkpoint names."""
    for name in os.listdir(out_dir):
        if name.endswith(".pt.partial"):
            os.remove(os.path.join(out_dir, name))
    old = {name for name in os.listdir(out_dir) if name.startswith("shards-")}
    for name in CHECKPOINTS if old else ():
        with contextlib.suppress(UserError):
            old.discard(read_checkpoint(os.path.join(out_dir, name), weights=False).get("shards"))
    for name in old:
        shutil.rmtree(os.path.join(out_dir, name), ignore_errors=True)


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """torch's generators of this process."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states["device"] = getattr(torch, device.type).get_rng_state()
    return states


def set_rng_state(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """The inverse of rng_state."""
    torch.set_rng_state(states["cpu"])
    if device.type != "cpu" and "device" in states:
        getattr(torch, device.type).set_rng_state(states["device"])


# -----------------------------------------------------------------------------
# Logs


class Log:
    """log.jsonl, one JSON object a line, and wandb or tensorboard when asked for."""

    def __init__(self, config: TrainConfig, length: int | None):
        """length: cut an earlier log back to so many bytes; None starts a new one."""
        self.sinks = [*([wandb_sink(config)] if config.wandb_log else []),
                      *([tensorboard_sink(config)] if config.tensorboard else [])]
        path = os.path.join(config.out_dir, "log.jsonl")
        # unbuffered, so that what a full disk refuses is not tried again when the file is closed
        self.file = open(path, "wb" if length is None else "ab", buffering=0)
        if length is not None and self.file.tell() > length:
            self.file.truncate(length)
            self.file.seek(0, os.SEEK_END)
        with open(path, encoding="utf-8", errors="replace") as file:  # it may be damaged
            clock = re.findall(r'"seconds": (\d+(?:\.\d+)?)', file.read())
        self.seconds = float(clock[-1]) if clock else 0.0  # at which a resumed run goes on
        if self.file.tell() == 0:
            self.write({"type": "config", **asdict(config)})

    def write(self, record: dict) -> None:
        data = f"{json.dumps(record)}\n".encode()
        while data:
            data = data[self.file.write(data):]

    def record(self, kind: str, step: int, scalars: dict[str, list[list[float]]] | None = None,
               **values: float | None) -> None:
        """scalars: the learned ones, name -> layers -> substeps; elsewhere go their means."""
        values = {k: v if v is not None and math.isfinite(v) else None for k, v in values.items()}
        self.write({"type": kind, "iter": step, **values,
                    **({"scalars": scalars} if scalars else {})})
        means = {f"scalars/{k}": float(np.mean(v)) for k, v in (scalars or {}).items()}
        for sink in self.sinks:
            sink({f"{kind}/{k}": v for k, v in values.items() if v is not None} | means, step)

    def length(self) -> int:
        """Bytes so far, on the disk."""
        os.fsync(self.file.fileno())
        return self.file.tell()


def wandb_sink(config: TrainConfig) -> Callable[[dict[str, float], int], None]:
    """A function of ({name: value}, step) that logs to Weights & Biases."""
    try:
        import wandb
    except ImportError as error:
        fail(f"wandb_log=True needs wandb: pip install wandb ({error})")
    run = wandb.init(project=config.wandb_project, name=config.wandb_run_name,
                     config=asdict(config))
    return lambda values, step: run.log(values, step=step)


def tensorboard_sink(config: TrainConfig) -> Callable[[dict[str, float], int], None]:
    """A function of ({name: value}, step) that logs to out_dir/tensorboard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        fail(f"tensorboard=True needs tensorboard: pip install tensorboard ({error})")
    writer = SummaryWriter(os.path.join(config.out_dir, "tensorboard"))

    def log(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return log


def read_log(out_dir: str) -> list[dict]:
    """The records of a run's log.jsonl; `seconds` goes on over its interruptions. UserError where
    there is none."""
    path = os.path.join(out_dir, "log.jsonl")
    try:
        with open(path, encoding="utf-8") as file:
            records = [json.loads(line) for line in file if line.endswith("}\n")]
        before = latest = 0.0
        for record in records:
            if "seconds" in record:
                before += latest if record["seconds"] < latest else 0.0
                latest = record["seconds"]
                record["seconds"] += before
    except OSError as error:
        fail(f"{path}: {error.strerror}; name the out_dir of a run")
    except (ValueError, TypeError) as error:
        fail(f"{path}: {reason(error)}; name the out_dir of a run")
    if not any(record.get("type") in ("train", "eval") for record in records):
        fail(f"{path} has no losses yet; name the out_dir of a run that has begun")
    return records


def run_names(out_dirs: Sequence[str]) -> dict[str, str]:
    """out_dir -> its name in a picture: the last folder's, if no other one's is the same."""
    names = [os.path.basename(os.path.normpath(run)) for run in out_dirs]
    return {run: name if names.count(name) == 1 else run
            for run, name in zip(out_dirs, names, strict=True)}


AXES = {"steps": ("iter", "step"), "tokens": ("tokens", "training tokens"),
        "seconds": ("seconds", "wall time (s)"), "flops": ("flops", "training FLOPs")}


def plot_losses(out_dirs: list[str], path: str, x: str = "steps",
                flops_per_token: tuple[float, ...] = ()) -> None:
    """Draw the losses of one run or several to a PNG, where matplotlib is installed, over one of
    AXES (flops with each run's flops_per_token)."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    key, label = AXES[x]
    axes = figure.add_subplot(xlabel=label, ylabel="cross-entropy (nats per token)")
    names = run_names(out_dirs)
    top = 0.0  # of the picture: the second evaluation, since the first is that of no training
    for i, out_dir in enumerate(out_dirs):
        records = read_log(out_dir)
        for r in records if flops_per_token else ():
            r["flops"] = r.get("tokens", 0) * flops_per_token[i]
        for kind, name, style in (("train", "loss", dict(lw=0.7, alpha=0.4)),
                                  ("eval", "val_loss", dict(marker="o", ms=3.5))):
            points = [(r[key], r[name]) for r in records
                      if r.get("type") == kind and r.get(name) and key in r]
            if points:
                axes.plot(*zip(*points, strict=True), color=f"C{i}", **style,
                          label=f"{names[out_dir]}, {kind}: {points[-1][1]:.4f}")
                top = max([top, *(loss for _, loss in points[1:2] if kind == "eval")])
    axes.set_ylim(top=1.05 * top or None)
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    FigureCanvasAgg(figure).print_png(path)


def refresh_picture(out_dir: str) -> None:
    """Draw loss.png anew. A picture, or a log that was damaged, is no reason to end a run."""
    with contextlib.suppress(OSError, UserError):
        plot_losses([out_dir], os.path.join(out_dir, "loss.png"))


PEAK_FLOPS = {  # dense bf16 (fp16 on V100 and T4) FLOP/s by card, the makers' data sheets
    "B200": 2250e12, "H200": 989e12, "H100": 989e12, "GH200": 989e12, "A100": 312e12,
    "L40S": 362e12, "L4": 121e12, "A10": 125e12, "V100": 125e12, "T4": 65e12, "5090": 209.5e12,
    "4090": 165.2e12, "3090": 71e12}


def peak_flops(device: torch.device) -> float | None:
    """Of a known card; None for another, and for a CPU."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    words = name.replace("-", " ").split()
    if {"PCIe", "PCIE", "NVL", "Laptop"} & set(words):  # slower namesakes
        return None
    return next((PEAK_FLOPS[word] for word in words if word in PEAK_FLOPS), None)


def peak_resident() -> int | None:
    """The most bytes that were resident so far; None on Windows. (On Linux getrusage's figure
    begins with that of the process that started this one.)"""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    try:
        import resource
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most * (1 if sys.platform == "darwin" else 1024)


def peak_mb(device: torch.device) -> int | None:
    """The most memory that this process has had so far: of the GPU, or resident."""
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_resident()
    return peak and round(peak / 1e6)


def clock(seconds: float) -> str:
    """h:mm:ss."""
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


# -----------------------------------------------------------------------------
# Processes and signals


COLLECTIVE_TIMEOUT = timedelta(minutes=10)  # longer than writing the largest checkpoint


class Ranks:
    """This process among those of torchrun; alone, every collective is a no-op."""

    def __init__(self, config: TrainConfig):
        self.parallel = "RANK" in os.environ
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store, self.restarted = None, attempt != "0"  # is it torchrun's restart of this run?
        numbers = {name: os.environ.get(name, default) for name, default in
                   (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"))}
        complete = {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys() or not self.parallel
        if not (complete and all(n.isdecimal() for n in numbers.values())
                and int(numbers["RANK"]) < int(numbers["WORLD_SIZE"])):
            words = ", ".join(f"{name}={number}" for name, number in numbers.items())
            fail(f"{words} is not what torchrun sets; start with torchrun, or unset them")
        self.rank, local_rank, self.world = map(int, numbers.values())
        self.device = pick_device(config.device, local_rank)
        if config.gradient_accumulation_steps % self.world:
            fail(f"gradient_accumulation_steps={config.gradient_accumulation_steps}: must be a "
                 f"multiple of the {self.world} processes, over all of which it is the total; use "
                 f"--gradient_accumulation_steps={self.world}, and a smaller --batch_size")
        if config.parallel == "fsdp" and not self.parallel:
            fail("parallel=fsdp divides the model over processes, and here is only one; start "
                 "them with torchrun --nproc_per_node=N")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.parallel:
            backend = config.backend or ("nccl" if self.device.type == "cuda" else "gloo")
            if backend == "nccl" and self.device.type != "cuda":
                fail(f"backend=nccl is for CUDA, and this device is {self.device}; use gloo")
            store, _, _ = next(dist.rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # it outlives restarts
                self.store, self.restarted = store, store.check(["begun"])
            dist.init_process_group(  # torchrun's restarts leave addresses of the dead in its store
                "cpu:gloo,cuda:nccl" if backend == "nccl" else backend, rank=self.rank,
                world_size=self.world, store=dist.PrefixStore(f"attempt-{attempt}", store),
                timeout=COLLECTIVE_TIMEOUT)

    def begun(self) -> None:
        """From here on torchrun's restarts resume this run. (Not those of one that was refused.)"""
        if self.store is not None:
            self.store.set("begun", "")

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Sum over the processes, in place; returns its argument."""
        if self.parallel:
            dist.all_reduce(value)
        return value

    def any(self, flag: bool) -> bool:
        """Does one process say so?"""
        return self.sum(torch.tensor(float(flag))).item() > 0  # over gloo: the GPU need not wait

    def gather(self, value) -> list:
        """Every process's value, in the order of the ranks."""
        if not self.parallel:
            return [value]
        gathered = [None] * self.world
        dist.all_gather_object(gathered, value)
        return gathered

    def close(self) -> None:
        """Leave the process group."""
        if self.parallel:
            dist.destroy_process_group()


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT in a list, for the loop to see. A second signal, a second or more
    after the first (Ctrl-C under torchrun arrives twice), ends the process at once: a thread sees
    to that, because Python's handlers wait for a collective or a write to return."""
    caught: list[int] = []
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def watch() -> None:
        first = None
        while number := reader.recv(1):
            now = time.monotonic()
            if first is not None and now - first > 1:
                os._exit(128 + number[0])
            if first is None:
                first = now
                print("\nstopping after this step; another signal ends it at once",
                      file=sys.stderr, flush=True)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    before = {n: signal.signal(n, lambda number, _: caught.append(number))
              for n in (signal.SIGTERM, signal.SIGINT)}
    signal.set_wakeup_fd(writer.fileno())
    try:
        yield caught
    finally:
        signal.set_wakeup_fd(-1)
        for number, old in before.items():
            signal.signal(number, old)
        writer.close()
        thread.join()
        reader.close()


# -----------------------------------------------------------------------------
# The run


TOKENIZER_KEYS = ("tokenizer", "vocab_size", "padded_vocab_size", "alphabet")  # of meta.json


def model_args(config: TrainConfig) -> dict:
    """The part of the options that is the model's."""
    return {f.name: getattr(config, f.name) for f in fields(GPTConfig)}


def make_model(config: TrainConfig, given: set[str], meta: dict, checkpoint: dict | None) -> GPT:
    """A new model, GPT-2's, or the checkpoint's; its vocabulary is the data's."""
    ours = model_args(config)
    if checkpoint is not None and not checkpoint["model"]:  # in shards: load_shards will fill it
        theirs = asdict(checkpoint_config(checkpoint))
        model = GPT(GPTConfig(**theirs | {"dropout": config.dropout}))
    elif checkpoint is not None:
        model = GPT.from_checkpoint(checkpoint, dropout=config.dropout)
    elif config.init_from.startswith("gpt2"):
        model = GPT.from_pretrained(config.init_from, {"dropout": config.dropout})
    else:
        size = config.vocab_size or meta["padded_vocab_size"]
        model = GPT(GPTConfig(**ours | {"vocab_size": size, "vocab_used": meta["vocab_size"]}))
    theirs = asdict(model.config)
    free = {"vocab_used"}  # an option that was given must be what the model has, or can become
    if config.block_size <= model.config.block_size:
        free.add("block_size")  # the context can be cropped
    problems = [f"{n}={ours[n]}, but the checkpoint's model has {n}={theirs[n]}; drop the "
                f"option, or train from scratch"
                for n in theirs if n in given - free and ours[n] != theirs[n]]
    if problems:
        fail(*problems)
    if meta["vocab_size"] > model.config.vocab_size:
        fail(f"the data has {meta['vocab_size']} token ids, the model only "
             f"{model.config.vocab_size}; prepare the data with the model's tokenizer")
    wanted = checkpoint is None or "block_size" in given  # a checkpoint keeps its context if not
    if wanted and config.block_size < model.config.block_size:
        model.crop_block_size(config.block_size)
    return model


def parallelise(model: GPT, config: TrainConfig, ranks: Ranks) -> torch.nn.Module:
    """The model on this process's device: alone, a copy for each process (DDP), or divided over
    them block by block (FSDP2), in place."""
    if config.parallel == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(ranks.device.type, (ranks.world,))
        for part in (*model.transformer.h, model):
            fully_shard(part, mesh=mesh)
        return model
    model.to(ranks.device)
    if not ranks.parallel:
        return model
    ids = [ranks.device.index] if ranks.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


def accumulate(model: torch.nn.Module, batches: Iterator[torch.Tensor], micro_steps: int,
               device: torch.device, dtype: torch.dtype, scaler: torch.amp.GradScaler,
               ) -> torch.Tensor:
    """The gradients of one step, averaged over the processes after the last of its micro-batches.
    Returns the mean loss () of this process's micro-batches."""
    total = 0.0
    for micro_step in range(micro_steps):
        # DDP sums up at the last one; FSDP2 at each, or every process would hold whole gradients
        quiet = isinstance(model, DistributedDataParallel) and micro_step < micro_steps - 1
        x, y = to_device(next(batches), device)
        with model.no_sync() if quiet else contextlib.nullcontext():
            with autocast(device, dtype):
                loss = model(x, y)[1] / micro_steps
            scaler.scale(loss).backward()
        total = total + loss.detach()
    return total


def try_compile(model: GPT, wanted: bool | None, device: torch.device, say: Callable = print,
                blocks: bool = False) -> bool:
    """Compile the model (or each of its blocks) in place if it is wanted and works here."""
    if not can_compile(wanted, device, say):
        return False
    for part in model.transformer.h if blocks else (model,):
        part.compile(dynamic=False)
    return True


@torch.no_grad()
def evaluate(model: GPT, tokens: Tokens, eval_tokens: int, ranks: Ranks, dtype: torch.dtype,
             ) -> float:
    """Mean cross-entropy (nats per token) over a fixed set of windows. They are cut into batches,
    and summed in float64, the same way whatever the micro-batch and the number of processes; all
    processes make equally many forward passes, as sharding needs."""
    model.eval()
    starts = evaluation_starts(len(tokens), tokens.block_size, eval_tokens)
    rows = max(1, 4096 // tokens.block_size)
    batches = [starts[i:i + rows] for i in range(0, len(starts), rows)]
    home = "cpu" if ranks.device.type == "mps" else ranks.device  # MPS has no float64
    sums = torch.zeros(len(batches) + ranks.world, dtype=torch.float64, device=home)
    for i in range(ranks.rank, len(batches) + ranks.rank, ranks.world):
        batch = batches[i] if i < len(batches) else []
        x, y = to_device(tokens.read(batch + starts[:1] * (rows - len(batch))), ranks.device)
        y[len(batch):] = -1  # the last batch is filled up to the shape of the others
        with autocast(ranks.device, dtype):
            losses = model(x, y, reduction="none")[1]
        sums[i] = losses.to(home).double().sum()
    if hasattr(model, "reshard"):  # FSDP2 leaves the tables whole for a backward pass
        model.reshard()
    model.train()
    return ranks.sum(sums)[:len(batches)].sum().item() / (len(starts) * tokens.block_size)


def restore(checkpoint: dict, config: TrainConfig, model: GPT,
            optimizers: dict[str, torch.optim.Optimizer], scaler: torch.amp.GradScaler,
            ranks: Ranks, say: Callable) -> None:
    """Put a checkpoint's optimisers, loss scale and generators back, and sharded weights too."""
    if "shards" in checkpoint:
        states = load_shards(os.path.join(config.out_dir, checkpoint["shards"]), model)
    else:
        states = checkpoint.get("optimizer") or {}
    if "param_groups" in states and config.optimizer == "adamw":
        states = nanogpt_states(model, states)
    if states.keys() == optimizers.keys():
        load_states(optimizers, states)
    else:
        say("warning: the checkpoint's optimiser is another one; its state starts anew")
    if scaler.is_enabled() and checkpoint.get("scaler"):
        scaler.load_state_dict(checkpoint["scaler"])
    if len(checkpoint.get("rng", ())) == ranks.world:
        set_rng_state(checkpoint["rng"][ranks.rank], ranks.device)
    else:
        say("warning: the checkpoint has no generator states for this number of processes; "
            "dropout restarts from the seed")


def report(model: GPT, config: TrainConfig, meta: dict, train: Tokens, val: Tokens, ranks: Ranks,
           dtype: torch.dtype, compiled: bool) -> None:
    """What is about to run."""
    roles = model.parameter_roles()
    total = model.get_num_params(non_embedding=False)
    embedding = sum(p.numel() for p in roles["embedding"].values())
    velocity = sum(p.numel() for n, p in roles["embedding"].items() if ".vte." in n or ".vpe." in n)
    sequences = config.batch_size * config.gradient_accumulation_steps
    windows = len(evaluation_starts(len(val), config.block_size, config.eval_tokens))
    precision = str(dtype).removeprefix("torch.") + (", compiled" if compiled else ", eager")
    print(f"""\
model:  {total:,} parameters: {total - embedding:,} non-embedding, {embedding:,} embedding, of these
        {velocity:,} in velocity tables; {model.flops_per_token() / 1e6:,.1f} MFLOP per token
step:   {sequences * config.block_size:,} tokens = {config.gradient_accumulation_steps} micro-\
batches of {config.batch_size} x {config.block_size}, {config.parallel} over {ranks.world} \
process(es)
data:   {config.dataset}: {len(train):,} training and {len(val):,} validation tokens, \
{meta["vocab_size"]:,} ids
eval:   {windows * config.block_size:,} tokens every {config.eval_interval} steps
device: {ranks.device}, {precision}""")


def train(config: TrainConfig, given: set[str], ranks: Ranks) -> None:
    """The run, from top to bottom."""
    c, device, master = config, ranks.device, ranks.rank == 0
    say = print if master else (lambda *_, **__: None)
    folder = os.path.join(c.data_dir, c.dataset)
    meta = load_meta(folder)
    if c.check_data:  # every process, so that none waits for another
        check_bins(folder, meta)
    dtype = pick_dtype(c.dtype, device)
    if device.type == "cpu":
        tune_allocator()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in fp32

    # --- where to start: nothing, a checkpoint of this run, or other weights ---
    resume = c.init_from in ("resume", "auto") or ranks.restarted
    checkpoint = read_latest(c.out_dir, weights=False) if resume else None
    resumed = checkpoint is not None
    if c.init_from == "resume" and not resumed:
        fail(f"nothing to resume in {c.out_dir}; drop --init_from=resume, or mend --out_dir")
    old = [path for name in (*CHECKPOINTS, "model.pt")
           if os.path.exists(path := os.path.join(c.out_dir, name))]
    if old and not (resumed or c.overwrite or c.eval_only):
        fail(f"{c.out_dir} holds a run; go on with --init_from=resume, begin anew with "
             f"--overwrite, or choose another --out_dir")
    word = c.init_from in ("scratch", "resume", "auto")  # perhaps a folder's name, too
    if holds_weights(c.out_dir) and not c.eval_only:
        fail(f"{c.out_dir} holds exported weights, which a run would spoil; choose another "
             f"--out_dir")
    if not (resumed or word) and (c.init_from.endswith(".pt") or os.path.isdir(c.init_from)):
        checkpoint = read_checkpoint(c.init_from)
    tokenizer = {k: meta[k] for k in TOKENIZER_KEYS if meta.get(k)}
    theirs = (checkpoint or {}).get("tokenizer") or (
        {"tokenizer": "gpt2"} if c.init_from.startswith("gpt2") and not checkpoint else tokenizer)
    if theirs != tokenizer:
        fail(f"{folder} was made with another tokenizer than the checkpoint's, "
             f"{theirs.get('tokenizer')}; prepare the data with that one")

    # --- model, optimisers, data ---
    torch.manual_seed(c.seed)
    try:
        raw_model = make_model(c, given, meta, checkpoint)
    except ValueError as error:
        fail(*str(error).splitlines())
    except (RuntimeError, MemoryError):
        sizes = ", ".join(f"{n}={getattr(c, n)}" for n in ("n_layer", "n_embd", "block_size"))
        fail(f"not enough memory here for a model of {sizes}; choose smaller sizes")
    c.adopt(raw_model.config)
    T = raw_model.config.block_size
    train_tokens, val_tokens = (Tokens(folder, split, meta, T) for split in ("train", "val"))
    order = WindowOrder(len(train_tokens), T, c.seed)
    raw_model.to(torch.float64 if dtype == torch.float64 else torch.float32)
    raw_model.activation_checkpointing = c.activation_checkpointing
    raw_model.loss_chunk = c.loss_chunk
    sharded = c.parallel == "fsdp"
    compiled = try_compile(raw_model, c.compile, device, say, blocks=sharded)
    model = parallelise(raw_model, c, ranks)
    optimizers = make_optimizers(raw_model, c, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    source = {"dataset": c.dataset, "tokens": len(train_tokens),
              "sha256": meta["train"].get("sha256")}

    # --- what a resumed run carries over ---
    step, position, best_val_loss, log_length, evaluated = 0, 0, 1e9, None, None
    skipped = streak = 0  # steps whose loss or gradient was not finite, in all and just now
    torch.manual_seed(c.seed + 1 + ranks.rank)  # dropout differs between ranks
    if resumed:
        if not {"iter_num", "best_val_loss"} <= checkpoint.keys():
            fail(f"{c.out_dir} holds weights, but no run to resume; start one from them: "
                 f"--init_from={c.out_dir}/ckpt.pt and another --out_dir")
        if checkpoint.get("data", source) != source:
            fail(f"{folder} is not the data that {c.out_dir} was trained on; to train on new data "
                 f"use --init_from={c.out_dir}/ckpt.pt and another --out_dir")
        step, best_val_loss = checkpoint["iter_num"], float(checkpoint["best_val_loss"])
        position, skipped = checkpoint.get("tokens_seen", 0) // T, checkpoint.get("skipped", 0)
        log_length, evaluated = checkpoint.get("log_length"), checkpoint.get("evaluated", step)
        before, now = checkpoint.get("config", {}), asdict(c)
        changed = [f"{k} = {now[k]!r} (was {before[k]!r})" for k in before.keys() & now.keys()
                   if before[k] != now[k] and k not in ("init_from", "overwrite", "out_dir")]
        if changed:
            say("resuming with other options: " + ", ".join(sorted(changed)))
        say(f"resuming {c.out_dir} at step {step}")
        try:
            restore(checkpoint, c, raw_model, optimizers, scaler, ranks, say)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            if out_of_memory(error):
                raise
            fail(f"the optimizer, scaler or rng of the checkpoint in {c.out_dir} is damaged: "
                 f"{reason(error)}; remove it to use the one before")
    del checkpoint

    if master:
        options = ", ".join(f"{k}\0=\0{v!r}" for k, v in asdict(c).items())
        print(textwrap.fill(options, 100, break_long_words=False).replace("\0", " "))
        if c.eval_iters is not None:
            print(f"eval_iters = {c.eval_iters} means eval_tokens = {c.eval_tokens:,}")
        report(raw_model, c, meta, train_tokens, val_tokens, ranks, dtype, compiled)
    if c.eval_only:
        say(f"val loss {evaluate(raw_model, val_tokens, c.eval_tokens, ranks, dtype):.4f}")
        return

    # --- this rank's micro-batches: every world-th of the global order ---
    windows_per_step = c.batch_size * c.gradient_accumulation_steps
    micro_steps = c.gradient_accumulation_steps // ranks.world

    def micro_batches() -> Iterator[torch.Tensor]:
        """Rows (B, T + 1), for ever; micro-batch m of a step goes to rank m % world."""
        first = position + ranks.rank * c.batch_size
        while True:
            rows = train_tokens.read(order.starts(first, c.batch_size))
            yield rows.pin_memory() if device.type == "cuda" else rows
            first += ranks.world * c.batch_size

    with stop_signals() as signals, contextlib.closing(prefetch(micro_batches())) as batches:
        log = Log(c, log_length) if master else None
        if master:
            for path in () if resumed else old:
                os.remove(path)
            remove_remains(c.out_dir)
            ranks.begun()
            with open(os.path.join(c.out_dir, "config.json"), "w", encoding="utf-8") as file:
                json.dump(asdict(c), file, indent=1)
        saved = step if resumed else None  # the step of ckpt.pt
        logged, first_step, logged_step = time.time(), step, step
        began = logged - (log.seconds if master else 0.0)  # a resumed run's clock goes on
        peak = peak_flops(device)
        while True:
            # --- evaluate, save, leave ---
            stopping, paused = ranks.any(bool(signals)), time.time()
            last = step >= c.max_iters
            evaluating = step % c.eval_interval == 0 or last
            is_best = False
            new = step > first_step  # since the checkpoint that this process started from
            if evaluating and evaluated != step and not stopping:
                val_loss = evaluate(raw_model, val_tokens, c.eval_tokens, ranks, dtype)
                evaluated, new, is_best = step, True, val_loss < best_val_loss
                best_val_loss = val_loss if is_best else best_val_loss
                if master:
                    log.record("eval", step, {} if sharded else raw_model.learned_scalars(),
                               tokens=position * T, val_loss=val_loss,
                               best_val_loss=best_val_loss, seconds=time.time() - began,
                               peak_mb=peak_mb(device))
                    refresh_picture(c.out_dir)
                    show(f"step {step}: val loss {val_loss:.4f}, best {best_val_loss:.4f}", True)
            due = step % (c.save_interval or c.eval_interval) == 0 or last or stopping
            if step > 0 and new and (due or is_best) and streak < 10:  # else: broken weights?
                rng = ranks.gather(rng_state(device))
                parts = (p.to_local() if sharded else p for p in raw_model.parameters())
                if ranks.any(not all(p.isfinite().all() for p in parts)):
                    fail(f"the loss is nan from step {step} on: the last update broke the weights; "
                         f"{last_good(c.out_dir, saved)}; lower the learning rate")
                deleted = ranks.any(master and not os.path.isdir(c.out_dir))
                os.makedirs(c.out_dir, exist_ok=True)
                if sharded:
                    tensors = tensors_by_name(raw_model, optimizers)
                    where = {"model": {}, "shards": save_shards(tensors, c.out_dir, step, ranks)}
                else:
                    where = {"model": raw_model.state_dict(), "optimizer": named_states(optimizers)}
                if master:
                    state = {**where, "model_args": asdict(raw_model.config), "iter_num": step,
                             "best_val_loss": best_val_loss, "config": asdict(c),
                             "tokenizer": tokenizer, "data": source, "rng": rng,
                             "tokens_seen": position * T, "scaler": scaler.state_dict(),
                             "log_length": log.length(), "evaluated": evaluated,
                             "skipped": skipped,
                             "versions": {"torch": str(torch.__version__),
                                          "python": sys.version.split()[0]}}
                    save_checkpoint(state, c.out_dir, latest=due, best=is_best)
                    remove_remains(c.out_dir)
                    with contextlib.suppress(FileNotFoundError):  # of an earlier end
                        os.remove(os.path.join(c.out_dir, "model.pt"))
                    del state
                del where
                saved = step if due else saved
                if deleted:
                    fail(f"the folder {c.out_dir} was deleted while this run wrote to it; step "
                         f"{step} is saved there again, the log is lost; go on with "
                         f"--init_from=resume")
            if last or stopping:
                break
            logged += time.time() - paused  # the rate is that of training alone

            # --- one step: accumulate, clip, update ---
            multiplier = lr_multiplier(step, c)
            for group in (g for o in optimizers.values() for g in o.param_groups):
                group["lr"] = multiplier * group["peak_lr"]
            loss = accumulate(model, batches, micro_steps, device, dtype, scaler)
            for optimizer in optimizers.values():
                scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), c.grad_clip or math.inf)
            norm = norm.full_tensor() if sharded else norm
            # means over micro-batches and processes, so that all decide alike; read once a step
            loss, norm = (ranks.sum(torch.stack((loss, norm))) / ranks.world).tolist()
            finite = math.isfinite(loss) and math.isfinite(norm)
            # fp16: too large a scale, which the scaler lowers; at 1 the fault is elsewhere
            overflow = (not finite and math.isfinite(loss) and scaler.is_enabled()
                        and scaler.get_scale() > 1)
            if not finite and not overflow and c.nan == "stop":
                fail(f"step {step}: the loss is {loss}, the gradient norm {norm}; no update made; "
                     f"{last_good(c.out_dir, saved)}; lower the learning rate, use "
                     f"--dtype=bfloat16, or leave such steps out with --nan=skip")
            for optimizer in optimizers.values() if finite else ():  # all of them, or none
                scaler.step(optimizer)
            # only what is fp16's fault changes the scale
            scaler.update(None if finite or overflow else scaler.get_scale())
            for optimizer in optimizers.values():
                optimizer.zero_grad(set_to_none=True)
            position += windows_per_step
            streak = 0 if finite or overflow else streak + 1
            if streak == 1000:
                fail(f"step {step}: the last {streak} steps were left out; "
                     f"{last_good(c.out_dir, saved)}")
            if streak:
                skipped += 1
                if master:
                    log.record("skip", step, loss=loss, grad_norm=norm, skipped=skipped)
                    show(f"step {step} left out ({skipped} so far): loss {loss}, gradient norm "
                         f"{norm}", True)

            # --- log ---
            if step % c.log_interval == 0 and master:
                now = time.time()
                seconds = (now - logged) / (step + 1 - logged_step)
                rate = windows_per_step * T / seconds
                mfu = peak and raw_model.estimate_mfu(windows_per_step / ranks.world, seconds, peak)
                log.record("train", step, tokens=position * T, loss=loss,
                           lr=multiplier * c.learning_rate, grad_norm=norm, tokens_per_s=rate,
                           mfu=mfu, seconds=now - began)
                eta = seconds * (c.max_iters - step - 1)
                share = f"{mfu:.1%}" if mfu else "n/a"
                show(f"step {step}/{c.max_iters}: loss {loss:.4f}, lr "
                     f"{multiplier * c.learning_rate:.2e}, {rate:,.0f} tokens/s, mfu {share}, "
                     f"eta {clock(eta)}")
                logged, logged_step = now, step + 1
            step += 1

        if master and last and sharded and saved is not None:  # the weights in one file
            whole = read_checkpoint(os.path.join(c.out_dir, "ckpt.pt"))
            names = ("model", "model_args", "config", "tokenizer")
            write_file({name: whole[name] for name in names}, os.path.join(c.out_dir, "model.pt"))
        if master:
            refresh_picture(c.out_dir)
            left_out = f", {skipped} left out" if skipped else ""
            left_out += f"; {last_good(c.out_dir, saved)}" if streak >= 10 else ""
            show(f"stopped by a signal at step {step}{left_out}; go on with the same command and "
                 f"--init_from=resume" if stopping else
                 f"done: {step} steps{left_out}, best val loss {best_val_loss:.4f}", True)


def last_good(out_dir: str, saved: int | None) -> str:
    """Where a run that broke can go on."""
    if saved is None:
        return "there is no checkpoint yet"
    return f"the last good checkpoint, of step {saved}, is {out_dir}/ckpt.pt"


def show(line: str, keep: bool = False) -> None:
    """On a terminal, lines that need not be kept overwrite each other."""
    if not sys.stdout.isatty():
        print(line, flush=True)
    else:
        print(f"\r\033[K{line}", end="\n" if keep else "", flush=True)


def main(argv: list[str]) -> None:
    """Read the options, take the output folder, train."""
    config, given = read_config(TrainConfig, argv, usage=__doc__)
    lock, new, master = contextlib.nullcontext(), not os.path.exists(config.out_dir), False
    try:
        ranks = Ranks(config)
        master = ranks.rank == 0
        if master and not config.eval_only:
            os.makedirs(config.out_dir, exist_ok=True)
            lock = locked(config.out_dir, f"another run is writing to {config.out_dir}; stop it or "
                                          f"choose another --out_dir")
        with lock:
            train(config, given, ranks)
        ranks.close()
    except BrokenPipeError:  # cli's
        raise
    except OSError as error:  # a full disk, a folder that may not be written to
        fail(f"{error.filename or config.out_dir}: {error.strerror or error}; the checkpoints that "
             f"were there are intact; mend that or choose another --out_dir")
    except (RuntimeError, MemoryError) as error:
        if out_of_memory(error):
            fail("out of memory: halve --batch_size and double --gradient_accumulation_steps (the "
                 "step stays the same), or add --activation_checkpointing, or --loss_chunk=4096")
        lost = isinstance(error, dist.DistError) or "gloo" in str(error).lower()
        if lost and "RANK" in os.environ:
            fail(f"another process of this run has ended or does not answer; its own message, or "
                 f"torchrun's, says why ({reason(error)})")
        raise
    finally:
        made = master and new and os.path.isdir(config.out_dir)
        if made and os.listdir(config.out_dir) in ([], [".lock"]):
            shutil.rmtree(config.out_dir)  # a run that could not start leaves nothing


if __name__ == "__main__":
    cli(main)
