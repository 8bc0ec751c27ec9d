"""Measure: how fast a model trains and decodes, what memory it takes, what its data costs.

    python bench.py speed config/shakespeare_char.py --variants "template=gd" "template=nesterov"
    python bench.py speed config/shakespeare_char.py --nanogpt=../nanoGPT
    python bench.py decode config/gpt2_124m.py --nanogpt=../nanoGPT
    python bench.py memory config/gpt2_124m.py --variants "template=gd" "template=tmm"
    python bench.py data config/gpt2_124m.py

The options are train.py's and a few more. A variant is a word of further options ("template=tmm
dropout=0.1"); all are measured in turn (A B A B ...): a machine that slows down slows all of
them. The figures are medians with the lowest and the highest; warm-up and compilation are stated
apart. nanoGPT's own model, from a folder that you name, runs in the same process. The data are
random ids, whatever the dataset: give --vocab_size, or have GPT-2's.
"""

import contextlib
import importlib.util
import json
import multiprocessing
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from config import cli, fail, read_config
from model import GPT, GPTConfig, autocast, pick_device, pick_dtype
from train import (
    Tokens,
    TrainConfig,
    WindowOrder,
    accumulate,
    make_optimizers,
    model_args,
    prefetch,
    try_compile,
)


@dataclass
class BenchConfig(TrainConfig):
    """Every option of bench.py: train.py's, and these."""

    command: Literal["speed", "decode", "memory", "data"] | None = None  # the first word
    variants: tuple[str, ...] = ("",)  # the options of each variant, as one word: "template=gd"
    nanogpt: str | None = None  # folder of nanoGPT's code: its model is one more variant
    repeats: int = 5  # measurements of each variant
    steps: int = 5  # speed: optimiser steps in each measurement
    num_samples: int = 1  # decode: sequences at once
    max_new_tokens: int = 256  # decode: tokens for each
    json: str | None = None  # a file to write the figures to


    def _rules(self) -> list[tuple[bool, str, str, str]]:
        counts = ("repeats", "steps", "num_samples", "max_new_tokens")
        return super()._rules() + [
            (getattr(self, n) < 1, f"{n}={getattr(self, n)}", "must be at least 1", "choose more")
            for n in counts]


# -----------------------------------------------------------------------------
# What is measured: a name, a function that does some work, and how much work that is


@dataclass
class Variant:
    """One thing to measure. run() does `tokens` tokens of work."""

    name: str
    run: Callable[[], None]
    tokens: int
    parameters: int
    flops: float  # per token
    bytes: float  # of weights that one decoded token reads
    device: torch.device
    waits: list[float] = field(default_factory=list)  # seconds that each micro-batch was waited for


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all that it was asked for."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def seconds(run: Callable[[], None], device: torch.device) -> float:
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - start


def alternate(variants: list[Variant], repeats: int) -> list[dict]:
    """Rows of figures. Each variant warms up twice, which compiles it, then all take turns. The
    ratio is the median of those of neighbours in time."""
    warm_up = [seconds(v.run, v.device) for v in variants]
    for v in variants:
        v.run()
        v.waits.clear()
    turns = [[seconds(v.run, v.device) for v in variants] for _ in range(repeats)]
    rows = []
    for v, first, own in zip(variants, warm_up, zip(*turns, strict=True), strict=True):
        rates = [v.tokens / time for time in own]
        ratios = [rate * turn[0] / variants[0].tokens
                  for rate, turn in zip(rates, turns, strict=True)]
        row = {"variant": v.name, "parameters": v.parameters, "warm_up_s": first,
               "tokens_per_s": statistics.median(rates), "low": min(rates), "high": max(rates),
               "ratio": statistics.median(ratios)}
        rows.append(row | ({"waiting_share": sum(v.waits) / sum(own)} if v.waits else {}))
    return rows


