//! The Snapshots service as containerd sees it: a real client over a unix socket, real directories, and where a scenario reads
//! files, real mounts.

#[path = "grpc/conformance.rs"]
mod conformance;
#[path = "grpc/containerd.rs"]
mod containerd;
#[path = "grpc/content.rs"]
mod content;
#[path = "grpc/lab.rs"]
mod lab;
#[path = "grpc/lazy.rs"]
mod lazy;
#[path = "grpc/mapped.rs"]
mod mapped;
#[path = "grpc/operations.rs"]
mod operations;
