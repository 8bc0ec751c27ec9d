"""The one option reader: a dataclass, then preset files and the command line; the later wins.

    python train.py config/yurii_owt.py --batch_size=8 --device cpu

Every option is a dataclass field, and the comment beside it is its `--help` line. A preset is a
Python file of assignments, run with the current values as its globals, so that it may compute
(`min_lr = learning_rate / 10`). Presets are code, like train.py: run your own.
"""

import ast
import contextlib
import difflib
import glob
import inspect
import math
import os
import textwrap
import traceback
from collections.abc import Callable, Iterable
from dataclasses import fields
from decimal import Decimal
from typing import Any, Literal, get_args, get_origin, get_type_hints

from support.errors import fail, printable, reason

TYPES = {int: "integer", float: "number", bool: "true or false", str: "string",
         tuple[str, ...]: "one or more strings"}
TRUE, FALSE, AUTO = {"true", "1", "yes"}, {"false", "0", "no"}, {"none", "auto"}
MODELS = {"yurii": "nesterov", "yuriiformer": "nesterov", "gpt": "gd"}  # by their templates


def option_types(cls) -> dict[str, Any]:
    """Option name -> type: for those in `cls.choices()` a Literal of the keys of their table."""
    tables = getattr(cls, "choices", dict)()
    kinds = get_type_hints(cls) | {name: Literal[tuple(tables[name])] for name in tables}
    return {field.name: kinds[field.name] for field in fields(cls)}


def without_auto(kind):
    """The type of an option that is not auto: int for `int | None`."""
    return get_args(kind)[0] if type(None) in get_args(kind) else kind


def describe(kind) -> str:
    """How `--help` and the messages name a type."""
    plain = without_auto(kind)
    name = TYPES.get(plain) or " | ".join(map(str, get_args(plain)))
    return name if plain is kind else f"{name} or auto"


def nearest(name: str, names: Iterable[str], folder: str = "") -> str:
    """The end of a message about a wrong name."""
    near = difflib.get_close_matches(name, names, 1)
    return f"; did you mean {os.path.join(folder, near[0])}?" if near else ""


def coerce(name: str, value: Any, kind) -> Any:
    """`value` (a word or a Python object) as `kind`. Raises ValueError naming value and rule."""
    text, plain = printable(value), without_auto(kind)
    wrong = f"{name}={text:.60}: expected {describe(kind)}"
    words = [value] if isinstance(value, str) else value
    if isinstance(words, (list, tuple)) and "" in words:
        raise ValueError(f"{wrong}, not an empty word")
    if plain is not kind and text.lower() in AUTO:
        return None
    if plain is bool and text.lower() in TRUE | FALSE:
        return text.lower() in TRUE
    if plain is str and isinstance(value, str):
        return value if name in ("start", "stop") else os.path.expanduser(value)  # a path: ~/x
    for choice in get_args(plain):
        if text == str(choice):
            return choice
    if get_origin(plain) is tuple and isinstance(words, (list, tuple)):
        if all(isinstance(word, str) for word in words):
            return tuple(map(os.path.expanduser, words))
    wrong += nearest(MODELS.get(text.lower(), text), map(str, get_args(plain)))  # of a Literal's
    with contextlib.suppress(ValueError, ArithmeticError):  # float's and Decimal's, of no number
        if plain is float and math.isfinite(float(text)):
            return float(text)
        if plain is int and Decimal(text).to_integral_value() == Decimal(text):  # 7e3 is whole
            if -2**63 <= Decimal(text) < 2**63:
                return int(Decimal(text))
            wrong += ", less large"
    raise ValueError(wrong)


def check_rules(config) -> None:
    """For a `__post_init__`: `config.rules(rule)` calls rule(holds, otherwise) for each of its
    rules. Raises one ValueError, with the line `otherwise` of every rule that does not hold."""
    broken: list[str] = []
    config.rules(lambda holds, otherwise: holds or broken.append(otherwise))
    if broken:
        raise ValueError("\n".join(broken))


def check_least(config, rule: Callable[[bool, str], None], least: int, *names: str) -> None:
    """The rule of options that are at least so large, or auto."""
    for name in names:
        value = getattr(config, name, None)
        rule(value is None or value >= least, f"{name}={value}: must be at least {least}")


