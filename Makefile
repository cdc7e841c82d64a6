# On a fresh machine, `make pretrain` and `make test` only need Python and make. They install everything else into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CORES := $(shell $(PYTHON) -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
# One process, on the GPU if there is one. On a CPU `accelerate launch` would otherwise use a single thread.
LAUNCH := $(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	--num_cpu_threads_per_process $(CORES)
ARGS ?=
PRETRAINED ?= output/pretrain
SQUAD ?= output/squad
STUDY ?= decay
INSTALL := $(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt

# Without a pinned version, pip would replace an installed CPU build of torch by one with gigabytes of CUDA libraries.
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: pretrain squad docs studies results gpu test compat quality format clean

# Pretrain a tiny FNL-BERT on the embedded corpus: make pretrain ARGS="--decay_mode weight --output_dir output/weight"
pretrain: $(VENV)/.run
	$(LAUNCH) run_pretrain.py --resume_from_checkpoint auto $(ARGS)

# Fine-tune it on the embedded question answering sample, and ask it a question.
squad: $(VENV)/.run
	@test -f $(PRETRAINED)/all_results.json || $(MAKE) pretrain ARGS="--output_dir $(PRETRAINED)"
	$(LAUNCH) run_squad.py configs/squad_sample.yaml --model_name_or_path $(PRETRAINED) --output_dir $(SQUAD) \
		--resume_from_checkpoint auto $(ARGS)
	$(BIN)/python -c "import fnl_hf; print(fnl_hf.ask('$(SQUAD)', 'What does a list keep?', \
		'A list keeps an ordered row of references to objects, and it can grow or shrink.'))"

# Run the missing runs of a study; it can be stopped and restarted: make studies STUDY=decay ARGS="--minutes 60"
studies: $(VENV)/.run
	$(BIN)/python -m studies $(STUDY) $(ARGS)

# Render docs/results.md and its plots from the recorded runs.
results: $(VENV)/.run
	$(BIN)/python -m studies.report

# Measure what is missing on this machine's GPU; it can be stopped and restarted: make gpu ARGS="decay adamw"
gpu: $(VENV)/.run
	$(BIN)/python benchmarks/on_gpu.py $(ARGS)

# Build the documentation site in output/site.
docs: $(VENV)/.dev
	$(BIN)/python -m sphinx -E -W --keep-going -q docs output/site

test: quality
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

# Run the tests with the oldest and with the newest versions that pyproject.toml allows: make compat ARGS="tests/optim -x".
compat: .venv-oldest/.test .venv-newest/.test
	status=0; for each in oldest newest; do \
		.venv-$$each/bin/python -m pytest -n 2 --dist worksteal $(ARGS) || status=1; \
	done; exit $$status

quality: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.run: pyproject.toml constraints.txt
	$(INSTALL) -e '.[onnx]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	$(INSTALL) -e '.[dev]'
	touch $@ $(VENV)/.run

.venv-oldest/.test: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-oldest
	$(PYTHON) tests/project/oldest_versions.py pyproject.toml | grep -v '^torch==' > .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install -q -c .venv-oldest/constraints.txt $(TORCH) -e '.[test]'
	touch $@

.venv-newest/.test: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install -q --upgrade --upgrade-strategy eager $(TORCH) -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
