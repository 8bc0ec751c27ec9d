"""A model of 51 M parameters that learns TinyStories in half a minute on one H100, where `bench.py
loss` races it against nanoGPT's model of that size (5,000 steps of as many tokens).

Data:     python prepare.py tinystories
Cost:     32.8 M tokens, 1.0e16 FLOP; half a minute of one H100 at 40 % MFU (computed).
Expected: not measured.
"""

dataset = "tinystories"
out_dir = "out-tinystories-fast"

batch_size = 64
gradient_accumulation_steps = 1
block_size = 256

n_layer = 8
n_head = 8
n_embd = 512
position = "rope"
qk_norm = True

optimizer = "muon"
muon_lr = 0.02
learning_rate = 3e-3
schedule = "wsd"
decay_fraction = 0.8
min_lr = 0.0
max_iters = 2000
warmup_iters = 40

eval_interval = 1000
log_interval = 10
