"""Races: what takes turns on the same work. nanoGPT beside us, from a folder that you name: its
training and decoding steps, preparing data, time to a loss."""

import contextlib
import importlib.util
import json
import os
import pickle
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from config import check_rules
from model import GPT, GPTConfig
from support.checkpoint import model_from, read_checkpoint
from support.device import autocast, pick_device, pick_dtype, tune_allocator
from support.errors import fail
from support.meta import load_meta
from support.tokenizer import END_OF_TEXT
from tools.findings import markdown
from tools.judge import EvalConfig, judge

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@dataclass
class RaceConfig:
    """What loss, prepare and all share."""

    nanogpt: str | None = None  # folder of nanoGPT's code, to run beside ours
    repeats: int = 5  # measurements of each
    device: str | None = None  # cpu, cuda, cuda:1, mps; auto: the best there is
    data_dir: str = "data"  # where the data folders are

    def __post_init__(self) -> None:
        check_rules(self)

    def rules(self, rule: Callable[[bool, str], None]) -> None:
        rule(self.repeats >= 1, f"repeats={self.repeats}: must be at least 1; choose more")


@dataclass
class LossConfig(RaceConfig):
    """Wall time to nanoGPT's loss on Shakespeare's characters (TinyStories on a GPU)."""

    json: str | None = None  # a file to write the figures to


@dataclass
class PreparingConfig(LossConfig):
    """Preparing data: tokens per second and core, resident memory of all processes together."""

    input: str | None = None  # a text file of documents, with <|endoftext|> between them


@dataclass
class AllConfig(RaceConfig):
    """The README's whole table for this machine, one command after the other."""

    input: str | None = None  # prepare: a text file of documents


# -----------------------------------------------------------------------------
# Taking turns


@dataclass
class Variant:
    """One thing to measure. run() does `tokens` tokens of work."""

    name: str
    run: Callable[[], None]
    tokens: int
    parameters: int
    device: torch.device
    flops: float = 0.0  # training FLOPs per token
    bytes: float = 0.0  # of weights that one decoded token reads
    tuned: bool = True  # False: memory is allocated as nanoGPT has it when it runs alone


def seconds(run: Callable[[], None], device: torch.device) -> float:
    """How long run() takes, to the end of what it started on the device."""
    def synchronise() -> None:
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()

    synchronise()
    start = time.perf_counter()
    run()
    synchronise()
    return time.perf_counter() - start


def alternate(variants: list[Variant], repeats: int) -> list[dict]:
    """Rows of figures. Each variant warms up twice, which compiles it, then all take turns."""
    def turn(variant: Variant) -> float:
        tune_allocator(variant.tuned)
        return seconds(variant.run, variant.device)

    warm_up = [turn(variant) for variant in variants]
    for variant in variants:
        variant.run()
    rates = [[variant.tokens / turn(variant) for variant in variants] for _ in range(repeats)]
    rows = [{"variant": variant.name, "parameters": variant.parameters, "warm_up_s": first}
            for variant, first in zip(variants, warm_up, strict=True)]
    return medians(rows, "tokens_per_s", rates)


def medians(rows: list[dict], key: str, turns: list[list[float]]) -> list[dict]:
    """The rows with the median, lowest and highest figure of their column of turns, and the median
    ratio to the first, of neighbours in time."""
    for row, column in zip(rows, zip(*turns, strict=True), strict=True):
        ratios = [figure / turn[0] for figure, turn in zip(column, turns, strict=True)]
        row |= {key: statistics.median(column), "low": min(column), "high": max(column),
                "ratio": statistics.median(ratios)}
    return rows


