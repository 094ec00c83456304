//! The readiness protocol: services send datagrams such as `READY=1\nSTATUS=…` to `$NOTIFY_SOCKET`, and `WATCHDOG=1`
//! at least each `$WATCHDOG_USEC` microseconds where that is set, and
//! `EXTEND_TIMEOUT_USEC=…` when they take longer to be ready, as systemd's services do. The kernel says
//! which process sent one; only a process in a service's own cgroup speaks for that service.

use crate::error::{Error, Result};
use crate::sys::{self, Datagram};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::time::Duration;

/// Longest status text kept.
const LONGEST_STATUS: usize = 512;

/// What a service says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// It is ready.
    Ready,
    /// It says this of itself.
    Status(String),
    /// It is alive.
    Alive,
    /// It takes this much longer until it is ready.
    TakesLonger(Duration),
}

/// The socket.
#[derive(Debug)]
pub struct NotifySocket {
    socket: UnixDatagram,
}

impl NotifySocket {
    /// Makes the socket; everyone may send, since the sender is known for certain.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn bind(path: &Path) -> Result<Self> {
        let name = path.display().to_string();
        // Left by a run before, in tests only: /run is new at each boot.
        let _ = std::fs::remove_file(path);
        let socket = UnixDatagram::bind(path).map_err(Error::file("make the socket", &name))?;
        rustix::net::sockopt::set_socket_passcred(&socket, true)
            .map_err(Error::system("ask for the senders of notifications"))?;
        socket.set_nonblocking(true).map_err(Error::file("set up the socket", &name))?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o666))
            .map_err(Error::file("open to all services", &name))?;
        Ok(Self { socket })
    }

    /// The next datagram; `None` when there is none now.
    pub fn receive(&self) -> Option<Datagram> {
        loop {
            match sys::receive_with_credentials(self.socket.as_fd()) {
                Ok(datagram) => return Some(datagram),
                // From a process of a foreign pid namespace, or one that sent nothing valid: pass over.
                Err(error) if error.kind() == std::io::ErrorKind::InvalidData => {}
                Err(_) => return None,
            }
        }
    }
}

impl AsFd for NotifySocket {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// What a datagram says, in order; what init does not know is passed over.
pub fn parse(content: &[u8]) -> Vec<Notice> {
    String::from_utf8_lossy(content)
        .lines()
        .filter_map(|line| match line.split_once('=') {
            Some(("READY", "1")) => Some(Notice::Ready),
            Some(("WATCHDOG", "1")) => Some(Notice::Alive),
            Some(("EXTEND_TIMEOUT_USEC", text)) => {
                text.parse().ok().map(|micros| Notice::TakesLonger(Duration::from_micros(micros)))
            }
            Some(("STATUS", text)) => {
                Some(Notice::Status(text.chars().filter(|c| !c.is_control()).take(LONGEST_STATUS).collect()))
            }
            _ => None,
        })
        .collect()
}

/// The service whose cgroup this is, from the text of `/proc/<pid>/cgroup`.
pub fn service_of_cgroup(text: &str) -> Option<&str> {
    let path = text.lines().find_map(|line| line.strip_prefix("0::"))?;
    path.strip_prefix("/atoll/services/")?.split('/').next().filter(|name| !name.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_ready_and_status_and_passes_over_the_rest() {
        assert_eq!(
            parse(b"READY=1\nSTATUS=up \x1b[2J\nMAINPID=1\nREADY=0\nWATCHDOG=1\nWATCHDOG=trigger\nEXTEND_TIMEOUT_USEC=5000000\nEXTEND_TIMEOUT_USEC=-1\n\xff"),
            [Notice::Ready, Notice::Status("up [2J".into()), Notice::Alive, Notice::TakesLonger(Duration::from_secs(5))]
        );
        assert_eq!(parse(b""), []);
    }

    #[test]
    fn a_service_is_known_by_its_cgroup() {
        assert_eq!(service_of_cgroup("0::/atoll/services/runtime\n"), Some("runtime"));
        assert_eq!(service_of_cgroup("0::/atoll/services/runtime/helper\n"), Some("runtime"));
        assert_eq!(service_of_cgroup("0::/atoll/pods/x\n"), None);
        assert_eq!(service_of_cgroup("0::/atoll/services/\n"), None);
        assert_eq!(service_of_cgroup("1:name=systemd:/atoll/services/x\n"), None);
    }

    #[test]
    fn senders_are_told_by_the_kernel() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify.sock");
        let socket = NotifySocket::bind(&path).unwrap();
        assert_eq!(socket.receive(), None);
        UnixDatagram::unbound().unwrap().send_to(b"READY=1", &path).unwrap();
        let datagram = socket.receive().unwrap();
        assert_eq!((datagram.pid, datagram.content.as_slice()), (std::process::id(), &b"READY=1"[..]));
    }
}
