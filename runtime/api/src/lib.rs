//! Generated types of the Kubernetes Container Runtime Interface v1, client and server.
//!
//! `proto/api.proto` is the file of the `k8s.io/cri-api` release named by [`CRI_API_VERSION`], unchanged; the agent
//! uses the clients, the runtime the servers. Invariant: nothing here is written by hand but names.

/// Release of `k8s.io/cri-api` that `proto/api.proto` comes from.
pub const CRI_API_VERSION: &str = "v0.37.1";

/// Package `runtime.v1`.
#[expect(
    missing_docs,
    clippy::allow_attributes,
    clippy::doc_lazy_continuation,
    reason = "generated; the documentation is in proto/api.proto"
)]
pub mod v1 {
    tonic::include_proto!("runtime.v1");
}

/// Clients and servers by name.
pub use v1::{
    image_service_client::ImageServiceClient,
    image_service_server::{ImageService, ImageServiceServer},
    runtime_service_client::RuntimeServiceClient,
    runtime_service_server::{RuntimeService, RuntimeServiceServer},
};
