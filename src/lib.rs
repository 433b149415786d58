//! soci-snapshotter: starts containers before their images have arrived.
pub mod cli;
pub mod layout;
pub mod oci;
