"""Comparing variants fairly: a study is variants x seeds, matched in size, under one budget, judged
on the same windows. What they found is in findings.py."""

import bisect
import functools
import hashlib
import importlib.util
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal

import numpy as np
import torch

from model import GPT, GPTConfig
from support.device import pick_device
from support.errors import UserError, fail
from support.files import locked, rename, sha256
from support.log import clock
from support.meta import load_meta
from tools.findings import draw_study, markdown, pairs, summary
from tools.judge import EvalConfig, judge
from tools.race import HERE, machine
from tools.watch import read_log
from train import TrainConfig, model_args


@dataclass
class CompareConfig(TrainConfig):
    """A study: variants x seeds, with a table of paired differences and their intervals."""

    init_from: ClassVar[str] = TrainConfig.init_from
    seed: ClassVar[int] = TrainConfig.seed
    study: str | None = None  # its name
    # the options of each variant, as one word: "template=gd", or named: "GPT: template=gd"
    variants: tuple[str, ...] = ()
    seeds: int = 3  # runs of each variant, with seeds 1, 2, 3
    match: Literal["width", "parameters", "matrices", "flops"] = "width"  # to the first variant
    solve: Literal["n_embd", "n_layer", "ffn_hidden"] = "n_embd"  # what match changes
    # what all spend as much of as the first one in its max_iters
    budget: Literal["tokens", "flops", "seconds"] = "tokens"
    repeats: int = 5  # budget=seconds: measurements of each variant's speed
    steps: int = 5  # budget=seconds: optimiser steps in each measurement
    only: tuple[str, ...] = ()  # run only these variants
    jobs: int | None = None  # runs at once; auto: one for each GPU, or one
    dry_run: bool = False  # print the plan and stop
    results: str = "docs/results"  # the folder of the STUDY folders
    published: tuple[str, ...] = ()  # "variant: loss", to print beside ours
    x: Literal["steps", "tokens", "seconds", "flops"] = "steps"  # what losses are drawn over
    tasks: str | None = None  # judge best.pt on these, as bench.py eval does
    num_fewshot: str | None = None  # examples in the prompt, one number or one for each task
    include_path: str | None = None  # a folder with task files (YAML) of your own
    limit: int | None = None  # only the first items of each task

    def rules(self, rule: Callable[[bool, str], None]) -> None:
        super().rules(rule)
        for name in ("seeds", "repeats", "steps", "jobs", "limit"):
            count = getattr(self, name)
            rule(count is None or count >= 1, f"{name}={count}: must be at least 1; choose more")

    @property
    def judged_by(self) -> str:
        """What the scores of its tasks depend on."""
        return f"{self.tasks} {self.num_fewshot} {self.limit}"


SIZES = {"parameters": "parameters", "matrices": "matrices", "flops": "flops_per_token"}
# what says where a run is
PLACE = {"dataset", "data_dir", "out_dir", "init_from", "overwrite", "seed"}
# what changes no figure
ASIDE = {"device", "log_interval", "save_interval", "always_save_checkpoint", "wandb_log",
         "wandb_project", "wandb_run_name", "tensorboard"}
# what makes no step slower
SAME_SPEED = {"max_iters", "learning_rate", "min_lr", "muon_lr", "weight_decay",
              "muon_weight_decay", "beta1", "beta2", "warmup_iters", "lr_decay_iters", "schedule",
              "decay_fraction", "mu_init", "beta_init", "gamma_init", "residual_init_scale"}


# -----------------------------------------------------------------------------
# The plan: variants of matched size and budget


def options_of(config: TrainConfig, without: Iterable[str] = PLACE | ASIDE) -> dict:
    """The options of train.py that differ from its defaults."""
    return {f.name: getattr(config, f.name) for f in fields(TrainConfig)
            if f.name not in without and getattr(config, f.name) != f.default}


