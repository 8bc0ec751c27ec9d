"""What a run tells: log.jsonl, wandb, tensorboard, its progress, the picture of its losses."""

import contextlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from support.data import evaluation_starts
from support.device import compile_seconds, peak_flops, peak_mb
from support.errors import fail


class Log:
    """log.jsonl, one JSON object a line, wandb or tensorboard when asked for, and the progress line
    on standard output."""

    def __init__(self, config: Any, length: int | None, model: Any, device: torch.device,
                 world: int):
        """length: cut an earlier log back to so many bytes; None starts a new one."""
        self.config, self.model, self.device, self.world = config, model, device, world
        self.compiled = False  # and said so
        self.seconds: list[float] = []  # of each step since the latest line
        self.sinks = open_sinks(config)
        path = os.path.join(config.out_dir, "log.jsonl")
        # unbuffered, so that what a full disk refuses is not tried again when the file is closed
        self.file = open(path, "ab", buffering=0)
        self.file.truncate(min(length or 0, self.file.tell()))
        self.file.seek(0, os.SEEK_END)
        with open(path, encoding="utf-8", errors="replace") as file:  # it may be damaged
            times = re.findall(r'"seconds": (\d+(?:\.\d+)?)', file.read())
        self.began = time.time() - (float(times[-1]) if times else 0.0)  # a resumed clock goes on
        if self.file.tell() == 0:
            self.write({"type": "config", **asdict(config)})

    def write(self, record: dict) -> None:
        data = f"{json.dumps(record)}\n".encode()
        while data:
            data = data[self.file.write(data):]

    def record(self, kind: str, step: int, scalars: dict | None = None, **values: Any) -> None:
        """scalars: the learned ones, name -> layers -> substeps; to the sinks go their means."""
        values["seconds"] = time.time() - self.began
        values = {k: v if v is not None and math.isfinite(v) else None for k, v in values.items()}
        record = {"type": kind, "iter": step, **values}
        self.write(record | {"scalars": scalars} if scalars else record)
        known = {f"{kind}/{name}": value for name, value in values.items() if value is not None}
        for name, layers in (scalars or {}).items():
            known[f"scalars/{name}"] = float(np.mean(layers))
        for sink in self.sinks:
            sink(known, step)

    def evaluation(self, run: Any, val_loss: float) -> None:
        """An evaluation after run.step steps."""
        scalars = {} if self.config.parallel == "fsdp" else learned_scalars(self.model)
        self.record("eval", run.step, scalars, tokens=run.position * self.config.block_size,
                    val_loss=val_loss, best_val_loss=run.best_val_loss,
                    peak_mb=peak_mb(self.device))
        draw_losses(self.config.out_dir)
        show(f"step {run.step}: val loss {val_loss:.4f}, best {run.best_val_loss:.4f}", keep=True)

    def step(self, run: Any, seconds: float, loss: float, grad_norm: float, share: float) -> None:
        """The step that began at run.step: how long it took, and its share of the peak rates."""
        c = self.config
        self.seconds.append(seconds)
        if not self.compiled and (compiled := compile_seconds()):
            self.compiled = True
            show(f"compiled in {compiled:.0f} s", keep=True)
        if run.step % c.log_interval:
            return
        mean = sum(self.seconds) / len(self.seconds)
        self.seconds = []
        sequences = c.batch_size * c.gradient_accumulation_steps
        peak, lr, rate = peak_flops(self.device), share * c.learning_rate, sequences / mean
        mfu = peak and self.model.estimate_mfu(sequences / self.world, mean, peak)
        self.record("train", run.step, tokens=run.position * c.block_size, loss=loss, lr=lr,
                    grad_norm=grad_norm, tokens_per_s=rate * c.block_size, mfu=mfu)
        show(f"step {run.step}/{c.max_iters}: loss {loss:.4f}, lr {lr:.2e}, "
             f"{rate * c.block_size:,.0f} tokens/s, mfu {f'{mfu:.1%}' if mfu else 'n/a'}, "
             f"eta {clock(mean * (c.max_iters - run.step - 1))}")

    def length(self) -> int:
        """Bytes so far, on the disk."""
        os.fsync(self.file.fileno())
        return self.file.tell()

    def close(self) -> None:
        """The run has ended."""
        draw_losses(self.config.out_dir)
        self.file.close()


