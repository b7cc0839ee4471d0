# Every target sets up what it needs: a virtual environment in .venv, and fastprune installed into it from this tree.
# PYTHON=... chooses the interpreter, VENV=... the environment's folder, ARGS=... is handed on to the command.
# FASTPRUNE_NO_EXT, FASTPRUNE_CUDA and MAX_JOBS are for setup.py, whose docstring explains them.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help train test test-avx2 test-slow test-oldest test-gpu-kernels test-gpu-kernels-changed bench gpu-check gpu-pack lint format wheel clean environment FORCE

VENV ?= .venv
ARGS ?=
PY := $(VENV)/bin/python
# A run that was stopped goes on; one that is finished says again what came out.
QUICK_RUN := $(if $(wildcard runs/quick/checkpoint.safetensors),--resume runs/quick,--recipe quick --out runs/quick)
PIP := $(PY) -m pip --disable-pip-version-check --no-input
CXX_SOURCES := $(shell find csrc -type f 2>/dev/null | sort)
# One stamp for each way to build, so that changing the switch builds again.
INSTALLED := $(VENV)/.installed
OLDEST := $(VENV)-oldest
OLDEST_TESTS = $(wildcard tests/test_op_*.py) $(addprefix tests/test_,ops.py backend.py info.py nn.py optim.py pruner.py)
BUILT := $(VENV)/.built$(if $(FASTPRUNE_NO_EXT),-no-ext-$(FASTPRUNE_NO_EXT))$(if $(FASTPRUNE_CUDA),-cuda-$(FASTPRUNE_CUDA))

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 26

train: environment ## train, prune and compare: the quick recipe, at most ten minutes (ARGS="--epochs 3" ...)
	@$(PY) -m fastprune.train $(QUICK_RUN) $(ARGS)

# Of the tests of GPU kernels what has changed, and a tenth of the rest. tests/conftest.py puts the longest files first.
test: environment ## the tests, without the slow ones, on all cores
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder --verdicts=check $(ARGS)

# Where a CPU has more, these take the paths of one with AVX2 alone, in PyTorch and in fastprune.
AVX2 := ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 FASTPRUNE_CPU_ISA=avx2
test-avx2: environment ## the tests of the ops and of the search, as on a CPU with AVX2 alone
	@$(AVX2) OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder \
		tests/test_op_*.py tests/test_search.py tests/test_metapruning_*.py tests/test_onednn.py $(ARGS)

test-slow: environment ## the slow tests only
	@$(PY) -m pytest -m "slow and not gpu_kernels" $(ARGS)

# The table of clean tests is tests/verdicts/clean.txt: the first writes it anew, the second leaves out what it has.
test-gpu-kernels: environment ## the kernels of GPUs, executed on the CPU: interpreted, then as compiled (half an hour)
	@$(call test_gpu_kernels,rewrite)

test-gpu-kernels-changed: environment ## of these what has changed, and a tenth of the rest (minutes)
	@$(call test_gpu_kernels,check)

define test_gpu_kernels
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --timeout 1800 --verdicts=$(1) -m "" -k triton-interpreted tests $(ARGS)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --timeout 1800 --verdicts=$(1) -m gpu_kernels $(ARGS)
endef

# With modules that it built, from a folder where Python does not find this tree's first; then with the newest's.
test-oldest: environment $(OLDEST)/.installed ## the tests of ops and layers with the oldest PyTorch that is promised
	@echo "fastprune: building the CPU module with the oldest PyTorch"
	@FASTPRUNE_CUDA=0 PYTHONPATH=$(OLDEST)/packages $(PY) setup.py --quiet build --build-base $(OLDEST)/build \
		--build-lib $(OLDEST)/built > $(OLDEST)/build.log 2>&1 || { cat $(OLDEST)/build.log >&2; exit 1; }
	@cd $(OLDEST) && OMP_NUM_THREADS=1 PYTHONPATH=$(abspath $(OLDEST)/built):$(abspath $(OLDEST)/packages) $(abspath $(PY)) \
		-m pytest -c $(CURDIR)/pyproject.toml -n auto --maxprocesses 8 $(addprefix $(CURDIR)/,$(OLDEST_TESTS)) $(ARGS)
	@OMP_NUM_THREADS=1 PYTHONPATH=$(abspath $(OLDEST)/packages) $(PY) -m pytest tests/test_ops.py

bench: environment ## every op beside its rivals
	@$(PY) -m pytest bench/ --benchmark-only $(ARGS)

