"""prepare.py: tokenizers, data folders, reading, splits, interruption, errors.

What needs GPT-2's vocabulary or the sample texts looks for them in ../shared/data (or in
$NANOYURII_SHARED) and is skipped where they are absent.
"""

import errno
import hashlib
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import prepare
from prepare import SAFE_CUT
from support.errors import UserError
from support.files import locked
from support.tokenizer import Tokenizer, load_meta

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("NANOYURII_SHARED", ROOT.parent / "shared/data"))
MARK = "<|endoftext|>"
ODD = "Ünï ☃ 🙂👩‍👩‍👧\r\nline two\n\n  \ttabs\n"


def make(tmp_path, *words):
    """Run the command; its data goes to tmp_path/data."""
    prepare.main([*map(str, words), f"--data_dir={tmp_path / 'data'}"])


def refused(tmp_path, *words):
    """Run the command, which must fail in one line; return that line."""
    with pytest.raises(UserError) as error:
        make(tmp_path, *words)
    assert "\n" not in str(error.value)
    return str(error.value)


def program(*words, code=None, **options):
    """Run prepare.py, or Python code, in a process of its own."""
    start = [sys.executable, "-c", code] if code else [sys.executable, "prepare.py"]
    return subprocess.run([*start, *map(str, words)], cwd=ROOT, text=True, capture_output=True,
                          timeout=60, **options)


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
    path.write_text("".join(f"Story {i}.\n\n{ODD * (i % 7)}end {i}\n{MARK}\n" for i in range(300)),
                    encoding="utf-8", newline="")
    return path


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """GPT-2's tokenizer, from a copy of the cache: tiktoken deletes files it does not like."""
    if not (SHARED / "tiktoken_cache").is_dir():
        pytest.skip(f"needs {SHARED}/tiktoken_cache")
    cache = tmp_path_factory.mktemp("cache") / "tiktoken"
    shutil.copytree(SHARED / "tiktoken_cache", cache)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
        yield Tokenizer("gpt2")


@pytest.fixture(scope="module")
def shakespeare():
    path = SHARED / "shakespeare/input.txt"
    if not path.exists():
        pytest.skip(f"needs {path}")
    return path


# -----------------------------------------------------------------------------
# Tokenizers


def test_importing_prepare_is_light():
    code = "import prepare, sys; print({'torch', 'datasets', 'tiktoken', 'model'} & {*sys.modules})"
    assert program(code=code).stdout == "set()\n"


@pytest.mark.parametrize("tokenizer", [Tokenizer("bytes"), Tokenizer("char", "".join({*ODD}))])
def test_bytes_and_char_round_trip(tokenizer):
    ids = tokenizer.encode(ODD)
    assert tokenizer.decode(ids) == ODD
    assert b"".join(map(tokenizer.token_bytes, ids)) == ODD.encode()
    assert max(ids) < tokenizer.n_vocab == tokenizer.padded_vocab
    again = Tokenizer.from_meta(json.loads(json.dumps(tokenizer.to_meta())))
    assert again.encode(ODD) == ids


def test_end_of_text_counts_in_prompts_only():
    tokenizer = Tokenizer("bytes")
    assert (tokenizer.n_vocab, tokenizer.eot) == (257, 256)
    assert 256 not in tokenizer.encode(MARK)
    assert tokenizer.encode_prompt(f"a{MARK}{MARK}b") == [97, 256, 256, 98]
    assert tokenizer.decode([97, 256]) == "a" + MARK
    assert Tokenizer("char", "ab").encode_prompt("ba") == [1, 0]
    with pytest.raises(UserError, match="'<c'"):
        Tokenizer("char", "ab").encode_prompt("abc<")


