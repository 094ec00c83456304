//! Version, Status, RuntimeConfig, UpdateRuntimeConfig.

use super::{Cri, status};
use crate::service::Command;
use crate::vm::address::PodCidr;
use atoll_cri::v1::{
    CgroupDriver, LinuxRuntimeConfiguration, RuntimeCondition, RuntimeConfigResponse, RuntimeFeatures,
    RuntimeHandler, RuntimeHandlerFeatures, RuntimeStatus, StatusRequest, StatusResponse,
    UpdateRuntimeConfigRequest, UpdateRuntimeConfigResponse, VersionResponse,
};
use std::collections::HashMap;
use tonic::Status;

/// Name of the runtime in versions and container ids.
pub const RUNTIME_NAME: &str = "atoll";

pub(super) fn version() -> VersionResponse {
    VersionResponse {
        version: "0.1.0".to_owned(),
        runtime_name: RUNTIME_NAME.to_owned(),
        runtime_version: env!("CARGO_PKG_VERSION").to_owned(),
        runtime_api_version: "v1".to_owned(),
    }
}

/// Pods have no cgroup on the host that a kubelet would manage, so the simple driver it is.
pub(super) fn config() -> RuntimeConfigResponse {
    RuntimeConfigResponse {
        linux: Some(LinuxRuntimeConfiguration { cgroup_driver: CgroupDriver::Cgroupfs.into() }),
    }
}

fn condition(kind: &str, reason: &str, result: Result<(), String>) -> RuntimeCondition {
    RuntimeCondition {
        r#type: kind.to_owned(),
        status: result.is_ok(),
        reason: if result.is_ok() { String::new() } else { reason.to_owned() },
        message: result.err().unwrap_or_default(),
    }
}

impl Cri {
    pub(super) async fn runtime_status(&self, request: StatusRequest) -> Result<StatusResponse, Status> {
        let network = self.service.ask(Command::NetworkReady).await.map_err(status)?;
        let conditions = vec![
            condition("RuntimeReady", "VirtualizationMissing", self.service.check_host()),
            condition("NetworkReady", "NetworkNotConfigured", network),
        ];
        let mut info = HashMap::new();
        if request.verbose {
            let config = self.service.config();
            info.insert(
                "config".to_owned(),
                serde_json::json!({
                    "data": config.data, "vmm": config.vmm, "guestKernel": config.guest_kernel,
                    "streaming": self.streaming.base(), "criApi": atoll_cri::CRI_API_VERSION,
                })
                .to_string(),
            );
        }
        Ok(StatusResponse {
            status: Some(RuntimeStatus { conditions }),
            info,
            runtime_handlers: ["", RUNTIME_NAME].map(handler).to_vec(),
            features: Some(RuntimeFeatures::default()),
        })
    }

    pub(super) async fn set_runtime_config(
        &self,
        request: UpdateRuntimeConfigRequest,
    ) -> Result<UpdateRuntimeConfigResponse, Status> {
        let network = request.runtime_config.and_then(|c| c.network_config);
        let Some(network) = network.filter(|n| !n.pod_cidr.is_empty()) else {
            return Ok(UpdateRuntimeConfigResponse {});
        };
        let cidr = PodCidr::parse(&network.pod_cidr).map_err(Status::invalid_argument)?;
        self.service.ask(|reply| Command::SetPodCidr(cidr, reply)).await.map_err(status)?;
        Ok(UpdateRuntimeConfigResponse {})
    }
}

fn handler(name: &str) -> RuntimeHandler {
    RuntimeHandler {
        name: name.to_owned(),
        features: Some(RuntimeHandlerFeatures { recursive_read_only_mounts: false, user_namespaces: false }),
    }
}
