"""Study: the 2 x 2 of velocity tables and momentum dynamics, and two GPTs of as many parameters.

Tables without dynamics: the second embedding is added to the first. The YuriiFormer comes first:
the differences say what is lost when a part of it is left out.

Data:     as suite.py
Run:      python bench.py compare config/studies/tables.py
Cost:     30 runs of 1.0 M tokens.
"""

from config.studies.suite import *

study = "tables"
out_dir = "out-study-tables"
variants = (
    "tables and dynamics: template=nesterov",
    "dynamics: template=nesterov velocity_init=zero",
    "tables: template=gd velocity_init=add",
    "neither (GPT): template=gd",
    "GPT, wider: template=gd match=parameters",
    "GPT, deeper: template=gd n_layer=6 match=parameters",
)
pairs = (
    "neither (GPT) - tables",
    "neither (GPT) - dynamics",
    "GPT, wider - neither (GPT)",
    "GPT, deeper - neither (GPT)",
)
