# Commands for people and for CI. `make help` lists them; ARGS is passed on: make serve ARGS="--port 9000".

.DEFAULT_GOAL := help
.PHONY: help install serve quick test test-long fuzz soak check format bench bench-gpu bench-gpu-model peers size way wheel test-image clean always

PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$python" && break; done)
BIN := .venv/bin
CONFORMANCE := tests/conformance
WEB := tests/web
MANIFESTS := tests/deploy
CLIENTS := $(patsubst %,.venv-clients/%/installed,agents clients instructor lm-eval router) \
	$(CONFORMANCE)/node_modules/installed $(CONFORMANCE)/npm/node_modules/installed $(WEB)/node_modules/installed \
	$(MANIFESTS)/node_modules/installed
ARGS ?=
WORKERS ?= auto
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
ONCE := -p no:rerunfailures
QUICK := tests/test_borders.py tests/test_style.py \
	$(patsubst %,tests/engine/%,batch config grammar model scheduling shared weights) \
	$(patsubst %,tests/server/%,constrained schemas settings statistics text)
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check
COMPILE_KERNELS := $(BIN)/python -m engine.parts.build_kernels.build >/dev/null 2>&1
TORCH ?=
TORCH_ARGS_cpu := --upgrade --index-url https://download.pytorch.org/whl/cpu

help: ## List the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: .venv/installed ## Make .venv and install the project in it (TORCH=cpu or cuda: that build of PyTorch)

serve: .venv/installed ## Serve the default model, or the one in ARGS
	@$(BIN)/lightwell serve $(ARGS)

quick: .venv/installed-test ## Run the unit tests, in two minutes
	$(PYTEST) $(ONCE) $(QUICK) $(ARGS)

test: .venv/installed-test $(WEB)/node_modules/installed ## Run the tests, one process for each core (WORKERS=0: in this one)
	$(PYTEST) $(ONCE) $(ARGS)

test-long: .venv/installed-test $(CLIENTS) ## Run what `make test` leaves out, and draw many more random cases
	TEST_LONG=1 $(PYTEST) -m "long or hypothesis or drawn" $(ARGS)

fuzz: .venv/installed-test ## Try mutated input on a parser for a minute, as ARGS says (default: list them)
	$(BIN)/python -m tests.fuzz $(ARGS)

soak: .venv/installed-test ## Load a server for an hour with hostile clients and dying processes (report: soak-report.md)
	$(BIN)/python -m tests.chaos $(ARGS)

check: .venv/installed-test ## Check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: .venv/installed-test ## Format the code
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: .venv/installed ## Start a server and measure it under load
	$(BIN)/python tests/bench/serve.py $(ARGS)

bench-gpu: .venv/installed-test ## Measure the engine against the limits of a GPU
	$(BIN)/python -m tests.bench.gpu $(ARGS)

bench-gpu-model: .venv/installed-test ## Estimate the time of each step on GPUs that are not there
	$(BIN)/python -m tests.bench.gpu_model $(ARGS)

peers: .venv/installed-test ## Measure other servers beside it, as ARGS says (default: how to)
	$(BIN)/python -m tests.bench.peers $(or $(ARGS),--help)

size: .venv/installed-test ## Count the lines of code of core, parts and tests
	$(BIN)/python -m tests.size

way: .venv/installed-test ## Print the functions that a short chat and a completion call
	$(BIN)/python -m tests.way $(ARGS)

wheel: .venv/bin/python ## Make a wheel with compiled kernels, for any Linux on x86-64, in dist/
	$(PIP_INSTALL) ziglang
	$(BIN)/python deploy/make_wheel.py

test-image: ## Build the container image and try it
	deploy/test-image.sh

clean: ## Remove .venv and all caches
	rm -rf .venv .venv-clients $(CONFORMANCE)/node_modules $(CONFORMANCE)/npm/node_modules $(WEB)/node_modules $(MANIFESTS)/node_modules build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Made anew only when the dependencies change, so that the second time needs no network. The kernels, whose build script
# needs no package, are compiled while pip downloads. Where they cannot be, the server says why when it starts.
.venv/installed: pyproject.toml | .venv/bin/python
	@$(COMPILE_KERNELS) &
	$(if $(TORCH),$(PIP_INSTALL) $(TORCH_ARGS_$(TORCH)) "$$(grep -o 'torch>=[0-9.]*' pyproject.toml)")
	$(PIP_INSTALL) --editable .
	@$(BIN)/python deploy/torch_build.py $(TORCH)
	@$(COMPILE_KERNELS) || true
	@touch $@

# A build of PyTorch that is asked for is installed even if the dependencies have not changed.
ifneq ($(TORCH),)
ifeq ($(filter cpu cuda,$(TORCH)),)
$(error TORCH is $(TORCH), but must be cpu or cuda)
endif
.venv/installed: always
endif

.venv/installed-test: pyproject.toml | .venv/bin/python
	$(PIP_INSTALL) --editable '.[test]'
	@touch .venv/installed $@

# Clients that the tests try, exactly as the lock files have them.
.venv-clients/%/installed: $(CONFORMANCE)/requirements/%.txt | .venv/bin/python
	@$(BIN)/python -m venv --clear --without-pip $(@D)
	$(BIN)/python -m pip --disable-pip-version-check --python $(@D) install --no-deps --no-compile --require-hashes -r $<
	@touch $@

# Without npm, the tests that need it say so.
$(patsubst %,%/node_modules/installed,$(CONFORMANCE) $(WEB) $(MANIFESTS)): %/node_modules/installed: %/package-lock.json
	@if command -v npm >/dev/null; then \
		npm ci --prefix $* --ignore-scripts --no-audit --no-fund --no-update-notifier && touch $@; fi

# The one script that is run only puts the program's binary, which is in the package, in its place.
$(CONFORMANCE)/npm/node_modules/installed: $(CONFORMANCE)/npm/package-lock.json
	@if command -v npm >/dev/null; then cd $(CONFORMANCE)/npm && \
		npm ci --ignore-scripts --no-audit --no-fund --no-update-notifier && \
		node node_modules/@anthropic-ai/claude-code/install.cjs && touch node_modules/installed; fi

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "Lightwell needs Python 3.11 or newer: install it, or say make PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) has no venv module: install it (on Debian and Ubuntu, the package python3-venv)." >&2; exit 1; }
	@"$(PYTHON)" -m venv .venv
