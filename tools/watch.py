"""Pictures of runs: losses, what the substeps have learned, the path of the residual stream."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch.nn import functional as F

from model import GPT, Oracle, State, Template
from sample import load_checkpoint
from support.checkpoint import check_tokenizer, model_from
from support.data import to_device
from support.errors import UserError, fail, printable, reason
from support.meta import load_meta
from tools import ToolConfig, validation_rows
from tools.exchange import checkpoint_named

UNITS = {"bytes": "nats per byte", "char": "nats per character"}
AXES = {"steps": ("iter", "step"), "tokens": ("tokens", "training tokens"),
        "seconds": ("seconds", "wall time (s)"), "flops": ("flops", "training FLOPs")}


@dataclass
class PlotConfig(ToolConfig):
    """Draw runs together: losses, the path of the residual stream, or (scalars) of each substep
    how long its memory is over its answer, and the cosine of its move with the answer."""

    runs: tuple[str, ...] = ()  # the out_dirs to draw together; --runs may be left out
    draw: Literal["losses", "scalars", "path"] = "losses"  # what to draw of them
    x: Literal["steps", "tokens", "seconds"] = "steps"  # what losses are drawn over
    plot: str | None = None  # the PNG; auto: losses.png, scalars.png, path.png
    data: str | None = None  # scalars, path: a data folder; auto: that of each run
    data_dir: str | None = None  # where the data folders are; auto: where the run had them

    def rules(self, rule: Callable[[bool, str], None]) -> None:
        rule(bool(self.runs), "name the out_dirs of one run or several: python bench.py plot "
                              "OUT_DIR...")
        rule(len(self.runs) <= 8,
             f"{len(self.runs)} runs: a picture of more than 8 cannot be read; draw several")
        rule((self.plot or ".png").endswith(".png"),
             f"plot={self.plot}: a picture is a PNG; end the name in .png")


def plot(config: PlotConfig) -> None:
    """Several runs in one PNG."""
    path = config.plot or f"{config.draw}.png"
    if config.draw == "losses":
        draw_losses(config, path)
    else:
        measure, draw = (substeps, draw_substeps) if config.draw == "scalars" else (
            residual_path, draw_paths)
        draw({run: measure(*model_and_tokens(run, config)) for run in config.runs}, path)
    print(f"wrote {path}")


@contextlib.contextmanager
def picture(path: str, width: float, height: float) -> Iterator:
    """A matplotlib figure, in inches, that becomes a PNG; a $ in its words is a $."""
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        with matplotlib.rc_context({"text.parse_math": False, "text.usetex": False}):
            figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
            yield figure
            for axes in figure.axes:
                axes.grid(alpha=0.3)
            FigureCanvasAgg(figure).print_png(path)
    except (OSError, UserError):
        raise
    except Exception as error:  # matplotlib raises nearly anything
        fail(f"{path} cannot be drawn: {reason(error)}; mend that: pip install -U matplotlib")


def shown(name: str) -> str:
    """A name for a picture, of which matplotlib leaves out what begins with _ and is not UTF-8."""
    name = printable(name)
    return f" {name}" if name.startswith("_") else name


def read_log(out_dir: str) -> list[dict]:
    """The records of a run's log.jsonl. UserError where there are none."""
    path = os.path.join(out_dir, "log.jsonl")
    try:
        with open(path, encoding="utf-8") as file:
            records = [json.loads(line) for line in file if line.endswith("}\n")]
    except (OSError, ValueError) as error:
        fail(f"{path}: {reason(error)}; name the out_dir of a run")
    if not any(record.get("type") in ("train", "eval") for record in records):
        fail(f"{path} has no losses yet; name the out_dir of a run that has begun")
    return records


# -----------------------------------------------------------------------------
# Losses


def unit_of(run: str, data_dir: str | None) -> str:
    """What a run's losses are in; per token where its data folder cannot say more."""
    trained = read_log(run)[0]
    folder = os.path.join(data_dir or trained.get("data_dir", ""), trained.get("dataset", ""))
    with contextlib.suppress(UserError, KeyError):
        return UNITS[load_meta(folder)["tokenizer"]]
    return "nats per token"


