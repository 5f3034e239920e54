# make run   create .venv, install, run all three parts on the embedded data set
# make test  the same environment, then lint, types and tests
# make clean remove what these made

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# What is wrong with this Python or platform: nothing, as a rule.
WRONG := $(shell $(PYTHON) utils/__init__.py 2>&1)
# CUDA 13 wants a driver from 580, CUDA 12 one from 535; pycuda, which runs TensorRT, wants nvcc.
DRIVER := $(shell nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null \
	| sed -n '1s/^\([0-9][0-9]*\)\..*/\1/p')
NVCC := $(shell command -v nvcc)
REQUIREMENTS := $(shell if test 0$(DRIVER) -ge 580; then echo requirements.txt; \
	elif test 0$(DRIVER) -ge 535; then echo requirements-cu12.txt; \
	else echo requirements-cpu.txt; fi)
TENSORRT := $(and $(NVCC),$(filter-out requirements-cpu.txt,$(REQUIREMENTS)))
CUDA12_INDEX := https://download.pytorch.org/whl/cu126

.PHONY: run test clean
run: $(VENV)/.installed
	$(BIN)/python part1_quantize.py --quick
	$(BIN)/python part2_tune.py --quick
	$(BIN)/python part3_tensorrt.py --quick

test: export OMP_NUM_THREADS = 1
test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

# Each file also bounds the versions of what requirements-cpu.txt installs.
$(VENV)/.installed: requirements.txt requirements-cu12.txt requirements-cpu.txt
	$(if $(WRONG),$(error $(WRONG)))
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "$(REQUIREMENTS), $(if $(TENSORRT),with,without) TensorRT, which wants an NVIDIA driver" \
		"from 535 (here: $(or $(DRIVER),none)) and nvcc (here: $(or $(NVCC),none))"
	$(if $(filter %-cu12.txt,$(REQUIREMENTS)),$(BIN)/pip install --quiet "torch>=2.11" torchvision \
		--index-url $(CUDA12_INDEX))
	$(BIN)/pip install --quiet -r requirements-cpu.txt -c $(REQUIREMENTS)
	$(if $(TENSORRT),$(BIN)/pip install --quiet -r $(REQUIREMENTS) \
		|| echo "TensorRT or pycuda cannot be installed here: Part 3 runs without TensorRT")
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(BIN)/pip install --quiet -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) results data/cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