@functools.cache
def shape_size(**shape) -> dict[str, int]:
    """Parameters, matrices (parameters without tables, norms, scalars) and training FLOPs per token
    of a GPTConfig."""
    with torch.device("meta"):
        model = GPT(GPTConfig(**shape))
    matrices = sum(p.numel() for p in model.parameter_roles()["matrix"].values())
    return {"parameters": model.get_num_params(False), "matrices": matrices,
            "flops_per_token": model.flops_per_token()}


def model_size(config: TrainConfig) -> dict[str, int]:
    """shape_size of a model: each layer adds the same, so those of one and two layers tell it."""
    one, two = (shape_size(**model_args(config) | {"n_layer": n}) for n in (1, 2))
    return {name: one[name] + (config.n_layer - 1) * (two[name] - one[name]) for name in one}


def matched(label: str, config: CompareConfig, first: CompareConfig) -> CompareConfig:
    """With the value of `solve` at which `match` comes nearest to that of the first variant."""
    def size(value: int) -> int:
        try:
            return model_size(replace(config, **{config.solve: value}))[SIZES[config.match]]
        except ValueError:  # narrower than its attention, say
            return 0

    step = {"n_layer": 1, "ffn_hidden": 4}.get(config.solve) or (
        4 if config.head_dim else config.n_head * (2 if config.position == "rope" else 1))
    values = range(step, 4096 * step + 1, step)
    target = model_size(first)[SIZES[config.match]]
    above = bisect.bisect_left(values, target, key=size)
    best = min(values[max(0, above - 1):above + 1], key=lambda value: abs(size(value) - target))
    if abs(size(best) / target - 1) > 0.05:
        fail(f"{label}: match={config.match}: the nearest {config.solve}, {best}, makes "
             f"{size(best):,} where {target:,} are wanted; choose another --solve or another shape")
    return replace(config, **{config.solve: best})


def plan(configs: dict[str, CompareConfig], config: CompareConfig, vocab_size: int,
         ) -> dict[str, CompareConfig]:
    """The variants as they will run, but for their budgets, with the data's vocabulary."""
    common = {f.name for f in fields(CompareConfig)} - {f.name for f in fields(TrainConfig)}
    common |= PLACE | {"block_size", "eval_tokens", "eval_iters", "max_iters"}
    planned: dict[str, CompareConfig] = {}
    for label, variant in configs.items():
        differ = [name for name in sorted(common - {"match", "solve"})
                  if getattr(variant, name) != getattr(config, name)]
        if differ:
            fail(f"{label}: {', '.join(differ)} must be the same in all variants, or they cannot "
                 f"be compared; say it for the study")
        variant = replace(variant, vocab_size=config.vocab_size or vocab_size, eval_iters=None)
        if planned and variant.match != "width":
            variant = matched(label, variant, next(iter(planned.values())))
        planned[label] = variant
    return planned


def budgeted(planned: dict[str, CompareConfig], head: dict, relative_speeds: Callable,
             ) -> dict[str, CompareConfig]:
    """The variants with as many steps as cost what the first one's cost."""
    first = next(iter(planned.values()))
    speeds = dict.fromkeys(planned, 1.0)
    if first.budget == "seconds":
        speeds = measured(planned, head, relative_speeds)

    def step_cost(config: CompareConfig) -> int:
        tokens = config.batch_size * config.gradient_accumulation_steps * config.block_size
        return tokens * (model_size(config)["flops_per_token"] if config.budget == "flops" else 1)

    found = {}
    for label, config in planned.items():
        steps = first.max_iters * step_cost(first) / step_cost(config) * speeds[label]
        try:
            found[label] = replace(config, max_iters=max(1, round(steps)))
        except ValueError as error:  # a schedule longer than these steps
            fail(*(f"{label}: {line}" for line in str(error).splitlines()))
    return found


