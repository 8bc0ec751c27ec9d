"""support/checkpoint.py: what is in a checkpoint, which are kept, and a damaged one."""

import math
import os
import signal
import sys
from functools import partial

import pytest
import torch
from conftest import assert_same, load, nanogpt_checkpoint, refused, scripted, steps_of

import sample
import train
from model import ATTENTIONS, GPT, CausalSelfAttention
from support.checkpoint import HEAD, TABLE, model_from, read_checkpoint, read_latest
from tools.exchange import to_safetensors


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_checkpoint_is_plain_and_has_nanogpts_keys(run, tmp_path, optimizer):
    run(tmp_path, optimizer=optimizer, template="tmm")
    checkpoint = load(tmp_path)  # with weights_only=True
    assert {"model", "optimizer", "model_args", "iter_num", "best_val_loss", "config", "rng",
            "run", "data", "tokenizer", "versions", "code"} <= checkpoint.keys()
    assert checkpoint["iter_num"] == 6 and checkpoint["run"]["position"] == 6 * 8
    assert checkpoint["versions"]["torch"] == str(torch.__version__)
    assert checkpoint["config"]["template"] == checkpoint["model_args"]["template"] == "tmm"
    states = {n for named in checkpoint["optimizer"].values() for n in named}
    assert states == checkpoint["model"].keys() - {"lm_head.weight"}
    tables = [checkpoint["model"][f"{name}.weight"] for name in ("lm_head", "transformer.wte")]
    assert tables[0].data_ptr() == tables[1].data_ptr()  # tied, and once in the file
    model_from(checkpoint)


def steps(out) -> dict[str, int]:
    """Of the checkpoints that exist."""
    return {path.stem: load(out, path.name)["iter_num"] for path in out.glob("*.pt")}


def test_latest_previous_and_best(run, tmp_path):
    """The best has the weights alone, of the lowest evaluation among the steps that are saved; an
    evaluation alone writes nothing, and one that is nan does not end the search."""
    options = dict(eval_interval=1, save_interval=2, schedule="constant")
    run(tmp_path, hooks=[partial(scripted, [5.0, 1.0, 3.0, 2.0, 4.0])], max_iters=4, **options)
    assert steps(tmp_path) == {"ckpt": 4, "ckpt_prev": 2, "best": 2}
    assert load(tmp_path)["best_val_loss"] == 1.0  # of all evaluations
    best, saved = load(tmp_path, "best.pt"), load(tmp_path, "ckpt_prev.pt")
    assert best.keys() == {"model", "model_args", "config", "tokenizer", "iter_num",
                           "best_val_loss", "code"}
    assert_same(best, {name: saved[name] for name in best})
    run(tmp_path, hooks=[partial(scripted, [3.5, math.nan, 2.5, 2.9])], max_iters=8,
        init_from="resume", **options)
    assert steps(tmp_path) == {"ckpt": 8, "ckpt_prev": 6, "best": 8}
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("name, buffer", [
    ("mask", torch.ones(2, 2).bool()), ("mask", torch.full((2, 2), -math.inf).triu(1)),
    ("bias", torch.ones(2, 2)), ("rope", torch.polar(torch.ones(2), torch.ones(2))),
    ("count", torch.tensor(3))])
def test_a_forks_buffers(run, tmp_path, monkeypatch, name, buffer):
    """Of any type and value: saved as they are, read back as they were saved."""
    class Forked(CausalSelfAttention):
        def __init__(self, config):
            super().__init__(config)
            self.register_buffer(name, buffer.clone())

    monkeypatch.setitem(ATTENTIONS, "forked", Forked)
    run(tmp_path, attention="forked", max_iters=1)
    model = model_from(load(tmp_path))
    assert_same(model.get_buffer(f"transformer.h.0.attn.{name}"), buffer)
    run(tmp_path, init_from="resume", max_iters=2)
    sample.main([f"--out_dir={tmp_path}", "--device=cpu", "--start=a", "--max_new_tokens=2"])


def test_a_forks_learned_bias_is_no_mask(run, tmp_path, monkeypatch):
    class Biased(CausalSelfAttention):
        role = "norm"

        def __init__(self, config):
            super().__init__(config)
            self.bias = torch.nn.Parameter(torch.ones(config.n_head, 1))

    monkeypatch.setitem(ATTENTIONS, "biased", Biased)
    run(tmp_path, attention="biased", max_iters=1)
    run(tmp_path, init_from="resume", max_iters=2)


