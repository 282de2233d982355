# `make help` lists the targets. Each one sets up what it needs: a virtual environment with the compiled extension.

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
EXTRAS ?= commands,test,lint
ARGS   ?=
RUNS   ?=
SEED   ?=

BIN   := $(CURDIR)/$(VENV)/bin
READY := $(VENV)/.ready
# The demonstration needs neither tests nor formatters; where all is set up, that serves.
DEMO  := $(if $(wildcard $(READY)),$(READY),$(VENV)/.ready-demo)
export PATH := $(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# The build back-end's own list, quoted as it stands there; torch is pinned by TORCH.
BUILD_REQUIRES = $(shell sed -n 's/^requires = \[\(.*\)\]$$/\1/p' pyproject.toml | tr ',' ' ')
SOURCES := pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)
COMPILED := $(wildcard torch_moelora/_C*.so)
FORMATTED := $(shell find csrc tests/amx_emulator tests/wide_emulation -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.c')

.PHONY: help setup demo test bench gpu lint format clean FORCE

help: ## this list
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16
	@echo
	@echo "  make setup TORCH='torch==2.13.0'   the torch to build and run against"
	@echo "  make test RUNS='suite triton'      some of the runs; python tests/run.py --list names them"
	@echo "  make test RUNS=long                the long ones: leaks, real sizes, new examples"
	@echo "  make demo ARGS='--help'            arguments of the command behind demo and bench"

setup: $(READY) ## .venv with everything, the extension built in place

demo: $(DEMO) ## LoRA fine-tuning of a mixture-of-experts model, from scratch, in minutes
	$(BIN)/python -m moelora finetune $(ARGS)

test: $(READY) ## the whole suite, each instruction set, the sanitizers, Triton, side by side
	$(BIN)/python tests/run.py $(RUNS) $(if $(SEED),--seed $(SEED))

bench: $(READY) ## the operators beside what else there is
	$(BIN)/python -m benchmarks.run $(ARGS)

gpu: $(READY) ## tests, sanitizer and benchmark on a CUDA device, in ten minutes
	$(BIN)/python -m benchmarks.gpu_proof $(ARGS)

lint: $(READY) ## ruff, clang-format, layout fences
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@echo 'clang-format --dry-run -Werror ($(words $(FORMATTED)) files)'
	@$(BIN)/clang-format --dry-run -Werror $(FORMATTED)
	$(BIN)/python -m pytest tests/test_layout.py

format: $(READY) ## rewrites the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	@$(BIN)/clang-format -i $(FORMATTED)

clean: ## removes what was built, the virtual environment too
	rm -rf build *.egg-info torch_moelora/*.so .pytest_cache .ruff_cache .hypothesis $(VENV)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, $(PYTHON) is " + sys.version)'
	@$(PYTHON) -c 'import ensurepip' || { echo "$(PYTHON) cannot make virtual environments: install its venv package (Debian: python3-venv)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.ready-demo: WANTED = commands
$(READY): WANTED = $(EXTRAS)

# One pip call with TORCH in it: nothing that is installed beside it may bring another torch.
$(READY) $(VENV)/.ready-demo: $(SOURCES) $(if $(COMPILED),,FORCE) | $(VENV)/bin/python
	@echo 'Installing $(TORCH) and what goes with it, compiling the extension: some minutes.'
	$(BIN)/python -m pip install --quiet '$(TORCH)' $(BUILD_REQUIRES)
	$(BIN)/python -m pip install --quiet --no-build-isolation '$(TORCH)' -e '.$(if $(WANTED),[$(WANTED)])'
	$(BIN)/python -m torch_moelora
	@touch $@
