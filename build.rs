//! Compiles the gRPC contracts in `src/grpc/proto` with protox, so that no `protoc` is needed to build.

use std::error::Error;

const PROTO_ROOT: &str = "src/grpc/proto";
const FILES: [&str; 2] = ["snapshots.proto", "content.proto"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed={PROTO_ROOT}");
    let descriptors = protox::compile(FILES, [PROTO_ROOT])?;
    // BTreeMap: labels keep one order everywhere, so that equal records have equal bytes.
    tonic_prost_build::configure().btree_map(".").bytes(".").emit_rerun_if_changed(false).compile_fds(descriptors)?;
    Ok(())
}
