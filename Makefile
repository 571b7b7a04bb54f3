# Two commands need nothing but Python: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
MLIR := $(VENV)/.mlir
WORKERS ?= 2

.PHONY: demo test lint types unit bench docs clean

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py

test: lint types unit

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED) $(MLIR)
	$(BIN)/pyright
	$(BIN)/mypy -p sparsec
	$(BIN)/mypy tests examples

# One thread for each worker, and threads that wait asleep: more would wait for each other.
unit: $(INSTALLED) $(MLIR)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(WORKERS)

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.ir
	$(BIN)/python -m benchmarks.cpu

docs: $(INSTALLED)
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/sessions.py

clean:
	rm -rf $(VENV) out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	touch $@

# torch-mlir has no wheel for every Python. Its tests are skipped where it cannot be had.
$(MLIR): $(INSTALLED)
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[mlir]' -c constraints.txt
	touch $@
