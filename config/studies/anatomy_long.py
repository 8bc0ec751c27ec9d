"""Study: do the findings of anatomy.py hold with four times the steps? Four epochs, a warm-up of
the same share of them, the rates of anatomy.py. Three seeds and the margin, 0.012, were fixed
before anything was looked at.

Data:     as suite.py
Run:      python bench.py compare config/studies/anatomy_long.py
Cost:     12 runs of 4.0 M tokens.
"""

from config.studies.anatomy import *
from config.studies.anatomy import _frozen, _gd, _nesterov, _normed

study = "anatomy_long"
out_dir = "out-study-anatomy-long"
seeds = 3
variants = (
    f"gd (GPT): template=gd {_gd}",
    f"normed: template=normed {_normed}",
    f"frozen: template=frozen {_frozen}",
    f"nesterov (YuriiFormer): template=nesterov {_nesterov}",
)
pairs = (
    "frozen - nesterov (YuriiFormer)",
    "frozen - normed",
)

max_iters = 1960  # four epochs
warmup_iters = 80
eval_interval = 392