def test_gpt2_is_tiktokens(gpt2):
    assert (gpt2.n_vocab, gpt2.padded_vocab, gpt2.eot, gpt2.dtype) == (50257, 50304, 50256, "<u2")
    text = f"Hello{MARK}\n world 🙂{MARK}"
    assert gpt2.encode(text) == gpt2.bpe.encode_ordinary(text)
    assert gpt2.encode_prompt(text) == gpt2.bpe.encode(text, allowed_special={MARK})
    assert gpt2.decode(gpt2.encode_prompt(text)) == text


@pytest.mark.parametrize("size, dtype", [(65536, "uint16"), (65537, "uint32")])
def test_ids_take_four_bytes_only_where_they_must(size, dtype):
    assert Tokenizer("char", "".join(map(chr, range(0x10000, 0x10000 + size)))).dtype == dtype


def tiktoken_patterns(monkeypatch):
    """The splitting patterns of every encoding that tiktoken has, without its downloads."""
    import tiktoken_ext.openai_public as public

    for name in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
        monkeypatch.setattr(public, name, lambda *_, **__: {})
    return {make()["pat_str"] for make in public.ENCODING_CONSTRUCTORS.values()}


def test_no_token_spans_a_safe_cut(monkeypatch):
    import regex  # tiktoken's own dependency; its patterns are written for it

    words = ["a", "don't", "'s", "I'LL", "_", "x_", ".", "?!", "/", "//", "12", "1234", "é", "字",
             "。", "，", "漢字", "かな！", "🙂", "\u0301", "<|", "\x1c", "²"]
    spaces = [" ", " ", "\n", "\n", "  ", "\n\n", " \n", "\n ", "\t", "\r\n", "\r", "\u3000",
              "\xa0", ""]
    draw = np.random.default_rng(0)
    text = "".join(draw.choice(words) + draw.choice(spaces) for _ in range(20_000))
    cuts = [0, *(m.end() for m in SAFE_CUT.finditer(text)), len(text)]
    assert len(cuts) > 3000
    for pattern in map(regex.compile, tiktoken_patterns(monkeypatch)):
        parts = (text[a:b] for a, b in zip(cuts, cuts[1:], strict=False))
        assert [t for part in parts for t in pattern.findall(part)] == pattern.findall(text)


def test_text_without_spaces_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "BLOCK", 100)
    (tmp_path / "zh.txt").write_text("他们说，今天很好。\n\n" * 200, encoding="utf-8")
    pieces = [text for text, _ in prepare.text_pieces(tmp_path / "zh.txt")]
    assert max(map(len, pieces)) < 250 and "".join(pieces) == "他们说，今天很好。\n\n" * 200


# -----------------------------------------------------------------------------
# The corpora


def test_shakespeare_char_is_nanogpts(tmp_path, shakespeare):
    make(tmp_path, "shakespeare_char", "--input", shakespeare)
    folder = tmp_path / "data/shakespeare_char"
    found, meta, data = bins(folder), load_meta(folder), shakespeare.read_text()
    stoi = {c: i for i, c in enumerate(sorted(set(data)))}
    n = len(data)
    for split, part in ("train", data[:int(n * 0.9)]), ("val", data[int(n * 0.9):]):
        assert found[split] == np.array([stoi[c] for c in part], dtype=np.uint16).tobytes()
    assert [meta[s]["tokens"] for s in ("train", "val")] == [1_003_854, 111_540]
    assert meta["vocab_size"] == 65 and meta["alphabet"] == "".join(stoi)


def test_shakespeare_is_nanogpts(tmp_path, shakespeare, gpt2, monkeypatch):
    monkeypatch.setattr(prepare, "BLOCK", 5000)  # and so it does not matter where it is cut
    make(tmp_path, "shakespeare", "--input", shakespeare)
    found, data = bins(tmp_path / "data/shakespeare"), shakespeare.read_text()
    n = len(data)
    for split, part in ("train", data[:int(n * 0.9)]), ("val", data[int(n * 0.9):]):
        expected = np.array(gpt2.bpe.encode_ordinary(part), dtype=np.uint16)
        assert found[split] == expected.tobytes()
        assert len(expected) == {"train": 301_966, "val": 36_059}[split]