def test_a_forks_own_head(run, tmp_path, monkeypatch):
    """Which is not the table of tokens: saved, exported and read back as it is."""
    def untied(self, config, wrapped=GPT.__init__):
        wrapped(self, config)
        self.lm_head.weight = torch.nn.Parameter(self.lm_head.weight.detach() + 1)

    monkeypatch.setattr(GPT, "__init__", untied)
    run(tmp_path, max_iters=3)
    checkpoint = load(tmp_path)
    assert (checkpoint["model"][HEAD] - checkpoint["model"][TABLE]).mean() > 0.9
    assert_read(checkpoint, checkpoint["model"])
    pytest.importorskip("safetensors")
    to_safetensors(model_from(checkpoint), {}, str(tmp_path))
    assert_read(read_checkpoint(str(tmp_path)), checkpoint["model"])


def test_a_save_at_a_stop_is_not_the_best(run, tmp_path):
    """Even if the signal comes in an evaluation that is the lowest."""
    def evaluate(*_):
        if len(values) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return values.pop(0)

    values = [5.0, 4.0, 3.0]
    options = dict(eval_interval=1, save_interval=1, max_iters=3)
    run(tmp_path, hooks=[lambda patch: patch.setattr(train, "evaluate", evaluate)], **options)
    assert steps(tmp_path) == {"ckpt": 2, "ckpt_prev": 1, "best": 1}
    run(tmp_path, hooks=[partial(scripted, [2.9])], init_from="resume", **options)
    assert steps(tmp_path) == {"ckpt": 3, "ckpt_prev": 2, "best": 3}


def test_the_previous_is_a_copy_where_there_are_no_links(run, tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    run(tmp_path, save_interval=3)
    assert steps(tmp_path) == {"ckpt": 6, "ckpt_prev": 3, "best": 6}


def test_a_failed_save_keeps_the_whole_one_beside_a_damaged(run, tmp_path, monkeypatch):
    def full(state, file, write=torch.save):
        if "optimizer" in state:
            raise OSError(28, "No space left on device")
        write(state, file)

    run(tmp_path, save_interval=3)
    (tmp_path / "ckpt.pt").write_bytes(b"damaged")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        refused(lambda: run(tmp_path, init_from="resume", save_interval=3), "No space left")
    assert read_latest(str(tmp_path))["iter_num"] == 3


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_no_checkpoint_holds_weights_that_are_not_finite(run, tmp_path, optimizer):
    """The message says that the last checkpoint is from before the loss broke."""
    rates = dict(learning_rate=1e38, muon_lr=1e38, warmup_iters=0, optimizer=optimizer)
    refused(lambda: run(tmp_path, max_iters=9, save_interval=1, log_interval=3, **rates),
            "the loss is nan", "lower the learning rate (of Muon: --muon_lr)")
    for path in tmp_path.glob("*.pt"):
        assert all(w.isfinite().all() for w in load(tmp_path, path.name)["model"].values()), path


@pytest.mark.parametrize("share", [0, 0.5, 0.999])
def test_a_damaged_checkpoint_falls_back_on_the_previous(run, tmp_path, capsys, share):
    run(tmp_path)
    whole = (tmp_path / "ckpt.pt").read_bytes()
    (tmp_path / "ckpt.pt").write_bytes(whole[:int(share * len(whole))])
    run(tmp_path, init_from="resume")
    warning = capsys.readouterr().err
    assert "ckpt.pt, which may be damaged" in warning and "ckpt_prev.pt" in warning
    assert load(tmp_path)["iter_num"] == 6
    for name in ("ckpt.pt", "ckpt_prev.pt"):
        (tmp_path / name).write_bytes(b"no zip file")
    lines = refused(lambda: run(tmp_path, init_from="resume"), "/ckpt.pt", "/ckpt_prev.pt")
    assert len(lines) == 2


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="Linux counts what is read")
def test_a_model_is_read_alone(run, tmp_path):
    """Without the optimiser's state beside it, and without weights being drawn first."""
    def bytes_read() -> int:
        with open("/proc/self/io") as file:
            return int(file.readline().split()[1])

    run(tmp_path, max_iters=1, template="tmm")
    checkpoint = load(tmp_path)
    checkpoint["optimizer"]["adamw"]["more"] = {"exp_avg": torch.zeros(4_000_000)}
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    before, rng = bytes_read(), torch.get_rng_state()
    model = model_from(read_checkpoint(tmp_path / "ckpt.pt"))
    assert bytes_read() - before < 2_000_000
    assert torch.equal(torch.get_rng_state(), rng)
    assert_same(dict(model.state_dict()), dict(checkpoint["model"]))


def test_a_run_that_saves_while_its_checkpoint_is_read(foreign, tmp_path, monkeypatch):
    """torch opens a file twice: the second may be another."""
    path, new = str(tmp_path / "ckpt.pt"), str(tmp_path / "new.pt")
    weights = {name: w + 1 for name, w in foreign["model"].items()}
    later = foreign | {"more": "x" * 1000, "model": weights}
    torch.save(foreign, path)
    torch.save(later, new)
    os.utime(path, (0, 0))

    def saved_just_now(*args, wrapped=torch.UntypedStorage.from_file):
        if os.path.exists(new):
            os.replace(new, path)
        return wrapped(*args)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", saved_just_now)
    assert_same(read_checkpoint(path), later)


