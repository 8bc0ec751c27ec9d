"""What a run tells: log.jsonl, wandb, tensorboard, its progress, the picture of its losses."""

import contextlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from support.data import evaluation_starts
from support.device import peak_flops, peak_mb
from support.errors import UserError, fail, reason


class Log:
    """log.jsonl, one JSON object a line, wandb or tensorboard when asked for, and the progress line
    on standard output."""

    def __init__(self, config: Any, length: int | None, model: Any = None,
                 tokens_per_step: int = 0, ranks: Any = None):
        """length: cut an earlier log back to so many bytes; None starts a new one."""
        self.config, self.model, self.ranks = config, model, ranks
        self.tokens_per_step, self.busy = tokens_per_step, []  # seconds of the steps since the last
        self.sinks = []
        if config.wandb_log:
            self.sinks.append(wandb_sink(config))
        if config.tensorboard:
            self.sinks.append(tensorboard_sink(config))
        path = os.path.join(config.out_dir, "log.jsonl")
        # unbuffered, so that what a full disk refuses is not tried again when the file is closed
        self.file = open(path, "wb" if length is None else "ab", buffering=0)
        if length is not None and self.file.tell() > length:
            self.file.truncate(length)
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

    def record(self, kind: str, step: int, scalars: dict[str, list[list[float]]] | None = None,
               **values: float | None) -> None:
        """scalars: the learned ones, name -> layers -> substeps; to the sinks go their means."""
        values["seconds"] = time.time() - self.began
        values = {k: v if v is not None and math.isfinite(v) else None for k, v in values.items()}
        self.write({"type": kind, "iter": step, **values,
                    **({"scalars": scalars} if scalars else {})})
        means = {f"scalars/{k}": float(np.mean(v)) for k, v in (scalars or {}).items()}
        for sink in self.sinks:
            sink({f"{kind}/{k}": v for k, v in values.items() if v is not None} | means, step)

    def evaluation(self, run: Any, val_loss: float) -> None:
        """An evaluation after run.step steps."""
        scalars = {} if self.config.parallel == "fsdp" else learned_scalars(self.model)
        self.record("eval", run.step, scalars, tokens=run.position * self.config.block_size,
                    val_loss=val_loss, best_val_loss=run.best_val_loss,
                    peak_mb=peak_mb(self.ranks.device))
        refresh_picture(self.config.out_dir)
        show(f"step {run.step}: val loss {val_loss:.4f}, best {run.best_val_loss:.4f}", keep=True)

    def step(self, run: Any, seconds: float, loss: float, grad_norm: float,
             multiplier: float) -> None:
        """The step that run.step counts as the next, and how long it took."""
        self.busy.append(seconds)
        if run.step % self.config.log_interval:
            return
        mean = sum(self.busy) / len(self.busy)
        self.busy = []
        rate, lr = self.tokens_per_step / mean, multiplier * self.config.learning_rate
        sequences = self.tokens_per_step / self.config.block_size / self.ranks.world
        peak = peak_flops(self.ranks.device)
        mfu = peak and self.model.estimate_mfu(sequences, mean, peak)
        self.record("train", run.step, tokens=run.position * self.config.block_size, loss=loss,
                    lr=lr, grad_norm=grad_norm, tokens_per_s=rate, mfu=mfu)
        share = f"{mfu:.1%}" if mfu else "n/a"
        left = clock(mean * (self.config.max_iters - run.step - 1))
        show(f"step {run.step}/{self.config.max_iters}: loss {loss:.4f}, lr {lr:.2e}, "
             f"{rate:,.0f} tokens/s, mfu {share}, eta {left}")

    def length(self) -> int:
        """Bytes so far, on the disk."""
        os.fsync(self.file.fileno())
        return self.file.tell()

    def close(self) -> None:
        """The run has ended."""
        refresh_picture(self.config.out_dir)
        self.file.close()


@torch.no_grad()
def learned_scalars(model: Any) -> dict[str, list[list[float]]]:
    """The templates' scalars, mapped (means of those that are more than a number): name -> for each
    layer the values of its substeps."""
    layers = [list(block.steps) for block in model.transformer.h]
    names = list(layers[0][0].learned)
    if not names:
        return {}
    values = torch.stack([torch.stack([torch.stack([substep.scalar(name).mean() for substep in
                                                    layer]) for layer in layers])
                          for name in names])  # (names, layers, substeps), for one read
    return dict(zip(names, values.tolist(), strict=True))


def wandb_sink(config) -> Callable[[dict[str, float], int], None]:
    """A function of ({name: value}, step) that logs to Weights & Biases."""
    try:
        import wandb
    except ImportError as error:
        fail(f"wandb_log=True needs wandb: pip install wandb ({error})")
    run = wandb.init(project=config.wandb_project, name=config.wandb_run_name,
                     config=asdict(config))
    return lambda values, step: run.log(values, step=step)


def tensorboard_sink(config) -> Callable[[dict[str, float], int], None]:
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


def clock(seconds: float) -> str:
    """h:mm:ss."""
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def show(line: str, keep: bool = False) -> None:
    """On a terminal, lines that need not be kept overwrite each other."""
    if not sys.stdout.isatty():
        print(line, flush=True)
    else:
        print(f"\r\033[K{line}", end="\n" if keep else "", flush=True)


def hide(line: str, keep: bool = False) -> None:
    """What other processes than the first do with a line."""


def report(model: Any, config: Any, meta: dict, train: Any, val: Any, ranks: Any,
           dtype: torch.dtype, compiled: bool) -> None:
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
    velocity = sum(p.numel() for n, p in tables.items() if ".vte." in n or ".vpe." in n)
    sequences = c.batch_size * c.gradient_accumulation_steps
    windows = len(evaluation_starts(len(val), c.block_size, c.eval_tokens))
    precision = str(dtype).removeprefix("torch.") + (", compiled" if compiled else ", eager")
    print(f"""\
model:  {total:,} parameters: {total - embedding:,} non-embedding, {embedding:,} embedding, of these
        {velocity:,} in velocity tables; {model.flops_per_token() / 1e6:,.1f} MFLOP per token
step:   {sequences * c.block_size:,} tokens = {c.gradient_accumulation_steps} micro-batches of \
{c.batch_size} x {c.block_size}, {c.parallel} over {ranks.world} process(es)
data:   {c.dataset}: {len(train):,} training and {len(val):,} validation tokens, \
{meta["vocab_size"]:,} ids
eval:   {windows * c.block_size:,} tokens every {c.eval_interval} steps
device: {ranks.device}, {precision}""", flush=True)
