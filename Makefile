# make demo      learn three tasks, merge, serve, ask the client, compare speeds
# make test      the whole test suite
# make check     ruff, mypy, and the tests that are fast
# make lint      ruff and mypy
# make audit     what is installed, and whether it is known to be vulnerable
# make docs      the documentation site, into site/
# make results  all methods and ablations on the small tasks: the runs behind RESULTS.md (hours on two cores)
# make scale    50 synthetic tasks in a row: time and memory against tasks learned
# make mini      rebuild the small CLIP and its tasks from packages (needs npm, apt-get and hours on a CPU)
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PACKAGES := client trainer exporter

.PHONY: demo test check check-client audit lint results scale mini docs install

install: $(VENV)/.installed

# The stamp is newer than the project's own files once everything is installed: set up once, again when they change.
$(VENV)/.installed: $(PACKAGES:=/pyproject.toml) pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' || { \
	  echo "$(PYTHON) is `$(PYTHON) --version 2>&1`: the pinned packages are for 3.11 (and 3.12, where a C compiler is);" \
	    "give another: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check 'pip>=25.1' # the first that knows dependency groups
	@# Before there were four distributions, the commands were clipweld's: removed last, it would take theirs along.
	$(BIN)/pip uninstall --quiet --yes clipweld
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt $(PACKAGES:%=-e %) -e '.[all]' --group dev
	@touch $@

demo: install
	$(BIN)/python demo.py

results: install
	$(BIN)/python -m evidence.studies.mini --out runs/results
	$(BIN)/python -m evidence.studies.towers runs/results/short/methods/pool/order-0-seed-0 \
	  runs/results/short/ablations/no-anchors/order-0-seed-0 --out runs/results/towers.json
	$(BIN)/trainer report runs/results/long/methods
	$(BIN)/trainer report runs/results/long
	$(BIN)/trainer report runs/results/short

scale: install
	$(BIN)/python -m evidence.studies.scale --out runs/scale

# The small CLIP anew, into runs/mini/out: ten minutes of building tasks and pairs, then MINUTES of training.
MINUTES ?= 60
mini: install
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --group mini
	$(BIN)/python -m evidence.mini_recipe build --work runs/mini --out runs/mini/out --minutes $(MINUTES)

# Strict: a dead link, or a page that the navigation leaves out, fails.
docs: install
	$(BIN)/python docs/build.py

# A file of tests goes to one process, which has a server of its own; each computes on one core.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test: install
	$(PYTEST)

# What is installed: pinned, listed (runs/trust/sbom.json), held against known vulnerabilities where they can be had.
audit: install
	$(BIN)/python -m evidence.trust.dependencies

# What a change is checked with first: under three minutes on two cores.
check: lint
	$(PYTEST) -m "not slow and not network"

# The client as people install it, without the rest: any Python from 3.10 on.
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