def draw_losses(config: PlotConfig, path: str) -> None:
    """Evaluation losses, and of up to four runs training losses, over one of AXES; without the
    first tenth, whose fall would flatten the rest."""
    key, label = AXES[config.x]
    units = " or ".join(dict.fromkeys(unit_of(run, config.data_dir) for run in config.runs))
    kinds = [("eval", "val_loss", dict(marker="o", ms=3.5))]
    if len(config.runs) <= 4:
        kinds.append(("train", "loss", dict(lw=0.7, alpha=0.4)))
    with picture(path, 7, 4.5) as figure:
        axes = figure.add_subplot(xlabel=label, ylabel=f"cross-entropy ({units})")
        for i, run in enumerate(config.runs):
            records = read_log(run)
            for kind, loss, style in kinds:
                points = [(r[key], r[loss]) for r in records
                          if r.get("type") == kind and r.get(loss) and key in r]
                points = [point for point in points if point[0] >= points[-1][0] / 10]
                if points:
                    xs, losses = zip(*points, strict=True)
                    axes.plot(xs, losses, color=f"C{i}", **style,
                              label=shown(f"{run}, {kind}: {losses[-1]:.4f}"))
        axes.legend(fontsize="small")


# -----------------------------------------------------------------------------
# What the substeps have learned


@torch.no_grad()
def substeps(model: GPT, idx: torch.Tensor) -> dict[str, list[list[float]]]:
    """What each substep does with tokens idx (B, T), layers -> substeps, in quantities that no
    rescaling of weights changes (gamma and an output matrix are one function):

    memory: the length of beta v (alpha v_0, alpha x_0) over that of gamma g, means over tokens;
            only of templates that have such streams
    cosine: of the move x' - x with the answer g, the mean over tokens

    Empty for those that learn no scalars, or ask both oracles at once."""
    memory: list[float] = []
    cosines: list[float] = []

    def ratio(one: torch.Tensor, other: torch.Tensor) -> float:
        return (one.norm(dim=-1).mean() / other.norm(dim=-1).mean()).item()

    def measured(step: Template, oracle: Oracle, state: State, h: float) -> State:
        """A substep, whose oracle is overheard."""
        answers = []

        def overheard(z: torch.Tensor) -> torch.Tensor:
            answers.append(oracle(z))
            return answers[-1]

        new = type(step).forward(step, overheard, state, h)
        x, *streams = state
        g = answers[-1].to(x.dtype)
        cosines.append(F.cosine_similarity(new[0] - x, g, dim=-1).mean().item())
        beta, alpha, gamma = map(step.scalar, ("beta", "alpha", "gamma"))
        taken = g if gamma is None else gamma * g
        if beta is not None:
            memory.append(ratio(beta * streams[0], h * taken))
        elif alpha is not None:
            memory.append(ratio(alpha * streams[0], taken))  # h scales both
        return new

    blocks = model.transformer.h
    steps = [step for block in blocks for step in block.steps if step.learned and step.splittings]
    for step in steps:
        step.forward = partial(measured, step)
    model(idx)
    for step in steps:
        del step.forward
    count = sum(len(block.steps) for block in blocks)
    return {name: np.reshape(values, (len(blocks), -1)).round(4).tolist()
            for name, values in (("memory", memory), ("cosine", cosines)) if len(values) == count}


