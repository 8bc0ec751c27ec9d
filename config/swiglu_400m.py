"""The 400M baseline of the hourglass pair: a conventional SwiGLU transformer with d_ff = 4 d.
The width and depth are matched as in the paper; steps and rates are our choice.

Data:
    python prepare.py hf --dataset=HuggingFaceFW/fineweb-edu --subset=sample-10BT \
        --name=fineweb_edu_gpt2
Cost:     8.1 G tokens, 2.3e19 FLOP; 17.7 h of one H100 (docs/speed.md).
Expected: not measured; the paper gives no loss table.
"""

from config.swiglu_113m import *

out_dir = "out-swiglu-400m"
n_layer = 24
n_embd = 1024
n_head = 16
ffn_hidden = 4096
max_iters = 15_400
learning_rate = 3e-4
min_lr = 3e-5
