"""prepare.py: corpora, splits, interruption, overwriting, mistakes."""

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import conftest
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiktoken
import torch
from conftest import SHARED

import prepare
from support import text
from support.errors import UserError
from support.files import locked
from support.meta import TOKENIZER_KEYS, load_meta
from support.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
MARK = "<|endoftext|>"
MIXED = "Ünï ☃ 🙂👩‍👩‍👧\r\nline two\n\n  \ttabs\n"


def make(tmp_path, *words):
    """Run the command; its data goes to tmp_path/data."""
    prepare.main([*map(str, words), f"--data_dir={tmp_path / 'data'}"])


def refused(tmp_path, *words):
    """Run the command, which must fail in one line; return that line."""
    (line,) = conftest.refused(lambda: make(tmp_path, *words))
    return line


def bins(folder):
    """The bytes of a folder's bins, after checking that meta.json describes them."""
    meta, found = load_meta(folder), {}
    for split in ("train", "val"):
        found[split] = (folder / f"{split}.bin").read_bytes()
        assert hashlib.sha256(found[split]).hexdigest() == meta[split]["sha256"]
        assert len(found[split]) == meta[split]["tokens"] * np.dtype(meta["dtype"]).itemsize
    assert not (folder / "partial").exists()
    return found


def documents(folder, split="train"):
    """A split's documents as text; they end with the end-of-text id."""
    meta = load_meta(folder)
    tokenizer = Tokenizer.from_meta(meta)
    ids = np.fromfile(folder / f"{split}.bin", meta["dtype"])
    ends = np.flatnonzero(ids == tokenizer.eot)
    assert ends[-1] == len(ids) - 1 and len(ends) == meta[split]["documents"]
    return [tokenizer.decode(part[:-1].tolist()) for part in np.split(ids, ends + 1)[:-1]]


@pytest.fixture
def stories(tmp_path):
    """A text file of 300 small documents."""
    path = tmp_path / "stories.txt"
    parts = [f"Story {i}.\n\n{MIXED * (i % 7)}end {i}\n{MARK}\n" for i in range(300)]
    path.write_text("".join(parts), encoding="utf-8", newline="")
    return path


@pytest.fixture
def command(stories):
    """The words that prepare it."""
    return ["text", "--input", stories, "--tokenizer=bytes"]


@pytest.fixture
def small_blocks(monkeypatch):
    """Much to do for so little text."""
    monkeypatch.setattr(text, "BLOCK", 1000)
    monkeypatch.setattr(prepare, "BATCH", 1000)
    monkeypatch.setattr(prepare, "WORKER_SHARE", 1)


def sample(name):
    if not (SHARED / name).exists():
        pytest.skip(f"needs {SHARED / name}")
    return SHARED / name


# -----------------------------------------------------------------------------
# The corpora


def test_shakespeare_is_nanogpts(tmp_path, gpt2_cache, small_blocks):
    """It does not matter where reading and encoding cut it."""
    path = sample("shakespeare/input.txt")
    data = path.read_text()
    alphabet = "".join(sorted(set(data)))
    parts = {"train": data[:int(len(data) * 0.9)], "val": data[int(len(data) * 0.9):]}
    for corpus, encode, sizes in [
            ("shakespeare", tiktoken.get_encoding("gpt2").encode_ordinary,
             {"train": 301_966, "val": 36_059}),
            ("shakespeare_char", lambda part: [*map(alphabet.index, part)],
             {"train": 1_003_854, "val": 111_540})]:
        make(tmp_path, corpus, "--input", path, "--num_proc=1")
        found = bins(tmp_path / "data" / corpus)
        for split, part in parts.items():
            ids = np.array(encode(part), dtype=np.uint16)
            assert len(ids) == sizes[split] and found[split] == ids.tobytes()
    meta = load_meta(tmp_path / "data/shakespeare_char")
    assert meta["vocab_size"] == 65 and meta["alphabet"] == alphabet


def test_tinystories_document_by_document(tmp_path, gpt2_cache, monkeypatch):
    path = sample("tinystories/stories.txt")
    monkeypatch.setattr(prepare, "WORKER_SHARE", 1 << 20)
    make(tmp_path, "tinystories", "--input", path, "--num_proc=2")
    texts = path.read_text().removesuffix(f"\n{MARK}\n").split(f"\n{MARK}\n")
    is_val = prepare.hash_rule(0.005, 2357)
    ids, encode = {"train": [], "val": []}, tiktoken.get_encoding("gpt2").encode_ordinary
    for i, document in enumerate(texts):
        ids["val" if is_val(i) else "train"] += [*encode(document), 50256]
    assert bins(tmp_path / "data/tinystories") == {
        split: np.array(ids[split], dtype=np.uint16).tobytes() for split in ids}
    assert len(texts) == 12_756 and sum(map(len, ids.values())) == 2_584_747