def peaks(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """(FLOP/s of a large matrix product, bytes/s read by a large sum), measured here and now."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    big = torch.ones(2**29 if device.type == "cuda" else 2**26, device=device)

    def best(run: Callable[[], None]) -> float:
        return min(seconds(run, device) for _ in range(5))

    return 2 * n**3 / best(lambda: a @ b), big.numel() * 4 / best(big.sum)


@contextlib.contextmanager
def random_data(vocab_size: int, n_tokens: int) -> Iterator[str]:
    """A folder with train.bin of random ids (uint16 or uint32) for both code bases."""
    with tempfile.TemporaryDirectory() as folder:
        dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
        ids = np.random.default_rng(0).integers(vocab_size, size=n_tokens).astype(dtype)
        ids.tofile(os.path.join(folder, "train.bin"))
        yield folder


def setting(c: BenchConfig) -> tuple[GPT, torch.device, torch.dtype]:
    """The model of a configuration, on its device."""
    torch.manual_seed(c.seed)
    device = pick_device(c.device)
    dtype = pick_dtype(c.dtype, device)
    model = GPT(GPTConfig(**model_args(c) | {"vocab_size": c.vocab_size or 50304}))
    return model.to(device, torch.float64 if dtype == torch.float64 else None), device, dtype


def micro_batches(c: BenchConfig, folder: str) -> Iterator[torch.Tensor]:
    """As train.py reads them."""
    vocab_size = c.vocab_size or 50304
    meta = {"dtype": "uint16" if vocab_size <= 1 << 16 else "uint32", "vocab_size": vocab_size}
    tokens, position = Tokens(folder, "train", meta, c.block_size), 0
    order = WindowOrder(len(tokens), c.block_size, c.seed)
    while True:
        rows = tokens.read(order.starts(position, c.batch_size))
        yield rows.pin_memory() if torch.cuda.is_available() else rows
        position += c.batch_size


def timed(items: Iterator, waits: list[float]) -> Iterator:
    """The same items; how long each took to come goes to `waits`."""
    while True:
        start = time.perf_counter()
        item = next(items)
        waits.append(time.perf_counter() - start)
        yield item


def training(name: str, c: BenchConfig, folder: str) -> Variant:
    """Steps of train.py: data, forward, backward, clipping, optimiser, one read of the loss."""
    model, device, dtype = setting(c)
    try_compile(model, c.compile, device)
    model.activation_checkpointing, model.loss_chunk = c.activation_checkpointing, c.loss_chunk
    optimizers = make_optimizers(model, c, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    waits: list[float] = []
    batches = timed(prefetch(micro_batches(c, folder)), waits)

    def run() -> None:
        for _ in range(c.steps):
            loss = accumulate(model, batches, c.gradient_accumulation_steps, device, dtype, scaler)
            for optimizer in optimizers.values():
                scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip or torch.inf)
            torch.stack((loss, norm)).tolist()
            for optimizer in optimizers.values():
                scaler.step(optimizer)
                optimizer.zero_grad(set_to_none=True)
            scaler.update()

    tokens = c.steps * c.gradient_accumulation_steps * c.batch_size * c.block_size
    return Variant(name, run, tokens, model.get_num_params(False), model.flops_per_token(), 0,
                   device, waits)


def nanogpt_model(c: BenchConfig):
    """nanoGPT's model of the same shape, from its own model.py."""
    path = os.path.join(c.nanogpt, "model.py")
    if not os.path.isfile(path):
        fail(f"nanogpt={c.nanogpt} has no model.py; git clone nanoGPT, and name its folder")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = sys.modules["nanogpt_model"] = importlib.util.module_from_spec(spec)
    with contextlib.redirect_stdout(None):
        spec.loader.exec_module(module)
        torch.manual_seed(c.seed)
        return module.GPT(module.GPTConfig(
            block_size=c.block_size, vocab_size=c.vocab_size or 50304, n_layer=c.n_layer,
            n_head=c.n_head, n_embd=c.n_embd, dropout=c.dropout, bias=c.bias))


def nanogpt_training(c: BenchConfig, folder: str, compiled: bool) -> Variant:
    """Steps as in nanoGPT's train.py: on a CPU in fp32, on a GPU in bf16 or fp16."""
    model, device = nanogpt_model(c), pick_device(c.device)
    model.to(device)
    half = torch.bfloat16 if device.type != "cuda" or torch.cuda.is_bf16_supported() \
        else torch.float16
    context = contextlib.nullcontext() if device.type == "cpu" else torch.autocast(
        device.type, half)
    scaler = torch.amp.GradScaler(device.type, enabled=half == torch.float16)
    with contextlib.redirect_stdout(None):
        optimizer = model.configure_optimizers(c.weight_decay, c.learning_rate, (c.beta1, c.beta2),
                                               device.type)
    trained = torch.compile(model) if compiled else model
    data = np.memmap(os.path.join(folder, "train.bin"), dtype=np.uint16, mode="r")
    T = c.block_size

    def batch() -> list[torch.Tensor]:
        starts = torch.randint(len(data) - T, (c.batch_size,))
        rows = [torch.stack([torch.from_numpy(data[i + k:i + k + T].astype(np.int64))
                             for i in starts]) for k in (0, 1)]
        if device.type == "cuda":
            rows = [row.pin_memory() for row in rows]
        return [row.to(device, non_blocking=True) for row in rows]

    ahead = [batch()]

    def run() -> None:
        for _ in range(c.steps):
            for _ in range(c.gradient_accumulation_steps):
                x, y = ahead.pop()
                with context:
                    loss = trained(x, y)[1] / c.gradient_accumulation_steps
                ahead.append(batch())
                scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip or torch.inf)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            loss.item()

    tokens = c.steps * c.gradient_accumulation_steps * c.batch_size * T
    own = sum(p.numel() for p in model.parameters())
    ours = GPT(GPTConfig(**model_args(c) | {"template": "gd", "ffn": "mlp", "vocab_size":
                                            c.vocab_size or 50304}))
    return Variant("nanogpt, compiled" if compiled else "nanogpt", run, tokens, own,
                   ours.flops_per_token(), 0, device)


