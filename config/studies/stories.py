"""Study: do the findings of suite.py and tables.py hold on another text? TinyStories, bytes.

Data:     python prepare.py tinystories --tokenizer=bytes --name=tinystories_bytes
Run:      python bench.py compare config/studies/stories.py
Cost:     30 runs of 1.0 M tokens, about two minutes each on one CPU core.
"""

from config.studies.suite import *

study = "stories"
out_dir = "out-study-stories"
variants = (
    "gd (GPT): template=gd",
    "tables: template=gd velocity_init=add",
    "dynamics: template=nesterov velocity_init=zero",
    "polyak: template=polyak",
    "nesterov (YuriiFormer): template=nesterov",
    "tmm: template=tmm",
)
pairs = ("polyak - nesterov (YuriiFormer)",)
extended = None

dataset = "tinystories_bytes"
eval_tokens = 100_000
