"""Comparing variants fairly: a study is variants x seeds, matched in size, under one budget, judged
on the same windows. What they found is in findings.py."""

import bisect
import contextlib
import functools
import glob
import hashlib
import importlib.util
import itertools
import json
import os
import queue
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal

import torch

from model import GPT, GPTConfig
from support.device import pick_device
from support.errors import UserError, fail, reason
from support.files import locked, rename, sha256
from support.log import clock
from support.meta import load_meta
from tools.findings import draw_study, markdown, pairs, summary
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
    """shape_size of a model. Each layer adds the same, so that models of one and two layers tell
    that of any."""
    try:
        one, two = (shape_size(**model_args(config) | {"n_layer": n}) for n in (1, 2))
    except RuntimeError:
        fail(f"n_embd={config.n_embd} makes too large a model; choose a smaller one")
    return {name: one[name] + (config.n_layer - 1) * (two[name] - one[name]) for name in one}


def matched(config: CompareConfig, first: CompareConfig) -> CompareConfig:
    """With the value of `solve` at which `match` comes nearest to that of the first variant.
    ValueError where that is not near."""
    def size(value: int) -> int:
        try:
            return model_size(replace(config, **{config.solve: value}))[SIZES[config.match]]
        except ValueError:  # narrower than its attention, say
            return 0

    step = {"n_layer": 1, "ffn_hidden": 4}.get(config.solve) or (
        4 if config.head_dim else config.n_head * (2 if config.position == "rope" else 1))
    target, most = model_size(first)[SIZES[config.match]], 1
    while size(most * step) < target and most < 2**12:
        most *= 2
    values = range(step, most * step + 1, step)
    above = bisect.bisect_left(values, target, hi=len(values) - 1, key=size)
    best = min(values[max(0, above - 1):above + 1], key=lambda value: abs(size(value) - target))
    if abs(size(best) / target - 1) > 0.05:
        raise ValueError(
            f"match={config.match}: the nearest {config.solve}, {best}, makes {size(best):,} where "
            f"{target:,} are wanted; choose another --solve or another shape")
    return replace(config, **{config.solve: best})


def plan(configs: dict[str, CompareConfig], config: CompareConfig, vocab_size: int,
         ) -> dict[str, CompareConfig]:
    """The variants as they will run, but for their budgets, with the data's vocabulary."""
    common = {f.name for f in fields(CompareConfig)} - {f.name for f in fields(TrainConfig)}
    common |= PLACE | {"block_size", "eval_tokens", "eval_iters", "max_iters"}
    planned: dict[str, CompareConfig] = {}
    for label, variant in configs.items():
        differ = [k for k in sorted(common - {"match", "solve"})
                  if getattr(variant, k) != getattr(config, k)]
        if differ:
            fail(f"{label}: {', '.join(differ)} must be the same in all variants, or they cannot "
                 f"be compared; say it for the study")
        with naming(label):
            variant = replace(variant, vocab_size=config.vocab_size or vocab_size, eval_iters=None)
            if planned and variant.match != "width":
                variant = matched(variant, next(iter(planned.values())))
        planned[label] = variant
    return planned


@contextlib.contextmanager
def naming(label: str) -> Iterator[None]:
    """A ValueError becomes a UserError of this variant."""
    try:
        yield
    except ValueError as error:
        fail(*(f"{label}: {line}" for line in str(error).splitlines()))


def budgeted(planned: dict[str, CompareConfig], speeds: dict[str, float],
             ) -> dict[str, CompareConfig]:
    """The variants with as many steps as cost what the first one's cost; speeds: tokens per second
    over the first one's, of those that are not as fast."""
    def step_cost(config: CompareConfig) -> int:
        tokens = config.batch_size * config.gradient_accumulation_steps * config.block_size
        return tokens * (model_size(config)["flops_per_token"] if config.budget == "flops" else 1)

    first, found = next(iter(planned.values())), {}
    for label, config in planned.items():
        steps = first.max_iters * step_cost(first) / step_cost(config) * speeds.get(label, 1.0)
        with naming(label):
            found[label] = replace(config, max_iters=max(1, round(steps)))
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
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # the runs need it
    return {label: known[key] for label, key in keys.items()}


# -----------------------------------------------------------------------------
# One cell: a run of train.py, and what is kept of it


