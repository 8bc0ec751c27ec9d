"""What bench.py offers beyond measuring our model: compare and findings (studies), judge (eval),
exchange (export, convert), watch (plot), race (taking turns, and nanoGPT beside us), gpu (all that
a GPU can show). Here is what they share."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from config import check_least, check_rules
from support.data import Tokens, evaluation_starts
from support.meta import load_meta


@dataclass
class ToolConfig:
    """Options of a tool that trains nothing."""

    def __post_init__(self) -> None:
        check_rules(self)

    def rules(self, rule: Callable[[bool, str], None]) -> None:
        check_least(self, rule, 1, "repeats", "jobs", "limit", "eval_tokens", "batch_size")


def validation_rows(folder: str, block_size: int, eval_tokens: int) -> torch.Tensor:
    """The windows of train.py's evaluation, as raw ids (N, T + 1)."""
    tokens = Tokens(folder, "val", load_meta(folder), block_size)
    return tokens.read(evaluation_starts(len(tokens), block_size, eval_tokens))
