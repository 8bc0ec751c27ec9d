"""Generate text from a checkpoint, ours or nanoGPT's, an exported folder, or OpenAI's GPT-2.

    python sample.py --out_dir=out-yurii-tinystories --start="Once upon a time"
    printf "Once upon a" | python sample.py --out_dir=out-yurii-tinystories --start=- --top_p=0.9

The samples are drawn together, as one batch; the first is printed while it is made. Past the
model's context the older half is forgotten and the rest read again (a sliding window).
"""

import codecs
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from config import read_config
from model import GPT
from support.checkpoint import model_from, read_checkpoint, read_latest
from support.device import can_compile, out_of_memory, pick_device, pick_dtype
from support.errors import cli, fail
from support.meta import load_meta
from support.tokenizer import Tokenizer


@dataclass
class SampleConfig:
    """Every option of sample.py."""

    out_dir: str = "out"  # the run to sample from: its ckpt.pt or best.pt
    init_from: str = "resume"  # resume (out_dir's checkpoint), a .pt file, a folder, gpt2*
    start: str = "\n"  # the prompt; FILE:path reads it from a file, - from standard input
    num_samples: int = 3  # drawn together, as one batch
    max_new_tokens: int = 500  # per sample
    temperature: float = 0.8  # 0 is greedy; below 1 less, above 1 more random
    top_k: int | None = 200  # only the k likeliest tokens; None: all
    top_p: float | None = None  # only the likeliest tokens that together reach this probability
    stop: str | None = None  # end a sample before this text, e.g. "<|endoftext|>"
    seed: int = 1337  # of the draws
    data_dir: str = "data"  # where a nanoGPT checkpoint's meta.pkl is
    device: str | None = None  # cpu, cuda, cuda:1, mps; auto: the best there is
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None  # auto: bf16 if fast
    compile: bool | None = None  # torch.compile of the one-token step; auto: on CUDA

    def __post_init__(self) -> None:
        problems = [f"{name}={value}: {rule}" for bad, name, value, rule in (
            (not 1 <= self.num_samples <= 100_000, "num_samples", self.num_samples,
             "must be at least 1, at most 100000"),
            (self.max_new_tokens < 1, "max_new_tokens", self.max_new_tokens, "must be at least 1"),
            (self.temperature < 0, "temperature", self.temperature, "must not be negative"),
            (self.top_k is not None and self.top_k < 1, "top_k", self.top_k,
             "must be at least 1; None keeps all tokens"),
            (self.top_p is not None and not 0 < self.top_p <= 1, "top_p", self.top_p,
             "must lie in (0, 1]; None keeps all tokens"),
            (self.stop == "", "stop", '""', "must not be empty"),
        ) if bad]
        if problems:
            raise ValueError("\n".join(problems))


def load_model(config: SampleConfig) -> tuple[GPT, Tokenizer]:
    """The model (on the CPU, in eval mode) and the tokenizer it was trained with."""
    if (config.init_from.startswith("gpt2") and not config.init_from.endswith(".pt")
            and not os.path.isdir(config.init_from)):
        model, meta = GPT.from_pretrained(config.init_from), {"tokenizer": "gpt2"}
    else:
        checkpoint = load_checkpoint(config)
        model = model_from(checkpoint, dropout=0.0)
        if not all(p.isfinite().all() for p in model.parameters()):
            fail("the checkpoint's weights are nan or infinite: its run broke; use another one")
        meta = checkpoint.get("tokenizer") or nanogpt_tokenizer(checkpoint, config.data_dir)
    tokenizer = Tokenizer.from_meta(meta)
    if tokenizer.n_vocab > model.config.vocab_size:
        fail(f"the tokenizer {tokenizer.name} has {tokenizer.n_vocab} ids, the model only "
             f"{model.config.vocab_size}: it was trained with another one")
    model.config.vocab_used = tokenizer.n_vocab
    return model.eval(), tokenizer


def load_checkpoint(config: SampleConfig) -> dict:
    """The latest of a run, or best.pt if the run asked for it (always_save_checkpoint=False)."""
    if config.init_from != "resume":
        return read_checkpoint(config.init_from)
    latest = read_latest(config.out_dir)
    best = os.path.join(config.out_dir, "best.pt")
    wanted = latest is None or not latest.get("config", {}).get("always_save_checkpoint", True)
    if wanted and os.path.exists(best):
        return read_checkpoint(best)
    return latest or read_checkpoint(os.path.join(config.out_dir, "ckpt.pt"))


