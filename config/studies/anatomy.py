"""Study: what the YuriiFormer's gain is made of. Each variant leaves out a part of it, or has that
part alone.

gain and normed scale or normalise an oracle's answer and have no velocity; frozen has the second
table and the norm, but the velocity never changes; skip and x0 add a second stream without
dynamics; post-norm is OLMo-2's x + N(g(x)); embed_scale starts x as large as N_v makes a velocity,
at RMS 1 (two learned tables of N(0, 0.02) add up to sqrt(2) 0.02, so 1 / (sqrt(2) 0.02) = 35.36;
with rope it would be 50).

Fixed before anything was looked at: five seeds, ten for what decides (frozen against nesterov and
polyak, normed against gd); equal is what differs by less than 0.012, a fifth of what parts both
from the GPT. Six variants run at the rates that anatomy_rates.py chose on the other half of the
validation text, the others at the preset's.

Data:     as suite.py
Run:      python bench.py compare config/studies/anatomy.py
Cost:     110 runs of 1.0 M tokens, about two minutes each on one CPU core.
"""

from config.studies.suite import *

study = "anatomy"
out_dir = "out-study-anatomy"
half = "reporting"
margin = 0.012
extended = None
# the words of each rate: "" is the preset's, which anatomy_rates.py has chosen for all six
_gd = _normed = _frozen = _polyak = _nesterov = _tmm = ""
_matched = "match=parameters solve=ffn_hidden"
variants = (
    f"gd (GPT): template=gd seeds=10 {_gd}",
    "gain: template=gain",
    f"normed: template=normed seeds=10 {_normed}",
    f"frozen: template=frozen seeds=10 {_frozen}",
    "skip: template=skip",
    "x0: template=x0",
    "post-norm: template=gd norm_place=post",
    "embed_scale: template=gd embed_scale=35.36",
    f"polyak: template=polyak seeds=10 {_polyak}",
    f"nesterov (YuriiFormer): template=nesterov seeds=10 {_nesterov}",
    f"tmm: template=tmm {_tmm}",
    "nesterov, no tables: template=nesterov velocity_init=zero",
    "nesterov, no norm: template=nesterov velocity_norm=none",
    f"frozen, matched: template=frozen seeds=10 {_matched} {_frozen}",
    f"nesterov, matched: template=nesterov seeds=10 {_matched} {_nesterov}",
)
pairs = (
    "frozen - nesterov (YuriiFormer)",
    "frozen - polyak",
    "frozen, matched - nesterov, matched",
    "frozen - normed",
    "nesterov, no tables - normed",
    "x0 - skip",
)
