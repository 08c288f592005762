# make demo | test | lint | venv | clean; needs Python 3.10 to 3.12 and git.
SHELL := bash
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RECIPE := recipes/VoxCeleb/LGL
DEMO := results/demo
# The corpus has VoxCeleb's layout; its trial list names the speakers held out.
DEMO_OPTIONS := --data_folder=$(DEMO)/corpus --train_folder=$(DEMO)/corpus/wav \
	--trial_folder=$(DEMO)/corpus/wav --output_folder=$(DEMO)/run

.PHONY: help venv demo test test-speechbrain lint clean

help:
	@echo "make demo   the whole pipeline on a synthetic corpus (5 minutes)"
	@echo "make test   lint, doctests, unit and integration tests"
	@echo "make test-speechbrain SPEECHBRAIN_SRC=<its repository>"
	@echo "            its verification script, unmodified, against our scores"
	@echo "make lint   ruff, yamllint, codespell, mypy and import-linter only"
	@echo "make venv   the environment in $(VENV) that the others use"
	@echo "make clean  removes $(VENV), caches, builds and the demo's results"

venv: $(VENV)/.installed

# The stamp comes last: an interrupted installation is taken up again. pip's own
# words may name the user's package index: they go to a log, and its errors are
# shown without addresses. A download that broke off is worth a second attempt.
INSTALL = $(BIN)/python -m pip install --log $(VENV)/pip.log \
	-e '.[cpu,demo,test]' -c requirements.txt 2>&1 \
	| grep --line-buffered -oE '^(Collecting [^ ]+|Installing collected)'
$(VENV)/.installed: setup.py requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3,10) <= sys.version_info < (3,13))' \
	2>/dev/null || { echo "Python 3.10 to 3.12 is needed; '$(PYTHON)' is" \
	"$$($(PYTHON) -V 2>/dev/null || echo missing). Name another one:" \
	"make PYTHON=python3.11 venv" >&2; exit 1; }
	@echo "Installing into $(VENV): 6 GB, some minutes."
	@$(PYTHON) -m venv $(VENV)
	@set -o pipefail; $(INSTALL) || $(INSTALL) || { \
	grep -aE ' *(ERROR|[A-Za-z]*Error):' $(VENV)/pip.log | tail -n 5 \
	| sed -E "s#[a-z]+://[^ ]*|host='[^']*'#ADDRESS#g" >&2; \
	echo "pip failed twice: its log is $(VENV)/pip.log" >&2; exit 1; }
	@touch $@

demo: venv
	$(BIN)/lgl corpus $(DEMO)/corpus
	$(BIN)/python $(RECIPE)/train_lgl.py hparams/small_stage1.yaml \
	$(DEMO_OPTIONS) --number_of_epochs=1 --ssps_epochs=1
	$(BIN)/python $(RECIPE)/train_lgl.py hparams/small_stage2.yaml \
	$(DEMO_OPTIONS) --classifier_epochs=2 --gated_epochs=1
	$(BIN)/lgl report $(DEMO)/run

lint: venv
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/yamllint --no-warnings .
	@$(BIN)/codespell
	@$(BIN)/mypy
	@set -o pipefail; $(BIN)/lint-imports | sed -n '/^Contracts:/,$$p'

# One file to a worker at a time, so that its fixtures are built once; not those
# of many tests first, as a few of whole runs would keep one worker to the end.
test: lint
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile \
	--no-loadscope-reorder

# SpeechBrain's scripts are in its repository only, not in its package.
SCRIPT := recipes/VoxCeleb/SpeakerRec/speaker_verification_cosine.py
test-speechbrain: venv
	@test -f "$(SPEECHBRAIN_SRC)/$(SCRIPT)" || { echo "There is no" \
	"'$(SPEECHBRAIN_SRC)/$(SCRIPT)'. Name SpeechBrain's repository: make" \
	"test-speechbrain SPEECHBRAIN_SRC=/path/to/speechbrain" >&2; exit 1; }
	@SPEECHBRAIN_SRC="$(SPEECHBRAIN_SRC)" OMP_NUM_THREADS=1 \
	$(BIN)/python -m pytest -q tests/speechbrain

clean:
	rm -rf $(VENV) $(DEMO) build dist *.egg-info tests/tmp
	rm -rf .hypothesis .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
