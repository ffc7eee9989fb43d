# make demo      learn three tasks, merge, serve, ask the client, compare speeds
# make test      the whole test suite
# make lint      ruff and mypy
# make audit     what is installed, and whether it is known to be vulnerable
# make results  all methods and ablations on the small tasks: the runs behind RESULTS.md (hours on two cores)
# make scale    50 synthetic tasks in a row: time and memory against tasks learned
# make mini      rebuild the small CLIP and its tasks from packages (needs npm, apt-get and hours on a CPU)
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: demo test audit lint results scale mini install

install: $(VENV)/.installed

# The stamp is newer than the project's own files once everything is installed: set up once, again when they change.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' || { \
	  echo "$(PYTHON) is `$(PYTHON) --version 2>&1`: the pinned packages are for 3.11 (and 3.12, where a C compiler is);" \
	    "give another: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: install
	$(BIN)/python demo.py

results: install
	$(BIN)/python -m trainer.studies.mini --out runs/results
	$(BIN)/python -m trainer.studies.towers runs/results/short/methods/pool/order-0-seed-0 \
	  runs/results/short/ablations/no-anchors/order-0-seed-0 --out runs/results/towers.json
	$(BIN)/trainer report runs/results/long/methods
	$(BIN)/trainer report runs/results/long
	$(BIN)/trainer report runs/results/short

scale: install
	$(BIN)/python -m trainer.studies.scale --out runs/scale

# The small CLIP anew, into runs/mini/out: ten minutes of building tasks and pairs, then MINUTES of training.
MINUTES ?= 60
mini: install
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[mini]'
	$(BIN)/python -m trainer.mini.recipe build --work runs/mini --out runs/mini/out --minutes $(MINUTES)

test: install
	$(BIN)/pytest

# What is installed: pinned, listed (runs/trust/sbom.json), held against known vulnerabilities where they can be had.
audit: install
	$(BIN)/python -m trust.dependencies

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
