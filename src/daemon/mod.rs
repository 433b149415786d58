//! The daemon: reads its configuration, receives its descriptors, gives up its powers, recovers, serves, drains.
//!
//! [`run`] reads like that account. [`lazy`] is where a Prepare becomes a lazily loaded layer; [`eager`]
//! is what pulled layers stand on; [`record`] is what makes it one again
//! after a restart, and [`recovery`] does that before anything else; [`takeover`] does so for what the Go snapshotter had mounted; [`implied`] gives directories the attributes that a layer leaves to those below; [`artifacts`] finds indexes that
//! containerd has; [`condition`] tells `soci status` how we are; [`decisions`] remembers what was decided for each layer and why;
//! [`settings`] are those of the file, or the last good ones; [`root`] is what must be true of the root directory; [`reload`] takes a changed
//! configuration; [`systemd`] tells the service manager how we are, and [`watchdog`] finds out.
#![forbid(unsafe_code)]

mod artifacts;
mod collect;
mod condition;
mod decisions;
mod eager;
mod implied;
mod keeping;
mod lazy;
mod listen;
mod observe;
mod record;
mod recovery;
mod registries;
mod reload;
mod root;
mod run;
mod served;
mod settings;
mod systemd;
mod takeover;
mod watchdog;

pub use registries::{logins_of, registry_of};
pub use run::{discovery, main};
