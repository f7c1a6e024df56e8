# Each target does its own set-up: .venv is made, or brought up to date when the pins below changed.
#
#   make demo     text to blocks to model to sample, on this machine, in minutes
#   make test     what every change must pass
#   make serve    Prefect server, work pool, deployments and worker; then `prefect deployment run pretrain/demo`
#   make bench    the figures that the README quotes
#
# TORCH=cpu or TORCH=cuda chooses the build of torch; the default looks for an NVIDIA driver.

PYTHON ?= python3
TORCH ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu)
BIN := .venv/bin
TORCH_VERSION := 2.13.0
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: demo test check serve bench lock

demo: .venv/ready-$(TORCH)
	$(BIN)/python -m flows.pretrain demo

test: .venv/ready-$(TORCH)
	$(BIN)/python -m pytest

check: .venv/ready-$(TORCH)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

serve: .venv/ready-$(TORCH)
	exec $(BIN)/python -m deployments.serve

bench: .venv/ready-$(TORCH)
	$(BIN)/python -m benchmarks

# On Linux the plain index carries torch with gigabytes of CUDA libraries; the CPU build has a version of its
# own ("+cpu") and an index of its own, asked only where the build is not to be had already.
.venv/ready-$(TORCH): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Pileline needs Python 3.11 or newer; this is " + sys.version.split()[0] \
	  + ". Say which: make PYTHON=python3.11 ...") if sys.version_info < (3, 11) else None'
	@echo "Setting up .venv with the $(TORCH) build of torch (first time: 2 to 5 minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@rm -f .venv/ready-*
	@if [ "$(TORCH)" = cpu ] && [ "$$(uname -s)" = Linux ]; then \
	  $(BIN)/pip install --quiet -c constraints.txt "torch==$(TORCH_VERSION)+cpu" 2>/dev/null \
	  || $(BIN)/pip install --quiet -c constraints.txt "torch==$(TORCH_VERSION)+cpu" --extra-index-url $(TORCH_CPU_INDEX); \
	else \
	  $(BIN)/pip install --quiet -c constraints.txt "torch==$(TORCH_VERSION)"; \
	fi
	@$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

lock: .venv/ready-$(TORCH)
	@head -n 1 constraints.txt > constraints.new
	@$(BIN)/pip freeze --exclude torch --exclude-editable >> constraints.new
	@mv constraints.new constraints.txt
