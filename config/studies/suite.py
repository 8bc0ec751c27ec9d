"""Study: the templates and splittings against the GPT, equal width, equal tokens.

The other studies share its recipe: 0.8 M parameters, one pass over the characters of Shakespeare.

Data:     python prepare.py shakespeare_char
Run:      python bench.py compare config/studies/suite.py
Cost:     55 runs of 1.0 M tokens, about two minutes each on one CPU core.
"""

study = "suite"
seeds = 5
extended = "three seeds of each were run first, then two more"
variants = (
    "gd (GPT): template=gd",
    "gd, euler: template=gd splitting=euler",
    "gd, strang: template=gd splitting=strang",
    "polyak: template=polyak",
    "nesterov (YuriiFormer): template=nesterov",
    "nesterov, euler: template=nesterov splitting=euler",
    "nesterov, strang: template=nesterov splitting=strang",
    "tmm: template=tmm",
    "imex(2): template=imex imex_steps=2",
    "symplectic: template=symplectic",
    "adam: template=adam",
)
pairs = (
    "nesterov (YuriiFormer) - gd, euler",
    "nesterov, euler - gd, euler",
    "nesterov, euler - nesterov (YuriiFormer)",
    "nesterov, strang - nesterov (YuriiFormer)",
    "adam - nesterov (YuriiFormer)",
)
x = "tokens"

dataset = "shakespeare_char"
out_dir = "out-study-suite"
dtype = "float32"  # so small that bf16's conversions cost more than they save

n_layer = 4
n_head = 4
n_embd = 128
block_size = 128  # characters
batch_size = 16
gradient_accumulation_steps = 1
max_iters = 490  # one epoch
warmup_iters = 20

optimizer = "muon"
muon_lr = 0.02
learning_rate = 3e-3
schedule = "wsd"
decay_fraction = 0.5

eval_interval = 98
eval_tokens = 1_000_000  # the whole validation split
log_interval = 10
