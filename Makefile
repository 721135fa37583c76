# make demo            a document is stored, then questions about it are answered by a new process, cold
# make demo DOC=FILE   ... your document      MODEL=NAME_OR_FOLDER   ... your model
# make test            everything that runs without a GPU
# make compat          the contract tests on other releases of transformers than the pinned one (COMPAT="5.20.0 5.23.0")
# make package-test    the wheel, installed in an environment of its own: the quick example, the command, an evaluation
# make lint            ruff, import-linter and mypy
# make docs            the docs site, in site/ (strict: no dead link, no page left out; no network)
# make faults          the long form of the fault suite (FAULTS_SCALE=10 FAULTS_SEED=1)
# make bench           time to first token of every system, cold, interleaved (BENCH_ARGS=...)
# make store-bench     look-up, opening, checksums, publishing, accounting (STORE_BENCH_ARGS=...)
# make eval            every system: time to first token and quality, as a report in .cache/eval-report (under 20 minutes;
#                      local data by CONTIGUOUSKV_DATA=FOLDER, else from the Hub; EVAL_ARGS=... for other tasks or sizes)
# make eval-streams    every system on request streams: tail latency and hit rates, as a report in .cache/streams-report
# make policies        which chunks to keep in memory: every eviction policy on a recorded trace (POLICIES_ARGS=...)
# make timeline        what one request does when, as pictures in docs/pictures
# make warm-bench      requests whose chunks are in memory, beside a cache of only the kept tokens (WARM_ARGS=...)
# make gpu             on a machine with CUDA: are answers right, how long do requests take, where does the time go (eight
#                      minutes; results in GPU_OUT; GPU_ARGS=--rehearse on any machine, in a minute)
# make clean           remove the virtual environment, the demo's store and the tools' caches
#
# The first call makes .venv; later calls install nothing. PYTHON=python3.12 picks the interpreter (3.11 to 3.13).
# TORCH_ARGS is added when torch is installed, for example to choose an index that has a smaller build:
#   make demo TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
VENV ?= .venv
DOC ?=
MODEL ?=
DEMO_ARGS ?=
TEST_ARGS ?=
BENCH_ARGS ?=
STORE_BENCH_ARGS ?=
WARM_ARGS ?=
POLICIES_ARGS ?=
GPU_ARGS ?=
GPU_OUT ?= .cache/gpu
EVAL_ARGS ?= --task sst2 --task subj --task trec --task needle_multikey --requests 15 \
  --timed-requests 5 --budget 0.05 --budget 0.25
EVAL_OUT ?= .cache/eval-report
STREAMS_ARGS ?= --stream shared_documents --stream conversations --stream-requests 120 --documents 12 --budget 0.1 \
  --system reload --system attentionstore --system attentionstore+overlap --system attentionstore_h2o \
  --system attentionstore_h2o+lfu --system impress --system contiguouskv_paper --system contiguouskv
STREAMS_OUT ?= .cache/streams-report
COMPAT ?= 5.20.0 5.23.0
COMPAT_ARGS ?=
FAULTS_SCALE ?= 10
FAULTS_SEED ?= $(shell date +%s)
TORCH_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: demo test package-test compat faults lint docs eval eval-streams bench store-bench warm-bench policies timeline \
  gpu clean

demo: $(VENV)/.eval
	$(BIN)/python examples/demo.py $(if $(DOC),--doc "$(DOC)") $(if $(MODEL),--model "$(MODEL)") $(DEMO_ARGS)

# The fault suite and the attacks are alone: they keep the machine's files and processes busy, and print their figures.
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --dist loadgroup tests/unit tests/contract tests/eval $(TEST_ARGS)
	$(BIN)/python -m pytest tests/faults tests/hostile tests/fleet $(TEST_ARGS)

package-test: $(VENV)/.dev
	$(BIN)/python -m pytest tests/packaging $(TEST_ARGS)

compat: $(VENV)/.dev
	$(BIN)/python scripts/compat.py --check $(COMPAT_ARGS) $(COMPAT)

faults: $(VENV)/.dev
	FAULTS_SCALE=$(FAULTS_SCALE) FAULTS_SEED=$(FAULTS_SEED) $(BIN)/python -m pytest tests/faults $(TEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy
	$(BIN)/mypy --follow-imports=silent eval examples/demo.py

# (The variable silences an advertisement; nothing is asked of a network.)
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

bench: $(VENV)/.eval
	$(BIN)/contiguouskv bench $(if $(MODEL),--model "$(MODEL)") $(BENCH_ARGS)

# An interrupted run continues where it stopped; a complete one is repeated.
eval: $(VENV)/.eval
	$(BIN)/python -m eval run .cache/eval $(EVAL_ARGS)
	$(BIN)/python -m eval report .cache/eval --out $(EVAL_OUT)
	rm -rf .cache/eval-last && mv .cache/eval .cache/eval-last

eval-streams: $(VENV)/.eval
	$(BIN)/python -m eval run .cache/streams $(STREAMS_ARGS)
	$(BIN)/python -m eval report .cache/streams --out $(STREAMS_OUT)
	rm -rf .cache/streams-last && mv .cache/streams .cache/streams-last

policies: $(VENV)/.eval
	$(BIN)/python -m eval.policies record
	$(BIN)/python -m eval.policies replay $(POLICIES_ARGS)
	$(BIN)/python -m eval.policies report

store-bench: $(VENV)/.eval
	$(BIN)/python -m eval.store_bench $(STORE_BENCH_ARGS)

warm-bench: $(VENV)/.eval
	$(BIN)/python -m eval run .cache/warm --preset warm $(WARM_ARGS)
	rm -rf .cache/warm-last && mv .cache/warm .cache/warm-last

timeline: $(VENV)/.eval
	$(BIN)/python -m eval.timeline record .cache/timeline-published.json --paper
	$(BIN)/python -m eval.timeline record .cache/timeline-default.json
	$(BIN)/python -m eval.timeline record .cache/timeline-warm.json --warm
	for name in published default warm; do \
	  $(BIN)/python -m eval.timeline draw .cache/timeline-$$name.json docs/pictures/timeline-$$name.png || exit 1; \
	done

gpu: $(VENV)/.dev
	PYTHON=$(BIN)/python scripts/gpu_session.sh $(GPU_OUT) $(GPU_ARGS)

clean:
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist site

# torch comes first, by its exact version: resolving a range of it can fetch several gigabytes of another build.
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "Python 3.11, 3.12 or 3.13 is needed, and $(PYTHON) is not: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH_ARGS) "$(TORCH)"
	@touch $@

$(VENV)/.eval: $(VENV)/.torch pyproject.toml
	$(PIP) -c constraints.txt -e ".[eval]"
	@touch $@

$(VENV)/.dev: $(VENV)/.eval
	$(PIP) -c constraints.txt -e ".[eval,dev]"
	-$(PIP) -c constraints.txt -e ".[mooncake]"  # (Where there is no wheel of it, its tests are skipped by name.)
	@touch $@

$(VENV)/.docs: $(VENV)/.torch pyproject.toml
	$(PIP) -c constraints.txt -e ".[docs]"
	@touch $@
