"""Comparing variants fairly: a study is variants x seeds, matched in size, under one budget, judged
on the same windows; its differences are paired by seed and come with their intervals."""

import bisect
import contextlib
import glob
import importlib.util
import json
import math
import os
import queue
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields, replace

import torch

import config
from config import fail, locked
from model import GPT, GPTConfig
from prepare import load_meta
from tools.options import BenchConfig
from tools.watch import draw_scalars, picture
from train import AXES, TrainConfig, clock, model_args, read_log

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SIZES = {"parameters": "parameters", "matrices": "matrices", "flops": "flops_per_token"}
OWN = {"out_dir", "data_dir", "init_from", "overwrite", "seed"}  # of a cell, not of its variant


# -----------------------------------------------------------------------------
# The plan: variants of matched size and budget


@dataclass
class Variant:
    """One row of the table: the options of train.py that differ from its defaults, and what they
    make: parameters, matrices (parameters without tables, norms, scalars), training FLOPs per
    token."""

    label: str
    options: dict
    size: dict[str, int]

    @property
    def tokens(self) -> int:
        """Of the whole run."""
        c = TrainConfig(**self.options)
        return c.max_iters * c.batch_size * c.gradient_accumulation_steps * c.block_size


def model_size(c: BenchConfig) -> dict[str, int]:
    with torch.device("meta"):
        model = GPT(GPTConfig(**model_args(c)))
    matrices = sum(p.numel() for p in model.parameter_roles()["matrix"].values())
    return {"parameters": model.get_num_params(False), "matrices": matrices,
            "flops_per_token": model.flops_per_token()}


def matched(c: BenchConfig, target: int) -> BenchConfig:
    """The variant with the value of `solve` at which `match` comes nearest to the target."""
    step = {"n_layer": 1, "ffn_hidden": 4}.get(c.solve) or (
        4 if c.head_dim else c.n_head * (2 if c.position == "rope" else 1))

    def size(value: int) -> int:
        try:
            return model_size(replace(c, **{c.solve: value}))[SIZES[c.match]]
        except ValueError:  # narrower than its attention, say
            return 0

    values, most = range(step, 2**40, step), 1
    while size(values[most]) < target:
        most *= 2
    above = bisect.bisect_left(values, target, hi=most, key=size)
    best = min(values[max(0, above - 1):above + 1], key=lambda value: abs(size(value) - target))
    return replace(c, **{c.solve: best})


def plan(configs: dict[str, BenchConfig], meta: dict) -> dict[str, BenchConfig]:
    """The variants as they will run, but for their budgets, with the data's vocabulary."""
    found: dict[str, BenchConfig] = {}
    for label, c in configs.items():
        try:
            c = replace(c, vocab_size=c.vocab_size or meta["padded_vocab_size"])
            if found and c.match != "width":
                c = matched(c, model_size(next(iter(found.values())))[SIZES[c.match]])
        except ValueError as error:
            fail(*(f"{label}: {line}" for line in str(error).splitlines()))
        found[label] = c
    return found


def budgeted(label: str, c: BenchConfig, first: BenchConfig, speed: float) -> BenchConfig:
    """The variant with as many steps as cost what the first one's cost; `speed`: its tokens per
    second over those of the first one."""
    def per_step(of: BenchConfig) -> int:
        tokens = of.batch_size * of.gradient_accumulation_steps * of.block_size
        return tokens * (model_size(of)["flops_per_token"] if c.budget == "flops" else 1)

    steps = first.max_iters * per_step(first) / per_step(c)
    try:
        return replace(c, max_iters=max(1, round(steps * speed)))
    except ValueError as error:
        fail(*(f"{label}: {line}" for line in str(error).splitlines()))


def variant(label: str, c: BenchConfig) -> Variant:
    plain, own = asdict(TrainConfig()), asdict(c)
    options = {f.name: own[f.name] for f in fields(TrainConfig)
               if own[f.name] != plain[f.name] and f.name not in OWN}
    return Variant(label, options, model_size(c))


# -----------------------------------------------------------------------------
# One cell: a run of train.py, and what is kept of it