@pytest.mark.parametrize("name, zipped", [(b"a.pt", False), (b"caf\xe9.pt", True)])
def test_files_that_torch_cannot_map(foreign, tmp_path, name, zipped):
    """Older ones, and those whose names are not UTF-8."""
    path = os.path.join(tmp_path, os.fsdecode(name))
    with open(path, "wb") as file:
        torch.save(foreign, file, _use_new_zipfile_serialization=zipped)
    assert_same(read_checkpoint(path), foreign)


def test_a_run_does_not_spoil_an_export(run, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    for word in ("--overwrite", "--max_iters=1"):
        refused(lambda word=word: run(tmp_path, word), "exported weights", "--out_dir")
    assert set(os.listdir(tmp_path)) - {".lock"} == {"model.safetensors"}


def test_a_used_folder_needs_overwrite(run, tmp_path, monkeypatch):
    """And what would be replaced survives a run that cannot start."""
    run(tmp_path, max_iters=3)
    before = (tmp_path / "ckpt.pt").read_bytes()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "wandb", None)
        refused(lambda: run(tmp_path, "--overwrite", "--wandb_log"), "pip install wandb")
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1 + 2 + 3
    assert steps_of(run(tmp_path, "--overwrite", max_iters=2, eval_interval=9)) == [0, 1]
    assert steps(tmp_path) == {"ckpt": 2, "best": 2}  # no old ckpt_prev.pt


# -----------------------------------------------------------------------------
# Weights from elsewhere


@pytest.fixture
def foreign(tmp_path):
    """A checkpoint of nanoGPT's model and train.py, without its prefix; its weights as a model."""
    model, _ = nanogpt_checkpoint(tmp_path / "ckpt.pt")
    checkpoint = load(tmp_path)
    checkpoint["model"] = dict(model.state_dict())
    return checkpoint


def assert_read(checkpoint, expected) -> None:
    assert_same(dict(model_from(checkpoint).state_dict()), expected)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module.", "module._orig_mod."])
@pytest.mark.parametrize("left_out", [None, HEAD, TABLE])
def test_names_of_weights(foreign, prefix, left_out):
    """As wrappers make them, and the tied table once."""
    weights = foreign["model"]
    table = {prefix + name: w for name, w in weights.items() if name != left_out}
    table[f"{prefix}transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16).tril()  # an old mask
    assert_read(foreign | {"model": table}, weights)


@pytest.mark.parametrize("kind, widest", [(torch.float64, torch.float64),
                                          (torch.float16, torch.float32)])
def test_a_model_is_as_precise_as_its_widest_weights(foreign, kind, widest):
    weights = {n: w.to(kind if n == "transformer.ln_f.weight" else torch.bfloat16)
               for n, w in foreign["model"].items()}
    assert_read(foreign | {"model": weights}, {n: w.to(widest) for n, w in weights.items()})


@pytest.mark.parametrize("change, said", [
    ({HEAD: torch.ones(257, 32)}, ["lm_head.weight", "transformer.wte.weight", "tied"]),
    ({TABLE: torch.ones(257, 32).to(torch.float8_e4m3fn)}, [TABLE, "float8_e4m3fn", "16 to 64"]),
    ({TABLE: torch.ones(257, 32).to(torch.int8)}, [TABLE, "int8"]),
    ({TABLE: None}, [TABLE, "NoneType"]),
    ({"transformer.ln_f.weight": torch.full((32,), torch.nan)}, ["nan or infinite", "ln_f"]),
    ({"module.transformer.ln_f.weight": torch.zeros(32)}, ["twice", "module."]),
    ({TABLE: torch.ones(4, 32), HEAD: torch.ones(4, 32)}, ["do not fit its model_args", "size"])])
def test_weights_that_do_not_fit(foreign, change, said):
    refused(lambda: model_from(foreign | {"model": foreign["model"] | change}), *said)


@pytest.mark.parametrize("name", ["optimizer", "scaler", "rng", "data", "tokenizer", "versions"])
def test_none_is_as_if_absent(run, tmp_path, capsys, name):
    run(tmp_path, max_iters=2)
    whole, printed = load(tmp_path), []
    for checkpoint in (whole | {name: None}, {k: v for k, v in whole.items() if k != name}):
        capsys.readouterr()
        torch.save(checkpoint, tmp_path / "ckpt.pt")
        run(tmp_path, max_iters=3, init_from="resume")
        lines = capsys.readouterr().out.splitlines()
        printed.append([line for line in lines if "tokens/s" not in line])
    assert printed[0] == printed[1]
