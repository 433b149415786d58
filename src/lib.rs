//! soci-snapshotter: starts containers before their images have arrived.
pub mod custodian;
pub mod holder;
pub mod layout;
pub mod oci;
pub mod sys;
pub mod telemetry;