@dataclass
class Cell:
    variant: Variant
    seed: int
    study: BenchConfig

    @property
    def out_dir(self) -> str:
        name = re.sub(r"[^\w.=+-]+", "-", self.variant.label)
        return os.path.join(self.study.out_dir, f"{name}-seed{self.seed}")

    def command(self, **more: str) -> list[str]:
        """Anyone's, to run it again."""
        words = {**self.variant.options, "seed": self.seed, "data_dir": self.study.data_dir,
                 "out_dir": self.out_dir, **more}
        return ["train.py", *(f"--{k}={v}" for k, v in words.items())]

    def run(self, slot: int, running: set[subprocess.Popen]) -> dict:
        """Train it, or train it on; the record of it. UserError if that fails."""
        c = self.study
        os.makedirs(self.out_dir, exist_ok=True)
        note, how = os.path.join(self.out_dir, "options.json"), {"init_from": "auto"}
        with contextlib.suppress(OSError, ValueError), open(note, encoding="utf-8") as file:
            if json.load(file) != self.variant.options:  # of an earlier plan of this study
                how = {"overwrite": "True"}
        with open(note, "w", encoding="utf-8") as file:
            json.dump(self.variant.options, file)
        launch(self.command(**how), slot, c, self.out_dir, running)
        record = self.record()
        if c.tasks:
            figures = os.path.join(self.out_dir, "eval.json")
            launch(["bench.py", "eval", f"--ckpt={self.out_dir}/best.pt", f"--tasks={c.tasks}",
                    f"--json={figures}", *(f"--{k}={v}" for k in ("num_fewshot", "include_path",
                    "limit") if (v := getattr(c, k)))], slot, c, self.out_dir, running)
            with open(figures, encoding="utf-8") as file:
                record["tasks"] = {row["variant"]: row.get("acc_norm", row.get("acc"))
                                   for row in json.load(file)["rows"]}
        return record

    def record(self) -> dict:
        """What is kept of a finished run."""
        log = read_log(self.out_dir)
        evals = [r for r in log if r["type"] == "eval" and r["val_loss"] is not None]
        rates = [r["tokens_per_s"] for r in log if r["type"] == "train"]
        last = evals[-1] if evals else {}
        if last.get("iter") != TrainConfig(**self.variant.options).max_iters:
            fail(f"it ended at step {last.get('iter', 0)}")
        return {"variant": self.variant.label, "seed": self.seed, "options": self.variant.options,
                **self.variant.size, "tokens": last["tokens"], "steps": last["iter"],
                "val_loss": round(last["val_loss"], 5),
                "best_val_loss": round(min(r["val_loss"] for r in evals), 5),
                "seconds": round(last["seconds"], 1),
                "tokens_per_s": round(statistics.median(rates)), "peak_mb": last.get("peak_mb"),
                "curve": [[r["iter"], round(r["val_loss"], 5)] for r in evals],
                **({"scalars": [[r["iter"], rounded(r["scalars"])] for r in evals]}
                   if "scalars" in last else {})}


def rounded(x):
    """Nested numbers with four decimals."""
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    return [rounded(v) for v in x] if isinstance(x, list) else round(x, 4)


def launch(argv: list[str], slot: int, c: BenchConfig, out_dir: str, running: set) -> None:
    """A program of ours in a process of its own, on its share of the machine; what it says goes to
    output.txt. UserError if it fails."""
    environment = dict(os.environ)
    environment.pop("THP_MEM_ALLOC_ENABLE", None)  # which model.py sets, for its own processes
    if torch.cuda.device_count() > 1:
        environment["CUDA_VISIBLE_DEVICES"] = visible_devices()[slot]
    elif workers(c) > 1:
        environment["OMP_NUM_THREADS"] = str(threads(c))
    with open(os.path.join(out_dir, "output.txt"), "ab+") as output:
        start = output.tell()
        process = subprocess.Popen([sys.executable, os.path.join(HERE, argv[0]), *argv[1:]],
                                   stdout=output, stderr=subprocess.STDOUT, env=environment)
        running.add(process)
        process.wait()
        running.discard(process)
        output.seek(start)
        said = output.read().decode(errors="replace").strip().splitlines() or [""]
    if process.returncode:
        fail(next((line for line in said if line.startswith("error: ")),
                  f"exit code {process.returncode}: {said[-1]}"))


