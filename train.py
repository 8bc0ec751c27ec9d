"""Train a GPT, a HourglassFFN model or a YuriiFormer on one device or many.

    python train.py config/tinystories_cpu.py
    torchrun --standalone --nproc_per_node=8 train.py config/yurii_owt.py --out_dir=out-yurii

The first names a preset; every option of TrainConfig can follow as --name=value. Writes to out_dir:
ckpt.pt (latest), ckpt_prev.pt (the one before), best.pt (weights of the lowest evaluation among the
saved steps), log.jsonl, config.json, loss.png. To go on after a stop, add --init_from=resume.
"""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import ClassVar, Literal

import torch

from config import check_least, read_config
from model import GPT, GPTConfig
from support.checkpoint import clear_folder, model_from
from support.code import code_in
from support.data import Tokens, WindowOrder, evaluation_starts, prefetch, to_device
from support.device import attention_backend, autocast, pick_dtype, try_compile, tune_machine
from support.errors import cli, explain_failures, fail
from support.foreign import GPT2S, holds_weights
from support.fuse import fuse
from support.log import Log, report
from support.muon import Muon
from support.ranks import Ranks, locked_folder, shard, stop_signals
from support.resume import (
    Progress,
    find_start,
    last_good,
    read_source,
    restore,
    save,
    without_tensors,
)
from support.terminal import progress, show


@dataclass
class TrainConfig(GPTConfig):
    """Every option of a run: the model's (GPTConfig) and these."""

    # what nanoGPT's trainer sets otherwise than its model
    bias: bool = False  # biases in linears and LayerNorms, as GPT-2 has; False is a bit better
    vocab_size: int | None = None  # rows of the token table; auto: the data's, padded
    vocab_used: ClassVar[None] = None  # no option: it comes from the data
    # data and output
    dataset: str = "openwebtext"  # folder in data_dir that prepare.py made
    data_dir: str = "data"  # where the data folders are
    out_dir: str = "out"  # checkpoints and logs
    # scratch, resume, auto (resume if possible); or weights: gpt2*, a .pt file, an exported folder
    init_from: str = "scratch"
    overwrite: bool = False  # start from scratch although out_dir holds a run
    # batch
    batch_size: int = 12  # micro-batch: sequences per device and forward pass
    gradient_accumulation_steps: int = 40  # micro-batches per step, the total over all ranks
    # optimiser
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: the blocks' matrices; AdamW the rest
    learning_rate: float = 6e-4  # AdamW's peak; five times as much for the templates' scalars
    muon_lr: float = 0.02  # Muon's peak
    muon_weight_decay: float = 0.0  # decoupled, of the matrices under Muon
    weight_decay: float = 0.1  # of matrices and tables under AdamW
    beta1: float = 0.9  # AdamW's
    beta2: float = 0.95  # AdamW's
    adam_eps: float = 1e-8  # AdamW's, which the root of the second moment is added to
    grad_clip: float = 1.0  # global gradient norm; 0 turns clipping off
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
    fused: bool | None = None  # momentum with one kernel backward; auto: on CUDA, where it serves
    deterministic: bool = False  # the same bits in each run and resuming, on a GPU compiled too
    backend: Literal["nccl", "gloo"] | None = None  # of torchrun's processes; auto: nccl on CUDA
    parallel: Literal["ddp", "fsdp"] = "ddp"  # each process has all of the model, or a part
    activation_checkpointing: bool = False  # blocks are computed again for the backward pass
    seed: int = 1337  # of the initial weights, the data order and dropout

    def __post_init__(self) -> None:
        super().__post_init__()
        self.convert_eval_iters()

    def convert_eval_iters(self) -> None:
        """nanoGPT counts evaluations in batches, we in tokens."""
        if self.eval_iters is not None:
            self.eval_tokens = self.eval_iters * self.batch_size * self.block_size

    def adopt(self, model_config: GPTConfig) -> None:
        """Take over the shape of a model that comes from a checkpoint or from the data."""
        for field in fields(GPTConfig):
            setattr(self, field.name, getattr(model_config, field.name))
        self.convert_eval_iters()

    def rules(self, rule: Callable[[bool, str], None]) -> None:
        """rule(what must hold, what to say where it does not)."""
        super().rules(rule)
        check_least(self, rule, 1, "batch_size", "gradient_accumulation_steps", "max_iters",
                    "lr_decay_iters", "eval_interval", "eval_iters", "eval_tokens",
                    "save_interval", "log_interval")
        check_least(self, rule, 0, "learning_rate", "muon_lr", "weight_decay",
                    "muon_weight_decay", "grad_clip", "min_lr", "warmup_iters", "seed")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            rule(0 <= value < 1, f"{name}={value}: must lie in [0, 1); the default is usual")
        rule(0 < self.adam_eps < 1, f"adam_eps={self.adam_eps}: must lie in (0, 1); 1e-8 is usual")
        rule(0 < self.decay_fraction <= 1, f"decay_fraction={self.decay_fraction}: is a share of "
                                           f"lr_decay_iters; use 0 < decay_fraction <= 1")
        decays = self.decay_lr and self.schedule != "constant"
        rule(self.min_lr is None or self.min_lr <= self.learning_rate or not decays,
             f"min_lr={self.min_lr}: is the floor of learning_rate={self.learning_rate}, so that "
             f"the rate would rise where it should decay; choose a smaller one")
        shortest = wsd_decay_iters(self) if self.schedule == "wsd" else 1
        latest = (self.lr_decay_iters or self.max_iters) - shortest
        rule(not decays or self.warmup_iters <= latest or self.warmup_iters >= self.max_iters,
             f"warmup_iters={self.warmup_iters}: reaches into {self.schedule}'s decay, which "
             f"begins at step {latest} at the latest; warm up for fewer steps, or decay later "
             f"(lr_decay_iters, decay_fraction)")
        converted = (self.eval_iters or 0) * self.batch_size * self.block_size
        rule(self.eval_iters is None or self.eval_tokens in (TrainConfig.eval_tokens, converted),
             "eval_iters and eval_tokens: say the same thing twice; drop one (--eval_iters=auto)")
        rule(not self.fused or self.parallel == "ddp",
             "fused=True: takes whole models; use --fused=auto, or parallel=ddp")
        rule(self.init_from in ("scratch", "resume", "auto", *GPT2S)
             or self.init_from.endswith(".pt") or holds_weights(self.init_from),
             f"init_from={self.init_from}: names no weights; use scratch, resume, auto, "
             f"{', '.join(GPT2S)}, a .pt file, or a folder that bench.py export or transformers "
             f"wrote")


