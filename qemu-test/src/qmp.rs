//! A client of QEMU's machine protocol (QMP): one JSON object per line over a unix socket.

use anyhow::{Context, bail};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// A connection past its handshake.
#[derive(Debug)]
pub struct Qmp {
    reader: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects and negotiates.
    ///
    /// # Errors
    /// When QEMU does not listen or does not answer within ten seconds.
    pub fn connect(socket: &Path) -> anyhow::Result<Self> {
        let stream = crate::process::wait_for("QEMU's QMP socket", Duration::from_secs(20), || {
            Ok(UnixStream::connect(socket).ok())
        })?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        let mut qmp = Self { reader: BufReader::new(stream) };
        qmp.read_line().context("no greeting from QEMU")?;
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs one command and returns its answer; events in between are passed over.
    ///
    /// # Errors
    /// When QEMU refuses it or the connection breaks.
    pub fn execute(&mut self, command: &str, arguments: Value) -> anyhow::Result<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        writeln!(self.reader.get_mut(), "{request}")
            .with_context(|| format!("cannot send {command} to QEMU"))?;
        loop {
            let answer = self.read_line().with_context(|| format!("no answer from QEMU to {command}"))?;
            if let Some(value) = answer.get("return") {
                return Ok(value.clone());
            }
            if let Some(error) = answer.get("error") {
                bail!("QEMU refused {command}: {error}");
            }
        }
    }

    fn read_line(&mut self) -> anyhow::Result<Value> {
        let mut line = String::new();
        if self.reader.read_line(&mut line)? == 0 {
            bail!("QEMU closed the connection");
        }
        Ok(serde_json::from_str(&line)?)
    }
}
