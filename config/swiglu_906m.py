"""The 906M baseline of the hourglass pair: a conventional SwiGLU transformer with d_ff = 4 d.
Recipe of arXiv 2602.06471's released configuration; its OLMo-2 tokenizer and data mix are not
public as bins, so cl100k_base (the same padded size) and a FineWeb-Edu sample stand in.

Data:
    python prepare.py hf --dataset=HuggingFaceFW/fineweb-edu --subset=sample-100BT \
        --tokenizer=cl100k_base --name=fineweb_edu_cl100k
Cost:     18.0 G tokens, 1.3e+20 FLOP; about 92 h of one H100 at 40 % MFU (computed).
Upstream: what ran there probably had a weight decay of 0.033, which the schedule of its framework's
          recipe (Megatron-Bridge) puts over the configuration's 0.1, and Adam's eps 1e-5:
          --weight_decay=0.033 --adam_eps=1e-5. Not reproduced: QK gains that decay (by 6 % in all
          at 0.1, by 2 % at 0.033), fp8, Llama 3's scaling of RoPE's frequencies.
Expected: not measured; the paper gives no loss table.
"""

dataset = "fineweb_edu_cl100k"
out_dir = "out-swiglu-906m"

n_layer = 24
n_embd = 1536
n_head = 16
ffn = "swiglu"
ffn_hidden = 6144
norm = "rmsnorm"
position = "rope"
rope_theta = 500_000.0
qk_norm = True
residual_init_scale = False  # every matrix N(0, 0.02)

# 1024 x 4096 = 4,194,304 tokens per step
block_size = 4096
batch_size = 4
gradient_accumulation_steps = 256

max_iters = 4297
warmup_iters = 25
learning_rate = 2.5e-4
min_lr = 6e-5

eval_interval = 200
log_interval = 10