def test_tinystories_document_by_document(tmp_path, gpt2, monkeypatch):
    path = SHARED / "tinystories/stories.txt"
    if not path.exists():
        pytest.skip(f"needs {path}")
    monkeypatch.setattr(prepare, "WORKER_SHARE", 1 << 20)
    make(tmp_path, "tinystories", "--input", path, "--num_proc=2")
    found, meta = bins(tmp_path / "data/tinystories"), load_meta(tmp_path / "data/tinystories")
    assert meta["train"]["tokens"] + meta["val"]["tokens"] == 2_584_747
    assert meta["train"]["documents"] + meta["val"]["documents"] == 12_756
    is_val = prepare.hash_rule(12_756, 0.005, 2357)
    ids = {"train": [], "val": []}
    texts = path.read_text().removesuffix(f"\n{MARK}\n").split(f"\n{MARK}\n")
    for i, text in enumerate(texts):
        ids["val" if is_val(i) else "train"] += [*gpt2.bpe.encode_ordinary(text), 50256]
    for split in ids:
        assert found[split] == np.array(ids[split], dtype=np.uint16).tobytes()


def test_pydoc_needs_nothing(tmp_path):
    make(tmp_path, "pydoc")
    from pydoc_data.topics import topics

    found = documents(tmp_path / "data/pydoc") + documents(tmp_path / "data/pydoc", "val")
    assert sorted(found) == sorted(topics.values())


def test_openwebtext_has_nanogpts_validation_documents(tmp_path, stories, capsys):
    datasets = pytest.importorskip("datasets")
    for n in 1, 2, 300, 4001:
        if n > 1:
            rows = datasets.Dataset.from_dict({"i": range(n)})
            test = rows.train_test_split(test_size=0.0005, seed=2357, shuffle=True)["test"]
            assert {*test["i"]} == {*filter(prepare.nanogpt_rule(n), range(n))}
    assert math.ceil(0.0005 * 8_013_769) == 4007
    make(tmp_path, "openwebtext", "--input", stories, "--tokenizer=bytes")
    assert "partial: 300 of OpenWebText's 8,013,769 documents" in capsys.readouterr().out
    chosen, = filter(prepare.nanogpt_rule(300), range(300))
    assert documents(tmp_path / "data/openwebtext", "val")[0].startswith(f"Story {chosen}.\n")


# -----------------------------------------------------------------------------
# Reading


def text(tmp_path, content, *words, name="input.txt"):
    """The documents that a file with this content becomes, in order, with one more at the end."""
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    last = tmp_path / "last.txt"
    last.write_text("last")
    make(tmp_path, "text", "--tokenizer=bytes", "--overwrite", "--input", path, "--val_input", last,
         *words)
    return documents(tmp_path / "data/text")


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_separators(tmp_path, monkeypatch, block):
    monkeypatch.setattr(prepare, "BLOCK", block)
    assert text(tmp_path, ODD) == [ODD]  # no newline is lost or translated
    assert text(tmp_path, f"a b\n{MARK}\nc d") == ["a b", "c d"]
    assert text(tmp_path, f"a\n\n{MARK}\n\nb\n") == ["a\n", "\nb\n"]
    assert text(tmp_path, f"a\r\n{MARK}\r\nb {MARK} c") == ["a", "b ", " c"]
    assert text(tmp_path, f"{MARK}\n{MARK}a{MARK}{MARK}\n\n") == ["a"]
    assert text(tmp_path, f"<|endof a\nb c {MARK[:-1]}") == [f"<|endof a\nb c {MARK[:-1]}"]


