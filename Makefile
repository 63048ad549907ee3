# make demo: the paper's experiment in small.  make test: lint, types and all tests but the longest.
# make slow: the longest tests.  make faults: kills, damaged files and very many epochs.
PYTHON ?= python3.11
BIN := .venv/bin
TRAIN := --data digits --width 0.25 --epochs 8 --batch-size 64 --lr 1e-3 --seeds 3 --output-layer separate

.PHONY: demo test slow faults clean

demo: .venv/installed
	$(BIN)/layerwise compare resnet18 --hierarchies 2,2,2,2 1,1,2,2 $(TRAIN) --output runs/demo

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -q -m "not slow"

# what takes longest: restarts by torchrun, hanging ranks, grids of ranks, Slurm and Ray where installed
slow: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -m slow

# kills at random moments, damaged files, very many epochs: half an hour on one core
faults: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults --seed 0 --kills 300

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv runs .pytest_cache .mypy_cache .ruff_cache
