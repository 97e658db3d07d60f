# Two commands do all of their own set-up on a fresh Debian-like machine: `make demo` and `make test`.

PYTHON := .venv/bin/python
export PATH := $(PATH):/usr/sbin:/sbin
# Tests and demo start Python hundreds of times: what it compiled is kept, whatever the shell says.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test check test-latest test-newest test-oldest soak lint types docs bench lock clean

demo:
	@deploy/setup.sh dnsmasq haproxy --optional rdiff rsync
	@PATH="$(CURDIR)/.venv/bin:$$PATH" $(PYTHON) deploy/demo/demo.py

# Workers: one more than there are cores, as much of the time is waiting. A file's tests share what they start.
PARALLEL = -n $$(( $$(nproc) + 1 )) --dist loadfile
PROGRAMS := dnsmasq haproxy nginx curl zip unzip strace --optional 7z rsync rdiff zsync casync xdelta3 zstd ip tc

test:
	@deploy/setup.sh $(PROGRAMS)
	@$(PYTHON) -m pytest $(PARALLEL)

# The inner loop: all that starts no process and is quick.
check:
	@deploy/setup.sh
	@$(PYTHON) -m pytest -q -n $$(nproc) --dist loadfile -m 'not processes and not long'

# The suite on the newest of every library, then on the oldest that pyproject.toml allows. `make -k` runs both in any case.
test-latest: test-newest test-oldest

test-newest test-oldest: test-%:
	@deploy/setup.sh --libraries $* $(PROGRAMS)
	@.venv-$*/bin/python -m pytest $(PARALLEL)

# The long form, chapter by chapter: `make soak`, or `make soak CHAPTER=road`. What each said goes to tests/soak/.
CHAPTERS := relay agent orchestrator release road simulation demo benchmarks
CHAPTER ?= $(CHAPTERS)

soak:
	@deploy/setup.sh $(PROGRAMS)
	@mkdir -p tests/soak
	@result=0; for chapter in $(CHAPTER); do \
		WAYSTATION_SOAK=1 $(PYTHON) -m pytest -p no:cacheprovider $(PARALLEL) --durations=25 tests/$$chapter \
			>tests/soak/$$chapter.txt 2>&1 || result=1; \
		sed -i 's|$(CURDIR)|.|g' tests/soak/$$chapter.txt; \
		tail -n 1 tests/soak/$$chapter.txt; \
	done; exit $$result

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