def test_pydoc_needs_nothing(tmp_path):
    from pydoc_data.topics import topics

    done = subprocess.run([sys.executable, "prepare.py", "pydoc", f"--data_dir={tmp_path}"],
                          cwd=ROOT, text=True, capture_output=True, timeout=60)
    assert done.returncode == 0
    assert done.stdout.startswith("train has ") and "encoding: 100%" in done.stderr
    found = documents(tmp_path / "pydoc") + documents(tmp_path / "pydoc", "val")
    assert sorted(found) == sorted(topics.values())


def test_openwebtext_has_nanogpts_validation_documents(tmp_path, stories, capsys):
    datasets = pytest.importorskip("datasets")
    for n in 2, 300, 4001:
        rows = datasets.Dataset.from_dict({"i": range(n)})
        test = rows.train_test_split(test_size=0.0005, seed=2357, shuffle=True)["test"]
        assert {*test["i"]} == {*filter(prepare.nanogpt_rule(n), range(n))}
    assert math.ceil(0.0005 * prepare.OPENWEBTEXT_DOCUMENTS) == 4007
    make(tmp_path, "openwebtext", "--input", stories, "--tokenizer=bytes")
    assert "partial: 300 of OpenWebText's 8,013,769 documents" in capsys.readouterr().out
    chosen, = filter(prepare.nanogpt_rule(300), range(300))
    assert documents(tmp_path / "data/openwebtext", "val")[0].startswith(f"Story {chosen}.\n")
    make(tmp_path, "openwebtext", "--input", stories, "--tokenizer=bytes", "--name=paper",
         "--val_fraction=0.05")  # the YuriiFormer paper's
    assert load_meta(tmp_path / "data/paper")["split_rule"].endswith(" is below 0.05")


def test_a_validation_text_of_its_own(tmp_path):
    for name, content in ("train.txt", f"one{MARK}two"), ("val.jsonl", '{"body": "three"}\n'):
        (tmp_path / name).write_text(content)
    make(tmp_path, "text", "--tokenizer=bytes", "--field=body", "--input", tmp_path / "train.txt",
         "--val_input", tmp_path / "val.jsonl")
    assert documents(tmp_path / "data/text") == ["one", "two"]
    assert documents(tmp_path / "data/text", "val") == ["three"]


def write_parquet(path, prefix, n):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [f"{prefix}{i} {MIXED}" for i in range(n)]
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), path)
    return rows


