"""Generate text from a checkpoint, ours or nanoGPT's, an exported folder, or OpenAI's GPT-2.

    python sample.py --out_dir=out-yurii-tinystories --start="Once upon a time"
    printf "Once upon a" | python sample.py --out_dir=out-yurii-tinystories --start=- --top_p=0.9

The samples are drawn together, as one batch; the first is printed while it is made. Past the
model's context the older half is forgotten and the rest read again.
"""

import codecs
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F

from config import check_least, check_rules, read_config
from model import GPT, KVCache, Template
from support.checkpoint import model_from, read_checkpoint, read_latest
from support.device import can_compile, pick_device, pick_dtype
from support.errors import cli, explain_failures, fail
from support.meta import load_meta, nanogpt_meta
from support.tokenizer import Tokenizer

# -----------------------------------------------------------------------------
# The decoder: a cache of fixed shape, converted matrices, draws, and `stream`, which uses them


class DecodingCache(KVCache):
    """Keys and values of up to max_length tokens a row; lengths (B,) counts those of each row,
    which may differ. No shape ever changes, so all one-token steps are one compiled graph. `crop`
    comes before the first pass: it says how many rows there are."""

    def __init__(self, max_length: int):
        super().__init__(max_length)
        self.lengths: torch.Tensor | None = None

    def crop(self, lengths: torch.Tensor) -> None:
        """Keep the first lengths (B,) tokens of each row. None at all: the cache is used anew, by
        as many rows as before or by others."""
        if self.lengths is None or len(self.lengths) != len(lengths):
            self.lengths, self.slots = keep_address(torch.empty_like(lengths)), []
        self.lengths.copy_(lengths)

    def begin(self, idx: torch.Tensor, block_size: int) -> torch.Tensor:
        """A pass over the next tokens, idx (B, T): their positions (B, T)."""
        self.call = 0
        self.positions = self.lengths[:, None] + torch.arange(idx.size(1), device=idx.device)
        self.rows = torch.arange(idx.size(0), device=idx.device)[:, None]  # (B, 1)
        keys = torch.arange(self.max_length, device=idx.device)
        self.mask = (keys <= self.positions[:, :, None])[:, None]  # (B, 1, T, max_length)
        return self.positions

    def extend(self, k: torch.Tensor, v: torch.Tensor,
               ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Store k, v (B, H, T, d_head) of the pass; return all, and the mask of what is seen."""
        if self.call == len(self.slots):
            shape = (k.size(0), self.max_length, k.size(1), k.size(3))
            self.slots.append((keep_address(k.new_zeros(shape)), keep_address(v.new_zeros(shape))))
        keys, values = self.slots[self.call]  # (B, max_length, H, d_head)
        self.call += 1
        keys[self.rows, self.positions] = k.transpose(1, 2)
        values[self.rows, self.positions] = v.transpose(1, 2)
        return keys.transpose(1, 2), values.transpose(1, 2), self.mask

    def end(self) -> None:
        """The pass is complete."""
        self.lengths += self.positions.size(1)
        self.positions, self.rows, self.mask = None, None, None


def keep_address(x: torch.Tensor) -> torch.Tensor:
    """x, marked as a tensor that stays where it is, so that CUDA graphs need not copy it."""
    if x.is_cuda:
        torch._dynamo.mark_static_address(x)
    return x


@torch.library.custom_op("nanoyurii::matvec", mutates_args=())
def matvec(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """weight (N, C) times x (C,) -> (N,): torch.mv, as an operator that torch.compile leaves whole
    (it would write a slower multiply-and-sum)."""
    return torch.mv(weight, x)


@matvec.register_fake
def _(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(weight.size(0))


class DecodingLinear(nn.Linear):
    """nn.Linear for inference: it computes in the precision of its weights. On a CPU a single row,
    as in decoding, is multiplied as a vector: torch.mv reads the weights up to twice as fast as the
    matrix product does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in_features) -> (..., out_features)."""
        x = x.to(self.weight.dtype)
        if x.numel() > self.in_features or not x.is_cpu:
            return super().forward(x)
        product = matvec if torch.compiler.is_compiling() else torch.mv
        y = product(self.weight, x.flatten())
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], -1)


@torch.no_grad()
def store_matrices(model: nn.Module, dtype: torch.dtype) -> None:
    """For inference without autocast: convert the linears once, as autocast would at every call,
    for the same numbers, and map the templates' scalars once. The rest is fp32, or fp64 as they
    are; the head becomes a copy of the token table. Beside other matrices, which a fork may have,
    linears stay fp32: two precisions would meet."""
    model = model.double() if dtype == torch.float64 else model.float()  # not complex buffers
    plain = (nn.Linear.forward, nn.Embedding.forward, DecodingLinear.forward)
    other = any(p.ndim > 1 and type(m).forward not in plain and not isinstance(m, Template)
                for m in model.modules() for p in m.parameters(recurse=False))
    for module in model.modules():
        if isinstance(module, Template):
            mapped = {name: nn.Parameter(module.scalar(name)) for name in module.learned}
            module.scalar = mapped.get
        if isinstance(module, nn.Linear) and not other:
            module.__class__ = DecodingLinear
            for name, p in list(module.named_parameters()):
                setattr(module, name, nn.Parameter(p.detach().to(dtype), requires_grad=False))


def draw(logits: torch.Tensor, uniform: torch.Tensor, temperature: float = 1.0,
         top_k: int | None = None, top_p: float | None = None) -> torch.Tensor:
    """One token id per row of logits (B, V), by its number uniform (B,) -> (B,); -1 where a logit
    is not finite. See `stream`."""
    finite, n = logits.amax(dim=-1).isfinite(), logits.size(-1)
    if temperature < 1e-6:
        return torch.where(finite, logits.argmax(dim=-1), -1)
    kept = n if top_k is None else min(top_k, n)
    ranked = kept < n or top_p is not None
    if ranked:
        logits, ids = logits.topk(kept, sorted=top_p is not None)  # (B, kept)
    probs = (logits / temperature).softmax(dim=-1)
    if top_p is not None:
        likelier = probs.cumsum(dim=-1) - probs  # the probability of all likelier tokens together
        probs = probs.masked_fill((likelier >= top_p) & (likelier > 0), 0.0)
    reached = probs.cumsum(dim=-1)
    drawn = (reached > uniform[:, None] * reached[:, -1:]).int().argmax(dim=-1)  # the first
    return torch.where(finite, ids.gather(1, drawn[:, None])[:, 0] if ranked else drawn, -1)


def next_token(model: GPT, token: torch.Tensor, cache: KVCache, uniform: torch.Tensor,
               *how) -> torch.Tensor:
    """The step that decoding compiles: read token (B,), draw the next (B,)."""
    logits = model(token.clamp(min=0)[:, None], cache=cache)[0][:, -1]  # (B, V)
    return draw(logits[:, :model.config.vocab_used].float(), uniform, *how)


NOT_FINITE = ("the model's logits are nan or infinite: numbers too large for the precision; use "
              "--dtype=float32, and if that is in use, another checkpoint")


def check_finite(values: torch.Tensor) -> None:
    """UserError where logits or losses are not."""
    if not values.sum().isfinite():
        fail(NOT_FINITE)


def read_tokens(tokens: torch.Tensor) -> list[int]:
    """What `stream` yields, on the CPU. UserError where logits were not finite."""
    ids = tokens.tolist()
    if -1 in ids:
        fail(NOT_FINITE)
    return ids


def prefill(model: GPT, text: torch.Tensor, start: torch.Tensor, count: torch.Tensor,
            cache: KVCache) -> torch.Tensor:
    """Fill the cache with tokens start (B,) to count (B,) of each row of text (B, S): the logits
    (B, V) of what follows them."""
    lengths, ragged = count - start, isinstance(cache, DecodingCache)
    places = start[:, None] + torch.arange(int(lengths.max()), device=text.device)
    windows = text.gather(1, places.clamp(max=text.size(1) - 1))  # (B, T); past `count` any token
    cache.length = 0
    if ragged:
        cache.crop(torch.zeros_like(lengths))
    x = model.hidden(windows, cache)  # (B, T, C)
    if ragged:
        cache.crop(lengths)
    return model.logits(x[torch.arange(len(x), device=x.device), lengths - 1])


@torch.no_grad()
def stream(model: GPT, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0,
           top_k: int | None = None, top_p: float | None = None, seed: int = 0,
           numbers: Sequence[int] | None = None, lengths: torch.Tensor | None = None,
           cache: DecodingCache | None = None, compile: bool = False, tune: bool = False,
           ) -> Iterator[torch.Tensor]:
    """Continue idx (B, T >= 1), or of every row its first lengths (B,) >= 1 tokens: yield the next
    token of every row, (B,), max_new_tokens times.

    temperature 0 (or below 1e-6) is greedy; top_k keeps the k likeliest tokens, top_p the fewest
    whose probability reaches p. A row's draws follow from the seed and its number (0, 1, ...;
    `numbers` where a batch has others), so that they are the same in every batch. Rows beyond
    vocab_used are never drawn; -1 is, where logits are not finite. When a row's context is full its
    older half is dropped and the rest read again, so that it has T/2 to T tokens. compile: the step
    from one token to the next, with CUDA graphs where there is CUDA; tune: try its kernels out,
    which takes as long again. cache: one to use anew, for which nothing need be compiled again.
    """
    (B, T), device = idx.shape, idx.device
    size = model.config.block_size
    longest = min(size, T + max_new_tokens - 1)  # the last token is drawn, but not read
    count = torch.full((B,), T, device=device) if lengths is None else lengths  # tokens of each row
    if cache is None:
        fixed = compile or bool((count != T).any())
        cache = DecodingCache(longest) if fixed else KVCache(longest)
    if longest > cache.max_length:
        raise ValueError(f"{longest} tokens: there is room for {cache.max_length} (the cache's "
                         f"length); make a larger one")
    if not (1 <= count.min() and count.max() <= T):
        raise ValueError(f"lengths={count.tolist()}: must lie in 1..{T}")
    how = (temperature, top_k, top_p)
    step = next_token
    if compile:
        options = {"triton.cudagraphs": idx.is_cuda, "coordinate_descent_tuning": tune}
        step = torch.compile(next_token, dynamic=False, options=options)

    text = F.pad(idx.long(), (0, max_new_tokens))  # (B, T + new): rows begin at 0 and grow
    start = (count - size).clamp(min=0)  # (B,) where each row's window begins
    room = 0  # how many tokens more the longest window may have
    draws = [np.random.default_rng([seed, number]).random(max_new_tokens, np.float32)
             for number in numbers or range(B)]
    uniform = torch.tensor(np.stack(draws, axis=1), device=device)  # (new, B)
    drawn: list[torch.Tensor] = []  # (B,) each; not yet in `text`
    for i in range(max_new_tokens):
        if room == 0:
            for token in drawn:
                text.scatter_(1, count[:, None], token[:, None])
                count = count + 1
            drawn = []
            start = torch.where(count - start > size, count - max(1, size // 2), start)
            logits = prefill(model, text, start, count, cache)
            token = draw(logits[:, :model.config.vocab_used].float(), uniform[i], *how)
            room = size - int((count - start).max())
        else:
            if compile:  # else it would import torch's compiler, which takes seconds
                torch.compiler.cudagraph_mark_step_begin()
            token = step(model, token, cache, uniform[i], *how).clone()  # graphs reuse theirs
            room -= 1
        drawn.append(token)
        yield token


# -----------------------------------------------------------------------------
# The command


@dataclass
class SampleConfig:
    """Every option of sample.py."""

    out_dir: str = "out"  # the run to sample from: its ckpt.pt or best.pt
    init_from: str = "resume"  # resume (out_dir's checkpoint), a .pt file, a folder, gpt2*
    start: str = "\n"  # the prompt; FILE:path reads it from a file, - from standard input
    num_samples: int = 3  # drawn together, as one batch
    max_new_tokens: int = 500  # per sample
    temperature: float = 0.8  # 0 is greedy; below 1 less, above 1 more random
    top_k: int | None = 200  # only the k likeliest tokens; auto: all
    top_p: float | None = None  # only the likeliest tokens that together reach this probability
    stop: str | None = None  # end a sample before this text: "<|endoftext|>", "\n" (a newline)
    seed: int = 1337  # of the draws
    data_dir: str = "data"  # where a nanoGPT checkpoint's meta.pkl is
    device: str | None = None  # cpu, cuda, cuda:1, mps; auto: the best there is
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None  # auto: bf16 if fast
    compile: bool | None = None  # torch.compile of a step; auto: on CUDA, for 2,000 tokens or more
    tune: bool | None = None  # kernels tried out as well; auto: for 150,000 tokens or more

    def __post_init__(self) -> None:
        check_rules(self)

    def rules(self, rule: Callable[[bool, str], None]) -> None:
        """What a type cannot express: rule(what must hold, what to say where it does not)."""
        rule(1 <= self.num_samples <= 100_000,
             f"num_samples={self.num_samples}: must be at least 1, at most 100000")
        check_least(self, rule, 1, "max_new_tokens")
        check_least(self, rule, 0, "temperature", "seed")
        rule(self.top_k is None or self.top_k >= 1,
             f"top_k={self.top_k}: must be at least 1; auto keeps all tokens")
        rule(self.top_p is None or 0 < self.top_p <= 1,
             f"top_p={self.top_p}: must lie in (0, 1]; auto keeps all tokens")


def load_model(config: SampleConfig) -> tuple[GPT, Tokenizer]:
    """The model (on the CPU, in eval mode) and the tokenizer it was trained with."""
    checkpoint = load_checkpoint(config)
    model = model_from(checkpoint, dropout=0.0)
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
    whole = os.path.isfile(os.path.join(folder, "train.bin"))  # nanoGPT's needs meta.pkl alone
    meta = load_meta(folder) if whole else nanogpt_meta(Path(folder), {})
    if size in (meta["vocab_size"], meta["padded_vocab_size"]):
        return meta
    if size in (50257, 50304):
        return {"tokenizer": "gpt2"}
    unknown = f"the checkpoint has {size} token ids and does not say which"
    if dataset:
        fail(f"{unknown}; put the data that it was trained on, with its meta.pkl, in {folder}")
    fail(f"{unknown}, nor names its data; sample from the run's own checkpoint, or export that "
         f"with --format=safetensors")


def read_prompt(start: str) -> str:
    """The prompt's text: as it stands, from FILE:path, or from standard input (-)."""
    if start != "-" and not start.startswith("FILE:"):
        return start
    try:
        data = (sys.stdin.buffer.read() if start == "-" else
                Path(start[5:]).expanduser().read_bytes())
        return io.StringIO(data.decode("utf-8-sig"), newline=None).read()  # any line end is \n
    except (OSError, UnicodeDecodeError) as error:
        fail(f"cannot read the prompt {start}: {error}")


