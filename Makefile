# Each command creates .venv when it is absent (tools/setup_env.sh says how torch is chosen).
#   make demo                      train a small GPT with dense and with top-k attention
#   make test ARGS="-k gathered"   the tests; make test-fast leaves out what is slow (marker `slow`)
#   make bench                     the benchmarks, their tables and pictures
#   make fuzz CASES=100000         random calls of all ops against float64 oracles (or SECONDS=60; SEED, OPS)
#   make sanitize | soak           the ops under ASan, UBSan and TSan; an hour of calls from four threads (SECONDS)
#   make arm                       the CPU kernels on 64-bit ARM, cross-compiled and run under emulation
#   make docs | docs-check | docs-serve   the site in build/site; each page of it in a browser; while pages are written
#   make notebooks                 executes examples/notebooks on small settings
#   make wheels | release-check    the files of a release, in dist/; all that has to be true of them (CHECK="files wheel")
#   make lint | format | clean

VENV ?= .venv
export VENV
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py $(wildcard tools/*.py tools/*.sh triton_kernels/__init__.py) $(shell find csrc)
FORMAT_CPP := $(wildcard tests/*.cpp) $(shell find csrc tests/simt tests/simd -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
FORMAT_PY := .

# Processes that share the tests, each with two threads of torch; 0 runs them in one, as --pdb needs.
WORKERS ?= 2

# Of `make fuzz` and `make soak`; what is empty is left to them.
SEED ?= 0
CASES ?=
SECONDS ?=
OPS ?=
FUZZ_OPTIONS = --seed $(SEED) $(if $(CASES),--cases $(CASES)) $(if $(SECONDS),--seconds $(SECONDS))

.NOTPARALLEL:
.PHONY: demo test test-fast fuzz sanitize soak arm bench docs docs-check docs-serve notebooks wheels release-check lint format clean

demo: $(VENV)/.installed-cli
	@$(BIN)/sparse-attn demo $(ARGS)

test: $(VENV)/.installed-test
	@$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal tests $(ARGS)

test-fast: $(VENV)/.installed-test
	@$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m "not slow" tests $(ARGS)

fuzz: $(VENV)/.installed-test
	@cd tests && $(abspath $(BIN))/python -m fuzz $(FUZZ_OPTIONS) $(if $(OPS),--ops $(OPS)) $(ARGS)

soak: $(VENV)/.installed-test
	@cd tests && $(abspath $(BIN))/python -m fuzz soak $(FUZZ_OPTIONS) $(ARGS)

sanitize: $(VENV)/.installed-test
	@tools/sanitize.sh address
	@tools/sanitize.sh thread

arm:
	@python3 tests/simd/arm.py

bench: $(VENV)/.installed-bench
	@$(BIN)/sparse-attn bench $(ARGS)

docs: $(VENV)/.installed-docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

docs-check: $(VENV)/.installed-docs
	@$(BIN)/python tools/check_site.py $(ARGS)

docs-serve: $(VENV)/.installed-docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve --no-strict

notebooks: $(VENV)/.installed-notebooks
	@$(BIN)/python tools/run_notebooks.py $(ARGS)

wheels: $(VENV)/.installed-release
	@$(BIN)/python tools/wheels.py $(ARGS)

release-check: $(VENV)/.installed-release
	@$(BIN)/python tools/release_check.py $(CHECK)

lint: $(VENV)/.installed-lint
	@status=0; \
	$(BIN)/ruff check $(FORMAT_PY) || status=1; \
	$(BIN)/ruff format --check $(FORMAT_PY) || status=1; \
	$(BIN)/clang-format --dry-run --Werror $(FORMAT_CPP) || status=1; \
	$(BIN)/mypy || status=1; \
	$(BIN)/lint-imports >$(VENV)/imports.log 2>&1 || { cat $(VENV)/imports.log; status=1; }; \
	$(BIN)/python tools/house.py || status=1; \
	exit $$status

format: $(VENV)/.installed-dev
	@$(BIN)/ruff check --fix $(FORMAT_PY)
	@$(BIN)/ruff format $(FORMAT_PY)
	@$(BIN)/clang-format -i $(FORMAT_CPP)

# One stamp per extra; all of them are editable installs of the same tree, so any may follow any. What an extra has
# within it (pyproject.toml) is installed with it.
WITH_test := cli bench
WITH_dev := test $(WITH_test)
WITH_notebooks := cli
WITH_release := test docs notebooks $(WITH_test)
$(VENV)/.installed-%: $(SOURCES)
	@tools/setup_env.sh $*
	@touch $@ $(addprefix $(VENV)/.installed-,$(WITH_$*) $(AND_$*))

# The linters read sources: what is compiled may be old, or missing.
AND_dev := lint
$(VENV)/.installed-lint: pyproject.toml tools/setup_env.sh
	@tools/setup_env.sh dev
	@touch $@ $(addprefix $(VENV)/.installed-,dev $(WITH_dev))

clean:
	rm -rf build dist *.egg-info sparse_attn/_C*.so sparse_attn/libsparse_attn.* sparse_attn/_no_extension.txt
