//! Gives a lab its own network, process tree and mounts, so that nothing reaches the machine's network and nothing
//! survives the lab.

use anyhow::Context;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Set in the environment of processes inside a lab's namespaces.
pub const INSIDE: &str = "ATOLL_LAB_INSIDE";

/// Whether this process is inside a lab's namespaces.
pub fn inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// `unshare` (util-linux) with the namespaces of a lab; append the program to run. When `unshare` dies, the kernel
/// kills all that runs inside; when the caller dies, `unshare` does.
pub fn unshare() -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig=KILL", "unshare"]);
    with_namespaces(command)
}

/// Like [`unshare`], but it outlives the caller.
pub fn unshare_detached() -> Command {
    with_namespaces(Command::new("unshare"))
}

fn with_namespaces(mut command: Command) -> Command {
    if !rustix::process::geteuid().is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    command.args(["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--"]);
    command.env(INSIDE, "1");
    command
}

/// Runs this program again, with the same arguments, inside new namespaces; returns only when that fails.
pub fn reenter() -> anyhow::Error {
    let program = match std::env::current_exe().context("cannot find the running program") {
        Ok(program) => program,
        Err(error) => return error,
    };
    let error = unshare().arg(program).args(std::env::args_os().skip(1)).exec();
    anyhow::Error::new(error).context("cannot start unshare: install util-linux")
}

/// `nsenter` into the network of a lab whose first process has this number; append the program to run.
pub fn nsenter(pid: u32) -> Command {
    let mut command = Command::new("nsenter");
    command.arg(format!("--target={pid}"));
    if !rustix::process::geteuid().is_root() {
        command.args(["--user", "--preserve-credentials"]);
    }
    command.args(["--net", "--"]);
    command
}
