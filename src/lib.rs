//! soci-snapshotter: starts containers before their images have arrived.
pub mod index;
pub mod keychain;
pub mod layout;
pub mod oci;
pub mod registry;
