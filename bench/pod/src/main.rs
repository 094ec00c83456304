//! `atoll-bench-pod`: what runs inside the bench's guests. As a machine's first process it switches the machine off; in
//! a pod (`paced`) it moves bytes, says how long that took, and is idle from then on. Static, because there is nothing else in its images.

use anyhow::{Context, bail};
use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

/// Bytes moved at a time.
const CHUNK: usize = 1 << 20;

/// Pause before each operation of a paced run, in which the bench looks at the exits so far.
const PAUSE: Duration = Duration::from_secs(5);

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    // The kernel names its first process so, and gives it whatever of its own command line it does not know.
    if std::env::args().next().is_some_and(|name| name == "/init") {
        rustix::system::reboot(rustix::system::RebootCommand::Restart).context("cannot restart")?;
    }
    let paced = arguments.first().is_some_and(|first| first == "paced");
    for operation in arguments.iter().skip(usize::from(paced)) {
        if paced {
            std::thread::sleep(PAUSE);
        }
        let begun = Instant::now();
        perform(operation)?;
        println!("took {}", begun.elapsed().as_nanos());
    }
    if paced { idle() } else { Ok(()) }
}

fn idle() -> ! {
    loop {
        std::thread::park();
    }
}

/// `write,PATH,MIB`, `read,PATH,MIB`, `send,ADDRESS,MIB` or `receive,ADDRESS,MIB`.
fn perform(operation: &str) -> anyhow::Result<()> {
    let words: Vec<&str> = operation.split(',').collect();
    match words[..] {
        ["write", path, mib] => write(path, mib.parse()?),
        ["read", path, mib] => read(path, mib.parse()?),
        ["send", address, mib] => send(address, mib.parse()?),
        ["receive", address, mib] => receive(address, mib.parse()?),
        _ => bail!(
            "'{operation}' is none of write,PATH,MIB read,PATH,MIB send,ADDRESS,MIB receive,ADDRESS,MIB"
        ),
    }
}

/// To the disk, not only to memory.
fn write(path: &str, mib: usize) -> anyhow::Result<()> {
    let mut file = File::create(path).with_context(|| format!("cannot create {path}"))?;
    let chunk = vec![0x5a_u8; CHUNK];
    for _ in 0..mib {
        file.write_all(&chunk)?;
    }
    file.sync_all().with_context(|| format!("cannot flush {path}"))
}

/// From the disk, past the page cache.
fn read(path: &str, mib: usize) -> anyhow::Result<()> {
    let direct = rustix::fs::OFlags::DIRECT.bits();
    let flags = i32::try_from(direct).context("no such flag")?;
    let mut file = File::options()
        .read(true)
        .custom_flags(flags)
        .open(path)
        .with_context(|| format!("cannot open {path}"))?;
    // The kernel wants the memory aligned as the disk's blocks are.
    let mut space = vec![0_u8; CHUNK + 4096];
    let aligned = space.as_ptr().align_offset(4096);
    let chunk = space.get_mut(aligned..aligned + CHUNK).context("no room")?;
    for _ in 0..mib {
        file.read_exact(chunk)?;
    }
    Ok(())
}

fn send(address: &str, mib: usize) -> anyhow::Result<()> {
    let mut stream = TcpStream::connect(address).with_context(|| format!("cannot connect to {address}"))?;
    let chunk = vec![0x5a_u8; CHUNK];
    for _ in 0..mib {
        stream.write_all(&chunk)?;
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    // The peer closes when it has everything.
    stream.read_to_end(&mut Vec::new()).map(drop).context("the peer does not close")
}

fn receive(address: &str, mib: usize) -> anyhow::Result<()> {
    let mut stream = TcpStream::connect(address).with_context(|| format!("cannot connect to {address}"))?;
    let mut chunk = vec![0_u8; CHUNK];
    for _ in 0..mib {
        stream.read_exact(&mut chunk)?;
    }
    Ok(())
}
