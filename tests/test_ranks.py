"""support/ranks.py, and runs that several processes share (copied or sharded, over gloo): they are
the run that one process makes.
"""

import json
import math
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import (
    BAD,
    HOURGLASS,
    assert_same,
    in_ranks,
    largest_difference,
    load,
    log_scale,
    losses,
    of_kind,
    overflow,
    rank,
    record_windows,
    records,
    refused,
    scales,
    scripted,
    several,
    spoil,
    stop_after,
    tensors,
    val_losses,
    windows,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from processes import run_ranks, start_ranks

import train
from model import Block
from support.checkpoint import HEAD, TABLE
from support.data import WindowOrder
from support.ranks import Ranks, shard, stop_signals
from train import TrainConfig

YURII = dict(template="nesterov")
VARIANTS = {"gpt": dict(bias=True), "yurii": YURII, "hourglass": HOURGLASS}
# windows of `count`, whose tokens say where they are: 8 a step, 20 an epoch
SHARED = dict(dataset="count", batch_size=2, gradient_accumulation_steps=4, max_iters=5,
              eval_interval=3)
UNEVEN = dict(YURII, dataset="long_val", eval_tokens=129 * 16 + 3, max_iters=1,
              gradient_accumulation_steps=6)  # 129 windows: the last batch is not full
PAIRS = [("gpt", "adamw"), ("yurii", "adamw"), ("hourglass", "muon")]
SHARDED = [("gpt", "adamw", False), ("yurii", "adamw", True), ("hourglass", "muon", True)]
OVERFLOWS = {"ddp": partial(spoil, (2,), where=1, gradient=math.inf),
             "fsdp-adamw": partial(overflow, (2,), 0, "adamw"),
             "fsdp-muon": partial(overflow, (2,), 1, "muon")}
COMPILED = dict(YURII, n_layer=1, vocab_size=384, dtype="float64", max_iters=1, compile=True)


def sharded_gradients(patch) -> None:
    """Between micro-batches, too, a rank has only its part of every gradient."""
    def accumulate(model, batches, *rest, wrapped=train.accumulate):
        def watched():
            for n, batch in enumerate(batches):
                grads = [p.grad for p in model.parameters()]
                assert all(hasattr(g, "to_local") if n else g is None for g in grads)
                yield batch

        return wrapped(model, watched(), *rest)

    patch.setattr(train, "accumulate", accumulate)


def leave_out(patch) -> None:
    """Each micro-batch trains without one of the two blocks, and the next without the other."""
    calls, world = [0], int(os.environ.get("WORLD_SIZE", 1))

    def forward(self, state, *rest, wrapped=Block.forward):
        number, layer = divmod(calls[0], 2)
        calls[0] += torch.is_grad_enabled()
        left_out = torch.is_grad_enabled() and (number * world + rank()) % 2 == layer
        return state if left_out else wrapped(self, state, *rest)

    patch.setattr(Block, "forward", forward)


def record_graphs(folder, patch) -> None:
    """folder/RANK gets for every compiled graph its operations and the shapes of its outputs."""
    folder.mkdir(exist_ok=True)
    torch._dynamo.reset()

    def backend(graph, examples):
        (outputs,) = graph.graph.output_node().args
        shapes = [list(x.meta["example_value"].shape) for x in outputs]
        operations = [getattr(node.target, "__name__", str(node.target))
                      for node in graph.graph.nodes]
        with open(folder / str(rank()), "a") as file:
            file.write(f"{json.dumps([operations, shapes])}\n")
        return graph.forward

    patch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    scripted([1.0, 1.0], patch)  # an evaluation has graphs of its own


def graphs(folder, of=0) -> list:
    """What record_graphs wrote, but for the first: the probe's."""
    return [json.loads(line) for line in (folder / str(of)).read_text().splitlines()][1:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def together(folder, run, job):
    """Every run of two processes that the tests here look at, made by the same two."""
    run(folder / "trained", **YURII, max_iters=3)
    jobs = []
    for variant, o in PAIRS:
        hook = partial(record_windows, folder / f"w-{variant}-{o}")
        jobs.append(job(folder / f"two-{variant}-{o}", [hook], optimizer=o, dtype="float64",
                        **SHARED, **VARIANTS[variant]))
    for variant, o, again in SHARDED:
        jobs.append(job(folder / f"sharded-{variant}-{o}", [sharded_gradients], optimizer=o,
                        parallel="fsdp", dtype="float64", activation_checkpointing=again, **SHARED,
                        **VARIANTS[variant]))
    jobs.append(job(folder / "left-out", [leave_out], dtype="float64", max_iters=3))
    for i, how in enumerate((dict(batch_size=1), dict(batch_size=4), dict(parallel="fsdp"))):
        weights = folder / "trained" / "ckpt.pt"
        jobs.append(job(folder / f"eval-{i}", init_from=weights, **UNEVEN, **how))
    for name, hook in OVERFLOWS.items():
        hooks = [hook, partial(log_scale, folder / f"scale-{name}"), partial(stop_after, 3)]
        jobs.append(job(folder / f"overflow-{name}", hooks, dtype="float16", optimizer="muon",
                        parallel=name.split("-")[0], save_interval=1, **YURII))
    for parallel in ("ddp", "fsdp"):
        hook = partial(record_graphs, folder / f"g-{parallel}")
        jobs.append(job(folder / f"compiled-{parallel}", [hook], parallel=parallel, **COMPILED))
    assert "Warning" not in in_ranks(2, jobs)


def assert_equal_runs(two, one, bound, weights=None) -> None:
    """The same records; losses, evaluations and (if said) all tensors to within a bound."""
    kinds = [[(r["type"], r.get("iter")) for r in records(out)] for out in (two, one)]
    assert kinds[0] == kinds[1]
    assert np.abs(losses(two) - losses(one))[:, 0].max() < bound
    assert np.abs(np.subtract(val_losses(two), val_losses(one))).max() < bound
    assert load(two)["run"]["position"] == load(one)["run"]["position"]
    assert weights is None or largest_difference(tensors(two), tensors(one)) < weights


@pytest.mark.parametrize("variant, optimizer", PAIRS)
def test_two_processes_equal_one(together, folder, run, tmp_path, variant, optimizer):
    """And they share out the windows: the five steps of 8 are two epochs."""
    run(tmp_path, dtype="float64", optimizer=optimizer, **SHARED, **VARIANTS[variant])
    assert_equal_runs(folder / f"two-{variant}-{optimizer}", tmp_path, 1e-12, weights=1e-12)
    first, second = windows(folder / f"w-{variant}-{optimizer}", 5)
    assert first.shape == second.shape == (5, 4)
    assert not any(set(a) & set(b) for a, b in zip(first, second, strict=True))
    order = WindowOrder(343, 16, TrainConfig.seed).starts(0, 40)
    assert sorted(np.concatenate((first, second), axis=1).flatten()) == sorted(order)


def test_gradients_that_only_some_have(together, folder, run, tmp_path):
    """Of layers left out, with shapes like those of others, or of a fork's experts."""
    run(tmp_path, hooks=[leave_out], dtype="float64", max_iters=3)
    assert_equal_runs(folder / "left-out", tmp_path, 1e-12, weights=1e-12)


@pytest.mark.parametrize("variant, optimizer, _", SHARDED)
def test_sharded_equals_copied(together, folder, variant, optimizer, _):
    """With accumulation, with and without activation checkpointing. Muon sums shards in bf16."""
    sharded, copied = (folder / f"{kind}-{variant}-{optimizer}" for kind in ("sharded", "two"))
    bound, weights = (1e-12, 1e-12) if optimizer == "adamw" else (1e-3, None)
    assert_equal_runs(sharded, copied, bound, weights)
    assert {p.name for p in sharded.iterdir()} == {p.name for p in copied.iterdir()}
    for name in ("ckpt.pt", "best.pt"):
        assert load(sharded, name).keys() == load(copied, name).keys()
        table = load(sharded, name)["model"]
        assert table[HEAD].data_ptr() == table[TABLE].data_ptr()  # tied, and once in the file
    assert {n: (t.shape, t.dtype) for n, t in tensors(sharded).items()} == {
        n: (t.shape, t.dtype) for n, t in tensors(copied).items()}


def test_an_evaluation_is_the_same_number_everywhere(together, folder, run, tmp_path):
    """129 windows of 150, in batches of which the last is not full, or only one process has it."""
    run(tmp_path, init_from=folder / "trained" / "ckpt.pt", batch_size=2, **UNEVEN)
    assert {val_losses(folder / f"eval-{i}")[0] for i in range(3)} == {val_losses(tmp_path)[0]}


@pytest.mark.parametrize("name", OVERFLOWS)
def test_an_overflow_on_one_rank_is_everyones(together, folder, name):
    """Of one optimiser's gradients, in one number: no optimiser moves on any rank, the scale halves
    on both."""
    out = folder / f"overflow-{name}"
    for of in (0, 1):
        assert scales(folder / f"scale-{name}", of) == [65536.0, 65536.0, 32768.0]
    assert load(out)["iter_num"] == 3 and load(out, "ckpt_prev.pt")["iter_num"] == 2
    assert_same(tensors(out), tensors(out, "ckpt_prev.pt"))


def test_compiled_it_is_the_graph_of_one_process(together, folder, run, tmp_path):
    """One graph, that returns no logits; sharded, it is a block's, and that of head and loss."""
    run(tmp_path / "one", hooks=[partial(record_graphs, tmp_path / "g")], **COMPILED)
    run(tmp_path / "eager", **COMPILED | dict(compile=False))
    (expected,) = graphs(tmp_path / "g")
    for of in (0, 1):
        assert graphs(folder / "g-ddp", of) == [expected]
        assert len(graphs(folder / "g-fsdp", of)) == 2
    for operations, shapes in (expected, *graphs(folder / "g-fsdp")):
        assert len(operations) > 5 and not any(384 in shape for shape in shapes)
    for out in (tmp_path / "one", folder / "compiled-ddp", folder / "compiled-fsdp"):
        assert largest_difference(tensors(out), tensors(tmp_path / "eager")) < 1e-12


@pytest.mark.parametrize("parallel, how, said", [
    ("ddp", "loss nan", "the loss is nan"),
    pytest.param("fsdp", "gradient inf", "gradient norm nan", marks=pytest.mark.torture)])
def test_one_bad_rank_stops_all(run, job, tmp_path, parallel, how, said):
    """In step 3, with the name of the last good checkpoint; every rank ends with code 2."""
    options = dict(YURII, optimizer="muon")
    run(tmp_path, max_iters=2, **options)
    bad = job(tmp_path, [partial(spoil, (3,), where=1, **BAD[how])], init_from="resume",
              max_iters=9, eval_interval=100, parallel=parallel, **options)
    first, second = start_ranks([], 2, partial(several, [bad]))
    first.refused("step 3:", said, "of step 2", f"{tmp_path}/ckpt.pt")
    assert second.wait() == 2 and load(tmp_path)["iter_num"] == 2


# -----------------------------------------------------------------------------
# Numbers of processes


def pairs(batch_size, sequences, world) -> list[tuple[int, int]]:
    """Every (micro-batch, accumulation) that has so many sequences a step and suits the ranks."""
    return [(size, sequences // size) for size in range(1, batch_size + 1)
            if sequences % size == 0 and sequences // size % world == 0]


@settings(max_examples=300, deadline=None, derandomize=True)
@example(30, 16, 3)  # 20 and 24
@example(30, 16, 7)  # none; 6 or 8 processes have one
@given(st.integers(1, 40), st.integers(1, 60), st.integers(1, 40))
def test_the_pair_that_keeps_the_tokens_of_a_step(batch_size, accumulation, world):
    sequences = batch_size * accumulation
    ranks = Ranks(TrainConfig(device="cpu"))
    ranks.world = world
    if accumulation % world == 0:
        return ranks.check_accumulation(batch_size, accumulation)
    (line,) = refused(lambda: ranks.check_accumulation(batch_size, accumulation),
                      f"gradient_accumulation_steps={accumulation}", f"{world} processes")
    if suitable := pairs(batch_size, sequences, world):
        size, steps = max(suitable)
        assert line.endswith(f" use --batch_size={size} --gradient_accumulation_steps={steps}")
        return None
    fit = [n for n in range(1, sequences + 1) if pairs(batch_size, sequences, n)]
    nearest = [max(n for n in fit if n < world), *[n for n in fit if n > world][:1]]
    assert f"use {' or '.join(map(str, nearest))} processes" in line


def test_half_of_what_torchrun_sets(run, tmp_path, monkeypatch):
    """And sharding without any of it."""
    refused(lambda: run(tmp_path / "new", parallel="fsdp"), "torchrun", "parallel=fsdp")
    monkeypatch.setenv("RANK", "0")
    refused(lambda: run(tmp_path / "new"), "torchrun", "unset RANK")
    for name in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    refused(lambda: run(tmp_path / "new"), "MASTER_ADDR")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("WORLD_SIZE", "two")
    refused(lambda: run(tmp_path / "new"), "WORLD_SIZE", "unset RANK")
    assert not (tmp_path / "new").exists()


def test_a_notebooks_signals_work_as_before():
    """asyncio hears of them through a file of its own."""
    with open(os.devnull, "wb") as file:
        os.set_blocking(file.fileno(), False)
        signal.set_wakeup_fd(file.fileno())
        with stop_signals():
            pass
        assert signal.set_wakeup_fd(-1) == file.fileno()


def test_buffers_are_shared(monkeypatch):
    """A fork's, which rank 0 alone has read from the checkpoint; not those that no checkpoint has,
    which may be of any kind: gloo sends a stretched one as if all of it were in memory."""
    sent, model = [], torch.nn.BatchNorm1d(2)
    model.register_buffer("positions", torch.arange(4).expand(3, 4), persistent=False)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda x, src: sent.append(x))
    Ranks.share(Mock(parallel=True), model)
    assert len(sent) == len(model.state_dict())


def test_a_block_that_layers_share_is_divided_once(monkeypatch):
    parts, block = [], torch.nn.Linear(1, 1)
    monkeypatch.setattr("torch.distributed.fsdp.fully_shard", lambda part, mesh: parts.append(part))
    monkeypatch.setattr("torch.distributed.device_mesh.init_device_mesh", Mock())
    shard(model := Mock(transformer=Mock(h=[block, block])), Mock())
    assert parts == [block, model]


@pytest.mark.parametrize("differs", [0, 1, 2, 3])
def test_machines_that_are_unlike(run, tmp_path, monkeypatch, differs):
    def other(ranks, data):
        return [data, tuple("other" if i == differs else part for i, part in enumerate(data))]

    monkeypatch.setattr(Ranks, "gather", other)
    refused(lambda: run(tmp_path), "another machine has other data", "other code", "no GPU")


def unlike_cards(patch) -> None:
    """Of which rank 0's computes in another precision, if nothing is said, than the other."""
    patch.setattr(train, "pick_dtype", lambda *_: [torch.float64, torch.float32][rank()])


def test_unlike_cards_compute_in_one_precision(run, job, tmp_path):
    in_ranks(2, [job(tmp_path / "two", [unlike_cards], max_iters=2)])
    run(tmp_path / "one", dtype="float64", max_iters=2)
    assert_equal_runs(tmp_path / "two", tmp_path / "one", 1e-12, weights=1e-12)


def unlike_counts() -> None:
    os.environ["TORCHELASTIC_RESTART_COUNT"] = os.environ["RANK"]


def test_machines_that_count_restarts_unlike(words, tmp_path):
    """Of torchrun's agents only that whose process died counts its restart."""
    run_ranks(words(tmp_path, max_iters=1), 2, unlike_counts)


def test_in_a_thread(run, tmp_path):
    """Which may not set handlers of signals."""
    with ThreadPoolExecutor(1) as pool:
        assert of_kind(pool.submit(run, tmp_path, max_iters=1).result(), "train")


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_clusters_warning(number):
    """Before the job's time is over."""
    with stop_signals() as signals:
        os.kill(os.getpid(), number)
    assert signals == [number]


# -----------------------------------------------------------------------------
# The output folder


def test_where_there_are_no_locks(run, tmp_path, monkeypatch):
    """On Windows, which would not remove a folder with an open file: there, too, a run that cannot
    start leaves no folder."""
    monkeypatch.setattr("support.files.fcntl", None)
    refused(lambda: run(tmp_path / "new", "--eval_only", dataset="nowhere"), "nowhere")
    refused(lambda: run(tmp_path / "new", init_from="gpt2"), "another tokenizer", "gpt2")
    assert not (tmp_path / "new").exists()
    assert of_kind(run(tmp_path / "new", max_iters=1), "train")
    assert not (tmp_path / "new" / ".lock").exists()
