"""support/text.py: the documents of plain text, JSON lines and parquet; where text may be cut."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import refused

from support import text
from support.text import SAFE_CUT, cut_in_two, file_pieces, list_files, text_pieces

MARK = "<|endoftext|>"
MIXED = "Ünï ☃ 🙂👩‍👩‍👧\r\nline two\n\n  \ttabs\n"


def documents(*inputs, field="text"):
    """The documents of files and folders."""
    found = [""]
    for piece, ends in file_pieces(list_files(map(str, inputs)), field):
        found[-1] += piece
        if ends:
            found.append("")
    assert found.pop() == ""  # the last document ends too
    return found


@pytest.fixture
def read(tmp_path):
    """read(content, name, field): the documents of one file."""
    def go(content, name="input.txt", field="text"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return documents(path, field=field)

    return go


# -----------------------------------------------------------------------------
# Plain text


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
@pytest.mark.parametrize("content, expected", [
    (MIXED, [MIXED]),  # no newline is lost or translated
    (f"a b\n{MARK}\nc d", ["a b", "c d"]),
    (f"a\n\n{MARK}\n\nb\n", ["a\n", "\nb\n"]),
    (f"a\r\n{MARK}\r\nb {MARK} c", ["a", "b ", " c"]),
    (f"{MARK}\n{MARK}a{MARK}{MARK}\n\n", ["a"]),
    (f"<|endof a\nb c {MARK[:-1]}", [f"<|endof a\nb c {MARK[:-1]}"]),
    ("", []), (" \n", [])])
def test_separators(read, monkeypatch, block, content, expected):
    monkeypatch.setattr(text, "BLOCK", block)
    assert read(content) == expected


def test_text_without_spaces_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "BLOCK", 100)
    content = "他们说，今天很好。\n\n" * 200
    (tmp_path / "zh.txt").write_text(content, encoding="utf-8")
    pieces = [piece for piece, _ in text_pieces(tmp_path / "zh.txt")]
    assert max(map(len, pieces)) < 250 and "".join(pieces) == content


def test_no_token_spans_a_safe_cut(monkeypatch):
    """By the splitting patterns of every encoding that tiktoken has, without its downloads."""
    import regex  # tiktoken's own dependency; its patterns are written for it
    import tiktoken_ext.openai_public as public

    for name in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
        monkeypatch.setattr(public, name, lambda *_, **__: {})
    patterns = {make()["pat_str"] for make in public.ENCODING_CONSTRUCTORS.values()}
    words = ["a", "don't", "'s", "I'LL", "_", "x_", ".", "?!", "/", "//", "12", "1234", "é", "字",
             "。", "，", "漢字", "かな！", "🙂", "\u0301", "<|", "\x1c", "²"]
    spaces = [" ", " ", "\n", "\n", "  ", "\n\n", " \n", "\n ", "\t", "\r\n", "\r", "\u3000",
              "\xa0", ""]
    draw = np.random.default_rng(0)
    content = "".join(draw.choice(words) + draw.choice(spaces) for _ in range(20_000))
    cuts = [0, *(m.end() for m in SAFE_CUT.finditer(content)), len(content)]
    assert len(cuts) > 3000 and patterns
    for pattern in map(regex.compile, patterns):
        parts = (content[a:b] for a, b in zip(cuts, cuts[1:], strict=False))
        assert [t for part in parts for t in pattern.findall(part)] == pattern.findall(content)


@pytest.mark.parametrize("limit", range(1, 6))
def test_a_cut_in_two_may_fall_between_pieces(limit):
    pieces = [("abc", False), ("de", False), ("f", True)]
    found = "".join(f"{piece}|" if ends else piece for piece, ends in cut_in_two(pieces, limit))
    assert found == f"{'abcdef'[:limit]}|{'abcdef'[limit:]}|"


# -----------------------------------------------------------------------------
# Records and folders


def test_json_lines(read):
    """A separator in a record is text; half of a character is none."""
    records = [{"body": f"one\n{MARK}\nstill one", "x": 1}, {"body": ""}, {"body": "\ud83d"}]
    assert read("\n\n".join(map(json.dumps, records)), "a.jsonl", "body") == \
        [f"one\n{MARK}\nstill one", "", "\N{REPLACEMENT CHARACTER}"]


def test_parquet(tmp_path):
    rows = {"text": [f"row {i} {MIXED}" for i in range(600)], "label": [*range(600)]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "a.parquet")
    assert documents(tmp_path / "a.parquet") == rows["text"]
    for field, said in (("foo", "no field foo; --field chooses one of: text, label"),
                        ("label", "record 1 has 0 for its text")):
        refused(lambda field=field: documents(tmp_path / "a.parquet", field=field), said)


def test_folders_and_several_files(tmp_path):
    folder = tmp_path / "in"
    for name, content in {"c.txt": "three", "a.md": f"one{MARK}two", "b/x.py": "b x", ".z": "no",
                          ".git/y": "no", "d.jsonl": '{"text": "four"}\n', "e.txt": ""}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    (tmp_path / "z").write_text("z")
    assert documents(folder, tmp_path / "z") == ["one", "two", "b x", "three", "four", "z"]
    refused(lambda: documents(folder, tmp_path / "none"), "no file or folder")


@pytest.mark.parametrize("name, content, message", [
    ("a.txt", "abc é".encode() * 400 + b"\xff", "a.txt is not UTF-8 text: byte 2400"),
    ("a.txt", "abc é".encode()[:-1], "a.txt is not UTF-8 text: byte 4"),
    ("a.jsonl", b'{"text": "x"}\n{"text": "\xe9"}', "a.jsonl is not UTF-8 text: byte 24"),
    ("a.jsonl", b'{"text": "x"}\n{"body": "y", "id": 1}',
     "line 2 has no field text; --field chooses one of: body, id"),
    ("a.jsonl", b'{"text": "x"}\n["y"]', "line 2 has no field text"),
    ("a.jsonl", b'{"text": "x"}\n\n{"text"', "line 3 is not JSON"),
    ("a.jsonl", b'{"text": null}', "record 1 has None for its text"),
    ("a.parquet", b"PAR1 no", "a.parquet is not a parquet file that can be read")])
def test_faults_of_a_file(read, monkeypatch, name, content, message):
    monkeypatch.setattr(text, "BLOCK", 1000)
    assert len(refused(lambda: read(content, name), message)) == 1
