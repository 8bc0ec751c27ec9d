"""All figures that a GPU can give, in one go: `make gpu`. Each comes from a command that can be run
alone. What they need is compiled first, side by side; then they are measured one at a time."""

import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from support.device import pick_device
from support.errors import fail
from support.files import sha256
from tools.race import HERE, machine, program, text_table

GPT2 = ["config/gpt2_124m.py", "--batch_size=16", "--gradient_accumulation_steps=4"]
LONG = ["--batch_size=4", "--gradient_accumulation_steps=4"]
TRAINING = [  # label, options of the variant
    ("GPT", ""), ("YuriiFormer", "template=nesterov"),
    ("YuriiFormer, as model.py has it", "template=nesterov fused=False"),
    ("triple momentum", "template=tmm"), ("GPT, bf16 streams", "stream_dtype=bfloat16"),
    ("YuriiFormer, bf16 streams", "template=nesterov stream_dtype=bfloat16")]
STREAMS = [("fp32 streams", ""), ("bf16 streams", "stream_dtype=bfloat16")]
DECODING = [("GPT", "compile=True"), ("YuriiFormer", "compile=True template=nesterov"),
            ("GPT, eager", "compile=False")]


@dataclass
class GPUConfig:
    """Everything that a GPU can show, in one run: its tests, then training, decoding, sampling."""

    nanogpt: str | None = None  # folder of nanoGPT's code: its model is one more variant
    json: str = "gpu.json"  # a file to write the figures to
    device: str | None = None  # cpu, cuda, cuda:1, mps; auto: the best there is
    tiny: bool = False  # a small model and few steps, to try this on a CPU
    jobs: int = 4  # compilations side by side


def words(variants: list[tuple[str, str]]) -> list[str]:
    """As --variants takes them."""
    return ["--variants", *(f"{label}: {options}" for label, options in variants)]


def measurements(config: GPUConfig) -> dict[str, list[str]]:
    """Name -> a command of bench.py, without --json."""
    common = [f"--device={config.device or 'auto'}"]
    if config.tiny:
        common += ["--n_layer=1", "--n_head=2", "--n_embd=32", "--block_size=32", "--batch_size=2",
                   "--vocab_size=64", "--repeats=1", "--head_dim=auto", "--ffn_hidden=auto"]
    beside = [f"--nanogpt={config.nanogpt}"] if config.nanogpt else []
    short = [] if config.tiny else ["--repeats=5", "--steps=5"]
    return {
        "training, 124M": ["speed", *GPT2, *common, *short, *beside, *words(TRAINING)],
        "training, deterministic": ["speed", *GPT2, *common, *short, "--deterministic",
                                    *words([("GPT, deterministic", "")])],
        "training, SwiGLU": ["speed", "config/swiglu_113m.py", *LONG, *common, *short,
                             *words(STREAMS)],
        "training, hourglass": ["speed", "config/hourglass_113m.py", *LONG, *common, *short,
                                *words(STREAMS)],
        "decoding, 124M": ["decode", "config/gpt2_124m.py", *common, *beside, *words(DECODING)]}


def bench(argv: list[str], path: str) -> list[dict]:
    """The rows of a command of bench.py."""
    program("bench.py", *argv, f"--json={path}")
    with open(path, encoding="utf-8") as file:
        return json.load(file)["rows"]


def compile_all(config: GPUConfig, commands: dict[str, list[str]], folder: str) -> None:
    """Fill the compiler's cache: one step of each variant, several processes at once."""
    jobs = []
    for argv in commands.values():
        first = argv.index("--variants")
        steps = ["--repeats=1", *(["--steps=1"] if argv[0] == "speed" else ["--max_new_tokens=4"])]
        options = [word for word in argv[:first] if not word.startswith(("--repeats", "--steps",
                                                                         "--nanogpt"))]
        jobs += [[*options, *steps, "--variants", variant] for variant in argv[first + 1:]]
    with ThreadPoolExecutor(config.jobs) as pool:
        list(pool.map(lambda job: bench(job[1], f"{folder}/warm-{job[0]}.json"), enumerate(jobs)))


def whole_programs(config: GPUConfig, folder: str) -> dict[str, float]:
    """From Enter to the last character of the default command, and 300 steps of yurii_owt through
    train.py with its evaluations and saves, beside the rate of its steps alone."""
    data = write_data(folder)
    steps = 6 if config.tiny else 300
    size = (["--n_layer=1", "--n_head=2", "--n_embd=32", "--block_size=32", "--batch_size=2",
             "--gradient_accumulation_steps=1", "--eval_tokens=2000"] if config.tiny else
            ["--batch_size=16", "--gradient_accumulation_steps=4", "--eval_tokens=500000"])
    device = f"--device={config.device or 'auto'}"
    took, _ = program("train.py", "config/yurii_owt.py", *size, f"--max_iters={steps}",
                      f"--eval_interval={steps // 3}", f"--log_interval={steps // 6}",
                      f"--data_dir={data}", "--dataset=random", f"--out_dir={folder}/out", device)
    records = [json.loads(line) for line in Path(folder, "out", "log.jsonl").open()]
    trained = [r for r in records if r["type"] == "train"]
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


def scaling(config: GPUConfig, folder: str) -> list[dict]:
    """Tokens per second of 1, 2, 4, ... GPUs, each with the same micro-batches."""
    rows, n = [], 1
    while n <= torch.cuda.device_count() and torch.cuda.device_count() > 1:
        out = f"{folder}/out-{n}"
        program("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", "train.py",
                *GPT2, f"--gradient_accumulation_steps={4 * n}", "--max_iters=40",
                f"--out_dir={out}", f"--data_dir={folder}/data", "--dataset=random",
                "--eval_tokens=100000")
        records = [json.loads(line) for line in Path(out, "log.jsonl").open()]
        rates = [r["tokens_per_s"] for r in records if r["type"] == "train"]
        rows.append({"variant": f"{n} GPUs", "tokens_per_s": float(np.median(rates[2:]))})
        rows[-1]["ratio"] = rows[-1]["tokens_per_s"] / rows[0]["tokens_per_s"] / n
        n *= 2
    return rows


def measure_gpu(config: GPUConfig) -> None:
    device, began, tables = pick_device(config.device), time.time(), {}

    def progress(what: str) -> None:
        print(f"[{time.time() - began:4.0f} s] {what}", flush=True)

    progress(f"tests of what only a GPU can show, on {machine(device)}")
    tests = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py"],
                           cwd=HERE)
    commands = measurements(config)
    with tempfile.TemporaryDirectory() as folder:
        progress("compiling")
        compile_all(config, commands, folder)
        for name, argv in commands.items():
            progress(name)
            tables[name] = bench(argv, f"{folder}/rows.json")
        progress("train.py and sample.py")
        figures = whole_programs(config, folder)
        tables["whole programs"] = [{"what": k, "figure": v} for k, v in figures.items()]
        if rows := scaling(config, folder):
            tables["several GPUs"] = rows
    progress("done")
    for name, rows in tables.items():
        print(f"\n{name}\n\n{text_table(rows)}")
    with open(config.json, "w", encoding="utf-8") as file:
        json.dump({"machine": machine(device), "tests": tests.returncode, "tables": tables}, file,
                  indent=1)
    if tests.returncode not in (0, 5):  # 5: there was none
        fail(f"tests failed, as they say above; the figures are in {config.json}")
