# `make demo` pre-trains a small SwinV2 and shows what it learned; `make test` runs every test. Both need only Python 3.11 or
# newer with venv, make, git and a C compiler: the first run builds .venv from pyproject.toml and constraints.txt.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Processes that run tests at once. Tests that start several ranks all run in one of them, one after another.
TEST_WORKERS ?= 2
DEMO_DATA ?= data/demo
DEMO_RUN ?= runs/demo
DEMO_IMAGES ?= 2000
DEMO_HELD_OUT ?= 200
# auto: one rank per GPU; the demo uses 2 ranks where there is no GPU.
DEMO_RANKS ?= $(shell test -e /dev/nvidia0 && echo auto || echo 2)

# Ninja lives in .venv and is looked up by name when an engine extension is compiled at run time.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-system-packages test-faults test-image lint format clean distclean

help:  ## Show this list.
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*  ## /  make \1\t/' | expand -t 28

setup: $(STAMP)  ## Build .venv (done by the other targets when needed).

demo: $(STAMP) $(DEMO_DATA)/shards/train/index.json $(DEMO_DATA)/shards/val/index.json  ## Render images, shard them, pre-train on 2 ranks, write a report: 6 to 10 minutes on 2 cores.
	$(BIN)/python -m launch --ranks $(DEMO_RANKS) -- pretrain configs/debug/demo.yaml run_dir=$(DEMO_RUN) \
	    data.train=$(DEMO_DATA)/shards/train data.validation=$(DEMO_DATA)/shards/val

# Another seed renders other pictures of the same classes: held out, for the validation loss.
$(DEMO_DATA)/shards/train/index.json: | $(STAMP)
	$(BIN)/python -m data_tools synth $(DEMO_DATA)/train --images $(DEMO_IMAGES) --seed 0 --overwrite
	$(BIN)/python -m data_tools shard folder $(DEMO_DATA)/train/images $(@D) --overwrite

$(DEMO_DATA)/shards/val/index.json: | $(STAMP)
	$(BIN)/python -m data_tools synth $(DEMO_DATA)/val --images $(DEMO_HELD_OUT) --seed 1 --overwrite
	$(BIN)/python -m data_tools shard folder $(DEMO_DATA)/val/images $(@D) --overwrite

# Two hosts on one machine (tests/launch/rig.py) and the image's Debian root (tests/docker) need these; without them, or without root, the
# tests that use them are skipped and say so.
test-system-packages:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	    ! { command -v ip && command -v pdsh && test -x /usr/sbin/sshd && test -x /usr/sbin/debootstrap; } >/dev/null 2>&1; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
	        debootstrap iproute2 openssh-client openssh-server pdsh \
	    || echo "The tests over two hosts and of the image will be skipped: their Debian packages could not be installed." >&2; \
	fi

test: $(STAMP) test-system-packages  ## Run all tests (those marked gpu are skipped without one).
	$(BIN)/python -m pytest -q -n $(TEST_WORKERS) --dist loadgroup tests $(TEST_ARGS)

test-faults: $(STAMP) test-system-packages  ## Break real runs over two hosts in every way we know, for some minutes; not part of test.
	$(BIN)/python -m pytest -q -m faults tests/launch $(TEST_ARGS)

test-image: $(STAMP) test-system-packages  ## Run the image's install steps in a Debian root, the gigabytes of Python packages too (root, debootstrap).
	SIMMIM_TEST_IMAGE=1 $(BIN)/python -m pytest -q tests/docker $(TEST_ARGS)

lint: $(STAMP)  ## Check style and formatting; changes nothing.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)  ## Apply the formatting and the safe fixes.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove caches and what the demo wrote.
	rm -rf $(DEMO_DATA) $(DEMO_RUN) .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean  ## Remove .venv too.
	rm -rf $(VENV) simmim_scale.egg-info

# The shell looks for a Python that torch has wheels for; names first that most systems mean by "the" Python.
$(STAMP): pyproject.toml constraints.txt
	@set -e; \
	if [ ! -x $(BIN)/python ] || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	    fits='import sys, ensurepip, venv; raise SystemExit(not (3, 11) <= sys.version_info < (3, 14))'; \
	    found=; \
	    for candidate in $(PYTHON) python3 python3.12 python3.11 python3.13 python; do \
	        if "$$candidate" -c "$$fits" >/dev/null 2>&1; then found=$$candidate; break; fi; \
	    done; \
	    if [ -z "$$found" ]; then \
	        echo "No Python 3.11, 3.12 or 3.13 with the venv module found; python3 is: $$(python3 --version 2>&1)." >&2; \
	        echo "Install one (Debian and Ubuntu: apt install python3 python3-venv), or name yours: make PYTHON=/path/to/python3.12" >&2; \
	        exit 1; \
	    fi; \
	    echo "Building $(VENV) with $$($$found --version) ..."; \
	    rm -rf $(VENV); \
	    "$$found" -m venv $(VENV); \
	fi
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)
