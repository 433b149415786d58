# make setup   what a fresh Debian 12 machine lacks (root)
# make demo    a real image, eagerly and lazily, side by side
# make test    everything that must hold
# make bench   ours beside containerd and Docker; ARGS="images=redis,numpy engines=ctd2,ours n=1" for a part of it
# make lint    formatting, clippy, licences
# make build   the four programs, optimised

export PATH := $(PATH):$(HOME)/.cargo/bin
CARGO ?= cargo
ARGS ?=

.PHONY: build setup demo test bench lint

build:
	$(CARGO) build --release --bins

setup:
	@tests/lab/setup.sh

demo: setup
	@$(CARGO) test --release --quiet --test demo -- $(ARGS)

test: setup
	$(CARGO) test

bench: setup
	$(CARGO) test --release --test bench -- $(ARGS)

lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	$(CARGO) test --test it licences
