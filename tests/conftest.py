"""Shared by the tests: tiny data folders, tiny runs of the trainer in this process or in ranks,
what is done to them (hooks), and how their ends are compared.

A hook is a function of a MonkeyPatch, here or in the ranks.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: the models here are tiny

import hashlib
import json
import math
import shutil
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import run_ranks

import train
from model import GPT, GPTConfig
from support import log
from support.errors import UserError

# copies of data sets and of GPT-2's vocabulary; tests of what is not there are skipped
SHARED = Path(os.environ.get("NANOYURII_SHARED",
                             Path(__file__).resolve().parents[2] / "shared/data"))
TINY = dict(n_layer=2, n_head=2, n_embd=32, block_size=16, batch_size=4, warmup_iters=2,
            gradient_accumulation_steps=2, max_iters=6, eval_interval=3, learning_rate=1e-3,
            device="cpu", dtype="float32")
HOURGLASS = dict(ffn="hourglass", ffn_depth=2, head_dim=8, norm="rmsnorm", position="rope",
                 qk_norm=True, residual_init_scale=False)
TIMES = {"tokens_per_s", "mfu", "seconds", "peak_mb"}  # what a log record has of the machine


def option_words(**options) -> list[str]:
    """n_layer=2 -> --n_layer=2."""
    return [f"--{name}={value}" for name, value in options.items()]


def write_data(folder, train, val=None, vocab_size=257, dtype="uint16", **meta) -> Path:
    """A data folder as prepare.py makes it, of these ids; `bytes` unless meta says else."""
    folder.mkdir(parents=True)
    meta = {"tokenizer": "bytes", "alphabet": "", "padded_vocab_size": vocab_size, **meta,
            "vocab_size": vocab_size, "dtype": dtype}
    for split, ids in (("train", train), ("val", train if val is None else val)):
        ids = np.asarray(ids).astype(np.dtype(dtype).newbyteorder("<"))
        ids.tofile(folder / f"{split}.bin")
        meta[split] = {"tokens": len(ids), "sha256": hashlib.sha256(ids.tobytes()).hexdigest()}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """tiny: random bytes, 20 windows of 16 (2.5 steps of TINY) an epoch; edge: 24 windows (3
    steps); count: 20 windows in which a token's id is its position; easy: eight ids in turn;
    long_val: 150 windows to evaluate on."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    write_data(root / "tiny", rng.integers(256, size=343), rng.integers(256, size=300))
    write_data(root / "edge", rng.integers(256, size=407), rng.integers(256, size=300))
    write_data(root / "long_val", rng.integers(256, size=343), rng.integers(256, size=2405))
    write_data(root / "easy", np.arange(343) % 8)
    write_data(root / "count", np.arange(343), vocab_size=343)
    return root


@pytest.fixture(scope="session", autouse=True)
def no_pictures():
    """Drawing loss.png takes longer than a tiny run: a test of it asks for `pictures`."""
    with pytest.MonkeyPatch.context() as patch:
        draw = log.draw_losses
        patch.setattr(log, "draw_losses", lambda _: None)
        yield draw


@pytest.fixture
def pictures(no_pictures, monkeypatch):
    """The runs of this test draw loss.png."""
    monkeypatch.setattr(log, "draw_losses", no_pictures)


@pytest.fixture
def drawn(monkeypatch):
    """The matplotlib figures that were made, in order."""
    figures = pytest.importorskip("matplotlib.figure")
    made, real = [], figures.Figure.__init__
    monkeypatch.setattr(figures.Figure, "__init__", lambda self, *args, **options: (
        made.append(self), real(self, *args, **options))[1])
    return made


@pytest.fixture
def gpt2_cache(tmp_path, monkeypatch) -> Path:
    """GPT-2's vocabulary, a copy: tiktoken deletes files it does not like."""
    if not (SHARED / "tiktoken_cache").is_dir():
        pytest.skip(f"needs {SHARED}/tiktoken_cache")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    return shutil.copytree(SHARED / "tiktoken_cache", tmp_path / "cache",
                           copy_function=shutil.copyfile)


# -----------------------------------------------------------------------------
# Runs in this process, and in ranks


@pytest.fixture(scope="session")
def words(data_dir):
    """words(out_dir, **options): the command line of a tiny run."""
    def command_line(out, **options) -> list[str]:
        options = {"data_dir": data_dir, "dataset": "tiny", "out_dir": out, **TINY, **options}
        return option_words(**options)

    return command_line


@pytest.fixture(scope="session")
def run(words):
    """run(out_dir, *words, hooks=(), **options) trains in this process and returns log.jsonl's
    records."""
    def go(out, *argv, hooks=(), **options):
        with pytest.MonkeyPatch.context() as patch:
            for hook in hooks:
                hook(patch)
            train.main([*words(out, **options), *argv])
        return records(out) if Path(out, "log.jsonl").exists() else []

    return go


