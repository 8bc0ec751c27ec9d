"""A small YuriiFormer on the documentation inside every Python, byte by byte: `make demo`.

Data:     python prepare.py pydoc
Cost:     1.6 M tokens, 9e12 FLOP; a minute or two on two CPU cores.
Expected: 1.33 nats per byte (one seed, 2026-11-27); it repeats a small text about four times.
"""

dataset = "pydoc"
out_dir = "out-pydoc-demo"

template = "nesterov"
n_layer = 4
n_head = 4
n_embd = 128

block_size = 256  # bytes
batch_size = 16
gradient_accumulation_steps = 1
max_iters = 400
warmup_iters = 20

optimizer = "muon"
muon_lr = 0.02
learning_rate = 3e-3
schedule = "wsd"

eval_interval = 50
eval_tokens = 32_768
log_interval = 10
