"""Measure how fast a model trains and decodes and what memory it takes; and the door to tools/.

    python bench.py COMMAND [preset.py ...] --name=value
    python bench.py COMMAND --help

A variant is a word of further options ("template=tmm dropout=0.1"); all are measured in turn
(A B A B ...): a machine that slows down slows all of them. The figures are medians with the lowest
and the highest; warm-up and compilation are stated apart. nanoGPT's own model, from a folder that
you name, runs in the same process. The data are random ids, whatever the dataset.
"""

import json
import multiprocessing
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import torch

from config import check_least, nearest, read_config
from model import GPT, GPTConfig
from sample import DecodingCache, store_matrices, stream
from support.data import prefetch
from support.device import can_compile, peak_mb, pick_device, pick_dtype, try_compile, tune_machine
from support.errors import cli, explain_failures, fail
from support.files import finite
from support.fuse import fuse
from tools import race
from tools.compare import CompareConfig, compare
from tools.exchange import ConvertConfig, ExportConfig, convert, export
from tools.gpu import GPUConfig, measure_gpu
from tools.judge import EvalConfig, judge
from tools.race import Variant, alternate
from tools.watch import PlotConfig, plot
from train import TrainConfig, accumulate, make_optimizers, model_args

# -----------------------------------------------------------------------------
# Options


@dataclass
class MeasureConfig(TrainConfig):
    """What speed, decode and memory share."""

    vocab_size: int = 50304  # rows of the token table; the data are random ids below it
    # the options of each variant, as one word: "template=gd", or named: "GPT: template=gd"
    variants: tuple[str, ...] = ("",)
    nanogpt: str | None = None  # folder of nanoGPT's code: its model is one more variant
    json: str | None = None  # a file to write the figures to

    def rules(self, rule: Callable[[bool, str], None]) -> None:
        super().rules(rule)
        check_least(self, rule, 1, "repeats", "steps", "num_samples", "max_new_tokens")


@dataclass
class SpeedConfig(MeasureConfig):
    """Training: tokens per second, and what share of the machine's measured FLOP/s that is."""

    repeats: int = 5  # measurements of each variant
    steps: int = 5  # optimiser steps in each measurement


@dataclass
class DecodeConfig(MeasureConfig):
    """Decoding: tokens per second, and what share of the measured memory bandwidth that is."""

    repeats: int = 5  # measurements of each variant
    num_samples: int = 1  # sequences at once
    max_new_tokens: int = 256  # for each sequence
    tune: bool = False  # try the compiled step's kernels out, which takes as long again


@dataclass
class MemoryConfig(MeasureConfig):
    """Peak memory of two training steps, each variant in a process of its own."""


# -----------------------------------------------------------------------------
# What takes turns


def random_batches(config: TrainConfig) -> Iterator[torch.Tensor]:
    """Micro-batches (B, T + 1) of random ids, from memory, in the form that train.py reads."""
    generator = torch.Generator().manual_seed(config.seed)
    shape = config.batch_size, config.block_size + 1
    while True:
        rows = torch.randint(config.vocab_size, shape, generator=generator, dtype=torch.int32)
        yield rows.pin_memory() if torch.cuda.is_available() else rows


def new_model(config: TrainConfig) -> tuple[GPT, torch.device, torch.dtype]:
    """The model of these options, on its device."""
    torch.manual_seed(config.seed)
    device = pick_device(config.device)
    tune_machine(device, config.deterministic)
    dtype = pick_dtype(config.dtype, device)
    model = GPT(GPTConfig(**model_args(config))).to(device)
    return model.double() if dtype == torch.float64 else model, device, dtype


def training(name: str, config: TrainConfig, steps: int) -> Variant:
    """Steps of train.py: data, forward, backward, clipping, optimiser, one read of the loss."""
    model, device, dtype = new_model(config)
    model.activation_checkpointing = config.activation_checkpointing
    fuse(model, config.fused, device)
    try_compile(model, config.compile, device)
    optimizers = make_optimizers(model, config, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    batches, micro_steps = prefetch(random_batches(config)), config.gradient_accumulation_steps

    def run() -> None:
        for _ in range(steps):
            loss = accumulate(model, batches, micro_steps, device, dtype, scaler)
            for optimizer in optimizers.values():
                scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or torch.inf)
            torch.stack((loss, norm)).tolist()
            for optimizer in optimizers.values():
                scaler.step(optimizer)
                optimizer.zero_grad(set_to_none=True)
            scaler.update()

    tokens = steps * micro_steps * config.batch_size * config.block_size
    return Variant(name, run, tokens, model.get_num_params(False), device, model.flops_per_token())


