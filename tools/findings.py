"""What a study found: its comparisons with their intervals and verdicts, the tables, the pictures.

A run is a record of results.json; the runs are in the order of the variants."""

import math
import os
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tools.watch import AXES, draw_substeps, picture, shown

# -----------------------------------------------------------------------------
# The statistics


def t_probability(t: float, df: int) -> float:
    """P(|T| < t) of Student's t (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle, odd = math.atan(t / math.sqrt(df)), df % 2
    term, total = math.cos(angle) if odd else 1.0, 0.0
    for k in range(2 + odd, df + 1, 2):
        total += term
        term *= (k - 1) / k * math.cos(angle) ** 2
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def t_quantile(share: float, df: int) -> float:
    """The t with P(|T| < t) = share."""
    low, high = 0.0, 1e4
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_probability(middle, df) < share else (low, middle)
    return high


def holm(p_values: list[float]) -> list[float]:
    """Holm's correction: what is at most 0.05 here is false at most once in twenty families."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def text_noise(blocks: list[float], less: list[float]) -> float:
    """How far the difference of two variants' losses would vary on another text of this kind and
    length: its standard deviation over bootstrap samples of the blocks (fixed draws)."""
    difference = np.subtract(blocks, less)
    drawn = np.random.default_rng(0).integers(len(difference), size=(10_000, len(difference)))
    return difference[drawn].mean(axis=1).std()


Variance = tuple[float, int]  # with its degrees of freedom


def pooled(variances: Iterable[Variance]) -> Variance:
    """The common variance that these are estimates of."""
    variances = list(variances)
    freedom = sum(df for _, df in variances)
    return sum(value * df for value, df in variances) / (freedom or 1), freedom


def seed_variances(losses: dict[str, list[float]]) -> dict[str, Variance]:
    """Of each variant the variance between seeds, pooled over the study. One that varies more than
    twice as much as the others has its own."""
    own = {label: (statistics.variance(values), len(values) - 1)
           for label, values in losses.items() if len(values) > 1}
    wild = set()
    for label, (value, _) in own.items():
        others, freedom = pooled(own[other] for other in own if other != label)
        if freedom and value > 4 * others:
            wild.add(label)
    common = pooled(own[label] for label in own if label not in wild)
    return {label: own[label] if label in wild else common for label in losses}


@dataclass
class Comparison:
    """The final loss of one variant less that of another."""

    variant: str
    less: str
    mean: float
    half: float | None = None  # half width of the 95 % interval
    half90: float | None = None  # of the 90 % interval
    text: float | None = None  # text_noise
    p: float | None = None  # Holm's, over all comparisons of the study
    verdict: str = "one seed"
    seeds: tuple[float, ...] = ()  # the differences of runs with the same seed

    def judge(self, margin: float | None) -> None:
        """Equal is a claim of its own: the 90 % interval lies within a margin given beforehand."""
        if margin and abs(self.mean) + self.half90 <= margin:
            self.verdict = "equal"
        elif self.p > 0.05:
            self.verdict = "undecided"
        else:
            self.verdict = "**better**" if self.mean < 0 else "**worse**"


def comparisons(runs: list[dict], planned: dict[str, Any]) -> list[Comparison]:
    """All variants against the first, then the pairs that the study names. Nothing is paired by
    seed.

    planned: the options of each variant, as compare.py plans them."""
    variants = by_variant(runs)
    first, *others = variants
    config = planned[first]
    named = [tuple(pair.split(" - ")) for pair in config.pairs]
    wanted = dict.fromkeys([(label, first) for label in others] + named)  # each once
    losses = {label: [r["val_loss"] for r in of_variant] for label, of_variant in variants.items()}
    blocks = {label: np.mean([r["blocks"] for r in of_variant], axis=0)
              for label, of_variant in variants.items() if all(r.get("blocks") for r in of_variant)}
    variances = seed_variances(losses)
    found, p_values = [], []
    for label, less in (pair for pair in wanted if variants.keys() >= set(pair)):
        c = Comparison(label, less, statistics.mean(losses[label]) - statistics.mean(losses[less]))
        c.seeds = tuple(one["val_loss"] - other["val_loss"] for one in variants[label]
                        for other in variants[less] if one["seed"] == other["seed"])
        if blocks.keys() >= {label, less} and len(blocks[label]) > 1:
            c.text = text_noise(blocks[label], blocks[less])
        error = math.sqrt(sum(variances[k][0] / len(losses[k]) for k in (label, less)))
        if freedom := min(variances[k][1] for k in (label, less)):
            c.half, c.half90 = (t_quantile(share, freedom) * error for share in (0.95, 0.9))
            p_values.append(max(0.0, 1 - t_probability(abs(c.mean) / (error or 1e-12), freedom)))
        found.append(c)
    for c, p in zip(found, holm(p_values), strict=False):  # of one seed each there are none
        c.p = p
        c.judge(config.margin)
        if any(len(losses[label]) < planned[label].seeds for label in (c.variant, c.less)):
            c.verdict = "seeds are missing"
    return found


