"""All figures that a GPU can give, in one go: `make gpu`. Each variant is a process of its own: all
compile side by side, then they take turns, one at a time."""

import importlib.util
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Semaphore
from pathlib import Path

import numpy as np
import torch

from prepare import CORES
from support.device import compile_seconds, peak_flops, peak_mb, pick_device
from support.errors import fail, reason
from support.files import finite, sha256, write_text
from tools.race import HERE, RaceConfig, Variant, machine, medians, program, seconds, text_table
from tools.watch import read_log

GPT2 = "config/gpt2_124m.py"
TABLES = {  # command and what it measures -> variants: label, preset, options
    "speed, 124M": [
        ("GPT", GPT2, ""),
        ("YuriiFormer", GPT2, "--template=nesterov"),
        ("YuriiFormer, as model.py has it", GPT2, "--template=nesterov --fused=False"),
        ("triple momentum", GPT2, "--template=tmm"),
        ("GPT, bf16 streams", GPT2, "--stream_dtype=bfloat16"),
        ("YuriiFormer, bf16 streams", GPT2, "--template=nesterov --stream_dtype=bfloat16"),
        ("GPT, deterministic", GPT2, "--deterministic=True")],
    "speed, 113M of matrices": [
        ("SwiGLU", "config/swiglu_113m.py", ""),
        ("SwiGLU, bf16 streams", "config/swiglu_113m.py", "--stream_dtype=bfloat16"),
        ("hourglass", "config/hourglass_113m.py", ""),
        ("hourglass, bf16 streams", "config/hourglass_113m.py", "--stream_dtype=bfloat16")],
    "decode, 124M": [
        ("GPT", GPT2, "--compile=True"),
        ("GPT, kernels tried out", GPT2, "--compile=True --tune=True"),
        ("YuriiFormer", GPT2, "--compile=True --template=nesterov"),
        ("GPT, eager", GPT2, "--compile=False")]}
BATCH = ["--batch_size=16", "--gradient_accumulation_steps=4"]
SMALL = ["--n_layer=1", "--n_head=2", "--n_embd=32", "--block_size=32", "--batch_size=2"]
TINY = [*SMALL, "--vocab_size=64", "--head_dim=auto", "--ffn_hidden=auto"]


@dataclass
class GPUConfig(RaceConfig):
    """Everything that a GPU can show, in one run: its tests, then training, decoding, sampling."""

    json: str = "gpu.json"  # a file to write the figures to
    tiny: bool = False  # a small model and few steps, to try this on a CPU
    jobs: int | None = None  # compilations side by side; auto: by cores and memory


def commands(config: GPUConfig) -> dict[str, dict[str, list[str]]]:
    """Table -> label -> the words after bench.py that measure it alone; nanoGPT's come first."""
    found: dict[str, dict[str, list[str]]] = {}
    for table, rows in TABLES.items():
        kind = table.partition(",")[0]
        common = [f"--device={config.device or 'auto'}", *(TINY if config.tiny else [])]
        if kind == "speed":
            common += ["--steps=3", *([] if config.tiny else BATCH)]
        found[table] = {label: [kind, preset, *common, *options.split()]
                        for label, preset, options in rows}
        if config.nanogpt and rows[0][1] == GPT2:
            nanogpt = [kind, GPT2, *common, f"--nanogpt={config.nanogpt}"]
            found[table] = {"nanoGPT": nanogpt} | found[table]
    return found


# -----------------------------------------------------------------------------
# Variants that take turns, each in a process of its own


def work(connection: Connection, slots: Semaphore, make: Callable[[list[str]], Variant],
         argv: list[str]) -> None:
    """Compile; then run whenever asked, and send how fast it was. What fails is sent as text."""
    try:
        with slots:
            variant = make(argv)
            for _ in range(2):
                seconds(variant.run, variant.device)
            if variant.flops:  # what only a training step needs is given back, for the others
                torch.cuda.empty_cache()
        connection.send({"parameters": variant.parameters, "flops": variant.flops,
                         "compile_s": compile_seconds(), "peak_mb": peak_mb(variant.device)})
        while connection.recv():
            variant.run()  # it takes its memory again
            connection.send(variant.tokens / seconds(variant.run, variant.device))
            if variant.flops:
                torch.cuda.empty_cache()
    except Exception as error:
        connection.send(f"{type(error).__name__}: {reason(error)}")


def take_turns(argvs: dict[str, list[str]], make: Callable[[list[str]], Variant],
               config: GPUConfig, progress: Callable[[str], None]) -> dict[str, dict]:
    """Label -> its figures and its rates, turn by turn; without those that fail."""
    context, connections, found = multiprocessing.get_context("spawn"), {}, {}
    slots = context.Semaphore(config.jobs or compilations(pick_device(config.device)))
    for label, argv in argvs.items():
        connections[label], theirs = context.Pipe()
        context.Process(target=work, args=(theirs, slots, make, argv), daemon=True).start()
        theirs.close()

    def answer(label: str) -> dict | float | None:
        try:
            said = connections[label].recv()
        except EOFError:
            said = "its process was killed"
        if not isinstance(said, str):
            return said
        progress(f"{label} fails: {said}")
        found.pop(label, None)

    for label in argvs:
        if figures := answer(label):
            progress(f"{label} is compiled")
            found[label] = figures | {"rates": []}
    for turn in range(config.repeats):
        for label in list(found):
            connections[label].send(True)
            if rate := answer(label):
                found[label]["rates"].append(rate)
                progress(f"turn {turn + 1} of {config.repeats}: {label}: {rate:,.0f} tokens/s")
    for label in found:
        connections[label].send(False)
    return found


