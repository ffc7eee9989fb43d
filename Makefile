# make demo      learn three tasks, merge, serve, classify with the client, compare speeds
# make test      run the whole test suite
# make check     run ruff, mypy, and the fast tests
# make lint      run ruff and mypy
# make audit     check that the installed packages are pinned and have no known vulnerabilities
# make docs      build the documentation site in site/
# make results   run all methods and ablations on the small tasks, for RESULTS.md (hours on two cores)
# make scale     learn 50 synthetic tasks in a row: time and memory against learned tasks
# make mini      rebuild the small CLIP and its tasks from packages (needs npm, apt-get and hours on a CPU)
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PACKAGES := client trainer exporter

.PHONY: demo test check check-client audit lint results scale mini docs install

install: $(VENV)/.installed

# The stamp file is newer than these files once everything is installed; when one of them changes, install again.
$(VENV)/.installed: $(PACKAGES:=/pyproject.toml) pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' || { \
	  echo "$(PYTHON) is `$(PYTHON) --version 2>&1`: the pinned packages are for 3.11 (and 3.12, where a C compiler is);" \
	    "give another: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check 'pip>=25.1' # the first version with dependency groups
	@# An old clipweld owned the commands that the four distributions now install, so it must be uninstalled before.
	$(BIN)/pip uninstall --quiet --yes clipweld
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt $(PACKAGES:%=-e %) -e '.[all]' --group dev
	@touch $@

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
mini: install
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --group mini
	$(BIN)/python -m evidence.mini_recipe build --work runs/mini --out runs/mini/out --minutes $(MINUTES)

# A dead link or a page missing from the navigation is an error.
docs: install
	$(BIN)/python docs/build.py

# All tests of a file run in one process, which has its own server and computes on one core.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test: install
	$(PYTEST)

# Installed packages: check the pins, list them in runs/trust/sbom.json, look for known vulnerabilities if online.
audit: install
	$(BIN)/python -m evidence.trust.dependencies

# The first check of a change: under three minutes on two cores.
check: lint
	$(PYTEST) -m "not slow and not network"

# The client alone, as users install it, with any Python from 3.10 on.
check-client:
	$(PYTHON) -m venv .venv-client
	.venv-client/bin/pip install --quiet --disable-pip-version-check ./client
	.venv-client/bin/client --version
	.venv-client/bin/client classify --help > /dev/null
	.venv-client/bin/python -c 'import clipweld.client, sys; sys.exit("torch" in sys.modules)'

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
