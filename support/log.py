"""What a run tells: log.jsonl, wandb, tensorboard, its progress, the picture of its losses."""

import contextlib
import importlib.util
import json
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from support.code import code_in
from support.data import evaluation_starts
from support.device import compile_seconds, peak_flops, peak_mb
from support.errors import fail, printable, reason
from support.files import finite
from support.terminal import clock, show


class Log:
    """log.jsonl, one JSON object a line, wandb or tensorboard when asked for, and the progress line
    on standard output."""

    def __init__(self, config: Any, run: Any, model: Any, device: torch.device, world: int):
        """run: where it begins. An earlier log is cut back to there, or removed."""
        self.config, self.model, self.device, self.world = config, model, device, world
        self.compiled = False  # and said so
        self.seconds: list[float] = []  # of each step since the latest line
        self.sinks = open_sinks(config, run)
        path = os.path.join(config.out_dir, "log.jsonl")
        # unbuffered, so that what a full disk refuses is not tried again when the file is closed
        self.file = open(path, "ab", buffering=0)
        with open(path, "rb") as file:
            earlier = file.read(run.log_length or 0)  # it may be damaged, or shorter
        self.file.truncate(earlier.rfind(b"\n") + 1)  # whole lines
        self.file.seek(0, os.SEEK_END)
        text = earlier[:self.file.tell()].decode(errors="replace")
        times = re.findall(r'"seconds": (\d+(?:\.\d+)?)', text)
        self.began = time.monotonic() - (float(times[-1]) if times else 0.0)  # it goes on
        codes = re.findall(r'"code": {"hash": "(\w+)"', text)
        if codes[-1:] != [code_in()["hash"]]:
            self.write({"type": "config", **asdict(config), "code": code_in()})
            if codes:
                show("warning: the code has changed since this run's last step", keep=True)
        if text and run.evaluated == run.step:  # which the sinks have forgotten
            with contextlib.suppress(ValueError, KeyError):
                self.send(json.loads(text.splitlines()[-1]))

    def write(self, record: dict) -> None:
        data = f"{json.dumps(record)}\n".encode()
        while data:
            data = data[self.file.write(data):]

    def send(self, record: dict) -> None:
        """To the sinks, which take numbers: of the learned scalars their means. What fails is left
        out from then on."""
        kind, step = record["type"], record["iter"]
        known = {f"{kind}/{name}": value for name, value in record.items()
                 if isinstance(value, (int, float)) and name != "iter"}
        for name, layers in record.get("scalars", {}).items():
            known[f"scalars/{name}"] = float(np.mean(np.array(sum(layers, []), float)))
        for name, sink in list(self.sinks.items()):
            try:
                sink(known, step)
            except Exception as error:
                leave_out(name, error)
                del self.sinks[name]

    def record(self, kind: str, step: int, **values: Any) -> None:
        values["seconds"] = time.monotonic() - self.began
        record = finite({"type": kind, "iter": step, **values})
        self.write(record)
        self.send(record)

    def evaluation(self, run: Any, val_loss: float) -> None:
        """An evaluation after run.step steps."""
        scalars = {} if self.config.parallel == "fsdp" else learned_scalars(self.model)
        self.record("eval", run.step, tokens=run.position * self.config.block_size,
                    val_loss=val_loss, best_val_loss=run.best_val_loss,
                    peak_mb=peak_mb(self.device), **{"scalars": scalars} if scalars else {})
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


def learned_scalars(model: Any) -> dict[str, list[list[float]]]:
    """The scalars that all substeps learn, mapped (means of those that are more than a number):
    name -> for each layer the values of its substeps."""
    blocks = model.transformer.h
    substeps = [substep for block in blocks for substep in block.steps]
    names = [n for n in substeps[0].learned if all(n in substep.learned for substep in substeps)]
    return {name: [[substep.scalar(name).mean().item() for substep in block.steps]
                   for block in blocks] for name in names}


def leave_out(sink: str, error: Exception) -> None:
    print(f"warning: {sink}: {printable(reason(error))}; the run goes on without it",
          file=sys.stderr)


def open_sinks(config: Any, run: Any) -> dict[str, Callable[[dict[str, float], int], None]]:
    """Functions of ({name: value}, step) that draw loss.png and log to Weights & Biases or to
    tensorboard. A run that goes on does so there, too, without the steps that it makes again."""
    sinks = {"loss.png": lambda values, _: "eval/tokens" in values and draw_losses(config.out_dir)}
    if run.log_length is None:  # these are an earlier run's
        shutil.rmtree(os.path.join(config.out_dir, "tensorboard"), ignore_errors=True)
        with contextlib.suppress(OSError):
            os.remove(os.path.join(config.out_dir, "wandb_id"))
    for name, wanted, open_sink in (("wandb", config.wandb_log, open_wandb),
                                    ("tensorboard", config.tensorboard, open_tensorboard)):
        try:
            if wanted:
                sinks[name] = open_sink(config, run.step)
        except ImportError as error:
            fail(f"{name} is asked for and not installed: pip install {name} ({error})")
        except Exception as error:
            leave_out(name, error)
    return sinks


def open_wandb(config: Any, _: int) -> Callable:
    import wandb

    path = os.path.join(config.out_dir, "wandb_id")
    with contextlib.suppress(FileExistsError), open(path, "x") as file:
        file.write(secrets.token_hex(4))
    with open(path) as file:
        return wandb.init(project=config.wandb_project, name=config.wandb_run_name,
                          id=file.read(), resume="allow", config=asdict(config)).log


def open_tensorboard(config: Any, step: int) -> Callable:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(os.path.join(config.out_dir, "tensorboard"), purge_step=step)

    def log(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return log


def draw_losses(out_dir: str) -> None:
    """loss.png of a run, where matplotlib is installed. (tools/watch.py draws several together.)"""
    if importlib.util.find_spec("matplotlib") is None:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="cross-entropy (nats)")
    with open(os.path.join(out_dir, "log.jsonl"), encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    for kind, name, style in (("train", "loss", "-"), ("eval", "val_loss", "o-")):
        points = [(r["iter"], r[name]) for r in records if r["type"] == kind and r[name]]
        if points:
            axes.plot(*zip(*points, strict=True), style, lw=1, ms=3.5,
                      label=f"{kind}: {points[-1][1]:.4f}")
    if axes.lines:  # else no loss is finite yet
        losses = axes.lines[0].get_ydata()
        axes.set_ylim(top=losses[len(losses) // 10])  # what is above would flatten the rest
        axes.legend()
    axes.grid(alpha=0.3)
    FigureCanvasAgg(figure).print_png(os.path.join(out_dir, "loss.png"))


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
model:  {total:,} parameters: {embedding:,} in tables, of these {velocity:,} in velocity tables, and
        {total - embedding:,} others; {model.flops_per_token() / 1e6:,.1f} MFLOP per token
step:   {tokens_per_step:,} tokens = {c.gradient_accumulation_steps} micro-batches of \
{c.batch_size} x {c.block_size}, {c.parallel} over {ranks.world} process(es)
run:    {c.max_iters:,} steps, {c.decay_lr * c.warmup_iters:,} of warm-up, \
{c.max_iters * tokens_per_step / len(train):,.2f} epochs
data:   {c.dataset}: {len(train):,} training and {len(val):,} validation tokens, \
{meta["vocab_size"]:,} ids
eval:   {windows * c.block_size:,} tokens every {c.eval_interval} steps
device: {ranks.device}, {', '.join(filter(None, how))}""", flush=True)
