"""Files and words from strangers: every mistake ends in one line and exit code 2, leaves the folder
as it was, and no file that is only data runs anything.

The rows of the tables are a command line or what is spoiled before it, then words that the error
line must have (what was wrong, and something of the fix). They run in a folder (`place`) with

    data/tiny, data/char    prepared by us: bytes; the characters a to z
    data/nano, data/gpt2    prepared by nanoGPT: with a meta.pkl (a to z), and without
    run                     a finished run of train.py on data/tiny
    text.txt                something to prepare
"""

import ast
import functools
import json
import os
import pickle
import shlex
import shutil
import string
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, option_words, write_data
from faults import limit_resources
from processes import ROOT, Program

import prepare
import sample
import train
from support.errors import UserError, cli

LETTERS = string.ascii_lowercase
MAINS = {"train": train.main, "sample": sample.main, "prepare": prepare.main}
USUAL = {  # the words that come before those of a row
    "train": option_words(dataset="tiny", out_dir="new", **TINY),
    "sample": option_words(out_dir="run", device="cpu", dtype="float32", num_samples=1,
                           max_new_tokens=3, start="abc"),
    "prepare": ["text", "--input=text.txt", "--tokenizer=bytes", "--name=new"]}
RESUME = "--init_from=resume --out_dir=run"
BOTH = ("train", RESUME), ("sample", "")  # the programs that read a checkpoint
MANY, MORE = 10**12, 10**400  # more than any memory holds; more than any float or int64 holds
WTE, FC = "transformer.wte.weight", "transformer.h.0.mlp.c_fc.weight"


# -----------------------------------------------------------------------------
# Where the rows run, and how