# -----------------------------------------------------------------------------
# Model, optimisers and schedule


def model_args(config: TrainConfig) -> dict:
    """The part of the options that is the model's."""
    return {f.name: getattr(config, f.name) for f in fields(GPTConfig)}


def make_model(config: TrainConfig, explicit: set[str], meta: dict,
               checkpoint: dict | None) -> GPT:
    """A new model, or the checkpoint's; its vocabulary is the data's. Options that were `explicit`
    must be what the checkpoint's model has; block_size may be smaller."""
    wanted = model_args(config)
    if checkpoint is None:
        vocab_size = config.vocab_size or meta["padded_vocab_size"]
        model = GPT(GPTConfig(**wanted | {"vocab_size": vocab_size}))
    else:
        model = model_from(checkpoint, dropout=config.dropout)
    for name, value in asdict(model.config).items():
        shorter = name == "block_size" and wanted[name] <= value
        if name in explicit and wanted[name] != value and not shorter:
            fail(f"{name}={wanted[name]}, but the checkpoint's model has {name}={value}; drop the "
                 f"option, or train from scratch")
    if meta["vocab_size"] > model.config.vocab_size:
        fail(f"the data has {meta['vocab_size']} token ids, the model only "
             f"{model.config.vocab_size}; prepare the data with the model's tokenizer")
    if checkpoint is None:
        model.config.vocab_used = meta["vocab_size"]
    if "block_size" in explicit and config.block_size < model.config.block_size:
        model.crop_block_size(config.block_size)
    return model


def make_optimizers(model: GPT, config: TrainConfig, device: torch.device,
                    ) -> dict[str, torch.optim.Optimizer]:
    """AdamW over everything, or Muon for the blocks' matrices and AdamW for the rest. Every group
    keeps its peak rate in "peak_lr"."""
    c = config
    roles = model.parameter_roles()
    matrices = roles.pop("matrix") if c.optimizer == "muon" else {}
    optimizers: dict[str, torch.optim.Optimizer] = {"adamw": model.configure_optimizers(
        c.weight_decay, c.learning_rate, (c.beta1, c.beta2), device.type,
        scalar_lr=5 * c.learning_rate, eps=c.adam_eps, roles=tuple(roles))}
    if matrices:
        kind = torch.optim.Muon if c.parallel == "fsdp" else Muon  # torch's takes shards
        optimizers["muon"] = kind(list(matrices.items()), lr=c.muon_lr, momentum=0.95,
                                  nesterov=True, ns_steps=5, weight_decay=c.muon_weight_decay)
    groups = [group for optimizer in optimizers.values() for group in optimizer.param_groups]
    for group in groups:
        group["peak_lr"] = group["lr"]
    return optimizers


