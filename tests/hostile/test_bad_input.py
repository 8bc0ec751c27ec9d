"""Files and words from strangers: every mistake ends in one line and exit code 2, leaves the folder
as it was, and no file that is only data runs anything.

A case is a command line, words that its error line must have (what was wrong, and something of the
fix), and perhaps a function that first spoils a file. It runs in a folder of its own (`place`) with

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
from collections.abc import Callable
from dataclasses import dataclass
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
from model import GPT, GPTConfig
from support.errors import UserError, cli

LETTERS = string.ascii_lowercase
MAINS = {"train": train.main, "sample": sample.main, "prepare": prepare.main}
USUAL = {  # the words that come before those of a case
    "train": option_words(dataset="tiny", out_dir="new", **TINY),
    "sample": option_words(out_dir="run", device="cpu", dtype="float32", num_samples=1,
                           max_new_tokens=3, start="abc"),
    "prepare": []}
TEXT = "text --input=text.txt --tokenizer=bytes --name=new"  # what prepare.py can do
RESUME = "--init_from=resume --out_dir=run"
MANY, MORE = 10**12, 10**400  # more than any memory holds; more than any float or int64 holds
WTE, FC = "transformer.wte.weight", "transformer.h.0.mlp.c_fc.weight"


# -----------------------------------------------------------------------------
# Where the cases run, and how


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
        try:
            cli(MAINS[name])
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().err.splitlines()

    return go


def check(code: int, lines: list[str], expected: tuple[str, ...], problems: int = 1) -> None:
    """Exit code 2, one line a problem, these words; nothing that could steer a terminal."""
    lines = [line for line in lines if line and not line.startswith(("reading: ", "encoding: "))]
    assert code == 2, f"exit code {code}: {' | '.join(lines[-1:])[-300:]}"
    assert len(lines) == problems, lines
    assert all(line.startswith("error: ") and line.isprintable() for line in lines), lines
    assert all(len(line) < 1000 for line in lines), "a line that no one reads"
    assert all(word in "\n".join(lines) for word in expected), (expected, lines)


@dataclass
class Case:
    program: str
    words: str
    expected: tuple[str, ...]  # words of the error line
    spoil: Callable[[Path], None] | None
    problems: int


def case(program, words, *expected, spoil=None, label="", problems=1):
    name = " ".join(filter(None, (program, words if len(words) < 60 else words[:60] + "...",
                                  label)))
    return pytest.param(Case(program, words, expected, spoil, problems), id=ascii(name)[1:-1])


def cases(*rows):
    return pytest.mark.parametrize("case", rows)


def on_both(*expected, spoil, label):
    """The same checkpoint for the trainer, which resumes from it, and for sample.py."""
    return [case("train", RESUME, *expected, spoil=spoil, label=label),
            case("sample", "", *expected, spoil=spoil, label=label)]


@pytest.fixture
def refuse(place, program):
    """Run a case; what is there stays, byte for byte, and nothing comes."""
    def go(case: Case, runner=program):
        if case.spoil is not None:
            case.spoil(place)
        before = contents(place)
        check(*runner(case.program, case.words), case.expected, case.problems)
        after = contents(place)
        assert after.keys() == before.keys()
        assert after == before

    return go


# --- ways to spoil something


def put(path, content):
    """Write a file, a text or bytes; None: remove it; a folder: {}."""
    def spoil(place):
        target = place / path
        if target.exists():
            target.unlink()
        if content == {}:
            target.mkdir()
        elif content is not None:
            target.write_bytes(content.encode() if isinstance(content, str) else content)

    return spoil


def cut(path, length):
    """Keep the first bytes of a file; a negative length counts from its end, a share is one."""
    def spoil(place):
        content = (place / path).read_bytes()
        end = int(length * len(content)) if isinstance(length, float) else length
        (place / path).write_bytes(content[:end])

    return spoil


def ids(path, *tokens, dtype="<u2"):
    """Write a bin."""
    return put(path, np.array(tokens, dtype).tobytes())


def both(*spoils):
    return lambda place: [spoil(place) for spoil in spoils]


def meta(dataset="tiny", **changes):
    """Change keys of a meta.json; train=... updates inside."""
    def spoil(place):
        path = place / "data" / dataset / "meta.json"
        content = json.loads(path.read_text())
        for key, value in changes.items():
            inner = isinstance(value, dict) and key in content
            content[key] = content[key] | value if inner else value
        path.write_text(json.dumps(content))

    return spoil


def holds(thing):
    """Save this as the run's only checkpoint."""
    def spoil(place):
        torch.save(thing, place / "run/ckpt.pt")
        (place / "run/best.pt").unlink(missing_ok=True)

    return spoil


