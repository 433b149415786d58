use super::{args, indexing::Plan, output::Console};
use crate::oci::Reference;
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {}
pub fn create(_: &args::Create, _: &Plan, _: &str, _: &args::Global, _: &Console) -> Result<(), RemoteError> { Ok(()) }
pub fn convert(_: &args::Convert, _: &Plan, _: &str, _: &Reference, _: &args::Global, _: &Console) -> Result<(), RemoteError> { Ok(()) }
