# make run   create .venv, install, run all three parts on the embedded data set
# make test  the same environment, then lint, types and tests
# make clean remove what these made

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# pycuda is compiled, and TensorRT needs NVIDIA's index: only where a driver and a toolkit are there.
REQUIREMENTS := $(shell command -v nvidia-smi >/dev/null && command -v nvcc >/dev/null \
	&& echo requirements.txt || echo requirements-cpu.txt)

.PHONY: run test clean
run: $(VENV)/.installed
	$(BIN)/python part1_quantize.py --quick
	$(BIN)/python part2_tune.py --quick
	$(BIN)/python part3_tensorrt.py --quick

test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

$(VENV)/.installed: requirements.txt requirements-cpu.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r $(REQUIREMENTS)
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(BIN)/pip install --quiet -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) results data/cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
