"""Comparing variants fairly: a study is variants x seeds, matched in size, under one budget, judged
on the same windows. What they found is in findings.py."""

import bisect
import hashlib
import json
import os
import re
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from subprocess import Popen
from typing import ClassVar, Literal

import torch

from config import check_least
from model import GPT, GPTConfig
from support.checkpoint import model_from, read_checkpoint
from support.code import code_in, copy_code
from support.data import to_device
from support.device import autocast, peak_flops, pick_device, pick_dtype
from support.errors import UserError, fail
from support.files import finite, locked, sha256, write_text
from support.meta import load_meta
from support.terminal import clock
from tools import validation_rows
from tools.findings import comparisons, differences, draw_study, markdown, summary
from tools.race import machine
from tools.watch import UNITS, read_log, substeps
from train import TrainConfig, model_args


@dataclass
class CompareConfig(TrainConfig):
    """A study: variants x seeds, with tables of their losses and of their differences."""

    init_from: ClassVar[str] = TrainConfig.init_from
    seed: ClassVar[int] = TrainConfig.seed
    study: str | None = None  # its name
    # the options of each variant, as one word: "template=gd", or named: "GPT: template=gd"
    variants: tuple[str, ...] = ()
    seeds: int = 3  # runs of each variant; in a variant's word, of that one
    first_seed: int = 1  # they have the seeds from here on: 1, 2, 3
    # the part of the validation text that final losses are of: the odd ones of its 32 blocks choose
    # (learning rates, say), the even ones report
    half: Literal["both", "choosing", "reporting"] = "both"
    match: Literal["width", "parameters", "matrices", "flops"] = "width"  # to the first variant
    solve: Literal["n_embd", "n_layer", "ffn_hidden"] = "n_embd"  # what match changes
    # what all spend as much of as the first one in its max_iters
    budget: Literal["tokens", "flops", "seconds"] = "tokens"
    repeats: int = 5  # budget=seconds: measurements of each variant's speed
    steps: int = 5  # budget=seconds: optimiser steps in each measurement
    only: tuple[str, ...] = ()  # run only these variants
    jobs: int | None = None  # runs at once; auto: one for each GPU, or one; 0: only the table
    dry_run: bool = False  # print the plan and stop
    results: str | None = None  # the folder of the STUDY folders; auto: out_dir
    pairs: tuple[str, ...] = ()  # "variant - other": compared, too, beside all with the first one
    margin: float | None = None  # what differs by less is equal; given before anything is seen
    extended: str | None = None  # what was added after looking, for the page to say
    published: tuple[str, ...] = ()  # "variant: loss", to print beside ours
    x: Literal["steps", "tokens", "seconds", "flops"] = "steps"  # what losses are drawn over

    def rules(self, rule: Callable[[bool, str], None]) -> None:
        super().rules(rule)
        check_least(self, rule, 1, "seeds", "repeats", "steps")
        check_least(self, rule, 0, "first_seed", "margin", "jobs")
        for pair in self.pairs:
            rule(pair.count(" - ") == 1, f'pairs={pair}: say "VARIANT - OTHER"')


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


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def model_size(config: TrainConfig) -> dict[str, int]:
    """Parameters, matrices (without tables, norms, scalars) and training FLOPs per token."""
    with torch.device("meta"):
        model = GPT(GPTConfig(**model_args(config)))
    matrices = sum(p.numel() for p in model.parameter_roles()["matrix"].values())
    return {"parameters": model.get_num_params(False), "matrices": matrices,
            "flops_per_token": model.flops_per_token()}


def matched(label: str, config: CompareConfig, first: CompareConfig) -> CompareConfig:
    """With the value of `solve` at which `match` comes nearest to that of the first variant."""
    def size(value: int) -> int:
        try:
            return model_size(replace(config, **{config.solve: value}))[SIZES[config.match]]
        except ValueError:  # narrower than its attention, say
            return 0

    step = {"n_layer": 1, "ffn_hidden": 4, "n_embd": 4}[config.solve]
    if config.solve == "n_embd" and not config.head_dim:  # all heads grow
        step = config.n_head * (2 if config.position == "rope" else 1)
    values = range(step, step * (256 if config.solve == "n_layer" else 8192), step)
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
    own = {f.name for f in fields(CompareConfig)} - {f.name for f in fields(TrainConfig)}
    common = own - {"match", "solve", "seeds"} | PLACE | {
        "block_size", "eval_tokens", "eval_iters", "max_iters"}
    planned: dict[str, CompareConfig] = {}
    for label, variant in configs.items():
        if differ := [k for k in sorted(common) if getattr(variant, k) != getattr(config, k)]:
            fail(f"{label}: {', '.join(differ)} must be the same in all variants, or they cannot "
                 f"be compared; say it for the study")
        variant = replace(variant, vocab_size=config.vocab_size or vocab_size, eval_iters=None)
        if planned and variant.match != "width":
            variant = matched(label, variant, next(iter(planned.values())))
        planned[label] = variant
    return planned


