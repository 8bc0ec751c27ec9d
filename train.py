"""Train a GPT, a HourglassFFN model or a YuriiFormer on one device or many.

    python train.py config/tinystories_cpu.py
    torchrun --standalone --nproc_per_node=8 train.py config/yurii_owt.py --out_dir=out-yurii

The first names a preset; every option of TrainConfig can follow as --name=value. Writes to out_dir:
ckpt.pt (latest), ckpt_prev.pt (the one before), best.pt (lowest evaluation loss), log.jsonl,
config.json, loss.png. To go on after an interruption, add --init_from=resume.
"""

import contextlib
import json
import math
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Literal

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from config import read_config
from model import GPT, GPTConfig
from support.checkpoint import (
    CHECKPOINTS,
    checkpoint_config,
    holds_weights,
    load_shards,
    load_states,
    model_from,
    named_states,
    nanogpt_states,
    read_checkpoint,
    read_latest,
    remove_remains,
    rng_state,
    save_checkpoint,
    save_shards,
    set_rng_state,
    tensors_by_name,
    write_file,
)
from support.data import Tokens, WindowOrder, check_bins, evaluation_starts, prefetch, to_device
from support.device import (
    autocast,
    can_compile,
    out_of_memory,
    peak_flops,
    peak_mb,
    pick_dtype,
    tune_allocator,
)
from support.errors import cli, fail, reason
from support.files import locked
from support.log import Log, clock, refresh_picture, show
from support.muon import Muon
from support.ranks import Ranks, stop_signals
from support.tokenizer import TOKENIZER_KEYS, load_meta


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


# -----------------------------------------------------------------------------
# Data: a memory-mapped stream of tokens, read in windows of T + 1


# -----------------------------------------------------------------------------
# Optimisers and schedule


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


# -----------------------------------------------------------------------------
# Checkpoints


# -----------------------------------------------------------------------------
# Logs


# -----------------------------------------------------------------------------
# Processes and signals


# -----------------------------------------------------------------------------
# The run


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
        model = model_from(checkpoint, dropout=config.dropout)
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
