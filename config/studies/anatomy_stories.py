"""Study: do the findings of anatomy.py hold on another text? TinyStories, bytes, at the rates that
were chosen on Shakespeare. Five seeds and the margin, 0.012, were fixed before anything was looked
at.

Data:     as stories.py
Run:      python bench.py compare config/studies/anatomy_stories.py
Cost:     30 runs of 1.0 M tokens.
"""

from config.studies.anatomy import *
from config.studies.anatomy import _frozen, _gd, _nesterov, _normed, _polyak

study = "anatomy_stories"
out_dir = "out-study-anatomy-stories"
half = "both"  # nothing was chosen on this text
variants = (
    f"gd (GPT): template=gd {_gd}",
    f"normed: template=normed {_normed}",
    f"frozen: template=frozen {_frozen}",
    "x0: template=x0",
    f"polyak: template=polyak {_polyak}",
    f"nesterov (YuriiFormer): template=nesterov {_nesterov}",
)
pairs = (
    "frozen - nesterov (YuriiFormer)",
    "frozen - polyak",
    "frozen - normed",
)

dataset = "tinystories_bytes"
eval_tokens = 100_000
