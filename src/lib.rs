//! soci-snapshotter: starts containers before their images have arrived.
pub mod cli;
pub mod inflate;
pub mod layout;
pub mod oci;
pub mod tar;
pub mod ztoc;
