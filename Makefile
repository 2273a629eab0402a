# The set-up runs on a bare machine and is skipped while pyproject.toml and constraints.txt are older
# than the stamps in .venv. torch has to be resolved in one pip command with the constraints.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
NOTEBOOKS := $(wildcard notebooks/*.ipynb)

install = test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	-c constraints.txt -e ".[$(1)]" && touch $@

.PHONY: demo test test-all lint format clean

demo: $(VENV)/demo.stamp  ## predictions on real data, beside a fitted GP
	$(BIN)/pfn demo

test: $(VENV)/test.stamp  ## everything that decides, in minutes; notebooks run small
	SMOKE_TEST=1 $(BIN)/python -m pytest -n 2 -q -m "not slow" --nbmake tests $(NOTEBOOKS)

test-all: $(VENV)/all.stamp  ## and the slow tests, those of plugs, and notebooks in full
	$(BIN)/python -m pytest -n 2 -q --nbmake tests $(NOTEBOOKS)

lint: $(VENV)/test.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/test.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) dist

$(VENV)/demo.stamp: pyproject.toml constraints.txt
	@echo "Installing into $(VENV) (once, about a minute) ..."
	@$(call install,bo$(,)sklearn$(,)plot)

$(VENV)/test.stamp: pyproject.toml constraints.txt
	@echo "Installing into $(VENV) (once, a few minutes) ..."
	@$(call install,test) && touch $(VENV)/demo.stamp # whose extras are among these

$(VENV)/all.stamp: $(VENV)/test.stamp
	@echo "Installing into $(VENV) what the plugs plug into ..."
	@$(call install,test$(,)plugs)

, := ,