def measured(planned: dict[str, CompareConfig], head: dict, relative_speeds: Callable,
             ) -> dict[str, float]:
    """Tokens per second over the first one's: measured once for all that are equally fast, then
    kept with the results, in their head."""
    first = next(iter(planned))
    options = {label: json.dumps(options_of(config, PLACE | ASIDE | SAME_SPEED))
               for label, config in planned.items()}
    keys = {label: hashlib.sha256(f"{options[first]} {options[label]}".encode()).hexdigest()[:16]
            for label in planned}
    known = head.setdefault("speeds", {})
    new = {keys[label]: label for label in reversed(planned) if keys[label] not in known}
    if new:
        labels = dict.fromkeys([first, *reversed(new.values())])
        ratios = relative_speeds({label: planned[label] for label in labels})
        known |= {keys[label]: round(ratio, 4) for label, ratio in ratios.items()}
        torch.cuda.empty_cache()  # the runs need it
    return {label: known[key] for label, key in keys.items()}


def plan_table(planned: dict[str, CompareConfig]) -> str:
    rows = []
    for label, config in planned.items():
        size = model_size(config)
        sequences = config.batch_size * config.gradient_accumulation_steps
        tokens = config.max_iters * sequences * config.block_size
        rows.append({"variant": label, **{name: f"{n:,}" for name, n in size.items()},
                     "tokens": f"{tokens:,}",
                     "total FLOP": f"{tokens * size['flops_per_token']:.2e}",
                     "found": f"{config.solve}={getattr(config, config.solve)}, "
                              f"max_iters={config.max_iters}"})
    return markdown(rows)


# -----------------------------------------------------------------------------
# One cell: a run of train.py, and what is kept of it


@dataclass
class Cell:
    """One variant with one seed."""

    label: str
    config: CompareConfig
    seed: int

    @property
    def name(self) -> str:
        return f"{self.label}, seed {self.seed}"

    @property
    def out_dir(self) -> str:
        name = re.sub(r"[^\w.=+-]+", "-", self.label)
        return os.path.join(self.config.out_dir, self.config.study, f"{name}-seed{self.seed}")

    def start(self, share: dict[str, str]) -> subprocess.Popen:
        """Train it, or train it on, with this share of the machine; what train.py says goes to
        output.txt."""
        os.makedirs(self.out_dir, exist_ok=True)
        options = options_of(self.config, without={"overwrite"})
        options |= {"seed": self.seed, "out_dir": self.out_dir}
        options |= {"init_from": "auto"} if self.began() else {"overwrite": True}
        words = [f"--{name}={value}" for name, value in options.items()]
        with open(os.path.join(self.out_dir, "output.txt"), "wb") as output:
            return subprocess.Popen([sys.executable, os.path.join(HERE, "train.py"), *words],
                                    env=os.environ | share, stdout=output, stderr=output)

    def began(self) -> bool:
        """Whether the checkpoints in the folder are this cell's, and not of an earlier plan."""
        try:
            with open(os.path.join(self.out_dir, "config.json"), encoding="utf-8") as file:
                stored = json.load(file)
        except (OSError, ValueError):  # there is none, or it was cut off
            return False
        return all(stored.get(f.name) == getattr(self.config, f.name) for f in fields(TrainConfig)
                   if f.name not in PLACE | ASIDE)

    def record(self, code: int) -> dict:
        """What is kept of a run that ended with this exit code. UserError if it failed."""
        if code:
            with open(os.path.join(self.out_dir, "output.txt"), errors="replace") as file:
                lines = file.read().strip().splitlines() or [""]
            errors = [line[7:] for line in lines if line.startswith("error: ")]
            fail(errors[0] if errors else f"exit code {code}: {lines[-1]}")
        log = read_log(self.out_dir)
        evals = [r for r in log if r["type"] == "eval"]
        last, rates = evals[-1], [r["tokens_per_s"] for r in log if r["type"] == "train"]
        if last["iter"] != self.config.max_iters:
            fail(f"it ended at step {last['iter']}")
        if last["val_loss"] is None:
            fail("its last loss is not finite")
        evals = [r for r in evals if r["val_loss"] is not None]
        record = {"variant": self.label, "seed": self.seed, "options": options_of(self.config),
                  **model_size(self.config), "tokens": last["tokens"], "steps": last["iter"],
                  "val_loss": round(last["val_loss"], 5),
                  "best_val_loss": round(min(r["val_loss"] for r in evals), 5),
                  "seconds": round(last["seconds"], 1),
                  "tokens_per_s": round(statistics.median(rates)), "peak_mb": last.get("peak_mb"),
                  "curve": [[r["iter"], round(r["val_loss"], 5)] for r in evals]}
        if "scalars" in last:
            record["scalars"] = [
                [r["iter"], {name: np.round(values, 4).tolist()  # layers -> substeps
                             for name, values in r["scalars"].items()}] for r in evals]
        return record

    def judged(self) -> dict[str, float | None]:
        """Of each task the normalised accuracy of best.pt, the accuracy, or its own metric."""
        config = self.config
        if not self.began():
            fail(f"{self.out_dir} has no checkpoints of it; train it again")
        rows = judge(EvalConfig(
            os.path.join(self.out_dir, "best.pt"), config.tasks, config.num_fewshot,
            config.include_path, config.limit, device=config.device))
        about = {"variant", "shots", "items", "items_per_s"}
        scores = {}
        for row in rows:
            metrics = [name for name in ("acc_norm", "acc", *row)
                       if name in row and name not in about]
            scores[row["variant"]] = row[metrics[0]] if metrics else None
        return scores


