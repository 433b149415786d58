//! The lazy filesystem: one FUSE connection that shows every lazily loaded layer as a directory.
//!
//! ```text
//! session   threads, tasks, interrupts, stop and resume          (the only part that does I/O)
//! journal   what was taken and not answered, for the next process
//!    │ bytes
//! wire      the FUSE ABI                                          pure
//!    │ Request                                    ▲ Reply
//! answer    what the tree says to each request ───┘               pure
//!    │ Target                                     │ Outcome::Read
//! tree      layers by snapshot, node ids, attributes              read  bytes of the layer that are the file's
//! ```
//!
//! Layers never change, and the kernel is told so: it keeps entries, attributes, targets, listings and pages for as long as
//! it likes, opens files without asking, and comes back only for what it has never seen. Exceptions, because they do change:
//! the mount's root, and the state file ([`state_file`]).
//!
//! Absent on purpose: mounting (`soci-mount` does, and answers INIT with [`wire::answer_init`]), any knowledge of spans,
//! registries or snapshots' records.

#![forbid(unsafe_code)]

mod answer;
mod dying;
pub mod errno;
mod header;
mod inflight;
pub mod journal;
mod observer;
mod read;
mod session;
pub mod state_file;
#[cfg(test)]
mod testing;
mod tree;
pub mod wire;

pub use header::HeaderMismatch;
pub use journal::{Journal, JournalError};
pub use observer::{FailedOp, Failure, Nobody, Observer, Op};
pub use read::{LayerData, ReadError};
pub use session::{Connection, Drained, Kernel, Pulse, Session, SessionOptions};
pub use tree::{
    AddError, HeaderCheck, ImpliedAttrs, Layer, LazyLayer, NODE_SCHEME, OpaqueMark, ROOT_NODE, Tree, Xattrs,
};
pub use wire::{InitParams, StatfsOut};