@torch.no_grad()
def learned_scalars(model: Any) -> dict[str, list[list[float]]]:
    """The templates' scalars, mapped (means of those that are more than a number): name -> for each
    layer the values of its substeps."""
    blocks = model.transformer.h
    names = list(blocks[0].steps[0].learned)
    values = [substep.scalar(name).mean()
              for name in names for block in blocks for substep in block.steps]
    if not values:
        return {}
    table = torch.stack(values).view(len(names), len(blocks), -1).tolist()  # one read
    return dict(zip(names, table, strict=True))


def open_sinks(config: Any) -> list[Callable[[dict[str, float], int], None]]:
    """Functions of ({name: value}, step) that log to Weights & Biases and to tensorboard."""
    sinks = []
    try:
        if config.wandb_log:
            import wandb

            sinks.append(wandb.init(project=config.wandb_project, name=config.wandb_run_name,
                                    config=asdict(config)).log)
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(os.path.join(config.out_dir, "tensorboard"))

            def log(values: dict[str, float], step: int) -> None:
                for name, value in values.items():
                    writer.add_scalar(name, value, step)
                writer.flush()

            sinks.append(log)
    except ImportError as error:
        package = "tensorboard" if "tensorboard" in str(error) else "wandb"
        fail(f"{package} is asked for and not installed: pip install {package} ({error})")
    return sinks


def draw_losses(out_dir: str) -> None:
    """loss.png of a run, where matplotlib is installed. A log that was damaged is no reason to end
    it. (tools/watch.py draws several runs together.)"""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="cross-entropy (nats per token)")
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, IndexError):
        with open(os.path.join(out_dir, "log.jsonl"), encoding="utf-8") as file:
            records = [json.loads(line) for line in file]
        for kind, name, style in (("train", "loss", "-"), ("eval", "val_loss", "o-")):
            points = [(r["iter"], r[name]) for r in records if r["type"] == kind and r[name]]
            if points:
                axes.plot(*zip(*points, strict=True), style, lw=1, ms=3.5,
                          label=f"{kind}: {points[-1][1]:.4f}")
        axes.set_ylim(top=axes.get_lines()[0].get_ydata()[0])
        axes.legend()
        axes.grid(alpha=0.3)
        FigureCanvasAgg(figure).print_png(os.path.join(out_dir, "loss.png"))


def clock(seconds: float) -> str:
    """h:mm:ss."""
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def show(line: str, keep: bool = False) -> None:
    """On a terminal, lines that need not be kept overwrite each other."""
    if not sys.stdout.isatty():
        print(line, flush=True)
    else:
        print(f"\r\033[K{line}", end="\n" if keep else "", flush=True)


def report(model: Any, config: Any, meta: dict, train: Any, val: Any, ranks: Any,
           how: list[str]) -> None:
    """What is about to run: the options that are not the defaults, and what they make."""
    c, plain = config, type(config)()
    for name, value in asdict(c).items():
        if value != getattr(plain, name):
            print(f"{name} = {value!r}")
    if c.eval_iters is not None:
        print(f"eval_iters = {c.eval_iters} means eval_tokens = {c.eval_tokens:,}")
    tables = model.parameter_roles()["embedding"]
    total = model.get_num_params(non_embedding=False)
    embedding = sum(p.numel() for p in tables.values())
    velocity = sum(p.numel() for name, p in tables.items() if ".vte." in name or ".vpe." in name)
    tokens_per_step = c.batch_size * c.gradient_accumulation_steps * c.block_size
    windows = len(evaluation_starts(len(val), c.block_size, c.eval_tokens))
    print(f"""\
model:  {total:,} parameters: {total - embedding:,} non-embedding, {embedding:,} embedding, of these
        {velocity:,} in velocity tables; {model.flops_per_token() / 1e6:,.1f} MFLOP per token
step:   {tokens_per_step:,} tokens = {c.gradient_accumulation_steps} micro-batches of \
{c.batch_size} x {c.block_size}, {c.parallel} over {ranks.world} process(es)
data:   {c.dataset}: {len(train):,} training and {len(val):,} validation tokens, \
{meta["vocab_size"]:,} ids
eval:   {windows * c.block_size:,} tokens every {c.eval_interval} steps
device: {ranks.device}, {', '.join(filter(None, how))}""", flush=True)
