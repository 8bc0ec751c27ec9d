"""What a study found: differences paired by seed with their intervals, the table, the pictures.

A run is a record of results.json; the runs are in the order of the variants."""

import math
import os
import statistics

from support.log import AXES
from tools.options import BenchConfig
from tools.watch import draw_scalars, picture

# -----------------------------------------------------------------------------
# The statistics


# 97.5 % quantiles of Student's t for 1 to 10 degrees of freedom
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def t_quantile(df: int) -> float:
    """97.5 % of Student's t: the table, then Cornish and Fisher's expansion."""
    if df <= len(T975):
        return T975[df - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    return z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2) + (
        3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * df**3)


def paired(own: dict[int, float], first: dict[int, float]) -> tuple[float, float] | None:
    """(mean, half width of its 95 % t-interval) of own - first over the seeds that both have; None
    below two of them."""
    d = [own[seed] - first[seed] for seed in own.keys() & first.keys()]
    if len(d) < 2:
        return None
    return statistics.mean(d), t_quantile(len(d) - 1) * statistics.stdev(d) / math.sqrt(len(d))


def verdict(difference: tuple[float, float] | None) -> str:
    """A difference whose interval contains zero is none."""
    if difference is None:
        return "one seed"
    mean, half = difference
    return "no difference shown" if abs(mean) <= half else "lower" if mean < 0 else "higher"


# -----------------------------------------------------------------------------
# The results: JSON of every run, a table, pictures


def by_variant(runs: list[dict]) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for run in runs:
        found.setdefault(run["variant"], []).append(run)
    return found


def differences(runs: list[dict]) -> dict[str, tuple[float, float] | None]:
    """Of every variant but the first: its final loss less the first one's, as `paired` has it."""
    losses = {label: {r["seed"]: r["val_loss"] for r in own}
              for label, own in by_variant(runs).items()}
    first, *others = losses
    return {label: paired(losses[label], losses[first]) for label in others}


def summary(runs: list[dict], c: BenchConfig, planned: dict[str, BenchConfig]) -> list[dict]:
    """One row for each variant, with what its runs share, and their figures together."""
    published = dict(text.rpartition(":")[::2] for text in c.published)
    found, rows = differences(runs), []
    most = max(map(len, by_variant(runs).values()))
    scores = [r["tasks"]["scores"] for r in runs if r.get("tasks", {}).get("how") == c.judged_by]
    tasks = dict.fromkeys(task for score in scores for task in score) if c.tasks else {}
    for label, own in by_variant(runs).items():
        losses, missing = [r["val_loss"] for r in own], most - len(own)

        def mean(key: str, own: list[dict] = own) -> float | None:
            values = [r[key] for r in own if r[key] is not None]
            return statistics.mean(values) if values else None

        difference, peak = found.get(label), mean("peak_mb")
        row = {
            "variant": label, "seeds": f"{len(own)}" + f" of {most}" * bool(missing),
            "final loss": f"{statistics.mean(losses):.4f}" + (
                f" ± {statistics.stdev(losses):.4f}" if len(own) > 1 else ""),
            "difference to the first": difference and "{:+.4f} ± {:.4f}".format(*difference) or "",
            "verdict": "" if label not in found else "seeds are missing" if missing else
                verdict(difference),
            "best": f"{mean('best_val_loss'):.4f}"}
        if published:
            row["published best"] = published.get(label, "").strip()
        for task in tasks:
            values = [v for r in own
                      if (v := r.get("tasks", {}).get("scores", {}).get(task)) is not None]
            row[task] = f"{100 * statistics.mean(values):.1f}" if values else ""
        if any(p.match != "width" for p in planned.values()):
            row["matched"] = "" if label not in found else planned[label].match
        rows.append(row | {
            "parameters": f"{own[0]['parameters']:,}", "matrices": f"{own[0]['matrices']:,}",
            "MFLOP/token": f"{own[0]['flops_per_token'] / 1e6:,.2f}",
            "tokens": f"{own[0]['tokens']:,}",
            **({"seconds": f"{mean('seconds'):,.0f}"} if c.budget == "seconds" else {}),
            "tokens/s": f"{mean('tokens_per_s'):,.0f}",
            "peak MB": "" if peak is None else f"{peak:,.0f}"})
    return rows


