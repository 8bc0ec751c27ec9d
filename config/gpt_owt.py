"""GPT-2 small on OpenWebText with the paper's recipe: the baseline of arXiv 2601.23236.

Data:     python prepare.py openwebtext --val_fraction=0.05    (the paper's share, by our hash)
Cost:     14.7 G tokens, 1.2e19 FLOP; 8.8 h of one H100 (docs/speed.md).
Expected: best validation loss 2.990 in the paper, 2.980 in a reproduction.
"""

dataset = "openwebtext"
out_dir = "out-gpt-owt"

# 30 sequences x 16 micro-batches x 1024 tokens = 491,520 tokens per step
batch_size = 30
gradient_accumulation_steps = 16
block_size = 1024

max_iters = 30_000
warmup_iters = 3000
min_lr = 6e-5

optimizer = "muon"  # the blocks' matrices; AdamW for tables and norms
muon_lr = 0.004
learning_rate = 6e-4

eval_interval = 100
save_interval = 1000
log_interval = 10
