# make setup   what a fresh Debian 12 machine lacks (root)
# make demo    a real image, eagerly and lazily, side by side
# make test    everything that must hold
# make storm   thousands of faults and kills under load, power cuts: two hours; ARGS="kills" for one part, SCALE=5 for five percent
# make bench   ours beside containerd and Docker; ARGS="images=redis,numpy engines=ctd2,ours n=1" for a part of it
# make lint    formatting, clippy, licences
# make build   the four programs, optimised
# make rpm     packages for Amazon Linux 2 and 2023, x86_64 and aarch64 (target/rpm/RPMS); ARCHES=x86_64 for a part of them
# make srpm    their sources, complete (target/rpm/SRPMS)
# make rebuild the sources built again, for this machine and without a network
# make dist    static programs in tars, with checksums (target/dist)
# make vm-test the packages in booted systems: install, use, upgrade, reboot, remove; ARGS="nspawn" or "qemu" for one kind; ARGS="power-cuts n=20"

# A test that fails fails the recipe, whatever reads what it says.
SHELL := /bin/bash
.SHELLFLAGS := -eo pipefail -c
export PATH := $(PATH):$(HOME)/.cargo/bin
CARGO ?= cargo
ARGS ?=

.PHONY: build setup demo test storm bench lint rpm srpm rebuild dist vm-test

build:
	$(CARGO) build --release --bins

setup:
	@tests/lab/setup.sh

demo: setup
	@$(CARGO) test --release --quiet --test demo -- $(ARGS)

test: setup
	$(CARGO) test --no-fail-fast

# Each part prints one line that begins with its name; the script says which there are.
storm: setup
	@CARGO="$(CARGO)" tests/storm/run.sh $(ARGS)

bench: setup
	$(CARGO) test --release --test bench -- $(ARGS)

lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	$(CARGO) test --test it licences

rpm srpm rebuild dist:
	@packaging/build.sh $@

vm-test: setup
	@$(CARGO) run --quiet --package vm-tests -- $(ARGS)

