# make demo [TASK=causal_lm] [TEACHER=cached]   from nothing to a distilled student and its report
# make distill TEXT=text.txt MODEL=FOLDER [RECIPE=general] [TOKENS=128] [SET='key=value ...']
#                                               from a text file and a teacher to a student, by examples/RECIPE.yaml
# make test                                     lint, types and tests
#
# Everything is installed into .venv, once, in the versions of constraints.txt. pip's own settings decide where from:
# a machine without a GPU can spare itself the CUDA build of torch with PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS.

PYTHON ?= python3
TASK ?= masked_lm
TEACHER ?= online

VENV := .venv
BIN := $(VENV)/bin
DEMO_READY := $(VENV)/demo.ready
TEST_READY := $(VENV)/test.ready
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

RECIPE ?= universal
TOKENS ?= 128

.PHONY: demo distill test clean
.DELETE_ON_ERROR:

demo: $(DEMO_READY)
	@$(BIN)/python launch/demo.py --task $(TASK) --teacher $(TEACHER)

distill: $(DEMO_READY)
	@test -n '$(TEXT)' -a -n '$(MODEL)' || { echo 'Give a text file and a teacher: make distill TEXT=text.txt MODEL=FOLDER'; exit 2; }
	$(BIN)/python data_tools/build_shards.py --task $(if $(filter distil_gpt2,$(RECIPE)),causal_lm,masked_lm) --one-per-line \
		--input '$(TEXT)' --tokenizer '$(MODEL)' --sequence-tokens $(TOKENS) --output runs/$(RECIPE)-shards
	$(BIN)/python launch/distill.py --config examples/$(RECIPE).yaml teacher.model='$(MODEL)' \
		data.manifest=runs/$(RECIPE)-shards/manifest.json $(SET)

test: $(TEST_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q --durations=10

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo 'Python 3.10 or newer is needed: make PYTHON=/path/to/python3'; exit 1; }
	@command -v c++ >/dev/null \
		|| { echo 'A C++ compiler is needed (apt-get install g++, or the like)'; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(DEMO_READY): $(BIN)/python setup.py constraints.txt
	@echo 'installing: some minutes, once'
	$(BIN)/python -m pip install -qq --constraint constraints.txt --editable .
	@echo "compiling DeepSpeed's shared-memory exchange for CPU ranks: about a minute, once"
	@$(BIN)/python -c 'from engine.zero import build_ops; build_ops()' >$(VENV)/build_ops.log 2>&1 \
		|| { tail -n 20 $(VENV)/build_ops.log; exit 1; }
	@touch $@

$(TEST_READY): $(DEMO_READY)
	$(BIN)/python -m pip install -qq --constraint constraints.txt --editable '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
