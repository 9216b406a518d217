# Set-up and the two commands of the README. A bare Python >= 3.10 with pip and venv is all that is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SAMPLE := Resources/SampleData
# The version everything was measured with. On Linux without a GPU, a CPU build saves gigabytes: set TORCH to its wheel,
# or PIP_INDEX_URL to an index that has one.
TORCH ?= torch==2.13.0

.PHONY: demo test lint clean

demo: $(VENV)/installed
	$(BIN)/divregnet register $(SAMPLE)/fixed_T1.nii.gz $(SAMPLE)/moving_T2.nii.gz --output build/demo --overwrite \
	  --fixed-labels $(SAMPLE)/fixed_T1_labels.nii.gz --moving-labels $(SAMPLE)/moving_T2_labels.nii.gz \
	  --fixed-landmarks $(SAMPLE)/fixed_T1.mrk.json --moving-landmarks $(SAMPLE)/moving_T2.mrk.json
	@echo "picture: build/demo/preview.png"

# Two files at a time, with a thread each.
test: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

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

clean:
	rm -rf $(VENV) build
