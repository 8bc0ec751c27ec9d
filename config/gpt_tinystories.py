"""GPT-2 small on TinyStories with the paper's recipe: the baseline of arXiv 2601.23236.

Data:     python prepare.py tinystories --val_fraction=0.005    (the paper's share, by our hash)
Cost:     4.9 G tokens, 3.9e18 FLOP; 2.9 h of one H100 (docs/speed.md).
Expected: best validation loss 1.106 in the paper, on its own 0.5 % split of train.
"""

dataset = "tinystories"
out_dir = "out-gpt-tinystories"

# 30 sequences x 16 micro-batches x 1024 tokens = 491,520 tokens per step
batch_size = 30
gradient_accumulation_steps = 16
block_size = 1024

max_iters = 10_000
warmup_iters = 1000
min_lr = 6e-5

optimizer = "muon"  # the blocks' matrices; AdamW for tables and norms
muon_lr = 0.02
learning_rate = 6e-4

eval_interval = 100
save_interval = 1000
log_interval = 10