@dataclass
class Cell:
    """One variant with one seed."""

    label: str
    config: CompareConfig
    seed: int

    @property
    def out_dir(self) -> str:
        name = re.sub(r"[^\w.=+-]+", "-", self.label)
        return os.path.join(self.config.out_dir, self.config.study, f"{name}-seed{self.seed}")

    def is_of(self, run: dict) -> bool:
        """Whether a record of results.json is this cell's, whatever its variant's name."""
        return (run["options"], run["seed"]) == (options_of(self.config), self.seed)

    def run(self, workers: "Workers") -> dict:
        """Train it, or train it on; the record of it. UserError if that fails."""
        os.makedirs(self.out_dir, exist_ok=True)
        start = {"init_from": "auto"} if self.began() else {"overwrite": True}
        words = options_of(self.config, without={"overwrite"})
        workers.launch("train.py", words | {"seed": self.seed, "out_dir": self.out_dir} | start,
                       self.out_dir)
        try:
            record = self.record()
            if self.config.tasks:
                record["tasks"] = {"how": self.config.judged_by, "scores": self.judged(workers)}
        except (KeyError, TypeError, ValueError) as error:
            fail(f"the log.jsonl or eval.json in {self.out_dir} is damaged: {reason(error)}; "
                 f"remove that folder")
        return record

    def began(self) -> bool:
        """Whether the checkpoints in the folder are this cell's, and not of an earlier plan."""
        try:
            with open(os.path.join(self.out_dir, "config.json"), encoding="utf-8") as file:
                stored = json.load(file)
            return all(stored[f.name] == getattr(self.config, f.name) for f in fields(TrainConfig)
                       if f.name not in PLACE | ASIDE)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def record(self) -> dict:
        """What is kept of a finished run."""
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
            record["scalars"] = [[r["iter"], rounded(r["scalars"])] for r in evals]
        return record

    def judged(self, workers: "Workers") -> dict[str, float | None]:
        """Of each task the normalised accuracy of best.pt, the accuracy, or its own metric."""
        figures = os.path.join(self.out_dir, "eval.json")
        words = {"ckpt": os.path.join(self.out_dir, "best.pt"), "json": figures}
        for name in ("tasks", "num_fewshot", "include_path", "limit", "device"):
            words[name] = getattr(self.config, name) or "auto"
        workers.launch("bench.py eval", words, self.out_dir)
        with open(figures, encoding="utf-8") as file:
            rows = json.load(file)["rows"]
        about = {"variant", "shots", "items", "items_per_s"}
        return {row["variant"]: next((row[metric] for metric in ("acc_norm", "acc", *row)
                                      if metric in row and metric not in about), None)
                for row in rows}


def rounded(x):
    """Nested numbers with four decimals."""
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    return [rounded(v) for v in x] if isinstance(x, list) else round(x, 4)


