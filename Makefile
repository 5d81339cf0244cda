# Needs Python >= 3.10, pip and make. Everything else goes into .venv, once: again only after pyproject.toml changed.
#   make demo    train, split and walk a real model; prints what it measured
#   make test    the tests, without those marked slow, gpu or trt
#   make test-all   the slow ones too, as CI does
#   make fuzz    5 minutes of coverage-guided fuzzing of all that reads bytes of others
#   make check   ruff, mypy --strict, and whether the tree in docs/structure.md is the tree
#   make site    the docs site, into build/site
#   make bench   what early exit saves on this machine; writes the figures of README.md and docs/measured.md
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ROOMS := benchmarks export models runtime training

.PHONY: demo test test-all fuzz check bench figures tree site clean
.DELETE_ON_ERROR:

demo: $(VENV)/.product
	$(BIN)/python benchmarks/demo.py

# Measures the walker on random networks and early exit on the demo's network, about half an hour on 2 idle cores, and writes the
# figures into README.md and docs/measured.md. Results of e5-small and MPNet come from benchmarks/early_exit.py and are kept.
bench: $(VENV)/.product demo/ckpt/training.json
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	$(BIN)/python benchmarks/overhead.py single --json benchmarks/results/overhead.json
	$(BIN)/python benchmarks/early_exit.py demo/ckpt --model MiniLM --data demo/data --truncate 1,2,3,4,5 --work demo/bench \
	  --json benchmarks/results/early_exit_minilm.json --report demo/bench.html
	$(BIN)/python benchmarks/overhead.py bulk --bundle demo/bench/ckpt.bundle --baselines demo/bench/ckpt.baselines \
	  --data demo/data/test.jsonl --json benchmarks/results/bulk_minilm.json
	$(BIN)/python benchmarks/overhead.py cold --bundle demo/bench/ckpt.bundle --baselines demo/bench/ckpt.baselines \
	  --json benchmarks/results/cold.json
	$(BIN)/python benchmarks/figures.py

demo/ckpt/training.json:
	$(MAKE) demo

figures: $(VENV)/.product
	$(BIN)/python benchmarks/figures.py

# pytest and not python -m pytest: the latter puts the current folder on sys.path, and the rooms would be there twice.
# Two processes; a file stays in one, since its tests share what is slow to make (tests/conftest.py).
PYTEST := $(BIN)/pytest -n 2

test: $(VENV)/.dev
	$(PYTEST)

test-all: $(VENV)/.dev
	$(PYTEST) -m 'not gpu and not trt'

fuzz: $(VENV)/.dev
	-$(BIN)/python -m pip install --quiet --group fuzz
	$(BIN)/python tests/fuzz.py --seconds 300

check: $(VENV)/.dev build/types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy -p offramp
	$(BIN)/python tests/test_house.py

tree: $(VENV)/.dev
	$(BIN)/python tests/test_house.py --write

site: $(VENV)/.dev build/types
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist offramp.egg-info

# mypy cannot follow pyproject's mapping of folders: links to the rooms stand in for it. Made anew each time: it costs nothing.
.PHONY: build/types
build/types:
	@rm -rf build/types && mkdir -p build/types/offramp
	@for room in $(ROOMS); do ln -s "$(CURDIR)/$$room" build/types/offramp/$$room; done

# pip 25.1 is the first that installs dependency groups; a fresh venv may hold an older one.
$(VENV)/.product: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "offramp needs Python 3.10 or newer, and '$(PYTHON)' is not; name another: make PYTHON=python3.12" >&2; exit 1; }
	@echo "installing offramp[train,export,cpu,serve] into $(VENV): some minutes the first time"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --editable '.[train,export,cpu,serve]'
	@touch $@

$(VENV)/.dev: $(VENV)/.product
	$(BIN)/python -m pip install --quiet --group dev
	@touch $@
