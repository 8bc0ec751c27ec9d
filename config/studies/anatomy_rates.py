"""Study: the learning rates at which anatomy.py compares its templates: half, preset, double, of
Muon and AdamW together (the scalars' is five times AdamW's).

What is chosen here is not counted there: its seeds are others, and its losses those of the odd ones
of 32 blocks of the validation text, where anatomy.py reports the even ones. Two seeds, fixed before
anything was looked at: of each template the rate with the lowest mean is taken, and nothing else.

Data:     as suite.py
Run:      python bench.py compare config/studies/anatomy_rates.py
Cost:     36 runs of 1.0 M tokens.
"""

from config.studies.suite import *

study = "anatomy_rates"
out_dir = "out-study-anatomy-rates"
seeds = 2
first_seed = 101
half = "choosing"
extended = None
variants = (
    "gd (GPT): template=gd",
    "gd, half: template=gd muon_lr=0.01 learning_rate=1.5e-3",
    "gd, double: template=gd muon_lr=0.04 learning_rate=6e-3",
    "normed: template=normed",
    "normed, half: template=normed muon_lr=0.01 learning_rate=1.5e-3",
    "normed, double: template=normed muon_lr=0.04 learning_rate=6e-3",
    "frozen: template=frozen",
    "frozen, half: template=frozen muon_lr=0.01 learning_rate=1.5e-3",
    "frozen, double: template=frozen muon_lr=0.04 learning_rate=6e-3",
    "polyak: template=polyak",
    "polyak, half: template=polyak muon_lr=0.01 learning_rate=1.5e-3",
    "polyak, double: template=polyak muon_lr=0.04 learning_rate=6e-3",
    "nesterov (YuriiFormer): template=nesterov",
    "nesterov, half: template=nesterov muon_lr=0.01 learning_rate=1.5e-3",
    "nesterov, double: template=nesterov muon_lr=0.04 learning_rate=6e-3",
    "tmm: template=tmm",
    "tmm, half: template=tmm muon_lr=0.01 learning_rate=1.5e-3",
    "tmm, double: template=tmm muon_lr=0.04 learning_rate=6e-3",
)
pairs = ()