def tokens_per_step(config: TrainConfig) -> int:
    return config.batch_size * config.gradient_accumulation_steps * config.block_size


def budgeted(planned: dict[str, CompareConfig], head: dict, relative_speeds: Callable,
             ) -> dict[str, CompareConfig]:
    """The variants with as many steps as cost what the first one's cost."""
    def step_cost(config: CompareConfig) -> int:
        flops = model_size(config)["flops_per_token"]
        return tokens_per_step(config) * (flops if config.budget == "flops" else 1)

    first, speeds, found = next(iter(planned.values())), {}, {}
    if first.budget == "seconds":
        speeds = measured(planned, head, relative_speeds)
    for label, config in planned.items():
        steps = first.max_iters * step_cost(first) / step_cost(config) * speeds.get(label, 1.0)
        try:
            found[label] = replace(config, max_iters=max(1, round(steps)))
        except ValueError as error:  # a schedule longer than these steps
            fail(*(f"{label}: {line}" for line in str(error).splitlines()))
    return found


def measured(planned: dict[str, CompareConfig], head: dict, relative_speeds: Callable,
             ) -> dict[str, float]:
    """Tokens per second over the first one's: measured once for all that are equally fast, then
    kept with the results, in their head."""
    first, *_ = planned
    options = {label: json.dumps(options_of(config, PLACE | ASIDE | SAME_SPEED))
               for label, config in planned.items()}
    keys = {label: digest(f"{options[first]} {options[label]}") for label in planned}
    known = head.setdefault("speeds", {})
    if new := {key: label for label, key in keys.items() if key not in known}:
        once = {keys[first]: first} | new
        ratios = relative_speeds({label: planned[label] for label in once.values()})
        known |= {key: round(ratios[label], 4) for key, label in once.items()}
        torch.cuda.empty_cache()  # the runs need it
    return {label: known[key] for label, key in keys.items()}


def pace(runs: Iterable[dict], where: str, config: CompareConfig) -> tuple[float, float | None]:
    """Seconds of a run that are not steps, and FLOP/s in the others: from what runs took on this
    machine, or 40 and 0.3 of a known card's peak, as on an H100. None: unknown."""
    rates = [run["tokens"] * run["flops_per_token"] / max(run["seconds"], 0.1) for run in runs
             if run["machine"].startswith(where.split(", torch")[0])]
    if rates:
        return 0, statistics.median(rates)
    device = pick_device(config.device)
    peak = peak_flops(device) if pick_dtype(config.dtype, device).itemsize == 2 else None
    return 40, peak and 0.3 * peak


def plan_table(planned: dict[str, CompareConfig], start: float, rate: float | None) -> str:
    rows = []
    for label, config in planned.items():
        size, tokens = model_size(config), config.max_iters * tokens_per_step(config)
        flop = tokens * size["flops_per_token"]
        solved = f"{config.solve}={getattr(config, config.solve)}"
        rows.append({"variant": label, **{name: f"{n:,}" for name, n in size.items()},
                     "tokens": f"{tokens:,}",
                     "total FLOP": f"{flop:.2e}",
                     "a run, about": clock(start + flop / rate) if rate else "unknown",
                     "found": f"{solved}, max_iters={config.max_iters}"})
    return markdown(rows)


# -----------------------------------------------------------------------------
# One cell: a run of train.py, and what is kept of it