def nanogpt_tokenizer(checkpoint: dict, data_dir: str) -> dict:
    """A nanoGPT checkpoint does not say its tokenizer: its data folder does, or its vocabulary."""
    dataset = checkpoint.get("config", {}).get("dataset")
    folder = os.path.join(data_dir, str(dataset))
    size = checkpoint["model_args"]["vocab_size"]
    if os.path.isfile(os.path.join(folder, "train.bin")):
        meta = load_meta(folder)
        if size in (meta["vocab_size"], meta["padded_vocab_size"]):
            return meta
    if size in (50257, 50304):
        return {"tokenizer": "gpt2"}
    fail(f"the checkpoint has {size} token ids and does not say which" + (
        f"; put the data that it was trained on, with its meta.pkl, in {folder}" if dataset else
        ", nor names its data; sample from the run's own checkpoint, or export that with "
        "--format=safetensors"))


def read_prompt(start: str) -> str:
    """The prompt's text: as it stands, from FILE:path, or from standard input (-)."""
    if start != "-" and not start.startswith("FILE:"):
        return start
    try:
        if start == "-":
            return sys.stdin.buffer.read().decode()
        with open(start[5:], "rb") as file:
            return file.read().decode()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"cannot read the prompt {start}: {error}")


class Sample:
    """The text of one row, token by token. `add` returns what may be shown already: whole
    characters, and nothing that may turn out to begin the stop text."""

    def __init__(self, tokenizer: Tokenizer, stop: str | None):
        self.tokenizer, self.stop = tokenizer, stop
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.text, self.shown, self.done = "", 0, False

    def add(self, token: int) -> str:
        if self.done:
            return ""
        self.text += self.decoder.decode(self.tokenizer.token_bytes(token))
        if self.stop and (found := self.text.find(self.stop, max(0, self.shown))) >= 0:
            self.text, self.done = self.text[:found], True
        return self.show(0 if self.done else self.held_back())

    def held_back(self) -> int:
        """How many characters at the end are a beginning of the stop text."""
        longest = min(len(self.stop or "") - 1, len(self.text) - self.shown)
        return next((n for n in range(longest, 0, -1) if self.text.endswith(self.stop[:n])), 0)

    def finish(self) -> str:
        if not self.done:
            self.text += self.decoder.decode(b"", final=True)
        return self.show(0)

    def show(self, held_back: int) -> str:
        start, self.shown = self.shown, len(self.text) - held_back
        return self.text[start:self.shown]


def draw_samples(model: GPT, tokenizer: Tokenizer, config: SampleConfig, prompt: str,
                 ) -> Iterator[str]:
    """Yield the pieces of the text to print: the first sample as it is made, then the others."""
    device, c = next(model.parameters()).device, config
    compiled = can_compile(c.compile, device, partial(print, file=sys.stderr))
    ids = tokenizer.encode_prompt(prompt)
    if not ids:
        fail("the prompt is empty; give --start some text, a newline at least")
    idx = torch.tensor(ids, device=device).repeat(c.num_samples, 1)  # (num_samples, T)
    generator = torch.Generator(device).manual_seed(c.seed)
    samples = [Sample(tokenizer, c.stop) for _ in range(c.num_samples)]
    yield prompt
    for tokens in model.stream(idx, c.max_new_tokens, c.temperature, c.top_k, c.top_p,
                               generator=generator, compile=compiled):
        pieces = [sample.add(token) for sample, token in zip(samples, tokens.tolist(), strict=True)]
        yield pieces[0]
        if all(sample.done for sample in samples):
            break
    yield samples[0].finish() + "\n"
    for sample in samples[1:]:
        sample.finish()
        yield f"{'-' * 15}\n{prompt}{sample.text}\n"


def main(argv: list[str]) -> None:
    config, _ = read_config(SampleConfig, argv, usage=__doc__)
    device = pick_device(config.device)
    prompt = read_prompt(config.start)
    model, tokenizer = load_model(config)
    dtype = pick_dtype(config.dtype, device)
    try:
        model.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
        model.store_matrices(dtype)
        for piece in draw_samples(model, tokenizer, config, prompt):
            print(piece, end="", flush=True)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        fail("out of memory: halve --num_samples or --max_new_tokens, or use --device=cpu")


if __name__ == "__main__":
    cli(main)
