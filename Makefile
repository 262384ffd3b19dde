# Everything from a clean checkout: makes .venv, installs, runs. `make PYTHON=python3.12 test` picks the interpreter.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BUILD_INPUTS := pyproject.toml setup.py CMakeLists.txt lingbot_kernels/_version.py $(shell find csrc -type f)

# With an NVIDIA GPU torch brings CUDA and its own triton; without one, the CPU build of torch, and triton for the tests
# that compile kernels without running them.
HAS_GPU := $(shell nvidia-smi -L 2>/dev/null | grep -q '^GPU' && echo yes)
ifeq ($(HAS_GPU),yes)
TORCH_SPEC ?= torch>=2.9
TRITON_SPEC ?=
else
TORCH_SPEC ?= torch==2.13.0
TRITON_SPEC ?= triton>=3.4,<3.7
endif

.PHONY: demo test lint docs install clean

demo: $(STAMP)
	$(BIN)/python -m lingbot_kernels.demo

# Each worker's torch keeps to one thread; the compiled core takes what is free.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) tests

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Warnings are errors; the pages land in build/docs.
docs: $(STAMP)
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs

install: $(STAMP)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: | $(BIN)/python
	$(BIN)/python -m pip install "$(TORCH_SPEC)" \
		$(if $(TRITON_SPEC),"$(TRITON_SPEC)")
	touch $@

$(STAMP): $(VENV)/.torch $(BUILD_INPUTS)
	$(BIN)/python -m pip install -e ".[test,lint]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info docs/_generated lingbot_kernels/_C.*.so rollout.json rollout.png
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
