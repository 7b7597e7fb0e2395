# make demo        compile, verify and run a small model: no torch, no download, no NPU
# make test        the test suite             make test-deep   with more examples
# make lint        ruff and pyright           make readme      its outputs, written again
# make matrix      every family by every exporter, raised and compared
# make docs        docs/what-omforge-knows-about-atc.md, from the tables
# make clean
#
# Everything happens in a virtual environment of its own, $(VENV), made on first use.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

MODEL := examples/models/docs-llama-onnx
SOC := Ascend310P3
PROMPT := This method raises ValueError if
OUT := out
BUNDLE := $(OUT)/docs-llama

.PHONY: demo test test-deep lint matrix docs readme clean

demo: $(VENV)/.installed
	@mkdir -p $(OUT)
	$(BIN)/omforge compile $(MODEL) --target $(SOC) --compare-each -o $(BUNDLE)
	@echo
	$(BIN)/omforge verify $(BUNDLE)
	@echo
	$(BIN)/omforge run $(BUNDLE) --level lowered --prompt "$(PROMPT)" --max-new-tokens 64 | tee $(OUT)/lowered.txt
	@echo
	$(BIN)/python examples/greedy_from_export.py $(BUNDLE) --prompt "$(PROMPT)" --max-new-tokens 64 > $(OUT)/exported.txt
	@test -s $(OUT)/lowered.txt
	cmp $(OUT)/lowered.txt $(OUT)/exported.txt
	@echo "identical: the lowered graphs and the export generate the same text"

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 -m "not deep"

test-deep: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

# The outputs and tables in README.md, from the commands themselves.
matrix: $(VENV)/.installed
	$(BIN)/python -m tests.matrix

docs: $(VENV)/.installed
	$(BIN)/python -m omforge.lowering.docs docs/what-omforge-knows-about-atc.md

readme: $(VENV)/.installed
	$(BIN)/python -m tests.readme

clean:
	rm -rf $(VENV) $(OUT) build dist omforge.egg-info .pytest_cache .ruff_cache .hypothesis

# Stamps, so that a second run installs nothing.
$(VENV)/.made:
	@command -v "$(PYTHON)" > /dev/null || { echo "$(PYTHON) was not found: install Python 3.11 or newer, or say make PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "omforge needs Python 3.11 or newer, and %s is %d.%d: say make PYTHON=..." % (sys.executable, v[0], v[1]))'
	"$(PYTHON)" -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.made pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.made pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@