def test_datasets(tmp_path, monkeypatch, capsys):
    """The Hub's layout, the automatic conversion of a big corpus too, in a local folder."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    hub, partial = tmp_path / "Tiny", tmp_path / "owt"
    train = write_parquet(hub / "data/train-00000-of-00001.parquet", "t", 500)
    val = write_parquet(hub / "data/validation-00000-of-00001.parquet", "v", 3)
    parts = [write_parquet(partial / f"plain_text/partial-train/000{i}.parquet", f"p{i}", 10)
             for i in range(2)]
    dataset = ["--tokenizer=bytes", f"--dataset={hub}"]
    make(tmp_path, "hf", *dataset, "--val_split=validation")
    assert documents(tmp_path / "data/Tiny") == train
    assert documents(tmp_path / "data/Tiny", "val") == val
    assert "no field foo" in refused(tmp_path, "hf", *dataset, "--name=x", "--field=foo")
    assert 'Unknown split "test"' in refused(tmp_path, "hf", *dataset, "--name=x", "--split=test")
    # a named corpus reads its own address with its own arguments
    monkeypatch.setitem(prepare.CORPORA, "openwebtext",
                        prepare.CORPORA["openwebtext"] | {"dataset": str(partial)})
    make(tmp_path, "openwebtext", "--tokenizer=bytes")
    chosen, = filter(prepare.nanogpt_rule(20), range(20))
    assert documents(tmp_path / "data/openwebtext", "val") == [sum(parts, [])[chosen]]
    monkeypatch.setitem(prepare.CORPORA, "tinystories",
                        prepare.CORPORA["tinystories"] | {"dataset": str(hub)})
    make(tmp_path, "tinystories", "--tokenizer=bytes")
    assert documents(tmp_path / "data/tinystories", "val") == val
    for total, words in [(50, ["hf", *dataset, "--split=train[:10%]"]),
                         (500, ["tinystories", "--tokenizer=bytes", "--val_fraction=0.1"])]:
        make(tmp_path, *words, f"--name={total}")
        meta = load_meta(tmp_path / "data" / str(total))
        assert meta["train"]["documents"] + meta["val"]["documents"] == total
    saved = ["hf", "--tokenizer=bytes", f"--dataset={tmp_path}/saved"]
    for texts in train, val * 9:  # by the library, and again
        datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "saved")
        if texts is not train:
            assert "saved has other data (files" in refused(tmp_path, *saved)
        make(tmp_path, *saved, "--overwrite")
        split = [documents(tmp_path / "data/saved", split) for split in ("train", "val")]
        assert all(split) and sorted(sum(split, [])) == sorted(texts)
    for other in "--split=test", "--subset=x":
        assert "save_to_disk" in refused(tmp_path, *saved, "--name=x", other)
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain/a.txt").write_text("one line\n" * 100)
    make(tmp_path, "hf", "--tokenizer=bytes", f"--dataset={tmp_path}/plain")
    assert "warning: datasets reads plain text by lines" in capsys.readouterr().err
    broken = (tmp_path / "plain/a.txt").rename(tmp_path / "plain/a.parquet")
    broken.write_bytes(b"PAR1" + 100 * b"x" + b"PAR1")
    said = refused(tmp_path, "hf", "--tokenizer=bytes", f"--dataset={tmp_path}/plain", "--name=x")
    assert said.startswith("cannot load") and "Parquet" in said


# -----------------------------------------------------------------------------
# Splits


def test_hash_rule():
    first, second = ([*filter(prepare.hash_rule(0.05, seed), range(50_000))] for seed in (1, 2))
    assert first != second and abs(len(first) - 2500) < 200
    assert first[:5] == [5, 30, 47, 124, 127]  # the split of a published run never changes


TEN = "0123456789" * 10


@pytest.mark.parametrize("texts, words, train, val", [
    ([TEN], ["--val_fraction=0.07"], [TEN[:93]], [TEN[93:]]),
    ([TEN, "end"], ["--val_fraction=0.1"], [TEN[:92]], [TEN[92:], "end"]),
    ([TEN, "a", "b"], ["--val_fraction=0.1"], [TEN[:91]], [TEN[91:], "a", "b"]),
    ([TEN[:90], TEN[90:]], ["--val_fraction=0.1"], [TEN[:90]], [TEN[90:]]),
    (["", "", TEN, ""], ["--val_fraction=0.1"], ["", "", TEN[:90]], [TEN[90:], ""]),
    (["a", "b", TEN, "c"], ["--val_fraction=0.02", "--seed=4"], ["a", "b", TEN[:98]],
     [TEN[98:], "c"])])
def test_few_documents_are_cut_near_their_end(tmp_path, texts, words, train, val):
    """Wherever what the hash draws is less than half of the share, or more than twice."""
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    make(tmp_path, "text", "--tokenizer=bytes", "--input", path, *words)
    assert documents(tmp_path / "data/text") == train
    assert documents(tmp_path / "data/text", "val") == val
    assert "cut after" in load_meta(tmp_path / "data/text")["split_rule"]


def test_what_the_hash_draws_is_kept_within_half_and_twice_the_share(tmp_path):
    drawn = [*filter(prepare.hash_rule(0.1, 2357), range(40))]
    for factor, kept in (0.6, True), (1.8, True), (0.4, False), (2.2, False):
        share, others = 0.1 * factor, 1000 * (40 - len(drawn))
        size = round(others * share / (1 - share) / len(drawn))  # of a document that is drawn
        texts = [f"{i:05}".ljust(size if i in drawn else 1000, "x") for i in range(40)]
        (tmp_path / "x.txt").write_text(MARK.join(texts))
        make(tmp_path, "text", "--tokenizer=bytes", "--input", tmp_path / "x.txt",
             "--val_fraction=0.1", "--overwrite")
        assert (documents(tmp_path / "data/text", "val") == [texts[i] for i in drawn]) is kept


@pytest.mark.parametrize("limit", range(1, 6))
def test_a_cut_in_two_may_fall_between_pieces(limit):
    pieces = [("abc", False), ("de", False), ("f", True)]
    found = ""
    for split, piece, ends in prepare.cut_in_two(pieces, limit):
        found += (piece if split == "train" else piece.upper()) + "|" * ends
    assert found == f"{'abcdef'[:limit]}|{'ABCDEF'[limit:]}|"


@pytest.mark.parametrize("texts, found", [
    (["ab", "b\n", "a"], "ab\nb\n\na"), (["ab"], "ab")])
def test_newlines_divide_documents_of_characters(tmp_path, texts, found):
    """There is no end-of-text id; the text of a single document is as it was."""
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    make(tmp_path, "text", "--tokenizer=char", "--input", path, "--val_input", path)
    for split, ids in bins(tmp_path / "data/text").items():
        alphabet = load_meta(tmp_path / "data/text")["alphabet"]
        assert "".join(alphabet[i] for i in np.frombuffer(ids, "<u2")) == found, split


def test_bins_do_not_depend_on_processes_or_blocks(tmp_path, command, request):
    make(tmp_path, *command, "--val_fraction=0.2", "--name=a", "--num_proc=1")
    request.getfixturevalue("small_blocks")
    make(tmp_path, *command, "--val_fraction=0.2", "--name=b", "--num_proc=3")
    assert bins(tmp_path / "data/a") == bins(tmp_path / "data/b")


@pytest.fixture
def checkpoint(tmp_path):
    """checkpoint(**more): tmp_path/x.pt, with no more of a model than prepare.py asks for."""
    def go(**more):
        torch.save({"model": {}, "model_args": {}, **more}, tmp_path / "x.pt")
        return tmp_path / "x.pt"

    return go


def test_the_tokenizer_of_a_checkpoint_or_a_folder(tmp_path, command, checkpoint):
    meta = Tokenizer("char", "edcba\n").to_meta()
    file = checkpoint(tokenizer={key: meta[key] for key in TOKENIZER_KEYS})
    (tmp_path / "x.txt").write_text("abc\n" * 20)
    words = ["text", "--input", tmp_path / "x.txt"]
    make(tmp_path, *words, f"--tokenizer={file}")
    folder = tmp_path / "data/text"
    assert np.fromfile(folder / "train.bin", "<u2")[:4].tolist() == [4, 3, 2, 5]
    assert load_meta(folder)["alphabet"] == "edcba\n"
    old = bins(folder)
    make(tmp_path, *words, f"--tokenizer={folder}", "--name=again")
    assert bins(tmp_path / "data/again") == old
    assert "alphabet: 'edcba" in refused(tmp_path, *words, "--tokenizer=char")
    (tmp_path / "x.txt").write_text("abc\né")
    assert "alphabet does not have 'é'" in refused(
        tmp_path, *words, f"--tokenizer={file}", "--name=new")
    assert "x.pt does not say its tokenizer" in refused(
        tmp_path, *words, f"--tokenizer={checkpoint()}")
    assert not (tmp_path / "data/new").exists()


def test_files_that_are_given_twice(tmp_path, stories, command, capsys):
    (tmp_path / "link").symlink_to(stories)
    (tmp_path / "hard").hardlink_to(stories)
    for more in ([], ["--input", stories, tmp_path / "link"], ["--val_input", tmp_path / "link"],
                 ["--val_input", tmp_path / "hard"]):
        make(tmp_path, *command, *more, "--overwrite")
        said = f"warning: files given more than once: 1, first {stories}; "
        assert (said in capsys.readouterr().err) is bool(more)


def test_a_name_that_is_not_utf_8(tmp_path, stories):
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    odd.mkdir()
    stories.rename(odd / stories.name)
    for said in "train has", "is complete already":
        done = subprocess.run(
            [sys.executable, "prepare.py", "text", "--tokenizer=bytes", "--input",
             odd / stories.name, f"--data_dir={odd}"], cwd=ROOT, capture_output=True,
            env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0"})
        assert done.returncode == 0 and said in done.stdout.decode("latin1"), done.stderr
    assert len(documents(odd / "text")) > 250


def test_few_batches_are_in_flight():
    pulled = []
    items = (pulled.append(i) or -i for i in range(50))
    for done, result in enumerate(prepare.map_in_order(abs, items, workers=2)):
        assert result == done and len(pulled) <= done + 5


# -----------------------------------------------------------------------------
# Interruption, overwriting


@pytest.mark.parametrize("seed, said", [(2357, "continuing an interrupted run"),
                                        (1, "starting anew")])
def test_an_interrupted_run_continues_only_with_the_same_settings(
        tmp_path, command, monkeypatch, capsys, small_blocks, seed, said):
    command.append("--num_proc=1")
    monkeypatch.setattr(prepare, "SAVE_EVERY", 0)
    encode, calls = prepare.encode_batch, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return encode(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "encode_batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path, *command, f"--seed={seed}")
    assert os.listdir(tmp_path / "data/text") == ["partial"]
    capsys.readouterr()
    make(tmp_path, *command, "--num_proc=2")  # which is no setting of the data
    assert said in capsys.readouterr().out
    make(tmp_path, *command, "--name=whole")
    assert bins(tmp_path / "data/text") == bins(tmp_path / "data/whole")


def test_complete_data_is_kept_unless_overwritten(tmp_path, stories, command, monkeypatch, capsys):
    make(tmp_path, *command)
    old = bins(tmp_path / "data/text")
    make(tmp_path, *command)
    assert "complete already" in capsys.readouterr().out
    assert "(seed: 2357, now 1); --overwrite replaces it" in refused(tmp_path, *command, "--seed=1")
    with monkeypatch.context() as patch:  # the old data stays whole until the new is
        patch.setattr(prepare, "sha256", lambda path: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make(tmp_path, *command, "--seed=1", "--overwrite")
        assert load_meta(tmp_path / "data/text")["settings"]["seed"] == 2357
        assert (tmp_path / "data/text/train.bin").read_bytes() == old["train"]
    make(tmp_path, *command, "--seed=1", "--overwrite")
    assert bins(tmp_path / "data/text") != old
    stories.write_text("another text of two" + MARK + "documents")
    assert "files: [1, " in refused(tmp_path, *command, "--seed=1")


def test_what_others_have_made_or_make(tmp_path, command):
    """nanoGPT's data are kept unless overwritten; a second run is kept out."""
    folder = tmp_path / "data/text"
    (folder / "partial").mkdir(parents=True)
    for split in "train", "val":
        np.arange(10, dtype=np.uint16).tofile(folder / f"{split}.bin")
    assert "has other data (by nanoGPT); --overwrite" in refused(tmp_path, *command)
    with locked(folder / "partial", "held by the test"):
        assert "another prepare.py is writing" in refused(tmp_path, *command, "--overwrite")
    make(tmp_path, *command, "--overwrite")
    assert len(documents(folder)) > 250


