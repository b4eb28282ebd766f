# `make run` installs the dependencies, migrates the database and serves. `make` without a target lists the targets.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help run demo test check lint format tables bench chaos clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

run: .venv/runtime ## install the dependencies and serve on http://127.0.0.1:8000
	@exec $(BIN)/python main.py

demo: .venv/runtime ## like run, but add some well-known films first, if there are no movies
	@$(BIN)/python cli.py seed || echo "Serving the database as it is."
	@exec $(BIN)/python main.py

# Override PYTHONDONTWRITEBYTECODE so that bytecode is kept and each module is compiled only once.
test: .venv/dev ## run all tests, on SQLite and on PostgreSQL with Redis
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 3 --dist worksteal

check: lint ## run lint and the tests that start no server; use it before every commit
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -q -n 2 --dist worksteal -m "fast and not slow"

lint: .venv/dev ## check style, format and types, and that the installed packages are compatible
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .
	$(BIN)/python -m pip check --disable-pip-version-check

format: .venv/dev ## format the code, and fix what the linter can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

tables: .venv/dev ## rewrite the tree, the owners and the bounds in docs/architecture.md
	$(BIN)/python -m tests.project.architecture --write

bench: .venv/dev ## measure the bulk generator (docs/benchmarks.md)
	$(BIN)/python -m bench.generate

chaos: .venv/dev ## test the guarantee under faults, about twelve minutes; SEED=7 repeats a run (docs/chaos.md)
	$(BIN)/python -m tests.chaos $(if $(SEED),--seed $(SEED))

clean: ## remove the virtual environment and all caches
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis

.venv/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Marquee needs Python 3.11 or newer; try: make PYTHON=python3.12 run")'
	$(PYTHON) -m venv .venv
	@touch $@

.venv/runtime: .venv/python requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/dev: .venv/runtime requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@
