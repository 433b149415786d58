//! The daemon: reads its configuration, receives its descriptors, gives up its powers, recovers, serves, drains.
//!
//! [`run`] reads like that account. [`lazy`] is where a Prepare becomes a lazily loaded layer; [`record`] is what makes it one again
//! after a restart; [`implied`] gives directories the attributes that a layer leaves to those below; [`artifacts`] finds indexes that
//! containerd has; [`decisions`] remembers what was decided for each layer and why; [`root`] is what must be true of the root directory.
#![forbid(unsafe_code)]

mod artifacts;
mod decisions;
mod implied;
mod lazy;
mod listen;
mod observe;
mod record;
mod root;
mod run;

pub use run::main;
