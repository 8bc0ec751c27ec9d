"""support/tokenizer.py: the tokenizers, and what a data folder says of itself."""

import json
import operator
import pickle
from pathlib import Path

import numpy as np
import pytest
from conftest import refused
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import prepare
from support.errors import UserError
from support.meta import CORPORA, load_meta
from support.tokenizer import Tokenizer

MARK = "<|endoftext|>"
MIXED = "Ünï ☃ 🙂👩‍👩‍👧\r\nline two\n\n  \ttabs\n"


# -----------------------------------------------------------------------------
# Tokenizers


@pytest.mark.parametrize("tokenizer", [Tokenizer("bytes"), Tokenizer("char", "".join({*MIXED}))])
def test_bytes_and_char_round_trip(tokenizer):
    ids = tokenizer.encode(MIXED)
    assert tokenizer.decode(ids) == MIXED
    assert b"".join(map(tokenizer.token_bytes, ids)) == MIXED.encode()
    assert max(ids) < tokenizer.n_vocab == tokenizer.padded_vocab
    again = Tokenizer.from_meta(json.loads(json.dumps(tokenizer.to_meta())))
    assert again.encode(MIXED) == ids


def test_end_of_text_counts_in_prompts_only():
    tokenizer = Tokenizer("bytes")
    assert (tokenizer.n_vocab, tokenizer.eot) == (257, 256)
    assert 256 not in tokenizer.encode(MARK)
    assert tokenizer.encode_prompt(f"a{MARK}{MARK}b") == [97, 256, 256, 98]
    assert tokenizer.decode([97, 256]) == "a" + MARK
    assert Tokenizer("char", "ab").encode_prompt("ba") == [1, 0]
    refused(lambda: Tokenizer("char", "ab").encode_prompt("abc<"), "'<c'")


def test_gpt2_is_tiktokens(gpt2_cache):
    gpt2 = Tokenizer("gpt2")
    assert (gpt2.n_vocab, gpt2.padded_vocab, gpt2.eot, gpt2.dtype) == (50257, 50304, 50256, "<u2")
    text = f"Hello{MARK}\n world 🙂{MARK}"
    assert gpt2.encode(text) == gpt2.bpe.encode_ordinary(text)
    assert gpt2.encode_prompt(text) == gpt2.bpe.encode(text, allowed_special={MARK})
    assert gpt2.decode(gpt2.encode_prompt(text)) == text and gpt2.encode_prompt("") == []
    assert gpt2.encode_prompt(f"a\udcff{MARK}") == [*gpt2.encode("a\ufffd"), 50256]
    for first in f"a{MARK}b", "plain":  # a separator within a document is text
        assert gpt2.encode_pieces([(first, True), ("c", True), ("d", False)], True).tolist() == \
            [*gpt2.encode(first), 50256, *gpt2.encode("c"), 50256, *gpt2.encode("d")]
    assert gpt2.encode_pieces([("a", True)], False).tolist() == gpt2.encode("a")


@pytest.mark.parametrize("size, dtype", [(65536, "uint16"), (65537, "uint32")])
def test_ids_take_four_bytes_only_where_they_must(size, dtype):
    assert Tokenizer("char", "".join(map(chr, range(0x10000, 0x10000 + size)))).dtype == dtype


def test_names_that_are_no_tokenizer():
    assert refused(lambda: Tokenizer("gtp2")) == ["no tokenizer gtp2; did you mean gpt2?"]
    for meta in {}, [], {"tokenizer": 3}, {"tokenizer": "char", "alphabet": "aa", "vocab_size": 2}:
        refused(lambda meta=meta: Tokenizer.from_meta(meta), "there is no such tokenizer")


# -----------------------------------------------------------------------------
# Data folders


def nanogpt_folder(folder: Path, table: dict | None = None) -> Path:
    """Ten ids a split; with a meta.pkl if there is a table of characters."""
    for split in "train", "val":
        np.arange(10, dtype=np.uint16).tofile(folder / f"{split}.bin")
    if table is not None:
        (folder / "meta.pkl").write_bytes(pickle.dumps(table))
    return folder


def test_nanogpt_folders(tmp_path):
    assert load_meta(nanogpt_folder(tmp_path)) == {
        "tokenizer": "gpt2", "vocab_size": 50257, "padded_vocab_size": 50304, "dtype": "uint16",
        "train": {"tokens": 10}, "val": {"tokens": 10}}
    meta = load_meta(nanogpt_folder(tmp_path, {"itos": dict(enumerate("ba\n"))}))
    assert (meta["vocab_size"], meta["padded_vocab_size"], meta["dtype"]) == (3, 3, "uint16")
    assert Tokenizer.from_meta(meta).decode([1, 0, 2]) == "ab\n"
    refused(lambda: load_meta(nanogpt_folder(tmp_path, {"vocab_size": np.int64(3)})), "numpy",
            "meta.pkl is not a table of characters", "write plain int and str")
    (tmp_path / "val.bin").write_bytes(b"odd")
    refused(lambda: load_meta(tmp_path), "val.bin has 3 bytes, and without a meta.json an id is")


