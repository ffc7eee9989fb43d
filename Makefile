# make demo      learn three tasks, merge, serve, classify with the client, compare speeds
# make test      run the whole test suite
# make check     run ruff, mypy, and the fast tests
# make lint      run ruff and mypy
# make audit     check that the installed packages are pinned and have no known vulnerabilities
# make docs      build the documentation site in site/
# make wheels    build the four distributions in dist/
# make lock      pin the newest releases of all packages
# make results   run all methods and ablations on the small tasks, for RESULTS.md (hours on two cores)
# make scale     learn 50 synthetic tasks in a row: time and memory against learned tasks
# make mini      rebuild the small CLIP and its tasks from packages (needs npm, apt-get and hours on a CPU)
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PACKAGES := client trainer exporter
SERVER := exporter/src/clipweld/exporter/serving
# Both install what requirements/ pins, and check its hashes; uv is faster.
UV     := $(shell command -v uv)
PIP    := $(if $(UV),$(UV) pip install --python $(BIN)/python --compile-bytecode,$(BIN)/python -m pip install --disable-pip-version-check) --quiet --no-deps

.PHONY: demo test check check-client audit lint results scale mini docs install install-dev lock wheels

# What people run: the three commands, and Triton in an environment of its own.
install: $(VENV)/.installed
# What tests, checks and documentation need in addition.
install-dev: $(VENV)/.installed-dev

# Each stamp file is newer than what it was made from; when one of those changes, that is made again.
$(VENV)/.locked: requirements/run.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "$(PYTHON) is `$(PYTHON) --version 2>&1`: what is pinned is for 3.11 to 3.13;" \
	    "give another: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) --require-hashes -r requirements/run.txt
	@touch $@

$(VENV)/.installed: $(VENV)/.locked $(PACKAGES:=/pyproject.toml) pyproject.toml $(wildcard $(SERVER)/server-*.txt)
	$(PIP) --no-build-isolation $(PACKAGES:%=-e ./%) -e .
	$(BIN)/exporter install-server
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements/dev.txt
	$(PIP) --require-hashes -r requirements/dev.txt
	@touch $@

# Pin the newest releases again, with hashes and without addresses. Needs uv.
LOCK := $(UV) pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-header \
  --no-annotate $(PACKAGES:%=--no-emit-package clipweld-%)
lock:
	$(LOCK) pyproject.toml --extra all --group dev --group mini -o requirements/dev.txt
	$(LOCK) pyproject.toml --extra train --extra export --extra figure --group build -c requirements/dev.txt -o requirements/run.txt
	$(LOCK) exporter/pyproject.toml -c requirements/dev.txt -o requirements/exporter.txt # of deploy/exporter.Dockerfile

demo: install
	$(BIN)/python demo.py

results: install
	$(BIN)/python -m evidence.studies.mini --out runs/results
	$(BIN)/python -m evidence.studies.towers runs/results/short/methods/pool/order-0-seed-0 \
	  runs/results/short/ablations/no-anchors/order-0-seed-0 --out runs/results/towers.json
	$(BIN)/python -m evidence.studies.routing --out runs/results/routing.json
	$(BIN)/trainer report runs/results/long/methods
	$(BIN)/trainer report runs/results/long
	$(BIN)/trainer report runs/results/short

scale: install
	$(BIN)/python -m evidence.studies.scale --out runs/scale

# Rebuild the small CLIP in runs/mini/out: ten minutes to build tasks and pairs, then MINUTES of training.
MINUTES ?= 60
mini: install-dev
	$(BIN)/python -m evidence.mini_recipe build --work runs/mini --out runs/mini/out --minutes $(MINUTES)

# A dead link or a page missing from the navigation is an error.
docs: install-dev
	$(BIN)/python docs/build.py

# All tests of a file run in one process, which has its own server and computes on one core.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test: install-dev
	$(PYTEST)

# Installed packages: check the pins, list them in runs/trust/sbom.json, look for known vulnerabilities if online.
audit: install-dev
	$(BIN)/python -m evidence.trust.dependencies

# The first check of a change: under three minutes on two cores.
check: lint
	$(PYTEST) -m "not slow and not network"

# The client alone, as users install it, with any Python from 3.11 on.
check-client:
	$(PYTHON) -m venv .venv-client
	.venv-client/bin/pip install --quiet --disable-pip-version-check ./client
	.venv-client/bin/client --version
	.venv-client/bin/client classify --help > /dev/null
	.venv-client/bin/python -c 'import clipweld.client, sys; sys.exit("torch" in sys.modules)'

# The four distributions, in dist/.
wheels: install-dev
	rm -rf dist
	for folder in . $(PACKAGES); do (cd $$folder && $(CURDIR)/$(BIN)/hatchling build --directory $(CURDIR)/dist) || exit 1; done

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
