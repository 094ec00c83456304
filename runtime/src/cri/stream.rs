//! Exec, Attach, PortForward: answers where the streaming server will serve them.

use super::{Cri, missing, status};
use crate::service::Command;
use crate::streaming::{Job, Streams};
use atoll_cri::v1::{
    AttachRequest, AttachResponse, ExecRequest, ExecResponse, PortForwardRequest, PortForwardResponse,
};
use tonic::Status;

fn check(streams: Streams) -> Result<Streams, Status> {
    if streams.tty && streams.stderr {
        return Err(Status::invalid_argument("tty and stderr exclude each other: a terminal has one output"));
    }
    if !streams.stdin && !streams.stdout && !streams.stderr {
        return Err(Status::invalid_argument("at least one of stdin, stdout and stderr is needed"));
    }
    Ok(streams)
}

impl Cri {
    pub(super) async fn exec_url(&self, r: ExecRequest) -> Result<ExecResponse, Status> {
        let streams = check(Streams { stdin: r.stdin, stdout: r.stdout, stderr: r.stderr, tty: r.tty })?;
        if r.cmd.is_empty() {
            return Err(missing("cmd"));
        }
        let id = r.container_id.clone();
        self.service.ask(|reply| Command::UseContainer(id, reply)).await.map_err(status)?;
        let job = Job::Exec { container: r.container_id, command: r.cmd, streams };
        Ok(ExecResponse { url: self.streaming.url(job).map_err(status)? })
    }

    pub(super) async fn attach_url(&self, r: AttachRequest) -> Result<AttachResponse, Status> {
        let streams = check(Streams { stdin: r.stdin, stdout: r.stdout, stderr: r.stderr, tty: r.tty })?;
        let id = r.container_id.clone();
        self.service.ask(|reply| Command::UseContainer(id, reply)).await.map_err(status)?;
        let job = Job::Attach { container: r.container_id, streams };
        Ok(AttachResponse { url: self.streaming.url(job).map_err(status)? })
    }

    pub(super) async fn port_forward_url(
        &self,
        r: PortForwardRequest,
    ) -> Result<PortForwardResponse, Status> {
        let id = r.pod_sandbox_id.clone();
        self.service.ask(|reply| Command::UseSandbox(id, reply)).await.map_err(status)?;
        let port =
            |p: &i32| u16::try_from(*p).map_err(|_| Status::invalid_argument(format!("{p} is not a port")));
        let ports = r.port.iter().map(port).collect::<Result<Vec<_>, _>>()?;
        let job = Job::PortForward { sandbox: r.pod_sandbox_id, ports };
        Ok(PortForwardResponse { url: self.streaming.url(job).map_err(status)? })
    }
}