# -----------------------------------------------------------------------------
# Mistakes: one line, nothing that looks finished


@pytest.mark.parametrize("words, message", [
    ("", "say first what to prepare: python prepare.py tinystories"),
    ("--input x text", "say first what to prepare"),
    ("text", "text needs --input"),
    ("hf", "hf needs --dataset"),
    ("pydoc --input=x", "pydoc takes no --input"),
    ("text --input=x --dataset=y", "are hf's"), ("text --input=x --subset=y", "are hf's"),
    ("pydoc --val_split=x", "is for text from the Hub"),
    ("text --input=x --val_split=y", "is for text from the Hub"),
    ("hf --dataset=x --val_split=train[:1%]", "--val_split=train[:1%] is what is trained on"),
    ("hf --dataset=x --split=a[:1%] --val_split=a[:1%]", "=a[:1%] is what is trained on"),
    ("tinystories --val_input=x", "--val_input needs --input"),
    ("text --input=x --val_input=y --val_fraction=0.1", "does not go with"),
    ("hf --dataset=x --val_split=y --val_fraction=0.1", "does not go with"),
    ("tinystorys", "did you mean tinystories?")])
def test_mistakes_on_the_command_line(tmp_path, words, message):
    assert message in refused(tmp_path, *words.split())
    assert not (tmp_path / "data").exists()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_as_many_processes_as_cores_that_may_be_used(monkeypatch):
    """SLURM and docker leave few of a node's many."""
    code = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); import prepare; " \
           "print(prepare.PrepareConfig(corpus='pydoc').num_proc)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert done.stdout == b"1\n"
    monkeypatch.setattr(prepare, "CORES", 128)
    assert prepare.PrepareConfig(corpus="pydoc").num_proc == 60


def test_help(capsys, monkeypatch):
    with pytest.raises(SystemExit):
        prepare.main(["--help"])
    helped = capsys.readouterr().out
    assert "prepare.py hf --dataset=ID" in helped
    assert "[tinystories | openwebtext | shakespeare | shakespeare_char | pydoc | text" in helped
    monkeypatch.setattr(prepare, "__doc__", None)  # as python -OO has it
    with pytest.raises(SystemExit):
        prepare.main(["--help"])


def test_text_that_cannot_be_split_or_encoded(tmp_path, stories, command, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode", lambda self, text: [70_000])
        assert refused(tmp_path, *command) == "the token id 70000 does not fit a vocabulary of 257"
    stories.write_text("x")
    assert "too little text to split" in refused(tmp_path, *command)
    with pytest.raises(UserError):
        load_meta(tmp_path / "data/text")