def decoding(name: str, config: DecodeConfig) -> Variant:
    """Samples from random weights, as sample.py draws them: continuations of 16 tokens, or of 1 to
    16 where there are several rows."""
    model, device, dtype = new_model(config)
    store_matrices(model.eval(), dtype)
    prompt = torch.randint(config.vocab_size, (config.num_samples, 16), device=device)
    lengths = 16 - torch.arange(config.num_samples, device=device) % 16
    compiled, length = can_compile(config.compile, device), 16 + config.max_new_tokens
    cache = DecodingCache(min(config.block_size, length)) if compiled else None

    def run() -> None:
        torch.backends.cuda.enable_cudnn_sdp(compiled)  # as in sample.py
        for _ in stream(model, prompt, config.max_new_tokens, 0.8, 200, None, lengths=lengths,
                        cache=cache, compile=compiled, tune=config.tune):
            pass

    return race.decoding_variant(name, model, run, config)


def variant_of(argv: list[str]) -> Variant:
    """What a command line of speed or decode measures: nanoGPT, compiled, if it names it."""
    config = read_options(argv)
    if isinstance(config, DecodeConfig):
        return race.nanogpt_decoding(config) if config.nanogpt else decoding("", config)
    if config.nanogpt:
        return race.nanogpt_training(config, config.steps, compiled=True)
    return training("", config, config.steps)


# -----------------------------------------------------------------------------
# The commands


def speed(config: SpeedConfig, configs: dict[str, SpeedConfig]) -> list[dict]:
    variants = [training(name, c, c.steps) for name, c in configs.items()]
    if config.nanogpt:
        variants += [race.nanogpt_training(config, config.steps, compiled)
                     for compiled in (False, True)]
    rows = alternate(variants, config.repeats)
    device = variants[0].device
    flops = race.matrix_flops(device, pick_dtype(config.dtype, device))
    for row, variant in zip(rows, variants, strict=True):
        row["mflop_per_token"] = variant.flops / 1e6
        row["share_of_peak"] = row["tokens_per_s"] * variant.flops / flops
    print(f"limit: {flops / 1e9:,.0f} GFLOP/s, a large matrix product in the first one's precision")
    return rows


def relative_speeds(configs: dict[str, CompareConfig]) -> dict[str, float]:
    """Tokens per second of training, over those of the first."""
    variants = [training(name, c, c.steps) for name, c in configs.items()]
    rows = alternate(variants, next(iter(configs.values())).repeats)
    return {row["variant"]: row["ratio"] for row in rows}


def decode(config: DecodeConfig, configs: dict[str, DecodeConfig]) -> list[dict]:
    variants = [decoding(name, c) for name, c in configs.items()]
    if config.nanogpt:
        variants.append(race.nanogpt_decoding(config))
    rows = alternate(variants, config.repeats)
    bandwidth = race.memory_bandwidth(variants[0].device)
    for row, variant in zip(rows, variants, strict=True):
        row["mb_per_token"] = variant.bytes / 1e6
        row["share_of_peak"] = row["tokens_per_s"] * variant.bytes / bandwidth
    print(f"limit: {bandwidth / 1e9:,.1f} GB/s, a sum over 256 MB or more")
    return rows


def memory(config: MemoryConfig, configs: dict[str, MemoryConfig]) -> list[dict]:
    jobs = [(name, c, False) for name, c in configs.items()]
    if config.nanogpt:
        jobs.append(("nanogpt", config, True))
    rows: list[dict] = []
    for name, c, nanogpt in jobs:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            try:
                peak, parameters = pool.submit(peak_memory, c, nanogpt).result()
            except BrokenProcessPool:
                fail("the process that measured was killed, perhaps because this machine's memory "
                     "was full; choose smaller sizes")
        rows.append({"variant": name, "parameters": parameters, "peak_mb": peak})
        rows[-1]["ratio"] = peak / (rows[0]["peak_mb"] or 1)
    return rows


