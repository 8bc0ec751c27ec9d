"""support/text.py: what a file is, and its documents; where text may be cut."""

import gzip
import io
import json
import os
import threading

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import refused

from support import text
from support.text import SAFE_CUT, file_pieces, list_files, text_pieces

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
    (MIXED, [MIXED.replace("\r\n", "\n")]),  # universal newlines, as nanoGPT reads
    ("\ufeffa\rb\r\nc\ufeff", ["a\nb\nc\ufeff"]), ("\ufeff", []),
    (f"a b\n{MARK}\nc d", ["a b", "c d"]),
    (f"a\n\n{MARK}\n\nb\n", ["a\n", "\nb\n"]),
    (f"a\r\n{MARK}\r\nb {MARK} c", ["a", "b ", " c"]),
    (f"{MARK}\n{MARK}a{MARK}{MARK}\n\n", ["a"]),
    (f"<|endof a\nb c {MARK[:-1]}", [f"<|endof a\nb c {MARK[:-1]}"]),
    (f"{'a' * 9}   {MARK}b", [f"{'a' * 9}   ", "b"]),  # also where a block begins with white space
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


# -----------------------------------------------------------------------------
# Records and folders


RECORDS = [{"body": f"one\n{MARK}\nstill one", "x": [{"body": "no"}, -1.5e300, True]},
           {"body": ""}, {"body": "\ud83d"}, {"body": "é\\"}]
LINES = "\n\n".join(map(json.dumps, RECORDS))


@pytest.mark.parametrize("block", [10, 10**6])  # what pyarrow refuses may come later
@pytest.mark.parametrize("content", [
    LINES, "\ufeff" + LINES.replace("\n", "\r\n"), json.dumps(RECORDS),
    json.dumps(RECORDS, indent=2) + "\n"])
def test_json(read, monkeypatch, block, content):
    """A separator in a record is text; half of a character is none."""
    monkeypatch.setattr(text, "BLOCK", block)
    assert read(content, "a.jsonl", "body") == \
        [f"one\n{MARK}\nstill one", "", "\N{REPLACEMENT CHARACTER}", "é\\"]


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("name", ["a", "a.json", "a.txt", "a.JSONL", "a.ndjson"])
def test_a_file_is_what_its_content_says(read, tmp_path, pack, name):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two"]}), tmp_path / "b")
    pyarrow.parquet.write_table(pyarrow.table({"text": [b"one", b"two"]}), tmp_path / "c")
    for content in (b'{"text":"one"}\n{"text":"two"}',
                    b'\xef\xbb\xbf [\n{"x": 1, "text": "one"},{"text":"two"}]',
                    b'{\n "x" : 1,\n "text" : "one"\n}\n{\n "x" : 2, "text" : "two"\n}\n',
                    (tmp_path / "b").read_bytes(), (tmp_path / "c").read_bytes()):
        assert read(pack(content), name) == ["one", "two"]


@pytest.mark.parametrize("name, content", [
    ("package.json", '{\n "name": "x"\n}'), ("a.txt", "[1] A note.\n{x}"), ("a.txt.gz", "{}"),
    ("a.md", "[ ] to do\n[x] done"), ("a.hs", '{-# A #-}\nx = "text" : y')])
def test_what_is_no_record_is_plain_text(read, name, content):
    packed = gzip.compress(content.encode()) if name.endswith(".gz") else content
    assert read(packed, name) == [content]