def by_variant(runs: list[dict]) -> dict[str, list[dict]]:
    variants: dict[str, list[dict]] = {}
    for run in runs:
        variants.setdefault(run["variant"], []).append(run)
    return variants


# -----------------------------------------------------------------------------
# The table


def summary(runs: list[dict], planned: dict[str, Any]) -> list[dict[str, str]]:
    """One row for each variant: what its runs share, and their figures together."""
    config = next(iter(planned.values()))
    published = dict(text.rpartition(":")[::2] for text in config.published)
    variants, rows = by_variant(runs), []
    for label, of_variant in variants.items():
        first, losses = of_variant[0], [r["val_loss"] for r in of_variant]

        def mean(values: Iterable[float | None], form: str) -> str:
            known = [value for value in values if value is not None]
            return format(statistics.mean(known), form) if known else ""

        row = {"variant": label, "seeds": f"{len(losses)}", "final loss": mean(losses, ".4f"),
               "best": mean([r["best_val_loss"] for r in of_variant], ".4f")}
        if len(losses) > 1:
            row["final loss"] += f" ± {statistics.stdev(losses):.4f}"
        if len(losses) < planned[label].seeds:
            row["seeds"] += f" of {planned[label].seeds}"
        if published:
            row["published best"] = published.get(label, "").strip()
        if any(variant.match != "width" for variant in planned.values()):
            row["matched"] = planned[label].match if rows else ""
        row |= {"parameters": f"{first['parameters']:,}", "matrices": f"{first['matrices']:,}",
                "MFLOP/token": f"{first['flops_per_token'] / 1e6:,.2f}",
                "tokens": f"{first['tokens']:,}"}
        if config.budget == "seconds":
            row["seconds"] = mean([r["seconds"] for r in of_variant], ",.0f")
        row["tokens/s"] = mean([r["tokens_per_s"] for r in of_variant], ",.0f")
        row["peak MB"] = mean([r["peak_mb"] for r in of_variant], ",.0f")
        rows.append(row)
    return rows


def differences(found: list[Comparison]) -> list[dict[str, str]]:
    """The comparisons as rows."""
    rows = []
    for c in found:
        row = {"variant": c.variant, "less": c.less, "difference": f"{c.mean:+.4f}"}
        if c.half is not None:
            row["difference"] += f" ± {c.half:.4f}"
        if any(other.text is not None for other in found):
            row["text"] = "" if c.text is None else f"{c.text:.4f}"
        row["p"] = "" if c.p is None else f"{c.p:.3f}".replace("0.000", "<0.001")
        rows.append(row | {"verdict": c.verdict})
    return rows


def markdown(rows: list[dict[str, str]]) -> str:
    """Rows of text as a table of GitHub's."""
    lines = [list(rows[0]), ["---", *["--:"] * (len(rows[0]) - 1)], *map(dict.values, rows)]
    escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped) + "\n"


# -----------------------------------------------------------------------------
# Pictures


def draw_study(runs: list[dict], found: list[Comparison], config: Any, unit: str, folder: str,
               ) -> list[str]:
    """curves.png, differences.png where there are intervals, scalars.png where there are streams
    beside x (of the first eight with such, means over the seeds); returns their names. Losses are
    in this unit, "nats per byte" say."""
    draw_curves(runs, os.path.join(folder, "curves.png"), config.x, unit)
    names = ["curves.png"]
    if any(c.half for c in found):
        draw_differences(found, os.path.join(folder, "differences.png"), config.margin, unit)
        names.append("differences.png")
    measured = by_variant([r for r in runs if "memory" in r.get("substeps", {})])
    if measured:
        means = {label: {key: np.mean([r["substeps"][key] for r in of_variant], axis=0).tolist()
                         for key in of_variant[0]["substeps"]}
                 for label, of_variant in list(measured.items())[:8]}
        draw_substeps(means, os.path.join(folder, "scalars.png"))
        names.append("scalars.png")
    return names


