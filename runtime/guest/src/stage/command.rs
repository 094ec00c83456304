//! The command: where it is, and how its absence is told.

use crate::error::{Context as _, Failure, Result};
use crate::sys;
use crate::user::Identity;
use atoll_spec::guest::{GuestErrorKind, Process};
use rustix::fs::{Access, AtFlags, CWD, FileType, accessat, stat};
use rustix::io::Errno;
use std::ffi::CString;

/// Where programs are looked for when the container's environment does not say.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Arguments and environment, ready for the kernel.
pub struct Prepared {
    name: String,
    path: String,
    args: Vec<CString>,
    env: Vec<CString>,
}

fn c_string(text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| Failure::invalid("arguments and environment cannot hold a zero byte"))
}

fn value<'a>(env: &'a [String], name: &str) -> Option<&'a str> {
    // The last one counts, as for a shell that reads them in order.
    env.iter().rev().find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
}

impl Prepared {
    /// Completes the environment with what every process expects.
    pub fn new(process: &Process, who: &Identity) -> Result<Self> {
        let name = process.args.first().filter(|name| !name.is_empty());
        let name = name.ok_or_else(|| Failure::invalid("the container has no command"))?.clone();
        let mut env = process.env.clone();
        if value(&env, "PATH").is_none() {
            env.push(format!("PATH={DEFAULT_PATH}"));
        }
        if value(&env, "HOME").is_none_or(str::is_empty) {
            env.retain(|pair| !pair.starts_with("HOME="));
            env.push(format!("HOME={}", who.home));
        }
        if process.tty && value(&env, "TERM").is_none() {
            env.push("TERM=xterm".into());
        }
        let path = value(&env, "PATH").unwrap_or(DEFAULT_PATH).to_owned();
        let args = process.args.iter().map(|text| c_string(text)).collect::<Result<_>>()?;
        let env = env.iter().map(|text| c_string(text)).collect::<Result<_>>()?;
        Ok(Self { name, path, args, env })
    }

    /// Finds the program, seen as the user that will run it.
    pub fn find(&self) -> Result<CString> {
        if self.name.contains('/') {
            return c_string(&self.name);
        }
        let mut refused = None;
        for directory in self.path.split(':').map(|part| if part.is_empty() { "." } else { part }) {
            let candidate = format!("{}/{}", directory.trim_end_matches('/'), self.name);
            match executable(&candidate) {
                Ok(()) => return c_string(&candidate),
                Err(Errno::ACCESS) => refused = Some(candidate),
                Err(_) => {}
            }
        }
        Err(match refused {
            Some(path) => not_executable(&path, Errno::ACCESS),
            None => Failure::new(
                GuestErrorKind::CommandNotFound,
                format!("exec: \"{}\": executable file not found in $PATH", self.name),
            ),
        })
    }

    /// Becomes the program. Returns only the reason why not.
    pub fn exec(&self, program: &CString) -> Failure {
        let error = sys::execve(program, &self.args, &self.env);
        let path = program.to_string_lossy();
        match Errno::from_io_error(&error) {
            Some(Errno::NOENT | Errno::NOTDIR) => Failure::new(
                GuestErrorKind::CommandNotFound,
                format!(
                    "exec {path}: no such file or directory (the file or its interpreter is not in the image)"
                ),
            ),
            Some(errno @ (Errno::ACCESS | Errno::NOEXEC | Errno::ISDIR | Errno::PERM | Errno::LOOP)) => {
                not_executable(&path, errno)
            }
            _ => Failure::system(format!("cannot execute {path}: {error}")),
        }
    }
}

fn not_executable(path: &str, errno: Errno) -> Failure {
    let why = match errno {
        Errno::NOEXEC => "exec format error (built for another machine, or a script without #!)",
        _ => "permission denied (not executable for this user)",
    };
    Failure::new(GuestErrorKind::CommandNotExecutable, format!("exec {path}: {why}"))
}

fn executable(path: &str) -> rustix::io::Result<()> {
    let stat = stat(path)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(Errno::NOENT);
    }
    accessat(CWD, path, Access::EXEC_OK, AtFlags::EACCESS)
}

/// Enters the working directory while still root, so that a user without a right on the way gets in too.
pub fn change_directory(cwd: &str) -> Result<()> {
    let cwd = if cwd.is_empty() { "/" } else { cwd };
    rustix::process::chdir(cwd).during(|| format!("enter the working directory {cwd}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_of_equal_names_counts() {
        let env = ["A=1".to_owned(), "AB=2".into(), "A=3".into()];
        assert_eq!(value(&env, "A"), Some("3"));
        assert_eq!(value(&env, "B"), None);
    }
}
