"""What a study found: differences paired by seed with their intervals, the table, the pictures.

A run is a record of results.json; the runs are in the order of the variants."""

import math
import os
import statistics
from collections.abc import Iterable
from typing import Any

from tools.watch import AXES, draw_scalars, picture, shown

# -----------------------------------------------------------------------------
# The statistics


# 97.5 % quantiles of Student's t for 1 to 10 degrees of freedom
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)

Difference = tuple[float, float]  # mean, half width of its 95 % t-interval


def t_quantile(df: int) -> float:
    """97.5 % of Student's t: the table, then Cornish and Fisher's expansion in 1 / df."""
    if df <= len(T975):
        return T975[df - 1]
    return 1.95996 + 2.3723 / df + 2.8225 / df**2 + 2.556 / df**3


def paired(losses: dict[int, float], reference: dict[int, float]) -> Difference | None:
    """losses - reference over the seeds that both have; None below two of them."""
    d = [losses[seed] - reference[seed] for seed in losses.keys() & reference.keys()]
    if len(d) < 2:
        return None
    return statistics.mean(d), t_quantile(len(d) - 1) * statistics.stdev(d) / math.sqrt(len(d))


def verdict(difference: Difference | None) -> str:
    """A difference whose interval contains zero is none."""
    if difference is None:
        return "one seed"
    mean, half = difference
    if abs(mean) <= half:
        return "no difference shown"
    return "lower" if mean < 0 else "higher"


def with_interval(difference: Difference | None) -> str:
    return "" if difference is None else "{:+.4f} ± {:.4f}".format(*difference)


def by_variant(runs: list[dict]) -> dict[str, list[dict]]:
    variants: dict[str, list[dict]] = {}
    for run in runs:
        variants.setdefault(run["variant"], []).append(run)
    return variants


def losses_by_seed(runs: list[dict]) -> dict[str, dict[int, float]]:
    """variant -> seed -> final loss."""
    return {label: {r["seed"]: r["val_loss"] for r in of_variant}
            for label, of_variant in by_variant(runs).items()}


def differences(runs: list[dict]) -> dict[str, Difference | None]:
    """Of every variant but the first: its final loss less the first one's."""
    losses = losses_by_seed(runs)
    first, *others = losses
    return {label: paired(losses[label], losses[first]) for label in others}


# -----------------------------------------------------------------------------
# The table


def summary(runs: list[dict], planned: dict[str, Any]) -> list[dict[str, str]]:
    """One row for each variant: what its runs share, and their figures together.

    planned: the options of each variant, as compare.py plans them."""
    config = next(iter(planned.values()))
    published = dict(text.rpartition(":")[::2] for text in config.published)
    tasks = dict.fromkeys(task for r in runs for task in scores(r, config))
    found, variants, rows = differences(runs), by_variant(runs), []
    for label, of_variant in variants.items():
        first, losses = of_variant[0], [r["val_loss"] for r in of_variant]

        def mean(values: Iterable[float | None], form: str) -> str:
            known = [value for value in values if value is not None]
            return format(statistics.mean(known), form) if known else ""

        row = {"variant": label, "seeds": f"{len(losses)}", "final loss": mean(losses, ".4f"),
               "difference to the first": "", "verdict": "",
               "best": mean([r["best_val_loss"] for r in of_variant], ".4f")}
        if len(losses) > 1:
            row["final loss"] += f" ± {statistics.stdev(losses):.4f}"
        if label in found:
            row["difference to the first"] = with_interval(found[label])
            row["verdict"] = verdict(found[label])
        if len(losses) < planned[label].seeds:
            row["seeds"] += f" of {planned[label].seeds}"
            row["verdict"] = "seeds are missing" if label in found else ""
        if published:
            row["published best"] = published.get(label, "").strip()
        for task in tasks:
            row[task] = mean([scores(r, config).get(task) for r in of_variant], ".1%").rstrip("%")
        if any(variant.match != "width" for variant in planned.values()):
            row["matched"] = planned[label].match if label in found else ""
        row |= {"parameters": f"{first['parameters']:,}", "matrices": f"{first['matrices']:,}",
                "MFLOP/token": f"{first['flops_per_token'] / 1e6:,.2f}",
                "tokens": f"{first['tokens']:,}"}
        if config.budget == "seconds":
            row["seconds"] = mean([r["seconds"] for r in of_variant], ",.0f")
        row["tokens/s"] = mean([r["tokens_per_s"] for r in of_variant], ",.0f")
        row["peak MB"] = mean([r["peak_mb"] for r in of_variant], ",.0f")
        rows.append(row)
    return rows


def scores(run: dict, config: Any) -> dict[str, float | None]:
    """By task; none if the run was judged on others, or not at all."""
    tasks = run.get("tasks", {})
    return tasks["scores"] if tasks.get("how") == config.judged_by else {}


