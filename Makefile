# make demo   prepare a text that every Python ships, train a small YuriiFormer, sample, draw
# make test   the whole test suite
# make torture   the tests that take minutes: runs killed at random moments, and the like
# make gpu    what only a GPU can show: tests, and the figures of docs/speed.md. It installs nothing,
#             and needs torch, numpy and pytest: make gpu PYTHON=python3 NANOGPT=../nanoGPT
# make reproduce-tinystories, make reproduce-owt   the papers' tables, from download to table: days
# All make .venv with the pinned requirements first. PYTHON=python3.12 make demo picks the Python.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test torture gpu reproduce-tinystories reproduce-owt clean

demo: .venv/demo
	$(BIN)/python prepare.py pydoc
	$(BIN)/python train.py config/pydoc_demo.py --overwrite
	$(BIN)/python sample.py --out_dir=out-pydoc-demo --start="The " --num_samples=1 --max_new_tokens=400
	@echo "The loss curve: out-pydoc-demo/loss.png"

test: .venv/test
	$(BIN)/python -m pytest -n logical --maxprocesses=8 --dist loadfile

torture: .venv/test
	$(BIN)/python -m pytest -m torture -s

gpu:
	$(PYTHON) bench.py gpu $(if $(NANOGPT),--nanogpt=$(NANOGPT)) $(GPU)

# PREPARE="--input=stories.txt" and COMPARE="--seeds=3 --max_iters=100" add options of the programs
reproduce-tinystories: .venv/test
	$(BIN)/python prepare.py tinystories --val_fraction=0.005 $(PREPARE)
	$(BIN)/python bench.py compare config/studies/paper_tinystories.py $(COMPARE)

reproduce-owt: .venv/test
	$(BIN)/python prepare.py openwebtext --val_fraction=0.05 $(PREPARE)
	$(BIN)/python bench.py compare config/studies/paper_owt.py $(COMPARE)

.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "error: $(PYTHON) is older than 3.10 or not here: make PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: $(PYTHON) has no venv; on Debian and Ubuntu: apt install python3-venv"; exit 2; }
	$(PYTHON) -m venv .venv

.venv/demo: requirements.txt | .venv/bin/pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/test: tests/requirements.txt requirements.txt | .venv/bin/pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	@touch $@ .venv/demo

clean:
	rm -rf .venv
