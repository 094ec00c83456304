//! Sandbox commands of the owner.

use crate::error::{Error, Result};
use crate::service::admission::{self, Admission};
use crate::service::container::{CODE_VM_LOST, ContainerEvent, Ended, REASON_ERROR};
use crate::service::guests::Attention;
use crate::service::owner::{Done, Owner, Sandbox, answer};
use crate::service::sandbox::{SandboxEvent, SandboxPhase};
use crate::service::{ContainerView, EventKind, Reply, RunningSandbox, SandboxView, random_hex, recover};
use crate::spec::SandboxSpec;
use crate::vm::address::{GATEWAY, GATEWAY_MAC, MTU, pod_mac};
use crate::vm::launch::{self, Plan, unix_ns};
use crate::vm::network::Port;
use crate::vm::pod::PodVm;
use atoll_spec::guest::{GuestConfig, GuestNetwork};
use atoll_spec::ids::{ContainerId, SandboxId};
use atoll_spec::units::GuestCid;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;
use tokio::sync::watch;

/// Vsock addresses are given out below this, then from the start again: the VMMs' user ids follow them.
const CID_END: u32 = 60_000;
/// Shared memory of a pod, as container runtimes give it.
const SHM_BYTES: u64 = 64 << 20;
/// Exit code of what a stop of its sandbox killed.
const CODE_KILLED: i32 = 137;

impl Owner {
    pub(super) fn run_sandbox(&mut self, spec: SandboxSpec, reply: Reply<SandboxId>) {
        match self.prepare_sandbox(spec) {
            Ok((id, plan)) => {
                let launcher = self.shared.launcher.clone();
                self.jobs
                    .spawn(async move { Done::Launched(id, launch::launch(&launcher, plan).await, reply) });
            }
            Err(error) => answer(reply, Err(error)),
        }
    }

    fn prepare_sandbox(&mut self, spec: SandboxSpec) -> Result<(SandboxId, Plan)> {
        if let Some(twin) = self.sandboxes.values().find(|s| s.spec.name == spec.name && s.phase.has_vm()) {
            let name = &spec.name;
            return Err(Error::Exists(format!(
                "pod {}/{} attempt {} has sandbox {} already: stop that one, or count the attempt up",
                name.namespace, name.name, name.attempt, twin.id
            )));
        }
        if !spec.log_directory.is_empty() {
            self.shared.roots.check_log(Path::new(&spec.log_directory))?;
        }
        self.shared.launcher.host.check().map_err(Error::State)?;
        self.network.clone().map_err(|why| Error::State(format!("pods have no network: {why}")))?;
        let id: SandboxId = random_hex()?.parse().map_err(|e| Error::Invalid(format!("{e}")))?;
        let cid = self.free_cid()?;
        let address = self.pool.take().map_err(Error::State)?;
        let port = Port { tap: format!("atoll{}", cid.get()), address, mac: pod_mac(address) };
        let directory = self.shared.config.sandboxes().join(id.as_str());
        if let Err(error) = std::fs::create_dir_all(&directory).map_err(Error::io("make", &directory)) {
            self.pool.release(address);
            return Err(error);
        }
        let sandbox = Sandbox {
            id: id.clone(),
            spec,
            phase: SandboxPhase::Launching,
            created_ns: unix_ns(),
            cid,
            port,
            trees: BTreeMap::new(),
            extents: BTreeMap::new(),
            vm: None,
            watches: HashMap::new(),
            cancel: watch::Sender::new(false),
            saved: false,
            unwinding: false,
            stop_waiters: Vec::new(),
            remove_waiters: Vec::new(),
            attention: Attention::default(),
        };
        let plan = self.plan(&sandbox);
        self.sandboxes.insert(id.clone(), sandbox);
        self.save(&id);
        Ok((id, plan))
    }

    fn plan(&self, sandbox: &Sandbox) -> Plan {
        let config = &self.shared.config;
        let remains = self.remains(sandbox);
        let spec = &sandbox.spec;
        let host_dns = || std::fs::read_to_string(&config.resolv_conf).unwrap_or_default();
        let guest = GuestConfig {
            hostname: spec.guest_hostname().to_owned(),
            network: Some(GuestNetwork {
                address: sandbox.port.address,
                gateway: GATEWAY,
                gateway_mac: GATEWAY_MAC,
                mtu: MTU,
            }),
            resolv_conf: spec.dns.resolv_conf().unwrap_or_else(host_dns),
            sysctls: spec.sysctls.clone(),
            share_process_namespace: spec.share_pids,
            unix_ns: unix_ns(),
            scratch_disk: true,
            shm_bytes: SHM_BYTES,
        };
        Plan {
            sandbox: sandbox.id.clone(),
            directory: remains.directory,
            socket: remains.socket,
            cid: sandbox.cid,
            port: sandbox.port.clone(),
            uid: config.vmm_uid_base.saturating_add(sandbox.cid.get()),
            memory: spec.memory,
            vcpus: spec.vcpus,
            storage_limit: spec.storage_limit,
            guest,
            console: config.guest_console,
            deadline: config.launch_deadline(),
            cancelled: sandbox.cancel.subscribe(),
        }
    }