def visible_devices() -> list[str]:
    """The names of the GPUs that this process may use."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else list(map(str, range(torch.cuda.device_count())))


def workers(c: BenchConfig) -> int:
    """How many cells run at once."""
    return c.jobs or max(1, torch.cuda.device_count())


def threads(c: BenchConfig) -> int:
    """Of torch in each cell: its share of the cores, unless OMP_NUM_THREADS says fewer."""
    return max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) // workers(c)))


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


def summary(runs: list[dict], c: BenchConfig) -> list[dict]:
    """One row for each variant, with what its runs share, and their figures together."""
    published = dict(text.rpartition(":")[::2] for text in c.published)
    found, rows = differences(runs), []
    for label, own in by_variant(runs).items():
        losses = [r["val_loss"] for r in own]
        mean = {k: statistics.mean(values) for k in ("tokens_per_s", "peak_mb", "best_val_loss")
                if all(values := [r[k] for r in own])}
        difference = found.get(label)
        rows.append({
            "variant": label, "seeds": str(len(own)),
            "final loss": f"{statistics.mean(losses):.4f}" + (
                f" ± {statistics.stdev(losses):.4f}" if len(own) > 1 else ""),
            "- first [95 %]": f"{difference[0]:+.4f} ± {difference[1]:.4f}" if difference else "",
            "": verdict(difference) if label in found else "",
            "best": f"{mean['best_val_loss']:.4f}",
            **({"published best": published.get(label, "").strip()} if published else {}),
            **{task: f"{100 * statistics.mean(r['tasks'][task] for r in own):.1f}"
               for task in own[0].get("tasks", {})},
            "parameters": f"{own[0]['parameters']:,}", "matrices": f"{own[0]['matrices']:,}",
            "MFLOP/token": f"{own[0]['flops_per_token'] / 1e6:,.2f}",
            "tokens": f"{own[0]['tokens']:,}", "tokens/s": f"{mean['tokens_per_s']:,.0f}",
            "peak MB": f"{mean['peak_mb']:,.0f}" if "peak_mb" in mean else ""})
    return rows


def markdown(rows: list[dict]) -> str:
    """Rows of text as a table of GitHub's."""
    lines = [list(rows[0]), ["---", *["--:"] * (len(rows[0]) - 1)], *map(dict.values, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def draw(runs: list[dict], folder: str, c: BenchConfig) -> list[str]:
    """curves.png, differences.png, scalars.png: those that there is something to show in."""
    learned = {name: [{"step": step} | scalars for step, scalars in own[0]["scalars"]]
               for name, own in by_variant(runs).items() if "scalars" in own[0]}
    shown = {"curves.png": lambda path: draw_curves(runs, path, c.x)}
    if any(differences(runs).values()):
        shown["differences.png"] = lambda path: draw_differences(runs, path)
    if learned:
        shown["scalars.png"] = lambda path: draw_scalars(learned, path)
    for name, make in shown.items():
        make(os.path.join(folder, name))
    return list(shown)


def draw_curves(runs: list[dict], path: str, x: str) -> None:
    """Validation losses: means over the seeds, with the lowest and the highest."""
    unit = {"steps": lambda r: 1, "tokens": lambda r: r["tokens"] / r["steps"],
            "seconds": lambda r: r["seconds"] / r["steps"],
            "flops": lambda r: r["tokens"] / r["steps"] * r["flops_per_token"]}[x]
    with picture(path, 7, 4.5) as figure:
        axes = figure.add_subplot(xlabel=AXES[x][1], ylabel="validation loss (nats per token)")
        low, high = math.inf, 0.0
        for i, (name, own) in enumerate(by_variant(runs).items()):
            xs = [step * unit(own[0]) for step, _ in own[0]["curve"]]
            at_step = list(zip(*([loss for _, loss in run["curve"]] for run in own), strict=True))
            mean, color = list(map(statistics.mean, at_step)), f"C{i % 10}"
            axes.plot(xs, mean, color=color, ls=("-", "--", ":")[i // 10 % 3],
                      label=f"{name}: {mean[-1]:.4f}")
            axes.fill_between(xs, list(map(min, at_step)), list(map(max, at_step)), color=color,
                              alpha=0.12, lw=0)
            low, high = min(low, *mean), max(high, mean[min(2, len(mean) - 1)])
        axes.set_ylim(low - 0.05 * (high - low or 1), high)
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)


def draw_differences(runs: list[dict], path: str) -> None:
    """Each variant's difference to the first with its interval, and seed by seed; grey: none."""
    found = {label: d for label, d in differences(runs).items() if d}
    first = {r["seed"]: r["val_loss"] for r in runs if r["variant"] == runs[0]["variant"]}
    with picture(path, 7, 1.2 + 0.32 * len(found)) as figure:
        axes = figure.add_subplot(xlabel=f"final loss - that of {runs[0]['variant']} (nats per "
                                         f"token), with 95 % intervals")
        for i, (name, (mean, half)) in enumerate(found.items()):
            color = {"lower": "C2", "higher": "C3"}.get(verdict((mean, half)), "C7")
            axes.errorbar(mean, i, xerr=half, fmt="o", capsize=3, color=color)
            dots = [r["val_loss"] - first[r["seed"]] for r in runs
                    if r["variant"] == name and r["seed"] in first]
            axes.plot(dots, [i] * len(dots), "|", color="k", alpha=0.4, ms=7)
        axes.axvline(0, color="k", lw=0.8)
        axes.set_yticks(range(len(found)), found)
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)


class Results:
    """What a study has found so far: results/<study>/results.json, a run a line."""

    def __init__(self, c: BenchConfig, data: dict):
        self.folder = os.path.join(c.results, c.study)
        self.path = os.path.join(self.folder, "results.json")
        self.head: dict = {"study": c.study, "data": data}
        self.runs: list[dict] = []
        if os.path.isfile(self.path):
            try:
                with open(self.path, encoding="utf-8") as file:
                    stored = json.load(file)
                self.runs = stored.pop("runs")
                old = stored["data"]
                self.head |= stored
            except (ValueError, KeyError, TypeError):
                fail(f"{self.path} is damaged; mend it, or move it away to begin anew")
            if old != data:
                fail(f"{self.path} is of other data than those in {c.data_dir}/{c.dataset} now; "
                     f"choose another --results or --study, or prepare the data as before")

    def write(self, order: list[str]) -> None:
        """Whole, beside the old one, then in its place; the runs in the order of the variants."""
        self.runs.sort(key=lambda r: (order.index(r["variant"]) if r["variant"] in order
                                      else len(order), r["seed"]))
        os.makedirs(self.folder, exist_ok=True)
        head = json.dumps(self.head)[:-1]
        lines = ",\n".join(json.dumps(run) for run in self.runs)
        with open(self.path + ".tmp", "w", encoding="utf-8") as file:
            file.write(f'{head}, "runs": [\n{lines}\n]}}\n')
        config.replace(self.path + ".tmp", self.path)

    def borrow(self, variants: list[Variant], seeds: int) -> None:
        """Runs that another study beside this one has, of the same options, seed and data."""
        there = {(r["variant"], r["seed"]) for r in self.runs}
        for path in sorted(glob.glob(os.path.join(os.path.dirname(self.folder), "*/results.json"))):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError), \
                    open(path, encoding="utf-8") as file:
                theirs = json.load(file)
                for r in theirs["runs"] if theirs["data"] == self.head["data"] else ():
                    for v in variants:
                        if r["options"] == v.options and r["seed"] <= seeds and \
                                (v.label, r["seed"]) not in there:
                            there.add((v.label, r["seed"]))
                            self.runs.append(r | {"variant": v.label})

    def stale(self, variants: list[Variant]) -> list[dict]:
        """Runs of variants that have other options by now."""
        now = {v.label: v.options for v in variants}
        return [r for r in self.runs if now.get(r["variant"], r["options"]) != r["options"]]