def compilations(device: torch.device) -> int:
    """How many go side by side: each takes two cores, and 16 GB of a GPU."""
    most = CORES // 2
    if device.type == "cuda":
        most = min(most, torch.cuda.get_device_properties(device).total_memory // 16_000_000_000)
    return max(1, most)


def table_of(found: dict[str, dict], peak: float | None) -> list[dict]:
    """Label -> figures and rates, as rows of medians with the ratio to the first."""
    turns = list(zip(*(figures["rates"] for figures in found.values()), strict=True))
    rows = [{"variant": label, **figures} for label, figures in found.items()]
    for row in medians(rows, "tokens_per_s", turns):
        flops = row.pop("flops")
        del row["rates"]
        if flops and peak:
            row["mfu"] = row["tokens_per_s"] * flops / peak
    return rows


# -----------------------------------------------------------------------------
# Whole programs


def whole_programs(config: GPUConfig, folder: str) -> dict[str, float]:
    """From Enter to the last character of the default command, and 300 steps of yurii_owt through
    train.py with its evaluations and saves, beside the rate of its steps alone."""
    data = write_data(folder)
    steps = 6 if config.tiny else 300
    size = [*BATCH, "--eval_tokens=500000"]
    if config.tiny:
        size = [*SMALL, "--gradient_accumulation_steps=1", "--eval_tokens=2000"]
    device = f"--device={config.device or 'auto'}"
    took, _ = program("train.py", "config/yurii_owt.py", *size, f"--max_iters={steps}",
                      f"--eval_interval={steps // 3}", f"--log_interval={steps // 6}",
                      f"--data_dir={data}", "--dataset=random", f"--out_dir={folder}/out", device)
    trained = [r for r in read_log(f"{folder}/out") if r["type"] == "train"]
    alone = float(np.median([r["tokens_per_s"] for r in trained[1:]]))
    span = trained[-1]["seconds"] - trained[0]["seconds"]
    whole = (trained[-1]["tokens"] - trained[0]["tokens"]) / span
    text = min(program("sample.py", f"--out_dir={folder}/out", device)[0] for _ in range(2))
    return {"train.py, whole run, s": took, "its steps alone, tokens/s": alone,
            "with evaluations and saves, tokens/s": whole, "sample.py, s": text}


def write_data(folder: str) -> str:
    """A data folder named random: bytes, in a vocabulary of GPT-2's size."""
    path = Path(folder, "data", "random")
    path.mkdir(parents=True)
    meta = {"tokenizer": "bytes", "vocab_size": 257, "padded_vocab_size": 50304, "dtype": "uint16"}
    for split, count in (("train", 4_000_000), ("val", 600_000)):
        np.random.default_rng(count).integers(256, size=count, dtype="<u2").tofile(
            path / f"{split}.bin")
        meta[split] = {"tokens": count, "sha256": sha256(path / f"{split}.bin")}
    (path / "meta.json").write_text(json.dumps(meta))
    return str(path.parent)


def scaling(folder: str) -> list[dict]:
    """Tokens per second of 1, 2, 4, ... GPUs, each with the same micro-batches."""
    rows, n = [], 1
    while n <= torch.cuda.device_count():
        out = f"{folder}/out-{n}"
        program("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", "train.py",
                GPT2, f"--gradient_accumulation_steps={4 * n}", "--max_iters=40",
                f"--out_dir={out}", f"--data_dir={folder}/data", "--dataset=random",
                "--eval_tokens=100000")
        rates = [r["tokens_per_s"] for r in read_log(out) if r["type"] == "train"]
        rows.append({"variant": f"{n} GPUs", "tokens_per_s": float(np.median(rates[2:]))})
        rows[-1]["ratio"] = rows[-1]["tokens_per_s"] / rows[0]["tokens_per_s"] / n
        n *= 2
    return rows


def measure_gpu(config: GPUConfig, make: Callable[[list[str]], Variant]) -> None:
    """make: the words of a command of bench.py -> what it measures."""
    device, began = pick_device(config.device), time.time()
    found: dict = {"machine": machine(device), "tables": {}}

    def progress(what: str) -> None:
        print(f"[{time.time() - began:4.0f} s] {what}", flush=True)

    def keep(name: str, rows: list[dict]) -> None:
        found["tables"][name] = rows
        write_text(config.json, json.dumps(finite(found), indent=1) + "\n")
        print(f"\n{name}\n\n{text_table(rows)}", flush=True)

    progress(f"{found['machine']}: tests of what only a GPU can show")
    together = ["-n", "4"] if importlib.util.find_spec("xdist") else []
    tests = subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu", *together,
                            "tests/test_gpu.py"], cwd=HERE)
    for table, argvs in commands(config).items():
        progress(f"compiling {table}")
        if figures := take_turns(argvs, make, config, progress):
            keep(table, table_of(figures, peak_flops(device)))
    with tempfile.TemporaryDirectory() as folder:
        progress("train.py and sample.py")
        figures = whole_programs(config, folder)
        keep("whole programs", [{"what": k, "figure": v} for k, v in figures.items()])
        if torch.cuda.device_count() > 1:
            keep("several GPUs", scaling(folder))
    progress("done")
    if tests.returncode not in (0, 5):  # 5: there was none
        fail(f"tests failed, as they say above; the figures are in {config.json}")
