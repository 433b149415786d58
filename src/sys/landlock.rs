//! Landlock: after this, paths outside one directory do not exist for the process, whatever a bug makes it ask for.
#![forbid(unsafe_code)]

use super::{Confinement, process::SingleThread};
use ::landlock::{
    ABI, Access, AccessFs, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreatedAttr,
};
use std::{io, path::Path};

/// Confines the calling thread (and those it starts) to reading, renaming and removing below `directory`.
///
/// Kernels whose landlock is older than the second version (5.13 to 5.18) refuse *every* rename between directories, which removing a deep tree
/// needs; there it is left out like on kernels that have none.
pub fn confine_to(directory: &Path, _: &SingleThread) -> io::Result<Confinement> {
    let handled = AccessFs::from_all(ABI::V2);
    let needed = AccessFs::ReadDir | AccessFs::RemoveDir | AccessFs::RemoveFile | AccessFs::MakeDir | AccessFs::Refer;
    let ruleset = match Ruleset::default().set_compatibility(CompatLevel::HardRequirement).handle_access(handled) {
        Ok(ruleset) => ruleset,
        Err(_) => return Ok(Confinement::Unsupported),
    };
    // What newer kernels can forbid besides (truncate, ioctl, TCP, signals) is taken where it exists.
    let ruleset = ruleset.set_compatibility(CompatLevel::BestEffort);
    let ruleset = ruleset
        .handle_access(AccessFs::from_all(ABI::V5))
        .and_then(|r| r.handle_access(::landlock::AccessNet::from_all(ABI::V4)))
        .and_then(|r| r.scope(::landlock::Scope::from_all(ABI::V6)))
        .map_err(io::Error::other)?;
    let beneath = PathFd::new(directory).map_err(io::Error::other)?;
    ruleset
        .create()
        .and_then(|created| created.add_rule(PathBeneath::new(beneath, needed)))
        .and_then(|created| created.restrict_self())
        .map_err(io::Error::other)?;
    Ok(Confinement::Applied)
}
