"""Measure: how fast a model trains and decodes, what memory it takes, what the rest costs. And
convert: to other formats, to another template.

    python bench.py speed config/shakespeare_char.py --variants "template=gd" "template=nesterov"
    python bench.py speed config/shakespeare_char.py --nanogpt=../nanoGPT
    python bench.py decode config/gpt2_124m.py --nanogpt=../nanoGPT --plot=decode.png
    python bench.py memory config/gpt2_124m.py --variants "template=gd" "template=tmm"
    python bench.py fit config/gpt2_124m.py         the largest micro-batch that a GPU holds
    python bench.py data config/gpt2_124m.py        what reading the data costs
    python bench.py muon config/yurii_owt.py        what the optimiser costs
    python bench.py loss --nanogpt=../nanoGPT       wall time to nanoGPT's loss on Shakespeare
    python bench.py prepare --input=documents.txt --nanogpt=../nanoGPT
    python bench.py start                           how long the programs take to start
    python bench.py eval --ckpt=out --tasks=hellaswag,arc_easy --num_fewshot=10,25
    python bench.py eval --ckpt=out --data=shakespeare_char   perplexity of its val split
    python bench.py eval --ckpt=out/best.pt --data=book.txt   or of a text file
    python bench.py all --nanogpt=../nanoGPT --input=documents.txt   the README's whole table
    python bench.py compare config/study_suite.py --seeds=5    a study: variants x seeds, with a
        table of paired differences and their intervals, in docs/results/
    python bench.py plot out-a out-b --x=tokens --plot=losses.png    runs together; also
        --draw=scalars (mu, beta, ... as learned), --draw=path (the residual stream's way)

    python bench.py export --ckpt=out --format=hf --out=FOLDER    for transformers (a plain GPT)
    python bench.py export --ckpt=out --format=safetensors --out=FOLDER      any model
    python bench.py convert --ckpt=out --template=nesterov --velocity_norm=none --out=FILE.pt

The options are train.py's and a few more. A variant is a word of further options ("template=tmm
dropout=0.1"); all are measured in turn (A B A B ...): a machine that slows down slows all of
them. The figures are medians with the lowest and the highest; warm-up and compilation are stated
apart. nanoGPT's own model, from a folder that you name, runs in the same process. The data are
random ids, whatever the dataset: give --vocab_size, or have GPT-2's. eval's tasks are those of
lm-evaluation-harness (pip install lm-eval).
"""

import contextlib
import importlib.util
import json
import multiprocessing
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
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from config import read_config
from model import GPT, GPTConfig, KVCache
from support.checkpoint import model_from, read_checkpoint
from support.data import Tokens, WindowOrder, prefetch
from support.device import (
    autocast,
    can_compile,
    out_of_memory,
    peak_resident,
    pick_device,
    pick_dtype,
    tune_allocator,
)
from support.errors import UserError, cli, fail
from support.meta import load_meta
from support.muon import Muon
from support.tokenizer import END_OF_TEXT
from tools.compare import compare
from tools.exchange import convert, export
from tools.judge import judge
from tools.options import BenchConfig
from tools.watch import picture, plot
from train import accumulate, make_optimizers, model_args, try_compile

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
    ours: bool = True  # nanoGPT's allocates as it does when it runs alone


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all that it was asked for."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def seconds(run: Callable[[], None], device: torch.device) -> float:
    """How long run() takes, to the end of what it started on the device."""
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - start


def alternate(variants: list[Variant], repeats: int) -> list[dict]:
    """Rows of figures. Each variant warms up twice, which compiles it, then all take turns. The
    ratio is the median of those of neighbours in time."""
    def turn(v: Variant) -> float:
        tune_allocator(v.ours)
        return seconds(v.run, v.device)

    warm_up = [turn(v) for v in variants]
    for v in variants:
        v.run()
        v.waits.clear()
    turns = [[turn(v) for v in variants] for _ in range(repeats)]
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
                   ours.flops_per_token(), 0, device, ours=False)


