"""nanoGPT's train_gpt2.py: GPT-2 (124M) on OpenWebText with AdamW.

Data:     python prepare.py openwebtext    (nanoGPT's own split)
Cost:     294.9 G tokens, 2.4e20 FLOP; 171 h of one H100 (docs/speed.md);
          nanoGPT took about 4 days on 8 A100 40GB.
Expected: validation loss about 2.85, nanoGPT's figure.
"""

dataset = "openwebtext"
out_dir = "out-gpt2-124m"

# 12 sequences x 40 micro-batches x 1024 tokens = 491,520 tokens per step
batch_size = 12
gradient_accumulation_steps = 40
block_size = 1024

max_iters = 600_000
warmup_iters = 2000
learning_rate = 6e-4
min_lr = 6e-5
weight_decay = 0.1

eval_interval = 1000
log_interval = 10
