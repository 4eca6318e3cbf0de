# Everything a fresh Debian machine needs: `make demo` does the main job, `make test` passes the tests.
# Each does all of its own set-up and is quick when nothing is left to do.

SHELL := /bin/bash
PYTHON ?= $(firstword $(wildcard /usr/bin/python3) python3)
VENV := .venv
PY := $(VENV)/bin/python
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)

RUN_PACKAGES := busybox-static gcc libseccomp2 make mmdebstrap musl-tools nftables python3-venv zstd
TEST_PACKAGES := $(RUN_PACKAGES) apache2-utils attr docker-registry openssl podman runc skopeo strace tmux
BENCH_PACKAGES := $(TEST_PACKAGES) crun hyperfine umoci

.PHONY: demo test check bench agent bytecode clean lint unit
.NOTPARALLEL:

demo: .cache/packages-run .cache/venv agent bytecode
	@tools/demo

test: .cache/packages-test .cache/venv agent bytecode
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(PY) -m pytest $(if $(CI),--require=all)

# What a developer runs by habit: under a minute.
check: .cache/packages-run .cache/venv agent lint unit

lint:
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

unit:
	$(PY) -m pytest -q tests/unit tests/repo

bench: .cache/packages-bench .cache/venv agent bytecode
	@$(PY) -m benches $(BENCH)

agent: src/nagaya/_guest/nagaya-agent

src/nagaya/_guest/nagaya-agent: $(wildcard guest/*.c guest/*.h) guest/Makefile
	$(MAKE) -s -C guest install DEST=../src/nagaya/_guest

# One apt run, and only for what is missing.
.cache/packages-%: Makefile
	@mkdir -p .cache
	@packages="$($(shell echo $* | tr a-z A-Z)_PACKAGES)"; missing=(); \
	for p in $$packages; do dpkg-query -W -f '$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || missing+=($$p); done; \
	if (($${#missing[@]})); then \
		echo "installing $${missing[*]}"; \
		$(SUDO) apt-get update -qq || true; \
		DEBIAN_FRONTEND=noninteractive $(SUDO) apt-get install -y -qq --no-install-recommends "$${missing[@]}" >/dev/null; \
	fi
	@touch $@

.cache/venv: pyproject.toml setup.py | agent
	@mkdir -p .cache
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check -e '.[dev]'
	@touch $@

# An interpreter that was told not to write bytecode would compile anew at each start, and a start has 40 ms.
bytecode:
	@$(PY) -m compileall -q src

clean:
	rm -rf .cache $(VENV) build src/nagaya/_guest src/*.egg-info
	$(MAKE) -s -C guest clean
