"""support/resume.py: a run goes on as if undisturbed, with its own options; weights start one.

Runs are tiny and in this process, or in two for what several processes do; "bit for bit" is
torch.equal.
"""

import os
import shutil
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    HOURGLASS,
    TINY,
    as_killed_at_3,
    assert_same,
    assert_same_end,
    in_ranks,
    largest_difference,
    load,
    log_scale,
    losses,
    nanogpt_checkpoint,
    of_kind,
    option_words,
    record_windows,
    records,
    refused,
    scales,
    steps_of,
    stop_after,
    tensors,
    windows,
    write_data,
)

import bench
import prepare
import sample
import train
from model import TEMPLATES
from support.data import WindowOrder

YURII = dict(template="nesterov")
HERE = dict(device="cpu", dtype="float32")  # what the machine is, not the run


def resume(out, **options) -> list[dict]:
    """Go on with nothing but these options; the records."""
    train.main(option_words(out_dir=out, init_from="resume", **HERE | options))
    return records(out)


# -----------------------------------------------------------------------------
# Exact continuation


class Counting(torch.optim.SGD):
    """A fork's optimiser: its parameters have no names, its state has a number and a list."""

    def __init__(self, params):
        super().__init__(params, lr=0.1, momentum=0.9)

    def step(self, closure=None):
        super().step()
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            state["step"] = state.get("step", 0) + 1
            state["factors"] = [torch.full((7, 7), state["step"]), None]


@pytest.mark.parametrize("kind", [Counting, torch.optim.Adafactor])
def test_a_forks_optimiser(run, tmp_path, monkeypatch, kind):
    def make(model, *_):
        optimizer = kind(list(model.parameters()))
        optimizer.param_groups[0]["peak_lr"] = 0.1
        return {"sgd": optimizer}

    monkeypatch.setattr(train, "make_optimizers", make)
    run(tmp_path / "whole", decay_lr=False)
    run(tmp_path / "parts", decay_lr=False, max_iters=4)
    resume(tmp_path / "parts", max_iters=6)
    whole, parts = (load(tmp_path / name) for name in ("whole", "parts"))
    assert_same(parts["optimizer"], whole["optimizer"])
    assert_same(parts["model"], whole["model"])


RESUMED = {
    "hourglass": dict(HOURGLASS),
    "float64": dict(YURII, dtype="float64", log_interval=2),
    "bf16": dict(YURII, dtype="bfloat16"),
    "fp16-muon": dict(dtype="float16", optimizer="muon"),
    **{f"{template}-{optimizer}": dict(template=template, optimizer=optimizer)
       for template, optimizer in zip(TEMPLATES, 5 * ("adamw", "muon"), strict=False)}}


@pytest.mark.parametrize("variant, dataset", [
    *zip(RESUMED, 9 * ("tiny", "edge"), strict=False)])
def test_resuming_is_bit_for_bit(run, tmp_path, variant, dataset):
    """From step 3 of 6: in the midst of the second epoch, or where it begins."""
    options = dict(dataset=dataset, dropout=0.2, eval_interval=2, save_interval=3,
                   **RESUMED[variant])
    run(tmp_path / "whole", **options)
    half = as_killed_at_3(tmp_path / "whole", tmp_path / "half")
    resume(half, dtype=options.get("dtype", "float32"))
    assert_same_end(half, tmp_path / "whole")


def test_stopped_at_any_step_and_resumed(run, tmp_path):
    """By a signal, also where an evaluation or a save is due; in the midst of epochs."""
    options = dict(YURII, optimizer="muon", dropout=0.1, eval_interval=2, save_interval=3)
    whole, handler = tmp_path / "whole", signal.getsignal(signal.SIGTERM)
    run(whole, **options)
    for step in range(1, 6):
        half = tmp_path / f"{step}"
        run(half, hooks=[partial(stop_after, step)], **options)
        assert load(half)["iter_num"] == step
        run(half, init_from="auto", **options)
        assert_same_end(half, whole)
    assert signal.getsignal(signal.SIGTERM) is handler


def stop_within_evaluation(number, counted, patch) -> None:
    """A signal comes in this batch, of those of all evaluations together."""
    def to_device(rows, device, wrapped=train.to_device):
        if not torch.is_grad_enabled():
            counted.append(len(rows))
            if len(counted) == number:
                os.kill(os.getpid(), signal.SIGTERM)
        return wrapped(rows, device)

    patch.setattr(train, "to_device", to_device)


