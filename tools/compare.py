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
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields, replace

import torch

import config
from model import GPT, GPTConfig
from support.device import pick_device
from support.errors import fail, reason
from support.files import locked, sha256
from support.log import clock, read_log
from support.meta import load_meta
from tools.findings import differences, draw, markdown, pairs, summary
from tools.options import BenchConfig
from train import TrainConfig, model_args

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SIZES = {"parameters": "parameters", "matrices": "matrices", "flops": "flops_per_token"}
# what a cell is given beside its variant's options
CELL = {"dataset", "data_dir", "out_dir", "init_from", "overwrite", "seed"}
# what changes no figure
ASIDE = {"device", "log_interval", "save_interval", "always_save_checkpoint", "check_data",
         "wandb_log", "wandb_project", "wandb_run_name", "tensorboard"}
# what makes no step slower
SAME_SPEED = {"max_iters", "learning_rate", "min_lr", "muon_lr", "scalar_lr", "weight_decay",
              "muon_weight_decay", "beta1", "beta2", "warmup_iters", "lr_decay_iters", "schedule",
              "decay_fraction", "mu_init", "beta_init", "gamma_init", "residual_init_scale"}


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
    def config(self) -> TrainConfig:
        return TrainConfig(**self.options)

    @property
    def tokens(self) -> int:
        """Of the whole run."""
        c = self.config
        return c.max_iters * c.batch_size * c.gradient_accumulation_steps * c.block_size


class Shape(GPT):
    """A model of which only the sizes are wanted."""

    def init_weights(self) -> None:
        pass


@functools.cache
def shape_size(**shape) -> dict[str, int]:
    """Parameters, matrices and FLOPs per token of a GPTConfig."""
    with torch.device("meta"):
        model = Shape(GPTConfig(**shape))
    matrices = sum(p.numel() for p in model.parameter_roles()["matrix"].values())
    return {"parameters": model.get_num_params(False), "matrices": matrices,
            "flops_per_token": model.flops_per_token()}


def model_size(c: BenchConfig) -> dict[str, int]:
    """Parameters, matrices and FLOPs per token. Each layer adds the same, so that models of one and
    two layers tell them of any."""
    try:
        one, two = (shape_size(**model_args(c) | {"n_layer": n}) for n in (1, 2))
    except RuntimeError:
        fail(f"n_embd={c.n_embd} makes too large a model; choose a smaller one")
    return {name: one[name] + (c.n_layer - 1) * (two[name] - one[name]) for name in one}


def matched(label: str, c: BenchConfig, target: int) -> BenchConfig:
    """The variant with the value of `solve` at which `match` comes nearest to the target."""
    step = {"n_layer": 1, "ffn_hidden": 4}.get(c.solve) or (
        4 if c.head_dim else c.n_head * (2 if c.position == "rope" else 1))

    def size(value: int) -> int:
        try:
            return model_size(replace(c, **{c.solve: value}))[SIZES[c.match]]
        except ValueError:  # narrower than its attention, say
            return 0

    most = 1
    while size(most * step) < target and most < 2**12:
        most *= 2
    values = range(step, most * step + 1, step)
    above = bisect.bisect_left(values, target, key=size)
    best = min(values[max(0, above - 1):above + 1], default=values[-1],
               key=lambda value: abs(size(value) - target))
    if abs(size(best) / target - 1) > 0.05:
        fail(f"{label}: match={c.match}: the nearest {c.solve}, {best}, makes {size(best):,} where "
             f"{target:,} are wanted; choose another --solve or another shape")
    return replace(c, **{c.solve: best})


