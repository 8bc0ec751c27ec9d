"""A small character-level model that learns Shakespeare in seconds on two CPU cores.

Data:     python prepare.py shakespeare_char
Cost:     0.35 M tokens, 8.6e11 FLOP: seconds.
Expected: 1.854 nats per character on a part of the validation text, 1.869 on all of it, where
          nanoGPT's documented CPU recipe (0.8 M parameters, 1.5 M tokens) ends at 1.898.
"""

dataset = "shakespeare_char"
out_dir = "out-shakespeare-char-fast"
dtype = "float32"  # so small that bf16's conversions cost more than they save

batch_size = 64
gradient_accumulation_steps = 1
block_size = 32  # characters

n_layer = 2
n_head = 4
n_embd = 128
position = "rope"
qk_norm = True
residual_init_scale = False  # so few steps

optimizer = "muon"
muon_lr = 0.03
learning_rate = 4e-2
beta2 = 0.99  # few tokens per step
weight_decay = 0.0
schedule = "wsd"
decay_fraction = 0.8
min_lr = 0.0
max_iters = 170
warmup_iters = 10

eval_interval = 170
eval_tokens = 16_384
log_interval = 10
