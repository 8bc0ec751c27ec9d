"""The one config reader: a dataclass, then preset files, then the command line; the later wins.

    python train.py config/yurii_owt.py --batch_size=8 --device cpu

Every option is a dataclass field; the comment beside it is its `--help` line. A preset is a Python
file of assignments, run with the current values as its globals, so that it may compute
(`min_lr = learning_rate / 10`) and import. Presets are code, like train.py: run your own.
Also here, for train.py and prepare.py alike: error lines, the lock on a folder, a durable rename.
This package imports neither torch nor numpy.
"""

import ast
import contextlib
import difflib
import dis
import inspect
import io
import math
import os
import runpy
import sys
import textwrap
import tokenize
import types
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from support.errors import fail, printable, reason

TRUE, FALSE, AUTO = {"true", "1", "yes"}, {"false", "0", "no"}, {"none", "auto"}


# -----------------------------------------------------------------------------
# One value: from a command-line word or a preset's Python object to the field's type


def _is_optional(kind) -> bool:
    return get_origin(kind) in (Union, types.UnionType) and type(None) in get_args(kind)


def _plain(kind):
    """The type without `| None`."""
    return next(k for k in get_args(kind) if k is not type(None)) if _is_optional(kind) else kind


def describe(kind) -> str:
    """How `--help` and the messages name a type."""
    if _is_optional(kind):
        return describe(_plain(kind)) + " or auto"
    if get_origin(kind) is Literal:
        return " | ".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        return "one or more strings"
    return {int: "integer", float: "number", bool: "true or false", str: "string"}[kind]


def coerce(name: str, value: Any, kind) -> Any:
    """`value` (a word or a Python object) as `kind`. Raises ValueError naming value and rule."""
    wrong = ValueError(f"{name}={printable(value)}: expected {describe(kind)}")
    if _is_optional(kind):
        if value is None or (isinstance(value, str) and value.lower() in AUTO):
            return None
        kind = _plain(kind)
    if get_origin(kind) is Literal:
        if not isinstance(value, str) or value not in get_args(kind):
            near = difflib.get_close_matches(str(value), get_args(kind), 1)
            raise ValueError(f"{wrong}" + (f"; did you mean {near[0]}?" if near else ""))
        return value
    if get_origin(kind) is tuple:
        value = (value,) if isinstance(value, str) else value
        if not isinstance(value, (tuple, list)) or not all(isinstance(v, str) for v in value):
            raise wrong
        return tuple(value)
    if kind is bool:
        word = str(value).lower()
        if word not in TRUE | FALSE:
            raise wrong
        return word in TRUE
    if kind is str:
        if not isinstance(value, str):
            raise wrong
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise wrong
    try:
        if kind is int:
            return _whole(value)
        number = float(value)
    except ValueError:
        raise wrong from None
    except OverflowError:
        raise ValueError(f"{name}={printable(value):.60}: expected {describe(kind)}, less large") \
            from None
    if not math.isfinite(number):
        raise wrong
    return number


def _whole(value: int | float | str) -> int:
    """7, 7.0, "7" or "7e3" as an int of at most 63 bits. Raises ValueError or OverflowError."""
    try:
        number = int(value) if isinstance(value, (int, str)) else None
    except ValueError:
        number = None
    if number is None:
        number = int(float(value))
        if number != float(value):
            raise ValueError(value)
    if not -2**63 <= number < 2**63:
        raise OverflowError(value)
    return number


def check_fields(config) -> list[str]:
    """The problems of a dataclass instance's values against its own type hints, one line each."""
    problems = []
    for name, kind in get_type_hints(type(config)).items():
        value = getattr(config, name)
        try:
            if coerce(name, value, kind) != value:  # "2", which is no 2 yet
                problems.append(f"{name}={value!r}: expected {describe(kind)}")
        except ValueError as error:
            problems.append(str(error))
    return problems


def check_rules(config) -> None:
    """Raise ValueError with all that config.rules(rule) finds broken, a line each."""
    problems: list[str] = []

    def rule(holds: bool, otherwise: str) -> None:
        if not holds:
            problems.append(otherwise)

    config.rules(rule)
    if problems:
        raise ValueError("\n".join(problems))


# -----------------------------------------------------------------------------
# Reading presets and the command line