def test_folders_and_several_files(tmp_path):
    folder = tmp_path / "in"
    (folder / "b").mkdir(parents=True)
    (folder / ".git").mkdir()
    for name, content in {"c.txt": "three", "a.md": f"one{MARK}two", "b/x.py": "b x",
                          ".git/y": "no", "d.jsonl": '{"text": "four"}\n', "e.txt": ""}.items():
        (folder / name).write_text(content)
    (tmp_path / "z").write_text("z")
    make(tmp_path, "text", "--name=n", "--tokenizer=bytes", "--input", folder, tmp_path / "z",
         "--val_input", tmp_path / "z")
    assert documents(tmp_path / "data/n") == ["one", "two", "b x", "three", "four", "z"]


def test_json_lines(tmp_path):
    records = [{"body": f"one\n{MARK}\nstill one", "x": 1}, {"body": ""}, {"body": "\ud83d"}]
    content = "\n\n".join(map(json.dumps, records))
    assert text(tmp_path, content, "--field=body", name="a.jsonl") == \
        [f"one\n{MARK}\nstill one", "", "\N{REPLACEMENT CHARACTER}"]


def test_a_separator_in_a_record_is_text(tmp_path, gpt2):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": f"a{MARK}b"}) + '\n{"text": "c"}\n')
    make(tmp_path, "text", "--input", tmp_path / "a.jsonl", "--val_input", tmp_path / "a.jsonl")
    ids = np.frombuffer(bins(tmp_path / "data/text")["val"], np.uint16).tolist()
    assert ids == [*gpt2.bpe.encode_ordinary(f"a{MARK}b"), 50256, gpt2.encode("c")[0], 50256]


def write_parquet(path, prefix, n):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {"text": [f"{prefix}{i} {ODD}" for i in range(n)], "label": [*range(n)]}
    pyarrow.parquet.write_table(pyarrow.table(rows), path)
    return rows["text"]


def test_parquet(tmp_path):
    texts = write_parquet(tmp_path / "a.parquet", "row ", 600)
    assert text(tmp_path, (tmp_path / "a.parquet").read_bytes(), name="b.parquet") == texts
    assert "no field foo; --field chooses one of: text, label" in refused(
        tmp_path, "text", "--name=x", "--input", tmp_path / "a.parquet", "--tokenizer=bytes",
        "--field=foo")
    assert "record 1 has 0 for its text" in refused(
        tmp_path, "text", "--name=x", "--input", tmp_path / "a.parquet", "--tokenizer=bytes",
        "--field=label")


def test_datasets(tmp_path, monkeypatch):
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
    make(tmp_path, "hf", *dataset, "--name=half", "--split=train[:10%]")
    meta = load_meta(tmp_path / "data/half")
    assert meta["train"]["documents"] + meta["val"]["documents"] == 50
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
    make(tmp_path, "tinystories", "--tokenizer=bytes", "--name=carved", "--val_fraction=0.1")
    meta = load_meta(tmp_path / "data/carved")
    assert meta["train"]["documents"] + meta["val"]["documents"] == 500


# -----------------------------------------------------------------------------
# Splits


def test_hash_rule():
    first, second = ([*filter(prepare.hash_rule(50_000, 0.05, seed), range(50_000))]
                     for seed in (1, 2))
    assert first != second and abs(len(first) - 2500) < 200
    assert first[:5] == [5, 30, 47, 124, 127]  # the split of a published run never changes
    for n in range(2, 30):
        for fraction in 0.0001, 0.5, 0.9999:
            rule = prepare.hash_rule(n, fraction, seed=n)
            assert 0 < sum(map(rule, range(n))) < n


def test_one_document_is_cut_near_its_end(tmp_path):
    (tmp_path / "a").write_text("0123456789" * 10)
    make(tmp_path, "text", "--tokenizer=bytes", "--input", tmp_path / "a", "--val_fraction=0.07")
    assert documents(tmp_path / "data/text") == [("0123456789" * 10)[:93]]
    assert documents(tmp_path / "data/text", "val") == ["3456789"]
    assert "cut after 93 characters" in load_meta(tmp_path / "data/text")["split_rule"]