def decoding(name: str, c: BenchConfig, theirs: torch.nn.Module | None = None) -> Variant:
    """Samples from random weights, drawn as sample.py draws them, or nanoGPT's own: continuations
    of 16 tokens, or of 1 to 16 where there are several rows."""
    device = pick_device(c.device)
    model, n = (theirs or setting(c)[0]).to(device).eval(), c.num_samples
    prompt = torch.randint(c.vocab_size or 50304, (n, 16), device=device)
    how: dict = {}
    dtype = pick_dtype(c.dtype, device)
    context = contextlib.nullcontext()
    if theirs is None:
        model.store_matrices(dtype)
        how = dict(cache=KVCache(min(c.block_size, 16 + c.max_new_tokens)),
                   compile=can_compile(c.compile, device),
                   lengths=16 - torch.arange(n, device=device) % 16)
    elif device.type != "cpu":  # nanoGPT's sample.py has no autocast on a CPU
        context = autocast(device, dtype)

    @torch.no_grad()
    def run() -> None:
        with context:
            model.generate(prompt, c.max_new_tokens, temperature=0.8, top_k=200, **how)

    matrices = {*model.transformer.h.parameters(), model.lm_head.weight}
    return Variant(name, run, n * c.max_new_tokens,
                   sum(p.numel() for p in model.transformer.parameters()),
                   2 * sum(p.numel() for p in matrices),
                   sum(p.numel() * p.element_size() for p in matrices) / n, device,
                   ours=theirs is None)


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
    """Sampling: tokens per second, and what share of the memory's measured bandwidth that is; with
    a plot, of a quarter and half as many tokens too."""
    rows: list[dict] = []
    for part in (4, 2, 1) if c.plot else (1,):
        variants = []
        for name, own in configs.items():
            own.max_new_tokens = max(1, c.max_new_tokens // part)
            variants.append(decoding(name, own))
        if c.nanogpt:
            variants.append(decoding("nanogpt", own, nanogpt_model(own)))
        found = alternate(variants, c.repeats)
        _, bandwidth = peaks(variants[0].device, torch.float32)
        for row, v in zip(found, variants, strict=True):
            row["new_tokens"], row["mb_per_token"] = own.max_new_tokens, v.bytes / 1e6
            row["share_of_peak"] = row["tokens_per_s"] * v.bytes / bandwidth
        rows += found
    print(f"limit: {bandwidth / 1e9:,.1f} GB/s, a sum over 256 MB or more")
    return rows


def memory(configs: dict[str, BenchConfig], c: BenchConfig) -> list[dict]:
    """Peak memory of two training steps, each variant in a process of its own."""
    jobs = [(name, own, False) for name, own in configs.items()]
    jobs += [("nanogpt", c, True)] if c.nanogpt else []
    rows: list[dict] = []
    for name, own, theirs in jobs:
        peak, parameters = apart(peak_memory, own, theirs)
        first = rows[0]["peak_mb"] if rows else peak / 1e6
        rows.append({"variant": name, "parameters": parameters, "peak_mb": peak / 1e6,
                     "ratio": peak / 1e6 / (first or 1.0)})
    return rows


def apart(function: Callable, *args):
    """function(*args), called in a process of its own. UserError if that is killed."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *args).result()
        except BrokenProcessPool:
            fail("the process that measured was killed, perhaps because this machine's memory was "
                 "full; choose smaller sizes")


def fit(configs: dict[str, BenchConfig], c: BenchConfig) -> list[dict]:
    """The largest micro-batch that a GPU's memory holds, each trial in a process of its own."""
    if pick_device(c.device).type != "cuda":
        fail("fit fills the memory of a CUDA GPU, and there is none here; see bench.py memory")
    jobs = [(name, own, False) for name, own in configs.items()]
    jobs += [("nanogpt", c, True)] if c.nanogpt else []
    rows: list[dict] = []
    for name, own, theirs in jobs:
        found = largest(lambda n, own=own, theirs=theirs: apart(
            fits, replace(own, batch_size=n, eval_iters=None), theirs))
        first = rows[0]["micro_batch"] if rows else found
        rows.append({"variant": name, "micro_batch": found, "ratio": found / (first or 1)})
    return rows


def largest(holds: Callable[[int], bool]) -> int:
    """The largest number, to an eighth, for which it is True; 0 if there is none."""
    low, high = 0, 1
    while high < 2**19 and holds(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 8):
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def fits(c: BenchConfig, theirs: bool) -> bool:
    """Whether two training steps end without running out of memory."""
    try:
        peak_memory(c, theirs)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return False
    return True


def peak_memory(c: BenchConfig, theirs: bool) -> tuple[int, int]:
    """(bytes above those before the model was made, parameters); on a CPU of resident memory."""
    c.steps = 2
    if not theirs:
        tune_allocator()  # as train.py does
    with random_data(c.vocab_size or 50304, 200_000) as folder:
        if (before := peak_resident()) is None:
            fail("bench.py memory cannot tell a process's memory on Windows")
        variant = training("", c, folder) if not theirs else nanogpt_training(
            c, folder, can_compile(c.compile, pick_device(c.device)))  # as ours
        variant.run()
        if variant.device.type == "cuda":
            return torch.cuda.max_memory_allocated(), variant.parameters
        return peak_resident() - before, variant.parameters


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


def muon(configs: dict[str, BenchConfig], c: BenchConfig) -> list[dict]:
    """Muon's step, ours and torch's, and what share of a whole training step ours is."""
    rows = []
    with random_data(c.vocab_size or 50304, 2_000_000) as folder:
        for name, own in configs.items():
            own.optimizer, own.steps = "muon", 1
            passes, own.gradient_accumulation_steps = own.gradient_accumulation_steps, 1
            variant = training(name, own, folder)
            model, device, _ = setting(own)
            matrices = list(model.parameter_roles()["matrix"].values())
            for p in matrices:
                p.grad = torch.randn_like(p)
            ours, torchs = (kind(matrices, lr=1e-9) for kind in (Muon, torch.optim.Muon))
            times = [[seconds(f, device) for f in (ours.step, torchs.step, variant.run)]
                     for _ in range(c.repeats + 1)][1:]
            step, theirs, micro = map(statistics.median, zip(*times, strict=True))
            whole = step + passes * (micro - step)
            rows.append({"variant": name, "step_ms": 1e3 * whole, "muon_ms": 1e3 * step,
                         "torch_muon_ms": 1e3 * theirs, "muon_share": step / whole})
    return rows


# --- whole programs ---

HERE = os.path.dirname(os.path.abspath(__file__))


def program(*argv: str, cwd: str = HERE, until: str = "", **environment: str,
            ) -> tuple[float, float, str]:
    """Run Python to its end, or until it prints a text: (wall seconds, the largest resident MB of
    all its processes together where /proc tells, its output). UserError if it fails."""
    environment = os.environ | environment
    environment.pop("THP_MEM_ALLOC_ENABLE", None)  # which model.py sets, for its own processes
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, *argv], cwd=cwd, stdout=output,
                                   stderr=subprocess.STDOUT, env=environment)
        most = 0
        while True:
            try:
                process.wait(0.02)
                break
            except subprocess.TimeoutExpired:
                most = max(most, resident(process.pid))
            if until:
                output.seek(0)
                if until.encode() in output.read():
                    took = time.perf_counter() - start
                    process.kill()
                    process.wait()
                    return took, most / 1e6, ""
        took = time.perf_counter() - start
        output.seek(0)
        text = output.read().decode(errors="replace")
    if process.returncode:
        fail(f"{shlex.join(argv)} failed: {text.strip().splitlines()[-1] if text.strip() else ''}")
    return took, most / 1e6, text


