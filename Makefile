# run: install, migrate and serve.  test: install what the tests need and run all of them.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test lint bench chaos clean

run: .venv/runtime
	@exec $(BIN)/python main.py

# Bytecode is kept, whatever the environment says: pytest rewrites, and each start of the service compiles, only once.
test: .venv/dev
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 3 --dist worksteal

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .

bench: .venv/dev
	$(BIN)/python -m bench.generate

# About twelve minutes; SEED=7 repeats a run. docs/chaos.md
chaos: .venv/dev
	$(BIN)/python -m tests.chaos.__main__ $(if $(SEED),--seed $(SEED))

clean:
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
