//! Generated types of the Kubernetes Container Runtime Interface v1.