class Workers:
    """Programs of ours, so many at once, each on its share of the machine: a GPU, where there are
    several and the device is not one of them, or some of the cores."""

    def __init__(self, device: str | None = None, jobs: int | None = None):
        cuda = pick_device(device).type == "cuda" and device in (None, "cuda")
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        cards = named.split(",") if named else list(map(str, range(torch.cuda.device_count())))
        self.cards = cards if cuda and len(cards) > 1 else []
        self.count = jobs or max(1, len(self.cards))
        self.threads = max(1, torch.get_num_threads() // self.count)
        self.free: queue.Queue = queue.Queue()
        for slot in range(self.count):
            self.free.put(slot)
        self.lock, self.stopping = threading.Lock(), False
        self.running: set[subprocess.Popen] = set()

    def launch(self, program: str, options: dict, out_dir: str) -> None:
        """Run a program to its end; what it says goes to output.txt. UserError if it fails."""
        name, *argv = [*program.split(), *(f"--{k}={v}" for k, v in options.items())]
        environment, slot = dict(os.environ), self.free.get()
        if self.cards:
            environment["CUDA_VISIBLE_DEVICES"] = self.cards[slot % len(self.cards)]
        elif self.count > 1:
            environment["OMP_NUM_THREADS"] = str(self.threads)
        try:
            with open(os.path.join(out_dir, "output.txt"), "ab+") as output:
                start = output.tell()
                with self.lock:
                    if self.stopping:
                        fail("interrupted")
                    process = subprocess.Popen(
                        [sys.executable, os.path.join(HERE, name), *argv], env=environment,
                        stdout=output, stderr=subprocess.STDOUT)
                    self.running.add(process)
                code = process.wait()
                self.running.discard(process)
                output.seek(start)
                lines = output.read().decode(errors="replace").strip().splitlines() or [""]
        finally:
            self.free.put(slot)
        if code:
            fail(next((line[7:] for line in lines if line.startswith("error: ")),
                      f"exit code {code}: {lines[-1]}"))

    def stop(self) -> None:
        """Start nothing more, and end what runs: train.py saves first."""
        with self.lock:
            self.stopping = True
            for process in self.running:
                process.terminate()


# -----------------------------------------------------------------------------
# What is found


class Results:
    """What a study has found so far: results/<study>/results.json, a run a line."""

    def __init__(self, config: CompareConfig, data: dict):
        self.folder = os.path.join(config.results, config.study)
        self.path = os.path.join(self.folder, "results.json")
        self.head: dict = {"study": config.study, "data": data}
        self.runs: list[dict] = []
        if os.path.isfile(self.path):
            try:
                self.head, self.runs = read_results(self.path)
            except (ValueError, KeyError, TypeError, AttributeError):
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

    def borrow(self, cells: list[Cell]) -> None:
        """Runs of these cells that another study beside this one has: the same options, seed and
        data."""
        for path in sorted(glob.glob(os.path.join(os.path.dirname(self.folder), "*/results.json"))):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
                head, runs = read_results(path)
                if path == self.path or head["data"] != self.head["data"]:
                    continue
                for cell in cells:
                    same = next(filter(cell.is_of, runs), None)
                    if same is not None and self.get(cell) is None:
                        self.runs.append({"study": head["study"], **same, "variant": cell.label})

    def get(self, cell: Cell) -> dict | None:
        """This cell's run, if there is one."""
        return next((r for r in self.runs if r["variant"] == cell.label and cell.is_of(r)), None)


KEPT = {"variant", "seed", "options", "val_loss", "best_val_loss", "curve", "machine", "parameters",
        "matrices", "flops_per_token", "tokens", "steps", "seconds", "tokens_per_s", "peak_mb"}


def read_results(path: str) -> tuple[dict, list[dict]]:
    """(what the runs share, the runs) of a results.json."""
    with open(path, encoding="utf-8") as file:
        head = json.load(file)
    runs = head.pop("runs")
    if any(KEPT - run.keys() for run in runs) or {"data", "study"} - head.keys():
        raise ValueError("something is missing")
    return head, runs


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
    workers = Workers(config.device, config.jobs)
    torch.set_num_threads(workers.threads)
    where = f"{machine(pick_device(config.device))}, {workers.count} at a time"
    print(where)
    planned = plan(configs, config, meta["padded_vocab_size"])
    results, speeds = Results(config, data), {}
    if config.budget == "seconds":
        speeds = measured(planned, results.head, relative_speeds)
    planned = budgeted(planned, speeds)
    for one, two in itertools.combinations(planned, 2):
        if options_of(planned[one]) == options_of(planned[two]):
            fail(f"{names([one, two])} are the same; a variant is matched to the first one: which "
                 f"is that to be?")
    print(markdown([plan_row(label, variant) for label, variant in planned.items()]), flush=True)
    if config.dry_run:
        return
    new = not os.path.isdir(results.folder)
    os.makedirs(results.folder, exist_ok=True)
    try:
        with locked(results.folder, f"another command is writing to {results.folder}; stop it or "
                                    f"choose another --study"):
            results.runs = Results(config, data).runs  # another command may have just ended
            failed = run_missing(planned, config, results, workers, where)
            report(results, planned, config, argv)
    finally:
        if new and os.listdir(results.folder) in ([], [".lock"]):
            shutil.rmtree(results.folder)
    if failed:
        fail(*failed, "the same command tries these again, and what they said is in their "
                      "output.txt")


def names(labels: Iterable[str]) -> str:
    """Labels, which may have commas."""
    return ", ".join(f'"{label}"' for label in dict.fromkeys(labels))


def plan_row(label: str, config: CompareConfig) -> dict[str, str]:
    """A variant in the table of the plan."""
    size, sequences = model_size(config), config.batch_size * config.gradient_accumulation_steps
    tokens = config.max_iters * sequences * config.block_size
    return {"variant": label, **{k: f"{n:,}" for k, n in size.items()}, "tokens": f"{tokens:,}",
            "total FLOP": f"{tokens * size['flops_per_token']:.2e}", "found": f"{config.solve}="
            f"{getattr(config, config.solve)}, max_iters={config.max_iters}"}


def check(configs: dict[str, CompareConfig], config: CompareConfig) -> None:
    """Raise UserError for what would be found out too late."""
    if not re.fullmatch(r"\w[\w.-]*", config.study or ""):
        fail(f"study={config.study}: its folder of results needs a name of letters and digits; "
             f"name a preset (config/studies/suite.py), or --study=NAME")
    if not "".join(config.variants):
        fail('say what to compare: --variants "GPT: template=gd" "YuriiFormer: template=nesterov"')
    if config.tasks and importlib.util.find_spec("lm_eval") is None:  # not after days of training
        fail("tasks need lm-eval: pip install lm-eval")
    for option in ("only", "published"):
        labels = getattr(config, option)
        if option == "published":
            labels = [text.rpartition(":")[0] for text in labels]
        if unknown := [label for label in labels if label not in configs]:
            fail(f"{option}={', '.join(unknown)}: the variants are {names(configs)}")
    folders = {Cell(label, config, 0).out_dir.lower() for label in configs}
    if len(folders) < len(configs):
        fail(f"two of {names(configs)} would train in one folder; name them otherwise")


def run_missing(planned: dict[str, CompareConfig], config: CompareConfig, results: Results,
                workers: Workers, where: str) -> list[str]:
    """Run the cells of the plan that the results lack. What failed, a line each."""
    chosen = {label: variant for label, variant in planned.items()
              if not config.only or label in config.only}
    cells = [Cell(label, variant, seed) for seed in range(1, config.seeds + 1)
             for label, variant in chosen.items()]
    stale = [r for r in results.runs if r["variant"] in chosen
             and r["options"] != options_of(chosen[r["variant"]])]
    if stale and not config.overwrite:
        fail(f"{results.path} has runs of {names(r['variant'] for r in stale)} "
             f"with other options; add --overwrite to replace them, or choose another --study")
    results.runs = [r for r in results.runs if r not in stale]
    results.borrow(cells)
    missing = []
    for cell in cells:
        tasks = (results.get(cell) or {}).get("tasks", {})
        if results.get(cell) is None or (config.tasks and tasks.get("how") != config.judged_by):
            missing.append(cell)
    print(f"{len(missing)} runs to do, {len(cells) - len(missing)} there, {workers.count} at a "
          f"time", flush=True)
    failed = run_cells(missing, results, list(planned), workers, where)
    results.write(list(planned))
    return failed


def run_cells(cells: list[Cell], results: Results, order: list[str], workers: Workers,
              where: str) -> list[str]:
    """Cell after cell, or as many at once as there are workers. What failed, a line each."""
    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    failed, began = [], time.time()
    main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, interrupt) if main_thread else None
    with ThreadPoolExecutor(workers.count) as pool:
        futures = {pool.submit(cell.run, workers): cell for cell in cells}
        try:
            for done, future in enumerate(as_completed(futures), 1):
                cell = futures[future]
                name, count = f"{cell.label}, seed {cell.seed}", f"[{done}/{len(cells)}]"
                try:
                    run = future.result()
                except (UserError, OSError) as error:
                    failed.append(f"{name}: {error}")
                    print(f"{count} {failed[-1]}", flush=True)
                    continue
                results.runs = [r for r in results.runs if r is not results.get(cell)]
                results.runs.append(run | {"machine": where})
                results.write(order)
                left = (time.time() - began) / done * (len(cells) - done)
                print(f"{count} {name}: {run['val_loss']:.4f} after {clock(run['seconds'])}; eta "
                      f"{clock(left)}", flush=True)
        except BaseException:
            print("stopping; the same command goes on", flush=True)
            pool.shutdown(wait=False, cancel_futures=True)
            workers.stop()
            raise
        finally:
            if main_thread:
                signal.signal(signal.SIGTERM, before)
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
