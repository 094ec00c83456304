//! `atoll-test-bridge`: in the test image only, carries the runtime's CRI socket and its streaming server onto the
//! test network, so that CRI clients outside can drive the runtime of a booted host.
//!
//! TCP 10350 → the CRI socket; TCP 10351 → the streaming server, whose address the runtime writes to a file;
//! TCP 10352 → the inspector, which tells what is in the host and signals its processes. None is authenticated: this
//! is why the release image does not have them, which a test asserts.

use anyhow::Context;
use atoll_qemu_test::inspect;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;

const CRI_SOCKET: &str = "/run/atoll/runtime/cri.sock";
const STREAMING_ADDRESS: &str = "/run/atoll/runtime/streaming.addr";

fn main() -> anyhow::Result<()> {
    let streaming = TcpListener::bind("0.0.0.0:10351").context("cannot listen on TCP 10351")?;
    let cri = TcpListener::bind("0.0.0.0:10350").context("cannot listen on TCP 10350")?;
    let inspector =
        TcpListener::bind(("0.0.0.0", inspect::PORT)).context("cannot listen for the inspector")?;
    std::thread::spawn(move || inspect::host::serve(&inspector));
    let thread = std::thread::spawn(move || {
        serve(&streaming, || {
            let address = std::fs::read_to_string(STREAMING_ADDRESS)
                .with_context(|| format!("cannot read {STREAMING_ADDRESS}: is the runtime running?"))?;
            Ok(TcpStream::connect(address.trim())?)
        });
    });
    serve(&cri, || {
        UnixStream::connect(Path::new(CRI_SOCKET))
            .with_context(|| format!("cannot connect to {CRI_SOCKET}: is the runtime running?"))
    });
    thread.join().map_err(|_| anyhow::anyhow!("the streaming listener panicked"))
}

/// A connection of which both ends can be used from two threads.
trait Duplex: Read + Write + Send + Sized + 'static {
    fn twin(&self) -> std::io::Result<Self>;
    fn finish(&self);
}

impl Duplex for TcpStream {
    fn twin(&self) -> std::io::Result<Self> {
        self.try_clone()
    }
    fn finish(&self) {
        // The peer may have closed already.
        let _ = self.shutdown(Shutdown::Write);
    }
}

impl Duplex for UnixStream {
    fn twin(&self) -> std::io::Result<Self> {
        self.try_clone()
    }
    fn finish(&self) {
        // The peer may have closed already.
        let _ = self.shutdown(Shutdown::Write);
    }
}

fn serve<B: Duplex>(listener: &TcpListener, connect: impl Fn() -> anyhow::Result<B> + Send + Sync) {
    for client in listener.incoming().flatten() {
        match connect().and_then(|server| relay(client, server)) {
            Ok(()) => {}
            Err(error) => eprintln!("bridge: {error:#}"),
        }
    }
}

/// Copies both ways in two threads of their own, each ending with its side.
fn relay<B: Duplex>(client: TcpStream, server: B) -> anyhow::Result<()> {
    let (client_in, server_in) = (client.twin()?, server.twin()?);
    pump(client_in, server);
    pump(server_in, client);
    Ok(())
}

fn pump<A: Duplex, B: Duplex>(mut from: A, mut to: B) {
    std::thread::spawn(move || {
        // A broken connection is an ended one.
        let _ = std::io::copy(&mut from, &mut to);
        to.finish();
    });
}
