"""The 113M baseline of the hourglass pair: a conventional SwiGLU transformer with d_ff = 4 d.
The width and depth are matched as in the paper; steps and rates are our choice.

Data:
    python prepare.py hf --dataset=HuggingFaceFW/fineweb-edu --subset=sample-10BT \
        --name=fineweb_edu_gpt2
Cost:     2.4 G tokens, 2.3e18 FLOP; 1.8 h of one H100 (docs/speed.md).
Expected: not measured; the paper gives no loss table.
"""

dataset = "fineweb_edu_gpt2"
out_dir = "out-swiglu-113m"

n_layer = 12
n_embd = 768
n_head = 12
ffn = "swiglu"
ffn_hidden = 3072
norm = "rmsnorm"
position = "rope"
rope_theta = 500_000.0
qk_norm = True
residual_init_scale = False  # every matrix N(0, 0.02)

# 512 x 1024 = 524,288 tokens per step
block_size = 1024
batch_size = 16
gradient_accumulation_steps = 32

max_iters = 4600
warmup_iters = 100
learning_rate = 6e-4
min_lr = 6e-5

eval_interval = 200
log_interval = 10
