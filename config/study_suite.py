"""Study: the templates and splittings against the GPT, equal width, equal tokens.

Data:     python prepare.py tinystories --tokenizer=bytes --name=tinystories_bytes
Run:      python bench.py compare config/study_suite.py
Cost:     55 runs of 1.0 M tokens.
"""

study = "suite"
seeds = 5
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
x = "tokens"

dataset = "tinystories_bytes"
out_dir = "out-study-suite"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 128  # bytes
batch_size = 32
gradient_accumulation_steps = 1
max_iters = 256
warmup_iters = 10
dtype = "float32"  # so small that bf16's conversions cost more than they save

optimizer = "muon"
muon_lr = 0.02
learning_rate = 3e-3
schedule = "wsd"
decay_fraction = 0.5

eval_interval = 32
eval_tokens = 262_144
log_interval = 8
