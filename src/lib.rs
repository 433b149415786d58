//! soci-snapshotter: starts containers before their images have arrived.
pub mod fs;
pub mod layers;
pub mod layout;
pub mod oci;
pub mod sys;