def peaks(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """(FLOP/s of a large matrix product, bytes/s read by a large sum), measured here and now."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    large = torch.ones(2**29 if device.type == "cuda" else 2**26, device=device)

    def best(run: Callable[[], None]) -> float:
        return min(seconds(run, device) for _ in range(5))

    return 2 * n**3 / best(lambda: a @ b), large.numel() * 4 / best(large.sum)


def text_table(rows: list[dict]) -> str:
    """Figures in columns, as GitHub has them."""
    def text(value: str | int | float) -> str:
        if isinstance(value, str):
            return value
        return f"{value:,.4f}" if isinstance(value, float) and abs(value) < 100 else f"{value:,.0f}"

    keys = dict.fromkeys(key for row in rows for key in row)
    return markdown([{key: text(row.get(key, "")) for key in keys} for row in rows])


def machine(device: torch.device) -> str:
    """What the figures were measured on."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        name = next((line.split(": ")[1].strip() for line in file if "model name" in line), name)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, " \
           f"{time.strftime('%Y-%m-%d')}"


# -----------------------------------------------------------------------------
# nanoGPT in this process; config: the options of speed, decode or memory in bench.py


def nanogpt_model(config: Any) -> torch.nn.Module:
    """The model of these options from the model.py in config.nanogpt, on its device."""
    path = os.path.join(config.nanogpt, "model.py")
    if not os.path.isfile(path):
        fail(f"nanogpt={config.nanogpt} has no model.py; git clone nanoGPT, and name its folder")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = sys.modules["nanogpt_model"] = importlib.util.module_from_spec(spec)
    with contextlib.redirect_stdout(None):
        spec.loader.exec_module(module)
        torch.manual_seed(config.seed)
        model = module.GPT(module.GPTConfig(**nanogpt_args(config)))
    return model.to(pick_device(config.device))


def nanogpt_args(config: Any) -> dict:
    """All that nanoGPT's model can be told."""
    return {name: getattr(config, name) for name in (
        "block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias")}


def nanogpt_training(config: Any, steps: int, compiled: bool) -> Variant:
    """Steps as in nanoGPT's train.py: on a CPU in fp32, on a GPU in bf16 or fp16."""
    model, device, T = nanogpt_model(config), pick_device(config.device), config.block_size
    dtype = torch.float32
    if device.type != "cpu":
        bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported()
        dtype = torch.bfloat16 if bf16 else torch.float16
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    with contextlib.redirect_stdout(None):
        optimizer = model.configure_optimizers(
            config.weight_decay, config.learning_rate, (config.beta1, config.beta2), device.type)
    trained = torch.compile(model) if compiled else model
    data = np.random.default_rng(0).integers(config.vocab_size, size=2_000_000).astype(np.uint16)

    def batch() -> list[torch.Tensor]:
        starts = torch.randint(len(data) - T, (config.batch_size,))
        rows = [torch.stack([torch.from_numpy(data[i + k:i + k + T].astype(np.int64))
                             for i in starts]) for k in (0, 1)]
        if device.type == "cuda":
            rows = [row.pin_memory() for row in rows]
        return [row.to(device, non_blocking=True) for row in rows]

    ahead = [batch()]
    micro_steps = config.gradient_accumulation_steps

    def run() -> None:
        for _ in range(steps):
            for _ in range(micro_steps):
                x, y = ahead.pop()
                with autocast(device, dtype):
                    loss = trained(x, y)[1] / micro_steps
                ahead.append(batch())
                scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or torch.inf)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            loss.item()

    with torch.device("meta"):
        flops = GPT(GPTConfig(**nanogpt_args(config))).flops_per_token()
    tokens = steps * micro_steps * config.batch_size * T
    return Variant("nanogpt, compiled" if compiled else "nanogpt", run, tokens,
                   sum(p.numel() for p in model.parameters()), device, flops, tuned=False)


def nanogpt_decoding(config: Any) -> Variant:
    """nanoGPT's own continuations of 16 tokens."""
    model, device = nanogpt_model(config).eval(), pick_device(config.device)
    dtype = torch.float32 if device.type == "cpu" else pick_dtype(config.dtype, device)
    prompt = torch.randint(config.vocab_size, (config.num_samples, 16), device=device)

    @torch.no_grad()
    def run() -> None:
        with autocast(device, dtype):  # of which its sample.py has none on a CPU
            model.generate(prompt, config.max_new_tokens, temperature=0.8, top_k=200)

    return decoding_variant("nanogpt", model, run, config, tuned=False)


def decoding_variant(name: str, model: torch.nn.Module, run: Callable[[], None], config: Any,
                     tuned: bool = True) -> Variant:
    """Of either model, whose parts have the same names."""
    matrices = {*model.transformer.h.parameters(), model.lm_head.weight}
    size = sum(p.numel() * p.element_size() for p in matrices)
    return Variant(name, run, config.num_samples * config.max_new_tokens,
                   sum(p.numel() for p in model.transformer.parameters()),
                   model.lm_head.weight.device, bytes=size / config.num_samples, tuned=tuned)


