"""The 3B baseline of the hourglass pair: a conventional SwiGLU transformer with d_ff = 8192.
Recipe of arXiv 2602.06471's released configuration; its OLMo-2 tokenizer and data mix are not
public as bins, so cl100k_base (the same padded size) and a FineWeb-Edu sample stand in.

Data:
    python prepare.py hf --dataset=HuggingFaceFW/fineweb-edu --subset=sample-100BT \
        --tokenizer=cl100k_base --name=fineweb_edu_cl100k
Cost:     60.0 G tokens, 1.4e+21 FLOP; about 40 days of one H100 at 40 % MFU (computed).
Memory:   57 GB of parameters, gradients and AdamW state, divided over the processes (computed; not
          run here), before activations; 14 GB of host memory for each process while it starts.
          torchrun --standalone --nproc_per_node=8 train.py config/swiglu_3b.py
Upstream: as swiglu_906m's; QK gains would decay by 15 % at 0.1, by 5 % at 0.033.
Expected: not measured; the paper gives no loss table.
"""

from config.swiglu_906m import *

out_dir = "out-swiglu-3b"
n_layer = 28
n_embd = 3072
n_head = 24
ffn_hidden = 8192
max_iters = 14_305
warmup_iters = 100
learning_rate = 1.6e-4

parallel = "fsdp"
activation_checkpointing = True

# 1024 x 4096 tokens per step
batch_size = 1
gradient_accumulation_steps = 1024