def pairs(runs: list[dict]) -> list[dict]:
    """The other pairs: row less column, as `paired` has it; bold where the interval leaves out
    zero."""
    losses = {label: {r["seed"]: r["val_loss"] for r in own}
              for label, own in by_variant(runs).items()}
    _, *labels = losses
    rows = []
    for i, label in enumerate(labels[1:], 1):
        row = {"variant": label}
        for j, other in enumerate(labels[:-1]):
            d = paired(losses[label], losses[other]) if j < i else None
            shown = d and "{:+.4f} ± {:.4f}".format(*d)
            row[f"less {other}"] = f"**{shown}**" if d and abs(d[0]) > d[1] else shown or ""
        rows.append(row)
    return rows if any("±" in cell for row in rows for cell in row.values()) else []


def markdown(rows: list[dict]) -> str:
    """Rows of text as a table of GitHub's."""
    lines = [list(rows[0]), ["---", *["--:"] * (len(rows[0]) - 1)], *map(dict.values, rows)]
    escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped) + "\n"


# -----------------------------------------------------------------------------
# Pictures


def draw(runs: list[dict], folder: str, names: list[str], x: str) -> None:
    """These of curves.png, differences.png and scalars.png (of the first seed)."""
    learned = {name: [{"step": step} | scalars for step, scalars in own[0]["scalars"]]
               for name, own in by_variant(runs).items() if "scalars" in own[0]}
    make = {"curves.png": lambda path: draw_curves(runs, path, x),
            "differences.png": lambda path: draw_differences(runs, path),
            "scalars.png": lambda path: draw_scalars(learned, path)}
    for name in names:
        make[name](os.path.join(folder, name))


def draw_curves(runs: list[dict], path: str, x: str) -> None:
    """Validation losses: means over the seeds, with the lowest and the highest."""
    unit = {"steps": lambda r: 1, "tokens": lambda r: r["tokens"] / r["steps"],
            "seconds": lambda r: r["seconds"] / r["steps"],
            "flops": lambda r: r["tokens"] / r["steps"] * r["flops_per_token"]}[x]
    with picture(path, 7, 4.5) as figure:
        axes = figure.add_subplot(xlabel=AXES[x][1], ylabel="validation loss (nats per token)")
        axes.set_title("means over the seeds, from the lowest to the highest", fontsize="small")
        low, high = math.inf, 0.0
        for i, (name, own) in enumerate(by_variant(runs).items()):
            curves = [dict(run["curve"]) for run in own]  # step -> loss
            steps = [step for step in curves[0] if all(step in curve for curve in curves)]
            xs = [step * statistics.mean(map(unit, own)) for step in steps]
            at_step = [[curve[step] for curve in curves] for step in steps]
            mean, color = list(map(statistics.mean, at_step)), f"C{i % 10}"
            axes.plot(xs, mean, color=color, ls=("-", "--", ":")[i // 10 % 3],
                      label=f"{name}: {mean[-1]:.4f}")
            axes.fill_between(xs, list(map(min, at_step)), list(map(max, at_step)), color=color,
                              alpha=0.12, lw=0)
            early = max(1, 2 * (len(mean) - 1) // 5)  # what is above would flatten the rest
            low, high = min(low, *mean), max(high, *mean[early:early + 1])
        axes.set_ylim(low - 0.05 * (high - low or 1), high)
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)


def draw_differences(runs: list[dict], path: str) -> None:
    """Each variant's difference to the first with its interval, and seed by seed; grey: none."""
    found = {label: d for label, d in differences(runs).items() if d}
    first = {r["seed"]: r["val_loss"] for r in runs if r["variant"] == runs[0]["variant"]}
    with picture(path, 7, 1.4 + 0.32 * len(found)) as figure:
        axes = figure.add_subplot(xlabel=f"final loss - that of {runs[0]['variant']}\n"
                                         f"(nats per token, with 95 % intervals)")
        for i, (name, (mean, half)) in enumerate(found.items()):
            color = {"lower": "C2", "higher": "C3"}.get(verdict((mean, half)), "C7")
            axes.errorbar(mean, i, xerr=half, fmt="o", capsize=3, color=color)
            dots = [r["val_loss"] - first[r["seed"]] for r in runs
                    if r["variant"] == name and r["seed"] in first]
            axes.plot(dots, [i] * len(dots), "|", color="k", alpha=0.4, ms=7)
        axes.set_title("dots: means; ticks: single seeds; grey: no difference shown",
                       fontsize="small")
        axes.set_ylim(-0.6, len(found) - 0.4)
        axes.axvline(0, color="k", lw=0.8)
        axes.set_yticks(range(len(found)), found)
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