def test_a_cut_may_fall_between_pieces():
    pieces = [("abc", False), ("de", False), ("f", True)]
    for limit in range(1, 6):
        found = "".join(text + "|" * ends for text, ends in prepare._cut_in_two(pieces, limit))
        assert found == "abcdef"[:limit] + "|" + "abcdef"[limit:] + "|"


def test_bins_do_not_depend_on_processes_or_blocks(tmp_path, stories, monkeypatch):
    command = ["text", "--input", stories, "--tokenizer=bytes", "--val_fraction=0.2"]
    make(tmp_path, *command, "--name=a", "--num_proc=1")
    monkeypatch.setattr(prepare, "WORKER_SHARE", 1)
    monkeypatch.setattr(prepare, "BLOCK", 1000)
    make(tmp_path, *command, "--name=b", "--num_proc=3")
    assert bins(tmp_path / "data/a") == bins(tmp_path / "data/b")


def test_few_batches_are_in_flight():
    pulled = []
    items = (pulled.append(i) or -i for i in range(50))
    for done, result in enumerate(prepare._map(abs, items, workers=2)):
        assert result == done and len(pulled) <= done + 5


# -----------------------------------------------------------------------------
# Interruption, overwriting

SLOW = ("import prepare, sys; prepare.SAVE_EVERY = 0; prepare.BLOCK = 2000;"
        "prepare.WORKER_SHARE = 1; prepare.main(sys.argv[1:])")


def test_killed_runs_continue(tmp_path, stories):
    stories.write_bytes(stories.read_bytes() * 20)
    command = ["text", "--input", stories, "--tokenizer=bytes", "--num_proc=2"]
    make(tmp_path, *command, "--name=whole")
    folder = tmp_path / "data/killed"
    progress, seen = folder / "partial/progress.json", 0
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", SLOW, *map(str, command), "--name=killed",
             f"--data_dir={folder.parent}"], cwd=ROOT, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL)
        until = seen + 40
        while seen < until:
            assert process.poll() is None
            time.sleep(0.002)
            seen = json.loads(progress.read_text())["batches"] if progress.exists() else 0
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=20)  # its pipe closes when the last worker is gone as well
        with pytest.raises(UserError, match="unfinished"):
            load_meta(folder)
    done = program(*command, "--name=killed", f"--data_dir={folder.parent}", code=SLOW)
    assert done.returncode == 0 and "continuing an interrupted run" in done.stdout
    assert bins(folder) == bins(tmp_path / "data/whole")


def test_interrupted_run_continues_only_with_the_same_settings(tmp_path, stories, monkeypatch,
                                                               capsys):
    monkeypatch.setattr(prepare, "SAVE_EVERY", 0)
    monkeypatch.setattr(prepare, "BLOCK", 1000)
    command = ["text", "--input", stories, "--tokenizer=bytes"]
    make(tmp_path, *command, "--name=whole")
    encode, calls = prepare._encode, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return encode(*arguments)

    for seed in 2357, 1:
        calls.clear()
        shutil.rmtree(tmp_path / "data/text", ignore_errors=True)
        with monkeypatch.context() as patch:
            patch.setattr(prepare, "_encode", interrupted)
            assert refused(tmp_path, *command, f"--seed={seed}") == \
                "interrupted; the same command continues"
        assert sorted(os.listdir(tmp_path / "data/text")) == ["partial"]
        capsys.readouterr()
        make(tmp_path, *command)
        said = "continuing an interrupted run" if seed == 2357 else "starting anew"
        assert said in capsys.readouterr().out
        assert bins(tmp_path / "data/text") == bins(tmp_path / "data/whole")


