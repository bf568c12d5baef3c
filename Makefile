# Two commands are the whole set-up: `make demo` and `make test`. Both build .venv on first use.

PYTHON ?= python3
SEEDS ?= 0
JOBS ?= 2
ONLY ?= *
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
FASHION_MNIST := /usr/share/datasets/fashion-mnist

# Two cores: two test processes of one thread each are faster than one of two.
TEST_ENV := OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore::DeprecationWarning

.PHONY: demo test test-slow benchmark check format clean

demo: $(STAMP)
	$(BIN)/python examples/demo.py --seeds $(SEEDS)

test: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadscope

test-slow: $(STAMP) $(FASHION_MNIST)
	$(TEST_ENV) $(BIN)/python -m pytest -m slow -n 2 --dist loadgroup

# Hours in all, resumable at any time, and in parts: make benchmark ONLY='cnn/*' JOBS=2
benchmark: $(STAMP) $(FASHION_MNIST)
	$(BIN)/python benchmarks/fashion_bench.py --jobs $(JOBS) --only '$(ONLY)'

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_imports.py

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Rebuilt when pyproject.toml changes; a half-built environment leaves no stamp and is completed by the next call.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[onnx,structured,examples,dev]"
	touch $(STAMP)

# The real images come as a Debian package; elsewhere torchvision downloads them on first use.
$(FASHION_MNIST):
	if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
		apt-get update -qq && apt-get install -y -qq dataset-fashion-mnist; \
	fi

clean:
	rm -rf $(VENV) artifacts .pytest_cache .mypy_cache .ruff_cache .hypothesis
