//! Landlock: after this, paths outside a few directories do not exist for the process, whatever a bug makes it ask for.
#![forbid(unsafe_code)]

use super::{Confinement, process::SingleThread};
use ::landlock::{
    ABI, Access, AccessFs, BitFlags, CompatLevel, Compatible, PathBeneath, Ruleset, RulesetAttr, RulesetCreatedAttr,
};
use std::{io, os::fd::BorrowedFd};

/// What may be done below the directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rights {
    /// List, make directories, rename, remove.
    TakeAway,
    /// That, and create anything and write it; but read nothing.
    Create,
    /// List and read.
    Read,
}

impl Rights {
    fn accesses(self) -> BitFlags<AccessFs> {
        let take_away =
            AccessFs::ReadDir | AccessFs::RemoveDir | AccessFs::RemoveFile | AccessFs::MakeDir | AccessFs::Refer;
        match self {
            Rights::Read => AccessFs::ReadDir | AccessFs::ReadFile,
            Rights::TakeAway => take_away,
            Rights::Create => {
                take_away
                    | AccessFs::WriteFile
                    | AccessFs::MakeReg
                    | AccessFs::MakeSym
                    | AccessFs::MakeChar
                    | AccessFs::MakeBlock
                    | AccessFs::MakeFifo
            }
        }
    }
}

/// Confines the calling thread (and those it starts) to the rights named, each below its directory.
///
/// Kernels whose landlock is older than the second version (5.13 to 5.18) refuse *every* rename between directories, which removing a deep tree
/// needs; there it is left out like on kernels that have none.
pub fn confine_to<'fd>(
    directories: impl IntoIterator<Item = (BorrowedFd<'fd>, Rights)>,
    _: &SingleThread,
) -> io::Result<Confinement> {
    let handled = AccessFs::from_all(ABI::V2);
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
    let mut ruleset = ruleset.create().map_err(io::Error::other)?;
    for (directory, rights) in directories {
        ruleset = ruleset.add_rule(PathBeneath::new(directory, rights.accesses())).map_err(io::Error::other)?;
    }
    ruleset.restrict_self().map_err(io::Error::other)?;
    Ok(Confinement::Applied)
}