# -----------------------------------------------------------------------------
# The command


def compare(configs: dict[str, BenchConfig], c: BenchConfig, machine: Callable[[], str],
            speed: Callable[[dict[str, BenchConfig], BenchConfig], list[dict]]) -> None:
    """Run the cells that are missing, then write the table and the pictures.

    machine: says what it is; speed: measures the variants' tokens per second in turn."""
    if not c.study or not re.fullmatch(r"[\w.-]+", c.study):
        fail(f"study={c.study}: compare needs a name for its folder of results, of letters and "
             f"digits; name a preset (config/study_suite.py), or --study=NAME")
    if c.tasks and importlib.util.find_spec("lm_eval") is None:  # not after days of training
        fail("tasks need lm-eval: pip install lm-eval")
    unknown = set(c.only) - configs.keys()
    if unknown:
        fail(f"only={', '.join(sorted(unknown))}: the variants are {', '.join(configs)}")
    folders = [Cell(Variant(label, {}, {}), 0, c).out_dir for label in configs]
    if len(set(folders)) < len(folders):
        fail(f"two variants would train in one folder of {', '.join(folders)}; name them otherwise")
    torch.set_num_threads(threads(c))
    where = f"{machine()}, {workers(c)} at a time"
    print(where)
    meta = load_meta(os.path.join(c.data_dir, c.dataset))
    data = {"dataset": c.dataset, **{f"{split}_sha256": meta[split].get("sha256")
                                     for split in ("train", "val")}}
    os.makedirs(c.out_dir, exist_ok=True)
    with locked(c.out_dir, f"another study is writing to {c.out_dir}; stop it or choose another "
                           f"--out_dir"):
        results = Results(c, data)
        planned = plan(configs, meta)
        first = next(iter(planned.values()))
        ratios = measured(planned, c, results, speed) if c.budget == "seconds" else {}
        costed = {label: budgeted(label, own, first, ratios.get(label, 1.0))
                  for label, own in planned.items()}
        variants = [variant(label, own) for label, own in costed.items()]
        print(markdown([{"variant": v.label, **{k: f"{n:,}" for k, n in v.size.items()},
                         "tokens": f"{v.tokens:,}",
                         "total FLOP": f"{v.tokens * v.size['flops_per_token']:.2e}",
                         "found": f"{c.solve}={getattr(own, c.solve)}, max_iters={own.max_iters}"}
                        for v, own in zip(variants, costed.values(), strict=True)]), flush=True)
        if c.dry_run:
            return
        if stale := results.stale(variants):
            names = ", ".join(dict.fromkeys(r["variant"] for r in stale))
            if not c.overwrite:
                fail(f"{results.path} has runs of {names} with other options; add --overwrite to "
                     f"replace them, or choose another --study")
            results.runs = [r for r in results.runs if r not in stale]
        results.borrow(variants, c.seeds)
        there = {(r["variant"], r["seed"]) for r in results.runs}
        cells = [Cell(v, seed, c) for seed in range(1, c.seeds + 1) for v in variants
                 if (v.label, seed) not in there and (not c.only or v.label in c.only)]
        print(f"{len(cells)} runs to do, {len(there)} there, {workers(c)} at a time", flush=True)
        failed = run_cells(cells, c, results, list(configs), where)
    if results.runs:
        results.write(list(configs))
        report(results, variants, c)
    if failed:
        fail(*failed, "the same command tries these again, and what they said is in their "
                      "output.txt")


