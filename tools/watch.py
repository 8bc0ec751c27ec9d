"""Pictures of runs: losses, learned scalars, the path of the residual stream."""

import contextlib
import importlib.util
import os
from collections.abc import Iterator

import numpy as np
import torch

from model import GPT
from support.checkpoint import (
    checkpoint_config,
    holds_weights,
    model_from,
    read_checkpoint,
    read_latest,
)
from support.data import Tokens
from support.errors import fail
from support.log import plot_losses, read_log, run_names
from support.meta import load_meta
from tools.options import BenchConfig

NO_MATPLOTLIB = "plot needs matplotlib: pip install matplotlib"


@contextlib.contextmanager
def picture(path: str, width: float, height: float, dpi: int = 120) -> Iterator:
    """A matplotlib figure, in inches, that becomes a PNG."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        fail(NO_MATPLOTLIB)
    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    yield figure
    FigureCanvasAgg(figure).print_png(path)


def plot(c: BenchConfig) -> None:
    """Several runs in one PNG: their losses, learned scalars, or paths of the residual stream."""
    if not c.runs:
        fail("name the out_dirs of one run or several: python bench.py plot OUT_DIR...")
    if importlib.util.find_spec("matplotlib") is None:
        fail(NO_MATPLOTLIB)
    path = c.plot or f"{c.draw}.png"
    if c.draw == "losses":
        flops = [flops_per_token(run) for run in c.runs] if c.x == "flops" else []
        plot_losses(list(c.runs), path, c.x, tuple(flops))
    else:
        (plot_scalars if c.draw == "scalars" else plot_paths)(c, path)
    print(f"wrote {path}")


def checkpoint_of(run: str, weights: bool = True) -> dict:
    """A run's latest checkpoint, or that of a file or an exported folder; UserError where there is
    none."""
    if os.path.isfile(run) or holds_weights(run):
        return read_checkpoint(run, weights)
    return read_latest(run, weights) or read_checkpoint(os.path.join(run, "ckpt.pt"), weights)


def flops_per_token(out_dir: str) -> int:
    """Training FLOPs per token of a run's model."""
    with torch.device("meta"):
        return GPT(checkpoint_config(checkpoint_of(out_dir, weights=False))).flops_per_token()


def plot_scalars(c: BenchConfig, path: str) -> None:
    """The learned scalars that these runs have logged."""
    names = run_names(c.runs)
    logs = {name: [r["scalars"] | {"step": r["iter"]} for r in read_log(run) if "scalars" in r]
            for run, name in names.items()}
    if not any(logs.values()):
        fail(f"{', '.join(c.runs)}: no learned scalars in log.jsonl; a momentum template "
             f"(--template=nesterov) logs them at every evaluation")
    if without := [name for name, log in logs.items() if not log]:
        print(f"no learned scalars in {', '.join(without)}")
    draw_scalars(logs, path)


STYLES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (8, 4)), (0, (1, 4)))


def draw_scalars(logs: dict[str, list[dict]], path: str) -> None:
    """Each learned scalar: by layer as the run ended, and its mean over layers, with the lowest and
    the highest, during training. The first substep is drawn solid, the next dashed.

    logs: name of a run -> records of its step and, by name, its scalars: layers -> substeps."""
    names = list(dict.fromkeys(k for log in logs.values() for r in log for k in r if k != "step"))
    dpi = 120 if len(names) < 5 else 80  # a file of moderate size
    with picture(path, 9, 2.2 * len(names) + 0.6, dpi) as figure:
        grid = figure.subplots(len(names), 2, squeeze=False)
        for name, (by_layer, over_time) in zip(names, grid, strict=True):
            by_layer.set(ylabel=name, xlabel="layer")
            over_time.set(xlabel="step")
            for i, (run, log) in enumerate(logs.items()):
                log = [r for r in log if name in r]
                values = np.array([r[name] for r in log])  # (evaluations, layers, substeps)
                substeps = {1: ["layer"], 2: ["attention", "FFN"]}.get(
                    values.shape[-1], [f"substep {k + 1}" for k in range(values.shape[-1])])
                for k, substep in enumerate(substeps):
                    style = dict(color=f"C{i}", ls=STYLES[k % len(STYLES)])
                    by_layer.plot(range(1, values.shape[1] + 1), values[-1, :, k], ms=3.5,
                                  marker="os^Dv<>"[k % 7], label=f"{run}, {substep}", **style)
                    steps, of_substep = [r["step"] for r in log], values[:, :, k]
                    over_time.plot(steps, of_substep.mean(axis=1), **style)
                    over_time.fill_between(steps, of_substep.min(axis=1), of_substep.max(axis=1),
                                           color=f"C{i}", alpha=0.1, lw=0)
            for axes in (by_layer, over_time):
                axes.grid(alpha=0.3)
            by_layer.xaxis.get_major_locator().set_params(integer=True)
            over_time.xaxis.get_major_locator().set_params(integer=True)
        lines = {label: line for by_layer, _ in grid
                 for line, label in zip(*by_layer.get_legend_handles_labels(), strict=True)}
        figure.legend(lines.values(), lines.keys(), loc="outside upper center", ncols=2,
                      fontsize="small", handlelength=3)


def plot_paths(c: BenchConfig, path: str) -> None:
    """How far x moves in each layer, and by what angle it turns from one to the next: means over
    the tokens of 16 windows of each run's validation split, or of --data's."""
    found = {}
    for run in c.runs:
        checkpoint = checkpoint_of(run)
        model, trained = model_from(checkpoint).eval(), checkpoint.get("config", {})
        if not (dataset := c.data or trained.get("dataset")):
            fail(f"{run} does not say its data; name a folder in {c.data_dir}: --data=NAME")
        data_dirs = [c.data_dir] if c.data else [trained.get("data_dir", c.data_dir), c.data_dir]
        folders = [os.path.join(data_dir, dataset) for data_dir in data_dirs]
        folder = next(filter(os.path.isdir, folders), folders[0])
        meta = load_meta(folder)
        if meta["vocab_size"] > model.config.vocab_size:
            fail(f"{folder} has {meta['vocab_size']} token ids, and {run} only "
                 f"{model.config.vocab_size}; name its own data: --data=NAME")
        tokens = Tokens(folder, "val", meta, model.config.block_size)
        starts = range(0, len(tokens) - model.config.block_size, model.config.block_size)
        found[run] = model.residual_path(tokens.read(starts[:16])[:, :-1].long())
    with picture(path, 8, 3.6) as figure:
        lengths, turns = figure.subplots(1, 2)
        lengths.set(xlabel="layer", ylabel="length of the layer's step")
        turns.set(xlabel="between layers l and l + 1", ylabel="turning angle (degrees)")
        names = run_names(c.runs)
        for run, (steps, angles) in found.items():
            lengths.plot(range(1, len(steps) + 1), steps, marker="o", ms=3,
                         label=f"{names[run]}: {sum(steps):.1f} in all")
            turns.plot(range(1, len(angles) + 1), angles, marker="o", ms=3)
        for axes in (lengths, turns):
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
            axes.xaxis.get_major_locator().set_params(integer=True)
        lengths.legend(fontsize="small")