def plan(configs: dict[str, BenchConfig], c: BenchConfig, meta: dict) -> dict[str, BenchConfig]:
    """The variants as they will run, but for their budgets, with the data's vocabulary."""
    ours = {f.name for f in fields(BenchConfig)} - {f.name for f in fields(TrainConfig)}
    common = (ours - {"match", "solve", "variants"}) | CELL | {
        "block_size", "eval_tokens", "eval_iters", "max_iters"}
    found: dict[str, BenchConfig] = {}
    for label, own in configs.items():
        if odd := [k for k in sorted(common) if getattr(own, k) != getattr(c, k)]:
            fail(f"{label}: {', '.join(odd)} must be the same in all variants, or they cannot be "
                 f"compared; say it for the study")
        try:
            own = replace(own, vocab_size=c.vocab_size or meta["padded_vocab_size"],
                          eval_iters=None)
            if found and own.match != "width":
                own = matched(label, own,
                              model_size(next(iter(found.values())))[SIZES[own.match]])
        except ValueError as error:
            fail(*(f"{label}: {line}" for line in str(error).splitlines()))
        found[label] = own
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


def set_options(c: TrainConfig, without: set[str]) -> dict:
    """The options of train.py that differ from its defaults."""
    plain, own = asdict(TrainConfig()), asdict(c)
    return {f.name: own[f.name] for f in fields(TrainConfig)
            if own[f.name] != plain[f.name] and f.name not in without}


def variant(label: str, c: BenchConfig) -> Variant:
    return Variant(label, set_options(c, CELL | ASIDE), model_size(c))


def measured(planned: dict[str, BenchConfig], c: BenchConfig, results: "Results",
             speed: Callable) -> dict[str, float]:
    """Tokens per second over the first one's: measured once for all that are equally fast, then
    kept with the results."""
    options = {label: json.dumps({k: v for k, v in variant(label, own).options.items()
                                  if k not in SAME_SPEED}) for label, own in planned.items()}
    first = next(iter(planned))
    keys = {label: hashlib.sha256(f"{options[first]} {own}".encode()).hexdigest()[:16]
            for label, own in options.items()}
    known = results.head.setdefault("speeds", {})
    new = {keys[label]: label for label in reversed(planned) if keys[label] not in known}
    if new:
        which = {label: planned[label] for label in dict.fromkeys([first, *reversed(new.values())])}
        rows = speed(which, replace(c, vocab_size=planned[first].vocab_size, eval_iters=None))
        known |= {keys[row["variant"]]: round(row["ratio"], 4) for row in rows}
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # the cells need it
    return {label: known[key] for label, key in keys.items()}


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
        return os.path.join(self.study.out_dir, self.study.study, f"{name}-seed{self.seed}")

    def run(self, workers: "Workers") -> dict:
        """Train it, or train it on; the record of it. UserError if that fails."""
        c = self.study
        os.makedirs(self.out_dir, exist_ok=True)
        aside = {k: v for k, v in set_options(c, CELL).items() if k in ASIDE}
        how = {"init_from": "auto"} if self.began() else {"overwrite": True}
        words = {**self.variant.options, **aside, "seed": self.seed, "dataset": c.dataset,
                 "data_dir": c.data_dir, "out_dir": self.out_dir, **how}
        workers.launch(["train.py", *(f"--{k}={v}" for k, v in words.items())], self.out_dir)
        try:
            record = self.record()
            if c.tasks:
                record["tasks"] = {"how": c.judged_by, "scores": self.judged(workers)}
        except (KeyError, TypeError, ValueError) as error:
            fail(f"the log.jsonl or eval.json in {self.out_dir} is damaged: {reason(error)}; "
                 f"remove that folder")
        return record

    def began(self) -> bool:
        """Whether the checkpoints in the folder are this cell's, and not of an earlier plan."""
        try:
            with open(os.path.join(self.out_dir, "config.json"), encoding="utf-8") as file:
                there = json.load(file)
            now = asdict(self.variant.config)
            return all(there[k] == v for k, v in now.items()
                       if k not in CELL | ASIDE | {"vocab_used"})
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def record(self) -> dict:
        """What is kept of a finished run."""
        log = read_log(self.out_dir)
        last = [r for r in log if r["type"] == "eval"][-1]
        if last["iter"] != self.variant.config.max_iters:
            fail(f"it ended at step {last['iter']}")
        evals = [r for r in log if r["type"] == "eval" and r["val_loss"] is not None]
        if last["val_loss"] is None:
            fail("its last loss is not finite")
        rates = [r["tokens_per_s"] for r in log if r["type"] == "train"]
        return {"variant": self.variant.label, "seed": self.seed, "options": self.variant.options,
                **self.variant.size, "tokens": last["tokens"], "steps": last["iter"],
                "val_loss": round(last["val_loss"], 5),
                "best_val_loss": round(min(r["val_loss"] for r in evals), 5),
                "seconds": round(last["seconds"], 1),
                "tokens_per_s": round(statistics.median(rates)), "peak_mb": last.get("peak_mb"),
                "curve": [[r["iter"], round(r["val_loss"], 5)] for r in evals],
                **({"scalars": [[r["iter"], rounded(r["scalars"])] for r in evals]}
                   if "scalars" in last else {})}

    def judged(self, workers: "Workers") -> dict[str, float]:
        """Of each task the normalised accuracy of best.pt, the accuracy, or its own metric."""
        c, figures = self.study, os.path.join(self.out_dir, "eval.json")
        words = {"ckpt": os.path.join(self.out_dir, "best.pt"), "json": figures, "tasks": c.tasks,
                 "num_fewshot": c.num_fewshot, "include_path": c.include_path, "limit": c.limit,
                 "device": c.device}
        workers.launch(["bench.py", "eval", *(f"--{k}={v}" for k, v in words.items()
                                              if v is not None)], self.out_dir)
        with open(figures, encoding="utf-8") as file:
            rows = json.load(file)["rows"]
        beside = {"variant", "shots", "items", "items_per_s"}
        return {row["variant"]: row.get("acc_norm", row.get("acc", next(
            (v for k, v in row.items() if k not in beside), None))) for row in rows}


