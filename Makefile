.PHONY: check lint types test test-slow test-gpu format results

check: lint types test ## what to run before every commit

lint:
	uv run --extra dev ruff check .
	uv run --extra dev ruff format --check .

types:
	uv run --extra dev pyright

test:
	uv run --extra test pytest

test-slow:
	XLA_FLAGS= uv run --extra clients pytest -m slow
	XLA_FLAGS= uv run --extra clients pytest -n0 -m alone

test-gpu: ## on a machine with a GPU, in an environment with the cuda13 extra
	pytest -n0 -m gpu -s

results: ## the experiments that this machine can run, their figures and tables
	uv run --extra test python -m experiments.regenerate

format:
	uv run --extra dev ruff format .
	uv run --extra dev ruff check --fix .