class Sample:
    """The text of one row, token by token, up to the first of the stop texts."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]):
        self.tokenizer, self.stops = tokenizer, stops
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.text, self.shown, self.done = "", 0, False

    def add(self, token: int | None) -> str:
        """What of the text can be shown now: whole characters, and nothing of a stop text. None:
        no token follows."""
        if not self.done:
            data = b"" if token is None else self.tokenizer.token_bytes(token)
            self.text = whole = self.text + self.decoder.decode(data, final=token is None)
            for stop in self.stops:
                self.text = self.text.partition(stop)[0]
            self.done = token is None or self.text != whole
        held_back = 0 if self.done else max(map(len, self.stops), default=1) - 1  # may begin one
        start, self.shown = self.shown, max(self.shown, len(self.text) - held_back)
        return self.text[start:self.shown]


def draw_samples(model: GPT, tokenizer: Tokenizer, config: SampleConfig, prompt: str,
                 ) -> Iterator[str]:
    """Yield the pieces of the text to print: the first sample as it is made, then the others."""
    device = next(model.parameters()).device
    wanted, n = config.compile, config.max_new_tokens
    if wanted is None and n < 2000:  # an H100: 185 tokens/s, or 1,750 after 14 s of compiling
        wanted = False
    compiled = can_compile(wanted, device)
    torch.backends.cuda.enable_cudnn_sdp(compiled)  # eager, it plans anew for every length
    tuned = n >= 150_000 if config.tune is None else config.tune
    ids = tokenizer.encode_prompt(prompt)
    if not ids:
        fail("the prompt is empty; give --start some text, a newline at least")
    idx = torch.tensor(ids, device=device).repeat(config.num_samples, 1)  # (num_samples, T)
    stops = [config.stop, config.stop.replace(r"\n", "\n")] if config.stop else []
    samples = [Sample(tokenizer, stops) for _ in range(config.num_samples)]
    yield prompt
    for tokens in stream(model, idx, config.max_new_tokens, config.temperature, config.top_k,
                         config.top_p, config.seed, compile=compiled, tune=tuned):
        pieces = [sample.add(token)
                  for sample, token in zip(samples, read_tokens(tokens), strict=True)]
        yield pieces[0]
        if all(sample.done for sample in samples):
            break
    yield samples[0].add(None) + "\n"
    for sample in samples[1:]:
        sample.add(None)
        yield f"{'-' * 15}\n{prompt}{sample.text}\n"


def main(argv: list[str]) -> None:
    config, _ = read_config(SampleConfig, argv, usage=__doc__)
    device = pick_device(config.device)
    prompt = read_prompt(config.start)
    model, tokenizer = load_model(config)
    dtype = pick_dtype(config.dtype, device)
    with explain_failures("standard output", mend="print to another place",
                   shrink="halve --num_samples or --max_new_tokens, or use --device=cpu"):
        store_matrices(model.to(device), dtype)
        for piece in draw_samples(model, tokenizer, config, prompt):
            print(piece, end="", flush=True)


if __name__ == "__main__":
    cli(main)
