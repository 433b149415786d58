//! soci-snapshotter: starts containers before their images have arrived.
pub mod config;
pub mod grpc;
pub mod layout;
pub mod oci;
pub mod snapshot;