@pytest.fixture(scope="session")
def job(words):
    """job(out_dir, hooks=(), **options): a run for in_ranks."""
    return lambda out, hooks=(), **options: (words(out, **options), hooks)


def several(jobs) -> None:
    """In a rank: main makes all these runs, one after the other."""
    def main(_, once=train.main):
        for i, (argv, hooks) in enumerate(jobs):
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("TORCHELASTIC_RESTART_COUNT", str(i))
                for hook in hooks:
                    hook(patch)
                once(argv)

    train.main = main


def in_ranks(world, jobs) -> str:
    """Make these runs in `world` processes, to a good end; what rank 0 prints. They meet in a store
    of this process, as torchrun's do in torchrun's, for each a part of its own: a port that is
    chosen beforehand may be another's by then."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return run_ranks([], world, partial(several, jobs), MASTER_PORT=str(store.port),
                     TORCHELASTIC_USE_AGENT_STORE="True")


def refused(call, *said) -> list[str]:
    """The call, of a program's main or of a function, is a user error whose lines have these words;
    returns the lines."""
    with pytest.raises(UserError) as error:
        call()
    assert all(word in str(error.value) for word in said), error.value
    return str(error.value).splitlines()


# -----------------------------------------------------------------------------
# What a run leaves


def load(out, name="ckpt.pt") -> dict:
    return torch.load(Path(out, name), weights_only=True)


def tensors(out, name="ckpt.pt") -> dict:
    """A checkpoint's: model/parameter and optimiser/parameter/state."""
    checkpoint = load(out, name)
    weights = {f"model/{n}": w for n, w in checkpoint["model"].items()}
    return weights | {f"{kind}/{n}/{key}": t for kind, named in checkpoint["optimizer"].items()
                      for n, state in named.items() for key, t in state.items()}


def records(out) -> list[dict]:
    return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]


def of_kind(records, kind) -> list[dict]:
    return [r for r in records if r["type"] == kind]


def steps_of(records) -> list[int]:
    return [r["iter"] for r in of_kind(records, "train")]


def without_times(records) -> list[dict]:
    return [{k: v for k, v in r.items() if k not in TIMES | {"out_dir", "init_from"}}
            for r in records]


def losses(out) -> np.ndarray:
    """(steps, 2): the loss and the gradient norm."""
    return np.array([[r["loss"], r["grad_norm"]] for r in of_kind(records(out), "train")])


def val_losses(out) -> list[float]:
    return [r["val_loss"] for r in of_kind(records(out), "eval")]


def largest_difference(found: dict, expected: dict) -> float:
    assert found.keys() == expected.keys()
    return max((found[name] - expected[name]).abs().max().item() for name in expected)


def assert_same(found, expected, path="") -> None:
    """Equal, tensors bit for bit, all the way down."""
    assert type(found) is type(expected), path
    if isinstance(found, dict):
        assert found.keys() == expected.keys(), path
        for key in found:
            assert_same(found[key], expected[key], f"{path}/{key}")
    elif isinstance(found, (list, tuple)):
        assert len(found) == len(expected), path
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_same(a, b, f"{path}/{i}")
    elif isinstance(found, torch.Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected), path
    else:
        assert found == expected, path


def assert_same_end(found, expected) -> None:
    """Two runs: records, tensors, generators, position; all but times and names of folders."""
    assert without_times(records(found)) == without_times(records(expected))
    ends = []
    for out in (found, expected):
        checkpoint = load(out)
        del checkpoint["config"], checkpoint["run"]["log_length"]  # which has the times' lengths
        ends.append(checkpoint)
    assert_same(*ends)


def as_killed_at_3(whole, half) -> Path:
    """A copy of a run of 6 steps, saved every 3, as if killed before its last save: the log is
    longer than the checkpoint."""
    assert load(whole, "ckpt_prev.pt")["iter_num"] == 3
    shutil.copytree(whole, half)
    for name in ("ckpt.pt", "best.pt"):
        (half / name).unlink(missing_ok=True)
    (half / "ckpt_prev.pt").rename(half / "ckpt.pt")
    return half


