# The project's commands; `make` alone lists them. They need Python 3.10 ... 3.13 and make, and set up .venv themselves.

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint type format docs bench clean

VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

# The newest Python that the project supports and that can make a virtual environment. Each name is really started:
# version managers put names on PATH that do not run. Another choice: `make test PYTHON=/path/to/python3`.
FITS := import sys, ensurepip, venv; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))
PYTHON = $(shell for name in python3.13 python3.12 python3.11 python3.10 python3 python; do \
	if "$$name" -c "$(FITS)" >/dev/null 2>&1; then echo "$$name"; break; fi; done)

# The tests spread over processes, not over threads: a tiny network gains nothing from a second thread. One process more than
# cores, since some tests wait (for SLURM, for signals).
test test-all: export OMP_NUM_THREADS := 1
export PYTHONUNBUFFERED := 1

help: ## List these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(INSTALLED) ## Pre-train a small ViT with the hybrid objective on rendered images: a few minutes on a laptop
	$(RUN) train.py experiment=demo

test: $(INSTALLED) ## Run the tests, but for those that keep the processors busy for a minute each
	$(RUN) -m pytest -n 3 --dist worksteal -m "not slow"

test-all: $(INSTALLED) ## Run every test
	$(RUN) -m pytest -n 3 --dist worksteal

lint: $(INSTALLED) ## Check style, formatting and who imports whom
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pytest -q tests/test_layering.py

type: $(INSTALLED) ## Check the types
	$(RUN) -m mypy

format: $(INSTALLED) ## Repair style and formatting
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

docs: $(INSTALLED) ## Build the documentation site, which needs no network (outputs/site/index.html)
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet
	@echo "Open outputs/site/index.html; with search: $(RUN) -m http.server --directory outputs/site"

# The other projects that it compares with come with the extra; see benchmarks/README.md.
BENCHMARKS := train_step input_pipeline diagnostics evaluation startup growth

bench: $(INSTALLED) ## Measure speed and memory against the hardware's limit and other projects (hours; outputs/bench)
	@if uv --version >/dev/null 2>&1; then uv pip install --python $(RUN) --editable '.[bench]'; \
	else $(RUN) -m pip install --editable '.[bench]'; fi
	@for name in $(BENCHMARKS); do \
		$(RUN) -m benchmarks.$$name --json outputs/bench/$$name.json || exit 1; \
	done

clean: ## Remove caches and build products; outputs/ and .venv stay
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# The environment is made once, and again when pyproject.toml changes. The stamp is touched last, so that an
# interrupted set-up is taken up again.
$(INSTALLED): pyproject.toml
	@echo "Setting up $(VENV): some minutes and a few GB (PyTorch) the first time."
	@if uv --version >/dev/null 2>&1; then \
		uv venv --allow-existing $(if $(PYTHON),--python "$(PYTHON)") $(VENV) \
		&& uv pip install --compile-bytecode --python $(RUN) --editable '.[dev]'; \
	elif [ -n "$(PYTHON)" ]; then \
		"$(PYTHON)" -m venv $(VENV) && $(RUN) -m pip install --editable '.[dev]'; \
	else \
		echo "No Python 3.10 ... 3.13 with its venv module was found; install one (on Debian: python3 and python3-venv)" \
			"or name it: make test PYTHON=/path/to/python3." >&2; exit 1; \
	fi
	@touch $@