def resident(pid: int) -> int:
    """Bytes of a process and its descendants (Linux; else 0)."""
    total = 0
    with contextlib.suppress(OSError):
        with open(f"/proc/{pid}/statm") as file:
            total = int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            total += sum(resident(int(child)) for child in file.read().split())
    return total


def medians(rows: list[dict], key: str, times: list[tuple[float, ...]]) -> list[dict]:
    """The rows with the median, lowest and highest of their column of times, and the ratio of
    neighbours in time to the first."""
    for i, row in enumerate(rows):
        own = [turn[i] for turn in times]
        row |= {key: statistics.median(own), "low": min(own), "high": max(own),
                "ratio": statistics.median(turn[i] / turn[0] for turn in times)}
    return rows


def start(configs: dict[str, BenchConfig], c: BenchConfig) -> list[dict]:
    """Starting up: importing torch, the help texts, and a run to the end of its first step."""
    with tempfile.TemporaryDirectory() as folder, random_data(65, 100_000) as data:
        shutil.copy(os.path.join(data, "train.bin"), os.path.join(data, "val.bin"))
        letters = [chr(33 + i) for i in range(65)]
        with open(os.path.join(data, "meta.pkl"), "wb") as file:  # nanoGPT's form
            pickle.dump({"vocab_size": 65, "itos": dict(enumerate(letters)),
                         "stoi": {c: i for i, c in enumerate(letters)}}, file)
        first_step = ["train.py", "config/shakespeare_char.py", f"--data_dir={data}", "--dataset=.",
                      "--max_iters=1", "--warmup_iters=0", "--eval_tokens=256", "--batch_size=16",
                      f"--out_dir={folder}/out", "--overwrite"]
        programs = {"import torch": ["-c", "import torch"], "train.py --help": ["train.py", "-h"],
                    "sample.py --help": ["sample.py", "-h"], "first step, 10.6 M": first_step}
        times = [tuple(program(*argv, until="step 0/" if argv == first_step else "")[0]
                       for argv in programs.values())
                 for _ in range(c.repeats + 1)][1:]
    return medians([{"variant": name} for name in programs], "seconds", times)