def peak_memory(config: MemoryConfig, nanogpt: bool) -> tuple[int, int]:
    """(MB above those before the model was made, parameters); on a CPU of resident memory."""
    device = pick_device(config.device)
    if (before := peak_mb(device)) is None:
        fail("bench.py memory cannot tell a process's memory on this system")
    if nanogpt:
        variant = race.nanogpt_training(config, 2, can_compile(config.compile, device))
    else:
        variant = training("", config, 2)
    variant.run()
    return peak_mb(device) - before, variant.parameters


# -----------------------------------------------------------------------------
# The command line


COMMANDS = {  # name -> its options, what it does
    "speed": (SpeedConfig, speed), "decode": (DecodeConfig, decode),
    "memory": (MemoryConfig, memory), "loss": (race.LossConfig, race.time_to_loss),
    "prepare": (race.PreparingConfig, race.preparing), "eval": (EvalConfig, judge),
    "compare": (CompareConfig, compare), "plot": (PlotConfig, plot),
    "export": (ExportConfig, export), "convert": (ConvertConfig, convert),
    "gpu": (GPUConfig, measure_gpu)}


def read_options(argv: list[str]):
    """The options of a command line, whose first word names the command. --help prints and exits;
    UserError for what is no command or no option of it."""
    name, *words = argv or [""]
    if name in ("-h", "--help"):
        print(f"{__doc__}\ncommands:")
        for name, (cls, _) in COMMANDS.items():
            print(f"  {name:8} {cls.__doc__}")
        sys.exit(0)
    if name not in COMMANDS:
        fail(f"no command {name}{nearest(name, COMMANDS)}" if name else
             f"say what to do: python bench.py {' | '.join(COMMANDS)}")
    cls, _ = COMMANDS[name]
    folders = "runs" if name == "plot" else None
    return read_config(cls, words, folders, usage=cls.__doc__)[0]


def named_variants(argv: list[str], config: MeasureConfig | CompareConfig) -> dict:
    """Label -> options of every variant. A word is "label: options", or options alone."""
    configs: dict[str, MeasureConfig | CompareConfig] = {}
    for word in config.variants:
        label, _, options = word.rpartition(": ")
        label = label or options or "nanoYurii"
        if label in configs:
            fail(f"two variants have the name {label}; put another before a colon: \"{label} 2: "
                 f"{options}\"")
        try:
            more = [f"--{option.removeprefix('--')}" for option in shlex.split(options)]
        except ValueError as error:
            fail(f"variant {label}: {error}; mend its quotation marks")
        configs[label] = read_options([*argv, *more])
    return configs


def measure(argv: list[str], config: Any, function: Callable[..., list[dict]]) -> None:
    """Print the figures of a command, and write them down."""
    machine = race.machine(pick_device(config.device))
    print(machine)
    if isinstance(config, MeasureConfig):
        configs = named_variants(argv, config)
        if len({c.deterministic for c in configs.values()}) > 1:
            fail("deterministic: is a setting of the whole process; give it to all variants")
        rows = function(config, configs)
    else:
        rows = function(config)
    print(race.text_table(rows))
    if config.json:
        with (explain_failures(config.json, mend="choose another --json"),
              open(config.json, "w", encoding="utf-8") as file):
            json.dump(finite({"command": argv, "machine": machine, "rows": rows}), file, indent=1)


def main(argv: list[str]) -> None:
    config = read_options(argv)
    _, function = COMMANDS[argv[0]]
    json_file = getattr(config, "json", None) or "."
    if not os.path.isdir(folder := os.path.dirname(json_file) or "."):
        fail(f"json={json_file}: there is no folder {folder}; make it first")
    places = [getattr(config, name, None) for name in ("out", "plot", "results")]
    with explain_failures(next(filter(None, places), "a temporary or downloaded file"),
                          mend="mend that, or name another place",
                          shrink="halve --batch_size (or, for decode, --num_samples)"):
        if argv[0] in ("plot", "export", "convert"):
            function(config)
        elif argv[0] == "gpu":
            measure_gpu(config, variant_of)
        elif argv[0] == "compare":
            compare(named_variants(argv, config), config, argv, relative_speeds)
        else:
            measure(argv, config, function)


if __name__ == "__main__":
    cli(main)