def wsd_decay_iters(config: TrainConfig) -> int:
    """Steps that the wsd schedule decays."""
    end = config.lr_decay_iters or config.max_iters
    return max(1, round(config.decay_fraction * end))


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
    end = c.lr_decay_iters or c.max_iters
    if step >= end:
        return floor
    if c.schedule == "wsd":
        return floor + (1 - floor) * min(1.0, (end - step) / wsd_decay_iters(c))
    progress = (step - c.warmup_iters) / (end - c.warmup_iters)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


# -----------------------------------------------------------------------------
# One step's gradients, and an evaluation


def accumulate(model: GPT, batches: Iterator[torch.Tensor], micro_steps: int, device: torch.device,
               dtype: torch.dtype, scaler: torch.amp.GradScaler) -> torch.Tensor:
    """Add up the gradients of this process's micro-batches; returns their mean loss ()."""
    total = torch.zeros((), device=device)
    for _ in range(micro_steps):
        x, y = to_device(next(batches), device)  # (B, T) each
        with autocast(device, dtype):
            loss = model(x, y, return_logits=False)[1] / micro_steps
        scaler.scale(loss).backward()
        total = total + loss.detach()
    return total


@torch.no_grad()
def evaluate(model: GPT, tokens: Tokens, config: TrainConfig, ranks: Ranks, dtype: torch.dtype,
             signals: list[int]) -> float | None:
    """Mean cross-entropy (nats per token) over a fixed set of windows, summed in float64; None if a
    signal ends it. All processes make equally many forward passes, as sharding needs."""
    rows = config.batch_size
    starts = evaluation_starts(len(tokens), tokens.block_size, config.eval_tokens)
    batches = [starts[i:i + rows] for i in range(0, len(starts), rows)]
    model.eval()
    home = "cpu" if ranks.device.type == "mps" else ranks.device  # MPS has no float64
    total = torch.zeros((), dtype=torch.float64, device=home)
    for i in progress(range(0, len(batches), ranks.world), "evaluating", shown=ranks.rank == 0):
        batch = batches[i + ranks.rank] if i + ranks.rank < len(batches) else []
        filled = batch + starts[:1] * (rows - len(batch))  # all batches have one shape
        x, y = to_device(tokens.read(filled), ranks.device)
        y[len(batch):] = -1
        with autocast(ranks.device, dtype):
            losses = model(x, y, return_logits=False, reduction="none")[1]  # (B, T)
        total += losses.to(home).double().sum()
        stopped = ranks.any(bool(signals))
        if stopped:
            break
    if hasattr(model, "reshard"):  # FSDP2 leaves the tables whole for a backward pass
        model.reshard()
    model.train()
    if stopped:
        return None
    return ranks.sum(total).item() / (len(starts) * tokens.block_size)


# -----------------------------------------------------------------------------
# The run