def nanogpt_checkpoint(path, iter_num=4):
    """As nanoGPT's train.py saves one: compiled, 7 model_args, a numbered optimiser state. The
    moments of parameter i are filled with 100 (i + 1)."""
    args = dict(n_layer=2, n_head=2, n_embd=32, block_size=16, bias=True, vocab_size=257,
                dropout=0.0)
    torch.manual_seed(3)
    model = GPT(GPTConfig(**args))
    named = list(model.named_parameters())
    order = [n for n, p in named if p.dim() >= 2] + [n for n, p in named if p.dim() < 2]
    shapes = dict(named)
    state = {i: {"step": torch.tensor(4.0), **{moment: torch.full_like(shapes[n], 100.0 * (i + 1))
                                               for moment in ("exp_avg", "exp_avg_sq")}}
             for i, n in enumerate(order)}
    split = sum(p.dim() >= 2 for _, p in named)
    groups = [{"params": list(range(split)), "weight_decay": 0.1, "lr": 1e-3},
              {"params": list(range(split, len(order))), "weight_decay": 0.0, "lr": 1e-3}]
    config = args | dict(
        out_dir="out", eval_interval=5, log_interval=1, eval_iters=3, eval_only=False,
        always_save_checkpoint=True, init_from="scratch", wandb_log=False, wandb_project="owt",
        wandb_run_name="gpt2", dataset="tiny", gradient_accumulation_steps=2, batch_size=4,
        learning_rate=1e-3, max_iters=6, weight_decay=0.1, beta1=0.9, beta2=0.95, grad_clip=1.0,
        decay_lr=True, warmup_iters=2, lr_decay_iters=6, min_lr=1e-4, backend="nccl",
        device="cuda", dtype="bfloat16", compile=True)
    torch.save({
        "model": {f"_orig_mod.{k}": w for k, w in model.state_dict().items()},
        "optimizer": {"state": state, "param_groups": groups}, "model_args": args,
        "iter_num": iter_num, "best_val_loss": torch.tensor(2.5), "config": config}, path)
    return model, {n: 100.0 * (i + 1) for i, n in enumerate(order)}


# -----------------------------------------------------------------------------
# Hooks


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def the_step(patch) -> list[int]:
    """A list whose only entry is the step that the run is in."""
    now = [0]

    def multiplier(step, config, wrapped=train.lr_multiplier):
        now[0] = step
        return wrapped(step, config)

    patch.setattr(train, "lr_multiplier", multiplier)
    return now


def stop_after(step, patch) -> None:
    """A signal comes in the step before."""
    def multiplier(now, config, wrapped=train.lr_multiplier):
        if now == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return wrapped(now, config)

    patch.setattr(train, "lr_multiplier", multiplier)


def scripted(values, patch) -> None:
    """evaluate() gives these, one after the other."""
    values = list(values)
    patch.setattr(train, "evaluate", lambda *_, **__: values.pop(0))


def record_windows(folder, patch) -> None:
    """folder/RANK gets the first token of every window that this rank trains on."""
    folder.mkdir(exist_ok=True)

    def to_device(rows, device, wrapped=train.to_device):
        if torch.is_grad_enabled():
            with open(folder / str(rank()), "a") as file:
                file.writelines(f"{first}\n" for first in rows[:, 0].tolist())
        return wrapped(rows, device)

    patch.setattr(train, "to_device", to_device)


def windows(folder, steps) -> list[np.ndarray]:
    """What record_windows wrote: per rank (steps, windows of a step)."""
    return [np.loadtxt(path, dtype=int).reshape(steps, -1) for path in sorted(folder.iterdir())]


def spoil(steps, patch, where=None, loss=1.0, gradient=1.0) -> None:
    """In these steps, on rank `where` (None: on all), multiply the loss or only its gradient."""
    now = the_step(patch)

    def forward(self, *args, wrapped=GPT.forward, **kwargs):
        logits, value = wrapped(self, *args, **kwargs)
        if torch.is_grad_enabled() and now[0] in steps and where in (None, rank()):
            value = value * loss
            value.register_hook(lambda g: g * gradient)
        return logits, value

    patch.setattr(GPT, "forward", forward)


BAD = {"loss nan": dict(loss=math.nan), "loss inf": dict(loss=math.inf),
       "gradient nan": dict(gradient=math.nan), "gradient inf": dict(gradient=math.inf)}


def overflow(steps, where, kind, patch) -> None:
    """In these steps one number of this optimiser's gradients is inf, in rank `where`'s part."""
    now = the_step(patch)

    def unscale_(self, optimizer, wrapped=torch.amp.GradScaler.unscale_):
        if now[0] in steps and rank() == where and type(optimizer).__name__.lower() == kind:
            grads = (p.grad for g in optimizer.param_groups for p in g["params"])
            parts = (g.to_local() if hasattr(g, "to_local") else g for g in grads)
            next(part for part in parts if part.numel()).view(-1)[0] = math.inf
        return wrapped(self, optimizer)

    patch.setattr(torch.amp.GradScaler, "unscale_", unscale_)


def log_scale(file, patch) -> None:
    """Write this rank's loss scale after every step."""
    def update(self, *args, wrapped=torch.amp.GradScaler.update):
        wrapped(self, *args)
        with open(f"{file}-{rank()}", "a") as out:
            out.write(f"{self.get_scale()}\n")

    patch.setattr(torch.amp.GradScaler, "update", update)


def scales(file, of=0) -> list[float]:
    return [float(line) for line in Path(f"{file}-{of}").read_text().splitlines()]