@pytest.mark.parametrize("table, decoded", [
    ({"vocab_size": 3, "itos": {0: "a", 1: "<UNK>", 2: "b"}}, "a<UNK>b"),
    ({"vocab_size": 3, "stoi": {"a": 0, "b": 2}}, "a<1>b"), ({"vocab_size": 3}, "<0><1><2>"),
    ({"vocab_size": 4, "itos": ["a", "<PAD>", "<PAD>"]}, "a<PAD><PAD>"),
    ({"itos": [*"abc"]}, "abc")])
def test_tables_that_nanogpt_takes(tmp_path, table, decoded):
    """With words, gaps or more rows than names; what is no character is never encoded."""
    meta = json.loads(json.dumps(load_meta(nanogpt_folder(tmp_path, table))))
    tokenizer = Tokenizer.from_meta(meta)
    assert tokenizer.decode(range(3)) == decoded
    assert tokenizer.n_vocab == meta["padded_vocab_size"] == table.get("vocab_size", 3)
    if "a" in decoded:
        assert tokenizer.encode("a") == [0]
    refused(lambda: tokenizer.encode("<"), "alphabet does not have '<'")


@pytest.mark.parametrize("kind, ids, warns", [("<u4", 100_000, True), ("<u2", 50_000, False)])
def test_wide_ids_without_a_meta_json(tmp_path, capsys, kind, ids, warns):
    drawn = np.random.default_rng(0).integers(0, ids, 500).astype(kind)
    for split in "train", "val":
        drawn.tofile(tmp_path / f"{split}.bin")
    load_meta(tmp_path)
    assert ("train.bin seems to have ids of four bytes" in capsys.readouterr().err) is warns
    for magic in 20240520, 20240801:  # of ids of two bytes, and of four
        np.append(np.int32(magic), drawn.astype("<i4")).tofile(tmp_path / "val.bin")
        refused(lambda: load_meta(tmp_path), "val.bin begins with llm.c's header")


def test_missing_data_names_the_command(tmp_path):
    for name, how in ("openwebtext", "openwebtext"), ("mine", "text --input=FILES --name=mine"):
        assert refused(lambda name=name: load_meta(tmp_path / name)) == [
            f"no data in {tmp_path / name}; mend its name, or make it as the preset's file says, "
            f"or with: python prepare.py {how}"]
    assert {*CORPORA} <= {*prepare.CORPORA}
    (nanogpt_folder(tmp_path) / "val.bin").unlink()
    refused(lambda: load_meta(tmp_path), "no val.bin in", f"--name={tmp_path.name} --overwrite")
    (tmp_path / "partial").mkdir()
    refused(lambda: load_meta(tmp_path), "is unfinished; if prepare.py was stopped there, run it")


# -----------------------------------------------------------------------------
# Any meta.json is read as something consistent, or refused in one line


BYTES = {"tokenizer": "bytes", "vocab_size": 257, "padded_vocab_size": 257, "alphabet": "",
         "dtype": "uint16", "train": {"tokens": 4, "sha256": "0"}, "val": {"tokens": 4}}
CHAR = BYTES | {"tokenizer": "char", "vocab_size": 3, "padded_vocab_size": 3, "alphabet": "ab\n"}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text()
    | st.sampled_from([0, 1, 3, 3.0, 4, 257, 10**400, "bytes", "char", "uint32"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=3) | st.just("tokens"), inner, max_size=3), max_leaves=8)


@given(JSON | st.builds(operator.or_, st.sampled_from([BYTES, CHAR]),
                        st.dictionaries(st.sampled_from([*BYTES]), JSON, max_size=2)))
@settings(max_examples=60, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(CHAR)
def test_any_meta(tmp_path, changed):
    for split in "train", "val":
        (tmp_path / f"{split}.bin").write_bytes(bytes(8))
    (tmp_path / "meta.json").write_text(json.dumps(changed))
    try:
        meta = load_meta(tmp_path)
    except UserError as error:
        assert len(str(error).splitlines()) == 1 and "--overwrite" in str(error)
        assert changed not in (BYTES, CHAR)
        return
    rows, padded = meta["vocab_size"], meta["padded_vocab_size"]
    counts = [meta[split]["tokens"] for split in ("train", "val")]
    assert all(type(n) is int for n in (rows, padded, *counts)) and 0 < rows <= padded
    assert counts == [8 // {"uint16": 2, "uint32": 4}[meta["dtype"]]] * 2
    assert isinstance(meta["tokenizer"], str) and isinstance(meta.get("alphabet", ""), str)
    if meta["tokenizer"] in ("bytes", "char"):
        tokenizer = Tokenizer.from_meta(meta)
        assert tokenizer.decode([0, 1]) and tokenizer.n_vocab <= padded
    if meta["tokenizer"] == "char":
        assert len(set(meta["alphabet"])) == len(meta["alphabet"]) == rows
