"""Judging a checkpoint: the tasks of lm-evaluation-harness, and the perplexity of text."""

import importlib.util
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from config import check_rules, nearest
from model import GPT
from sample import load_model, store_matrices, stream
from support.data import Tokens, evaluation_starts
from support.device import pick_device, pick_dtype, tune_allocator
from support.errors import fail, reason
from support.meta import load_meta
from support.text import text_pieces
from support.tokenizer import Tokenizer
from tools.exchange import checkpoint_named


@dataclass
class EvalConfig:
    """Judge a checkpoint on tasks of lm-evaluation-harness, or by the perplexity of a text."""

    ckpt: str | None = None  # a run's or exported folder, a .pt file, gpt2*
    tasks: str | None = None  # names of lm-evaluation-harness, with commas between them
    num_fewshot: str | None = None  # examples in the prompt, one number or one for each task
    include_path: str | None = None  # a folder with task files (YAML) of your own
    limit: int | None = None  # only the first items of each task
    data: str | None = None  # instead of tasks: a folder in data_dir, or a UTF-8 text file
    data_dir: str = "data"  # where the data folders are
    eval_tokens: int = 4_915_200  # tokens of a folder's validation split, capped at the split
    batch_size: int = 12  # requests at once
    seed: int = 1337  # of sampled answers
    device: str | None = None  # cpu, cuda, cuda:1, mps; auto: the best there is
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None  # auto: fp32 on a CPU
    json: str | None = None  # a file to write the figures to

    def __post_init__(self) -> None:
        check_rules(self)

    def rules(self, rule: Callable[[bool, str], None]) -> None:
        rule(bool(self.ckpt) and bool(self.tasks) != bool(self.data),
             "say what to judge and on what: --ckpt=FOLDER or FILE.pt, and either "
             "--tasks=hellaswag,arc_easy or --data=NAME or TEXTFILE")
        for name in ("limit", "eval_tokens", "batch_size"):
            count = getattr(self, name)
            rule(count is None or count >= 1, f"{name}={count}: must be at least 1; choose more")
        rule(not self.data or not self.limit,
             f"limit={self.limit} is of tasks; for text use --eval_tokens")


def judge(config: EvalConfig) -> list[dict]:
    """How good a checkpoint is, on tasks or on text."""
    if config.tasks and importlib.util.find_spec("lm_eval") is None:
        fail("eval needs lm-eval: pip install lm-eval")
    model, tokenizer = load_model(checkpoint_named(config.ckpt, config.data_dir))
    device = pick_device(config.device)
    if device.type == "cpu":
        tune_allocator()
    dtype = pick_dtype(config.dtype or ("float32" if device.type == "cpu" else None), device)
    model.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
    store_matrices(model, dtype)
    return (on_tasks if config.tasks else on_text)(model, tokenizer, config)


# -----------------------------------------------------------------------------
# Text


