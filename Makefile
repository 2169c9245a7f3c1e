# Everything a person needs on a fresh machine with Python 3.11; `make help` lists it.
PYTHON ?= python3.11
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
# Where the environment asks for no bytecode, every program would compile its libraries anew: 10 s of a start of 15.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help install train test test-slow test-gpu lint format bench lock

help:
	@echo "make install    set up .venv from requirements.lock"
	@echo "make train      set up, then python train.py experiment=fb_humanoid (ARGS=... adds overrides)"
	@echo "make test       set up, then run the tests"
	@echo "make test-slow  long trainings and repetitions"
	@echo "make test-gpu   what needs a CUDA device"
	@echo "make lint       format check, lint, import contracts"
	@echo "make format     format and mend what can be mended"
	@echo "make bench      speed against reference implementations"
	@echo "make lock       resolve requirements.lock anew from pyproject.toml"

train: $(INSTALLED)
	$(RUN) train.py experiment=fb_humanoid $(ARGS)

install: $(INSTALLED)

# A file at a time on each core, for what a file's tests share is dear to make.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: $(INSTALLED)
	$(RUN) -m pytest -m slow $(ARGS)

test-gpu: $(INSTALLED)
	$(RUN) -m pytest -m gpu $(ARGS)

lint: $(INSTALLED)
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(VENV)/bin/lint-imports

format: $(INSTALLED)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

bench: $(INSTALLED)
	$(RUN) -m benchmarks.environment_speed
	$(RUN) -m benchmarks.rendering_speed
	$(RUN) -m benchmarks.update_speed
	$(RUN) -m benchmarks.coding_speed
	$(RUN) -m benchmarks.language_speed
	$(RUN) -m benchmarks.startup_speed

lock: $(INSTALLED)
	$(RUN) -m uv pip compile pyproject.toml --all-extras --no-emit-index-url --generate-hashes --quiet \
		--python-version 3.11 --custom-compile-command "make lock" -o requirements.lock

# uv installs in seconds what pip takes minutes for; the lock file pins every package by hash.
$(INSTALLED): requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check uv
	$(RUN) -m uv pip sync --quiet --python $(RUN) --require-hashes requirements.lock
	touch $@
