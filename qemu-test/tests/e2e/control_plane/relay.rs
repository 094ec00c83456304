//! A way to the Supervisor that a test shuts, opens and leads elsewhere, for one host alone.

use anyhow::{Context, anyhow};
use atoll_qemu_test::network::SERVER;
use std::io::copy;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

/// Where hosts find the Supervisor.
pub const SUPERVISOR: &str = "10.77.0.1:6443";

/// A port of the lab's server behind which is what the test says.
#[derive(Debug)]
pub struct Relay {
    port: u16,
    open: Option<Open>,
}

#[derive(Debug)]
struct Open {
    ends: Arc<AtomicBool>,
    streams: Arc<Mutex<Vec<TcpStream>>>,
    thread: JoinHandle<()>,
}

impl Relay {
    /// Nobody listens yet.
    pub fn shut(port: u16) -> Self {
        Self { port, open: None }
    }

    /// Ends every connection, and leads each new one to where `to` says: it is told how many came before it.
    pub fn lead(&mut self, to: impl Fn(usize) -> String + Send + 'static) -> anyhow::Result<()> {
        self.close()?;
        let listener = TcpListener::bind((SERVER, self.port)).context("cannot listen for a host")?;
        let (ends, streams) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        let (ending, kept, count) = (Arc::clone(&ends), Arc::clone(&streams), AtomicUsize::new(0));
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if ending.load(Ordering::SeqCst) {
                    return;
                }
                // One that cannot be led on is hung up on, which the host has to live with.
                let _ = join(stream, &to(count.fetch_add(1, Ordering::SeqCst)), &kept);
            }
        });
        self.open = Some(Open { ends, streams, thread });
        Ok(())
    }

    /// Ends every connection, and listens no more.
    pub fn close(&mut self) -> anyhow::Result<()> {
        let Some(open) = self.open.take() else { return Ok(()) };
        open.ends.store(true, Ordering::SeqCst);
        // It waits for a connection; this is one.
        TcpStream::connect((SERVER, self.port)).context("cannot reach the relay's own port")?;
        open.thread.join().map_err(|_| anyhow!("the relay panicked"))?;
        for stream in open.streams.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // It may have ended by itself.
            let _ = stream.shutdown(Shutdown::Both);
        }
        Ok(())
    }
}

/// Passes bytes both ways, until either side ends.
fn join(host: TcpStream, to: &str, kept: &Mutex<Vec<TcpStream>>) -> std::io::Result<()> {
    let server = TcpStream::connect(to)?;
    let mut all = kept.lock().unwrap_or_else(PoisonError::into_inner);
    all.extend([host.try_clone()?, server.try_clone()?]);
    drop(all);
    for (mut from, mut into) in [(host.try_clone()?, server.try_clone()?), (server, host)] {
        std::thread::spawn(move || {
            // However it ends, the other side is told.
            let _ = copy(&mut from, &mut into);
            let _ = into.shutdown(Shutdown::Write);
        });
    }
    Ok(())
}
