"""The options of bench.py."""

from dataclasses import dataclass
from typing import Literal

from train import TrainConfig


@dataclass
class BenchConfig(TrainConfig):
    """Every option of bench.py: train.py's, and these."""

    # the first word
    command: Literal["speed", "decode", "memory", "fit", "data", "muon", "loss", "prepare",
                     "start", "eval", "all", "compare", "plot", "export", "convert"] | None = None
    # the options of each variant, as one word: "template=gd", or named: "GPT: template=gd"
    variants: tuple[str, ...] = ("",)
    nanogpt: str | None = None  # folder of nanoGPT's code: its model is one more variant
    repeats: int = 5  # measurements of each variant
    steps: int = 5  # speed: optimiser steps in each measurement
    num_samples: int = 1  # decode: sequences at once
    max_new_tokens: int = 256  # decode: tokens for each
    input: str | None = None  # prepare: a text file of documents, with <|endoftext|> between them
    ckpt: str | None = None  # eval, export, convert: a run's or exported folder, a .pt file, gpt2*
    tasks: str | None = None  # eval: names of lm-evaluation-harness, with commas between them
    num_fewshot: str | None = None  # eval: examples in the prompt, one number or one for each task
    include_path: str | None = None  # eval: a folder with task files (YAML) of your own
    limit: int | None = None  # eval: only the first items of each task
    # eval: perplexity of this folder in data_dir, or of a UTF-8 text file; plot: a folder for path
    data: str | None = None
    json: str | None = None  # a file to write the figures to
    plot: str | None = None  # a PNG to draw them in; auto, for plot: losses.png, ...
    runs: tuple[str, ...] = ()  # plot: the out_dirs to draw together
    draw: Literal["losses", "scalars", "path"] = "losses"  # plot: what to draw of them
    x: Literal["steps", "tokens", "seconds", "flops"] = "steps"  # plot: what losses are drawn over
    format: Literal["hf", "safetensors"] = "hf"  # export: for transformers, or for us, any model
    out: str | None = None  # export: the folder to write; convert: the .pt file
    study: str | None = None  # compare: its name
    seeds: int = 3  # compare: runs of each variant, with seeds 1, 2, 3
    match: Literal["width", "parameters", "matrices", "flops"] = "width"  # compare: to the first
    solve: Literal["n_embd", "n_layer", "ffn_hidden"] = "n_embd"  # compare: what match changes
    # compare: what all spend as much of as the first one in its max_iters
    budget: Literal["tokens", "flops", "seconds"] = "tokens"
    only: tuple[str, ...] = ()  # compare: run only these variants
    jobs: int | None = None  # compare: runs at once; auto: one for each GPU, or one
    dry_run: bool = False  # compare: print the plan and stop
    results: str = "docs/results"  # compare: the folder of the STUDY folders
    published: tuple[str, ...] = ()  # compare: "variant: loss", to print beside ours
    raw_init: float = -20.0  # convert: raw mu and beta; -10 learns faster, from less exact logits

    @property
    def judged_by(self) -> str:
        """What the scores of its tasks depend on."""
        return f"{self.tasks} {self.num_fewshot} {self.limit}"

    def _rules(self) -> list[tuple[bool, str, str, str]]:
        counts = ("repeats", "steps", "num_samples", "max_new_tokens", "limit", "seeds",
                  "jobs")
        one = [(n, v) for n in counts if (v := getattr(self, n)) is not None]
        return super()._rules() + [
            (v < 1, f"{n}={v}", "must be at least 1", "choose more") for n, v in one] + [
            (self.plot is not None and not self.plot.endswith(".png"), f"plot={self.plot}",
             "a picture is a PNG", "end the name in .png")]