def decoding(name: str, c: BenchConfig, model: GPT | None = None) -> Variant:
    """Samples drawn from random weights, from a prompt of 16 tokens; nanoGPT's model if given."""
    theirs = model
    device = pick_device(c.device)
    dtype = torch.float32 if theirs and device.type == "cpu" else pick_dtype(c.dtype, device)
    model = (theirs or setting(c)[0]).to(device).eval()
    prompt = torch.randint(c.vocab_size or 50304, (c.num_samples, 16), device=device)

    @torch.no_grad()
    def run() -> None:
        with autocast(device, dtype):
            model.generate(prompt, c.max_new_tokens, temperature=0.8, top_k=200)

    inputs = [m for k, m in model.transformer.items() if k in ("wpe", "vte", "vpe")]
    parameters = sum(p.numel() for p in model.parameters())
    read = parameters - sum(m.weight.numel() for m in inputs)
    return Variant(name, run, c.num_samples * c.max_new_tokens, parameters, 2 * read,
                   read * next(model.parameters()).element_size() / c.num_samples, device)


# -----------------------------------------------------------------------------
# The commands


def speed(configs: dict[str, BenchConfig], c: BenchConfig) -> list[dict]:
    """Training: tokens per second, and what share of the machine's measured FLOP/s that is."""
    with random_data(c.vocab_size or 50304, 2_000_000) as folder:
        variants = [training(name, own, folder) for name, own in configs.items()]
        if c.nanogpt:
            variants += [nanogpt_training(c, folder, compiled) for compiled in (False, True)]
        rows = alternate(variants, c.repeats)
    flops, _ = peaks(variants[0].device, pick_dtype(c.dtype, variants[0].device))
    for row, v in zip(rows, variants, strict=True):
        share = row["tokens_per_s"] * v.flops / flops
        row.update(mflop_per_token=v.flops / 1e6, share_of_peak=share)
    print(f"limit: {flops / 1e9:,.0f} GFLOP/s, a large matrix product in the first one's precision")
    return rows


def decode(configs: dict[str, BenchConfig], c: BenchConfig) -> list[dict]:
    """Sampling: tokens per second, and what share of the memory's measured bandwidth that is."""
    variants = [decoding(name, own) for name, own in configs.items()]
    if c.nanogpt:
        variants.append(decoding("nanogpt", c, nanogpt_model(c)))
    rows = alternate(variants, c.repeats)
    _, bandwidth = peaks(variants[0].device, torch.float32)
    for row, v in zip(rows, variants, strict=True):
        row["mb_per_token"] = v.bytes / 1e6
        row["share_of_peak"] = row["tokens_per_s"] * v.bytes / bandwidth
    print(f"limit: {bandwidth / 1e9:,.1f} GB/s, a sum over 256 MB or more")
    return rows


