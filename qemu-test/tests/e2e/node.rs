//! The node as kubectl shows it.

use crate::shared::ready_lab;
use atoll_qemu_test::process::wait_for;
use std::time::Duration;

#[test]
fn get_nodes_wide_looks_as_on_any_node() -> anyhow::Result<()> {
    let text = ready_lab().supervisor.kubectl_ok(&["get", "nodes", "node-1", "-o", "wide"])?;
    for part in ["Ready", "10.77.0.10", "Atoll", "atoll://", "v1.37"] {
        assert!(text.contains(part), "no {part:?} in\n{text}");
    }
    Ok(())
}

#[test]
fn describe_node_has_conditions_capacity_and_system_info() -> anyhow::Result<()> {
    let text = ready_lab().supervisor.kubectl_ok(&["describe", "node", "node-1"])?;
    for part in [
        "MemoryPressure",
        "DiskPressure",
        "PIDPressure",
        "KubeletReady",
        "kubernetes.io/arch=amd64",
        "Allocatable",
        "InternalIP",
        "pods:",
        "Lease",
    ] {
        assert!(text.contains(part), "no {part:?} in\n{text}");
    }
    Ok(())
}

#[test]
fn lease_is_renewed() -> anyhow::Result<()> {
    let lab = &ready_lab();
    let renewed = || {
        lab.supervisor.kubectl_ok(&[
            "get",
            "lease",
            "-n",
            "kube-node-lease",
            "node-1",
            "-o",
            "jsonpath={.spec.renewTime}",
        ])
    };
    let first = renewed()?;
    assert!(!first.is_empty());
    wait_for("a new renewTime", Duration::from_secs(45), || Ok((renewed()? != first).then_some(())))
}

#[test]
fn serving_certificate_was_signed_by_the_cluster() -> anyhow::Result<()> {
    let lab = &ready_lab();
    wait_for("an approved kubelet-serving certificate", Duration::from_secs(60), || {
        let text = lab.supervisor.kubectl_ok(&["get", "csr"])?;
        Ok(text
            .lines()
            .any(|line| line.contains("kubernetes.io/kubelet-serving") && line.contains("Approved,Issued"))
            .then_some(()))
    })
}

#[test]
fn kubelet_api_refuses_callers_without_credentials() -> anyhow::Result<()> {
    let _lab = ready_lab();
    let host = { crate::shared::machine().address() };
    let output = atoll_qemu_test::process::run(
        std::process::Command::new("curl").args([
            "-sk",
            "-o",
            "/dev/null",
            "-w",
            "%{http_code}",
            &format!("https://{host}:10250/pods"),
        ]),
        Duration::from_secs(20),
    )?;
    assert_eq!(output.stdout, "401");
    Ok(())
}

#[test]
fn kubelet_api_refuses_a_service_account_without_rights_and_one_that_is_gone() -> anyhow::Result<()> {
    let lab = ready_lab();
    let host = { crate::shared::machine().address() };
    lab.supervisor.kubectl_ok(&["create", "serviceaccount", "caller"])?;
    let token = lab.supervisor.kubectl_ok(&["create", "token", "caller", "--duration=10m"])?;
    let asked = || {
        let mut curl = std::process::Command::new("curl");
        curl.args(["-sk", "-o", "/dev/null", "-w", "%{http_code}", "-H"]);
        curl.arg(format!("Authorization: Bearer {}", token.trim()));
        curl.arg(format!("https://{host}:10250/pods"));
        atoll_qemu_test::process::run_ok(&mut curl, Duration::from_secs(20))
    };
    assert_eq!(asked()?, "403");
    lab.supervisor.kubectl_ok(&["delete", "serviceaccount", "caller"])?;
    // The API server and the node each believe in a token for some seconds.
    wait_for("its token to be refused", Duration::from_secs(60), || Ok((asked()? == "401").then_some(())))
}
