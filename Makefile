# torch_rpa: `make test` or `make demo` on a fresh Linux machine with Python 3.11 sets everything up by itself.
#
# Two stamps in .venv say what is done: one for the pinned packages, one for torch_rpa with its native extension.

VENV := .venv
BIN := $(VENV)/bin
VENV_NEXT := .venv-next
VENV_TORCHTPU := .venv-torchtpu
PYTHON ?= python3.11
PYTHON_CANDIDATES := $(PYTHON) $(if $(filter file,$(origin PYTHON)),python3)
UV_VERSION := 0.13.9
# Of `make test-torch`: the newest that the package is known to work with.
TORCH ?= 2.14.1
TEST_PACKAGES := expecttest hypothesis mypy ninja pytest pytest-xdist
# A TPU belongs to one process; elsewhere two of one thread each are faster than one of two.
TEST_PROCESSES ?= $(if $(filter TPU,$(PJRT_DEVICE)),0,2)
# Tests take from milliseconds to minutes, so a process without work takes some from the other.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist=worksteal
# In processes of their own: JAX keeps what it compiled, and a process has room for some hundreds of programs.
KERNEL_TESTS := tests/test_pallas.py tests/test_aot.py tests/without_torch

# ninja and uv of the environment are found first, also by what Python starts.
export PATH := $(CURDIR)/$(BIN):$(PATH)

