//! containerd's gRPC messages and services, compiled from the protos under `proto/`.
//!
//! Server side: [`snapshots`]. Client side, against containerd's own socket: [`content`],
//! [`images`], [`version`], [`introspection`], [`namespaces`].

/// Messages shared by several services.
pub mod types {
    pub use super::containerd::types::{Descriptor, Mount, Platform};
}

/// `containerd.services.snapshots.v1`.
pub mod snapshots {
    pub use super::containerd::services::snapshots::v1::*;
}

/// `containerd.services.content.v1`, the reading half.
pub mod content {
    pub use super::containerd::services::content::v1::*;
}

/// `containerd.services.images.v1`, the reading half.
pub mod images {
    pub use super::containerd::services::images::v1::*;
}

/// `containerd.services.version.v1`.
pub mod version {
    pub use super::containerd::services::version::v1::*;
}

/// `containerd.services.introspection.v1`.
pub mod introspection {
    pub use super::containerd::services::introspection::v1::*;
}

/// `containerd.services.namespaces.v1`, the reading half.
pub mod namespaces {
    pub use super::containerd::services::namespaces::v1::*;
}

// The generated code refers to other packages by relative path, so the module tree below has to
// be the package tree.
#[allow(
    missing_docs,
    missing_debug_implementations,
    unreachable_pub,
    unused_qualifications,
    clippy::all,
    clippy::pedantic,
    reason = "generated code"
)]
mod containerd {
    pub mod types {
        tonic::include_proto!("containerd.types");
    }
    pub mod services {
        pub mod snapshots {
            pub mod v1 {
                tonic::include_proto!("containerd.services.snapshots.v1");
            }
        }
        pub mod content {
            pub mod v1 {
                tonic::include_proto!("containerd.services.content.v1");
            }
        }
        pub mod images {
            pub mod v1 {
                tonic::include_proto!("containerd.services.images.v1");
            }
        }
        pub mod version {
            pub mod v1 {
                tonic::include_proto!("containerd.services.version.v1");
            }
        }
        pub mod introspection {
            pub mod v1 {
                tonic::include_proto!("containerd.services.introspection.v1");
            }
        }
        pub mod namespaces {
            pub mod v1 {
                tonic::include_proto!("containerd.services.namespaces.v1");
            }
        }
    }
}

#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    reason = "generated code"
)]
mod google {
    pub mod rpc {
        tonic::include_proto!("google.rpc");
    }
}
