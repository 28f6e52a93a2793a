# Each target sets up all it needs on a fresh machine: Python 3.11 or newer as python3, and a network.

VENV ?= .venv
PYTHON ?= python3
# Installed before anything else. Another build, say the one without CUDA:
#   make test TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= $(shell sed -n 's/^\(torch==[^ ]*\).*/\1/p' constraints.txt)
# Processes that share the tests; 0 for none, to debug in.
WORKERS ?= logical
# benchmarks/<name>.py, run without arguments, writes benchmarks/results/<name>.json
BENCHMARKS ?= no_shrinkage ot_accuracy digits globals_and_dependence svi_step_cost \
	unrolled_gradients iris_ellipsoids simulator_recovery \
	posterior_exact posterior_calibration learning_and_calibration distributed_scaling

PY := $(VENV)/bin/python
PACKAGING := pyproject.toml setup.py constraints.txt
# A stamp is an empty file that says: this is installed, as the files it depends on asked for.
STAMP := $(VENV)/.stamp
# The warning tells of folders that could shadow the editable install; here they are the package itself.
INSTALL = PYTHONWARNINGS="ignore:Editable installation" $(PY) -m pip install --quiet --constraint $(VENV)/constraints.txt

.PHONY: help quickstart test lint test-slow bench docs clean

help: ## what can be made
	@awk -F ':|## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$3}' $(firstword $(MAKEFILE_LIST))

quickstart: $(STAMP)-examples ## install, and run examples/quickstart.py
	@$(PY) examples/quickstart.py

test: $(STAMP)-dev ## the tests, without the slow ones
	@$(PY) -m pytest -q -m "not slow" -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

test-slow: $(STAMP)-dev ## the slow tests
	@$(PY) -m pytest -q -m slow --timeout 3600 $(PYTEST_ARGS)

lint: $(STAMP)-dev ## style, formatting, types
	@status=0; \
	$(PY) -m ruff check --quiet . || status=1; \
	$(PY) -m ruff format --check . || status=1; \
	$(PY) -m mypy || status=1; \
	exit $$status

docs: $(STAMP)-docs ## the documentation, in build/docs/html; warnings are errors
	@$(PY) -m sphinx -q -W --keep-going -b html -d build/docs/doctrees docs build/docs/html
	@echo "build/docs/html/index.html"

bench: $(STAMP)-benchmarks ## the benchmarks; results in benchmarks/results/
	@mkdir -p benchmarks/results
	@for name in $(BENCHMARKS); do \
		result=benchmarks/results/$$name.json; \
		echo "benchmarks/$$name.py"; \
		touch $(STAMP)-bench-started; \
		$(PY) benchmarks/$$name.py || exit 1; \
		if [ ! -s $$result ] || [ $(STAMP)-bench-started -nt $$result ]; then \
			echo "benchmarks/$$name.py did not write $$result" >&2; exit 1; \
		fi; \
	done
	@$(PY) benchmarks/render.py

clean: ## remove build products and caches; the next make installs anew, into the same environment
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis $(STAMP)-*
	@find pyro_sinkhorn models tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# dependency groups need pip 25.1
$(STAMP)-python:
	@if [ ! -x $(PY) ]; then \
		$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
			echo "pyro_sinkhorn needs Python 3.11 or newer, but $(PYTHON) is: $$($(PYTHON) --version 2>/dev/null || echo missing)." >&2; \
			echo "Name a newer one: make PYTHON=python3.12 ..." >&2; exit 1; }; \
		echo "Creating the environment $(VENV)"; \
		$(PYTHON) -m venv $(VENV) || exit 1; \
	fi
	@$(PY) -m pip install --quiet --disable-pip-version-check "pip>=25.1"
	@touch $@

# torch first and alone, so that the choice of its build stands; from then on that build is the constraint
$(STAMP)-torch: $(STAMP)-python constraints.txt
	@echo "Installing $(firstword $(TORCH)) (once; it is large)"
	@$(PY) -m pip install --quiet $(TORCH)
	@grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	@$(PY) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >> $(VENV)/constraints.txt
	@touch $@

$(STAMP)-examples: $(STAMP)-torch $(PACKAGING)
	@echo "Installing pyro_sinkhorn and what its examples need"
	@$(INSTALL) --editable ".[examples]"
	@touch $@

$(STAMP)-dev: $(STAMP)-torch $(PACKAGING)
	@echo "Installing pyro_sinkhorn and what its tests need"
	@$(INSTALL) --editable ".[examples]" --group dev
	@touch $@

$(STAMP)-docs: $(STAMP)-torch $(PACKAGING)
	@echo "Installing pyro_sinkhorn and what its documentation needs"
	@$(INSTALL) --editable ".[examples]" --group docs
	@touch $@

$(STAMP)-benchmarks: $(STAMP)-torch $(PACKAGING)
	@echo "Installing pyro_sinkhorn and what its benchmarks need"
	@$(INSTALL) --editable ".[benchmarks]"
	@touch $@
