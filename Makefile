# make demo   train one Bayesian neural network twice, exact and randomized, and compare (under 3 minutes)
# make test   run the test suite
# make docs   build the site, all notebooks executed, into docs/_build/html (8 minutes)
# make package  build wheel and sdist into dist, and try both in an environment of their own (2 minutes)
# make lint   ruff (lint and format) and pyright
# make bench  run the benchmarks (minutes to hours); BENCH_ARGS selects the workload
# make bench-all  run all of them that are not stored or out of date (many hours; BENCH_ALL_ARGS="--quick --output DIR"
#             for tiny models)
# make bench-compiled  compile the benchmarks for an accelerator that is not there; DEVICE=h200 (default), h100, a100,
#             b200, v5e or v6e
# make bench-device  run the benchmarks on the accelerator that JAX finds in this environment (10 minutes)
# make clean  remove the virtual environments and every cache
#
# Needs only make, Python 3.11 to 3.13 and a package index. Options:
#   PYTHON=...       the interpreter (default: the first of python3.12, python3.13, python3.11, python3 that works)
#   VENV=...         the virtual environment (default: .venv)
#   DEMO_ARGS=...    options for examples/bnn.py, such as DEMO_ARGS="--dataset mnist --data-dir data" (default: codes of
#                    4 bits, so that there is noise to report; slices have a line of their own)
#   PYTEST_ARGS=...  more options for pytest: PYTEST_ARGS="-m slow" for the slow tests, "-m exhaustive" for the rest
#   BENCH_ARGS=...   workload and options of the benchmark, such as BENCH_ARGS="p2 --data-dir data" (default: p1)

SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))

# The first candidate that runs and has a supported version: a launcher that exists but fails is passed over.
PYTHON ?= $(shell for python in python3.12 python3.13 python3.11 python3 python; do \
	if $$python -c '$(SUPPORTED)' >/dev/null 2>&1; then echo $$python; break; fi; done)
VENV ?= .venv
DEMO_ARGS ?= --codec 4
PYTEST_ARGS ?=
BENCH_ARGS ?= p1
BENCH_ALL_ARGS ?=
DEVICE ?= h200

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test docs package lint bench bench-all bench-compiled bench-device clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

demo: $(VENV)/.installed-examples
	$(BIN)/python -m examples.bnn $(DEMO_ARGS)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n auto --maxprocesses 8 $(PYTEST_ARGS)

docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs docs/_build/html

# Without the sources: the script's folder is all that Python sees of them.
package: $(VENV)/.installed-dev
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m venv --clear $(VENV)-package
	for file in dist/*.whl dist/*.tar.gz; do \
		$(VENV)-package/bin/python -m pip --disable-pip-version-check install --quiet --force-reinstall \
			$$(test -e $(VENV)-package/tried && echo --no-deps) "$$file" && \
		$(VENV)-package/bin/python tests/smoke.py && touch $(VENV)-package/tried || exit 1; \
	done

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/.installed-examples
	$(BIN)/python -m examples.benchmarks.run $(BENCH_ARGS)

bench-all: $(VENV)/.installed-examples
	$(BIN)/python -m examples.benchmarks.all $(BENCH_ALL_ARGS)

# In an environment of its own: with the compilers installed, JAX would look for the devices in each of its processes.
bench-compiled:
	$(MAKE) --no-print-directory VENV=$(VENV)-compiled $(VENV)-compiled/.installed-compiled
	$(VENV)-compiled/bin/python -m examples.benchmarks.compiled $(DEVICE)

bench-device: $(VENV)/.installed-examples
	$(BIN)/python -m examples.benchmarks.device

# One stamp for each extra: pip runs once, and again when pyproject.toml changes.
$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	@echo "installing numpyro_rad[$*] into $(VENV) (a few minutes the first time)"
	@$(PIP) install --quiet --editable '.[$*]'
	@touch $@

$(BIN)/python:
	@chosen="$(PYTHON)"; \
	if [ -z "$$chosen" ]; then \
		echo "No working Python 3.11, 3.12 or 3.13 found: install one, or name it with make PYTHON=/path/to/python" >&2; \
		exit 1; \
	fi; \
	if ! "$$chosen" -c '$(SUPPORTED)'; then \
		echo "PYTHON=$$chosen does not run or is not Python 3.11, 3.12 or 3.13: name another one" >&2; \
		exit 1; \
	fi; \
	echo "creating $(VENV) with $$("$$chosen" --version)"; \
	"$$chosen" -m venv "$(VENV)"

clean:
	rm -rf "$(VENV)" "$(VENV)-compiled" "$(VENV)-package" .venv-3.* docs/_build build dist .pytest_cache .hypothesis
	find . \( -name __pycache__ -o -name .ruff_cache \) -type d -prune -exec rm -rf {} +