# -----------------------------------------------------------------------------
# Whole programs


def program(*argv: str, cwd: str = HERE, **environment: str) -> tuple[float, float]:
    """Run Python to its end: (wall seconds, the largest resident MB of all its processes together
    where /proc tells). UserError if it fails."""
    environment = os.environ | environment
    environment.pop("THP_MEM_ALLOC_ENABLE", None)  # which tune_allocator sets, for this process
    with tempfile.TemporaryFile() as output:
        start, most = time.perf_counter(), 0
        process = subprocess.Popen([sys.executable, *argv], cwd=cwd, stdout=output,
                                   stderr=subprocess.STDOUT, env=environment)
        while process.poll() is None:
            most = max(most, resident(process.pid))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.02)
        took = time.perf_counter() - start
        output.seek(0)
        lines = output.read().decode(errors="replace").strip().splitlines()
    if process.returncode:
        fail(f"{shlex.join(argv)} failed: {lines[-1] if lines else ''}")
    return took, most / 1e6


def resident(pid: int) -> int:
    """Bytes of a process and its descendants (Linux; else 0)."""
    total = 0
    with contextlib.suppress(OSError):
        with open(f"/proc/{pid}/statm") as file:
            total = int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            total += sum(resident(int(child)) for child in file.read().split())
    return total


RECIPES = {  # device -> data, our preset, nanoGPT's options; on a CPU its documented ones
    "cpu": ("shakespeare_char", "shakespeare_char_fast",
            "--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 "
            "--batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 "
            "--lr_decay_iters=2000 --dropout=0.0"),
    "cuda": ("tinystories", "tinystories_fast",
             "--dataset=tinystories --block_size=256 --batch_size=64 --n_layer=8 --n_head=8 "
             "--n_embd=512 --max_iters=5000 --lr_decay_iters=5000 --dropout=0.0 "
             "--eval_interval=1000 --eval_iters=50")}


def time_to_loss(config: LossConfig) -> list[dict]:
    kind = "cuda" if pick_device(config.device).type == "cuda" else "cpu"
    dataset, preset, nanogpt_options = RECIPES[kind]
    data_dir = os.path.abspath(config.data_dir)
    data = os.path.join(data_dir, dataset)
    if not os.path.isfile(os.path.join(data, "meta.json")):
        fail(f"there is no {data}; make it: python prepare.py {dataset}")
    with tempfile.TemporaryDirectory() as folder:
        ours = ["train.py", f"config/{preset}.py", f"--data_dir={data_dir}", "--overwrite",
                f"--out_dir={folder}/out", f"--device={config.device or 'auto'}"]
        runs = {preset: (ours, HERE, folder)}  # name -> command, where it runs, where its out is
        if config.nanogpt:
            code = os.path.join(folder, "nanogpt")
            copy_nanogpt(config.nanogpt, code, data)
            argv = ["train.py", "config/train_shakespeare_char.py", *nanogpt_options.split()]
            runs = {"nanogpt": ([*argv, "--out_dir=out"], code, code), **runs}
        turns = [[program(*argv, cwd=cwd)[0] for argv, cwd, _ in runs.values()]
                 for _ in range(config.repeats)]
        rows = []
        for name, (_, _, place) in runs.items():
            ckpt = os.path.join(place, "out", "ckpt.pt")
            (evaluated,) = judge(EvalConfig(ckpt=ckpt, data=dataset, data_dir=data_dir,
                                            eval_tokens=2**62, device=config.device))
            rows.append({"variant": name, "val_loss": evaluated["nats"],
                         "parameters": model_from(read_checkpoint(ckpt)).get_num_params(False)})
    return medians(rows, "seconds", turns)


