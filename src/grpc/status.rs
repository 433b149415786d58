//! Every error, and the gRPC code that containerd turns back into its own error of the same name.

use super::filter::FilterError;
use crate::snapshot::{SnapshotError, chain};
use tonic::{Code, Status};

/// The status of an operation that did not happen: what the caller can act on, and the whole chain as its message.
pub fn status(error: &SnapshotError) -> Status {
    let code = match error {
        SnapshotError::NotFound(_) | SnapshotError::ParentNotFound(_) => Code::NotFound,
        SnapshotError::AlreadyExists(_) | SnapshotError::TargetExists(_) => Code::AlreadyExists,
        SnapshotError::ParentNotCommitted(_)
        | SnapshotError::InvalidName { .. }
        | SnapshotError::ImmutableField { .. }
        | SnapshotError::IdMapping { .. } => Code::InvalidArgument,
        SnapshotError::NotActive(_)
        | SnapshotError::NotMountable(_)
        | SnapshotError::HasChildren(_)
        | SnapshotError::Condemned { .. } => Code::FailedPrecondition,
        SnapshotError::Unavailable(_) | SnapshotError::Refused(_) | SnapshotError::Lost { .. } => Code::Unavailable,
        // As the Go daemon reports them: containerd has no error of its own for these.
        SnapshotError::NoNamespace
        | SnapshotError::IdsExhausted
        | SnapshotError::Directory { .. }
        | SnapshotError::NotMapped { .. }
        | SnapshotError::Store(_)
        | SnapshotError::Aborted => Code::Unknown,
    };
    Status::new(code, chain(error))
}

impl From<FilterError> for Status {
    fn from(error: FilterError) -> Status {
        Status::invalid_argument(format!("{}: invalid argument", chain(&error)))
    }
}