def test_meta_comes_last_and_a_killed_move_is_finished(tmp_path, stories, monkeypatch):
    command = ["text", "--input", stories, "--tokenizer=bytes"]
    make(tmp_path, *command)
    moves, replace = [], os.replace

    def stopped(old, new):
        if Path(new).parent.name == "text":
            if Path(new).name == "val.bin":
                raise KeyboardInterrupt
            moves.append(Path(new).name)
        replace(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stopped)
        refused(tmp_path, *command, "--seed=1", "--overwrite")
    assert moves == ["train.bin"]
    with pytest.raises(UserError, match="unfinished"):  # the new train.bin with the old val.bin
        load_meta(tmp_path / "data/text")
    make(tmp_path, *command, "--seed=1")
    make(tmp_path, *command, "--seed=1", "--name=whole")
    assert bins(tmp_path / "data/text") == bins(tmp_path / "data/whole")


def test_complete_data_is_kept_unless_overwritten(tmp_path, stories, monkeypatch, capsys):
    command = ["text", "--input", stories, "--tokenizer=bytes"]
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


def test_a_second_run_is_kept_out(tmp_path, stories):
    pytest.importorskip("fcntl")
    partial = tmp_path / "data/text/partial"
    partial.mkdir(parents=True)
    with locked(partial, "held by the test"):
        line = refused(tmp_path, "text", "--input", stories, "--tokenizer=bytes")
    assert "another prepare.py is writing" in line


def test_without_locks_no_open_file_is_in_the_way(tmp_path, monkeypatch):
    """Windows, which has none, would not remove a folder with an open file."""
    monkeypatch.setattr("config.fcntl", None)
    with locked(tmp_path, "never"):
        assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks_is_only_warned_of(tmp_path, monkeypatch, capsys):
    pytest.importorskip("fcntl")

    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("config.fcntl.flock", flock)
    with locked(tmp_path, "never"):
        pass
    warning = capsys.readouterr().err
    assert str(tmp_path) in warning and "Function not implemented" in warning


def test_memory_does_not_grow_with_the_text(tmp_path):
    with open(tmp_path / "big.txt", "w") as file:  # one document, no newline
        file.writelines("word " * 200_000 for _ in range(30))
    code = ("import resource, sys, numpy, tqdm, prepare; prepare.BLOCK = 1 << 18\n"
            "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "before = peak(); prepare.main(sys.argv[1:]); print(peak() - before)")
    done = program("text", "--tokenizer=bytes", "--input", tmp_path / "big.txt",
                   f"--data_dir={tmp_path}", "--num_proc=1", code=code)
    kib = int(done.stdout.splitlines()[-1])
    assert kib < 15_000, f"{kib} KiB for a text of 30,000"


# -----------------------------------------------------------------------------
# Mistakes and failures: one line, exit code 2, nothing that looks finished


@pytest.mark.parametrize("words, message", [
    ((), "say what to prepare: python prepare.py tinystories"),
    (("text",), "text needs --input"),
    (("hf",), "hf needs --dataset"),
    (("pydoc", "--input=x"), "pydoc takes no --input"),
    (("text", "--input=x", "--dataset=y"), "are hf's"),
    (("pydoc", "--val_split=x"), "is for text from the Hub"),
    (("tinystories", "--val_input=x"), "--val_input needs --input"),
    (("text", "--input=x", "--val_input=y", "--val_fraction=0.1"), "does not go with"),
    (("pydoc", "--val_fraction=1"), "val_fraction=1.0: expected more than 0 and less than 1"),
    (("pydoc", "--num_proc=0"), "num_proc=0: expected at least 1"),
    (("pydoc", "--name=../x"), "without slashes"),
    (("text", "--input=no/such"), "no file or folder no/such"),
    (("pydoc", "--tokenizer=gtp2"), "no tokenizer gtp2; did you mean gpt2?"),
    (("tinystorys",), "did you mean tinystories?"),
])
def test_mistakes_on_the_command_line(tmp_path, words, message):
    assert message in refused(tmp_path, *words)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("name, content, message", [
    ("a.txt", "abc é".encode() * 400 + b"\xff", "a.txt is not UTF-8 text: byte 2400"),
    ("a.txt", "abc é".encode()[:-1], "a.txt is not UTF-8 text: byte 4"),
    ("a.jsonl", b'{"text": "x"}\n{"text": "\xe9"}', "a.jsonl is not UTF-8 text: byte 24"),
    ("a.jsonl", b'{"text": "x"}\n{"body": "y", "id": 1}',
     "line 2 has no field text; --field chooses one of: body, id"),
    ("a.jsonl", b'{"text": "x"}\n["y"]', "line 2 has no field text"),
    ("a.jsonl", b'{"text": "x"}\n\n{"text"', "line 3 is not JSON"),
    ("a.jsonl", b'{"text": null}', "record 1 has None for its text"),
    ("a.parquet", b"PAR1 no", "a.parquet is not a parquet file that can be read"),
    ("a.txt", b"\n \n", "there is no text in"),
    ("a.txt", b"", "there is no text in"),
    ("a.txt", b"x", "too little text to split"),
])
def test_faults_of_the_input(tmp_path, monkeypatch, name, content, message):
    monkeypatch.setattr(prepare, "BLOCK", 1000)
    (tmp_path / name).write_bytes(content)
    assert message in refused(tmp_path, "text", "--tokenizer=bytes", "--input", tmp_path / name)
    with pytest.raises(UserError):
        load_meta(tmp_path / "data/text")


def test_an_id_that_does_not_fit(tmp_path, stories, monkeypatch):
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: [70_000])
    line = refused(tmp_path, "text", "--tokenizer=bytes", "--input", stories)
    assert line == "the token id 70000 does not fit a vocabulary of 257"