def pairs(runs: list[dict]) -> list[dict[str, str]]:
    """The other pairs: row less column; bold where the interval leaves out zero. No rows where
    there is no interval."""
    losses, rows = losses_by_seed(runs), []
    _, *labels = losses
    for i, label in enumerate(labels[1:], 1):
        row = {"variant": label}
        for j, other in enumerate(labels[:-1]):
            difference = paired(losses[label], losses[other]) if j < i else None
            row[f"less {other}"] = with_interval(difference)
            if verdict(difference) in ("lower", "higher"):
                row[f"less {other}"] = f"**{with_interval(difference)}**"
        rows.append(row)
    return rows if any("±" in cell for row in rows for cell in row.values()) else []


def markdown(rows: list[dict[str, str]]) -> str:
    """Rows of text as a table of GitHub's."""
    lines = [list(rows[0]), ["---", *["--:"] * (len(rows[0]) - 1)], *map(dict.values, rows)]
    escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped) + "\n"


# -----------------------------------------------------------------------------
# Pictures


def draw_study(runs: list[dict], folder: str, x: str) -> list[str]:
    """curves.png, differences.png where there is one, scalars.png (of the first seed) where some
    are learned; returns their names."""
    draw_curves(runs, os.path.join(folder, "curves.png"), x)
    names = ["curves.png"]
    if any(differences(runs).values()):
        draw_differences(runs, os.path.join(folder, "differences.png"))
        names.append("differences.png")
    learned = {name: [{"step": step} | scalars for step, scalars in of_variant[0]["scalars"]]
               for name, of_variant in by_variant(runs).items() if "scalars" in of_variant[0]}
    if learned:
        draw_scalars(learned, os.path.join(folder, "scalars.png"))
        names.append("scalars.png")
    return names


def draw_curves(runs: list[dict], path: str, x: str) -> None:
    """Validation losses: means over the seeds, with the lowest and the highest."""
    def per_step(run: dict) -> float:
        total = run["tokens"] * run["flops_per_token"] if x == "flops" else run[x]
        return total / run["steps"]

    with picture(path, 7, 4.5) as figure:
        axes = figure.add_subplot(xlabel=AXES[x][1], ylabel="validation loss (nats per token)")
        axes.set_title("means over the seeds, from the lowest to the highest", fontsize="small")
        low, high = math.inf, 0.0
        for i, (name, of_variant) in enumerate(by_variant(runs).items()):
            curves = [dict(run["curve"]) for run in of_variant]  # step -> loss
            steps = [step for step in curves[0] if all(step in curve for curve in curves)]
            xs = [step * statistics.mean(map(per_step, of_variant)) for step in steps]
            at_step = [[curve[step] for curve in curves] for step in steps]
            mean, color = list(map(statistics.mean, at_step)), f"C{i % 10}"
            axes.plot(xs, mean, color=color, ls=("-", "--", ":")[i // 10 % 3],
                      label=shown(f"{name}: {mean[-1]:.4f}"))
            axes.fill_between(xs, list(map(min, at_step)), list(map(max, at_step)), color=color,
                              alpha=0.12, lw=0)
            early = max(1, 2 * (len(mean) - 1) // 5)  # what is above would flatten the rest
            low, high = min(low, *mean), max(high, *mean[early:early + 1])
        axes.set_ylim(low - 0.05 * (high - low or 1), high)
        axes.legend(fontsize="small")


def draw_differences(runs: list[dict], path: str) -> None:
    """Each variant's difference to the first with its interval, and seed by seed; grey: none."""
    found = {label: d for label, d in differences(runs).items() if d}
    losses, first = losses_by_seed(runs), runs[0]["variant"]
    with picture(path, 7, 1.4 + 0.32 * len(found)) as figure:
        axes = figure.add_subplot(xlabel=f"final loss - that of {shown(first)}\n"
                                         f"(nats per token, with 95 % intervals)")
        for i, (name, (mean, half)) in enumerate(found.items()):
            color = {"lower": "C2", "higher": "C3"}.get(verdict((mean, half)), "C7")
            axes.errorbar(mean, i, xerr=half, fmt="o", capsize=3, color=color)
            ticks = [losses[name][seed] - losses[first][seed]
                     for seed in losses[name].keys() & losses[first].keys()]
            axes.plot(ticks, [i] * len(ticks), "|", color="k", alpha=0.4, ms=7)
        axes.set_title("dots: means; ticks: single seeds; grey: no difference shown",
                       fontsize="small")
        axes.set_ylim(-0.6, len(found) - 0.4)
        axes.axvline(0, color="k", lw=0.8)
        axes.set_yticks(range(len(found)), [*map(shown, found)])
        axes.invert_yaxis()