    /// A vsock address that no sandbox has; not one that was just freed.
    fn free_cid(&mut self) -> Result<GuestCid> {
        let first = GuestCid::FIRST.get();
        for _ in first..CID_END {
            let candidate = self.next_cid;
            self.next_cid = if candidate + 1 >= CID_END { first } else { candidate + 1 };
            let taken = self.sandboxes.values().any(|s| s.cid.get() == candidate);
            if let Some(cid) = GuestCid::new(candidate).filter(|_| !taken) {
                return Ok(cid);
            }
        }
        Err(Error::State("every vsock address is in use: remove sandboxes".to_owned()))
    }

    pub(super) fn launched(&mut self, id: &SandboxId, result: Result<Arc<PodVm>>, reply: Reply<SandboxId>) {
        match result {
            Ok(vm) => {
                self.watch_vm(id, vm.clone());
                if self.move_sandbox(id, &SandboxEvent::Launched) {
                    self.emit(id, id.as_str(), EventKind::Created);
                    self.emit(id, id.as_str(), EventKind::Started);
                    answer(reply, Ok(id.clone()));
                    return;
                }
                // Somebody stopped it meanwhile.
                self.jobs.spawn(async move {
                    vm.stop(false).await;
                    Done::Nothing
                });
                answer(
                    reply,
                    Err(Error::State(format!("sandbox {id} was stopped while it was being launched"))),
                );
            }
            Err(error) => {
                tracing::warn!(sandbox = %id, %error, "sandbox could not be launched");
                self.forget_sandbox(id);
                answer(reply, Err(error));
            }
        }
    }

    /// Notes the VM of a sandbox and watches for its end.
    pub(super) fn watch_vm(&mut self, id: &SandboxId, vm: Arc<PodVm>) {
        if let Some(sandbox) = self.sandboxes.get_mut(id) {
            sandbox.vm = Some(vm.clone());
        }
        let id = id.clone();
        self.watchers.spawn(async move { Done::VmEnded(id, vm.process.exited().await) });
    }

    /// Drops a sandbox that never was, with its directory.
    fn forget_sandbox(&mut self, id: &SandboxId) {
        if let Some(sandbox) = self.sandboxes.remove(id) {
            self.pool.release(sandbox.port.address);
            for waiter in sandbox.stop_waiters.into_iter().chain(sandbox.remove_waiters) {
                answer(waiter, Ok(()));
            }
        }
        if let Err(error) = recover::delete(&self.shared.config, id) {
            tracing::error!(sandbox = %id, %error, "cannot remove a sandbox's directory");
        }
    }

    pub(super) fn stop_sandbox(&mut self, id: &str, reply: Reply<()>) {
        let found = self.find_sandbox(id);
        let admission = admission::stop_sandbox(found.map(|s| &s.phase));
        let Some(id) = found.map(|s| s.id.clone()) else { return answer(reply, Ok(())) };
        match admission {
            Admission::Go => {
                self.move_sandbox(&id, &SandboxEvent::StopAsked);
                self.take_down(&id, Some(reply));
            }
            Admission::Join | Admission::Done => self.wait_stopped(&id, reply),
            Admission::Deny(error) => answer(reply, Err(error)),
        }
    }

    /// Answers once the VM is gone and nothing of it is left.
    fn wait_stopped(&mut self, id: &SandboxId, reply: Reply<()>) {
        match self.sandboxes.get_mut(id) {
            Some(sandbox) if sandbox.phase.has_vm() || sandbox.unwinding => sandbox.stop_waiters.push(reply),
            _ => answer(reply, Ok(())),
        }
    }

