"""Study: the paper's OpenWebText table (arXiv 2601.23236; TMM: 2605.24425), small models. `make
reproduce-owt` prepares the data and runs it; `python bench.py eval --ckpt=FOLDER
--tasks=hellaswag,arc_easy --num_fewshot=10,25` then judges a run.

Data:     python prepare.py openwebtext --val_fraction=0.05
Run:      python bench.py compare config/studies/paper_owt.py
Cost:     three runs of 14.7 G tokens, 3.5e19 FLOP; about 28 h of one H100 (docs/speed.md),
          one run on each GPU there is.
Expected: the column "published best" (TMM's is a reproduction's). acc_norm of that reproduction,
          GPT / YuriiFormer / TMM: HellaSwag 30.2 / 31.6 / 31.8, ARC-Easy 41.7 / 43.1 / 43.4. Not
          measured here.
"""

from config.gpt_owt import *

study = "paper_owt"
out_dir = "out-study-paper-owt"
seeds = 1
x = "tokens"
variants = (
    "gd (GPT): template=gd",
    "nesterov (YuriiFormer): template=nesterov",
    "tmm: template=tmm",
)
published = ("gd (GPT): 2.990", "nesterov (YuriiFormer): 2.920", "tmm: 2.908")