def test_without_a_network(tmp_path, monkeypatch):
    empty = tmp_path / "cache"
    empty.mkdir()
    offline = os.environ | {"TIKTOKEN_CACHE_DIR": str(empty), "HF_HUB_OFFLINE": "1",
                            "HF_HOME": str(empty), "https_proxy": "http://127.0.0.1:9"}
    for words, message in [
            (("tinystories",), "cannot download the tokenizer gpt2"),
            (("tinystories", "--tokenizer=bytes"), "cannot load roneneldan/TinyStories"),
            (("shakespeare_char",), "cannot load https://raw.githubusercontent.com")]:
        done = program(*words, f"--data_dir={tmp_path / 'data'}", env=offline)
        assert done.returncode == 2 and done.stderr.startswith(f"error: {message}"), done.stderr
        assert done.stderr.count("\n") == 1 and not (tmp_path / "data").exists()


def test_full_disk(tmp_path, stories):
    """A limit on the size of a file stands for a full disk: both are an OSError of a write."""
    resource = pytest.importorskip("resource")
    command = ["text", "--tokenizer=bytes", "--input", stories, f"--data_dir={tmp_path / 'data'}"]
    limit = resource.RLIMIT_FSIZE, (9000, 9000)
    full = program(*command, preexec_fn=lambda: resource.setrlimit(*limit))
    assert full.returncode == 2 and "Traceback" not in full.stderr
    assert "File too large; once that is mended, the same command continues" in full.stderr
    with pytest.raises(UserError, match="unfinished"):
        load_meta(tmp_path / "data/text")
    assert program(*command).returncode == 0
    assert len(documents(tmp_path / "data/text")) > 250


def test_a_killed_worker(tmp_path, stories, monkeypatch):
    def broken(*_):
        raise prepare.BrokenProcessPool

    monkeypatch.setattr(prepare.ProcessPoolExecutor, "submit", broken)
    monkeypatch.setattr(prepare, "WORKER_SHARE", 1)
    assert "a worker process died" in refused(
        tmp_path, "text", "--tokenizer=bytes", "--input", stories, "--num_proc=2")


# -----------------------------------------------------------------------------
# Data folders


