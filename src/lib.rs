//! soci-snapshotter: starts containers before their images have arrived.
pub mod fs;
pub mod inflate;
pub mod layers;
pub mod layout;
pub mod oci;
pub mod sys;
pub mod tar;
pub mod ztoc;
