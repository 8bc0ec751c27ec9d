"""Study: hourglass and momentum in one model, with one momentum substep for the whole stack of
sub-MLPs (joint) or one for each.

Data:     as suite.py
Run:      python bench.py compare config/studies/both.py
Cost:     40 runs of 1.0 M tokens.
"""

from config.studies.hourglass import *

study = "both"
out_dir = "out-study-both"
match = "width"
seeds = 8
extended = "three seeds of each were run first, then two more, then three more"
variants = (
    "gd: template=gd",
    "nesterov, joint: template=nesterov",
    "nesterov, each: template=nesterov ffn_substeps=each",
    "tmm, joint: template=tmm",
    "tmm, each: template=tmm ffn_substeps=each",
)
pairs = (
    "tmm, joint - nesterov, joint",
    "nesterov, each - nesterov, joint",
    "tmm, each - tmm, joint",
)
