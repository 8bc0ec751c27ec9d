"""Judging a checkpoint: the tasks of lm-evaluation-harness, and the perplexity of text."""

import importlib.util
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from config import check_least, nearest
from model import GPT
from sample import Sample, check_finite, load_model, read_tokens, store_matrices, stream
from support.checkpoint import check_tokenizer
from support.device import pick_device, pick_dtype, tune_allocator
from support.errors import UserError, fail, reason
from support.meta import load_meta
from support.terminal import progress
from support.text import file_pieces
from support.tokenizer import Tokenizer
from tools import ToolConfig, validation_rows
from tools.exchange import checkpoint_named


@dataclass
class EvalConfig(ToolConfig):
    """Judge a checkpoint on tasks of lm-evaluation-harness, or by the perplexity of a text."""

    ckpt: str | None = None  # a run's or exported folder, a .pt file, gpt2*
    tasks: str | None = None  # names of lm-evaluation-harness, with commas between them
    num_fewshot: str | None = None  # examples in the prompt, one number or one for each task
    include_path: str | None = None  # a folder with task files (YAML) of your own
    limit: int | None = None  # only the first items of each task
    data: str | None = None  # instead of tasks: a folder in data_dir, or a UTF-8 text file
    field: str = "text"  # the text's name where --data is a file of records
    data_dir: str = "data"  # where the data folders are
    eval_tokens: int = 4_915_200  # tokens of a folder's validation split, capped at the split
    batch_size: int = 12  # requests at once
    seed: int = 1337  # of sampled answers
    device: str | None = None  # cpu, cuda, cuda:1, mps; auto: the best there is
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None  # auto: fp32 on a CPU
    json: str | None = None  # a file to write the figures to

    def rules(self, rule: Callable[[bool, str], None]) -> None:
        super().rules(rule)
        rule(bool(self.ckpt) and bool(self.tasks) != bool(self.data),
             "say what to judge and on what: --ckpt=FOLDER or FILE.pt, and either "
             "--tasks=hellaswag,arc_easy or --data=NAME or TEXTFILE")
        check_least(self, rule, 0, "seed")


def judge(config: EvalConfig) -> list[dict]:
    """How good a checkpoint is, on tasks or on text."""
    if config.tasks and importlib.util.find_spec("lm_eval") is None:
        fail("eval needs lm-eval: pip install lm-eval")
    model, tokenizer = load_model(checkpoint_named(config.ckpt, config.data_dir))
    device = pick_device(config.device)
    if device.type == "cpu":
        tune_allocator()
    dtype = pick_dtype(config.dtype or ("float32" if device.type == "cpu" else None), device)
    store_matrices(model.to(device), dtype)
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every length
    return (on_tasks if config.tasks else on_text)(model, tokenizer, config)


# -----------------------------------------------------------------------------
# Text