def test_parquet(tmp_path):
    rows = {"text": [f"row {i} {MIXED}" for i in range(600)], "label": [*range(600)]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "a.PARQUET")
    assert documents(tmp_path / "a.PARQUET") == rows["text"]
    for field, said in (("foo", "no field foo; --field chooses one of: text, label"),
                        ("label", "record 1 has 0 for its text")):
        refused(lambda field=field: documents(tmp_path / "a.PARQUET", field=field), said)
    latin1 = pyarrow.array([b"caf\xe9"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": latin1}), tmp_path / "b")
    refused(lambda: documents(tmp_path / "b"), "b cannot be read: UnicodeDecodeError")


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_no_other_thread_reads_our_files(tmp_path, monkeypatch, name):
    """pyarrow's, which would: one that does so when the program ends aborts it."""
    readers = set()

    class Watched(io.FileIO):
        def readinto(self, buffer):
            readers.add(threading.get_ident())
            return super().readinto(buffer)

    pyarrow.parquet.write_table(pyarrow.table({"text": ["x"] * 500}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' * 500)
    monkeypatch.setattr(text, "_open", lambda path: io.BufferedReader(Watched(path)))
    assert documents(tmp_path / name) == ["x"] * 500 and readers == {threading.get_ident()}


def test_a_damaged_file_among_others_is_named(tmp_path):
    rows = {"text": [f"{i} " * 500 for i in range(1000)]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "a")
    content = bytearray((tmp_path / "a").read_bytes())
    content[9999:12_000] = bytes(2001)
    (tmp_path / "b").write_bytes(content)
    (tmp_path / "c").write_bytes(gzip.compress(os.urandom(999))[:-9])
    for name in "b", "c":
        (line,) = refused(lambda name=name: documents(tmp_path / "a", tmp_path / name))
        assert line.startswith(f"{tmp_path / name} cannot be read: ")


def test_folders_and_several_files(tmp_path):
    folder = tmp_path / "in"
    for name, content in {"c.txt": "three", "a.md": f"one{MARK}two", "b/x.py": "b x", ".z": "no",
                          ".git/y": "no", "d.jsonl": '{"text": "four"}\n', "e.txt": ""}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    (tmp_path / "z").write_text("z")
    assert documents(folder, tmp_path / "z") == ["one", "two", "b x", "three", "four", "z"]
    refused(lambda: documents(folder, tmp_path / "none"), "no file or folder")
    (folder / "gone").symlink_to("nowhere")  # else the text lacks it without a word
    refused(lambda: documents(folder), "gone cannot be read: FileNotFoundError")


def test_linked_folders_and_loops(tmp_path):
    for name, content in ("in/a/x", "x"), ("out/y", "y"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(content)
    for link, target in ("in/z", "../out"), ("in/a/up", ".."), ("out/in", "../in"):
        (tmp_path / link).symlink_to(target)
    assert documents(tmp_path / "in") == ["x", "y"]


def test_a_pipe_is_read_twice(tmp_path):
    read_end, write_end = os.pipe()
    os.write(write_end, b'{"text": "x"}')
    os.close(write_end)
    files = list_files([f"/dev/fd/{read_end}"])
    assert [*file_pieces(files, "text")] == [*file_pieces(files, "text")] == [("x", True)]


@pytest.mark.parametrize("name, content, message", [
    ("a.txt", "abc é".encode() * 400 + b"\xff", "a.txt is not UTF-8 text: byte 2400"),
    ("a.txt", "abc é".encode()[:-1], "a.txt is not UTF-8 text: byte 4"),
    ("a.jsonl", b'{"text": "x"}\n{"text": "\xe9"}', "a.jsonl is not UTF-8 text: byte 24"),
    ("a.jsonl", b'{"text": "x"}\n{"body": "y", "id": 1}',
     "line 2 has no field text; --field chooses one of: body, id"),
    ("a.jsonl", b'{"text": "x"}\n["y"]', "line 2 has no field text"),
    ("a.jsonl", b'{"text": "x"}\n\n{"text"', "line 3 is not JSON"),
    ("a.jsonl", b'{"text": null}', "record 1 has None for its text"),
    ("a.json", b'{\n "text": "x"\n}\n,', "is not JSON"),
    ("a.jsonl", b'[{"text": "x"},\n', "line 2 is not JSON"),
    ("A.NDJSON.gz", gzip.compress(b"NaN"), "has no field"),
    ("a.txt", "abc".encode("utf-16-le"), "a.txt has zero bytes"),
    ("a.txt", b"a b " * (1 << 15) + bytes(9), "a.txt has zero bytes"),  # of a broken download
    ("a.tar.gz", gzip.compress(b"a.txt" + bytes(507) + b"abc", mtime=0), "a.tar.gz has zero bytes"),
    ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid ", "git lfs pull"),
    ("a.zst", b"\x28\xb5\x2f\xfd", "a.zst is packed by zstd; unpack it: zstd -d "),
    ("a.parquet", b"no", "a.parquet cannot be read: ArrowInvalid")])
def test_faults_of_a_file(read, monkeypatch, name, content, message):
    monkeypatch.setattr(text, "BLOCK", 1000)
    assert len(refused(lambda: read(content, name), message)) == 1