    fn take_down(&mut self, id: &SandboxId, reply: Option<Reply<()>>) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        sandbox.stop_waiters.extend(reply);
        sandbox.watches.clear();
        // Without a VM the launch is still on: it unwinds, and its end answers.
        sandbox.cancel.send_replace(true);
        if let Some(vm) = sandbox.vm.clone() {
            self.jobs.spawn(async move {
                vm.stop(true).await;
                Done::Nothing
            });
        }
    }

    pub(super) fn vm_ended(&mut self, id: &SandboxId, status: i32) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        let asked = sandbox.phase == SandboxPhase::Stopping;
        let reason =
            if asked { "stopped".to_owned() } else { format!("its virtual machine ended (status {status})") };
        if !asked {
            tracing::error!(sandbox = %id, status, "a virtual machine ended by itself: see vmm.log in its directory");
        }
        if let Some(vm) = sandbox.vm.take() {
            vm.link.close();
        }
        sandbox.watches.clear();
        sandbox.unwinding = true;
        let remains = self.remains_of(id);
        self.move_sandbox(id, &SandboxEvent::VmEnded { reason: reason.clone() });
        self.end_containers(id, asked, &reason);
        self.emit(id, id.as_str(), EventKind::Stopped);
        if let Some(remains) = remains {
            let launcher = self.shared.launcher.clone();
            let id = id.clone();
            self.jobs.spawn(async move {
                launch::unwind(&launcher, &remains).await;
                Done::Unwound(id)
            });
        }
    }

    fn remains_of(&self, id: &SandboxId) -> Option<launch::Remains> {
        self.sandboxes.get(id).map(|s| self.remains(s))
    }

    /// Every container of a sandbox without VM has ended.
    pub(super) fn end_containers(&mut self, id: &SandboxId, asked: bool, reason: &str) {
        let ids: Vec<ContainerId> =
            self.containers.values().filter(|c| c.sandbox == *id).map(|c| c.id.clone()).collect();
        for container in ids {
            let told = self.containers.get_mut(&container).and_then(|c| c.ending.take());
            let ended = told.unwrap_or_else(|| Ended {
                code: if asked { CODE_KILLED } else { CODE_VM_LOST },
                reason: REASON_ERROR.to_owned(),
                message: format!("the pod's sandbox is gone: {reason}"),
                finished_ns: unix_ns(),
            });
            if self.move_container(&container, &ContainerEvent::Exited(ended)) {
                self.emit(id, container.as_str(), EventKind::Stopped);
            }
        }
    }

    pub(super) fn unwound(&mut self, id: &SandboxId) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        sandbox.unwinding = false;
        let address = sandbox.port.address;
        let remove = !sandbox.remove_waiters.is_empty();
        for waiter in sandbox.stop_waiters.drain(..) {
            answer(waiter, Ok(()));
        }
        self.pool.release(address);
        if remove {
            self.delete_sandbox(id);
        }
    }

    pub(super) fn remove_sandbox(&mut self, id: &str, reply: Reply<()>) {
        let found = self.find_sandbox(id);
        let admission = admission::remove_sandbox(found.map(|s| &s.phase));
        let Some(id) = found.map(|s| s.id.clone()) else { return answer(reply, Ok(())) };
        let Some(sandbox) = self.sandboxes.get_mut(&id) else { return };
        match admission {
            Admission::Go | Admission::Join => {
                sandbox.remove_waiters.push(reply);
                let unwinding = sandbox.unwinding;
                if self.move_sandbox(&id, &SandboxEvent::StopAsked) {
                    self.take_down(&id, None);
                } else if !unwinding {
                    self.delete_sandbox(&id);
                }
            }
            Admission::Done => answer(reply, Ok(())),
            Admission::Deny(error) => answer(reply, Err(error)),
        }
    }

    fn delete_sandbox(&mut self, id: &SandboxId) {
        if !self.move_sandbox(id, &SandboxEvent::RemoveAsked) {
            return;
        }
        let (shared, id) = (self.shared.clone(), id.clone());
        self.jobs.spawn_blocking(move || {
            let result = recover::delete(&shared.config, &id);
            Done::SandboxRemoved(id, result)
        });
    }

    pub(super) fn sandbox_removed(&mut self, id: &SandboxId, result: Result<()>) {
        let failed = result.err().map(|e| e.to_string());
        if failed.is_none() {
            self.emit(id, id.as_str(), EventKind::Deleted);
        }
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        let waiters = std::mem::take(&mut sandbox.remove_waiters);
        match &failed {
            None => {
                self.sandboxes.remove(id);
                let gone: Vec<ContainerId> =
                    self.containers.values().filter(|c| c.sandbox == *id).map(|c| c.id.clone()).collect();
                for container in gone {
                    self.drop_container(&container);
                }
            }
            // It can be asked for again.
            Some(why) => sandbox.phase = SandboxPhase::NotReady { reason: why.clone() },
        }
        for waiter in waiters {
            answer(waiter, failed.clone().map_or(Ok(()), |why| Err(Error::State(why))));
        }
    }

    pub(super) fn sandbox_status(&self, id: &str) -> Result<(SandboxView, Vec<ContainerView>)> {
        let sandbox = self.find_sandbox(id).ok_or_else(|| Error::no_sandbox(id))?;
        Ok((sandbox.view(), self.views_of(&sandbox.id)))
    }

    pub(super) fn use_sandbox(&self, id: &str) -> Result<RunningSandbox> {
        let sandbox = self.find_sandbox(id).ok_or_else(|| Error::no_sandbox(id))?;
        match (&sandbox.phase, &sandbox.vm) {
            (SandboxPhase::Ready, Some(vm)) => {
                Ok(RunningSandbox { vm: vm.clone(), address: sandbox.port.address })
            }
            _ => Err(Error::State(format!("sandbox {id} is not ready"))),
        }
    }
}