def train(asked: TrainConfig, given: dict[str, str], ranks: Ranks) -> None:
    """The run, from top to bottom. given: option -> the preset that set it, "" the command line."""
    # --- where to start: nothing, a checkpoint of this run, or other weights ---
    c, checkpoint, resumed = ranks.first(lambda: find_start(asked, given), without_tensors)
    ranks.check_accumulation(c.batch_size, c.gradient_accumulation_steps)
    device, master, sharded = ranks.device, ranks.rank == 0, c.parallel == "fsdp"
    dtype = ranks.first(lambda: pick_dtype(c.dtype, device))  # cards may be unlike
    folder = os.path.join(c.data_dir, c.dataset)
    meta, source = read_source(folder, checkpoint, resumed)
    ranks.check_same((source, meta["val"], code_in()["hash"], device.type),
                     f"another machine has other data in {folder} or other code (copy one's to "
                     f"all), or no GPU that torch can use (try --device=cuda)")
    tune_machine(device, c.deterministic)

    # --- model, data, optimisers ---
    torch.manual_seed(c.seed)
    # what a preset says does not count for a run that goes on
    explicit = {name for name, preset in given.items() if not (resumed and preset)}
    model = make_model(c, explicit, meta, checkpoint)
    model = model.double() if dtype == torch.float64 else model.float()  # not complex buffers
    ranks.share(model)
    c.adopt(model.config)
    train_tokens, val_tokens = (Tokens(folder, split, meta, c.block_size)
                                for split in ("train", "val"))
    order = WindowOrder(len(train_tokens), c.block_size, c.seed)
    model.activation_checkpointing = c.activation_checkpointing
    if sharded:
        fused, compiled = "", try_compile(model, c.compile, device, blocks=True)
        shard(model, ranks)
        model.to(device)
    else:
        fused = fuse(model.to(device), c.fused, device)
        compiled = try_compile(model, c.compile, device)
    optimizers = make_optimizers(model, c, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    run = Progress()
    torch.manual_seed(c.seed + 1 + ranks.rank)  # dropout differs between ranks
    if resumed:
        run = restore(checkpoint, c, model, optimizers, scaler, ranks)
    del checkpoint
    if master:
        report(model, c, meta, train_tokens, val_tokens, ranks,
               [str(dtype).removeprefix("torch."), "compiled" if compiled else "eager",
                attention_backend(model, dtype, device), fused])
    if c.eval_only:
        loss = evaluate(model, val_tokens, c, ranks, dtype, signals=[])
        if master:
            show(f"val loss {loss:.4f}")
        return

    def micro_batches() -> Iterator[torch.Tensor]:
        """Rows (B, T + 1), for ever; micro-batch m of a step goes to rank m % world."""
        first = run.position + ranks.rank * c.batch_size
        while True:
            rows = train_tokens.read(order.starts(first, c.batch_size))
            yield rows.pin_memory() if device.type == "cuda" else rows
            first += ranks.world * c.batch_size

    with stop_signals() as signals, contextlib.closing(prefetch(micro_batches())) as batches:
        if master:
            log = Log(c, run, model, device, ranks.world)
            clear_folder(c, resumed)
        saved = run.step if resumed else None  # the step of ckpt.pt
        while True:
            # --- evaluate ---
            last, val_loss = run.step >= c.max_iters, None
            due_evaluation = run.step % c.eval_interval == 0 or last
            if due_evaluation and run.evaluated != run.step and not ranks.any(bool(signals)):
                val_loss = evaluate(model, val_tokens, c, ranks, dtype, signals)
            if val_loss is not None:
                run.evaluated = run.step
                run.best_val_loss = min(run.best_val_loss, val_loss)
                if master:
                    log.evaluation(run, val_loss)

            # --- save, leave ---
            stopping = ranks.any(bool(signals))
            due_save = run.step % (c.save_interval or c.eval_interval) == 0 or last or stopping
            if due_save and run.step > 0 and (run.step != saved or val_loss is not None):
                best = val_loss is not None and val_loss < run.best_saved_loss and not stopping
                if best:
                    run.best_saved_loss = val_loss
                if master:
                    run.log_length = log.length()
                save(run, c, model, optimizers, scaler, ranks, meta, source, best, saved)
                saved = run.step
            if last or stopping:
                break

            # --- one step: accumulate, clip, update ---
            began = time.perf_counter()
            multiplier = lr_multiplier(run.step, c)
            for group in (g for optimizer in optimizers.values() for g in optimizer.param_groups):
                group["lr"] = multiplier * group["peak_lr"]
            micro_steps = c.gradient_accumulation_steps // ranks.world
            loss = accumulate(model, batches, micro_steps, device, dtype, scaler)
            if not sharded:
                ranks.average_gradients(model)
            for optimizer in optimizers.values():
                scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip or math.inf)
            norm = norm.full_tensor() if sharded else norm
            # means over the processes, so that all decide alike; read once a step
            loss, norm = (ranks.sum(torch.stack((loss, norm))) / ranks.world).tolist()
            finite = math.isfinite(loss) and math.isfinite(norm)
            # fp16: too large a scale, which the scaler lowers; at 1 the fault is elsewhere
            overflow = math.isfinite(loss) and scaler.is_enabled() and scaler.get_scale() > 1
            if not finite and not overflow:
                fail(f"step {run.step}: the loss is {loss}, the gradient norm {norm}; no update "
                     f"made; {last_good(c.out_dir, saved)}; lower the learning rate (of Muon: "
                     f"--muon_lr), or try --dtype=float32")
            if finite:  # all optimisers step, or none
                for optimizer in optimizers.values():
                    scaler.step(optimizer)
            scaler.update()
            model.zero_grad(set_to_none=True)
            run.position += c.batch_size * c.gradient_accumulation_steps
            if master:
                log.step(run, time.perf_counter() - began, loss, norm, multiplier)
            run.step += 1

    if master:
        log.file.close()
        end = f"done: {run.step} steps, best val loss {run.best_val_loss:.4f}"
        if stopping:
            end = f"stopped by a signal at step {run.step}; "
            end += ("nothing is saved yet" if saved is None else
                    "go on with the same command and --init_from=resume")
        show(end, keep=True)


def main(argv: list[str]) -> None:
    """Read the options, take the output folder, train."""
    config, given = read_config(TrainConfig, argv, usage=__doc__)
    with explain_failures(config.out_dir,
                   mend="the checkpoints that were there are intact; mend that or choose another "
                        "--out_dir",
                   shrink="halve --batch_size and double --gradient_accumulation_steps (the step "
                          "stays the same), add --activation_checkpointing, or choose a smaller "
                          "model"):
        ranks = Ranks(config)
        with locked_folder(config.out_dir, use=ranks.rank == 0 and not config.eval_only):
            train(config, given, ranks)
        ranks.close()


if __name__ == "__main__":
    cli(main)