def rounded(x):
    """Nested numbers with four decimals."""
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    return [rounded(v) for v in x] if isinstance(x, list) else round(x, 4)


class Workers:
    """Programs of ours, so many at once, each on its share of the machine: a GPU, where there are
    several and the device is not one of them, or some of the cores."""

    def __init__(self, c: BenchConfig):
        cuda = pick_device(c.device).type == "cuda" and c.device in (None, "cuda")
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        cards = named.split(",") if named else list(map(str, range(torch.cuda.device_count())))
        self.cards = cards if cuda and len(cards) > 1 else []
        self.count = c.jobs or max(1, len(self.cards))
        self.threads = max(1, torch.get_num_threads() // self.count)
        self.free: queue.Queue = queue.Queue()
        for slot in range(self.count):
            self.free.put(slot)
        self.lock, self.stopping = threading.Lock(), False
        self.running: set[subprocess.Popen] = set()

    def launch(self, argv: list[str], out_dir: str) -> None:
        """Run a program to its end; what it says goes to output.txt. UserError if it fails."""
        environment = dict(os.environ)
        environment.pop("THP_MEM_ALLOC_ENABLE", None)  # which model.py sets, for its own processes
        slot = self.free.get()
        if self.cards:
            environment["CUDA_VISIBLE_DEVICES"] = self.cards[slot % len(self.cards)]
        elif self.count > 1:
            environment["OMP_NUM_THREADS"] = str(self.threads)
        try:
            code, said = self.end_of(
                [sys.executable, os.path.join(HERE, argv[0]), *argv[1:]], environment, out_dir)
        finally:
            self.free.put(slot)
        if code:
            fail(next((line[7:] for line in said if line.startswith("error: ")),
                      f"exit code {code}: {said[-1]}"))

    def end_of(self, argv: list[str], environment: dict, out_dir: str) -> tuple[int, list[str]]:
        """(exit code, lines of output) of a process."""
        with open(os.path.join(out_dir, "output.txt"), "ab+") as output:
            start = output.tell()
            with self.lock:
                if self.stopping:
                    fail("interrupted")
                process = subprocess.Popen(argv, env=environment, stdout=output,
                                           stderr=subprocess.STDOUT)
                self.running.add(process)
            process.wait()
            self.running.discard(process)
            output.seek(start)
            lines = output.read().decode(errors="replace").strip().splitlines()
            return process.returncode, lines or [""]

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

    def __init__(self, c: BenchConfig, data: dict):
        self.folder = os.path.join(c.results, c.study)
        self.path = os.path.join(self.folder, "results.json")
        self.head: dict = {"study": c.study, "data": data}
        self.runs: list[dict] = []
        if os.path.isfile(self.path):
            try:
                self.head, self.runs = read_results(self.path)
            except (ValueError, KeyError, TypeError, AttributeError):
                fail(f"{self.path} is damaged; mend it, or move it away to begin anew")
            if self.head["data"] != data:
                fail(f"{self.path} is of other data than those in {c.data_dir}/{c.dataset} now; "
                     f"choose another --study, or prepare the data as before")

    def write(self, order: Iterable[str]) -> None:
        """Whole, beside the old one, then in its place; the runs in the order of the variants."""
        place = {label: i for i, label in enumerate(order)}
        self.runs.sort(key=lambda r: (place.get(r["variant"], len(place)), r["seed"]))
        lines = ",\n".join(json.dumps(run) for run in self.runs)
        with open(self.path + ".tmp", "w", encoding="utf-8") as file:
            file.write(f'{json.dumps(self.head)[:-1]}, "runs": [\n{lines}\n]}}\n')
            file.flush()
            os.fsync(file.fileno())
        config.replace(self.path + ".tmp", self.path)

    def borrow(self, cells: list[Cell]) -> None:
        """Runs of these cells that another study beside this one has: the same options, seed and
        data."""
        for path in sorted(glob.glob(os.path.join(os.path.dirname(self.folder), "*/results.json"))):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
                head, runs = read_results(path)
                if path == self.path or head["data"] != self.head["data"]:
                    continue
                for cell in cells:
                    self.runs += [
                        r | {"variant": cell.variant.label, "study": r.get("study", head["study"])}
                        for r in runs if (r["options"], r["seed"]) == (
                            cell.variant.options, cell.seed)][:1] * (self.get(cell) is None)

    def get(self, cell: Cell) -> dict | None:
        """This cell's run, if it is there."""
        return next((r for r in self.runs if (r["variant"], r["seed"], r["options"]) == (
            cell.variant.label, cell.seed, cell.variant.options)), None)


def read_results(path: str) -> tuple[dict, list[dict]]:
    """(what the runs share, the runs) of a results.json."""
    with open(path, encoding="utf-8") as file:
        head = json.load(file)
    runs = head.pop("runs")
    needed = ("variant", "seed", "options", "val_loss", "best_val_loss", "curve", "machine",
              "parameters", "matrices", "flops_per_token", "tokens", "steps", "seconds",
              "tokens_per_s", "peak_mb")
    for run in runs:
        for key in needed:
            run[key]
    return head | {"data": head["data"], "study": head["study"]}, runs


# -----------------------------------------------------------------------------
# The command


def compare(configs: dict[str, BenchConfig], c: BenchConfig, argv: list[str],
            machine: Callable[[], str], speed: Callable) -> None:
    """Run the cells that are missing, then write the table and the pictures.

    argv: the command; machine: says what it is; speed: measures variants' tokens per second in
    turn, bench.py's."""
    check(configs, c)
    meta = load_meta(os.path.join(c.data_dir, c.dataset))
    data = {"dataset": os.path.basename(os.path.normpath(c.dataset))} | {
        f"{split}_sha256": meta[split].get("sha256") or sha256(
            os.path.join(c.data_dir, c.dataset, f"{split}.bin")) for split in ("train", "val")}
    workers = Workers(c)
    torch.set_num_threads(workers.threads)
    where = f"{machine()}, {workers.count} at a time"
    print(where)
    planned = plan(configs, c, meta)
    results = Results(c, data)
    first = next(iter(planned.values()))
    ratios = measured(planned, c, results, speed) if c.budget == "seconds" else {}
    costed = {label: budgeted(label, own, first, ratios.get(label, 1.0))
              for label, own in planned.items()}
    variants = [variant(label, own) for label, own in costed.items()]
    for one, two in itertools.combinations(variants, 2):
        if one.options == two.options:
            fail(f"{names([one.label, two.label])} are the same; a variant is matched to the first "
                 f"one: which is that to be?")
    print(markdown([{"variant": v.label, **{k: f"{n:,}" for k, n in v.size.items()},
                     "tokens": f"{v.tokens:,}",
                     "total FLOP": f"{v.tokens * v.size['flops_per_token']:.2e}",
                     "found": f"{own.solve}={getattr(own, own.solve)}, max_iters={own.max_iters}"}
                    for v, own in zip(variants, costed.values(), strict=True)]), flush=True)
    if c.dry_run:
        return
    new = not os.path.isdir(results.folder)
    os.makedirs(results.folder, exist_ok=True)
    try:
        with locked(results.folder, f"another command is writing to {results.folder}; stop it or "
                                    f"choose another --study"):
            results.runs = Results(c, data).runs  # another command may have just ended
            study(variants, planned, c, argv, results, workers, where)
    finally:
        if new and os.listdir(results.folder) in ([], [".lock"]):
            shutil.rmtree(results.folder)


def names(labels: Iterable[str]) -> str:
    """Labels, which may have commas."""
    return ", ".join(f'"{label}"' for label in dict.fromkeys(labels))


def check(configs: dict[str, BenchConfig], c: BenchConfig) -> None:
    """Raise UserError for what would be found out too late."""
    if not re.fullmatch(r"\w[\w.-]*", c.study or ""):
        fail(f"study={c.study}: its folder of results needs a name of letters and digits; name a "
             f"preset (config/study_suite.py), or --study=NAME")
    if c.variants == BenchConfig.variants:
        fail('say what to compare: --variants "GPT: template=gd" "YuriiFormer: template=nesterov"')
    if c.tasks and importlib.util.find_spec("lm_eval") is None:  # not after days of training
        fail("tasks need lm-eval: pip install lm-eval")
    for name, labels in (("only", c.only), ("published", [text.rpartition(":")[0]
                                                           for text in c.published])):
        if unknown := [label for label in labels if label not in configs]:
            fail(f"{name}={', '.join(unknown)}: the variants are {names(configs)}")
    unused = [f"--{k}" for k, usual in (("init_from", "scratch"), ("seed", TrainConfig.seed),
                                        ("json", None), ("plot", None), ("nanogpt", None))
              if getattr(c, k) != usual]
    if unused:
        fail(f"compare has no use for {', '.join(unused)}: its runs begin from scratch with seeds "
             f"1, 2, ... (--seeds), and what it writes is in --results")
    folders = [Cell(Variant(label, {}, {}), 0, c).out_dir.lower() for label in configs]
    if len(set(folders)) < len(folders):
        fail(f"two of {names(configs)} would train in one folder; name them otherwise")


def study(variants: list[Variant], planned: dict[str, BenchConfig], c: BenchConfig,
          argv: list[str], results: Results, workers: Workers, where: str) -> None:
    """The cells of the plan that the results lack, and the report."""
    chosen = [v for v in variants if not c.only or v.label in c.only]
    cells = [Cell(v, seed, c) for seed in range(1, c.seeds + 1) for v in chosen]
    now = {v.label: v.options for v in chosen}
    stale = [r for r in results.runs if now.get(r["variant"], r["options"]) != r["options"]]
    if stale and not c.overwrite:
        fail(f"{results.path} has runs of {names(r['variant'] for r in stale)} "
             f"with other options; add --overwrite to replace them, or choose another --study")
    results.runs = [r for r in results.runs if r not in stale]
    results.borrow(cells)
    missing = [cell for cell in cells if (run := results.get(cell)) is None
               or (c.tasks and run.get("tasks", {}).get("how") != c.judged_by)]
    print(f"{len(missing)} runs to do, {len(cells) - len(missing)} there, {workers.count} at a "
          f"time", flush=True)
    failed = run_cells(missing, results, list(planned), workers, where)
    results.write(planned)
    report(results, variants, planned, c, argv)
    if failed:
        fail(*failed, "the same command tries these again, and what they said is in their "
                      "output.txt")


def run_cells(cells: list[Cell], results: Results, order: list[str], workers: Workers,
              where: str) -> list[str]:
    """Cell after cell, or as many at once as there are workers. What failed, a line each."""
    failed, began, done = [], time.time(), 0

    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    here = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, interrupt) if here else None
    with ThreadPoolExecutor(workers.count) as pool:
        futures = {pool.submit(cell.run, workers): cell for cell in cells}
        try:
            for future in as_completed(futures):
                cell, done = futures[future], done + 1
                name = f"{cell.variant.label}, seed {cell.seed}"
                left = (time.time() - began) / done * (len(cells) - done)
                try:
                    run = future.result()
                except (config.UserError, OSError) as error:
                    failed.append(f"{name}: {error}")
                    print(f"[{done}/{len(cells)}] {failed[-1]}", flush=True)
                    continue
                results.runs = [r for r in results.runs if r is not results.get(cell)]
                results.runs.append(run | {"machine": where})
                results.write(order)
                print(f"[{done}/{len(cells)}] {name}: {run['val_loss']:.4f} after "
                      f"{clock(run['seconds'])}; eta {clock(left)}", flush=True)
        except BaseException:
            print("stopping; the same command goes on", flush=True)
            pool.shutdown(wait=False, cancel_futures=True)
            workers.stop()
            raise
        finally:
            if here:
                signal.signal(signal.SIGTERM, before)
    return failed


