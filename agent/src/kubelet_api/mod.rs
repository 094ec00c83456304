//! The kubelet API on port 10250: logs, exec, attach, port-forward, pods, health.
//!
//! Containers are found through CRI by the labels `io.kubernetes.pod.{name,namespace,uid}` and
//! `io.kubernetes.container.name`, which `pods` puts on what it makes; the newest attempt is the current one.
