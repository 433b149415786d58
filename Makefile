# make setup   what a fresh Debian 12 machine lacks (root)
# make demo    a real image, eagerly and lazily, side by side
# make test    everything that must hold
# make storm   thousands of faults and kills under load, power cuts: two hours
# make bench   ours beside containerd and Docker; ARGS="images=redis,numpy engines=ctd2,ours n=1" for a part of it
# make lint    formatting, clippy, licences
# make build   the four programs, optimised
# make rpm     packages for Amazon Linux 2 and 2023, x86_64 and aarch64 (target/rpm/RPMS); ARCHES=x86_64 for a part of them
# make srpm    their sources, complete (target/rpm/SRPMS)
# make dist    the same as tars with checksums (target/dist)
# make vm-test the packages in booted systems: install, use, upgrade, reboot, remove; ARGS="nspawn" or "qemu" for one kind; ARGS="power-cuts n=20"

# A test that fails fails the recipe, whatever reads what it says.
SHELL := /bin/bash
.SHELLFLAGS := -eo pipefail -c
export PATH := $(PATH):$(HOME)/.cargo/bin
CARGO ?= cargo
ARGS ?=

.PHONY: build setup demo test storm bench lint rpm srpm dist vm-test

build:
	$(CARGO) build --release --bins

setup:
	@tests/lab/setup.sh

demo: setup
	@$(CARGO) test --release --quiet --test demo -- $(ARGS)

test: setup
	$(CARGO) test

# Each prints one line that begins with its name.
storm: setup
	SOCI_FAULTS=10000 $(CARGO) test --test it -- --nocapture daemon::faults::privileged_random_faults
	SOCI_CRASH_SEEDS=11,12,13,14,15,16 SOCI_MODEL_SEEDS=$$(seq -s, 100 140) SOCI_EXPLORE=50 $(CARGO) test --lib --test it -- --nocapture crash:: model:: shuttle 2>&1 | grep -E '^(killed at|seed|test )'
	@$(CARGO) run --quiet --package vm-tests -- storm $(ARGS)
	@$(CARGO) run --quiet --package vm-tests -- power-cuts

bench: setup
	$(CARGO) test --release --test bench -- $(ARGS)

lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	$(CARGO) test --test it licences

rpm srpm dist:
	@packaging/build.sh $@

vm-test: setup
	@$(CARGO) run --quiet --package vm-tests -- $(ARGS)