def copy_nanogpt(source: str, target: str, data: str) -> None:
    """nanoGPT's code with our data."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(".git", "assets"))
    folder = os.path.join(target, "data", os.path.basename(data))
    os.makedirs(folder, exist_ok=True)
    for split in ("train", "val"):
        shutil.copy(os.path.join(data, f"{split}.bin"), folder)
    with open(os.path.join(folder, "meta.pkl"), "wb") as file:
        pickle.dump({"vocab_size": load_meta(data)["padded_vocab_size"]}, file)


def preparing(config: PreparingConfig) -> list[dict]:
    if config.input is None:
        fail("name a text file of documents: --input=FILE")
    with tempfile.TemporaryDirectory() as folder:
        runs = {"prepare.py": ["prepare.py", "openwebtext", f"--data_dir={folder}", "--overwrite",
                               f"--input={os.path.abspath(config.input)}"]}
        bins = {"prepare.py": os.path.join(folder, "openwebtext")}
        if config.nanogpt:
            bins["nanogpt"] = os.path.join(folder, "nanogpt")
            runs = {"nanogpt": [write_nanogpt_script(config, folder, bins["nanogpt"])], **runs}
        rows, turns = [{"variant": name, "peak_mb": 0.0} for name in runs], []
        for _ in range(config.repeats):
            turns.append([])
            for row in rows:
                cache = os.path.join(folder, "cache")
                shutil.rmtree(cache, ignore_errors=True)
                took, peak_mb = program(*runs[row["variant"]], HF_HOME=cache)
                row["peak_mb"] = max(row["peak_mb"], peak_mb)
                row["tokens"] = sum(os.path.getsize(f"{bins[row['variant']]}/{split}.bin") // 2
                                    for split in ("train", "val"))
                turns[-1].append(row["tokens"] / took / (os.cpu_count() or 1))
    return medians(rows, "tokens_per_s_core", turns)


def write_nanogpt_script(config: PreparingConfig, folder: str, bins: str) -> str:
    """nanoGPT's OpenWebText script for the documents of a file; returns its path, in `bins`."""
    documents, path = os.path.join(folder, "documents.jsonl"), os.path.join(bins, "prepare.py")
    with open(config.input, encoding="utf-8") as text, open(documents, "w") as file:
        for document in text.read().split(END_OF_TEXT):
            if document.strip():
                file.write(json.dumps({"text": document.strip("\n")}) + "\n")
    with open(os.path.join(config.nanogpt, "data", "openwebtext", "prepare.py")) as file:
        script = file.read()
    script = script.replace("num_proc = 8", f"num_proc = {os.cpu_count()}")
    script = script.replace('load_dataset("openwebtext", num_proc=num_proc_load_dataset)',
                            f'load_dataset("json", data_files="{documents}")')
    script = script.replace("total_batches = 1024", "total_batches = min(1024, len(dset))")
    os.mkdir(bins)
    with open(path, "w") as file:
        file.write(script)
    return path


# -----------------------------------------------------------------------------
# All of them


CHAR = "config/shakespeare_char.py --vocab_size=65 --dropout=0 --batch_size=16"
SMALL = "config/gpt2_124m.py"
TABLE = (  # MODEL: the first on a CPU, the second on a GPU
    "speed MODEL ONCE REPEATS NANOGPT",
    "speed MODEL ONCE REPEATS --compile=True --variants template=gd template=nesterov template=tmm",
    "speed MODEL ONCE REPEATS --compile=True --norm=rmsnorm "
    "--variants 'ffn=swiglu ffn_hidden=1024' 'ffn=hourglass ffn_hidden=256'",
    "prepare INPUT REPEATS NANOGPT",
    f"decode {SMALL} REPEATS NANOGPT "
    "--variants template=gd template=nesterov 'template=gd compile=True'",
    f"memory {SMALL} ONCE --batch_size=4 --block_size=512 NANOGPT "
    "--variants template=gd activation_checkpointing=True template=nesterov",
    "loss DATA REPEATS NANOGPT")


def table_commands(config: AllConfig) -> Iterator[list[str]]:
    """The command line of each part of the table for this device."""
    model = f"{SMALL} --batch_size=32" if pick_device(config.device).type == "cuda" else CHAR
    words = {"MODEL": model, "ONCE": "--gradient_accumulation_steps=1"}
    for word, option in (("INPUT", "input"), ("NANOGPT", "nanogpt"), ("DATA", "data_dir"),
                         ("REPEATS", "repeats")):
        words[word] = shlex.quote(f"--{option}={getattr(config, option) or 'auto'}")
    for command in TABLE:
        replaced = " ".join(words.get(word, word) for word in command.split())
        yield [*shlex.split(replaced), f"--device={config.device or 'auto'}"]