PACKAGES_STAMP := $(VENV)/.stamp-packages
INSTALL_STAMP := $(VENV)/.stamp-torch_rpa
NEXT_STAMP := $(VENV_NEXT)/.stamp-packages
# The kernel that ours is compared with: its code alone, without the packages around it.
PEER := tpu-inference==0.32.0
PEER_STAMP := $(VENV_NEXT)/.stamp-peer
TORCHTPU_STAMP := $(VENV_TORCHTPU)/.stamp-packages
# What stands in for libtpu there, in the tests alone (tests/torchtpu/testbed.py): a CPU plugin of PJRT, a wheel that has
# pjrt_c_api.h, and the library of ours around the plugin.
TESTBED := $(VENV_TORCHTPU)/testbed
TESTBED_PACKAGES := lammps-jax-pjrt-cpu==0.11.2 xla-cpu-pjrt==0.0.1
TESTBED_HEADERS := $(TESTBED)/plugin/xla_plugins/xla_cpu_pjrt/include
TESTBED_LIBRARY := $(TESTBED)/plugin.so
TESTBED_COMPILER := $(TESTBED)/compile
# What of the tests is of the ops, beside those of TorchTPU itself.
TORCHTPU_TESTS := tests/torchtpu $(addprefix tests/test_,attention.py update.py validation.py check_batch.py merge.py private_names.py)
NATIVE_SOURCES := $(wildcard csrc_stub/*.cpp csrc_stub/*.h)

.DEFAULT_GOAL := help
.PHONY: help venv venv-next venv-torchtpu demo test test-next test-torchtpu test-torch test-install lint format bench
.PHONY: soak bench-tpu family-table settings-table aot-matrix compile-matrix clean distclean
.DELETE_ON_ERROR:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(INSTALL_STAMP) ## set up .venv: the pinned packages, and torch_rpa with its native extension

venv-next: $(NEXT_STAMP) ## set up .venv-next: a newer jax and libtpu, no torch

venv-torchtpu: $(TESTBED_COMPILER) ## set up .venv-torchtpu: TorchTPU, its torch and jax, and a test bed that needs no TPU

demo: $(INSTALL_STAMP) ## run the demo (DEVICE=cpu picks a device, ARGS="..." adds options)
	@$(BIN)/python -m torch_rpa.demo $(if $(DEVICE),--device $(DEVICE)) $(ARGS)

test: $(INSTALL_STAMP) ## run the tests (ARGS="-k name" adds pytest options)
ifeq ($(strip $(ARGS)),)
	@$(PYTEST) $(KERNEL_TESTS:%=--ignore=%)
	@$(PYTEST) $(KERNEL_TESTS)
else
	@$(PYTEST) $(ARGS)
endif

test-next: $(NEXT_STAMP) ## run the kernels' tests that need no torch, with a newer jax and libtpu
	@$(VENV_NEXT)/bin/python -m pytest -n 2 tests/without_torch $(ARGS)

test-torchtpu: $(TESTBED_COMPILER) ## run the ops' tests, and those of TorchTPU, with its torch
	@TORCH_RPA_NATIVE=0 OMP_NUM_THREADS=1 $(VENV_TORCHTPU)/bin/python -m pytest -n 2 --dist=worksteal \
	  $(or $(ARGS),$(TORCHTPU_TESTS))

# In a copy, for the extension of a source tree is that of one torch.
test-torch: $(BIN)/python ## run the tests that need no torch_xla with another torch, in .venv-torch (TORCH=2.14.1)
	@$(call new_environment,.venv-torch)
	@$(call install,.venv-torch) torch==$(TORCH) numpy packaging setuptools wheel $(TEST_PACKAGES)
	@.venv-torch/bin/python -c 'from setuptools import build_meta; build_meta.build_sdist(".venv-torch")' >/dev/null
	@tar -xzf .venv-torch/torch_rpa-*.tar.gz -C .venv-torch --transform 's|^[^/]*|source|'
	@cd .venv-torch/source && export PATH="$(CURDIR)/.venv-torch/bin:$$PATH" OMP_NUM_THREADS=1 && \
	  { TORCH_RPA_REQUIRE_NATIVE=1 python setup.py build_ext --inplace >build.log 2>&1 || { cat build.log; exit 1; }; } && \
	  python -m pytest -n $(TEST_PROCESSES) -m "not xla" $(ARGS)

test-install: $(BIN)/python ## install as README says, in .venv-install, and run an op there (TORCH_INDEX=URL: where torch is)
	@$(call new_environment,.venv-install)
	@$(call install,.venv-install) torch==2.9.0 setuptools $(TORCH_INDEX:%=--index-url %)
	@$(call install,.venv-install) --no-build-isolation ".[xla,hf]"
	cd .. && $(CURDIR)/.venv-install/bin/python -m torch_rpa.info
	for device in cpu xla; do .venv-install/bin/python tests/one_op.py $$device || exit 1; done

lint: $(PACKAGES_STAMP) ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(PACKAGES_STAMP) ## put the code in style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALL_STAMP) ## run every benchmark in benchmarks/
	@for file in benchmarks/bench_*.py; do \
	  echo "== $$file"; \
	  $(BIN)/python -m "benchmarks.$$(basename "$$file" .py)" $(ARGS) || exit 1; \
	done

soak: $(INSTALL_STAMP) ## serve thousands of random requests on XLA, with faults (ARGS="--output FILE" keeps the report)
	@$(BIN)/python -m benchmarks.soak $(ARGS)

family-table: $(INSTALL_STAMP) ## write the README's table of models from the tests' families
	@PYTHONPATH=. $(BIN)/python tests/hf/family_table.py

settings-table: $(INSTALL_STAMP) ## write docs/generation_settings.md: how each setting of transformers is taken
	@PYTHONPATH=. $(BIN)/python tests/hf/settings_table.py

bench-tpu: $(INSTALL_STAMP) $(PEER_STAMP) ## model the TPU kernel's time on v6e, v5e and 7x, beside its peers (they need tpusim)
	@$(BIN)/python -m benchmarks.bench_tpu_model --chip v6e v5e 7x --kernels ours v2 v3 $(ARGS)

aot-matrix: $(INSTALL_STAMP) ## write the README's table of models that fit on chips: 20 minutes; goes on where it stopped
	@$(BIN)/python -m benchmarks.aot_matrix $(ARGS)

compile-matrix: $(INSTALL_STAMP) ## compile the TPU kernel for every chip, model and dtype: 2 hours; goes on where it stopped
	@$(BIN)/python -m benchmarks.compile_matrix $(ARGS)

clean: ## remove builds and caches, keep .venv
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis torch_rpa/_C.*.so torch_rpa/no_native.txt $(INSTALL_STAMP)
	find . -name __pycache__ -not -path './.venv*/*' -prune -exec rm -rf {} +

distclean: clean ## remove the environments, too
	rm -rf .venv .venv-*

# $(call new_environment,folder) and $(call install,folder) PACKAGES, with uv where it is.
new_environment = if command -v uv >/dev/null 2>&1; then uv venv --quiet --clear --seed --python $(BIN)/python $(1); \
  else $(BIN)/python -m venv --clear $(1); fi
install = $$(if command -v uv >/dev/null 2>&1; then echo uv pip install --python $(1)/bin/python; \
  else echo $(1)/bin/python -m pip install --disable-pip-version-check; fi)

# ---- Set-up -----------------------------------------------------------------------------------------------------

is_python311 = "$$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' >/dev/null 2>&1

$(BIN)/python:
	@python=; \
	for candidate in $(PYTHON_CANDIDATES); do \
	  if $(is_python311); then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "error: Python 3.11 is needed, and is not at: $(PYTHON_CANDIDATES); install it, or name it with make PYTHON=/path/to/python3.11" >&2; \
	  exit 1; \
	fi; \
	echo "== Creating $(VENV) with $$("$$python" --version)"; \
	if command -v uv >/dev/null 2>&1; then \
	  uv venv --seed --python "$$(command -v "$$python")" $(VENV) && exit 0; \
	elif "$$python" -m venv $(VENV); then \
	  exit 0; \
	fi; \
	rm -rf $(VENV); \
	echo "error: $$python cannot create a virtual environment; on Debian and Ubuntu: sudo apt install python3.11-venv" >&2; \
	exit 1

# uv installs everything in under a minute and pip in about four, so a missing uv is worth a try to get one.
$(PACKAGES_STAMP): requirements.txt | $(BIN)/python
	@command -v uv >/dev/null 2>&1 || $(BIN)/python -m pip install --disable-pip-version-check uv==$(UV_VERSION) \
	  || echo "uv cannot be installed; going on with pip"
	@echo "== Installing the pinned packages (about 7 GB; a minute with uv, four with pip)"
	@if command -v uv >/dev/null 2>&1; then \
	  uv pip install --python $(BIN)/python --no-deps -r requirements.txt; \
	else \
	  $(BIN)/python -m pip install --disable-pip-version-check --no-deps -r requirements.txt; \
	fi
	@touch $@

# Beside .venv, and from the same Python.
$(NEXT_STAMP): requirements-next.txt | $(BIN)/python
	@echo "== Installing a newer jax and libtpu in $(VENV_NEXT) (about 1 GB)"
	@if command -v uv >/dev/null 2>&1; then \
	  uv venv --clear --python $(BIN)/python $(VENV_NEXT) && \
	  uv pip install --python $(VENV_NEXT)/bin/python --no-deps -r requirements-next.txt; \
	else \
	  $(BIN)/python -m venv --clear $(VENV_NEXT) && \
	  $(VENV_NEXT)/bin/python -m pip install --disable-pip-version-check --no-deps -r requirements-next.txt; \
	fi
	@touch $@

# With dependencies: what torch needs depends on its build. uv reads no environment variables of pip's.
$(TORCHTPU_STAMP): requirements-torchtpu.txt | $(BIN)/python
	@echo "== Installing TorchTPU in $(VENV_TORCHTPU) (2.3 GB with the CPU build of torch)"
	@start=$$(date +%s); \
	if command -v uv >/dev/null 2>&1; then \
	  uv venv --clear --python $(BIN)/python $(VENV_TORCHTPU) && \
	  uv pip install --python $(VENV_TORCHTPU)/bin/python $(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS)) \
	    -r requirements-torchtpu.txt; \
	else \
	  $(BIN)/python -m venv --clear $(VENV_TORCHTPU) && \
	  $(VENV_TORCHTPU)/bin/python -m pip install --disable-pip-version-check -r requirements-torchtpu.txt; \
	fi && \
	echo "== $$(du -sh $(VENV_TORCHTPU) | cut -f1) in $$(( $$(date +%s) - start )) s"
	@touch $@