NANO_LOSS = {  # nanoGPT's runs: on a CPU its documented one
    "cpu": ("shakespeare_char", "--device=cpu --compile=False --eval_iters=20 --log_interval=1 "
            "--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 "
            "--lr_decay_iters=2000 --dropout=0.0"),
    "cuda": ("tinystories", "--dataset=tinystories --block_size=256 --batch_size=64 --n_layer=8 "
             "--n_head=8 --n_embd=512 --max_iters=5000 --lr_decay_iters=5000 --dropout=0.0 "
             "--eval_interval=1000 --eval_iters=50")}


def loss(configs: dict[str, BenchConfig], c: BenchConfig) -> list[dict]:
    """Wall time to nanoGPT's loss: its documented CPU recipe on the characters of Shakespeare and
    config/shakespeare_char_fast.py; on a GPU a model of 51 M parameters on TinyStories and
    config/tinystories_fast.py. Start-up included; losses on the whole validation split."""
    kind = "cuda" if pick_device(c.device).type == "cuda" else "cpu"
    (dataset, words), fast = NANO_LOSS[kind], {"cpu": "shakespeare_char_fast",
                                               "cuda": "tinystories_fast"}[kind]
    data = os.path.abspath(os.path.join(c.data_dir, dataset))
    if not os.path.isfile(os.path.join(data, "meta.json")):
        fail(f"there is no {data}; make it: python prepare.py {dataset}")
    vocab_size = load_meta(data)["padded_vocab_size"]
    with tempfile.TemporaryDirectory() as folder:
        device = [f"--device={c.device}"] * bool(c.device)
        ours = ["train.py", f"config/{fast}.py", f"--data_dir={os.path.abspath(c.data_dir)}",
                f"--out_dir={folder}/ours", "--overwrite", *device]
        runs = {fast: (ours, HERE)}
        if c.nanogpt:
            nano = os.path.join(folder, "nanogpt")
            shutil.copytree(c.nanogpt, nano, ignore=shutil.ignore_patterns(".git", "assets"))
            there = os.path.join(nano, "data", dataset)
            os.makedirs(there, exist_ok=True)
            for split in ("train", "val"):
                shutil.copy(os.path.join(data, f"{split}.bin"), there)
            with open(os.path.join(there, "meta.pkl"), "wb") as file:
                pickle.dump({"vocab_size": vocab_size}, file)
            theirs = ["train.py", "config/train_shakespeare_char.py", *words.split(),
                      "--out_dir=out"]
            runs = {"nanogpt": (theirs, nano), **runs}
        times = [tuple(program(*argv, cwd=cwd)[0] for argv, cwd in runs.values())
                 for _ in range(c.repeats)]
        rows = []
        for name, out in (("nanogpt", f"{folder}/nanogpt/out"), (fast, f"{folder}/ours")):
            if name in runs:
                path = os.path.join(out, "ckpt.pt")
                model = model_from(read_checkpoint(path))
                _, _, said = program(
                    "train.py", f"--init_from={path}", f"--dataset={dataset}", "--eval_only",
                    f"--data_dir={os.path.abspath(c.data_dir)}", f"--out_dir={folder}/none",
                    "--eval_tokens=1000000000", *(device or [f"--device={kind}"]))
                rows.append({"variant": name, "parameters": model.get_num_params(False),
                             "val_loss": float(said.split("val loss")[1].split()[0])})
    return medians(rows, "seconds", times)