@torch.no_grad()
def on_text(model: GPT, tokenizer: Tokenizer, config: EvalConfig) -> list[dict]:
    """Perplexity of the validation split of a data folder, or of a text file, which is read as
    prepare.py reads it. A token is predicted from those before it in its window of block_size.

    Bits per byte are of the bytes that the predicted tokens decode to; the end-of-text id has
    bits, but no bytes.
    """
    T, device = model.config.block_size, next(model.parameters()).device
    ids, starts = windows(tokenizer, config, T)
    sizes = np.array([0 if i == tokenizer.eot else len(tokenizer.token_bytes(i))
                      for i in range(tokenizer.n_vocab)])
    rows, whole = max(1, 4096 // T), [s for s in starts if s + T < len(ids)]
    batches = [whole[i:i + rows] for i in range(0, len(whole), rows)]
    if len(whole) < len(starts):
        batches.append(starts[-1:])  # a shorter window
    begin, total, n_tokens, n_bytes = time.perf_counter(), 0.0, 0, 0
    for batch in tqdm(batches, desc="predicting", unit="batch"):
        rows = np.stack([ids[s:s + T + 1] for s in batch]).astype(np.int64)  # (B, T + 1)
        if rows.max() >= tokenizer.n_vocab:
            fail(f"data={config.data} has the token id {rows.max()}, and its vocabulary only "
                 f"{tokenizer.n_vocab}; prepare the data again")
        x, y = torch.from_numpy(rows[:, :-1]), torch.from_numpy(rows[:, 1:])
        losses = model(x.to(device), y.to(device), return_logits=False, reduction="none")[1]
        total += losses.cpu().double().sum().item()  # losses: (B, T)
        n_tokens += y.numel()
        n_bytes += int(sizes[y].sum())
    nats = total / n_tokens
    return [{"variant": config.data, "tokens": n_tokens, "nats": nats,
             "perplexity": math.exp(min(nats, 700)),
             "bits_per_byte": total / math.log(2) / max(1, n_bytes),
             "tokens_per_s": n_tokens / (time.perf_counter() - begin)}]


def windows(tokenizer: Tokenizer, config: EvalConfig, T: int) -> tuple[np.ndarray, list[int]]:
    """The token ids (N,) of --data, and where its windows of T + 1 begin, without overlap.

    Of a folder they are train.py's, at most eval_tokens, so that the figure is train.py's
    validation loss. Of a text every token but the first is predicted, so the last may be shorter.
    """
    data, folder = config.data, os.path.join(config.data_dir, config.data)
    if data.endswith((".jsonl", ".parquet")):
        fail(f"data={data} has records, and is no text; make a folder of it: python prepare.py "
             f"text --name=NAME --tokenizer={tokenizer.name} --input={data}; then --data=NAME")
    if os.path.isfile(data):
        ids = tokenizer.encode_pieces(list(text_pieces(Path(data))), tokenizer.eot is not None)
        if len(ids) < 2:
            fail(f"data={data} has {len(ids)} tokens, and the first is not predicted; give more")
        return ids, list(range(0, len(ids) - 1, T))
    if not os.path.isdir(folder):
        fail(f"data={data}: there is neither such a text file nor the folder {folder}")
    meta = load_meta(folder)
    made_with = Tokenizer.from_meta(meta)
    if (made_with.name, made_with.alphabet) != (tokenizer.name, tokenizer.alphabet):
        fail(f"{folder} was made with another tokenizer than the checkpoint's: {made_with.name}, "
             f"not {tokenizer.name}, or of another alphabet; prepare the data with that one")
    ids = Tokens(folder, "val", meta, T).data
    return ids, evaluation_starts(len(ids), T, config.eval_tokens)


# -----------------------------------------------------------------------------
# Tasks


def on_tasks(model: GPT, tokenizer: Tokenizer, config: EvalConfig) -> list[dict]:
    """Tasks of lm-evaluation-harness, its own or those of include_path, one after the other."""
    from lm_eval import simple_evaluate

    names, shots = config.tasks.split(","), [None]
    if config.num_fewshot:
        shots = config.num_fewshot.split(",")
    if len(shots) == 1:
        shots *= len(names)
    if len(shots) != len(names) or not all(n is None or n.isdecimal() for n in shots):
        fail(f"num_fewshot={config.num_fewshot}: expected one whole number, or one for each of the "
             f"{len(names)} tasks, with commas between them")
    manager = task_manager(config, names)
    judged, rows = harness_model(model, tokenizer, config), []
    for name, n in zip(names, shots, strict=True):
        try:
            manager.load([name])
        except Exception as error:  # its file and its data may be broken in any way
            message = f"cannot load the task {name}: {reason(error)}"
            if isinstance(error, ConnectionError) or "Hub" in str(error):
                message += "; without a network, give a task of your own with files: --include_path"
            fail(message)
        judged.spent = 0.0
        try:
            found = simple_evaluate(judged, tasks=[name], num_fewshot=n and int(n),
                                    limit=config.limit, task_manager=manager, log_samples=False)
        except ValueError as error:  # more examples than there are; code that is unsafe to run
            fail(f"task {name}: {reason(error)}")
        items = {task: n["effective"] for task, n in found["n-samples"].items()}
        for task, metrics in found["results"].items():  # of a group there are several
            row = {"shots": found["n-shot"].get(task), "items": items.get(task),
                   "items_per_s": sum(items.values()) / judged.spent}
            row |= {k.removesuffix(",none"): v for k, v in metrics.items() if "," in k}
            numbers = {k: v for k, v in row.items() if isinstance(v, (int, float))}
            rows.append({"variant": task, **numbers})
    return rows


def task_manager(config: EvalConfig, names: list[str]):
    """lm-evaluation-harness's, which knows these tasks."""
    from lm_eval.tasks import TaskManager

    if len(set(names)) < len(names):
        fail(f"tasks={config.tasks} names a task twice; name each once")
    if config.include_path and not os.path.isdir(config.include_path):
        fail(f"include_path={config.include_path}: there is no such folder")
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
    from lm_eval.models.utils import normalize_gen_kwargs

    class HarnessModel(TemplateLM):
        spent = 0.0  # seconds

        @property
        def eot_token_id(self) -> int:
            return tokenizer.encode("\n")[0] if tokenizer.eot is None else tokenizer.eot

        def tok_encode(self, string: str, *_, **__) -> list[int]:
            return tokenizer.encode_prompt(string)

        def _loglikelihood_tokens(self, requests: list, **_) -> list[tuple[float, bool]]:
            begin = time.perf_counter()
            pairs = [(context or [self.eot_token_id], continuation)
                     for _, context, continuation in requests]
            answers = score(model, pairs, config.batch_size)
            self.spent += time.perf_counter() - begin
            return answers

        def loglikelihood_rolling(self, requests: list, **_) -> list[float]:
            whole = [(None, [], self.tok_encode(request.args[0])) for request in requests]
            return [log_p for log_p, _ in self._loglikelihood_tokens(whole)]

        def generate_until(self, requests: list, **_) -> list[str]:
            """Greedily, unless a task says otherwise. Contexts leave room for what is generated."""
            begin, groups = time.perf_counter(), defaultdict(list)
            texts = [""] * len(requests)
            for i, request in enumerate(requests):
                groups[json.dumps(request.args[1], sort_keys=True)].append(i)
            for members in groups.values():  # that are generated in the same way
                how = normalize_gen_kwargs(requests[members[0]].args[1], 256)
                temperature = how.get("temperature", 1.0) if how["do_sample"] else 0.0
                T, new = model.config.block_size, how["max_gen_toks"]
                room = T - new if new < T else max(1, T // 2)
                prompts = {i: (self.tok_encode(requests[i].args[0]) or [self.eot_token_id])[-room:]
                           for i in members}
                in_order = sorted(members, key=lambda i, prompts=prompts: -len(prompts[i]))
                for k in range(0, len(members), config.batch_size):
                    batch = in_order[k:k + config.batch_size]
                    answers = complete(model, tokenizer, [prompts[i] for i in batch], new,
                                       how["until"], config.seed, temperature, how.get("top_k"),
                                       how.get("top_p"))
                    for i, answer in zip(batch, answers, strict=True):
                        texts[i] = answer
            self.spent += time.perf_counter() - begin
            return texts

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
    log_p = torch.zeros(len(pairs), dtype=torch.float64)
    misses = torch.zeros(len(pairs), dtype=torch.long)
    for k in tqdm(range(0, len(order), batch_size), desc="scoring", unit="batch"):
        batch = order[k:k + batch_size]
        idx = torch.zeros(len(batch), len(batch[0]), dtype=torch.long)  # padded on the right
        wanted = []
        for row, inputs in enumerate(batch):
            idx[row, :len(inputs)] = torch.tensor(inputs)
            wanted += [(pair, row, len(inputs) - len(targets) + i, target)
                       for pair, targets in rows[inputs] for i, target in enumerate(targets)]
        pair, row, place, target = torch.tensor(wanted).to(device).unbind(1)  # (N,) each
        x = model.hidden(idx.to(device))[row, place]  # (N, C)
        for part, i, y in zip(x.split(1024), pair.split(1024), target.split(1024), strict=True):
            logits = model.lm_head(part)[:, :model.config.vocab_used]
            logits = logits if logits.dtype == torch.float64 else logits.float()
            found = logits.log_softmax(dim=-1).gather(1, y[:, None])[:, 0]
            log_p.index_add_(0, i.cpu(), found.cpu().double())
            misses.index_add_(0, i.cpu(), (logits.argmax(dim=-1) != y).long().cpu())
    return list(zip(log_p.tolist(), (misses == 0).tolist(), strict=True))


def complete(model: GPT, tokenizer: Tokenizer, prompts: list[list[int]], max_new_tokens: int,
             until: list[str], seed: int, temperature: float, top_k: int | None = None,
             top_p: float | None = None) -> list[str]:
    """The continuation of each prompt, up to the first of the texts `until` or the end of the
    text."""
    device = next(model.parameters()).device
    idx = torch.nn.utils.rnn.pad_sequence([torch.tensor(p) for p in prompts], batch_first=True)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    generator = torch.Generator(device).manual_seed(seed)
    stops = [stop.encode() for stop in until if stop]
    found, done = [b""] * len(prompts), [False] * len(prompts)
    for tokens in stream(model, idx.to(device), max_new_tokens, temperature, top_k, top_p,
                         generator=generator, lengths=lengths):
        for i, token in enumerate(tokens.tolist()):
            if not done[i] and token != tokenizer.eot:
                found[i] += tokenizer.token_bytes(token)
            done[i] = done[i] or token == tokenizer.eot or any(s in found[i] for s in stops)
        if all(done):
            break
    texts = [text.decode("utf-8", "replace") for text in found]
    for stop in filter(None, until):
        texts = [text.split(stop)[0] for text in texts]
    return texts
