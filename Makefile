# Every target sets the machine up first (launch/setup.sh; nothing to do after the first time).
# Huge pages for glibc's malloc: XLA takes its buffers anew at every step, and on a CPU this leaves a hundredth of the
# page faults. Elsewhere the variable means nothing.
PY := GLIBC_TUNABLES=glibc.malloc.hugetlb=1 .venv/bin/python
ARGS ?=
EXTRA ?=

.PHONY: help setup demo real test test-all soak bench baselines lint lock

help:
	@echo 'make setup      all that the others need; EXTRA=tpu, cuda12 or cuda13 adds an accelerator'
	@echo 'make demo       cold start, SFT, RL with tools, the text baseline, evaluation: a run folder and a report'
	@echo 'make real       the same with a model and problems of others: fetches 93 MB once'
	@echo 'make test       the quick tests        make test-all   every test but the soak'
	@echo 'make soak       minutes of steady load  make bench      sandbox, rollout, update: one JSON line each'
	@echo 'make baselines  side environments with the peers that benchmarks compare with'
	@echo 'make lint       ruff, and its format    make lock       pin the newest packages in requirements.lock'

# EXTRA=tpu, cuda12 or cuda13 adds the accelerator's JAX; later targets keep it.
setup:
	@EXTRA='$(EXTRA)' bash launch/setup.sh

demo: setup
	@$(PY) launch/demo.py $(ARGS)

real: setup
	@$(PY) launch/demo.py --config=configs/demo.py:smollm2_135m $(ARGS)

# Two processes: most tests keep one core busy. A file stays in one of them, with what its tests share.
test: setup
	@$(PY) -m pytest -n 2 --dist loadfile $(ARGS)

# In the order of tests/conftest.py: xdist's own starts the file that has the fewest tests last, the longest of all.
test-all: setup
	@$(PY) -m pytest -m 'not soak' -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

soak: setup
	@$(PY) -m pytest -m soak -o faulthandler_timeout=3600 $(ARGS)

bench: setup
	@$(PY) launch/bench_sandbox.py $(ARGS)
	@$(PY) launch/bench_rollout.py $(ARGS)
	@$(PY) launch/bench_update.py $(ARGS)

baselines: setup
	@bash launch/baselines.sh

lint: setup
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

lock:
	@.venv/bin/uv pip compile setup.py --extra dev --extra server --universal --python-version 3.12 \
	    --upgrade --no-emit-index-url --no-emit-find-links --custom-compile-command 'make lock' \
	    -q -o requirements.lock
