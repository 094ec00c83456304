//! A machine that only remembers what was done to it.

use super::{PowerAction, Signal, Syscalls, Target};
use rustix::mount::MountFlags;
use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};

/// Remembers calls, one line each, and answers with what a test put there. Clones share their memory.
#[derive(Debug, Default, Clone)]
pub struct Fake {
    calls: Arc<Mutex<Vec<String>>>,
    files: Arc<Mutex<BTreeMap<String, String>>>,
    failures: Arc<Mutex<BTreeMap<String, io::ErrorKind>>>,
}

impl Fake {
    /// Puts a file there.
    pub fn file(&self, path: &str, content: &str) {
        self.files.lock().unwrap().insert(path.into(), content.into());
    }

    /// A call that begins with this will fail.
    pub fn fail(&self, call: &str, kind: io::ErrorKind) {
        self.failures.lock().unwrap().insert(call.into(), kind);
    }

    /// Calls so far.
    pub fn calls(&self) -> Vec<String> {
        self.calls.lock().unwrap().clone()
    }

    fn call(&self, call: String) -> io::Result<()> {
        let failure =
            self.failures.lock().unwrap().iter().find(|(start, _)| call.starts_with(*start)).map(|(_, k)| *k);
        self.calls.lock().unwrap().push(call);
        failure.map_or(Ok(()), |kind| Err(kind.into()))
    }
}

impl Syscalls for Fake {
    fn mount(&self, source: &str, target: &str, kind: &str, _: MountFlags, _: &str) -> io::Result<()> {
        self.call(format!("mount {source} {target} {kind}"))
    }
    fn move_mount(&self, from: &str, to: &str) -> io::Result<()> {
        self.call(format!("move_mount {from} {to}"))
    }
    fn enter_root(&self, path: &str) -> io::Result<()> {
        self.call(format!("enter_root {path}"))
    }
    fn unmount(&self, target: &str, detach: bool) -> io::Result<()> {
        self.call(format!("unmount {target}{}", if detach { " detach" } else { "" }))
    }
    fn remount_read_only(&self, target: &str) -> io::Result<()> {
        self.call(format!("remount_read_only {target}"))
    }
    fn load_module(&self, path: &str) -> io::Result<()> {
        self.call(format!("load_module {path}"))
    }
    fn directory(&self, path: &str, mode: u32, owner: u32) -> io::Result<()> {
        self.call(format!("directory {path} {mode:o} {owner}"))
    }
    fn read(&self, path: &str) -> io::Result<String> {
        self.files.lock().unwrap().get(path).cloned().ok_or(io::ErrorKind::NotFound.into())
    }
    fn write(&self, path: &str, content: &str) -> io::Result<()> {
        self.file(path, content);
        self.call(format!("write {path} {}", content.trim_end()))
    }
    fn exists(&self, path: &str) -> bool {
        self.files.lock().unwrap().contains_key(path)
    }
    fn set_hostname(&self, name: &str) -> io::Result<()> {
        self.call(format!("set_hostname {name}"))
    }
    fn loopback_up(&self) -> io::Result<()> {
        self.call("loopback_up".into())
    }
    fn catch_ctrl_alt_del(&self) -> io::Result<()> {
        self.call("catch_ctrl_alt_del".into())
    }
    fn kill(&self, target: Target, signal: Signal) -> io::Result<()> {
        self.call(format!("kill {target:?} {signal:?}"))
    }
    fn collect(&self) -> Option<(u32, crate::process::Exit)> {
        None
    }
    fn sync(&self) {
        // Never fails; the call is remembered.
        let _ = self.call("sync".into());
    }
    fn power(&self, action: PowerAction) -> io::Result<()> {
        self.call(format!("power {action:?}"))
    }
}
