# On a fresh clone `make lab` or `make test` is the only step: each sets up .venv first, once.
#
#   make lab PYTHON=python3.12        another Python than python3
#   make oldest UV_OPTIONS="--torch-backend cpu"   uv's own options, here for torch without CUDA
#   make lab TORCH_INDEX=URL          torch from that package index, e.g. for another CUDA version
#
# An environment of your own works as well: pip install -e ".[lab,test]", then VENV= on the command line
# names it: make test VENV=$VIRTUAL_ENV

PYTHON ?= python3
VENV = .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/fluxedu-is-set-up
TORCH_INDEX ?=
UV_OPTIONS ?=
PYTHONS ?= python3.10 python3.11 python3.12 python3.13
CPU_INDEX = https://download.pytorch.org/whl/cpu
PIP = $(BIN)/python -m pip install --disable-pip-version-check

# The bounds are written once, in pyproject.toml.
TORCH := $(shell sed -n 's/^ *"\(torch[<>=][^"]*\)".*/\1/p' pyproject.toml)
# Where PyTorch's own index cannot be reached: the newest version that other indices are known to offer without CUDA.
TORCH_FALLBACK = $(TORCH),<2.14
NOTEBOOKS = $(wildcard notebooks/*.ipynb notebooks/solved/*.ipynb)

# Linux wheels of torch on PyPI carry gigabytes of CUDA. So: a GPU here, PyPI's build; none, the CPU build
# from PyTorch's own index (the wheel alone: the next line brings what it needs, from the usual place).
# That index alone is asked there: an extra index in pip's configuration may offer a newer build, with CUDA.
# Where it is out of reach, whatever the configured index offers.
# On macOS, PyPI's build is the right one in any case. An installed torch within the bound is left alone.
define INSTALL_TORCH
	@set -e; if [ -n "$(TORCH_INDEX)" ]; then \
	  echo "torch: from $(TORCH_INDEX)"; \
	  $(PIP) --index-url "$(TORCH_INDEX)" "$(TORCH)"; \
	elif [ "$$(uname -s)" != Linux ] || nvidia-smi -L >/dev/null 2>&1; then \
	  echo "torch: PyPI's build for this machine"; \
	  $(PIP) "$(TORCH)"; \
	else \
	  echo "torch: no NVIDIA GPU here, so the CPU build"; \
	  PIP_EXTRA_INDEX_URL=$(CPU_INDEX) $(PIP) --timeout 10 --retries 1 --no-deps --index-url $(CPU_INDEX) "$(TORCH)" || \
	  { echo "torch: $(CPU_INDEX) did not answer, so from the configured index"; $(PIP) "$(TORCH_FALLBACK)"; }; \
	fi
endef

# Two workers on two cores, so one thread each.
ONE_THREAD = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
NBVAL = --nbval --nbval-current-env --nbval-sanitize-with=notebooks/nbval.cfg --nbval-cell-timeout=120

# once, and again after a change of the packages
NPM_CI = { [ web/node_modules/.package-lock.json -nt web/package-lock.json ] || npm ci --prefix web; }

.PHONY: help setup lab test check web bench notebooks oldest newest pythons smoke train evidence docs fuzz
.DEFAULT_GOAL := help

help:           ## this list
	@sed -n 's/^\([a-z]*\): .*## /  make \1	/p' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv with everything the other targets need; once

lab: $(STAMP)   ## open the course in JupyterLab, on a copy in fluxedu-course/
	$(BIN)/fluxedu lab

test: $(STAMP)  ## run the tests, then every notebook against its stored output
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 tests
ifneq ($(NOTEBOOKS),)
	$(ONE_THREAD) $(BIN)/python -m pytest $(NBVAL) -n 2 --dist loadfile $(NOTEBOOKS)
endif

fuzz: $(STAMP)  ## try 10,000 damaged files and nonsense calls; others with SEED=abc, and another number with CASES=500
	FLUXEDU_FUZZ_CASES=$(or $(CASES),10000) FLUXEDU_FUZZ_SEED=$(SEED) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q \
		tests/property -k fuzz

check: $(STAMP) ## style, format, which way imports point, and whether the front end's bundles are those of web/src
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	@if ! command -v npm >/dev/null; then \
	  echo "left out, as there is no npm: whether the bundles are those of web/src"; \
	elif ! $(NPM_CI); then \
	  echo "left out, as npm could not install web/package-lock.json: whether the bundles are those of web/src"; \
	else node web/build.mjs --check; fi

web:            ## build the front end's bundles from web/src; needs node and npm
	$(NPM_CI)
	node web/build.mjs

bench: $(STAMP) ## measure speed and memory, into bench.json; how fast explorers and the page answer, into figures.json
	$(BIN)/fluxedu bench --out bench.json
	FLUXEDU_LATENCY=1 FLUXEDU_FIGURES=figures.json $(BIN)/python -m pytest -q -s tests/browser/test_latency.py \
		tests/browser/test_play.py tests/behaviour/test_word_maps_on_the_miniature.py

notebooks: $(STAMP) ## make and run both editions of every notebook from notebooks/source/
	$(ONE_THREAD) $(BIN)/python -m fluxedu.course.build notebooks

# What a fresh environment gets is the newest of everything within the bounds; this is the other end of them. Needs uv,
# which can resolve that way, and is installed into the environment itself.
oldest:         ## the tests with the lowest versions the bounds allow, in an environment of its own, .venv-oldest
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --disable-pip-version-check --quiet uv
	.venv-oldest/bin/uv pip install --python .venv-oldest/bin/python --resolution lowest-direct $(UV_OPTIONS) -e ".[lab,test]"
	$(ONE_THREAD) .venv-oldest/bin/python -m pytest -n 2 tests

newest:         ## the tests with the newest versions the bounds allow, in a fresh environment, .venv-newest
	rm -rf .venv-newest
	$(MAKE) test VENV=.venv-newest

pythons: $(STAMP) ## install the wheel in other Pythons, one after the other, and try it there
	rm -rf dist && $(BIN)/python -m pip wheel --disable-pip-version-check --quiet --no-deps --wheel-dir dist .
	set -e; for python in $(PYTHONS); do \
	  $(MAKE) --no-print-directory smoke PYTHON=$$python VENV=.venv-smoke; \
	done

smoke:
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(INSTALL_TORCH)
	$(PIP) --quiet dist/*.whl
	cd $(VENV) && bin/python ../tests/smoke.py

train: $(STAMP) ## train the miniature from scratch
	$(BIN)/fluxedu train --all

evidence: $(STAMP) ## run the experiments behind the course's claims that have no stored results; hours
	$(ONE_THREAD) $(BIN)/python -m evidence

docs: $(STAMP)  ## build the site into docs/_build/html, offline; check its links, its pages in a browser, every example in a docstring
	@$(BIN)/python -c 'import furo, latex2mathml, linkcheck, myst_nb, sphinx' 2>/dev/null || $(PIP) --quiet --editable ".[docs]"
	$(BIN)/python -m sphinx --fail-on-warning --keep-going -q docs docs/_build/html
	$(BIN)/linkchecker --config docs/linkcheckerrc --no-status --quiet docs/_build/html/index.html
	$(ONE_THREAD) $(BIN)/python -m pytest --doctest-modules fluxedu tests/browser/test_site.py

# pip compiles 20,000 modules on one core, which takes a minute; compileall uses all cores. It fails on the few modules
# that are broken on purpose, as data for their packages' tests.
$(STAMP): PIP += --no-compile
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "fluxedu needs Python 3.10 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Name another: make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "$(PYTHON) could not make $(VENV); on Debian and Ubuntu, install python3-venv first."; rm -rf $(VENV); exit 1; }
	$(PIP) --compile --quiet --upgrade pip
	$(INSTALL_TORCH)
	$(PIP) --editable ".[lab,test]"
	$(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null || true
	@touch $@
