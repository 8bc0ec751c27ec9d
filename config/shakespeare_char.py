"""nanoGPT's train_shakespeare_char.py: a character-level GPT with dropout.

Data:     python prepare.py shakespeare_char
Cost:     82 M tokens, 5.5e15 FLOP; nanoGPT took about 3 minutes on one A100.
Expected: best validation loss about 1.47, nanoGPT's figure (nanoGPT draws windows at random).
"""

dataset = "shakespeare_char"
out_dir = "out-shakespeare-char"
always_save_checkpoint = False  # it overfits: sample from best.pt

batch_size = 64
gradient_accumulation_steps = 1
block_size = 256  # characters

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3
min_lr = 1e-4
beta2 = 0.99  # few tokens per step
max_iters = 5000
warmup_iters = 100

eval_interval = 250
log_interval = 10
