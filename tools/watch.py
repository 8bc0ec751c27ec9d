"""Pictures of runs: losses, learned scalars, the path of the residual stream."""

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch.nn import functional as F

from config import check_rules
from model import GPT
from sample import load_checkpoint
from support.checkpoint import model_from
from support.data import Tokens
from support.errors import UserError, fail, printable, reason
from support.meta import load_meta
from tools.exchange import checkpoint_named

AXES = {"steps": ("iter", "step"), "tokens": ("tokens", "training tokens"),
        "seconds": ("seconds", "wall time (s)"), "flops": ("flops", "training FLOPs")}


@dataclass
class PlotConfig:
    """Draw runs together: their losses, learned scalars, or the paths of their residual streams."""

    runs: tuple[str, ...] = ()  # the out_dirs to draw together; --runs may be left out
    draw: Literal["losses", "scalars", "path"] = "losses"  # what to draw of them
    x: Literal["steps", "tokens", "seconds"] = "steps"  # what losses are drawn over
    plot: str | None = None  # the PNG; auto: losses.png, scalars.png, path.png
    data: str | None = None  # path: a data folder; auto: that of each run
    data_dir: str | None = None  # path: where the data folders are; auto: where the run had them

    def __post_init__(self) -> None:
        check_rules(self)

    def rules(self, rule: Callable[[bool, str], None]) -> None:
        rule(bool(self.runs), "name the out_dirs of one run or several: python bench.py plot "
                              "OUT_DIR...")
        rule((self.plot or ".png").endswith(".png"),
             f"plot={self.plot}: a picture is a PNG; end the name in .png")


def plot(config: PlotConfig) -> None:
    """Several runs in one PNG."""
    path = config.plot or f"{config.draw}.png"
    if config.draw == "losses":
        draw_losses(config.runs, path, config.x)
    elif config.draw == "scalars":
        draw_scalars(logged_scalars(config.runs), path)
    else:
        draw_paths({run: residual_path(*model_and_tokens(run, config)) for run in config.runs},
                   path)
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


def draw_losses(runs: Iterable[str], path: str, x: str) -> None:
    """Training and evaluation losses over one of AXES."""
    key, label = AXES[x]
    with picture(path, 7, 4.5) as figure:
        axes = figure.add_subplot(xlabel=label, ylabel="cross-entropy (nats per token)")
        top = 0.0  # of the picture: the second evaluation, since the first is that of no training
        for i, run in enumerate(runs):
            records, color = read_log(run), f"C{i}"
            for kind, loss, style in (("train", "loss", dict(lw=0.7, alpha=0.4)),
                                      ("eval", "val_loss", dict(marker="o", ms=3.5))):
                points = [(r[key], r[loss]) for r in records
                          if r.get("type") == kind and r.get(loss) and key in r]
                if points:
                    xs, losses = zip(*points, strict=True)
                    axes.plot(xs, losses, color=color, **style,
                              label=shown(f"{run}, {kind}: {losses[-1]:.4f}"))
                    if kind == "eval" and len(losses) > 1:
                        top = max(top, losses[1])
        axes.set_ylim(top=1.05 * top or None)
        axes.legend(fontsize="small")


# -----------------------------------------------------------------------------
# Learned scalars


STYLES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (8, 4)), (0, (1, 4)))


def logged_scalars(runs: Iterable[str]) -> dict[str, list[dict]]:
    """Run -> the learned scalars that it has logged."""
    logs = {run: [r["scalars"] | {"step": r["iter"]} for r in read_log(run) if "scalars" in r]
            for run in runs}
    without = ", ".join(run for run, log in logs.items() if not log)
    if not any(logs.values()):
        fail(f"{without}: no learned scalars in log.jsonl; a momentum template "
             f"(--template=nesterov) logs them at every evaluation")
    if without:
        print(f"no learned scalars in {without}")
    return logs


def draw_scalars(logs: dict[str, list[dict]], path: str) -> None:
    """Each learned scalar: by layer as the run ended, and its mean over layers, with the lowest and
    the highest, during training. The first substep is drawn solid, the next dashed.

    logs: name of a run -> records of its step and, by name, its scalars: layers -> substeps."""
    names = list(dict.fromkeys(k for log in logs.values() for r in log for k in r if k != "step"))
    with picture(path, 9, 2.2 * len(names) + 0.6) as figure:
        grid = figure.subplots(len(names), 2, squeeze=False)
        for name, (by_layer, over_time) in zip(names, grid, strict=True):
            by_layer.set(ylabel=name, xlabel="layer")
            over_time.set(xlabel="step")
            for i, (run, log) in enumerate(logs.items()):
                log = [r for r in log if name in r]
                steps = [r["step"] for r in log]
                values = np.array([r[name] for r in log], float)  # (evaluations, layers, substeps)
                substeps = {1: ["layer"], 2: ["attention", "FFN"]}.get(
                    values.shape[-1], [f"substep {k + 1}" for k in range(values.shape[-1])])
                for k, substep in enumerate(substeps):
                    style = dict(color=f"C{i}", ls=STYLES[k % len(STYLES)])
                    by_layer.plot(range(1, values.shape[1] + 1), values[-1, :, k], **style, ms=3.5,
                                  marker="os^Dv<>"[k % 7], label=shown(f"{run}, {substep}"))
                    of_substep = values[:, :, k]
                    over_time.plot(steps, of_substep.mean(axis=1), **style)
                    over_time.fill_between(steps, of_substep.min(axis=1), of_substep.max(axis=1),
                                           color=f"C{i}", alpha=0.1, lw=0)
            for axes in (by_layer, over_time):
                axes.xaxis.get_major_locator().set_params(integer=True)
        lines = {line.get_label(): line for by_layer, _ in grid for line in by_layer.lines}
        figure.legend(lines.values(), lines.keys(), loc="outside upper center", ncols=2,
                      fontsize="small", handlelength=3)


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
    if meta["vocab_size"] > model.config.vocab_size:
        fail(f"{folder} has {meta['vocab_size']} token ids, and {run} only "
             f"{model.config.vocab_size}; name its own data: --data=NAME")
    tokens = Tokens(folder, "val", meta, T)
    return model, tokens.read(range(0, len(tokens) - T, T)[:16])[:, :-1].long()


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
