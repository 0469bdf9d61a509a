//! Which gRPC code an error becomes. containerd decides by the code alone; texts are for people,
//! but one: a refused Remove must contain "remove".

use tonic::{Code, Status};

use crate::{drivers::DriverError, logging, store::StoreError};

/// The status that answers `error`.
pub fn of(error: &DriverError) -> Status {
    Status::new(code(error), logging::chain(error))
}

/// The code of `error`.
pub fn code(error: &DriverError) -> Code {
    match error {
        DriverError::Store(error) => store_code(error),
        DriverError::InvalidArgument(_) => Code::InvalidArgument,
        DriverError::FailedPrecondition(_) => Code::FailedPrecondition,
        DriverError::Unavailable(_) => Code::Unavailable,
        DriverError::Unimplemented(_) => Code::Unimplemented,
        DriverError::Io { source, .. } => match source.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                Code::ResourceExhausted
            }
            _ => Code::Internal,
        },
        DriverError::Internal(_) => Code::Internal,
    }
}

fn store_code(error: &StoreError) -> Code {
    match error {
        StoreError::NotFound { .. } | StoreError::ParentNotFound { .. } => Code::NotFound,
        StoreError::AlreadyExists { .. } => Code::AlreadyExists,
        StoreError::ParentNotCommitted { .. }
        | StoreError::ParentMismatch { .. }
        | StoreError::ImmutableField { .. }
        | StoreError::InvalidKey { .. }
        | StoreError::Filter(_) => Code::InvalidArgument,
        StoreError::RebaseParentNotCommitted { .. }
        | StoreError::WrongKind { .. }
        | StoreError::HasChildren { .. } => Code::FailedPrecondition,
        StoreError::Corrupt { .. } => Code::DataLoss,
        StoreError::Closed => Code::Unavailable,
        StoreError::Schema { .. }
        | StoreError::File { .. }
        | StoreError::Database(_)
        | StoreError::CommitFailed { .. }
        | StoreError::Panicked { .. } => Code::Internal,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{FilterError, Kind};

    /// containerd's expectations, one row each.
    #[test]
    fn codes() {
        let key = || "k".to_owned();
        let rows: Vec<(DriverError, Code)> = vec![
            (StoreError::NotFound { key: key() }.into(), Code::NotFound),
            (
                StoreError::ParentNotFound { parent: key() }.into(),
                Code::NotFound,
            ),
            (
                StoreError::AlreadyExists { key: key() }.into(),
                Code::AlreadyExists,
            ),
            (
                StoreError::ParentNotCommitted {
                    parent: key(),
                    kind: Kind::Active,
                }
                .into(),
                Code::InvalidArgument,
            ),
            (
                StoreError::RebaseParentNotCommitted {
                    parent: key(),
                    kind: Kind::Active,
                }
                .into(),
                Code::FailedPrecondition,
            ),
            (
                StoreError::ParentMismatch {
                    key: key(),
                    actual: key(),
                    asked: key(),
                }
                .into(),
                Code::InvalidArgument,
            ),
            (
                StoreError::WrongKind {
                    operation: "mount",
                    key: key(),
                    kind: Kind::Committed,
                }
                .into(),
                Code::FailedPrecondition,
            ),
            (
                StoreError::HasChildren { key: key() }.into(),
                Code::FailedPrecondition,
            ),
            (
                StoreError::ImmutableField { path: key() }.into(),
                Code::InvalidArgument,
            ),
            (
                StoreError::Filter(FilterError {
                    filter: key(),
                    offset: 0,
                    problem: key(),
                })
                .into(),
                Code::InvalidArgument,
            ),
            (StoreError::Closed.into(), Code::Unavailable),
            (
                DriverError::io("write", "/x")(std::io::ErrorKind::StorageFull.into()),
                Code::ResourceExhausted,
            ),
            (DriverError::Unavailable(key()), Code::Unavailable),
        ];
        for (error, expected) in rows {
            assert_eq!(code(&error), expected, "{error}");
        }
        let refused = of(&StoreError::HasChildren { key: key() }.into());
        assert!(refused.message().contains("remove"));
    }
}