@pytest.fixture(scope="session")
def original(tmp_path_factory) -> Path:
    root, rng = tmp_path_factory.mktemp("input"), np.random.default_rng(0)
    bins = rng.integers(256, size=343), rng.integers(256, size=300)
    write_data(root / "data/tiny", *bins)
    write_data(root / "data/char", bins[0] % 26, bins[1] % 26, vocab_size=26, tokenizer="char",
               alphabet=LETTERS)
    for name in "nano", "gpt2":
        write_data(root / "data" / name, bins[0] % 26, bins[1] % 26)
        (root / "data" / name / "meta.json").unlink()
    (root / "data/nano/meta.pkl").write_bytes(pickle.dumps({"itos": dict(enumerate(LETTERS))}))
    (root / "text.txt").write_text("Once upon a time. <|endoftext|> The end.\n" * 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        train.main([*USUAL["train"], "--out_dir=run", "--max_iters=2"])
    (root / "run/best.pt").unlink()
    return root


@pytest.fixture
def place(original, tmp_path, monkeypatch) -> Path:
    """A copy of the original, and the working directory."""
    shutil.copytree(original, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def contents(folder: Path) -> dict[str, bytes | None]:
    """Files with their bytes, folders; but not the locks in them."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
            for p in folder.rglob("*") if p.name != ".lock"}


def argv(name: str, words: str) -> list[str]:
    return [*USUAL[name], *shlex.split(words)]


@pytest.fixture
def program(monkeypatch, capsys):
    """program(name, words) runs it in this process: (exit code, lines on stderr)."""
    def go(name, words):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *argv(name, words)])
        capsys.readouterr()
        code = 0
        try:
            cli(MAINS[name])
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().err.splitlines()

    return go


def check(code: int, lines: list[str], expected) -> None:
    """Exit code 2, one line, these words; nothing that could steer a terminal."""
    lines = [line for line in lines if line and not line.startswith(("reading: ", "encoding: "))]
    assert code == 2, f"exit code {code}: {' | '.join(lines[-1:])[-300:]}"
    (line,) = lines
    assert line.startswith("error: ") and line.isprintable() and len(line) < 1000, line
    assert all(word in line for word in expected), (expected, line)


@pytest.fixture
def refused(place, program):
    """refused(name, words, expected): what is there stays, byte for byte, and nothing comes."""
    def go(name, words, expected, program=program):
        before = contents(place)
        check(*program(name, words), expected)
        after = contents(place)
        assert after.keys() == before.keys()
        assert after == before

    return go


def rows(names, *rows):
    """A table whose last column is `expected`: all that is left of a row."""
    columns = len(names.split(", "))
    return pytest.mark.parametrize(f"{names}, expected", [
        (*row[:columns], row[columns:]) for row in rows])


# --- ways to spoil something


def put(path, content):
    """Write a file, a text or bytes; None: remove it; a folder: {}."""
    def spoil(place):
        target = place / path
        target.unlink(missing_ok=True)
        if content == {}:
            target.mkdir()
        elif content is not None:
            target.write_bytes(content.encode() if isinstance(content, str) else content)

    return spoil


def cut(path, length):
    """Keep the first bytes of a file; a negative length counts from its end."""
    return lambda place: (place / path).write_bytes((place / path).read_bytes()[:length])


def ids(path, *tokens):
    """Write a bin."""
    return put(path, np.array(tokens, "<u2").tobytes())


def meta(dataset="tiny", **changes):
    """Change keys of a meta.json."""
    def spoil(place):
        path = place / "data" / dataset / "meta.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def holds(thing):
    """Save this as the run's only checkpoint."""
    return lambda place: torch.save(thing, place / "run/ckpt.pt")


def checkpoint(change):
    """Change the run's only checkpoint in place."""
    def spoil(place):
        content = torch.load(place / "run/ckpt.pt", weights_only=True)
        change(content)
        holds(content)(place)

    return spoil


def setting(inside=None, **changes):
    """Set keys of the checkpoint, or inside one of them."""
    return checkpoint(lambda c: (c[inside] if inside else c).update(changes))


def without(key, inside=None):
    return checkpoint(lambda c: (c[inside] if inside else c).pop(key))


def weight(name, change):
    """Replace a weight of the checkpoint's model."""
    return checkpoint(lambda c: c["model"].update({name: change(c["model"].get(name))}))


# -----------------------------------------------------------------------------
# Pickles that would run something


class Payload:
    """Unpickled, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("hacked",)


@pytest.mark.parametrize("form", ["pickle", "zip", "legacy"])
@rows("name, words",
      ("train", RESUME, "run/ckpt.pt"), ("train", "--init_from=other.pt", "other.pt"),
      ("sample", "", "run/best.pt"), ("sample", "--init_from=other.pt", "other.pt"))
def test_a_checkpoint_runs_nothing(place, refused, form, name, words, expected):
    """What would be a checkpoint of a model, but for one value."""
    content = {"model": {"w": Payload()}, "model_args": {"n_layer": 1}, "iter_num": 1}
    (place / "run/ckpt.pt").unlink()
    path = place / expected[0]
    if form == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    refused(name, words, expected)
    if form == "pickle":  # the trap is set: where classes are let in, it runs its code
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert (place / "hacked").exists()


@pytest.mark.parametrize("name, words", [("train", "--dataset=nano"), ("sample", "")])
@pytest.mark.parametrize("key", ["itos", "other"])  # also in an entry that no one asks for
def test_a_meta_pkl_runs_nothing(place, refused, name, words, key):
    checkpoint(lambda c: c.pop("tokenizer") and c.update(config={"dataset": "nano"}))(place)
    for protocol in 0, 2, 4:
        table = {"itos": dict(enumerate(LETTERS))} | {key: Payload()}
        (place / "data/nano/meta.pkl").write_bytes(pickle.dumps(table, protocol))
        refused(name, words, ["meta.pkl"])


FORBIDDEN = {"pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "marshal.load",
             "shelve.open", "joblib.load", "numpy.load", "np.load", "eval", "exec", "os.system",
             "os.popen"}


def test_no_file_is_unpickled_freely():
    """Every torch.load says weights_only=True; nothing else unpickles but one reader, which admits
    no class; nothing is evaluated but presets, which are code."""
    paths = [path for folder in ("", "config", "support", "tools")
             for path in (ROOT / folder).glob("*.py")]
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                call, called = ast.unparse(node), ast.unparse(node.func)
                assert called != "torch.load" or "weights_only=True" in call, call
                exempt = (called, path) == ("exec", ROOT / "config/__init__.py")
                assert exempt or called not in FORBIDDEN, call
                assert not {"allow_pickle", "shell", "trust_remote_code"} & {
                    option.arg for option in node.keywords}, call
            if isinstance(node, ast.ImportFrom):  # no short names, which would not be found above
                names = {f"{node.module}.{a.name}" for a in node.names}
                assert not names & (FORBIDDEN | {"torch.load"}), path
    readers = [path.name for path in paths if "pickle.Unpickler" in path.read_text()]
    assert readers == ["meta.py"]  # a new one needs tests like these


# -----------------------------------------------------------------------------
# Data folders; test_tokenizer.py has a property for any meta.json


@rows(
    "dataset, spoil",
    ("tiny", cut("data/tiny/train.bin", -1), "train", "--overwrite"),
    ("tiny", ids("data/tiny/val.bin", *[1] * 301), "val", "damaged"),
    ("tiny", meta(dtype="uint32"), "train", "damaged"),
    ("tiny", put("data/tiny/train.bin", None), "train.bin", "prepare.py"),
    ("tiny", put("data/tiny/train.bin", {}), "train.bin"),
    ("gpt2", ids("data/gpt2/train.bin", *range(16)), "train.bin", "16 tokens", "17",
     "--block_size"),
    ("gpt2", ids("data/gpt2/val.bin", *range(16)), "val.bin", "16 tokens", "17", "--block_size"),
    *(("tiny", put("data/tiny/meta.json", content), "meta.json") for content in (
        "", "{", "[]", '{"dtype": "uint16"}', "[" * 100_000, b"\xff\xfe{}", {})),
    *(("tiny", meta(**{key: value}), "meta.json", "--overwrite") for key, value in (
        ("vocab_size", "257"), ("vocab_size", 0), ("vocab_size", True),
        ("padded_vocab_size", float("inf")), ("padded_vocab_size", MANY), ("dtype", "float32"),
        ("dtype", ["uint16"]), ("tokenizer", 3), ("train", []), ("val", None), ("alphabet", 7))),
    *(("tiny", meta(train={"tokens": tokens}), "damaged") for tokens in ("343", 342, True)),
    *(("char", meta("char", alphabet=alphabet), "meta.json") for alphabet in (
        LETTERS[1:], "a" * 26, [*LETTERS[1:], 7])),
    *(("nano", put("data/nano/meta.pkl", content), "meta.pkl") for content in (
        b"", *map(pickle.dumps, (7, {}, {"itos": 7}, {"itos": {1: "a"}}, {"itos": {0: b"a"}},
                                 {"itos": {0: "a", 1: "a"}}, {"itos": {}})))),
    ("../run", lambda place: None, "run", "prepare.py"))
def test_a_bad_data_folder(place, refused, dataset, spoil, expected):
    spoil(place)
    refused("train", f"--dataset={dataset}", expected)


@pytest.mark.parametrize("dataset, split, token, size", [
    ("tiny", "train", 257, 257), ("tiny", "val", 65535, 257), ("nano", "train", 26, 26)])
def test_an_id_past_the_vocabulary(place, program, dataset, split, token, size):
    """Where it is read; the run may have begun its log, but not written a checkpoint."""
    path = place / f"data/{dataset}/{split}.bin"
    tokens = np.fromfile(path, "<u2")
    tokens[10::16] = token  # in every window
    tokens.tofile(path)
    check(*program("train", f"--dataset={dataset}"), (f"{split}.bin", str(token), str(size)))
    assert not [*place.glob("new/*.pt*")]


# -----------------------------------------------------------------------------
# Checkpoints

STEERS = "a\x1b[2J\nerror: b"  # a name that holds a newline, and a code that steers a terminal


@rows(
    "spoil",
    # --- the file
    *((cut("run/ckpt.pt", length), "ckpt.pt") for length in (0, 1, 10_000, -100, -1)),
    (put("run/ckpt.pt", "not weights\n"), "ckpt.pt"), (put("run/ckpt.pt", {}), "ckpt.pt"),
    *((holds(thing), "ckpt.pt", "model_args") for thing in (
        torch.zeros(3), [1, 2], None, "x", {"w": torch.zeros(2)})),
    (without("model_args"), "model_args"), (without("model"), "model"),
    # --- its model's options
    *((setting(model_args=value), "model_args") for value in (None, [1], "n_layer=2")),
    (setting("model_args", n_experts=8), "n_experts", "version"),
    (setting("model_args", template="lion"), "template=lion"),
    (without("n_layer", "model_args"), "weights"),
    *((setting("model_args", **{name: value}), name) for name, value in (
        ("n_layer", 0), ("n_head", 3), ("n_embd", True), ("dropout", float("nan")),
        ("block_size", -16), ("vocab_size", 0), ("bias", "maybe"), ("ffn", 3))),
    *((setting("model_args", n_layer=value), "model_args") for value in ("2", 2.5)),
    (checkpoint(lambda c: c["model_args"].update({7: 7})), "model_args"),
    # --- its weights
    *((setting(model=value), "weights") for value in (
        None, [torch.zeros(2)], torch.zeros(2), {}, {7: torch.zeros(2)})),
    (without(FC, "model"), FC), (weight(FC, lambda w: w[:, :3]), FC, "size"),
    (weight("transformer.extra", lambda _: torch.zeros(2)), "transformer.extra"),
    (weight(STEERS, lambda _: torch.zeros(2)), "model_args"),
    (weight(FC, lambda _: "w"), "weights"), (setting("model_args", head_dim=4), "weights"),
    # --- its tokenizer, its run's options
    *((setting(tokenizer=value), "tokenizer") for value in (
        {"tokenizer": 7}, {"alphabet": "ab"}, {"tokenizer": "char"},
        {"tokenizer": "gtp2"}, {"tokenizer": STEERS}, {"tokenizer": "char", "alphabet": 7},
        {"tokenizer": "char", "alphabet": "aab", "vocab_size": 3}, "bytes", 7)),
    (setting(config=[1]), "config"))
def test_a_bad_checkpoint(place, refused, spoil, expected):
    """For the trainer, which would resume from it, and for sample.py."""
    spoil(place)
    for name, words in BOTH:
        refused(name, words, expected)


@rows(
    "spoil",
    (without("iter_num"), "no run to resume", "--init_from="),
    (setting(tokens_seen=16), "earlier version", "--init_from=run/ckpt.pt"),
    (setting(data=[]), "data", "--init_from="),
    *((setting(**{key: value}), key) for key, value in (
        ("run", 7), ("run", [1]), ("run", {"pace": 7}), ("optimizer", [1]),
        ("optimizer", {"adamw": 7}), ("rng", 7), ("rng", [7]), ("rng", [{"cpu": torch.zeros(3)}]))),
    (checkpoint(lambda c: c.pop("run") and c.update(best_val_loss="low")), "damaged"),  # nanoGPT's
    *((checkpoint(lambda c, value=value: c["optimizer"]["adamw"][WTE].update(exp_avg=value)),
       "the checkpoint") for value in ("x", torch.zeros(257, 3))))
def test_a_bad_state_of_a_run(place, refused, spoil, expected):
    spoil(place)
    refused("train", RESUME, expected)


# -----------------------------------------------------------------------------
# Words


@pytest.mark.parametrize("name, options, words", [
    ("train", "block_size vocab_size n_layer n_head n_embd head_dim ffn_hidden ffn_depth "
     "imex_steps batch_size gradient_accumulation_steps max_iters lr_decay_iters eval_interval "
     "eval_tokens eval_iters save_interval log_interval", "0 -1 1.5 1e-30"),
    ("train", "seed warmup_iters", "-1 0.5"),
    ("train", "learning_rate muon_lr weight_decay muon_weight_decay grad_clip min_lr dropout beta1 "
     "beta2 decay_fraction rope_theta gamma_init mu_init beta_init embed_scale adam_eps",
     "-1 -1e-30 true"),
    ("train", "dropout beta1 beta2 mu_init beta_init", "1"),
    ("train", "decay_fraction rope_theta gamma_init mu_init beta_init embed_scale", "0 1e30"),
    ("sample", "num_samples max_new_tokens top_k", "0 -1"), ("sample", "temperature", "-1e-9"),
    ("sample", "top_p", "0 -0.1 1.1"), ("sample", "seed", "0.5"),
    ("prepare", "num_proc", "0 -1 1.5"), ("prepare", "seed", "-1 0.5"),
    ("prepare", "val_fraction", "0 -0.1 1e-400 1.1")])
def test_a_bad_number(place, name, options, words):
    """Each option with each of the words, and with what is no number at all."""
    before = contents(place)
    no_numbers = ["nan", "inf", "-inf", "1e400", "many", "", "1,5", "0x10", "[1]", f"{MORE}"]
    for option in options.split():
        for word in (*words.split(), *no_numbers):
            with pytest.raises(UserError) as error:
                MAINS[name](argv(name, f"--{option}={word}"))
            assert all(option in line for line in str(error.value).splitlines())
    assert contents(place) == before


@rows(
    "name, words, spoil",
    *(("train", f"--{name}={MANY}", None, name) for name in (
        "n_layer", "n_embd", "block_size", "vocab_size", "ffn_hidden", "head_dim", "ffn_depth",
        "imex_steps")),
    *(("train", f"--{name}={2**31 - 1}", None, "out of memory", "smaller model")
      for name in ("ffn_hidden", "head_dim", "block_size")),
    ("sample", f"--num_samples={MANY}", None, "num_samples"),
    *((*program, setting("model_args", **{name: MANY}), name)
      for name in ("n_layer", "n_embd", "block_size", "imex_steps") for program in BOTH))
def test_a_huge_number(place, refused, name, words, spoil, expected):
    """No allocation that ends in a traceback, and no loop that never ends: 4 GiB of memory, four
    seconds of CPU."""
    def limited(name, words):
        process = Program(argv(name, words), name, functools.partial(limit_resources, str(place)))
        return process.wait(60), [line for line in process.output.splitlines()
                                  if line.startswith(("error: ", "Traceback"))]

    if spoil is not None:
        spoil(place)
    refused(name, words, expected, program=limited)


def test_an_extreme_number_works_or_is_refused(place, program):
    for option, value in (("temperature", 1e-40), ("temperature", 1e-320), ("top_p", 1e-320),
                          ("temperature", 1e300), ("top_k", MANY), ("seed", -1)):
        code, lines = program("sample", f"--{option}={value}")
        if (code, lines) != (0, []):
            check(code, lines, (option,))


@rows(
    "name, words",
    # --- what does not go with a checkpoint; the other rules are in test_model.py, test_train.py
    *(("train", f"--init_from=run/ckpt.pt {words}", expected, "checkpoint") for words, expected in (
        ("--ffn=swiglu", "ffn=mlp"), ("--head_dim=8", "head_dim"),
        ("--block_size=17", "block_size=16"))),
    *(("train", f"{RESUME} --dataset={name}", name, "tokenizer", "bytes")
      for name in ("char", "nano")),
    # --- names; those of options are in test_config.py
    ("train", "--init_from=resme", "init_from=resme", "resume"),
    ("train", "--init_from=text.pt", "no checkpoint text.pt"),
    ("train", "--init_from=run", "init_from=run", ".pt"), ("sample", "--init_from=run", "run"),
    ("train", f"{RESUME}/none", "run/none", "resume"),
    ("train", "--device=cpu:x", "device=cpu:x"), ("train", "--device=meta", "device=meta", "cpu"),
    ("train", "--out_dir=text.txt/new", "text.txt"), ("train", "--dataset=", "data"),
    ("train", "--data_dir=text.txt", "text.txt"), ("train", "-n_layer=3", "-n_layer=3"),
    ("train", "'--n_layer=1\n\x1b[2J'", "n_layer"), ("sample", "preset.py", "preset.py"),
    ("sample", "'--start=FILE:a\n\x1b[2J'", "FILE:a"), ("prepare", "'--input=a\n\x1b[2J'", "file"),
    *(("prepare", f"--name={name}", "name=", "folder name")
      for name in ("a/b", ".", "..", "/tmp/x", "a/")),
    ("prepare", f"--name={'x' * 300}", "xxx", "long"), ("prepare", "--name=tiny", "--overwrite"),
    ("prepare", "--data_dir=text.txt", "text.txt"),
    ("prepare", "--input=caf\udce9.txt", "no file", "caf"))
def test_bad_words(refused, name, words, expected):
    refused(name, words, expected)


@rows(
    "name, words, path, content",
    *(("sample", f"--start=FILE:{name}", name, content, "prompt", name) for name, content in (
        ("empty", ""), ("folder", {}), ("no/such", None), ("latin1", b"caf\xe9"),
        ("cut", "é".encode()[:1]))),
    ("prepare", "--input=empty", "empty", {}, "no text", "empty"),
    ("prepare", "--val_input=blank", "blank", " \n", "no text"),
    ("prepare", "--input=x.jsonl", "x.jsonl", "[" * 100_000, "x.jsonl", "line 1"),
    *(("prepare", "--name=tiny", "data/tiny/meta.json", content, "tiny", "--overwrite")
      for content in ("[]", '{"settings": [1]}')),
    *(("train", "p.py", "p.py", content, "p.py", *expected) for content, *expected in (
        ("n_layer = 2\nn_layer = = 3", "line 2", "SyntaxError"), ("1 / 0", "line 1", "ZeroDivi"),
        ("raise SystemExit", "line 1", "SystemExit"), ("def f(): f()\nf()", "RecursionError"),
        ("import no_such_module", "no_such_module"), (b"name = '\xff'",), (b"\x00\x01",),
        ("(" * 1000,), ("n_layer = None", "n_layer=None"), ("max_iters = -10**500", "max_iters"),
        ("import numpy\nn_layer = numpy.zeros(3)", "n_layer"))))
def test_a_bad_file(place, refused, name, words, path, content, expected):
    """A prompt, a text, data that would be replaced, a preset."""
    put(path, content)(place)
    refused(name, words, expected)


def test_a_strange_prompt_that_works(place, program):
    """Longer than the context, or hardly a text."""
    for prompt in "x" * 5000, "\x00", "\n", "<|endoftext|>", "e\u0301😀" * 99:
        (place / "prompt.txt").write_text(prompt)
        assert program("sample", "--start=FILE:prompt.txt") == (0, [])
