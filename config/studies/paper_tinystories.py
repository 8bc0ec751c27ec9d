"""Study: the paper's table on TinyStories (arXiv 2601.23236), with its recipe. `make
reproduce-tinystories` prepares the data and runs it.

Data:     python prepare.py tinystories --val_fraction=0.005
Run:      python bench.py compare config/studies/paper_tinystories.py
Cost:     six runs of 4.9 G tokens, 2.6e19 FLOP; about 21 h of one H100 (docs/speed.md), one
          run on each GPU there is.
Expected: the column "published best"; of GPT, YuriiFormer and TMM a reproduction's common
          evaluation has 1.114, 1.085, 1.081. Not measured here.
"""

from config.gpt_tinystories import *

study = "paper_tinystories"
out_dir = "out-study-paper-tinystories"
seeds = 1
x = "tokens"
variants = (
    "gd (GPT): template=gd",
    "gd, euler: template=gd splitting=euler",
    "polyak: template=polyak",
    "nesterov (YuriiFormer): template=nesterov",
    "tmm: template=tmm",
    "imex(2): template=imex",
)
published = ("gd (GPT): 1.106", "gd, euler: 1.107", "polyak: 1.083",
             "nesterov (YuriiFormer): 1.078", "imex(2): 1.070")