# The packages are of use as files alone and stand beside the environment; the second one's own plugin is not needed.
$(TESTBED_LIBRARY): tests/torchtpu/plugin.cpp $(TORCHTPU_STAMP)
	@test -d $(TESTBED_HEADERS) || { \
	  $(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --target $(TESTBED)/plugin \
	    $(TESTBED_PACKAGES) && rm -f $(TESTBED)/plugin/xla_plugins/xla_cpu_pjrt/*.so; }
	@c++ -std=c++17 -O1 -Wall -shared -fPIC -I $(TESTBED_HEADERS) $< -o $@ -ldl

$(TESTBED_COMPILER): tests/torchtpu/compile.cpp $(TESTBED_LIBRARY)
	@c++ -std=c++17 -O1 -Wall -I $(TESTBED_HEADERS) $< -o $@ -ldl

$(PEER_STAMP): | $(NEXT_STAMP)
	@$(BIN)/python -m pip install --disable-pip-version-check --no-deps --target $(VENV_NEXT)/tpu-inference $(PEER)
	@touch $@

# Without build isolation: the extension must be built for the torch that stands in .venv. The last line prints a
# warning if there is no usable extension; that is no error, as everything works in pure Python, too.
$(INSTALL_STAMP): $(PACKAGES_STAMP) setup.py pyproject.toml $(NATIVE_SOURCES)
	@echo "== Building the native extension and installing torch_rpa in place (about a minute)"
	@if command -v uv >/dev/null 2>&1; then \
	  uv pip install --python $(BIN)/python --no-deps --no-build-isolation -e .; \
	else \
	  $(BIN)/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .; \
	fi
	@$(BIN)/python -c 'from torch_rpa import native; print("== Native extension:", "ready" if native.is_available() else "none")'
	@touch $@
