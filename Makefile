# Set-up and the two commands of the README. A bare Python >= 3.10 with pip and venv is all that is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SAMPLE := Resources/SampleData
# The version everything was measured with. On Linux without a GPU, a CPU build saves gigabytes: set TORCH to its wheel,
# or PIP_INDEX_URL to an index that has one.
TORCH ?= torch==2.13.0

# The oldest versions that pyproject.toml allows, but for PyTorch's, which has no small build for the CPU on every index.
OLDEST := .venv-oldest
OLDEST_PYTHON ?= $(shell command -v python3.11 || echo $(PYTHON))
CORE := test_grid test_fields test_physical_fields test_models test_supply

.PHONY: demo test test-oldest lint clean

demo: $(VENV)/installed
	$(BIN)/divregnet register $(SAMPLE)/fixed_T1.nii.gz $(SAMPLE)/moving_T2.nii.gz --output build/demo --overwrite \
	  --fixed-labels $(SAMPLE)/fixed_T1_labels.nii.gz --moving-labels $(SAMPLE)/moving_T2_labels.nii.gz \
	  --fixed-landmarks $(SAMPLE)/fixed_T1.mrk.json --moving-landmarks $(SAMPLE)/moving_T2.mrk.json
	@echo "picture: build/demo/preview.png"

# Two files at a time, with a thread each.
test: $(VENV)/installed-test
	OMP_NUM_THREADS=1 PYTHONUTF8=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-oldest: $(OLDEST)/installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -p no:cacheprovider $(CORE:%=Testing/unit/%.py) Testing/integration/test_cli.py

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install --quiet -e ".[test]"
	touch $@

$(OLDEST)/installed: pyproject.toml
	$(OLDEST_PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet "$(TORCH)"
	sed -n '/^dependencies/,/^]/s/^ *"\(.*\)>=\(.*\)",$$/\1==\2/p' pyproject.toml | grep -v ^torch > $(OLDEST)/versions
	$(OLDEST)/bin/python -m pip install --quiet -r $(OLDEST)/versions "pytest>=8" "hypothesis>=6.100"
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) build
