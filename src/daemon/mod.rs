//! The daemon: reads its configuration, receives its descriptors, gives up its powers, recovers, serves, drains.
//!
//! [`run`] reads like that account. [`lazy`] is where a Prepare becomes a lazily loaded layer; [`record`] is what makes it one again
//! after a restart; [`implied`] gives directories the attributes that a layer leaves to those below.
#![forbid(unsafe_code)]

mod implied;
mod lazy;
mod listen;
mod observe;
mod record;
mod run;

pub use run::main;
