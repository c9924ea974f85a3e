# SPDX-License-Identifier: Apache-2.0
# `make` lists the targets. Everything happens in .venv; nothing else of the system is changed.

PYTHON    ?= $(shell command -v python3.11 || command -v python3)
VENV      ?= .venv
# What `make demo` installs besides. Elsewhere than on a CPU-only host torch may be a CUDA build of
# the same version, which is larger; give TORCH=... to choose, or TORCH= to keep what is installed.
TORCH        ?= torch==2.13.0
TRANSFORMERS ?= transformers==5.23.0
# vLLM has an environment of its own: it pins what torch and others depend on.
VENV_VLLM    ?= .venv-vllm
# How long `make nightly` stays with a scenario, and with a fuzz target.
SCENARIO_SECONDS ?= 600
FUZZ_SECONDS     ?= 1800
# Arguments for pytest, the demo or the benches: make test ARGS="-k lease -x"
ARGS      ?=

PY    := $(VENV)/bin/python
BIN   := $(VENV)/bin
STAMP := $(VENV)/.cenote-setup
DEMO_STAMP := $(VENV)/.cenote-demo
BENCH_STAMP := $(VENV)/.cenote-bench
VLLM_STAMP := $(VENV_VLLM)/.cenote-vllm
VLLM_PY := $(abspath $(VENV_VLLM))/bin/python
NATIVE := $(wildcard cffi_src/include/*.h cffi_src/src/*.[ch] cffi_src/lease/*.[ch] cffi_src/ffi/build_core.py)
C_FILES := $(wildcard cffi_src/*/*.[ch] tests/c/*.[ch] tests/c/*/*.[ch] tests/model/*.[ch] tests/fuzz/*.[ch] bench/c/*.[ch])
C_SOURCES := $(wildcard cffi_src/src/*.c)
C_FLAGS := -std=gnu11 -D_GNU_SOURCE= -O2 -Icffi_src/include -Icffi_src/src
LEASE_FLAGS = -DPy_LIMITED_API=0x030b0000 -isystem $(shell $(PY) -c 'import sysconfig; print(sysconfig.get_path("include"))')
C_STRICT := -Wall -Wextra -Wconversion -Wshadow -Wstrict-prototypes -Wmissing-prototypes -Wvla -Werror
PYTHON_TREES := $(wildcard tests bench)
PYTEST := $(PY) -m pytest

# The checkout has folders named daemon, numa, shm, client: keep them off sys.path.
export PYTHONSAFEPATH := 1
export PATH := $(abspath $(BIN)):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup setup-vllm dev demo demo-vllm test test-engine test-vllm test-c test-asan test-model test-crash test-wheel test-guest nightly lint format bench bench-vllm bench-peers clean

help:  ## list the targets
	@sed -nE 's/^([a-z-]+):.*  ## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

$(PY):
	@test -n "$(PYTHON)" || { echo "make: no python3 found; install python3.11 and python3.11-venv"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "make: $(PYTHON) is older than 3.11; give PYTHON=/path/to/python3.11"; exit 2; }
	@command -v cc >/dev/null || { echo "make: no C compiler found; install gcc"; exit 2; }
	$(PYTHON) -m venv $(VENV)

# CN_NATIVE=no: `dev` compiles, and keeps its objects. An isolated build would download its tools twice.
$(STAMP): pyproject.toml setup.py | $(PY)
	$(PY) -m pip install -q "setuptools>=77" "cffi>=2"
	CN_NATIVE=no $(PY) -m pip install -q --no-build-isolation -e ".[dev]"
	@touch $@

setup: $(STAMP) dev  ## make .venv with cenote (editable) and every tool

# Objects are kept in build/ and used again; other flags start afresh.
dev: $(STAMP)  ## compile the C core again where it changed
	@flags="$$CN_EXTRA_CFLAGS|$$CN_SOURCES|$(notdir $(C_SOURCES))|$$(cat setup.py | cksum)"; \
	if [ "$$(cat build/flags 2>/dev/null)" != "$$flags" ]; then \
	    rm -rf build/lib* build/temp* cffi_src/*.so; mkdir -p build; echo "$$flags" > build/flags; \
	fi
	@$(PY) setup.py -q build_clib build_ext --inplace

demo: setup $(DEMO_STAMP)  ## two real models share their KV cache; installs torch and transformers first
	$(BIN)/cenote demo $(ARGS)

$(DEMO_STAMP): $(STAMP)
	@echo "The demo needs $(TORCH) and $(TRANSFORMERS) in $(VENV). Where they are missing, pip downloads"
	@echo "about 0.25 GB with a CPU build of torch (192 MB) and up to 3 GB with a CUDA build of it; they"
	@echo "take about 1 GB of disk as a CPU build. The model's weights are made from a seed, not downloaded."
	$(PY) -m pip install $(if $(TORCH),"$(TORCH)") "$(TRANSFORMERS)"
	@touch $@

setup-vllm: $(VLLM_STAMP)  ## make .venv-vllm with vLLM for CPUs and cenote: 0.9 GB of downloads, 4 GB of disk

# After `setup`: the modules that `dev` compiles are those that this environment imports.
$(VLLM_STAMP): tests/engine/setup-vllm pyproject.toml | setup
	@echo "vLLM for CPUs goes into $(VENV_VLLM): where it is not there yet, about 0.9 GB of downloads and 4 GB"
	@echo "of disk, in some minutes of which pip says nothing."
	tests/engine/setup-vllm $(VENV_VLLM) $(PY)

demo-vllm: setup setup-vllm  ## three vLLM engines share a prompt, two of them killed; installs vLLM first
	CENOTE_VLLM_PYTHON=$(VLLM_PY) $(PY) bench/demo_vllm.py $(ARGS)

test: setup  ## run the tests, without engines, guests, network and the slow ones
	$(PYTEST) -m "not engine and not guest and not net and not slow" $(ARGS)

# What is needed is there now: a test that skips for want of it would never run.
test-engine: setup $(DEMO_STAMP) test-vllm  ## run the tests that need torch, transformers or vLLM; installs them
	CENOTE_NEVER_SKIP='torch|transformers' $(PYTEST) -m torch $(ARGS)

test-vllm: setup setup-vllm  ## run the tests with real vLLM engines; installs vLLM
	CENOTE_VLLM_PYTHON=$(VLLM_PY) CENOTE_NEVER_SKIP='vLLM|vllm' \
	    $(PYTEST) -m "engine and not slow" tests/engine $(ARGS)

test-c: $(STAMP)  ## run the C tests: gcc, clang, ASan+UBSan, TSan, aarch64
	@.ci/test-c

test-asan: $(STAMP)  ## run the Python tests of the C types under ASan and UBSan
	@.ci/test-python-asan $(PY) $(ARGS)

test-model:  ## explore every schedule of the lock-free parts
	@if [ -d tests/model ]; then $(MAKE) -C tests/model check; else echo "test-model: no tests/model here"; fi

# A finding of the one must not keep the other from running.
nightly:  ## explore scenarios of three tasks, then fuzz with libFuzzer: two hours, never in CI
	@failed=0; \
	$(MAKE) --no-print-directory -C tests/model nightly NIGHTLY_SECONDS=$(SCENARIO_SECONDS) || failed=1; \
	$(MAKE) --no-print-directory -C tests/fuzz fuzz SECONDS=$(FUZZ_SECONDS) || failed=1; \
	exit $$failed

test-crash: setup  ## kill -9 everywhere
	$(PYTEST) tests/crash $(ARGS)

test-guest: setup  ## boot Debian with real systemd in QEMU; needs root, qemu-system-x86 and mmdebstrap
	@.ci/test-guest $(PY) $(ARGS)

test-wheel: $(STAMP)  ## build wheel and sdist, run the tests against what they install
	@.ci/test-wheel $(PY) $(ARGS)

lint: setup lint-c  ## ruff, mypy, import-linter, clang-format, clang-tidy, the stubs, a cross-compile
	ruff check .
	ruff format --check .
	mypy typings/cenote setup.py $(PYTHON_TREES)
	lint-imports
	$(PY) cffi_src/ffi/gen_stub.py --check
	$(PY) cffi_src/ffi/gen_layout_doc.py --check

.PHONY: lint-c
lint-c: $(STAMP)
	clang-format --dry-run -Werror $(C_FILES)
	@for cc in gcc clang aarch64-linux-gnu-gcc; do \
	    command -v $$cc >/dev/null || { echo "lint: $$cc is not installed, not compiled with it"; \
	        [ -z "$$CENOTE_CI" ] || exit 1; continue; }; \
	    echo "$$cc $(C_STRICT)"; \
	    for c in $(C_SOURCES); do $$cc $(C_FLAGS) $(C_STRICT) -c -o /dev/null $$c || exit 1; done; \
	done
	gcc $(C_FLAGS) $(LEASE_FLAGS) $(C_STRICT) -fsyntax-only cffi_src/lease/*.c
	clang-tidy --quiet $(C_SOURCES) -- $(C_FLAGS)
	clang-tidy --quiet $(wildcard cffi_src/lease/*.c) -- $(C_FLAGS) $(LEASE_FLAGS)

format: setup  ## let ruff and clang-format write the files, and what is generated from the headers
	$(PY) cffi_src/ffi/gen_stub.py
	$(PY) cffi_src/ffi/gen_layout_doc.py
	$(PY) -m cenote.daemon.config_docs > docs/configuration.md
	ruff check --fix-only --quiet . ; ruff format .
	clang-format -i $(C_FILES)

$(BENCH_STAMP): $(STAMP)
	CN_NATIVE=no $(PY) -m pip install -q --no-build-isolation -e ".[bench]"
	@touch $@

bench: setup $(BENCH_STAMP)  ## measure what docs/performance.md states; installs LMDB beside it
	$(PY) bench/run.py $(ARGS)

bench-vllm: setup setup-vllm  ## time to first token in real vLLM engines: half an hour; ARGS=--quick
	CENOTE_VLLM_PYTHON=$(VLLM_PY) $(PY) bench/ttft.py $(ARGS)

bench-peers: setup  ## the same beside LMDB, Redis, Mooncake and others; installs them, never in CI
	$(PY) bench/peers.py $(ARGS)

clean:  ## remove what was built; .venv stays
	rm -rf build dist *.egg-info cffi_src/*.so tests/model/build
	find . -name __pycache__ -not -path './$(VENV)/*' -not -path './$(VENV_VLLM)/*' -prune -exec rm -rf {} +