def nanogpt_folder(tmp_path, meta=None):
    for split in "train", "val":
        np.arange(10, dtype=np.uint16).tofile(tmp_path / f"{split}.bin")
    if meta is not None:
        (tmp_path / "meta.pkl").write_bytes(meta)
    return tmp_path


def test_nanogpt_folders(tmp_path):
    meta = load_meta(nanogpt_folder(tmp_path))
    assert meta == {"tokenizer": "gpt2", "vocab_size": 50257, "padded_vocab_size": 50304,
                    "dtype": "uint16", "train": {"tokens": 10}, "val": {"tokens": 10}}
    itos = dict(enumerate("ba\n"))
    table = {"vocab_size": 3, "itos": itos, "stoi": {c: i for i, c in itos.items()}}
    meta = load_meta(nanogpt_folder(tmp_path, pickle.dumps(table)))
    assert (meta["vocab_size"], meta["padded_vocab_size"], meta["dtype"]) == (3, 3, "uint16")
    assert Tokenizer.from_meta(meta).decode([1, 0, 2]) == "ab\n"


def test_nanogpt_data_is_kept_unless_overwritten(tmp_path, stories):
    folder = tmp_path / "data/text"
    folder.mkdir(parents=True)
    nanogpt_folder(folder)
    command = ["text", "--input", stories, "--tokenizer=bytes"]
    assert "has other data (by nanoGPT); --overwrite" in refused(tmp_path, *command)
    make(tmp_path, *command, "--overwrite")
    assert len(documents(folder)) > 250


class Malicious:
    def __reduce__(self):
        return os.system, ("touch hacked",)


@pytest.mark.parametrize("content", [
    pickle.dumps({"itos": Malicious()}), pickle.dumps([1]), pickle.dumps({"itos": {0: "ab"}}),
    pickle.dumps({"itos": {0: "a", 1: "a"}}), b"", b"\x80\x04junk"])
def test_a_pickle_runs_nothing(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="meta.pkl is not a table of characters"):
        load_meta(nanogpt_folder(tmp_path, content))
    assert not (tmp_path / "hacked").exists()


def test_missing_data_names_the_command(tmp_path):
    for name, how in ("openwebtext", "openwebtext"), ("mine", "text --input=FILES --name=mine"):
        with pytest.raises(UserError) as error:
            load_meta(tmp_path / name)
        assert str(error.value) == \
            f"no data in {tmp_path / name}; make it with: python prepare.py {how}"
    (nanogpt_folder(tmp_path) / "val.bin").unlink()
    with pytest.raises(UserError, match=f"no val.bin in .* --name={tmp_path.name} --overwrite"):
        load_meta(tmp_path)


@pytest.mark.parametrize("change", [
    lambda meta: meta.pop("dtype"), lambda meta: meta.update(dtype="float32"),
    lambda meta: meta.update(vocab_size="many"), lambda meta: meta.update(vocab_size=300),
    lambda meta: meta.pop("tokenizer"), lambda meta: meta.update(tokenizer="char"),
    lambda meta: meta["train"].update(tokens=3), lambda meta: meta.update(val=None)])
def test_damaged_meta(tmp_path, stories, change):
    make(tmp_path, "text", "--tokenizer=bytes", "--input", stories)
    path = tmp_path / "data/text/meta.json"
    meta = json.loads(path.read_text())
    change(meta)
    for content in json.dumps(meta), path.read_text()[:100], "[]":
        path.write_text(content)
        with pytest.raises(UserError, match="is damaged"):
            load_meta(path.parent)


def test_the_program_says_what_it_did(tmp_path):
    done = program("pydoc", f"--data_dir={tmp_path}")
    assert done.returncode == 0
    assert done.stdout.startswith("train has ") and "encoding: 100%" in done.stderr
    wrong = program("pydok")
    assert (wrong.returncode, wrong.stdout) == (2, "") and "Traceback" not in wrong.stderr
    assert "prepare.py hf --dataset=ID" in program("--help").stdout