def read_config(cls, argv: list[str], positional: str | None = None, usage: str = ""):
    """Build the dataclass `cls` from its defaults, preset files and `--name=value` options.

    positional: None: words without `--` are preset files. A field's name: the first is its value,
                and later ones that end in .py are presets.
    usage:      the text that `--help` prints above the options.
    Returns (config, given): the instance, and the names that a preset or an option has set.
    Raises UserError with every problem found. `--help` prints the options and exits.
    """
    kinds = {n: k for n, k in get_type_hints(cls).items() if n in {f.name for f in fields(cls)}}
    values = {f.name: f.default for f in fields(cls)}
    given: dict[str, str] = {}
    problems: list[str] = []

    def assign(name: str, value: Any, where: str = "") -> None:
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds, 1)
            hint = f"; did you mean {near[0]}?" if near else "; --help lists the options"
            problems.append(f"{where}unknown option {name}{hint}")
            return
        try:
            values[name] = coerce(name, value, kinds[name])
            given[name] = where.removesuffix(": ")
        except ValueError as error:
            problems.append(f"{where}{error}")

    words = list(argv)
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            print(help_text(cls, usage))
            sys.exit(0)
        if not word.startswith("--"):
            if positional is None or (positional in given and word.endswith(".py")):
                for name, value in _run_preset(word, values, problems).items():
                    assign(name, value, f"{word}: ")
            elif positional in given:
                problems.append(f"unexpected argument {word}; options are --name=value")
            else:
                assign(positional, word)
            continue
        name, equals, value = word[2:].partition("=")
        kind = _plain(kinds.get(name, str))
        if get_origin(kind) is tuple:
            value = [value] if equals else []
            while words and not words[0].startswith("--"):
                value.append(words.pop(0))
            value = value or None
        elif not equals:
            following = words[0].lower() if words else "--"
            if kind is bool and following not in TRUE | FALSE | AUTO:
                value = "true"  # a bare switch: --overwrite
            else:
                value = words.pop(0) if words and not following.startswith("--") else None
        if value is None and name in kinds:
            problems.append(f"--{name} needs a value")
        else:
            assign(name, value)
    try:
        config = cls(**values)
    except ValueError as error:
        problems += str(error).splitlines()
    if problems:
        fail(*problems)
    return config, given


def _run_preset(path: str, values: dict, problems: list[str]) -> dict[str, Any]:
    """Run a preset file; return the public names that it assigned (modules, functions and classes
    do not count)."""
    if not os.path.isfile(path):
        folder = os.path.dirname(path) or "config"
        there = sorted(f for f in os.listdir(folder) if f.endswith(".py") and f[0] != "_") if \
            os.path.isdir(folder) else []
        near = difflib.get_close_matches(os.path.basename(path), there, 1)
        hint = f"; did you mean {os.path.join(folder, near[0])}?" if near else ""
        problems.append(f"no preset file {path}{hint}")
        return {}
    try:
        after = runpy.run_path(path, init_globals=dict(values))
        stored = _stored_names(path)
    except (Exception, SystemExit) as error:  # it is the user's code: anything may happen in it
        frames = [f for f in inspect.getinnerframes(error.__traceback__) if f.filename == path]
        line = frames[-1].lineno if frames else getattr(error, "lineno", None)
        where = f"{path}, line {line}" if line else path
        problems.append(f"{where}: {reason(error)}")
        return {}
    ignored = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type)
    return {name: value for name, value in after.items()
            if not name.startswith("_") and not isinstance(value, ignored)
            and (name in stored or name not in values or value is not values[name])}


def _stored_names(path: str) -> set[str]:
    """The names that a preset assigns, also where it repeats the current value."""
    with open(path, encoding="utf-8") as file:
        source = file.read()
    names = {i.argval for i in dis.get_instructions(compile(source, path, "exec"))
             if i.opname == "STORE_NAME"}
    for node in ast.parse(source).body:  # from config.gpt_owt import *
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            names |= vars(sys.modules[node.module]).keys()
    return names


# -----------------------------------------------------------------------------
# --help: the dataclass's own source


def _comments(cls) -> dict[str, str]:
    """Field name -> the comment beside it, or on the lines right above it."""
    source = textwrap.dedent(inspect.getsource(cls))
    lines = source.splitlines()
    comments = {t.start[0]: t.string.lstrip("# ").rstrip()
                for t in tokenize.generate_tokens(io.StringIO(source).readline)
                if t.type == tokenize.COMMENT}
    found = {}
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            text, line = [comments.get(node.end_lineno, "")], node.lineno - 1
            while not text[-1] and line in comments and lines[line - 1].lstrip().startswith("#"):
                text.insert(0, comments[line])
                line -= 1
            found[node.target.id] = " ".join(filter(None, text))
    return found


def help_text(cls, usage: str = "") -> str:
    """The options of `cls` with default, type and comment."""
    comments: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        comments |= _comments(base)
    kinds = get_type_hints(cls)
    rows = [usage.strip(), "", "options (--name=value or --name value):"]
    for field in fields(cls):
        default = "auto" if field.default is None else str(field.default)
        default = default if default.isprintable() else repr(default)  # a newline
        rows.append(f"  --{field.name}={default}   [{describe(kinds[field.name])}]")
        rows += textwrap.wrap(comments[field.name], 92, initial_indent="      ",
                              subsequent_indent="      ")
    return "\n".join(rows).strip()