def read_config(cls, argv: list[str], positional: str | None = None, usage: str = ""):
    """The dataclass `cls` from its defaults, presets and options. UserError has every problem.

    Words without `--` are presets; or, if `positional` names an option, its value, of which there
    is one, or as many as it takes. `--help` prints `usage` and the options, with the values so far.
    Returns (config, given): given[name] is the path of the preset that set an option, or "" where
    the command line did; the last of them counts.
    """
    kinds = option_types(cls)
    values = {field.name: field.default for field in fields(cls)}
    given: dict[str, str] = {}
    problems: list[str] = []

    def assign(name: str, value: Any, preset: str = "") -> None:
        try:
            if name not in kinds:
                other = "begin a name of your own with _" if preset else "--help lists the options"
                hint = nearest(name, kinds) or f"; {other}"
                raise ValueError(f"unknown option {name}{hint}")
            if value is None and not preset:
                raise ValueError(f"--{name} needs a value")
            shown = printable(values[name])
            if preset or value not in (shown, [shown]):  # else it stays: --help may print \n for it
                value = coerce(name, value, kinds[name])
                more = isinstance(value, tuple) and given.get(name) == preset == ""  # --in=a --in=b
                values[name] = values[name] + value if more else value
            given[name] = preset
        except ValueError as error:
            problems.append(f"{preset}: {error}" if preset else str(error))

    words = list(argv)
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            print(help_text(cls, values, usage))
            raise SystemExit(0)
        if word.startswith("--"):
            name, equals, text = word[2:].partition("=")
            assign(name, take_value(kinds.get(name, str), [text] if equals else [], words))
        elif positional is None:
            try:
                for name, value in run_preset(word, values).items():
                    assign(name, value, preset=word)
            except ValueError as error:
                problems.append(str(error))
        elif positional not in given or get_origin(kinds[positional]) is tuple:
            assign(positional, word)
        else:
            problems.append(f"unexpected argument {word}; a file is --input={word}")
    try:
        config = cls(**values)
    except ValueError as error:
        problems += str(error).splitlines()
    if problems:
        fail(*problems)
    return config, given


def take_value(kind, value: list[str], words: list[str]) -> str | list[str] | None:
    """The value of an option, taken off `words` unless it stood behind a "="; None: it has none."""
    kind, following = without_auto(kind), words[0] if words else "--"
    if get_origin(kind) is tuple:
        while words and not words[0].startswith("--"):
            value.append(words.pop(0))
        return value or None
    if value:
        return value[0]
    if kind is bool and following.lower() not in TRUE | FALSE | AUTO:
        return "true"  # a bare switch: --overwrite
    return None if following.startswith("--") else words.pop(0)


def run_preset(path: str, values: dict[str, Any]) -> dict[str, Any]:
    """The options that a preset file assigns. Raises ValueError of one line."""
    class Names(dict):  # its globals: what it assigns, and to read, the current values
        def __missing__(self, name: str) -> Any:
            return values[name]

    if not os.path.isfile(path):
        folder, name = os.path.split(path)
        hint = nearest(name, glob.glob("[!_]*.py", root_dir=folder or "config"), folder or "config")
        if not hint and not name.endswith(".py"):
            hint = "; an option is --name=value, with quotation marks around several words"
        raise ValueError(f"no preset file {path}{hint}")
    names = Names(__file__=path)
    try:
        with open(path, "rb") as file:
            tree = ast.parse(file.read(), path)
        idle = next((node.lineno for node in tree.body if assigns_nothing(node)), None)
        if idle is None:
            exec(compile(tree, path, "exec"), names)
    except (Exception, SystemExit) as error:  # it is the user's code: anything may happen in it
        lines = [getattr(error, "lineno", None) or 1]  # of a SyntaxError
        lines += [line for frame, line in traceback.walk_tb(error.__traceback__)
                  if frame.f_code.co_filename == path]
        raise ValueError(f"{path}, line {lines[-1]}: {reason(error)}") from None
    if idle is not None:
        raise ValueError(f"{path}, line {idle}: assigns nothing; an option is name = value")
    if "study" in names and "study" not in values:
        raise ValueError(f"{path} is a study: python bench.py compare {path}")
    return {name: value for name, value in names.items() if not name.startswith("_")
            and not callable(value) and not inspect.ismodule(value)}


def assigns_nothing(node: ast.stmt) -> bool:
    """YAML's `width: 7`, JSON, or == for =, which Python takes without a word."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, (ast.Dict, ast.List, ast.Compare))
    return isinstance(node, ast.AnnAssign) and node.value is None


def help_text(cls, values: dict[str, Any], usage: str) -> str:
    """The options with these values, their types, and the comments beside or right above them."""
    comments = {}
    for base in reversed(cls.__mro__[:-1]):
        lines = inspect.getsource(base).splitlines()
        for node in ast.parse("\n".join(lines)).body[0].body:
            if isinstance(node, ast.AnnAssign):
                beside, first = lines[node.end_lineno - 1][node.end_col_offset:], node.lineno - 1
                while "#" not in beside and lines[first - 1].lstrip().startswith("#"):
                    first -= 1
                parts = [*lines[first:node.lineno - 1], beside]
                comments[node.target.id] = " ".join(part.strip(" #") for part in parts)
    rows = [(usage or "").strip(), "", "options (--name=value or --name value):"]
    for name, kind in option_types(cls).items():
        value = "auto" if values[name] is None else printable(values[name])
        rows.append(f"  --{name}={value}   [{describe(kind)}]")
        rows.append(textwrap.indent(textwrap.fill(comments[name], 86), " " * 6))
    return "\n".join(rows).strip()