def draw_curves(runs: list[dict], path: str, x: str, unit: str) -> None:
    """Validation losses in the second half of training, where they can be told apart: means over
    the seeds, with the lowest and the highest. A panel has the first variant and at most seven;
    those whose names begin alike ("frozen", "frozen, matched") have one color."""
    def per_step(run: dict) -> float:
        total = run["tokens"] * run["flops_per_token"] if x == "flops" else run[x]
        return total / run["steps"]

    variants = by_variant(runs)
    first, families, panels = next(iter(variants)), {}, [{}]
    for name in variants:
        families.setdefault(name.split(",")[0].split(" (")[0], []).append(name)
    lines = "o-", "s--", "^:", "D-.", "v-", "x--", "*:", "P-."
    for k, family in enumerate(families.values()):
        for i, name in enumerate(family):
            if len(panels[-1]) + (1 if i else min(7, len(family))) > 8:
                panels.append({first: "ko-"})
            panels[-1][name] = (f"C{(k - 1) % 10}" if k else "k") + lines[i % 8]
    with picture(path, 9, 0.8 + 3.4 * len(panels)) as figure:
        grid = figure.subplots(len(panels), 1, squeeze=False, sharex=True, sharey=True)[:, 0]
        figure.suptitle("second half of training: mean, lowest, highest seed", fontsize="small")
        grid[-1].set_xlabel(AXES[x][1])
        for axes, formats in zip(grid, panels, strict=True):
            for name, form in formats.items():
                curves = [dict(run["curve"]) for run in variants[name]]  # step -> loss
                steps = [step for step in curves[0] if all(step in curve for curve in curves)]
                steps = steps[len(steps) // 2:]
                xs = [step * statistics.mean(map(per_step, variants[name])) for step in steps]
                at_step = [[curve[step] for curve in curves] for step in steps]
                means = list(map(statistics.mean, at_step))
                line, = axes.plot(xs, means, form, ms=4, label=shown(f"{name}: {means[-1]:.4f}"))
                axes.fill_between(xs, list(map(min, at_step)), list(map(max, at_step)),
                                  color=line.get_color(), alpha=0.12, lw=0)
            axes.set_ylabel(f"validation loss ({unit})")
            axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))


def draw_differences(found: list[Comparison], path: str, margin: float | None, unit: str) -> None:
    """Each with its interval and seeds; of those far from all others an arrow and a number."""
    first, names = found[0].less, []
    rows = [[c.mean - (c.half or 0), c.mean + (c.half or 0), *c.seeds] for c in found]
    points = np.concatenate(rows)
    far = np.abs(points - np.median(points))
    near = points[far <= 6 * np.median(far)]
    low, high = 1.05 * min(0, *near), 1.05 * max(0, *near)
    with picture(path, 8, 1.5 + 0.3 * len(found)) as figure:
        axes = figure.add_subplot(xlim=(low, high), ylim=(len(found) - 0.4, -0.6))
        figure.supxlabel(f"final loss less that of {shown(first)}, or of the variant named\n"
                         f"({unit}, with 95 % intervals)", fontsize="medium")
        for i, c in enumerate(found):
            mark = {"**better**": "C2v", "**worse**": "C3^", "equal": "C0s"}.get(c.verdict, "C7o")
            axes.errorbar(c.mean, i, xerr=c.half, fmt=mark, capsize=3)
            axes.plot(c.seeds, [i] * len(c.seeds), "|", color="k", alpha=0.4, ms=7)
            if min(rows[i]) < low or max(rows[i]) > high:
                words = f"{c.mean:+.3f} ± {c.half or 0:.3f} {'←' if c.mean < 0 else '→'} "
                axes.text(high, i, words, ha="right", va="bottom", color=mark[:2])
            names.append(shown(c.variant if c.less == first else f"{c.variant} less {c.less}"))
        words = "▼ better; ▲ worse; ● undecided; ticks: differences of runs with the same seed"
        if margin:
            axes.axvspan(-margin, margin, color="C0", alpha=0.08, lw=0)
            words += f"\n■ equal: the 90 % interval is within ± {margin:g}"
        figure.suptitle(words, fontsize="small")
        axes.axvline(0, color="k", lw=0.8)
        axes.set_yticks(range(len(found)), names)