def report(results: Results, variants: list[Variant], planned: dict[str, BenchConfig],
           c: BenchConfig, argv: list[str]) -> None:
    """table.md and the pictures, of the runs of this plan."""
    now = {v.label: v.options for v in variants}
    runs = [r for r in results.runs if now.get(r["variant"]) == r["options"]]
    if not runs or runs[0]["variant"] != variants[0].label:
        return print(f"no table yet: nothing of {variants[0].label}, to which the others are "
                     f"compared")
    table = markdown(summary(runs, c, planned))
    words, local, here = [], CELL | ASIDE | {"results", "jobs", "only"}, False
    for word in argv:  # without what is of this machine or this call
        here = word[2:].split("=")[0] in local if word.startswith("--") else here
        words += [word] * (not here)
    machines = "; ".join(dict.fromkeys(r["machine"] for r in runs))
    borrowed = ", ".join(dict.fromkeys(r["study"] for r in runs if "study" in r))
    pictures = ["curves.png", *(["differences.png"] if any(differences(runs).values()) else []),
                *(["scalars.png"] if any("scalars" in r for r in runs) else [])]
    drawing = importlib.util.find_spec("matplotlib") is not None
    with open(os.path.join(results.folder, "table.md"), "w", encoding="utf-8") as file:
        file.write(
            f"# {c.study}\n\n`python bench.py {shlex.join(words)}`\n\n"
            f"{results.head['data']['dataset']}, equal {c.budget}; {machines}."
            + f" Runs of the same options are from {borrowed}." * bool(borrowed) + f"\n\n{table}\n"
            f"Losses are those at the end of training, in nats per token (lower is better), on the "
            f"same windows: mean ± standard deviation over the seeds. Differences to the first row "
            f"are paired by seed, ± the half width of their 95 % t-interval; where that contains "
            f"zero, no difference is shown. Each interval is for itself: of twenty, one misses on "
            f"average. Matrices are the parameters without tables, norms and scalars; FLOPs are "
            f"those of training.\n"
            + (f"\nThe other pairs, row less column, bold where the interval leaves out zero:\n\n"
               f"{markdown(others)}" if (others := pairs(runs)) else "")
            + "".join(f"\n![{name[:-4]}]({name})" for name in pictures if drawing) + "\n")
    print(table)
    if drawing:
        draw(runs, results.folder, pictures, c.x)
    else:
        print("no pictures: pip install matplotlib")
    print(f"wrote {results.folder}")