gpu-check: $(INSTALLED) ## build, test and bench on this machine's GPU; runs/gpu/report.md to send back
	@$(MAKE) --no-print-directory environment FASTPRUNE_CUDA=1
	@PYTHONPATH=bench $(PY) -m gpu.run --minutes 60 $(ARGS)

gpu-pack: $(INSTALLED) ## make .gpu/, for a machine with a GPU but no network (CIFAR=folder of its JPEG files)
	@PYTHONPATH=bench $(PY) -m gpu.pack $(if $(CIFAR),--cifar '$(CIFAR)') $(ARGS)

lint: environment ## what .ci/run checks about the sources
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(VENV)/bin/clang-format --dry-run -Werror $(CXX_SOURCES)
	@$(PY) -m mypy

format: environment ## rewrite the sources in the project's format
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .
	@$(VENV)/bin/clang-format -i $(CXX_SOURCES)

wheel: environment ## one wheel, in dist/
	@$(PIP) wheel . --quiet --no-build-isolation --no-deps --wheel-dir dist
	@ls dist/*.whl

clean: ## remove what was built; the environment stays (rm -r it for a new one)
	@rm -rf build dist *.egg-info fastprune/*.so $(VENV)/.built* $(OLDEST)/buil*
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	@find bench fastprune kernels tests -name __pycache__ -type d -prune -exec rm -rf {} +

environment: $(BUILT)

# The stamp is written last and holds this folder's name. An environment without it, of another folder (a moved clone), or
# whose Python is gone is not mended but made again.
ifneq ($(shell $(PY) -c 'print(open("$(INSTALLED)").read())' 2>/dev/null),$(CURDIR))
$(INSTALLED): FORCE
endif

# Dependencies and the editable install; the extension modules come after it, so that their failure loses nothing.
$(INSTALLED): pyproject.toml $(if $(PIP_CONSTRAINT),$(wildcard $(PIP_CONSTRAINT)))
	@if [ "$$($(PY) -c 'print(open("$@").read())' 2>/dev/null)" != "$(CURDIR)" ]; then \
		$(find_python); \
		echo "fastprune: making $(VENV) with $$($$python --version) (a few minutes the first time)"; \
		if [ -e $(VENV) ]; then chmod -R u+w $(VENV); rm -rf $(VENV); fi; \
		$$python -m venv $(VENV); \
	else \
		echo "fastprune: bringing $(VENV) up to date"; \
		mv $@ $@.before; \
	fi
	@$(PIP) install -qq 'setuptools>=77' wheel ninja \
		&& FASTPRUNE_NO_EXT=1 $(PIP) install -qq --no-build-isolation --editable '.[dev]' \
		|| { [ ! -e $@.before ] || mv $@.before $@; exit 1; }
	@rm -f $@.before $(VENV)/.built*; printf %s '$(CURDIR)' > $@

# The oldest torch and what comes with it, laid over the environment's packages: CUDA's libraries serve both.
$(OLDEST)/.installed: .ci/constraints-oldest.txt $(INSTALLED)
	@echo "fastprune: making $(OLDEST) with the oldest PyTorch"
	@rm -rf $(OLDEST) && mkdir $(OLDEST)
	@PIP_CONSTRAINT= $(PIP) install -qq --no-deps --target $(OLDEST)/packages -r .ci/constraints-oldest.txt
	@touch $@

# Incremental: ninja compiles what changed in csrc/ and nothing else.
$(BUILT): $(INSTALLED) setup.py $(CXX_SOURCES)
	@echo "fastprune: building the extension modules"
	@rm -f $(VENV)/.built* fastprune/*.abi3.so
	@$(PY) setup.py --quiet build_ext --inplace > $(VENV)/build.log 2>&1 || { cat $(VENV)/build.log >&2; exit 1; }
	@touch $@

# Sets $python: PYTHON if given, else the first suitable one found. venv needs ensurepip, which Debian packages apart.
define find_python
python=; \
for candidate in $(or $(PYTHON),python3 python python3.13 python3.12 python3.11 python3.10 python3.14); do \
	if $$candidate -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then \
		python=$$candidate; break; \
	fi; \
done; \
if [ -z "$$python" ]; then \
	echo "fastprune needs Python 3.10 or later with its venv module (Debian: apt-get install python3-venv)." >&2; \
	echo "Tried: $(or $(PYTHON),python3 python python3.10 to python3.14). Name one with: make PYTHON=/path/to/python3" >&2; \
	exit 1; \
fi
endef