def shares_of(config: CompareConfig) -> list[dict[str, str]]:
    """The environments of as many runs as go at once: of each its part of the cores, and a GPU
    where the device is not a certain one."""
    cards: list[str] = []
    if config.device in (None, "cuda") and pick_device(config.device).type == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        cards = (visible.split(",") if visible
                 else [str(card) for card in range(torch.cuda.device_count())])
    count = config.jobs or max(1, len(cards))
    threads = max(1, torch.get_num_threads() // count)
    shares = [{"OMP_NUM_THREADS": str(threads)} for _ in range(count)]
    if cards:
        for i, share in enumerate(shares):
            share["CUDA_VISIBLE_DEVICES"] = cards[i % len(cards)]
    return shares


# -----------------------------------------------------------------------------
# What is found


class Results:
    """What a study has found so far: results/<study>/results.json, a run a line."""

    def __init__(self, config: CompareConfig, data: dict):
        self.folder = os.path.join(config.results, config.study)
        self.path = os.path.join(self.folder, "results.json")
        self.head: dict = {"study": config.study, "data": data}  # what the runs share
        self.runs: list[dict] = []
        if os.path.isfile(self.path):
            try:
                with open(self.path, encoding="utf-8") as file:
                    self.head = json.load(file)
                self.runs = self.head.pop("runs")
            except (ValueError, KeyError):
                fail(f"{self.path} is damaged; mend it, or move it away to begin anew")
            if self.head["data"] != data:
                fail(f"{self.path} is of other data than those in {config.data_dir}/"
                     f"{config.dataset} now; choose another --study, or prepare the data as before")

    def write(self, order: list[str]) -> None:
        """Whole, beside the old one, then in its place; the runs in the order of the variants."""
        place = {label: i for i, label in enumerate(order)}
        self.runs.sort(key=lambda r: (place.get(r["variant"], len(place)), r["seed"]))
        lines = ",\n".join(json.dumps(run) for run in self.runs)
        with open(self.path + ".tmp", "w", encoding="utf-8") as file:
            file.write(f'{json.dumps(self.head)[:-1]}, "runs": [\n{lines}\n]}}\n')
            file.flush()
            os.fsync(file.fileno())
        rename(self.path + ".tmp", self.path)

    def get(self, cell: Cell) -> dict | None:
        """This cell's run, if there is one."""
        wanted = cell.label, cell.seed, options_of(cell.config)
        return next((r for r in self.runs if (r["variant"], r["seed"], r["options"]) == wanted),
                    None)


# -----------------------------------------------------------------------------
# The command


def compare(configs: dict[str, CompareConfig], config: CompareConfig, argv: list[str],
            relative_speeds: Callable[[dict[str, CompareConfig]], dict[str, float]]) -> None:
    """Run the cells that are missing, then write the table and the pictures.

    argv: the command; relative_speeds: measures tokens per second over the first one's."""
    check(configs, config)
    folder = os.path.join(config.data_dir, config.dataset)
    meta = load_meta(folder)
    data = {"dataset": os.path.basename(os.path.normpath(config.dataset))}
    for split in ("train", "val"):
        data[f"{split}_sha256"] = meta[split].get("sha256") or sha256(
            os.path.join(folder, f"{split}.bin"))
    shares = shares_of(config)
    torch.set_num_threads(int(shares[0]["OMP_NUM_THREADS"]))
    where = f"{machine(pick_device(config.device))}, {len(shares)} at a time"
    print(where)
    planned = plan(configs, config, meta["padded_vocab_size"])
    results = Results(config, data)
    planned = budgeted(planned, results.head, relative_speeds)
    print(plan_table(planned), flush=True)
    if config.dry_run:
        return
    os.makedirs(results.folder, exist_ok=True)
    with locked(results.folder, f"another command is writing to {results.folder}; stop it or "
                                f"choose another --study"):
        results.runs = Results(config, data).runs  # another command may have just ended
        cells = cells_of(planned, config, results)
        failed = run_cells(cells, results, list(planned), shares, where)
        failed += judge_cells(cells, results, list(planned))
        report(results, planned, config, argv)
    if failed:
        fail(*failed, "the same command tries these again, and what they said is in their "
                      "output.txt")


def check(configs: dict[str, CompareConfig], config: CompareConfig) -> None:
    """Raise UserError for what would be found out too late."""
    if not re.fullmatch(r"\w[\w.-]*", config.study or ""):
        fail(f"study={config.study}: its folder of results needs a name of letters and digits; "
             f"name a preset (config/studies/suite.py), or --study=NAME")
    if not "".join(config.variants):
        fail('say what to compare: --variants "GPT: template=gd" "YuriiFormer: template=nesterov"')
    if config.tasks and importlib.util.find_spec("lm_eval") is None:  # not after days of training
        fail("tasks need lm-eval: pip install lm-eval")
    labels = {"only": config.only,
              "published": [text.rpartition(":")[0] for text in config.published]}
    for option in labels:
        if unknown := set(labels[option]) - set(configs):
            fail(f"{option}={', '.join(unknown)}: the variants are {quoted(configs)}")


def quoted(labels: Iterable[str]) -> str:
    """Labels may have commas."""
    return ", ".join(f'"{label}"' for label in labels)


def cells_of(planned: dict[str, CompareConfig], config: CompareConfig, results: Results,
             ) -> list[Cell]:
    """The cells of the plan that are chosen, whose runs of other options leave the results."""
    chosen = {label: planned[label] for label in config.only or planned}
    stale = [r for r in results.runs if r["variant"] in chosen
             and r["options"] != options_of(chosen[r["variant"]])]
    if stale and not config.overwrite:
        fail(f"{results.path} has runs of {quoted(dict.fromkeys(r['variant'] for r in stale))} "
             f"with other options; add --overwrite to replace them, or choose another --study")
    results.runs = [r for r in results.runs if r not in stale]
    return [Cell(label, variant, seed) for seed in range(1, config.seeds + 1)
            for label, variant in chosen.items()]


def run_cells(cells: list[Cell], results: Results, order: list[str], shares: list[dict[str, str]],
              where: str) -> list[str]:
    """Run those that the results lack, as many at once as there are shares. What failed, a line
    each. SIGTERM is as Ctrl-C: train.py saves."""
    waiting = [cell for cell in cells if results.get(cell) is None]
    missing, free, began = len(waiting), list(shares), time.time()
    print(f"{missing} runs to do, {len(cells) - missing} there, {len(shares)} at a time",
          flush=True)
    running: dict[subprocess.Popen, tuple[Cell, dict[str, str]]] = {}
    failed: list[str] = []
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while waiting or running:
            while waiting and free:
                cell, share = waiting.pop(0), free.pop(0)
                running[cell.start(share)] = cell, share
            ended = [process for process in running if process.poll() is not None]
            for process in ended:
                cell, share = running.pop(process)
                free.append(share)
                done = missing - len(waiting) - len(running)
                try:
                    run = cell.record(process.returncode)
                except UserError as error:
                    failed.append(f"{cell.name}: {error}")
                    print(f"[{done}/{missing}] {failed[-1]}", flush=True)
                    continue
                results.runs.append(run | {"machine": where})
                results.write(order)
                left = (time.time() - began) / done * (missing - done)
                print(f"[{done}/{missing}] {cell.name}: {run['val_loss']:.4f} after "
                      f"{clock(run['seconds'])}; eta {clock(left)}", flush=True)
            if not ended:
                time.sleep(0.1)
    except BaseException:
        print("stopping; the same command goes on", flush=True)
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
        raise
    return failed


def judge_cells(cells: list[Cell], results: Results, order: list[str]) -> list[str]:
    """Add to the runs the scores of the tasks that they lack. What failed, a line each."""
    failed = []
    for cell in cells:
        run, how = results.get(cell), cell.config.judged_by
        if cell.config.tasks and run and run.get("tasks", {}).get("how") != how:
            try:
                run["tasks"] = {"how": how, "scores": cell.judged()}
                results.write(order)
            except UserError as error:
                failed.append(f"{cell.name}: {error}")
    return failed


NOTES = """\
Losses are those at the end of training, in nats per token (lower is better), on the same windows: \
mean ± standard deviation over the seeds. Differences to the first row are paired by seed, ± the \
half width of their 95 % t-interval; where that contains zero, no difference is shown. Each \
interval is for itself: of twenty, one misses on average. Matrices are the parameters without \
tables, norms and scalars; FLOPs are those of training."""


def report(results: Results, planned: dict[str, CompareConfig], config: CompareConfig,
           argv: list[str]) -> None:
    """table.md and the pictures, of the runs of this plan."""
    runs = [r for r in results.runs if r["variant"] in planned
            and r["options"] == options_of(planned[r["variant"]])]
    first = next(iter(planned))
    if not runs or runs[0]["variant"] != first:
        return print(f"no table yet: nothing of {first}, to which the others are compared")
    words, kept = [], True
    for word in argv:  # without what is of this machine or this call
        if word.startswith("--"):
            kept = word[2:].split("=")[0] not in PLACE | ASIDE | {"results", "jobs", "only"}
        if kept:
            words.append(word)
    table = markdown(summary(runs, planned))
    setting = f"{results.head['data']['dataset']}, equal {config.budget}; "
    setting += "; ".join(dict.fromkeys(r["machine"] for r in runs)) + "."
    if borrowed := dict.fromkeys(r["study"] for r in runs if "study" in r):
        setting += f" Runs of the same options are from {', '.join(borrowed)}."
    parts = [f"# {config.study}", f"`python bench.py {shlex.join(words)}`", setting, table, NOTES]
    if others := pairs(runs):
        parts += ["The other pairs, row less column, bold where the interval leaves out zero:",
                  markdown(others)]
    if importlib.util.find_spec("matplotlib") is None:
        print("no pictures: pip install matplotlib")
    else:
        pictures = draw_study(runs, results.folder, config.x)
        parts.append("\n".join(f"![{name[:-4]}]({name})" for name in pictures))
    with open(os.path.join(results.folder, "table.md"), "w", encoding="utf-8") as file:
        file.write("\n\n".join(part.strip() for part in parts) + "\n")
    print(f"{table}\nwrote {results.folder}")
