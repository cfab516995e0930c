# Every target does all its own set-up: a fresh clone, python3 (3.11 or newer), make and git are enough.
.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench soak reference-kernel conformance conformance-stock conformance-boot vectors clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | while IFS="$$(printf '\t')" read -r target text; do printf '  make %-18s %s\n' "$$target" "$$text"; done

setup: ## make .venv/ and install what it needs (idempotent; quick when there is nothing to do)
	@scripts/setup

demo: setup ## rehearse a boot: two policies, a verity volume, every decision with its audit record
	@scripts/demo

test: setup ## ruff, mypy and every test
	@scripts/test

lint: setup ## ruff and mypy alone
	@scripts/lint

bench: setup ## measure the targets, side by side in one run
	@.venv/bin/python -m scripts.bench

soak: setup ## the long loops: mounts, kills and writers for minutes
	@.venv/bin/python scripts/soak.py

reference-kernel: setup ## build the real kernels to compare with (User-Mode Linux, from Debian's sources; cached)
	@.venv/bin/python -m scripts.reference_kernel

conformance: setup ## put generated sequences to the real kernels and to the emulator (as root; half an hour)
	@.venv/bin/python -m scripts.conformance

conformance-stock: setup ## the same, shorter, with Debian's own kernel as it is shipped, in QEMU (as root)
	@.venv/bin/python -m scripts.conformance_stock

conformance-boot: setup ## boot the same images on all these kernels and here, and compare every audit record
	@.venv/bin/python -m scripts.conformance_boot

vectors: setup ## record anew in tests/vectors what the real kernels answer
	@.venv/bin/python -m scripts.vectors

clean: ## remove .venv/ and every cache
	rm -rf .venv build .mypy_cache .ruff_cache .pytest_cache .hypothesis ipe_emu.egg-info
	find ipe_emu fs tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
