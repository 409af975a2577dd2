# `make` sets everything up and runs the study; `make test` sets everything up and runs all checks.
PYTHON ?= $(shell command -v python3.11 || echo python3)
VENV := .venv
# DVC starts each stage as `python -m stages.<stage>`, which has to be the environment's Python.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export DVC_NO_ANALYTICS := 1

.PHONY: study setup test check tune bench clean

study: setup
	python -m stages.check
	dvc repro
	python -m sasrec.report.show

setup: $(VENV)/.installed

$(VENV)/.installed: requirements.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v == (3, 11) else f"Python 3.11 is needed, this is {v[0]}.{v[1]}; use make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

test: setup
	ruff check .
	ruff format --check .
	mypy
	python -m pytest

tune: setup
	python -m stages.tune

# What preparing, training and evaluation cost on this machine, beside a plain implementation; more: python -m stages.bench --help
bench: setup
	python -m stages.bench
	python -m sasrec.report.readme

clean:
	rm -rf data/raw data/prepared data/preflight.txt data/models data/exported data/evaluated data/resume data/logs
