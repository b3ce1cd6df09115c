# make demo   the whole pipeline on a model made on the spot, minutes on a CPU
# make test   lint, types and tests
# make aot    compile every specialisation of every Triton kernel, with registers and spills
# make peers  other trainers, each in an environment of its own, for benchmarks/bench_ppo.py
# Override: make test TORCH="torch==2.11.0" PYTHON=python3.12

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
TRITON ?= triton==3.6.0
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Two OpenMP threads beside a busy process are ten times slower when they spin while waiting.
RUN    := OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0
# One process per core, one thread each.
JOBS   ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: demo test aot peers lint types install install-test clean

demo: install
	$(RUN) $(BIN)/fastrl demo

test: lint types
	$(RUN) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal --timeout=600 tests

aot: install-test
	FASTRL_AOT=every $(BIN)/python -m pytest -n $(JOBS) -rP tests/kernels/test_aot.py

# Never a dependency of fastrl: what an import of these would break stays in their folders. TRL's
# last release with a PPO trainer.
peers: peers/trl/.installed

peers/trl/.installed:
	$(PYTHON) -m venv peers/trl
	peers/trl/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	peers/trl/bin/python -m pip install --quiet --disable-pip-version-check "trl==1.12.0"
	touch $@

lint: install-test
	$(BIN)/ruff check .

types: install-test
	$(BIN)/mypy

install: $(VENV)/.installed
install-test: $(VENV)/.installed-test

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first and alone, so that the version asked for here wins over any other. Its CUDA
# builds bring the triton they need; its CPU builds bring none and get the one of TRITON.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt | $(VENV)/bin/python
	$(PIP) "$(TORCH)"
	$(BIN)/python -c "import triton" 2>/dev/null || $(PIP) "$(TRITON)"
	$(PIP) -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