@torch.no_grad()
def on_text(model: GPT, tokenizer: Tokenizer, config: EvalConfig) -> list[dict]:
    """Perplexity of the validation split of a data folder, or of a text file. A token is predicted
    from those before it in its window of block_size.

    Bits per byte are of the bytes that the predicted tokens decode to; the end-of-text id has
    bits, but no bytes. They are nan for nanoGPT's tables in which ids may lack their text.
    """
    T, device, start = model.config.block_size, next(model.parameters()).device, time.perf_counter()
    sizes = np.array([0 if i == tokenizer.eot else len(tokenizer.token_bytes(i))
                      for i in range(tokenizer.n_vocab)])
    total, n_tokens, n_bytes = 0.0, 0, 0
    batches = windows(tokenizer, config, T).split(max(1, 4096 // T))
    for rows in progress(batches, "predicting"):
        x, y = rows[:, :-1].clamp(min=0), rows[:, 1:]  # (B, T)
        losses = model(x.to(device), y.to(device), return_logits=False, reduction="none")[1]
        check_finite(losses)
        total += losses.cpu().double().sum().item()
        predicted = y[y >= 0]
        n_tokens += len(predicted)
        n_bytes += int(sizes[predicted].sum())
    nats = total / n_tokens
    if not isinstance(tokenizer.alphabet, str):
        n_bytes = math.nan
    return [{"variant": config.data, "tokens": n_tokens, "nats": nats,
             "perplexity": math.exp(min(nats, 700)),
             "bits_per_byte": total / math.log(2) / (n_bytes or 1),
             "tokens_per_s": n_tokens / (time.perf_counter() - start)}]


def windows(tokenizer: Tokenizer, config: EvalConfig, T: int) -> torch.Tensor:
    """The windows (N, T + 1) of token ids of --data, which share their ends.

    Of a folder they are train.py's, at most eval_tokens, so that the figure is train.py's
    validation loss. Of a file, which is read as prepare.py reads it, every token but the first is
    predicted, so the last window is filled up with -1.
    """
    data, folder = config.data, os.path.join(config.data_dir, config.data)
    if os.path.isfile(data):
        pieces = list(tokenizer.divide(file_pieces([Path(data)], config.field)))
        ids = tokenizer.encode_pieces(pieces, tokenizer.eot is not None)
        if len(ids) < 2:
            fail(f"data={data} has {len(ids)} tokens, and the first is not predicted; give more")
        whole = torch.nn.functional.pad(torch.from_numpy(ids), (0, -(len(ids) - 1) % T), value=-1)
        return whole.unfold(0, T + 1, T)
    if not os.path.isdir(folder):
        fail(f"data={data}: there is neither such a text file nor the folder {folder}")
    meta = load_meta(folder)
    check_tokenizer(folder, meta, {"tokenizer": tokenizer.to_meta()})
    rows = validation_rows(folder, T, config.eval_tokens)
    return torch.from_numpy(rows.numpy().view(meta["dtype"]).astype(np.int64))


# -----------------------------------------------------------------------------
# Tasks


def on_tasks(model: GPT, tokenizer: Tokenizer, config: EvalConfig) -> list[dict]:
    """Tasks of lm-evaluation-harness, its own or those of include_path, one after the other."""
    from lm_eval import simple_evaluate

    names = [name.strip() for name in config.tasks.strip(", ").split(",")]
    shots = (config.num_fewshot or "auto").split(",")
    if len(shots) == 1:
        shots *= len(names)
    if len(shots) != len(names) or not all(n == "auto" or n.isdecimal() for n in shots):
        fail(f"num_fewshot={config.num_fewshot}: expected one whole number, or one for each of the "
             f"{len(names)} tasks, with commas between them")
    manager, rows = task_manager(config, names), []
    judged = harness_model(model, tokenizer, config)
    for name, n in zip(names, shots, strict=True):
        try:
            manager.load([name])
        except Exception as error:  # its file and its data may be broken in any way
            fail(f"cannot load the task {name}: {reason(error)}; without a network, give a task of "
                 f"your own with files: --include_path")
        start = time.perf_counter()
        try:
            found = simple_evaluate(judged, tasks=[name], limit=config.limit, task_manager=manager,
                                    num_fewshot=None if n == "auto" else int(n), log_samples=False)
        except UserError as error:
            fail(f"task {name}: {error}")
        except (IndexError, ValueError) as error:  # an item without text; too few examples; ...
            fail(f"task {name}: {reason(error)}")
        items = {task: n["effective"] for task, n in found["n-samples"].items()}
        rate = sum(items.values()) / (time.perf_counter() - start)
        for task, metrics in found["results"].items():  # of a group there are several
            row = {"shots": found["n-shot"].get(task), "items": items.get(task),
                   "items_per_s": rate}
            row |= {k.removesuffix(",none"): v for k, v in metrics.items() if "," in k}
            numbers = {k: v for k, v in row.items() if isinstance(v, (int, float))}
            rows.append({"variant": task, **numbers})
    return rows


def task_manager(config: EvalConfig, names: list[str]):
    """lm-evaluation-harness's, which knows these tasks."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=config.include_path, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):  # all of the harness's, which takes seconds
        manager = TaskManager(include_path=config.include_path)
    for name in set(names) - set(manager.all_tasks):
        hint = nearest(name, manager.all_tasks)
        fail(f"no task {name}{hint or '; lm-eval ls tasks lists them; --include_path adds yours'}")
    return manager


def harness_model(model: GPT, tokenizer: Tokenizer, config: EvalConfig):
    """The model as lm-evaluation-harness asks for it. Its TemplateLM divides text into context and
    continuation; <|endoftext|> in a text is the id, as in its own `hf` backend. An empty context
    is the end-of-text id, or a newline where the tokenizer has none (char)."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import Collator, normalize_gen_kwargs

    class HarnessModel(TemplateLM):
        @property
        def eot_token_id(self) -> int:
            return tokenizer.encode("\n")[0] if tokenizer.eot is None else tokenizer.eot

        def tok_encode(self, string: str, *_, **__) -> list[int]:
            return tokenizer.encode_prompt(string)

        def _loglikelihood_tokens(self, requests: list, **_) -> list[tuple[float, bool]]:
            for texts, _, answer in requests:
                if texts and not answer:  # the hf backend refuses it, too
                    fail(f"the answer {texts[1]!r:.40} has no token of its own after "
                         f"{texts[0][-20:]!r}; put a space between them: target_delimiter, in the "
                         f"task's file")
            pairs = [(context or [self.eot_token_id], answer) for _, context, answer in requests]
            return score(model, pairs, config.batch_size)

        def loglikelihood_rolling(self, requests: list, **_) -> list[float]:
            whole = [(None, [], self.tok_encode(request.args[0])) for request in requests]
            return [log_p for log_p, _ in self._loglikelihood_tokens(whole)]

        def generate_until(self, requests: list, **_) -> list[str]:
            """Greedily, unless a task says otherwise. Each text has draws of its own, whatever its
            batch: the repeats of an item differ."""
            pairs = [(self.tok_encode(context) or [self.eot_token_id], how, number)
                     for number, (context, how) in enumerate(r.args for r in requests)]
            batches = Collator(pairs, lambda pair: -len(pair[0]), group_by="gen_kwargs")
            texts: list[str] = []
            for batch in batches.get_batched(config.batch_size):  # that are generated in one way
                prompts, hows, numbers = zip(*batch, strict=True)
                how = normalize_gen_kwargs(hows[0], 256)
                texts += complete(model, tokenizer, prompts, how, config.seed, numbers)
            return batches.get_original(texts)

    return HarnessModel()


@torch.no_grad()
def score(model: GPT, pairs: list[tuple[list[int], list[int]]], batch_size: int,
          ) -> list[tuple[float, bool]]:
    """Of each (context, continuation), token ids, the continuation's log-probability in nats (at
    least fp32, over vocab_used ids), and whether greedy decoding would give it. What exceeds the
    model's context is cut from the left; a longer continuation is scored in pieces."""
    T, device = model.config.block_size, next(model.parameters()).device
    rows = defaultdict(list)  # input -> its (pair, targets); answers of one token share a row
    for pair, (context, continuation) in enumerate(pairs):
        whole = context + continuation
        for start in range(len(context), len(whole), T):
            end = min(start + T, len(whole))
            rows[tuple(whole[max(0, end - T - 1):end - 1])].append((pair, whole[start:end]))
    order = sorted(rows, key=len, reverse=True)
    log_p, greedy = [0.0] * len(pairs), [True] * len(pairs)
    for k in progress(range(0, len(order), batch_size), "scoring"):
        batch = order[k:k + batch_size]
        for inputs, x in zip(batch, model.hidden(padded(batch).to(device)), strict=True):  # (T, C)
            for pair, targets in rows[inputs]:
                logits = model.logits(x[len(inputs) - len(targets):len(inputs)])
                logits = logits[:, :model.config.vocab_used]
                logits = logits if logits.dtype == torch.float64 else logits.float()
                check_finite(logits)
                wanted = torch.tensor(targets, device=device)[:, None]
                found = logits.log_softmax(-1).gather(1, wanted)
                log_p[pair] += found.cpu().double().sum().item()
                greedy[pair] &= torch.equal(logits.argmax(-1, keepdim=True), wanted)
    return list(zip(log_p, greedy, strict=True))


def padded(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Token ids of several lengths as (B, T), filled up on the right."""
    return torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, rows)), batch_first=True)


def complete(model: GPT, tokenizer: Tokenizer, prompts: Sequence[list[int]], how: dict[str, Any],
             seed: int, numbers: Sequence[int]) -> list[str]:
    """The continuation of each prompt, up to the first of the texts how["until"] or the end of the
    text. A prompt's beginning is cut, so that the context has room for what is generated.

    how: a task's generation_kwargs, with max_gen_toks, until and do_sample at least.
    seed, numbers: of the draws, see `stream`.
    """
    known = {"max_gen_toks", "until", "do_sample", "temperature", "top_k", "top_p"}
    for name in how.keys() - known:
        if (name, how[name]) not in (("num_beams", 1), ("repetition_penalty", 1)):  # for nothing
            fail(f"its generation_kwargs ask for {name}={how[name]}, which is not here; take that "
                 f"out of a copy of the task: --include_path")
    T, new, device = model.config.block_size, how["max_gen_toks"], next(model.parameters()).device
    room = T - new if new < T else max(1, T // 2)
    prompts = [prompt[-room:] for prompt in prompts]
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    temperature = how.get("temperature", 1.0) if how["do_sample"] else 0.0
    stops = [stop for stop in how["until"] if stop]
    samples = [Sample(tokenizer, stops) for _ in prompts]
    top_k, top_p = (how.get(name) or None for name in ("top_k", "top_p"))  # 0 is none, too
    for tokens in stream(model, padded(prompts).to(device), new, temperature, top_k, top_p,
                         seed, numbers, lengths):
        for sample, token in zip(samples, read_tokens(tokens), strict=True):
            sample.add(None if token == tokenizer.eot else token)
        if all(sample.done for sample in samples):
            break
    for sample in samples:
        sample.add(None)
    return [sample.text for sample in samples]
