"""Study: Muon and AdamW for the GPT and the YuriiFormer, in equal wall time.

The paper's warm-up is a tenth of its steps, the short one of a reproduction a 250th: here 49 and 2.

Data:     as suite.py
Run:      python bench.py compare config/studies/optimizer.py    (speeds first: on a quiet machine)
Cost:     40 runs of about 1.0 M tokens.
"""

from config.studies.suite import *

study = "optimizer"
out_dir = "out-study-optimizer"
budget = "seconds"
steps = 40  # of a turn when speeds are measured: with a few, small models pay for taking turns
warmup_iters = 49
x = "seconds"
variants = (
    "GPT, Muon: template=gd",
    "GPT, Muon, decay 0.1: template=gd muon_weight_decay=0.1",
    "GPT, Muon, short warm-up: template=gd warmup_iters=2",
    "GPT, AdamW: template=gd optimizer=adamw",
    "YuriiFormer, Muon: template=nesterov",
    "YuriiFormer, Muon, decay 0.1: template=nesterov muon_weight_decay=0.1",
    "YuriiFormer, Muon, short warm-up: template=nesterov warmup_iters=2",
    "YuriiFormer, AdamW: template=nesterov optimizer=adamw",
)
pairs = (
    "YuriiFormer, Muon, decay 0.1 - GPT, Muon, decay 0.1",
    "YuriiFormer, Muon, decay 0.1 - YuriiFormer, Muon",
    "YuriiFormer, Muon, short warm-up - GPT, Muon, short warm-up",
    "YuriiFormer, Muon, short warm-up - YuriiFormer, Muon",
    "YuriiFormer, AdamW - GPT, AdamW",
    "YuriiFormer, AdamW - YuriiFormer, Muon",
)