def draw_substeps(measured: dict[str, dict[str, list[list[float]]]], path: str) -> None:
    """What `substeps` found, by name, over the layers: a column for each substep."""
    named = {"memory": "|memory| / |answer|", "cosine": "cos(move, answer)"}
    rows = [key for key in named if any(key in found for found in measured.values())]
    if not rows:
        fail(f"{', '.join(measured)}: nothing is learned in the substeps; a momentum template "
             f"(--template=nesterov) has scalars")
    columns = max(len(layers[0]) for found in measured.values() for layers in found.values())
    titles = {1: ["layer"], 2: ["attention", "FFN"]}.get(
        columns, [f"substep {k + 1}" for k in range(columns)])
    with picture(path, 1.5 + 3.2 * columns, 0.8 + 2.6 * len(rows)) as figure:
        grid = figure.subplots(len(rows), columns, squeeze=False, sharex=True, sharey="row")
        for key, panels in zip(rows, grid, strict=True):
            panels[0].set_ylabel(named[key])
            for k, axes in enumerate(panels):
                for i, (name, found) in enumerate(measured.items()):
                    values = [layer[k] for layer in found.get(key, []) if k < len(layer)]
                    axes.plot(range(1, len(values) + 1), values, f"C{i}", marker="o", ms=3,
                              label=shown(name))
        for title, top, bottom in zip(titles, grid[0], grid[-1], strict=True):
            top.set_title(title, fontsize="medium")
            bottom.set_xlabel("layer")
            bottom.xaxis.get_major_locator().set_params(integer=True)
        figure.legend(handles=grid[0][0].lines, loc="outside upper center", fontsize="small",
                      ncols=min(4, 80 // max(map(len, measured)) or 1))


# -----------------------------------------------------------------------------
# The path of the residual stream


def model_and_tokens(run: str, config: PlotConfig) -> tuple[GPT, torch.Tensor]:
    """A run's model, and 16 windows (16, T) of its validation split, or of that of --data."""
    checkpoint = load_checkpoint(checkpoint_named(run))
    model, trained = model_from(checkpoint).eval(), checkpoint.get("config", {})
    dataset = config.data or trained.get("dataset")
    if not dataset:
        fail(f"{run} does not say its data; name a folder in data_dir: --data=NAME")
    folder = os.path.join(config.data_dir or trained.get("data_dir", "data"), dataset)
    meta, T = load_meta(folder), model.config.block_size
    check_tokenizer(folder, meta, checkpoint)
    if meta["vocab_size"] > model.config.vocab_size:
        fail(f"{folder} has {meta['vocab_size']} ids, more than {run}; name its own: --data=NAME")
    return model, to_device(validation_rows(folder, T, 16 * T), torch.device("cpu"))[0]


@torch.no_grad()
def residual_path(model: GPT, idx: torch.Tensor) -> tuple[list[float], list[float]]:
    """The way of x through depth for tokens idx (B, T), means over tokens: the L lengths
    |x_{l+1} - x_l|, and the L - 1 angles between a layer's step and the next, in degrees."""
    xs: list[torch.Tensor] = []
    hooks = [block.register_forward_pre_hook(lambda _, inputs: xs.append(inputs[0][0]))
             for block in model.transformer.h]
    hooks.append(model.transformer.ln_f.register_forward_pre_hook(
        lambda _, inputs: xs.append(inputs[0])))
    model(idx)
    for hook in hooks:
        hook.remove()
    steps = torch.stack(xs).double().diff(dim=0)  # (L, B, T, C)
    cosines = F.cosine_similarity(steps[1:], steps[:-1], dim=-1).clamp(-1, 1)
    angles = cosines.arccos().rad2deg().mean(dim=(1, 2))
    return steps.norm(dim=-1).mean(dim=(1, 2)).tolist(), angles.tolist()


def draw_paths(paths: dict[str, tuple[list[float], list[float]]], path: str) -> None:
    """How far x moves in each layer, and by what angle it turns from one to the next."""
    with picture(path, 8, 3.6) as figure:
        lengths, turns = figure.subplots(1, 2)
        lengths.set(xlabel="layer", ylabel="length of the layer's step")
        turns.set(xlabel="between layers l and l + 1", ylabel="turning angle (degrees)")
        for run, (steps, angles) in paths.items():
            lengths.plot(range(1, len(steps) + 1), steps, marker="o", ms=3,
                         label=shown(f"{run}: {sum(steps):.1f} in all"))
            turns.plot(range(1, len(angles) + 1), angles, marker="o", ms=3)
        for axes in (lengths, turns):
            axes.set_ylim(bottom=0)
            axes.xaxis.get_major_locator().set_params(integer=True)
        lengths.legend(fontsize="small")
