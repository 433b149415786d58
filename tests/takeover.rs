//! A node on which the Go snapshotter ran: its records, its directories and its dead mounts become ours.
//!
//! `data/golden-goroot.tar.gz` holds a database that the Go snapshotter wrote and what containerd said of it. Where images have to be readable,
//! [`go::leave`] makes of a root of ours what the Go snapshotter would have left: the same database (that this is how Go writes it is what the
//! golden one shows), the same directories, and a dead mount on each lazily loaded layer.

#[path = "takeover/go.rs"]
mod go;
#[path = "takeover/golden.rs"]
mod golden;
#[path = "takeover/node.rs"]
mod node;

/// The database that the Go snapshotter wrote.
pub fn golden_database() -> Vec<u8> {
    go::golden("metadata.db")
}
