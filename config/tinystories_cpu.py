"""Readable stories from a small YuriiFormer in about ten minutes on two CPU cores, byte by byte.

Data:     python prepare.py tinystories --tokenizer=bytes --name=tinystories_bytes
Cost:     9.0 M tokens, 1.1e14 FLOP; 13 minutes on two CPU cores with other work beside it.
Expected: 0.78 nats per byte on a sample of 12,756 stories (one seed, 2026-11-27; see the README).
"""

dataset = "tinystories_bytes"
out_dir = "out-tinystories-cpu"

template = "nesterov"
n_layer = 4
n_head = 3
n_embd = 192

block_size = 256  # bytes
batch_size = 16
gradient_accumulation_steps = 1
max_iters = 2200
warmup_iters = 20

optimizer = "muon"
muon_lr = 0.02
learning_rate = 3e-3
schedule = "wsd"

eval_interval = 200
eval_tokens = 131_072
log_interval = 10