@pytest.mark.parametrize("step, number", [(0, 2), (3, 7), (6, 12)])  # each has five batches
def test_a_signal_ends_an_evaluation(run, tmp_path, step, number):
    """At once; the step is saved, and the evaluation made when the run goes on."""
    counted, whole, half = [], tmp_path / "whole", tmp_path / "half"
    run(whole, dropout=0.1)
    found = run(half, hooks=[partial(stop_within_evaluation, number, counted)], dropout=0.1)
    assert len(counted) == number and steps_of(found) == [*range(step)]
    assert step not in [r["iter"] for r in of_kind(found, "eval")]
    assert step == 0 and not (half / "ckpt.pt").exists() or load(half)["iter_num"] == step
    run(half, init_from="auto", dropout=0.1)
    assert_same_end(half, whole)
    assert load(half, "best.pt")["iter_num"] == load(whole, "best.pt")["iter_num"]


def test_the_scaler_resumes(run, tmp_path):
    """From any step before, at or after a change of the scale, which is about to grow."""
    options = dict(optimizer="muon", dtype="float16", dropout=0.1)
    start = tmp_path / "start"
    run(start, max_iters=3, lr_decay_iters=6, **options)
    checkpoint = load(start)
    checkpoint["scaler"] |= {"scale": 2.0**10, "_growth_tracker": 1998}
    torch.save(checkpoint, start / "ckpt.pt")
    whole = shutil.copytree(start, tmp_path / "whole")
    run(whole, hooks=[partial(log_scale, tmp_path / "scale")], init_from="resume", **options)
    seen = scales(tmp_path / "scale")
    assert seen == [2.0**10, 2.0**11, 2.0**11]
    for step in (4, 5):
        half = shutil.copytree(start, tmp_path / f"{step}")
        run(half, hooks=[partial(stop_after, step)], init_from="resume", **options)
        assert load(half)["scaler"]["scale"] == seen[step - 4]
        run(half, init_from="resume", **options)
        assert_same_end(half, whole)


# -----------------------------------------------------------------------------
# Several processes, and other numbers of them


