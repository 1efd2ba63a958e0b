.DEFAULT_GOAL := help
.PHONY: help install test processes slow parity gpu lint golden schema data tiny

help:     ## list the targets
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12
install:  ## editable install with everything the tests need
	pip install -c constraints.txt -e '.[dev]'
test:     ## the unmarked tests, 4 to 6 minutes on two cores
	pytest
processes: ## the slow tests that start several processes, about 20 minutes
	pytest -n 1 -m processes
parity:   ## losses and gradients beside TRL's
	pytest -m parity
gpu:      ## a CUDA device beside the CPU: losses, answers, resuming, memory
	pytest -n 0 -m gpu
slow:     ## README commands as written, the real model, and those of several processes
	pytest -m slow
lint:     ## ruff and mypy
	ruff check . && ruff format --check . && mypy
golden:   ## write tests/golden anew after a change of the algorithm, of one method with METHOD=<name>
	FTCORE_RECORD=1 pytest tests/test_golden.py -k '$(METHOD)'
schema:   ## write schema.json, recipe.schema.json (for editors) and docs/reference.md anew, and the table of shapes
	python -m ftcore.config.generate
	python -m dev.shapes_table
data:     ## write the rows of data=medical from its facts
	python dev/build_medical.py
tiny:     ## write the tokenizer and config of model=tiny
	python dev/build_tiny.py
