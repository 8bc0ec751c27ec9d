"""Study: what the velocity norm wraps, look-ahead, and the range of mu and beta.

Without the norm, mu and beta beyond 1 (softplus) should give what triple momentum gives: the two
are then the same family (docs/lesson.ipynb).

Data:     as suite.py
Run:      python bench.py compare config/studies/velocity.py
Cost:     40 runs of 1.0 M tokens.
"""

from config.studies.suite import *

study = "velocity"
out_dir = "out-study-velocity"
variants = (
    "nesterov, update (published): template=nesterov",
    "nesterov, read: template=nesterov velocity_norm=read",
    "nesterov, none: template=nesterov velocity_norm=none",
    "polyak (no look-ahead): template=polyak",
    "polyak, none: template=polyak velocity_norm=none",
    "nesterov, softplus: template=nesterov scalar_map=softplus",
    "tmm: template=tmm",
    "tmm, softplus: template=tmm scalar_map=softplus",
)
pairs = (
    "polyak, none - nesterov, none",
    "polyak, none - polyak (no look-ahead)",
)
