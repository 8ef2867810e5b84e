# `make up` on a machine with Python 3.11 and nothing else answers a chat request; `make help` lists the rest.
# Every target works from any folder: make -C path/to/penstock up

SHELL := /bin/bash
# Collecting thousands of tests without their bytecode takes half as long again.
unexport PYTHONDONTWRITEBYTECODE
ROOT := $(abspath $(dir $(lastword $(MAKEFILE_LIST))))
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := $(ROOT)/.venv
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install up test check faults lint format bench gpu-check clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' "$(ROOT)/Makefile" | sed -E 's/:[^#]*## /\t/' | expand -t 10

# torch goes first and in its tested version, so that no later step can choose another build of it.
$(STAMP): $(ROOT)/pyproject.toml $(ROOT)/requirements.lock
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Penstock needs Python 3.11 or newer; set PYTHON=/path/to/python3.11" >&2; exit 1; }
	"$(PYTHON)" -m venv "$(VENV)"
	"$(BIN)/python" -m pip install --quiet -c "$(ROOT)/requirements.lock" torch numpy
	cd "$(ROOT)" && "$(BIN)/python" -m pip install --quiet -c requirements.lock \
	  --editable '.[worker,redis-server,test,dev]'
	@touch "$(STAMP)"

install: $(STAMP) ## prepare .venv (instant the second time)

up: install ## start a whole system here and talk to it; extra flags: ARGS="--decode 2"
	@cd "$(ROOT)" && exec "$(BIN)/penstock" up $(ARGS)

lint: install ## formatting, ruff, mypy
	cd "$(ROOT)" && "$(BIN)/ruff" format --check . && "$(BIN)/ruff" check . && "$(BIN)/mypy"

check: lint ## lint and most tests that start no process, one seed of each (under a minute)
	cd "$(ROOT)" && "$(BIN)/pytest" -m "not system and not gpu and not long" --seeds 1 -n 2 --dist worksteal $(ARGS)

test: lint ## everything: what CI runs
	cd "$(ROOT)" && "$(BIN)/pytest" -m "not system and not gpu" -n 2 --dist worksteal
	cd "$(ROOT)" && "$(BIN)/pytest" -m "system and not gpu" -n 2 --dist loadfile $(ARGS)

faults: install ## the whole kill matrix over real processes; its table: ARGS="--table matrix.md"; root, for the cuts
	cd "$(ROOT)" && "$(BIN)/python" -m tests.faults.matrix $(ARGS)

format: install ## rewrite the files as `make lint` wants them
	cd "$(ROOT)" && "$(BIN)/ruff" format . && "$(BIN)/ruff" check --fix .

bench: install ## list the benchmarks, or run one: make bench ARGS=handover_copy
	@cd "$(ROOT)" && "$(BIN)/python" -m benchmarks $(ARGS)

# Not through `install`: a GPU machine brings its own torch, triton and transformers. benchmarks/gpu/README.md.
gpu-check: ## on a GPU machine: GPU tests, then GPU benchmarks, one table; parts: ARGS="--only kernels,vmm"
	cd "$(ROOT)" && "$${GPU_PYTHON:-$$([ -x "$(BIN)/python" ] && echo "$(BIN)/python" || echo python3)}" -m benchmarks.gpu $(ARGS)

clean: ## remove the environment and every cache
	rm -rf "$(VENV)" "$(ROOT)"/*.egg-info "$(ROOT)"/.mypy_cache "$(ROOT)"/.ruff_cache "$(ROOT)"/.hypothesis
