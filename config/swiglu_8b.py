"""The 8B baseline of the hourglass pair: a conventional SwiGLU transformer with d_ff = 14336.
Recipe of arXiv 2602.06471; its OLMo-2 tokenizer and data mix are not public as bins, so
cl100k_base (the same padded size) and a FineWeb-Edu sample stand in.

Data:
    python prepare.py hf --dataset=HuggingFaceFW/fineweb-edu --subset=sample-100BT \
        --tokenizer=cl100k_base --name=fineweb_edu_cl100k
Cost:     100.0 G tokens, 5.2e+21 FLOP; about 153 days of one H100 at 40 % MFU (computed).
Expected: not measured; the paper gives no loss table.
"""

dataset = "fineweb_edu_cl100k"
out_dir = "out-swiglu-8b"

n_layer = 32
n_embd = 4096
n_head = 32
ffn = "swiglu"
ffn_hidden = 14_336
norm = "rmsnorm"
position = "rope"
rope_theta = 500_000.0
qk_norm = True
residual_init_scale = False  # every matrix N(0, 0.02)

# 1024 x 4096 = 4,194,304 tokens per step
block_size = 4096
batch_size = 4
gradient_accumulation_steps = 256

max_iters = 23_842
warmup_iters = 100
learning_rate = 1.2e-4
min_lr = 6e-5

eval_interval = 200
log_interval = 10