def prepare(configs: dict[str, BenchConfig], c: BenchConfig) -> list[dict]:
    """Tokens per second and core, and resident memory of all processes together, of prepare.py and
    of nanoGPT's OpenWebText script with a process for each core, on the documents of a file."""
    if c.input is None:
        fail("name a text file of documents: --input=FILE")
    with tempfile.TemporaryDirectory() as folder:
        runs = {"prepare.py": ["prepare.py", "openwebtext", f"--input={os.path.abspath(c.input)}",
                               f"--data_dir={folder}", "--overwrite"]}
        bins = {"prepare.py": os.path.join(folder, "openwebtext")}
        if c.nanogpt:
            with open(c.input, encoding="utf-8") as text, \
                    open(os.path.join(folder, "documents.jsonl"), "w", encoding="utf-8") as file:
                for document in text.read().split(END_OF_TEXT):
                    if document.strip():
                        file.write(json.dumps({"text": document.strip("\n")}) + "\n")
            with open(os.path.join(c.nanogpt, "data", "openwebtext", "prepare.py")) as file:
                script = file.read()
            script = script.replace("num_proc = 8", f"num_proc = {os.cpu_count()}").replace(
                'load_dataset("openwebtext", num_proc=num_proc_load_dataset)',
                f'load_dataset("json", data_files="{folder}/documents.jsonl")').replace(
                "total_batches = 1024", "total_batches = min(1024, len(dset))")  # few documents
            bins["nanogpt"] = os.path.join(folder, "nanogpt")
            os.mkdir(bins["nanogpt"])
            with open(os.path.join(bins["nanogpt"], "prepare.py"), "w") as file:
                file.write(script)
            runs = {"nanogpt": [os.path.join(bins["nanogpt"], "prepare.py")], **runs}
        times, peaks_mb = [], dict.fromkeys(runs, 0.0)
        for _ in range(c.repeats):
            turn = []
            for name, argv in runs.items():
                shutil.rmtree(os.path.join(folder, "cache"), ignore_errors=True)
                took, most, _ = program(*argv, HF_HOME=os.path.join(folder, "cache"))
                peaks_mb[name] = max(most, peaks_mb[name])
                turn.append(took)
            times.append(tuple(turn))
        tokens = {name: sum(os.path.getsize(os.path.join(bins[name], f"{split}.bin"))
                            for split in ("train", "val")) // 2 for name in runs}
    rates = [tuple(tokens[name] / took / (os.cpu_count() or 1)
                   for name, took in zip(runs, turn, strict=True)) for turn in times]
    return medians([{"variant": name, "tokens": tokens[name], "peak_mb": peaks_mb[name]}
                    for name in runs], "tokens_per_s_core", rates)


# --- all of them ---

CHAR = "config/shakespeare_char.py --vocab_size=65 --dropout=0 --gradient_accumulation_steps=1"
SMALL = "config/gpt2_124m.py"
CPU_TABLE = [  # title, what is aimed at, command
    ("training, 10.6 M parameters", "at least 1.6 x nanoGPT",
     f"speed {CHAR} --batch_size=16 NANOGPT"),
    ("YuriiFormer and TMM, compiled", "at most 5 % slower than GPT",
     f'speed {CHAR} --batch_size=16 --compile=True --variants template=gd template=nesterov '
     f'template=tmm'),
    ("hourglass and SwiGLU of as many parameters, compiled", "reported",
     f'speed {CHAR} --batch_size=16 --compile=True --norm=rmsnorm --variants '
     f'"ffn=swiglu ffn_hidden=1024" "ffn=hourglass ffn_hidden=256"'),
    ("Muon at 491,520 tokens a step", "at most 3 % of a step",
     f"muon {SMALL} --batch_size=1 --gradient_accumulation_steps=480"),
    ("data", "less than 1 % of a step", f"data {CHAR} --batch_size=16"),
    ("preparing data", "at least 1.5 x nanoGPT, below 600 MB", "prepare NANOGPT INPUT"),
    ("decoding, 124 M parameters", "at least 10 x nanoGPT, half of the bandwidth",
     f'decode {SMALL} --variants template=gd template=nesterov "template=gd compile=True" NANOGPT'),
    ("memory of training, 124 M parameters", "momentum at most 10 % more than GPT",
     f'memory {SMALL} --batch_size=4 --gradient_accumulation_steps=1 --block_size=512 --variants '
     f'template=gd loss_chunk=512 activation_checkpointing=True template=nesterov NANOGPT'),
    ("time to a loss", "at most 0.2 x nanoGPT", "loss NANOGPT DATA"),
    ("starting", "help texts at most 1.3 x torch, first step below 10 s", "start")]
CUDA_TABLE = [
    ("training, 124 M parameters", "at least 462,000 tokens/s, 1.15 x nanoGPT",
     f"speed {SMALL} --batch_size=32 --gradient_accumulation_steps=1 NANOGPT"),
    ("YuriiFormer and TMM", "at most 5 % slower than GPT",
     f"speed {SMALL} --batch_size=32 --gradient_accumulation_steps=1 --variants template=gd "
     f"template=nesterov template=tmm"),
    ("hourglass and SwiGLU of as many parameters", "reported",
     'speed config/swiglu_113m.py --gradient_accumulation_steps=1 --batch_size=16 --variants '
     'ffn=swiglu "ffn=hourglass n_layer=6 n_embd=1248 head_dim=64 ffn_hidden=1008"'),
    ("Muon at 491,520 tokens a step", "at most 3 % of a step",
     f"muon {SMALL} --batch_size=32 --gradient_accumulation_steps=15"),
    ("data", "less than 1 % of a step", f"data {SMALL} --batch_size=32"),
    ("decoding, 124 M parameters", "at least 2,000 tokens/s, 5 x nanoGPT",
     f"decode {SMALL} --variants template=gd template=nesterov NANOGPT"),
    ("decoding, 64 prompts of different lengths", "reported",
     f"decode {SMALL} --num_samples=64 --variants template=gd template=nesterov"),
    ("memory of training, 124 M parameters", "momentum at most 10 % more than GPT",
     f"memory {SMALL} --batch_size=32 --gradient_accumulation_steps=1 --variants template=gd "
     f"loss_chunk=4096 activation_checkpointing=True template=nesterov NANOGPT"),
    ("largest micro-batch, 124 M parameters", "at least 1.5 x nanoGPT's",
     f"fit {SMALL} --gradient_accumulation_steps=1 --variants template=gd loss_chunk=4096 NANOGPT"),
    ("time to a loss, 51 M parameters", "at most 0.5 x nanoGPT", "loss NANOGPT DATA")]


def everything(c: BenchConfig) -> list[dict]:
    """The table for this device, one command after the other."""
    device = pick_device(c.device)
    rows = []
    for title, aim, command in CUDA_TABLE if device.type == "cuda" else CPU_TABLE:
        words = {"NANOGPT": c.nanogpt and f"--nanogpt={c.nanogpt}",
                 "DATA": f"--data_dir={c.data_dir}", "INPUT": c.input and f"--input={c.input}"}
        argv = [w for word in shlex.split(command) if (w := words.get(word, word))]
        argv += [f"--device={c.device}"] if c.device else []
        print(f"\n{title} (aim: {aim})\n    python bench.py {shlex.join(argv)}", flush=True)
        if command.startswith("prepare") and not c.input:
            print("not measured: it needs --input=FILE, a text file of documents")
            continue
        try:
            found = measure([*argv, f"--repeats={c.repeats}"])
        except UserError as error:
            print(f"not measured: {error}")
            continue
        print(table(found), flush=True)
        rows += [{"title": title, "aim": aim, **row} for row in found]
    return rows


# -----------------------------------------------------------------------------
# Tables and pictures


COLUMNS = {  # figure -> heading and format
    "variant": ("", "s"), "parameters": ("parameters", ",d"), "new_tokens": ("new tokens", ",d"),
    "tokens": ("tokens", ",d"), "tokens_per_s": ("tokens/s", ",.1f"),
    "tokens_per_s_core": ("tokens/s a core", ",.0f"), "seconds": ("seconds", ".2f"),
    "low": ("lowest", ",.1f"), "high": ("highest", ",.1f"), "ratio": ("x the first", ".3f"),
    "val_loss": ("validation loss", ".4f"), "muon_ms": ("ms Muon", ",.1f"),
    "torch_muon_ms": ("ms torch's", ",.1f"), "muon_share": ("Muon", ".2%"),
    "mflop_per_token": ("MFLOP/token", ",.1f"), "mb_per_token": ("MB/token", ",.1f"),
    "share_of_peak": ("of the limit", ".1%"), "peak_mb": ("peak MB", ",.0f"),
    "micro_batch": ("largest micro-batch", ",d"),
    "reading_us": ("us to read a micro-batch", ",.0f"), "step_ms": ("ms a step", ",.1f"),
    "waiting_share": ("waiting for data", ".2%"), "warm_up_s": ("s warm-up", ".1f"),
    "nats": ("nats/token", ".4f"), "perplexity": ("perplexity", ",.3f"),
    "bits_per_byte": ("bits/byte", ".4f"), "shots": ("shots", "d"), "items": ("items", ",d"),
    "items_per_s": ("items/s", ",.2f"), "acc": ("acc", ".4f"), "acc_stderr": ("+-", ".4f"),
    "acc_norm": ("acc_norm", ".4f"), "acc_norm_stderr": ("+-", ".4f")}


def table(rows: list[dict]) -> str:
    """The figures in columns; a task's own metrics come last."""
    there = {k: (k, ".4f") for row in rows for k in row}
    columns = {k: v for k, v in COLUMNS.items() if k in there} | {
        k: v for k, v in there.items() if k not in COLUMNS}
    cells = [[heading for heading, _ in columns.values()],
             *([format(row[k], form) if k in row else "" for k, (_, form) in columns.items()]
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


def draw(rows: list[dict], path: str) -> None:
    """A PNG of what was measured."""
    key = next(k for k in ("tokens_per_s", "tokens_per_s_core", "seconds", "peak_mb", "muon_share",
                           "waiting_share") if k in rows[0])
    with picture(path, 7, 3.5) as figure:
        draw_figures(rows, figure, key)


def draw_figures(rows: list[dict], figure, key: str) -> None:
    """Figures `key` of the rows: bars with their range, or lines over the number of tokens."""
    names = list(dict.fromkeys(row["variant"] for row in rows))
    if len(rows) > len(names):  # decoding
        axes = figure.add_subplot(xlabel="new tokens", ylabel="seconds", title="time to decode")
        for i, name in enumerate(names):
            points = [(r["new_tokens"], r["new_tokens"] / r[key]) for r in rows
                      if r["variant"] == name]
            axes.plot(*zip(*points, strict=True), marker="o", color=f"C{i}", label=name)
        axes.set_ylim(bottom=0)
        axes.legend()
    else:
        axes = figure.add_subplot(xlabel=COLUMNS[key][0])
        values = [row[key] for row in rows]
        spread = None
        if "low" in rows[0]:
            spread = [[row[key] - row["low"] for row in rows],
                      [row["high"] - row[key] for row in rows]]
        bars = axes.barh(names, values, xerr=spread, color=[f"C{i}" for i in range(len(rows))],
                         capsize=3)
        axes.bar_label(bars, [format(v, COLUMNS[key][1]) for v in values], padding=6)
        axes.margins(x=0.15)
        axes.invert_yaxis()
    axes.grid(alpha=0.3)


# -----------------------------------------------------------------------------
# The command line


def named_variants(argv: list[str], c: BenchConfig) -> dict[str, BenchConfig]:
    """Every variant with its options. A word is "label: options", or options alone."""
    configs: dict[str, BenchConfig] = {}
    for words in c.variants:
        label, colon, options = f"{words} ".partition(": ")
        label, options = (label, options) if colon else (words or "nanoYurii", words)
        if label in configs:
            fail(f"two variants have the name {label}; put another before a colon: \"{label} 2: "
                 f"{options.strip()}\"")
        try:
            more = [f"--{word.removeprefix('--')}" for word in shlex.split(options)]
        except ValueError as error:
            fail(f"variant {label}: {error}; mend its quotation marks")
        configs[label], _ = read_config(BenchConfig, [*argv, *more], positional="command")
    return configs


def measure(argv: list[str]) -> list[dict]:
    """What a command line asks for."""
    c, _ = read_config(BenchConfig, argv, positional="command", usage=__doc__)
    configs = named_variants(argv, c)
    commands = {"speed": speed, "decode": decode, "memory": memory, "data": data, "muon": muon,
                "fit": fit, "loss": loss, "prepare": prepare, "start": start,
                "eval": lambda _, c: judge(c)}
    return commands[c.command](configs, c)


def main(argv: list[str]) -> None:
    try:
        run(argv)
    except BrokenPipeError:  # cli's
        raise
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        fail("out of memory: halve --batch_size (or, for decode, --num_samples)")
    except OSError as error:  # a file or a folder that is not there, or may not be written
        fail(f"{error.filename or ''}: {error.strerror or error}; mend the path")


def run(argv: list[str]) -> None:
    """Measure, print, write down, draw."""
    if argv[:1] == ["plot"]:
        n = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
        argv = ["plot", *argv[n:], *(["--runs", *argv[1:n]] if n > 1 else [])]
    c, _ = read_config(BenchConfig, argv, positional="command", usage=__doc__)
    if c.command is None:
        fail("say what to measure: python bench.py speed | decode | memory | fit | data | muon | "
             "loss | prepare | start | eval | all | compare | plot | export | convert")
    for name, path in (("json", c.json), ("plot", c.plot)):
        if path and not os.path.isdir(os.path.dirname(path) or "."):
            fail(f"{name}={path}: there is no folder {os.path.dirname(path)}; make it first")
    if c.command == "plot":
        return plot(c)
    if c.command in ("export", "convert"):
        print((export if c.command == "export" else convert)(c))
        return
    device = pick_device(c.device)
    if c.command == "compare":
        return compare(named_variants(argv, c), c, argv, lambda: machine(device), speed)
    where = machine(device)
    print(where)
    if c.command == "all":
        rows = everything(c)
    else:
        rows = measure(argv)
        print(table(rows))
    if c.json:
        with open(c.json, "w", encoding="utf-8") as file:
            json.dump({"command": argv, "machine": where, "rows": rows}, file, indent=1)
    if c.plot and c.command not in ("eval", "all"):
        draw(rows, c.plot)


if __name__ == "__main__":
    cli(main)