@dataclass
class Cell:
    """One variant with one seed."""

    label: str
    config: CompareConfig
    seed: int

    def __str__(self) -> str:
        return f"{self.label}, seed {self.seed}"

    @property
    def out_dir(self) -> str:
        """Other options or code, another folder: what is in it can be gone on with."""
        name = re.sub(r"[^\w.=+-]+", "-", self.label)
        options = digest(f"{code_in()['hash']} {json.dumps(options_of(self.config))}")[:6]
        return os.path.join(self.config.out_dir, self.config.study,
                            f"{name}-{options}-seed{self.seed}")

    def start(self, share: dict[str, str]) -> Popen:
        """Train it, or train it on, with this share of the machine and the study's code."""
        os.makedirs(self.out_dir, exist_ok=True)
        code = os.path.join(os.path.dirname(self.out_dir), "code")
        options = options_of(self.config, without={"overwrite"})
        options |= {"seed": self.seed, "out_dir": self.out_dir, "init_from": "auto"}
        words = [f"--{name}={value}" for name, value in options.items()]
        with open(os.path.join(self.out_dir, "output.txt"), "wb") as output:
            return Popen([sys.executable, os.path.join(code, "train.py"), *words],
                         env=os.environ | share, stdout=output, stderr=output)

    def record(self, code: int) -> dict:
        """What is kept of a run that ended with this exit code. UserError if it failed."""
        if code:
            with open(os.path.join(self.out_dir, "output.txt"), errors="replace") as file:
                said = file.read().splitlines() or [""]
            fail(f"exit code {code}: {said[-1].removeprefix('error: ')}")
        log = read_log(self.out_dir)
        rates = [r["tokens_per_s"] for r in log if r["type"] == "train"]
        evals = [r for r in log if r["type"] == "eval"]
        last, evals = evals[-1], [r for r in evals if r["val_loss"] is not None]
        if last["iter"] != self.config.max_iters or last["val_loss"] is None:
            fail(f"it ended at step {last['iter']} with the loss {last['val_loss']}")
        at_the_end = measured_at_the_end(self.config, self.out_dir)
        torch.cuda.empty_cache()  # the next runs need it
        return {"variant": self.label, "seed": self.seed, "options": options_of(self.config),
                **model_size(self.config), "tokens": last["tokens"], "steps": last["iter"],
                "val_loss": round(last["val_loss"], 5),
                "best_val_loss": round(min(r["val_loss"] for r in evals), 5),
                "seconds": round(last["seconds"], 1),
                "tokens_per_s": round(statistics.median(rates)), "peak_mb": last.get("peak_mb"),
                "curve": [[r["iter"], round(r["val_loss"], 5)] for r in evals]} | at_the_end


def cells_of(planned: dict[str, CompareConfig]) -> list[Cell]:
    """All runs of a study, seed by seed, so that halfway there is a table of all variants."""
    last = max(config.first_seed + config.seeds for config in planned.values())
    return [Cell(label, config, seed) for seed in range(last) for label, config in planned.items()
            if config.first_seed <= seed < config.first_seed + config.seeds]


@torch.no_grad()
def measured_at_the_end(config: CompareConfig, out_dir: str) -> dict:
    """Of a run's last checkpoint, on the windows of train.py's evaluation: the means of their
    losses in 32 consecutive blocks (of fewer windows, one each), and what its substeps do."""
    device = pick_device(config.device)
    model = model_from(read_checkpoint(os.path.join(out_dir, "ckpt.pt"))).eval().to(device)
    folder, T = os.path.join(config.data_dir, config.dataset), config.block_size
    losses = []
    with autocast(device, pick_dtype(config.dtype, device)):
        for rows in validation_rows(folder, T, config.eval_tokens).split(config.batch_size):
            x, y = to_device(rows, device)  # (B, T)
            losses.append(model(x, y, return_logits=False, reduction="none")[1].cpu())
        some, _ = to_device(validation_rows(folder, T, 16 * T), device)
        found = substeps(model, some)
    per_window = torch.cat(losses).double().mean(dim=1)
    blocks = per_window.tensor_split(min(32, len(per_window)))
    return {"blocks": [round(block.mean().item(), 5) for block in blocks], "substeps": found}


def of_half(run: dict, half: str) -> dict:
    """A run with the losses of this half of the text. UserError where its blocks are missing."""
    if half == "both":
        return run
    if len(run.get("blocks", [])) < 2:
        fail(f"half={half}: {run['variant']}, seed {run['seed']} has no losses by block of the "
             f"text; run it again (--overwrite), or take --half=both")
    blocks = run["blocks"][half == "choosing"::2]
    return run | {"blocks": blocks, "val_loss": round(statistics.mean(blocks), 5)}