MUON = dict(YURII, parallel="fsdp", optimizer="muon", dataset="edge", dropout=0.2, save_interval=3)
# windows of `count`, whose tokens say where they are: 12 a step, 20 an epoch
SHARED = dict(YURII, dataset="count", batch_size=2, gradient_accumulation_steps=6,
              dtype="float64", save_interval=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def ranked(folder, run, job):
    """Runs of one and of two processes, copied and sharded."""
    in_ranks(2, [job(folder / "muon", **MUON), job(folder / "two", **SHARED),
                 job(folder / "shards", parallel="fsdp", **SHARED)])
    run(folder / "one", hooks=[partial(record_windows, folder / "w-one")], **SHARED)


# name -> what run goes on, in how many processes, how, does it warn
ELSEWHERE = {
    "two-in-one": ("two", 1, {}, True), "shards-in-one": ("shards", 1, {}, True),
    "larger-batches": ("one", 1, dict(batch_size=4, gradient_accumulation_steps=3), False),
    "one-in-two": ("one", 2, {}, True), "one-in-shards": ("one", 2, dict(parallel="fsdp"), True),
    "two-in-shards": ("two", 2, dict(parallel="fsdp"), False),
    "shards-in-two": ("shards", 2, {}, False)}


@pytest.fixture(scope="module")
def resumed(ranked, folder):
    """name -> what is printed where a run that was killed after step 3 goes on: those of ELSEWHERE,
    and one as it was."""
    plan = {**ELSEWHERE, "muon": ("muon", 2, dict(parallel="fsdp", dtype="float32"), False)}
    printed = {}
    for world in (1, 2):
        names = [name for name in plan if plan[name][1] == world]
        jobs = []
        for name in names:
            source, _, how, _ = plan[name]
            out = as_killed_at_3(folder / source, folder / f"half-{name}")
            options = dict(out_dir=out, init_from="resume", device="cpu", dtype="float64") | how
            argv = option_words(**options)
            jobs.append((argv, [partial(record_windows, folder / f"w-{name}")]))
        printed |= zip(names, in_ranks(world, jobs).split("done: "), strict=False)
    return printed


def test_two_ranks_resume_bit_for_bit(resumed, folder):
    """Sharded Muon's momentum; hostile/test_kills.py has AdamW, copied and sharded."""
    assert_same_end(folder / "half-muon", folder / "muon")
    first, second = load(folder / "muon")["rng"]
    assert not torch.equal(first["cpu"], second["cpu"])


@pytest.mark.parametrize("name", ELSEWHERE)
def test_resuming_with_another_number_of_processes(resumed, folder, name):
    """And another micro-batch, or sharded where it was not and the reverse: the same data in the
    same steps, the same losses, and a word about the generators."""
    (expected,) = windows(folder / "w-one", 6)
    order = WindowOrder(343, 16, train.TrainConfig.seed)
    assert (np.sort(expected) == np.sort(np.reshape(order.starts(0, 72), (6, 12)))).all()
    read = np.sort(np.concatenate(windows(folder / f"w-{name}", 3), axis=1))
    assert (read == np.sort(expected)[3:]).all()
    half, one = folder / f"half-{name}", folder / "one"
    assert np.abs(losses(half) - losses(one)).max() < 1e-10
    assert largest_difference(tensors(half), tensors(one)) < 1e-10
    assert ("starts anew from the seed" in resumed[name]) == ELSEWHERE[name][-1]


# -----------------------------------------------------------------------------
# The options of a run that goes on


@pytest.fixture
def preset(tmp_path, data_dir):
    """preset(**options): a preset file of a tiny run into tmp_path/out."""
    def write(**options) -> str:
        path = tmp_path / "preset.py"
        assigned = TINY | dict(dataset="tiny", data_dir=str(data_dir), max_iters=4,
                               out_dir=str(tmp_path / "out"), eval_interval=2, dropout=0.1,
                               template="nesterov") | options
        path.write_text("".join(f"{n} = {v!r}\n" for n, v in assigned.items()))
        return str(path)

    return write


@pytest.fixture
def started(preset, tmp_path, capsys):
    """A run of a preset and an option, stopped after step 2; a whole one beside; its words."""
    argv = [preset(), "--beta2=0.9"]
    train.main([*argv, f"--out_dir={tmp_path}/whole"])
    with pytest.MonkeyPatch.context() as patch:
        stop_after(2, patch)
        train.main(argv)
    capsys.readouterr()
    return argv


def changes_said(out: str) -> list[str]:
    return [line for line in out.splitlines() if "(was " in line]


def test_the_folder_alone_or_the_same_command_again(started, tmp_path, capsys):
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    resume(tmp_path / "copy")
    train.main([*started, "--init_from=resume"])
    assert changes_said(capsys.readouterr().out) == []
    for out in ("out", "copy"):
        assert_same_end(tmp_path / out, tmp_path / "whole")
        assert load(tmp_path / out)["config"]["beta2"] == 0.9


def test_a_preset_named_again_changes_nothing(started, preset, tmp_path, capsys):
    """Not even the shape; what it would change is one line, with the options that do it."""
    path = preset(learning_rate=2e-3, n_layer=3, max_iters=99)
    train.main([path, "--init_from=resume"])
    (line,) = changes_said(capsys.readouterr().out)
    assert "keeps its own options" in line
    assert line.endswith("--learning_rate=0.002 (was 0.001) --max_iters=99 (was 4) "
                         "--n_layer=3 (was 2)")
    assert_same_end(tmp_path / "out", tmp_path / "whole")


def test_the_command_line_changes_some(started, tmp_path, capsys):
    resume(tmp_path / "out", learning_rate=2e-3, max_iters=5, dropout=0.0)
    (line,) = changes_said(capsys.readouterr().out)
    assert line == ("resuming with other options: --dropout=0.0 (was 0.1) --learning_rate=0.002 "
                    "(was 0.001) --max_iters=5 (was 4)")
    checkpoint = load(tmp_path / "out")
    assert checkpoint["iter_num"] == 5 and checkpoint["model_args"]["dropout"] == 0.0
    assert {n: checkpoint["config"][n] for n in ("learning_rate", "beta2", "dropout")} == {
        "learning_rate": 2e-3, "beta2": 0.9, "dropout": 0.0}
    found = resume(tmp_path / "out", max_iters=6)  # and what was changed stays so
    assert load(tmp_path / "out")["config"]["learning_rate"] == 2e-3
    assert steps_of(found) == [0, 1, 2, 3, 4, 5]
    assert resume(tmp_path / "out") == found  # nothing is left to do


def test_the_machine_is_the_calls(run, tmp_path, capsys):
    """Device, precision, compilation, sharding: from the command line or auto, never the run's."""
    run(tmp_path, max_iters=1, dtype="float64", parallel="ddp", compile=False)
    checkpoint = load(tmp_path)
    checkpoint["config"] |= dict(device="cuda", dtype="float16", compile=True, parallel="fsdp",
                                 backend="nccl")
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    train.main(option_words(out_dir=tmp_path, init_from="resume", device="cpu", max_iters=2))
    assert load(tmp_path)["config"]["parallel"] == "ddp" and load(tmp_path)["iter_num"] == 2
    assert ", eager" in capsys.readouterr().out


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="Linux lists what is mapped")
def test_a_resumed_run_lets_go_of_its_checkpoint(run, tmp_path):
    """Which Windows does not let it replace, else."""
    mapped = []

    def watch(patch):
        def look(*args, wrapped=train.accumulate):
            mapped.append("ckpt.pt" in Path("/proc/self/maps").read_text())
            return wrapped(*args)

        patch.setattr(train, "accumulate", look)

    run(tmp_path)
    run(tmp_path, hooks=[watch], init_from="resume", max_iters=8)
    assert mapped == [False, False]


