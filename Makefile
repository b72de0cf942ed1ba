# Two commands for everyone: `make demo` and `make test`. Both set up .venv on their own.

# The first Python that TensorFlow 2.21 has packages for.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && \
	{ echo $$p; break; }; done)
BIN := .venv/bin
READY := .venv/ready
OUTPUT ?= demo-output
BENCHMARKS ?= layer one_device kernels features training workers accuracy scaling peers memory resnet on_jax \
	on_torch monitor

.PHONY: help demo test lint types docs format bench lock test-benchmarks test-models test-scenarios \
	test-survival test-frameworks test-versions test-doctor test-engines clean

help:
	@echo "make demo           train on two replicas and compare with one device (2 minutes)"
	@echo "make test           lint, types, the pages and the whole suite"
	@echo "make docs           build the pages into site/"
	@echo "make format         rewrite the code in the house's format"
	@echo "make bench          measure all against Keras's and write docs/reference/speed.md (12 minutes)"
	@echo "make test-benchmarks what the benchmarks measure (2 minutes)"
	@echo "make test-models    models of keras.applications, on workers, converted, folded (15 minutes)"
	@echo "make test-scenarios Keras's training on replicas and workers, the whole table (20 minutes)"
	@echo "make test-survival  resuming, workers that part or are killed, the whole selftest, a long soak"
	@echo "make test-frameworks all cases on each framework, models between them (30 minutes)"
	@echo "make test-engines   Ray on JAX and torch, more of Slurm and MPI, slow blocks of pages (20 minutes)"
	@echo "make test-versions  the contract on older TensorFlow and Keras (30 minutes)"
	@echo "make test-doctor    the doctor's table, each TensorFlow in an environment of its own (half an hour)"
	@echo "make lock           resolve requirements.in into requirements.lock"
	@echo "make clean          remove .venv and every cache"

# Python compiles what is imported, when it is; pip would compile all of every package, for a minute.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
$(READY): requirements.lock requirements-alone.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "syncbn needs Python 3.11, 3.12 or 3.13: none was found." \
		"Install one, or name it: make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) has no venv module:" \
		"install it (on Debian and Ubuntu: apt install python3-venv)"; exit 1; }
	$(PYTHON) -m venv --clear .venv
	$(INSTALL) -r requirements.lock
	$(INSTALL) --no-deps -r requirements-alone.lock
	$(INSTALL) --no-build-isolation --no-deps --editable .
	@touch $@

demo: $(READY)
	@echo "1. A perceptron in float32, as people train. What remains is rounding: see 'reordered'."
	$(BIN)/syncbn train --compare --output $(OUTPUT)/mlp
	@echo "2. A residual network in float64, where rounding is small: nothing remains."
	$(BIN)/syncbn train --compare --model convnet --precision float64 --epochs 3 \
		--output $(OUTPUT)/convnet

# Two processes, whole files each: what a file prepares once is used by all of its tests. Each of
# Keras's backends apart: a process has one.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile
test: lint types docs
	KERAS_BACKEND=tensorflow $(PYTEST)
	KERAS_BACKEND=jax $(PYTEST) tests/contract tests/jax
	KERAS_BACKEND=torch $(PYTEST) tests/contract tests/torch
	SYNCBN_KERAS=tf_keras KERAS_BACKEND=tensorflow $(PYTEST) tests/contract tests/tf_keras

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

# Every warning ends it: a link or an anchor to nowhere, a page that no menu names. (With --quiet none would.)
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(READY)
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

bench: $(READY)
	@for name in $(BENCHMARKS); do \
		echo "$$name"; \
		$(BIN)/python benchmarks/$$name.py $(if $(ROUNDS),--rounds $(ROUNDS)) \
			--output benchmarks/results/$$name.json || exit 1; \
	done
	$(BIN)/python benchmarks/page.py

test-benchmarks: $(READY)
	$(BIN)/python -m pytest -m benchmarks

test-models: $(READY)
	$(BIN)/python -m pytest -m models

test-survival: $(READY)
	$(BIN)/python -m pytest -m survival --timeout 1200

EVERY := -m "frameworks or not frameworks"
test-frameworks: $(READY)
	$(BIN)/python tests/frameworks.py
	SYNCBN_EVERY_CASE=1 KERAS_BACKEND=tensorflow $(PYTEST) $(EVERY) tests/contract tests/tensorflow
	SYNCBN_EVERY_CASE=1 KERAS_BACKEND=jax $(PYTEST) $(EVERY) tests/contract tests/jax
	SYNCBN_EVERY_CASE=1 KERAS_BACKEND=torch $(PYTEST) $(EVERY) tests/contract tests/torch
	SYNCBN_EVERY_CASE=1 SYNCBN_KERAS=tf_keras KERAS_BACKEND=tensorflow $(PYTEST) $(EVERY) \
		tests/contract tests/tf_keras
	KERAS_BACKEND=tensorflow $(BIN)/python -m pytest -m frameworks tests/meta tests/cli

test-scenarios: $(READY)
	$(BIN)/python -m tests.scenarios
	$(BIN)/python -m pytest -m scenarios

test-engines: $(READY)
	$(BIN)/python -m pytest -m engines --timeout 1200

test-versions: $(READY)
	$(BIN)/python tests/versions.py

test-doctor: $(READY)
	$(BIN)/python tests/doctor_versions.py

# Of torch a registry may have a build for CPUs alone (`+cpu`), which elsewhere has no such name.
# TensorFlow's CPU build exists for x86-64 alone; elsewhere the ordinary one is as small. tf_keras, in
# requirements-alone.lock, asks for the ordinary one everywhere, and is installed without it.
lock: $(READY)
	$(BIN)/python -m pip install --quiet pip-tools
	$(BIN)/pip-compile --quiet --upgrade --extra train --strip-extras --allow-unsafe \
		--no-emit-index-url --no-emit-trusted-host --no-emit-find-links --no-annotate --no-header \
		--output-file requirements.lock pyproject.toml requirements.in
	awk '{ sub(/^torch==[^+]*\+cpu/, substr($$0, 1, index($$0, "+") - 1)) } \
		/^tensorflow-cpu==/ { \
			print $$0 " ; platform_machine in \"x86_64 AMD64\""; sub("-cpu", ""); \
			print $$0 " ; platform_machine not in \"x86_64 AMD64\""; next } \
		{ print }' requirements.lock > requirements.lock.new
	mv requirements.lock.new requirements.lock

clean:
	rm -rf .venv .venv-peers site .mypy_cache .ruff_cache .pytest_cache .hypothesis