def checkpoint(change):
    """Change the run's only checkpoint in place."""
    def spoil(place):
        content = torch.load(place / "run/ckpt.pt", weights_only=True)
        change(content)
        holds(content)(place)

    return spoil


def setting(**changes):
    """Set keys of the checkpoint."""
    return checkpoint(lambda content: content.update(changes))


def progress(**changes):
    """Set what it says of how far the run was."""
    return checkpoint(lambda content: content["run"].update(changes))


def arg(**changes):
    """Set options of the checkpoint's model."""
    return checkpoint(lambda content: content["model_args"].update(changes))


def weight(name, change):
    """Replace a weight of the checkpoint's model."""
    def spoil(content):
        content["model"][name] = change(content["model"].get(name))

    return checkpoint(spoil)


# -----------------------------------------------------------------------------
# Pickles that would run something


class Payload:
    """Unpickled, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("hacked",)


def evil_checkpoint(path: Path, form: str) -> None:
    """What would be a checkpoint of a model, but for one value."""
    content = {"model": {"w": Payload()}, "model_args": {"n_layer": 1}, "iter_num": 1}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")


@pytest.mark.parametrize("name, words, file", [
    ("train", RESUME, "run/ckpt.pt"),
    ("train", "--init_from=auto --out_dir=run", "run/ckpt.pt"),
    ("train", "--init_from=other.pt", "other.pt"),
    ("sample", "--out_dir=run", "run/ckpt.pt"),
    ("sample", "--out_dir=run", "run/best.pt"),
    ("sample", "--init_from=other.pt", "other.pt"),
])
def test_a_checkpoint_runs_nothing(place, program, name, words, file):
    for old in place.glob("run/*.pt"):
        old.unlink()
    for form in "pickle", "zip", "legacy":
        evil_checkpoint(place / file, form)
        before = contents(place)
        check(*program(name, words), (file,))
        assert contents(place) == before and "hacked" not in before
        if form == "pickle":  # the trap is set: where classes are let in, it runs its code
            pickle.loads((place / file).read_bytes())
        else:
            torch.load(place / file, weights_only=False)
        (place / "hacked").rmdir()


@pytest.mark.parametrize("name, words", [("train", "--dataset=nano"), ("sample", "")])
def test_a_meta_pkl_runs_nothing(place, program, name, words):
    checkpoint(lambda c: c.pop("tokenizer") and c.update(config={"dataset": "nano"}))(place)
    for key in "itos", "other":  # also in an entry that no one asks for
        for protocol in 0, 2, 4:
            table = {"itos": dict(enumerate(LETTERS))} | {key: Payload()}
            (place / "data/nano/meta.pkl").write_bytes(pickle.dumps(table, protocol))
            before = contents(place)
            check(*program(name, words), ("meta.pkl",))
            assert contents(place) == before and "hacked" not in before


FORBIDDEN = {"pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "marshal.load",
             "shelve.open", "joblib.load", "eval", "exec", "os.system", "os.popen"}


def test_no_file_is_unpickled_freely():
    """Every torch.load says weights_only=True; nothing else unpickles but a reader that admits no
    class; nothing is evaluated."""
    torch_loads, readers = 0, []
    folders = ("", "config/", "support/", "tools/")
    for path in (path for folder in folders for path in ROOT.glob(f"{folder}*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{path.name}, line {getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                options = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
                if called == "torch.load":
                    torch_loads += 1
                    assert options.get("weights_only") is True, where
                assert called not in FORBIDDEN or where.startswith("__init__.py"), where
                assert not options.get("allow_pickle") and not options.get("shell"), where
                assert not options.get("trust_remote_code"), where
            if isinstance(node, ast.ImportFrom):  # no short names, which would not be found above
                names = {f"{node.module}.{a.name}" for a in node.names}
                assert not names & (FORBIDDEN | {"torch.load", "numpy.load"}), where
            if isinstance(node, ast.ClassDef) and "pickle.Unpickler" in map(ast.unparse,
                                                                           node.bases):
                readers.append(node.name)
                (method,) = (m for m in node.body if getattr(m, "name", "") == "find_class")
                assert isinstance(method.body[-1], ast.Raise), where
    assert torch_loads >= 1
    assert readers == ["_NoClasses"]  # a new one needs tests like these


# -----------------------------------------------------------------------------
# Data folders


@cases(
    # --- bins
    *(case("train", "", *expected, label=label, spoil=spoil) for label, spoil, *expected in (
        ("odd length", cut("data/tiny/train.bin", -1), "train", "--overwrite"),
        ("odd length of val.bin", cut("data/tiny/val.bin", -1), "val", "damaged"),
        ("meta.json says uint32", meta(dtype="uint32"), "train", "damaged"),
        ("uint32, meta.json says uint16", ids("data/tiny/train.bin", *range(343), dtype="<u4"),
         "train", "damaged"),
        ("too long", ids("data/tiny/train.bin", *[1] * 344), "train", "damaged"),
        ("empty", ids("data/tiny/val.bin"), "val", "damaged"),
        ("empty, meta.json says so", both(ids("data/tiny/train.bin"), meta(train={"tokens": 0})),
         "train.bin", "0 tokens"),
        *((f"{split} one token short", both(ids(f"data/tiny/{split}.bin", *range(16)),
                                            meta(**{split: {"tokens": 16}})),
           f"{split}.bin", "16 tokens", "17", "--block_size") for split in ("train", "val")),
        ("no train.bin", put("data/tiny/train.bin", None), "train.bin", "prepare.py"),
        ("no val.bin", put("data/tiny/val.bin", None), "val.bin", "prepare.py"),
        ("train.bin is a folder", put("data/tiny/train.bin", {}), "train.bin"),
        ("unfinished", both(put("data/tiny/partial", {}), put("data/tiny/val.bin", None)),
         "unfinished", "prepare.py"))),
    case("train", "--dataset=gpt2", "train.bin", label="odd length, nanoGPT's", spoil=cut(
        "data/gpt2/train.bin", -1)),
    case("train", "--dataset=gpt2", "train.bin", "0 tokens", label="empty, nanoGPT's", spoil=ids(
        "data/gpt2/train.bin")),
    # --- meta.json (test_tokenizer.py has a property for any)
    *(case("train", "", "meta.json", "--overwrite", label=f"meta.json is {text[:9]!r}",
           spoil=put("data/tiny/meta.json", text))
      for text in ("", "{", "[]", '{"dtype": "uint16"}', "[" * 100_000, b"\xff\xfe{}")),
    case("train", "", "meta.json", label="meta.json is a folder", spoil=put(
        "data/tiny/meta.json", {})),
    *(case("train", "", "meta.json", label=f"{key}={value!r}", spoil=meta(**{key: value}))
      for key, value in (
          ("vocab_size", "257"), ("vocab_size", 0), ("vocab_size", True), ("vocab_size", None),
          ("padded_vocab_size", float("inf")), ("dtype", "float32"), ("dtype", ["uint16"]),
          ("tokenizer", 3), ("train", []), ("val", None), ("alphabet", 7))),
    *(case("train", "", "damaged", label=f"tokens={tokens!r}", spoil=meta(train={"tokens": tokens}))
      for tokens in ("343", None, 342, -343, True)),
    *(case("train", "--dataset=char", "meta.json", label=f"alphabet={alphabet!r:.12}", spoil=meta(
        "char", alphabet=alphabet)) for alphabet in (LETTERS[1:], "a" * 26, list(LETTERS), None)),
    # --- meta.pkl
    *(case("train", "--dataset=nano", "meta.pkl", label=f"meta.pkl is {content!r:.30}",
           spoil=put("data/nano/meta.pkl", content))
      for content in (b"", b"no pickle", pickle.dumps(7), pickle.dumps({}),
                      pickle.dumps({"itos": 7}), pickle.dumps({"itos": {1: "a"}}),
                      pickle.dumps({"itos": {0: b"a"}}), pickle.dumps({"itos": {}}))),
    case("train", "--dataset=../run", "run", "prepare.py", label="not a data folder"),
    case("train", "--data_dir=text.txt", "text.txt", label="data_dir is a file"),
)
def test_a_bad_data_folder(refuse, case):
    refuse(case)


@pytest.mark.parametrize("dataset, split, token, size", [
    ("tiny", "train", 257, 257), ("tiny", "val", 300, 257), ("tiny", "train", 65535, 257),
    ("char", "train", 26, 26), ("nano", "train", 26, 26), ("nano", "val", 40000, 26)])
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


@cases(
    # --- the file
    *(row for length in (0, 1, 100, 0.5, 0.9, -100, -1) for row in on_both(
        "ckpt.pt", label=f"cut at {length}", spoil=both(cut("run/ckpt.pt", length),
                                                        put("run/best.pt", None)))),
    *(row for content in ("not weights\n", {}) for row in on_both(
        "ckpt.pt", label=f"is {content!r}", spoil=both(put("run/ckpt.pt", content),
                                                       put("run/best.pt", None)))),
    *(row for thing in (torch.zeros(3), [1, 2], 7, None, {}, "x", {"w": torch.zeros(2)})
      for row in on_both("ckpt.pt", "model_args", label=f"holds {thing!r}", spoil=holds(thing))),
    *on_both("model_args", label="no model_args", spoil=checkpoint(
        lambda c: c.pop("model_args"))),
    *on_both("model", label="no model", spoil=checkpoint(lambda c: c.pop("model"))),
    case("train", "--init_from=text.pt", "no checkpoint text.pt"),
    case("train", "--init_from=run", "init_from=run", ".pt"),
    case("sample", "--init_from=run", "run", label="a folder, not a file"),
    # --- its model's options
    *(row for value in (None, 7, [1], "n_layer=2") for row in on_both(
        "model_args", label=f"model_args={value!r}", spoil=setting(model_args=value))),
    *on_both("n_experts", "version", label="a newer option", spoil=arg(n_experts=8)),
    *on_both("template=lion", label="a newer template", spoil=arg(template="lion")),
    *on_both("weights", label="no n_layer", spoil=checkpoint(
        lambda c: c["model_args"].pop("n_layer"))),
    *(row for key, value in (("n_layer", 0), ("n_layer", -2), ("n_head", 3), ("n_embd", True),
                             ("dropout", 2.0), ("dropout", float("nan")), ("block_size", -16),
                             ("vocab_size", 0), ("bias", "maybe"), ("ffn", 3))
      for row in on_both(key, label=f"{key}={value!r}", spoil=arg(**{key: value}))),
    *(row for key, value in (("n_layer", "2"), ("n_layer", 2.5), ("n_head", None),
                             ("n_embd", [32]))
      for row in on_both("model_args", label=f"{key}={value!r}", spoil=arg(**{key: value}))),
    *on_both("options", label="an option that is no word", spoil=checkpoint(
        lambda c: c["model_args"].update({7: 7}))),
    # --- its weights
    *(row for value in (None, 7, [torch.zeros(2)], torch.zeros(2), {}, {7: torch.zeros(2)})
      for row in on_both("weights", label=f"model={value!r}", spoil=setting(model=value))),
    *on_both(FC, label="a weight is missing", spoil=checkpoint(
        lambda c: c["model"].pop(FC))),
    *on_both(FC, "size", label="a weight of another shape", spoil=weight(FC, lambda w: w[:, :3])),
    *on_both("transformer.extra", label="one weight more", spoil=weight(
        "transformer.extra", lambda _: torch.zeros(2))),
    *on_both("weights", label="a weight that is a word", spoil=weight(FC, lambda _: "w")),
    *on_both("weights", label="a weight that is None", spoil=weight(WTE, lambda _: None)),
    *on_both("weights", label="integers for weights", spoil=checkpoint(
        lambda c: c.update(model={k: w.long() for k, w in c["model"].items()}))),
    *on_both("weights", label="weights of another model", spoil=arg(n_layer=3)),
    *on_both("weights", label="weights of other heads", spoil=arg(head_dim=4)),
    case("sample", "", "nan", label="weights are nan", spoil=weight(
        "transformer.ln_f.weight", lambda w: w * torch.nan)),
    # --- its tokenizer
    *(row for value in ("bytes", 7, {"tokenizer": 7}, {"alphabet": "ab"}, {"tokenizer": "char"},
                        {"tokenizer": "char", "alphabet": 7},
                        {"tokenizer": "char", "alphabet": "aab", "vocab_size": 3})
      for row in on_both("tokenizer", label=f"tokenizer={value!r}",
                         spoil=setting(tokenizer=value))),
    case("sample", "", "gtp2", "gpt2", label="an unknown tokenizer", spoil=setting(
        tokenizer={"tokenizer": "gtp2"})),
    case("sample", "", "257", "data", label="no tokenizer, no data", spoil=checkpoint(
        lambda c: c.pop("tokenizer") and c.update(config={}))),
    case("sample", "", "257", "data", label="no tokenizer, other data", spoil=checkpoint(
        lambda c: c.pop("tokenizer") and c.update(config={"dataset": "char"}))),
    *on_both("config", label="config is a list", spoil=setting(config=[1])),
    # --- the state of its run
    case("train", RESUME, "no run to resume", "--init_from=", label="no iter_num",
         spoil=checkpoint(lambda c: c.pop("iter_num"))),
    *(case("train", RESUME, key, label=f"{key}={value!r:.30}", spoil=setting(**{key: value}))
      for key, value in (("run", 7), ("run", [1]), ("run", {"pace": 7}),
                         ("optimizer", [1]), ("optimizer", {"adamw": 7}), ("rng", 7), ("rng", [7]),
                         ("rng", [{"cpu": torch.zeros(3)}]))),
    *(case("train", RESUME, "run", label=f"{key}={value!r:.30}", spoil=progress(**{key: value}))
      for key, value in (("step", -5), ("step", "two"), ("step", None), ("step", 2.5),
                         ("position", -16), ("position", "all"), ("position", 1.5),
                         ("position", MORE), ("log_length", -1), ("log_length", "long"),
                         ("evaluated", "yes"), ("best_val_loss", "low"))),
    *(case("train", RESUME, "run", "damaged", label=f"nanoGPT's {key}={value!r}",
           spoil=checkpoint(lambda c, key=key, value=value: c.pop("run") and c.update(
               {key: value})))
      for key, value in (("iter_num", "two"), ("iter_num", None), ("best_val_loss", "low"),
                         ("best_val_loss", None))),
    case("train", RESUME, "data", "--init_from=", label="other data", spoil=setting(data=[])),
    case("train", RESUME, "earlier version", "--init_from=run/ckpt.pt", label="an older run",
         spoil=setting(tokens_seen=16)),
    case("train", RESUME, "optimizer", label="a state that is a word", spoil=checkpoint(
        lambda c: c["optimizer"]["adamw"][WTE].update(exp_avg="x"))),
    case("train", RESUME, "exp_avg", label="a state of another shape", spoil=checkpoint(
        lambda c: c["optimizer"]["adamw"][WTE].update(exp_avg=torch.zeros(257, 3)))),
    # --- flags that contradict it
    *(case("train", f"--init_from=run/ckpt.pt {words}", expected, "checkpoint")
      for words, expected in (
          ("--template=nesterov", "template=gd"), ("--ffn=swiglu", "ffn=mlp"),
          ("--n_embd=64", "n_embd=32"), ("--bias", "bias=False"), ("--position=rope", "learned"),
          ("--head_dim=8", "head_dim"), ("--block_size=17", "block_size=16"))),
    case("train", f"{RESUME} --dataset=char", "char", "tokenizer", "bytes"),
    case("train", f"{RESUME} --dataset=nano", "nano", "tokenizer", "bytes"),
    case("train", "--out_dir=run", "run", "--init_from=resume", "--overwrite"),
    case("train", RESUME.replace("run", "empty"), "empty", "resume", label="an empty folder",
         spoil=lambda place: (place / "empty").mkdir()),
)
def test_a_bad_checkpoint(refuse, case):
    refuse(case)


STEERS = "a\x1b[2J\nerror: b"


@cases(
    *on_both("tokenizer", label="a tokenizer's name", spoil=setting(
        tokenizer={"tokenizer": STEERS})),
    *on_both("template", label="a template's name", spoil=arg(template=STEERS)),
    *on_both("model_args", label="a weight's name", spoil=weight(
        STEERS, lambda _: torch.zeros(2))),
    case("train", "'--n_layer=1\n\x1b[2J'", "n_layer"),
    case("sample", "'--start=FILE:a\n\x1b[2J'", "FILE:a"),
    case("prepare", "text --name=new '--input=a\n\x1b[2J'", "no file"),
)
def test_what_is_quoted_stays_one_line(refuse, case):
    """Names from a file may hold newlines and the codes that steer a terminal."""
    refuse(case)


# -----------------------------------------------------------------------------
# Prompts


ALPHABET = setting(tokenizer={"tokenizer": "char", "alphabet": LETTERS, "vocab_size": 26,
                              "padded_vocab_size": 26})


@cases(
    *(case("sample", f"--start=FILE:{name}", "prompt", name, spoil=put(name, content))
      for name, content in (
          ("empty", ""), ("folder", {}), ("no/such", None), ("latin1", b"caf\xe9"),
          ("cut", "é".encode()[:1]))),
    case("sample", "--start=ABC", "alphabet", "ABC", spoil=ALPHABET),
    case("sample", "--start=FILE:x", "alphabet", "é", spoil=both(ALPHABET, put("x", "café"))),
    case("sample", "'--start=a\nb'", "alphabet", r"\n", spoil=ALPHABET),
)
def test_a_bad_prompt(refuse, case):
    refuse(case)


@pytest.mark.parametrize("prompt", ["x" * 5000, "\x00", "\n", "<|endoftext|>", "e\u0301😀" * 99])
def test_a_strange_prompt_that_works(place, program, capsys, prompt):
    """Longer than the context, or hardly a text."""
    (place / "prompt.txt").write_text(prompt)
    assert program("sample", "--start=FILE:prompt.txt") == (0, [])


# -----------------------------------------------------------------------------
# Numbers and words


COUNTS = ("block_size vocab_size n_layer n_head n_embd head_dim ffn_hidden ffn_depth imex_steps "
          "batch_size gradient_accumulation_steps max_iters lr_decay_iters eval_interval "
          "eval_tokens eval_iters save_interval log_interval")
AMOUNTS = ("learning_rate muon_lr weight_decay muon_weight_decay grad_clip min_lr dropout beta1 "
           "beta2 decay_fraction rope_theta gamma_init mu_init beta_init")


@pytest.mark.parametrize("name, options, words", [
    ("train", COUNTS, "0 -1 1.5 1e-30"), ("train", "seed warmup_iters", "-1 0.5"),
    ("train", AMOUNTS, "-1 -1e-30 true"), ("train", "dropout beta1 beta2 mu_init beta_init", "1"),
    ("train", "decay_fraction rope_theta gamma_init mu_init beta_init", "0"),
    ("train", "decay_fraction", "1.0001"),
    ("sample", "num_samples max_new_tokens top_k", "0 -1 1.5"), ("sample", "temperature", "-1e-9"),
    ("sample", "top_p", "0 -0.1 1.1"), ("sample", "seed", "0.5"),
    ("prepare", "num_proc", "0 -1 1.5"), ("prepare", "val_fraction", "0 -0.1 1e-400 1.1"),
    ("prepare", "seed", "0.5")])
def test_a_bad_number(place, name, options, words):
    """Each option with each of the words, and with what is no number at all."""
    before, usual = contents(place), TEXT if name == "prepare" else ""
    no_numbers = ["nan", "inf", "-inf", "1e400", "many", "", "1,5", "0x10", "[1]"]
    for option in options.split():
        for word in (*words.split(), *no_numbers):
            with pytest.raises(UserError) as error:
                MAINS[name](argv(name, f"{usual} --{option}={word}"))
            assert all(option in line for line in str(error.value).splitlines())
    assert contents(place) == before


def as_imex(content):
    """Make the checkpoint one of an IMEX model whose layers repeat themselves for ever."""
    args = content["model_args"] | {"template": "imex"}
    content.update(model=GPT(GPTConfig(**args)).state_dict(),
                   model_args=args | {"imex_steps": MANY})


@cases(
    *(case("train", f"--{name}={MANY}", name, label="too many") for name in (
        "n_layer", "n_embd", "block_size", "vocab_size", "ffn_hidden", "head_dim", "ffn_depth",
        "imex_steps")),
    *(case("train", f"--{name}={2**31 - 1}", "out of memory", "smaller", label="too many")
      for name in ("ffn_hidden", "head_dim", "block_size")),
    case("train", f"--n_head={MANY} --n_embd={MANY}", "n_head", "n_embd", problems=2),
    *(case("train", f"--{key}={MORE}", key) for key in (
        "n_layer", "n_embd", "batch_size", "seed", "max_iters", "gradient_accumulation_steps",
        "warmup_iters", "learning_rate")),
    case("train", "--seed=1e30", "seed"),
    case("train", "--gamma_init=1e30 --template=nesterov", "gamma_init"),
    case("train", "--scalar_map=softplus --mu_init=1e30 --template=nesterov", "mu_init"),
    *(case("sample", words, words.split("=")[0].strip("-")) for words in (
        f"--num_samples={MANY}", f"--num_samples={MORE}", f"--seed={MORE}")),
    *on_both("n_layer", label="n_layer too many", spoil=arg(n_layer=MANY)),
    *on_both("n_embd", label="n_embd too many", spoil=arg(n_embd=MANY)),
    *on_both("block_size", label="block_size too many", spoil=arg(block_size=MANY)),
    *on_both("imex_steps", label="imex_steps too many", spoil=checkpoint(as_imex)),
    case("train", "", "meta.json", label="a vocabulary too large", spoil=meta(
        padded_vocab_size=MANY)),
)
def test_a_huge_number(refuse, place, case):
    """No allocation that ends in a traceback, and no loop that never ends: 4 GiB of memory, four
    seconds of CPU."""
    def limited(name, words):
        process = Program(argv(name, words), name, functools.partial(limit_resources, str(place)))
        return process.wait(60), [line for line in process.output.splitlines()
                                  if line.startswith(("error: ", "Traceback"))]

    refuse(case, limited)


@pytest.mark.parametrize("words", ["--temperature=1e-40", "--temperature=1e-320", "--top_p=1e-320",
                                   "--temperature=1e300", f"--top_k={MANY}", "--seed=-1",
                                   f"--top_k={MORE}"])
def test_an_extreme_number_works_or_is_refused(place, program, words):
    code, lines = program("sample", words)
    if (code, lines) != (0, []):
        check(code, lines, (words.split("=")[0].strip("-"),))


@cases(
    # --- what goes with what
    *(case("train", words, *expected) for words, *expected in (
        ("--n_embd=30 --position=rope", "head_dim=15", "even"),
        ("--n_embd=33", "n_embd=33", "n_head=2", "head_dim"),
        ("--min_lr=0.1", "min_lr=0.1", "learning_rate=0.001"),
        ("--schedule=wsd --decay_fraction=0.9", "warmup_iters=2", "step 1", "decay_fraction"),
        ("--template=adam --splitting=strang", "splitting=strang", "template=adam", "lie_trotter"),
        ("--template=imex --splitting=euler", "splitting=euler", "template=imex", "lie_trotter"),
        ("--ffn=hourglass --ffn_substeps=each --template=adam", "ffn_substeps=each",
         "template=adam", "joint"),
        ("--ffn=hourglass --ffn_substeps=each --splitting=euler", "ffn_substeps=each",
         "splitting=euler"),
        ("--template=tmm --velocity_init=add", "velocity_init=add", "template=tmm", "template=gd"),
        ("--template=imex --velocity_norm=read", "velocity_norm=read", "template=imex"),
        ("--template=symplectic --velocity_norm=none", "velocity_norm=none", "update"),
        ("--eval_iters=2 --eval_tokens=64", "eval_iters", "eval_tokens", "drop"))),
    case("train", "--n_embd=33 --min_lr=7 --beta1=1", "n_embd=33", "min_lr=7", "beta1=1",
         problems=3),
    # --- names (those of options are in test_config.py)
    *(case("train", words, *expected) for words, *expected in (
        ("--template=nesterow", "template=nesterow", "nesterov"),
        ("--init_from=resme", "init_from=resme", "resume"), ("-n_layer=3", "-n_layer=3"),
        ("--device=cpu:x", "device=cpu:x"), ("--device=meta", "device=meta", "cpu"),
        ("--out_dir=text.txt", "text.txt"), ("--out_dir=text.txt/new", "text.txt"),
        ("--out_dir=", "out_dir"), ("--dataset=", "data"))),
    case("sample", "preset.py", "preset.py"),
    case("prepare", "openwebtext --input=text.txt --tokenizer=bytes --seed=-1", "seed=-1"),
    *(case("prepare", f"{TEXT} --name={name}", "name=", "folder name")
      for name in ("a/b", ".", "..", "/tmp/x", "a/")),
    *(case("prepare", f"{TEXT} {words}", *expected, spoil=put(path, content)) for (
        words, path, content, *expected) in (
            (f"--name={'x' * 300}", "x", "", "xxx", "long"),
            ("--data_dir=text.txt", "x", "", "text.txt"),
            ("--input=caf\udce9.txt", "x", "", "no file", "caf"),
            ("--input=data/tiny/train.bin", "x", "", "train.bin", "UTF-8"),
            ("--input=empty", "empty", {}, "no text", "empty"),
            ("--val_input=blank", "blank", " \n", "no text"),
            ("--input=x.jsonl", "x.jsonl", "NaN", "x.jsonl", "line 1"),
            ("--input=deep.jsonl", "deep.jsonl", "[" * 100_000, "deep.jsonl", "line 1"),
            ("--name=tiny", "data/tiny/meta.json", "[]", "tiny", "--overwrite"))),
    case("prepare", f"{TEXT} --name=tiny", "tiny", "--overwrite", label="over settings of a list",
         spoil=meta(settings=[1])),
)
def test_bad_words(refuse, case):
    refuse(case)


@pytest.mark.parametrize("text, expected", [
    ("n_layer = 2\nn_layer = = 3", ["line 2", "SyntaxError"]),
    ("1 / 0", ["line 1", "ZeroDivisionError"]), ("raise SystemExit", ["line 1", "SystemExit"]),
    ("def f(): f()\nf()", ["RecursionError"]), ("import no_such_module", ["no_such_module"]),
    (b"name = '\xff'", []), (b"\x00\x01", []), ("(" * 1000, []),
    ("n_layer = None", ["n_layer=None"]), ("max_iters = -10**5000", ["max_iters"]),
    ("dataset = b'tiny'", ["dataset"]), ("import numpy\nn_layer = numpy.zeros(3)", ["n_layer"])])
def test_a_bad_preset(refuse, text, expected):
    refuse(Case("train", "p.py", ("p.py", *expected), put("p.py", text), 1))
