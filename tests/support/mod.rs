//! What the end-to-end tests, the demo and the bench stand on: real registries, real containerds, a real slow link, real images.
//!
//! * Everything is a guard. What it started, mounted or configured is gone when it is dropped, when a test panics, and, in programs that
//!   call [`undo::on_signals`], on Ctrl-C. What a killed run left behind is removed by the next one that takes the same [`slot::Slot`].
//! * The interface blocks, so that a test reads like a shell session; where something is asynchronous inside (pushing, gRPC), it brings
//!   its own runtime. Call it from plain threads, not from a tokio test.
//! * A failure panics with what the tool said. There is nothing a test could do about it but fail.
//!
//! Needs root and what `tests/lab/setup.sh` installs. Tests that use it are called `privileged_…`.
#![forbid(unsafe_code)]
// Three programs include this module and each leaves part of it alone.
#![allow(dead_code)]

pub mod cgroup;
pub mod command;
pub mod containerd;
pub mod daemon;
pub mod docker;
pub mod engine;
pub mod grpc;
pub mod image;
pub mod leaks;
pub mod link;
pub mod node;
pub mod process;
pub mod proxy;
pub mod registry;
pub mod slot;
pub mod tree;
pub mod undo;
pub mod workload;

use std::path::PathBuf;

/// Every test that mounts, makes namespaces or runs containers says so first: one that did nothing would count as passed.
pub fn needs_root() {
    assert!(
        nix::unistd::geteuid().is_root(),
        "this needs root: it mounts filesystems, makes network namespaces and runs containers"
    );
}

/// Where `setup.sh` and `images.sh` keep what is expensive to make.
pub fn cache() -> PathBuf {
    match std::env::var_os("SOCI_LAB_CACHE") {
        Some(dir) => dir.into(),
        None => PathBuf::from(std::env::var_os("HOME").unwrap_or_else(|| "/root".into())).join(".cache/soci-lab"),
    }
}

/// A program that `setup.sh` built.
pub fn tool(name: &str) -> PathBuf {
    let path = cache().join("bin").join(name);
    assert!(path.exists(), "{} is missing: run `make setup`", path.display());
    path
}

/// The image `name` of the suite as an OCI layout, built now if this machine has not built it before (minutes).
pub fn suite_image(name: &str) -> PathBuf {
    let path = cache().join("images").join(name);
    if !path.join("index.json").exists() {
        eprintln!("building the image {name} (once per machine)");
        command::run(
            std::process::Command::new(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/lab/images.sh")).arg(name),
        );
    }
    path
}