def measured(planned: dict[str, BenchConfig], c: BenchConfig, results: Results, speed) -> dict:
    """Tokens per second over the first one's, measured once and then kept with the results."""
    key = json.dumps({label: variant(label, own).options for label, own in planned.items()})
    if results.head.get("measured_for") != key:
        results.head |= {"measured_for": key, "speed": {
            row["variant"]: round(row["ratio"], 4) for row in speed(planned, c)}}
        results.write(list(planned))
    return results.head["speed"]


def run_cells(cells: list[Cell], c: BenchConfig, results: Results, order: list[str],
              where: str) -> list[str]:
    """Cell after cell, or as many at once as there are workers. What failed, a line each."""
    slots: queue.Queue = queue.Queue()
    for slot in range(workers(c)):
        slots.put(slot)
    running: set[subprocess.Popen] = set()
    failed, began, done = [], time.time(), 0  # what failed, a line each

    def work(cell: Cell) -> dict:
        slot = slots.get()
        try:
            return cell.run(slot, running)
        finally:
            slots.put(slot)

    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    here = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, interrupt) if here else None
    with ThreadPoolExecutor(workers(c)) as pool:
        futures = {pool.submit(work, cell): cell for cell in cells}
        try:
            for future in as_completed(futures):
                cell, done = futures[future], done + 1
                name = f"{cell.variant.label}, seed {cell.seed}"
                left = (time.time() - began) / done * (len(cells) - done)
                try:
                    run = future.result()
                    results.runs.append(run | {"machine": where})
                    results.write(order)
                    print(f"[{done}/{len(cells)}] {name}: {run['val_loss']:.4f} after "
                          f"{clock(run['seconds'])}; eta {clock(left)}", flush=True)
                except (config.UserError, OSError) as error:
                    failed.append(f"{name}: {error}")
                    print(f"[{done}/{len(cells)}] {failed[-1]}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running):  # train.py saves, and ends
                process.terminate()
            raise
        finally:
            if here:
                signal.signal(signal.SIGTERM, before)
    return failed


def report(results: Results, variants: list[Variant], c: BenchConfig) -> None:
    """table.md and the pictures, of the runs of this plan."""
    labels = [v.label for v in variants]
    runs = [r for r in results.runs if r["variant"] in labels]
    if labels[0] not in {r["variant"] for r in runs}:
        return print(f"no table yet: nothing of {labels[0]}, to which the others are compared")
    table = markdown(summary(runs, c))
    pictures = draw(runs, results.folder, c) if importlib.util.find_spec("matplotlib") else []
    machines = "; ".join(dict.fromkeys(r["machine"] for r in runs))
    with open(os.path.join(results.folder, "table.md"), "w", encoding="utf-8") as file:
        file.write(
            f"# {c.study}\n\n`python bench.py compare config/study_{c.study}.py`: {c.dataset}, "
            f"matched in {c.match}, equal {c.budget}; {machines}.\n\n{table}\n"
            f"Losses are final, on the same windows: mean ± standard deviation over the seeds. "
            f"Differences are to the first row, paired by seed, with their 95 % t-intervals, each "
            f"for itself.\n" + "".join(f"\n![{name[:-4]}]({name})" for name in pictures) + "\n")
    print(table)
    if not pictures:
        print("no pictures: pip install matplotlib")
    print(f"wrote {results.folder}")
