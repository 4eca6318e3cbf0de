# Everything a fresh Debian machine needs: `make demo` does the main job, `make test` passes the tests.
# Each does all of its own set-up and is quick when nothing is left to do.

SHELL := /bin/bash
PYTHON ?= /usr/bin/python3
VENV := .venv
PY := $(VENV)/bin/python

# iproute2 and procps are on every Debian machine but not in every Debian image. libc6-dev brings the kernel's headers.
RUN_PACKAGES := busybox-static dnsmasq-base e2fsprogs erofs-utils gcc libc6-dev libseccomp2 make mmdebstrap musl-tools nftables python3-venv zstd
KERNEL_PACKAGES := bc bison flex gcc libelf-dev linux-source make patch xz-utils
TEST_PACKAGES := $(RUN_PACKAGES) $(KERNEL_PACKAGES) acpica-tools apache2-utils attr curl docker-registry dosfstools \
	genisoimage grub-pc-bin iproute2 libarchive-tools mtools qemu-guest-agent swtpm \
	libseccomp-dev openssh-client openssl ovmf passt podman procps qemu-system-x86 qemu-utils runc skopeo strace tmux
BENCH_PACKAGES := $(TEST_PACKAGES) crun iperf3 umoci

.PHONY: demo test check bench agent agent-aarch64 agent-riscv64 bytecode clean kernel lint unit
.NOTPARALLEL:

demo: .cache/packages-run $(VENV)/installed agent bytecode
	@tools/demo

test: .cache/packages-test $(VENV)/installed agent bytecode lint kernel
	$(PY) -m pytest $(if $(CI),--require=all --durations=40)

# What a developer runs by habit: under a minute.
check: .cache/packages-run $(VENV)/installed agent lint unit

lint:
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

unit:
	$(PY) -m pytest -q tests/unit tests/repo

bench: .cache/packages-bench $(VENV)/installed agent bytecode
	@$(PY) -m benches $(BENCH)

agent: src/nagaya/_guest/nagaya-agent

src/nagaya/_guest/nagaya-agent: $(wildcard guest/*.c guest/*.h) guest/Makefile
	$(MAKE) -s -C guest install DEST=../src/nagaya/_guest

# Agents for machines with another CPU (gcc-aarch64-linux-gnu, gcc-riscv64-linux-gnu and their libc6-dev-*-cross).
agent-aarch64 agent-riscv64: agent-%:
	$(MAKE) -s -C guest install-$* DEST=../src/nagaya/_guest

# Five minutes on two CPUs, once: it lies in the user's cache.
kernel: .cache/packages-kernel $(VENV)/installed
	@$(VENV)/bin/nagaya kernel build

# One apt run, and only for what is missing.
.cache/packages-%: Makefile
	@mkdir -p .cache
	@packages="$($(shell echo $* | tr a-z A-Z)_PACKAGES)"; missing=(); \
	for p in $$packages; do dpkg-query -W -f '$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || missing+=($$p); done; \
	if (($${#missing[@]})); then \
		if [[ $$(id -u) == 0 ]]; then as_root=(); \
		elif type -P sudo >/dev/null; then as_root=(sudo); \
		else echo "make: these packages are missing: $${missing[*]}; install them as root, or run make as root" >&2; exit 1; fi; \
		echo "installing $${missing[*]}"; \
		"$${as_root[@]}" apt-get update -qq || echo "make: apt-get update failed; trying with the lists there are" >&2; \
		"$${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
			apt-get install -y -qq --no-install-recommends "$${missing[@]}" >/dev/null; \
	fi
	@touch $@

# The stamp is inside: whoever removes the environment removes it too. An environment cut off half-made is made anew.
$(VENV)/installed: pyproject.toml setup.py | agent
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check -e '.[dev]'
	@touch $@

# An interpreter that was told not to write bytecode would compile anew at each start, and a start has 40 ms.
bytecode:
	@$(PY) -m compileall -q src

clean:
	rm -rf .cache $(VENV) build src/nagaya/_guest src/*.egg-info .hypothesis .mypy_cache .ruff_cache
	$(MAKE) -s -C guest clean
