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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model import GPT, GPTConfig
from prepare import CORES
from support.code import HERE
from support.device import autocast, pick_device, pick_dtype, tune_allocator
from support.errors import fail
from support.meta import END_OF_TEXT, load_meta
from tools import ToolConfig
from tools.findings import markdown
from tools.judge import EvalConfig, judge


@dataclass
class RaceConfig(ToolConfig):
    """What loss, prepare and gpu share."""

    nanogpt: str | None = None  # folder of nanoGPT's code, to run beside ours
    repeats: int = 5  # measurements of each
    device: str | None = None  # cpu, cuda, cuda:1, mps; auto: the best there is
    json: str | None = None  # a file to write the figures to


@dataclass
class LossConfig(RaceConfig):
    """Wall time to nanoGPT's loss on Shakespeare's characters (TinyStories on a GPU)."""

    data_dir: str = "data"  # where the data folders are


@dataclass
class PreparingConfig(RaceConfig):
    """Preparing data: tokens per second and core, resident memory of all processes together."""

    input: str | None = None  # a text file of documents, with <|endoftext|> between them

    def rules(self, rule: Callable[[bool, str], None]) -> None:
        super().rules(rule)
        rule(self.input is not None, "name a text file of documents: --input=FILE")


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
    start = time.perf_counter()
    run()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - start


def alternate(variants: list[Variant], repeats: int) -> list[dict]:
    """Rows of figures. Each variant warms up twice, which compiles it, then all take turns."""
    def turns() -> list[float]:
        took = []
        for variant in variants:
            tune_allocator(variant.tuned)
            took.append(seconds(variant.run, variant.device))
        return took

    warm_up, _ = turns(), turns()
    rates = [[variant.tokens / took for variant, took in zip(variants, turns(), strict=True)]
             for _ in range(repeats)]
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


def matrix_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, measured here and now."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / min(seconds(lambda: a @ b, device) for _ in range(5))


def memory_bandwidth(device: torch.device) -> float:
    """Bytes per second that a large sum reads, measured here and now."""
    large = torch.ones(2**29 if device.type == "cuda" else 2**26, device=device)
    return large.numel() * 4 / min(seconds(large.sum, device) for _ in range(5))


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
    spec = importlib.util.spec_from_file_location(
        "nanogpt_model", os.path.join(config.nanogpt, "model.py"))
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


def nanogpt_dtype(config: Any) -> torch.dtype:
    """nanoGPT computes in fp32 on a CPU, in bf16 or fp16 on a GPU."""
    device = pick_device(config.device)
    return torch.float32 if device.type == "cpu" else pick_dtype(config.dtype, device)


def nanogpt_training(config: Any, steps: int, compiled: bool) -> Variant:
    """Steps as in nanoGPT's train.py."""
    model, device, T = nanogpt_model(config), pick_device(config.device), config.block_size
    dtype, micro_steps = nanogpt_dtype(config), config.gradient_accumulation_steps
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    with contextlib.redirect_stdout(None):
        optimizer = model.configure_optimizers(
            config.weight_decay, config.learning_rate, (config.beta1, config.beta2), device.type)
    trained = torch.compile(model) if compiled else model
    data = torch.randint(config.vocab_size, (2_000_000,))

    def batch() -> list[torch.Tensor]:
        starts = torch.randint(len(data) - T, (config.batch_size,)).tolist()
        rows = [torch.stack([data[i + k:i + k + T] for i in starts]) for k in (0, 1)]
        if device.type == "cuda":
            rows = [row.pin_memory() for row in rows]
        return [row.to(device, non_blocking=True) for row in rows]

    ahead = [batch()]

    def run() -> None:
        for _ in range(steps):
            for _ in range(micro_steps):
                x, y = ahead.pop()
                with autocast(device, dtype):
                    loss = trained(x, y)[1] / micro_steps
                ahead.append(batch())  # while the device computes
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
    prompt = torch.randint(config.vocab_size, (config.num_samples, 16), device=device)

    @torch.no_grad()
    def run() -> None:
        torch.backends.cuda.enable_cudnn_sdp(True)  # torch's default, which ours may change
        with autocast(device, nanogpt_dtype(config)):
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


