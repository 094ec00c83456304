//! Runs the programs that the builder stands on: those of the build machine (`dpkg-deb`, `apt-get`, `make`, `xz`)
//! and those of pinned Debian packages, started by their own dynamic loader so that the build machine's
//! libraries never matter.

use crate::error::{Error, Result};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// 2026-01-01 00:00:00 UTC: the time of everything that must have one.
pub const SOURCE_DATE: &str = "1767225600";

/// A program to run, and the reason it runs, for messages.
pub struct Program {
    name: String,
    purpose: String,
    command: Command,
}

impl Program {
    /// A program of the build machine.
    pub fn host(name: &str, purpose: impl Into<String>) -> Self {
        Self { name: name.into(), purpose: purpose.into(), command: Command::new(name) }
    }

    /// A program out of unpacked Debian packages that lie merged in `root`; `name` is what it is called as.
    pub fn debian(root: &Path, path: &str, name: &str, purpose: impl Into<String>) -> Self {
        let libraries = root.join("usr/lib/x86_64-linux-gnu");
        let mut command = Command::new(libraries.join("ld-linux-x86-64.so.2"));
        command.arg("--library-path").arg(&libraries).arg("--argv0").arg(name).arg(root.join(path));
        command.env("GCONV_PATH", libraries.join("gconv"));
        Self { name: name.into(), purpose: purpose.into(), command }
    }

    /// Adds one argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<std::ffi::OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<S: AsRef<std::ffi::OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.command.args(args);
        self
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn env(mut self, key: &str, value: impl AsRef<std::ffi::OsStr>) -> Self {
        self.command.env(key, value);
        self
    }

    /// Runs it in a directory.
    #[must_use]
    pub fn current_dir(mut self, dir: &Path) -> Self {
        self.command.current_dir(dir);
        self
    }

    /// Gives it a file as standard input.
    pub fn stdin(mut self, path: &Path) -> Result<Self> {
        let file = std::fs::File::open(path).map_err(Error::file("open", path))?;
        self.command.stdin(Stdio::from(file));
        Ok(self)
    }

    /// Runs it to its end; its output is returned, or shown in the error.
    pub fn run(self) -> Result<Vec<u8>> {
        let Self { name, purpose, mut command } = self;
        command.env("LC_ALL", "C").env("TZ", "UTC");
        let output = match command.output() {
            Ok(output) => output,
            Err(source) => return Err(Error::NoProgram { program: name, purpose, source }),
        };
        if output.status.success() {
            return Ok(output.stdout);
        }
        let mut text = String::from_utf8_lossy(&output.stderr).into_owned();
        if text.trim().is_empty() {
            text = String::from_utf8_lossy(&output.stdout).into_owned();
        }
        let lines: Vec<&str> = text.lines().collect();
        let tail = lines[lines.len().saturating_sub(20)..].join("\n");
        Err(Error::Program { program: name, purpose, status: output.status, tail })
    }
}

/// The unpacked packages that hold tools, merged into one directory.
#[derive(Debug, Clone)]
pub struct Tools(pub PathBuf);

impl Tools {
    /// `mkfs.erofs`.
    pub fn mkfs_erofs(&self) -> Program {
        Program::debian(&self.0, "usr/bin/mkfs.erofs", "mkfs.erofs", "pack the read-only system tree")
    }

    /// `depmod`.
    pub fn depmod(&self) -> Program {
        Program::debian(&self.0, "usr/bin/kmod", "depmod", "index the kernel modules")
    }

    /// `mkfs.fat`.
    pub fn mkfs_fat(&self) -> Program {
        Program::debian(&self.0, "usr/sbin/mkfs.fat", "mkfs.fat", "make the ESP's file system")
    }

    /// One of mtools, with times fixed.
    pub fn mtools(&self, name: &str) -> Program {
        let program = Program::debian(&self.0, "usr/bin/mtools", name, "fill the ESP");
        program.env("SOURCE_DATE_EPOCH", SOURCE_DATE).env("MTOOLSRC", "/dev/null")
    }

    /// `osslsigncode`.
    pub fn osslsigncode(&self) -> Program {
        Program::debian(&self.0, "usr/bin/osslsigncode", "osslsigncode", "sign a boot file for Secure Boot")
    }

    /// `openssl`.
    pub fn openssl(&self, purpose: &str) -> Program {
        Program::debian(&self.0, "usr/bin/openssl", "openssl", purpose).env("OPENSSL_CONF", "/dev/null")
    }
}
