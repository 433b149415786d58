//! The gRPC side: containerd's Snapshots service in, containerd's content, images and leases out.
//!
//! Translation only. [`labels`] makes typed values of strings once; [`filter`] is containerd's filter grammar; [`status`] is the
//! one table from errors to codes; [`service`] puts a [`Snapshotter`](crate::snapshot::Snapshotter) behind the wire;
//! [`serve`](server::serve) bounds what a peer can make us hold; [`content`] reads layers that containerd already has, for the daemon,
//! which must not wait; [`ingest`] gives it those that were pulled here; [`containerd`] is the `soci` tool's client, which may wait;
//! [`CriImages`] passes CRI's image service on, for the logins in it.
//!
//! Absent on purpose: decisions. They are in [`crate::snapshot`].
#![forbid(unsafe_code)]

pub mod containerd;
pub mod content;
mod cri;
pub mod filter;
pub mod ingest;
pub mod labels;
mod server;
mod service;
mod source;
mod status;

pub use cri::CriImages;
pub use server::{Limits, serve};
pub use service::Service;
pub use source::ContainerdBlob;
pub use status::status;

/// What the wire carries, compiled from `src/grpc/proto`.
pub mod proto {
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
        pub mod leases {
            pub mod v1 {
                tonic::include_proto!("containerd.services.leases.v1");
            }
        }
    }
    pub mod cri {
        tonic::include_proto!("runtime.v1");
    }
    pub use services::content::v1 as content;
    pub use services::images::v1 as images;
    pub use services::leases::v1 as leases;
    pub use services::snapshots::v1 as snapshots;
}