def program(*argv: str, cwd: str | Path = HERE, **environment: str) -> tuple[float, float]:
    """Run Python to its end: (wall seconds, the largest resident MB of all its processes together
    where /proc tells). UserError if it fails; its errors are printed as they come."""
    environment = os.environ | environment
    environment.pop("THP_MEM_ALLOC_ENABLE", None)  # which tune_allocator sets, for this process
    start, most = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, *argv], cwd=cwd, env=environment,
                               stdout=subprocess.DEVNULL)
    while process.poll() is None:
        most = max(most, resident(process.pid))
        time.sleep(0.01)
    took = time.perf_counter() - start
    if process.returncode:
        fail(f"{shlex.join(argv)} failed, as it says above")
    return took, most / 1e6


def resident(pid: int) -> int:
    """Bytes of a process and its descendants (Linux; else 0)."""
    total = 0
    with contextlib.suppress(OSError):
        total = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        total += sum(resident(int(child)) for child in children)
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
    load_meta(os.path.join(data_dir, dataset))  # or it says how to make them
    with tempfile.TemporaryDirectory() as folder:
        code, commands = os.path.join(folder, "nanogpt"), {}
        if config.nanogpt:
            copy_nanogpt(config.nanogpt, code, os.path.join(data_dir, dataset))
            commands["nanogpt"] = ["train.py", "config/train_shakespeare_char.py",
                                   *nanogpt_options.split()]
        commands[preset] = ["train.py", f"config/{preset}.py", f"--data_dir={data_dir}",
                            "--overwrite", f"--device={config.device or 'auto'}"]
        turns = [[program(*argv, f"--out_dir={folder}/out-{name}",
                          cwd=code if name == "nanogpt" else HERE)[0]
                  for name, argv in commands.items()] for _ in range(config.repeats)]
        rows = []
        for name in commands:
            (evaluated,) = judge(EvalConfig(ckpt=f"{folder}/out-{name}/ckpt.pt", data=dataset,
                                            data_dir=data_dir, eval_tokens=2**62,
                                            device=config.device))
            rows.append({"variant": name, "val_loss": evaluated["nats"]})
    return medians(rows, "seconds", turns)


def copy_nanogpt(source: str, target: str, data: str) -> None:
    """nanoGPT's code with our data."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(".git", "assets", "*.bin"))
    folder = os.path.join(target, "data", os.path.basename(data))
    shutil.copytree(data, folder, dirs_exist_ok=True)
    with open(os.path.join(folder, "meta.pkl"), "wb") as file:
        pickle.dump({"vocab_size": load_meta(data)["padded_vocab_size"]}, file)


def preparing(config: PreparingConfig) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        commands = {}
        if config.nanogpt:
            commands["nanogpt"] = [nanogpt_script(config, folder)]
        commands["prepare.py"] = ["prepare.py", "openwebtext", "--overwrite",
                                  f"--data_dir={folder}/prepare.py",
                                  f"--input={os.path.abspath(config.input)}"]
        rows, turns = [{"variant": name, "peak_mb": 0.0} for name in commands], []
        for _ in range(config.repeats):
            turns.append([])
            for row in rows:
                name, cache = row["variant"], os.path.join(folder, "cache")
                shutil.rmtree(cache, ignore_errors=True)
                took, peak_mb = program(*commands[name], HF_HOME=cache)
                row["peak_mb"] = max(row["peak_mb"], peak_mb)
                bins = Path(folder, name).rglob("*.bin")
                row["tokens"] = sum(path.stat().st_size // 2 for path in bins)
                turns[-1].append(row["tokens"] / took / CORES)
    return medians(rows, "tokens_per_s_core", turns)


def nanogpt_script(config: PreparingConfig, folder: str) -> str:
    """nanoGPT's OpenWebText script for the documents of a file; its path, in folder/nanogpt."""
    path, documents = Path(folder, "nanogpt", "prepare.py"), Path(folder, "documents.jsonl")
    texts = Path(config.input).read_text(encoding="utf-8").split(END_OF_TEXT)
    documents.write_text("".join(json.dumps({"text": text.strip("\n")}) + "\n"
                                 for text in texts if text.strip()))
    script = Path(config.nanogpt, "data", "openwebtext", "prepare.py").read_text()
    script = script.replace("num_proc = 8", f"num_proc = {CORES}")
    script = script.replace('load_dataset("openwebtext", num_proc=num_proc_load_dataset)',
                            f'load_dataset("json", data_files="{documents}")')
    script = script.replace("total_batches = 1024", "total_batches = min(1024, len(dset))")
    path.parent.mkdir()
    path.write_text(script)
    return str(path)