def test_the_context_may_shrink(run, tmp_path):
    """The optimiser's state of the position tables is cut with them."""
    run(tmp_path, max_iters=3, template="nesterov", optimizer="muon")
    resume(tmp_path, block_size=8, max_iters=6)
    checkpoint = load(tmp_path)
    assert checkpoint["iter_num"] == 6 and checkpoint["model_args"]["block_size"] == 8
    assert checkpoint["run"]["position"] == 2 * 24 + 24  # in windows of 8: the same tokens
    for name, state in checkpoint["optimizer"]["adamw"].items():
        assert state["exp_avg"].shape == checkpoint["model"][name].shape, name
    resume(tmp_path, max_iters=7)  # and stays so
    assert load(tmp_path)["model_args"]["block_size"] == 8


def test_eval_only_writes_nothing(run, tmp_path, capsys):
    run(tmp_path)

    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    before = contents()
    capsys.readouterr()
    resume(tmp_path, eval_only=True)
    assert f"val loss {load(tmp_path)['best_val_loss']:.4f}" in capsys.readouterr().out
    assert contents() == before


# -----------------------------------------------------------------------------
# The data of a run that goes on


def test_data_are_known_by_what_they_hold(run, tmp_path, data_dir):
    """Under any name; others of the same name and size are refused."""
    run(tmp_path / "a", max_iters=3)
    shutil.copytree(data_dir / "tiny", tmp_path / "moved")
    assert steps_of(resume(tmp_path / "a", data_dir=tmp_path, dataset="moved", max_iters=4)) == [
        0, 1, 2, 3]
    write_data(tmp_path / "data" / "tiny", np.zeros(343), np.zeros(300))
    refused(lambda: resume(tmp_path / "a", data_dir=tmp_path / "data", dataset="tiny"),
            "not the data", "--init_from=")
    assert load(tmp_path / "a")["iter_num"] == 4


def test_nanogpts_data(run, tmp_path):
    """A model of our gpt2 data may be trained on a folder of nanoGPT's."""
    write_data(tmp_path / "ours", np.arange(343), vocab_size=50257, padded_vocab_size=50304,
               tokenizer="gpt2")
    write_data(tmp_path / "nano", np.arange(343))
    (tmp_path / "nano" / "meta.json").unlink()
    options = dict(data_dir=tmp_path, n_embd=4, n_layer=1, max_iters=1, eval_tokens=64)
    run(tmp_path / "a", dataset="ours", **options)
    run(tmp_path / "b", dataset="nano", init_from=tmp_path / "a" / "ckpt.pt", **options)
    assert load(tmp_path / "b")["model_args"]["vocab_size"] == 50304
    assert load(tmp_path / "b")["model_args"]["vocab_used"] == 50257
    resume(tmp_path / "b", max_iters=2)
    assert load(tmp_path / "b")["iter_num"] == 2


# -----------------------------------------------------------------------------
# Earlier runs, nanoGPT's, and runs from other weights


