# `make demo` and `make test` need python3 (3.10 or newer), make and a package index; all else they set up in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Workers of pytest, each with one thread: on a small machine that beats one worker with all threads.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

.PHONY: demo test test-slow campaign gpu lint types clean

demo: $(READY)
	$(BIN)/vqgen-demo $(DEMO)

test: $(READY)
	$(PYTEST) $(TESTS)

test-slow: $(READY)
	$(PYTEST) -m slow $(TESTS)

# Damaged inputs, kills and full disks; 12 minutes on two cores (docs/robustness.md).
campaign: $(READY)
	$(BIN)/python -m benchmarks.campaign $(CAMPAIGN)

# Tests and measurements on a CUDA device, in eight minutes (docs/gpu.md).
gpu: $(READY)
	$(BIN)/python -m benchmarks.gpu $(GPU)

lint: $(READY) types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# pyright follows relative imports by folder, so it gets the package laid out as it is installed.
types:
	@rm -rf build/types && mkdir -p build/types/vqgen
	@cd build/types/vqgen && top=../../.. && ln -s $$top/vqgen/* $$top/tokenizer $$top/prior $$top/sampling $$top/evaluation $$top/app $$top/configs .

# The stamp comes last: an installation that was cut off is done again, a finished one only when these files change.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	    echo "vqgen needs Python 3.10 or newer; $(PYTHON) is `$(PYTHON) --version 2>&1 | head -n 1`: make PYTHON=python3.12 …" >&2; \
	    exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	    echo "$(PYTHON) has no venv module; install it (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[test,eval,app]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
