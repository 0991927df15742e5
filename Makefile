# make demo | test | lint | docs | doctor | clean
#
#   PYTHON=python3.12    the interpreter that the virtual environment is made with
#   VENV=.venv           where it is; VENV= (empty) takes the environment of PYTHON instead, and
#                        installs into it only what it lacks
#   TORCH=torch==2.13.0  which torch to install
#   ARGS="-k module"     passed on to pytest or to the demonstration

# Paths are quoted, for the checkout may lie in a directory with spaces in its name.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test lint docs doctor clean

py := $(if $(VENV),$(VENV)/bin/python,$(PYTHON))

# $(call environment,EXTRA,MODULES) provides torch, the package and what EXTRA in pyproject.toml
# lists, without another torch than the one that is there by then. A stamp tells that there is nothing
# to do; without VENV, that MODULES can be imported.
define environment
@set -e; \
stamp="$(VENV)/.deconv_ext-$(1)"; \
if [ -z "$(VENV)" ]; then \
  if "$(py)" -c 'import ninja, torch, $(2)'; then exit 0; fi; \
elif [ "$$stamp" -nt pyproject.toml ] && [ "$$stamp" -nt setup.py ] && [ "$$(cat "$$stamp")" = '$(TORCH)' ]; then \
  exit 0; \
elif [ ! -x "$(py)" ]; then \
  "$(PYTHON)" -m venv "$(VENV)"; \
fi; \
echo '$(TORCH)' | xargs "$(py)" -m pip install ninja 'setuptools>=64'; \
torch=$$("$(py)" -c 'from importlib.metadata import version; print(version("torch"))'); \
"$(py)" -m pip install --no-build-isolation -e '.[$(1)]' "torch==$$torch"; \
if [ -n "$(VENV)" ]; then echo '$(TORCH)' > "$$stamp"; fi
endef

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

demo:
	$(call environment,demo,matplotlib, onnx2torch, scipy, skimage, tqdm)
	"$(py)" -m deconv_ext demo $(ARGS)

test:
	$(call environment,test,expecttest, hypothesis, matplotlib, numpy, onnx2torch, pytest, scipy, skimage, tqdm)
	"$(py)" -m pytest $(ARGS)

lint:
	$(call environment,lint,clang_format, matplotlib, mypy, ruff)
	"$(py)" -m ruff check .
	"$(py)" -m ruff format --check .
	"$(py)" -m mypy
	find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | "$(py)" -c \
	  'import clang_format; clang_format.clang_format()' --dry-run --Werror --files=/dev/stdin

docs:
	$(call environment,docs,material, mkdocs, mkdocstrings_handlers.python)
	NO_MKDOCS_2_WARNING=1 "$(py)" -m mkdocs build --quiet --strict

doctor:
	$(call environment,bench,matplotlib)
	"$(py)" -m deconv_ext doctor

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis demo_output
	rm -f deconv_ext/_C*.so
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