def memory(configs: dict[str, BenchConfig], c: BenchConfig) -> list[dict]:
    """Peak memory of two training steps, each variant in a process of its own."""
    rows = []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for name, own in configs.items():
            peak, parameters = pool.apply(peak_memory, (own,))
            first = rows[0]["peak_mb"] if rows else peak / 1e6
            rows.append({"variant": name, "parameters": parameters, "peak_mb": peak / 1e6,
                         "ratio": peak / 1e6 / (first or 1.0)})
    return rows


def peak_memory(c: BenchConfig) -> tuple[int, int]:
    """(bytes above those before the model was made, parameters); on a CPU of resident memory."""
    import resource

    c.steps = 2
    scale = 1 if platform.system() == "Darwin" else 1024
    with random_data(c.vocab_size or 50304, 200_000) as folder:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
        variant = training("", c, folder)
        variant.run()
        if variant.device.type == "cuda":
            return torch.cuda.max_memory_allocated(), variant.parameters
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale - before, \
            variant.parameters


def data(configs: dict[str, BenchConfig], c: BenchConfig) -> list[dict]:
    """The data: what reading a micro-batch costs, and how much of a training step waits for it."""
    rows = []
    with random_data(c.vocab_size or 50304, 2_000_000) as folder:
        for name, own in configs.items():
            batches = micro_batches(own, folder)
            reading = [seconds(lambda b=batches: next(b), torch.device("cpu")) for _ in range(100)]
            variant = training(name, own, folder)
            variant.run()
            variant.waits.clear()
            total = seconds(variant.run, variant.device)
            rows.append({"variant": name, "reading_us": 1e6 * statistics.median(reading),
                         "step_ms": 1e3 * total / own.steps,
                         "waiting_share": sum(variant.waits) / total})
    return rows


COLUMNS = {  # figure -> heading and format
    "variant": ("", "s"), "parameters": ("parameters", ",d"), "tokens_per_s": ("tokens/s", ",.1f"),
    "low": ("lowest", ",.1f"), "high": ("highest", ",.1f"), "ratio": ("x the first", ".3f"),
    "mflop_per_token": ("MFLOP/token", ",.1f"), "mb_per_token": ("MB/token", ",.1f"),
    "share_of_peak": ("of the limit", ".1%"), "peak_mb": ("peak MB", ",.0f"),
    "reading_us": ("us to read a micro-batch", ",.0f"), "step_ms": ("ms a step", ",.1f"),
    "waiting_share": ("waiting for data", ".2%"), "warm_up_s": ("s warm-up", ".1f")}


def table(rows: list[dict]) -> str:
    """The figures in columns."""
    columns = [k for k in COLUMNS if k in rows[0]]
    cells = [[COLUMNS[k][0] for k in columns],
             *([format(row[k], COLUMNS[k][1]) if k in row else "" for k in columns]
               for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width)
                               in enumerate(zip(line, widths, strict=True))) for line in cells)


def machine(device: torch.device) -> str:
    """What the figures were measured on."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        name = next((line.split(": ")[1].strip() for line in file if "model name" in line), name)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, " \
           f"{time.strftime('%Y-%m-%d')}"


def main(argv: list[str]) -> None:
    c, _ = read_config(BenchConfig, argv, positional="command", usage=__doc__)
    if c.command is None:
        fail("say what to measure: python bench.py speed | decode | memory | data")
    configs = {}
    for words in c.variants:
        more = [f"--{word.removeprefix('--')}" for word in shlex.split(words)]
        configs[words or "ours"], _ = read_config(BenchConfig, [*argv, *more],
                                                  positional="command")
    command = {"speed": speed, "decode": decode, "memory": memory, "data": data}[c.command]
    where = machine(pick_device(c.device))
    print(where)
    rows = command(configs, c)
    print(table(rows))
    if c.json:
        with open(c.json, "w", encoding="utf-8") as file:
            json.dump({"command": argv, "machine": where, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    cli(main)
