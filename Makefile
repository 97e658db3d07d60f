# Two commands do all of their own set-up on a fresh Debian-like machine: `make demo` and `make test`.

PYTHON := .venv/bin/python
export PATH := $(PATH):/usr/sbin:/sbin

.PHONY: demo test test-latest test-newest test-oldest soak lint types docs bench lock clean

demo:
	@deploy/setup.sh dnsmasq haproxy --optional rdiff rsync
	@$(PYTHON) deploy/demo/demo.py

test:
	@deploy/setup.sh dnsmasq haproxy nginx curl zip unzip strace --optional 7z rsync rdiff zsync casync xdelta3 zstd ip tc
	@$(PYTHON) -m pytest

# The suite on the newest of every library, then on the oldest that pyproject.toml allows. `make -k` runs both in any case.
test-latest: test-newest test-oldest

test-newest test-oldest: test-%:
	@deploy/setup.sh --libraries $* dnsmasq haproxy nginx curl zip unzip strace --optional 7z rsync rdiff zsync casync xdelta3 zstd ip tc
	@.venv-$*/bin/python -m pytest

soak:
	@deploy/setup.sh dnsmasq haproxy nginx curl zip unzip strace --optional 7z rsync rdiff zsync casync xdelta3 zstd ip tc
	@WAYSTATION_SOAK=1 $(PYTHON) -m pytest -p no:cacheprovider --durations=25 >tests/soak.txt 2>&1; \
		result=$$?; tail -n 40 tests/soak.txt; exit $$result

lint:
	@deploy/setup.sh
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .

types:
	@deploy/setup.sh
	@.venv/bin/mypy
	@.venv/bin/mypy deploy/demo/*.py docs/*.py

docs:
	@deploy/setup.sh
	@$(PYTHON) -m docs.tables

bench:
	@deploy/setup.sh nginx curl unzip
	@$(PYTHON) -m benchmarks.road
	@$(PYTHON) -m benchmarks.rollout

lock:
	@deploy/lock.sh $(if $(UPGRADE),--upgrade)

clean:
	rm -rf .venv .venv-newest .venv-oldest .venv-lock .mypy_cache .ruff_cache .pytest_cache .hypothesis .demo