def shares_of(config: CompareConfig) -> list[dict[str, str]]:
    """The environments of as many runs as go at once: of each its part of the cores, and a GPU
    where the device is not a certain one."""
    cards: list[str] = []
    if config.device in (None, "cuda") and pick_device(config.device).type == "cuda":
        visible, count = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count()
        cards = visible.split(",")[:count] if visible else list(map(str, range(count)))
    shares = [{} for _ in range(config.jobs or len(cards) or 1)]
    for i, share in enumerate(shares):
        share["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // len(shares)))
        if cards:
            share["CUDA_VISIBLE_DEVICES"] = cards[i % len(cards)]
    return shares


# -----------------------------------------------------------------------------
# What is found


class Results:
    """What a study has found so far: results/<study>/results.json, a run a line."""

    def __init__(self, config: CompareConfig, data: dict):
        self.folder = os.path.join(config.results or config.out_dir, config.study)
        self.path = os.path.join(self.folder, "results.json")
        # what the runs share
        self.head: dict = {"study": config.study, "data": data, "code": code_in()}
        self.order: list[str] = []  # of the variants
        self.runs: dict[tuple[str, int], dict] = {}  # by variant and seed
        if os.path.isfile(self.path):
            try:
                with open(self.path, encoding="utf-8") as file:
                    head = {"code": {"hash": "", "commit": "d42fd40"}} | json.load(file)
                runs = {(r["variant"], r["seed"]): r for r in head.pop("runs")}
            except (ValueError, KeyError):
                fail(f"{self.path} is damaged; mend it, or move it away to begin anew")
            if head["data"] != data:
                fail(f"{self.path} is of other data than those in {config.data_dir}/"
                     f"{config.dataset} now; choose another --study, or prepare the data as before")
            if head["code"]["hash"] == code_in()["hash"] or not config.overwrite:
                self.head, self.runs = head, runs

    def get(self, cell: Cell) -> dict | None:
        """This cell's run, if there is one of its options."""
        run = self.runs.get((cell.label, cell.seed))
        return run if run and run["options"] == options_of(cell.config) else None

    def sorted(self) -> list[dict]:
        """The runs in the order of the variants."""
        place = {label: i for i, label in enumerate(self.order)}
        return sorted(self.runs.values(),
                      key=lambda r: (place.get(r["variant"], len(place)), r["seed"]))

    def write(self) -> None:
        lines = ",\n".join(json.dumps(finite(run)) for run in self.sorted())
        write_text(self.path, f'{json.dumps(self.head)[:-1]}, "runs": [\n{lines}\n]}}\n')


# -----------------------------------------------------------------------------
# The command


def compare(configs: dict[str, CompareConfig], config: CompareConfig, argv: list[str],
            relative_speeds: Callable[[dict[str, CompareConfig]], dict[str, float]]) -> None:
    """Run the cells that are missing, then write the table and the pictures.

    argv: the command; relative_speeds: measures tokens per second over the first one's."""
    check(configs, config)
    folder = os.path.join(config.data_dir, config.dataset)
    meta = load_meta(folder)
    unit = UNITS.get(meta["tokenizer"], "nats per token")
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
    results.order = list(planned)
    cells = cells_of(planned)
    asked = [cell for cell in cells if cell.label in (config.only or planned)]
    print(plan_table(planned, *pace(results.runs.values(), where, config)), flush=True)
    if config.dry_run:
        return print(f"{len(asked)} runs")
    with locked(results.folder, f"another command is writing to {results.folder}; stop it or "
                                f"choose another --study"):
        results.runs = Results(config, data).runs  # another command may have just ended
        missing = [cell for cell in asked if config.jobs != 0 and results.get(cell) is None]
        code = os.path.join(config.out_dir, config.study, "code")
        ours = results.head["code"]
        if config.jobs != 0 and ours["hash"] != code_in()["hash"]:
            fail(f"{results.path} has runs of other code ({ours['commit']}), to which those of "
                 f"this one cannot be added; replace them (--overwrite), choose another --study, "
                 f"or only write their table (--jobs=0)")
        changed = {cell.label for cell in missing if (cell.label, cell.seed) in results.runs}
        if changed and not config.overwrite:
            fail(f"{results.path} has runs of {sorted(changed)} with other options; add "
                 f"--overwrite to replace them, or choose another --study")
        if missing:
            copy_code(code)
            results.write()
        print(f"{len(missing)} runs to do, {len(asked) - len(missing)} there", flush=True)
        failed = run_cells(missing, results, shares, where)
        report(results, planned, cells, config, argv, unit)
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
    if unknown := set(config.only) - set(configs):
        fail(f"only={', '.join(unknown)}: the variants are {list(configs)}")
    if unknown := [pair for pair in config.pairs if set(pair.split(" - ")) - set(configs)]:
        print(f"warning: these pairs are left out, as the variants are {list(configs)}: {unknown}",
              file=sys.stderr)
    if any(own.seeds < 4 for own in configs.values()):
        print("warning: of fewer than four seeds an interval can hardly show anything",
              file=sys.stderr)


def run_cells(cells: list[Cell], results: Results, shares: list[dict[str, str]], where: str,
              ) -> list[str]:
    """Run them, one on each share at a time. What failed, a line each. SIGTERM is as Ctrl-C: the
    runs are stopped, and train.py saves."""
    waiting, free = list(cells), list(shares)
    running: dict[Popen, tuple[Cell, dict[str, str]]] = {}
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
                try:
                    run = cell.record(process.returncode)
                except UserError as error:
                    failed.append(f"{cell}: {error}")
                    print(failed[-1], flush=True)
                    continue
                results.runs[cell.label, cell.seed] = run | {"machine": where}
                results.write()
                print(f"{cell}: {run['val_loss']:.4f} after {clock(run['seconds'])}; "
                      f"{len(waiting) + len(running)} to go", flush=True)
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


NOTES = """\
Losses are those at the end of training, in {unit} (lower is better), on the same windows: mean ± \
standard deviation over the seeds. Matrices are the parameters without tables, norms and scalars; \
FLOPs are those of training."""
DIFFERENCES = """\
Differences of the final losses, ± the half width of a 95 % t-interval, each for itself; the \
variance between seeds is pooled over the study, but for variants that vary more than twice as \
much as the others, which have their own. p is Holm's, over all rows. Equal: the 90 % interval \
lies within a margin given beforehand ({margin}), whatever p; better and worse: p is at most 0.05; \
undecided: neither. Text, where it is known: how far the difference would vary on another text \
like this one (a standard deviation, by bootstrap over its blocks), which no seed shows."""


def report(results: Results, planned: dict[str, CompareConfig], cells: list[Cell],
           config: CompareConfig, argv: list[str], unit: str) -> None:
    """table.md and the pictures, of the runs of these cells. unit: "nats per byte", say."""
    wanted = {(cell.label, cell.seed) for cell in cells if results.get(cell)}
    runs = [of_half(run, config.half) for run in results.sorted()
            if (run["variant"], run["seed"]) in wanted]
    first = next(iter(planned))
    if not runs or runs[0]["variant"] != first:
        return print(f"no table yet: nothing of {first}, to which the others are compared")
    words, kept = [], True
    for word in argv:  # without what is of this machine or this call
        if word.startswith("--") or word.endswith(".py"):
            kept = word[2:].split("=")[0] not in PLACE | ASIDE | {"results", "jobs", "only"}
        if kept:
            words.append(word)
    tables = [markdown(summary(runs, planned))]
    head = results.head
    setting = f"{head['data']['dataset']}, equal {config.budget}; code {head['code']['commit']}; "
    setting += "; ".join(dict.fromkeys(r["machine"] for r in runs)) + "."
    if borrowed := dict.fromkeys(r["study"] for r in runs if "study" in r):
        setting += f" Runs of the same options are from {', '.join(borrowed)}."
    if config.half != "both":
        which = {"choosing": "1, 3, 5", "reporting": "0, 2, 4"}[config.half]
        setting += (f" Final losses are of the blocks {which}, ... of 32 of the validation text, "
                    f"best ones and curves of all of it.")
    if config.extended:
        setting += f" Extended after looking: {config.extended}."
    parts = [f"# {config.study}", f"`python bench.py {shlex.join(words)}`", setting, *tables,
             NOTES.format(unit=unit)]
    if found := comparisons(runs, planned):
        margin = f"± {config.margin:g}" if config.margin else "none was"
        tables.append(markdown(differences(found)))
        parts += [tables[-1], DIFFERENCES.format(margin=margin)]
    try:
        pictures = draw_study(runs, found, config, unit, results.folder)
        parts.append("\n".join(f"![{name[:-4]}]({name})" for name in pictures))
    except (OSError, UserError) as error:
        print(f"warning: no pictures: {error}", file=sys.stderr)
    text, page = "\n\n".join(map(str.strip, parts)) + "\n", os.path.join(results.folder, "table.md")
    write_text(page, text)
    print("\n".join(tables) + f"\nwrote {page}")
