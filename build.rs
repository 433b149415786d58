//! Compiles the gRPC contracts in `src/grpc/proto` with protox, so that no `protoc` is needed to build; finds out what this build is called.

use std::{env, error::Error, process::Command};

const PROTO_ROOT: &str = "src/grpc/proto";
const FILES: [&str; 5] = ["snapshots.proto", "content.proto", "images.proto", "leases.proto", "cri.proto"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed={PROTO_ROOT}");
    let descriptors = protox::compile(FILES, [PROTO_ROOT])?;
    // BTreeMap: labels keep one order everywhere, so that equal records have equal bytes.
    tonic_prost_build::configure().btree_map(".").bytes(".").emit_rerun_if_changed(false).compile_fds(descriptors)?;

    let version = given("SOCI_VERSION").map_or_else(|| env::var("CARGO_PKG_VERSION"), Ok)?;
    let revision = given("SOCI_REVISION").or_else(revision).unwrap_or_else(|| "<unknown>".into());
    println!("cargo:rustc-env=SOCI_VERSION={version}");
    println!("cargo:rustc-env=SOCI_REVISION={revision}");
    Ok(())
}

/// What a package build says, which has no repository to ask.
fn given(name: &str) -> Option<String> {
    println!("cargo:rerun-if-env-changed={name}");
    env::var(name).ok().filter(|value| !value.is_empty())
}

/// The commit that is checked out here. Development builds do not ask: each commit would compile everything again.
fn revision() -> Option<String> {
    if env::var("PROFILE").ok()? != "release" {
        return None;
    }
    let git = |arguments: &[&str]| {
        let done = Command::new("git").args(arguments).output().ok().filter(|done| done.status.success())?;
        Some(String::from_utf8(done.stdout).ok()?.trim().to_owned())
    };
    // Not the repository of somebody who keeps a copy of the sources in his own.
    if git(&["rev-parse", "--show-toplevel"])? != env::var("CARGO_MANIFEST_DIR").ok()? {
        return None;
    }
    // Grows with each commit, checkout and reset.
    println!("cargo:rerun-if-changed={}", git(&["rev-parse", "--git-path", "logs/HEAD"])?);
    git(&["rev-parse", "HEAD"])
}