def test_a_nanogpt_checkpoint_resumes(tmp_path, data_dir, capsys):
    """With the options that it stored, but not the machine's; or with others."""
    model, moments = nanogpt_checkpoint(tmp_path / "ckpt.pt")
    found = resume(tmp_path, data_dir=data_dir, max_iters=5)
    assert [(r["type"], r.get("iter")) for r in found] == [("config", None), ("train", 4),
                                                           ("eval", 5)]
    assert found[-1]["best_val_loss"] == 2.5
    assert found[0]["bias"] and found[0]["batch_size"] == 4 and found[0]["dtype"] == "float32"
    assert found[0]["eval_tokens"] == 3 * 4 * 16
    for name, state in load(tmp_path)["optimizer"]["adamw"].items():
        assert state["step"] == 5
        old = moments[name] * torch.ones(())
        assert torch.allclose(state["exp_avg"], 0.9 * old, atol=1.0), name
        assert torch.allclose(state["exp_avg_sq"], 0.95 * old, atol=1.0), name
    assert largest_difference(dict(model.state_dict()), load(tmp_path)["model"]) < 0.1
    assert load(tmp_path)["run"]["position"] == 8  # the data from the start: nanoGPT has no order
    nanogpt_checkpoint(tmp_path / "ckpt.pt")
    found = resume(tmp_path, data_dir=data_dir, max_iters=5, optimizer="muon", dtype="float16",
                   batch_size=2, gradient_accumulation_steps=4)
    assert load(tmp_path)["iter_num"] == 5 and found[0]["eval_tokens"] == 3 * 2 * 16
    optimizer, generators = [line for line in capsys.readouterr().out.splitlines()
                             if line.startswith("warning: the checkpoint")][-2:]
    assert "optimiser" in optimizer and "generator" in generators


GPT2 = dict(n_positions=16, n_embd=4, n_layer=1, n_head=2)
TUNE = dict(HERE, max_iters=1, batch_size=2, eval_tokens=64, gradient_accumulation_steps=1)


@pytest.fixture
def gpt2s(tmp_path, gpt2_cache, monkeypatch):
    """GPT-2 under all of its names: gpt2 in a cache of the Hub, a folder of transformers, and what
    comes of that here: a run's .pt, and that exported in both forms."""
    transformers = pytest.importorskip("transformers")
    snapshot = tmp_path / "hub/models--gpt2/snapshots/1"
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)).save_pretrained(snapshot)
    (tmp_path / "hub/models--gpt2/refs").mkdir()
    (tmp_path / "hub/models--gpt2/refs/main").write_text("1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    shutil.copytree(snapshot, tmp_path / "theirs")
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n" * 99)
    for name in ("gpt2", "bytes"):
        prepare.main(["text", f"--input={tmp_path}/text.txt", f"--data_dir={tmp_path}/data",
                      f"--name={name}", f"--tokenizer={name}"])
    shutil.copytree(tmp_path / "data" / "gpt2", tmp_path / "data" / "r50k")
    meta = tmp_path / "data" / "r50k" / "meta.json"
    meta.write_text(meta.read_text().replace('"tokenizer": "gpt2"', '"tokenizer": "r50k_base"'))
    return {"hub": "gpt2", "folder": tmp_path / "theirs", "pt": tmp_path / "tuned" / "ckpt.pt",
            "hf": tmp_path / "hf", "safetensors": tmp_path / "safetensors"}


def test_fine_tuning_gpt2(gpt2s, tmp_path):
    """From each of its names, on data that fit, of its two tokenizers' names, and no others."""
    for kind, source in gpt2s.items():
        for name in ("gpt2", "r50k", "bytes"):
            argv = option_words(init_from=source, data_dir=tmp_path / "data", dataset=name,
                                out_dir=tmp_path / f"{kind}-{name}", **TUNE)
            if name == "bytes":
                (line,) = refused(lambda argv=argv: train.main(argv), "another tokenizer, bytes",
                                  "--tokenizer=gpt2")
            else:
                train.main(argv)
                args = load(tmp_path / f"{kind}-{name}")["model_args"]
                assert (args["n_embd"], args["bias"], args["activation"]) == (4, True, "gelu_tanh")
        if kind == "folder":
            shutil.copytree(tmp_path / "folder-gpt2", tmp_path / "tuned")
            for form in ("hf", "safetensors"):
                bench.main(["export", f"--ckpt={gpt2s['pt']}", f"--out={gpt2s[form]}",
                            f"--format={form}"])
        _, tokenizer = sample.load_model(sample.SampleConfig(init_from=str(source)))
        assert tokenizer.name == "gpt2"

