//! The runtime's side: descriptors, boot request, layers, vsock, the end.

use crate::vsock;
use atoll_spec::guest::{Call, FromGuest, HOST_PORT, Hello, Request};
use atoll_spec::units::{GuestCid, MiB};
use atoll_spec::vm::{BootFd, MAX_MESSAGE, VmReply, VmRequest, VmSpec};
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType, bind, connect, listen, recv, sendmsg, socket_with,
};
use std::error::Error;
use std::fs::{File, OpenOptions};
use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const HELP: &str = "boot --vmm PATH --kernel VMLINUX --initramfs CPIO [--cmdline TEXT] [--layer FILE]... \
[--scratch FILE] [--tap NAME] [--vcpus N] [--memory MIB] [--cid N] [--uid N] [--console FILE] [--calls FILE] \
[--seconds N] [--pause]";

struct Options {
    vmm: String,
    kernel: String,
    initramfs: String,
    cmdline: String,
    layers: Vec<String>,
    scratch: Option<String>,
    tap: Option<String>,
    vcpus: u8,
    memory: u32,
    cid: u32,
    uid: Option<u32>,
    console: Option<String>,
    calls: Option<String>,
    seconds: u64,
    pause: bool,
}

fn options() -> Result<Options> {
    let mut options = Options {
        vmm: "atoll-vmm".into(),
        kernel: String::new(),
        initramfs: String::new(),
        cmdline: "quiet reboot=k panic=1 no_timer_check rcupdate.rcu_expedited=1 random.trust_cpu=on".into(),
        layers: vec![],
        scratch: None,
        tap: None,
        vcpus: 1,
        memory: 256,
        cid: 3,
        uid: None,
        console: None,
        calls: None,
        seconds: 60,
        pause: false,
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        if name == "--pause" {
            options.pause = true;
            continue;
        }
        let value = arguments.next().ok_or(HELP)?;
        match name.as_str() {
            "--vmm" => options.vmm = value,
            "--kernel" => options.kernel = value,
            "--initramfs" => options.initramfs = value,
            "--cmdline" => options.cmdline = value,
            "--layer" => options.layers.push(value),
            "--scratch" => options.scratch = Some(value),
            "--tap" => options.tap = Some(value),
            "--vcpus" => options.vcpus = value.parse()?,
            "--memory" => options.memory = value.parse()?,
            "--cid" => options.cid = value.parse()?,
            "--uid" => options.uid = Some(value.parse()?),
            "--console" => options.console = Some(value),
            "--calls" => options.calls = Some(value),
            "--seconds" => options.seconds = value.parse()?,
            _ => return Err(HELP.into()),
        }
    }
    Ok(options)
}

pub fn main() -> std::result::Result<(), Box<dyn Error>> {
    let options = options()?;
    let listener = vsock::listen(HOST_PORT)?;
    let calls = options.calls.clone();
    let started = Instant::now();
    std::thread::spawn(move || serve_guest(&listener, calls.as_deref(), started));
    std::thread::spawn(echo_datagrams);
    let (control, mut child) = spawn(&options.vmm)?;
    let (spec, fds) = request(&options)?;
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    println!("boot: {:?}", ask(&control, &VmRequest::Boot(Box::new(spec)), &fds)?);
    let mut offset = 0;
    for path in &options.layers {
        let file = File::open(path)?;
        let length = file.metadata()?.len().next_multiple_of(4096);
        println!("layer {path} at {offset}, {length} bytes, sum {:016x}", sum(path, length)?);
        println!("map: {:?}", ask(&control, &VmRequest::MapLayer { offset, length }, &[file.as_fd()])?);
        offset += length + 4096;
    }
    if options.pause {
        std::thread::sleep(Duration::from_millis(500));
        println!("pause: {:?}", ask(&control, &VmRequest::Pause, &[])?);
        println!("resume: {:?}", ask(&control, &VmRequest::Resume, &[])?);
    }
    let mut last = None;
    let deadline = started + Duration::from_secs(options.seconds);
    loop {
        if let Some(status) = child.try_wait()? {
            println!("stats: {last:#?}");
            println!("ended: {status} after {} ms", started.elapsed().as_millis());
            return Ok(());
        }
        if Instant::now() > deadline {
            println!("kill: {:?}", ask(&control, &VmRequest::Kill, &[])?);
        } else if let Ok(VmReply::Stats(stats)) = ask(&control, &VmRequest::Stats, &[]) {
            last = Some((stats, memory(child.id())));
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Starts the VMM with a listener as descriptor 3 and connects to it.
fn spawn(vmm: &str) -> Result<(OwnedFd, std::process::Child)> {
    let path = std::env::temp_dir().join(format!("atoll-vmm-{}.sock", std::process::id()));
    let address = SocketAddrUnix::new(&path)?;
    let socket = || socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
    let listener = socket()?;
    bind(&listener, &address)?;
    listen(&listener, 4)?;
    let raw = listener.as_raw_fd();
    let mut command = Command::new(vmm);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    // SAFETY: between fork and exec only dup2 and fcntl are called, which are safe there.
    unsafe {
        command.pre_exec(move || {
            // Duplicating a descriptor onto itself would leave it closing at exec.
            let done = if raw == 3 { libc::fcntl(3, libc::F_SETFD, 0) } else { libc::dup2(raw, 3) };
            if done < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
        });
    }
    let child = command.spawn()?;
    let control = socket()?;
    connect(&control, &address)?;
    std::fs::remove_file(path)?;
    Ok((control, child))
}

fn request(options: &Options) -> Result<(VmSpec, Vec<OwnedFd>)> {
    let read_write =
        |path: &str| OpenOptions::new().read(true).write(true).open(path).map_err(|e| format!("{path}: {e}"));
    let mut parts: Vec<(BootFd, OwnedFd)> = vec![
        (BootFd::Kvm, read_write("/dev/kvm")?.into()),
        (BootFd::Kernel, File::open(&options.kernel)?.into()),
        (BootFd::Initramfs, File::open(&options.initramfs)?.into()),
        (BootFd::VhostVsock, read_write("/dev/vhost-vsock")?.into()),
    ];
    if let Some(path) = &options.scratch {
        parts.push((BootFd::Scratch, read_write(path)?.into()));
    }
    if let Some(path) = &options.console {
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        parts.push((BootFd::Console, file.into()));
    }
    if let Some(name) = &options.tap {
        parts.push((BootFd::VhostNet, read_write("/dev/vhost-net")?.into()));
        parts.push((BootFd::Tap, tap(name)?.into()));
    }
    let mut cmdline = options.cmdline.clone();
    let mut offset = 0;
    for path in &options.layers {
        let length = std::fs::metadata(path)?.len().next_multiple_of(4096);
        cmdline.push_str(&format!(" boot.layer={offset}:{length}"));
        offset += length + 4096;
    }
    let spec = VmSpec {
        sandbox: "boot".parse()?,
        vcpus: options.vcpus,
        memory: MiB(options.memory),
        cid: GuestCid::new(options.cid).ok_or("a guest's address is 3 or more")?,
        mac: options.tap.is_some().then_some([2, 0xa7, 0, 0, 0, 2]),
        cmdline,
        fds: parts.iter().map(|(what, _)| *what).collect(),
        uid: options.uid,
    };
    Ok((spec, parts.into_iter().map(|(_, fd)| fd).collect()))
}

fn tap(name: &str) -> Result<File> {
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: all zeros is a valid value of this plain structure.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as _;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as _;
    // SAFETY: the request takes a pointer to this structure.
    if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) } < 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    Ok(file)
}

fn ask(control: &OwnedFd, request: &VmRequest, fds: &[BorrowedFd<'_>]) -> Result<VmReply> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(fds));
    }
    let json = serde_json::to_vec(request)?;
    sendmsg(control, &[IoSlice::new(&json)], &mut ancillary, SendFlags::NOSIGNAL)?;
    let mut buffer = vec![0; MAX_MESSAGE];
    let (bytes, _) = recv(control, &mut buffer[..], RecvFlags::empty())?;
    if bytes == 0 {
        return Err("the VMM closed its control socket".into());
    }
    Ok(serde_json::from_slice(&buffer[..bytes])?)
}

/// A plain sum of a file padded with zeros, as the guest computes it of its partition.
pub fn sum(path: &str, length: u64) -> Result<u64> {
    let mut file = File::open(path)?;
    let (mut hash, mut left) = (0xcbf2_9ce4_8422_2325u64, length);
    let mut buffer = vec![0; 1 << 16];
    while left > 0 {
        let want = buffer.len().min(left as usize);
        buffer[..want].fill(0);
        let mut got = 0;
        while got < want {
            match file.read(&mut buffer[got..want])? {
                0 => break,
                bytes => got += bytes,
            }
        }
        for word in buffer[..want].chunks(8) {
            let value = word.iter().fold(0u64, |value, byte| value << 8 | u64::from(*byte));
            hash = (hash ^ value).wrapping_mul(0x100_0000_01b3);
        }
        left -= want as u64;
    }
    Ok(hash)
}

/// What the kernel says of the process: who it is, and its private memory without the guest's (its largest mapping).
fn memory(pid: u32) -> String {
    let read = |name| std::fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap_or_default();
    let wanted = ["VmRSS", "Threads", "Uid", "CapEff", "CapBnd", "NoNewPrivs", "Seccomp:"];
    let status = read("status");
    let mut lines: Vec<_> =
        status.lines().filter(|line| wanted.iter().any(|name| line.starts_with(name))).collect();
    let mut mappings: Vec<(u64, u64)> = Vec::new();
    for line in read("smaps").lines() {
        let mut words = line.split_whitespace();
        let (name, value) =
            (words.next().unwrap_or_default(), words.next().and_then(|word| word.parse().ok()));
        match (name, value, mappings.last_mut()) {
            ("Size:", Some(kib), _) => mappings.push((kib, 0)),
            ("Private_Dirty:" | "Private_Clean:", Some(kib), Some(mapping)) => mapping.1 += kib,
            _ => {}
        }
    }
    let guest = mappings.iter().max().copied().unwrap_or_default();
    let own = mappings.iter().map(|(_, private)| private).sum::<u64>() - guest.1;
    let text = format!("guest memory {} KiB, own private memory {own} KiB", guest.1);
    lines.push(&text);
    lines.join("; ")
}

fn serve_guest(listener: &OwnedFd, calls: Option<&str>, started: Instant) {
    while let Ok((connection, cid)) = vsock::accept(listener) {
        println!("vsock {cid}: connected {} us after the start", started.elapsed().as_micros());
        let calls = calls.map(str::to_owned);
        std::thread::spawn(move || {
            if let Err(error) = converse(connection, cid, calls.as_deref()) {
                println!("vsock {cid}: {error}");
            }
        });
    }
}

/// On the control connection: sends the calls of a file (one JSON `Call` a line), each after the answer to the one
/// before. On others: shows what comes.
fn converse(connection: File, cid: u32, calls: Option<&str>) -> Result<()> {
    let hello = vsock::read_frame(&connection)?;
    println!("vsock {cid}: {hello}");
    match serde_json::from_str(&hello)? {
        Hello::Control { .. } => {
            let text = calls.map(std::fs::read_to_string).transpose()?.unwrap_or_default();
            for (id, line) in (1u64..).zip(text.lines().filter(|line| !line.trim().is_empty())) {
                let call: Call = serde_json::from_str(line).map_err(|error| format!("{line}: {error}"))?;
                println!("call {id}: {line}");
                vsock::write_frame(&connection, &serde_json::to_string(&Request { id, call })?)?;
                loop {
                    let frame = vsock::read_frame(&connection)?;
                    println!("guest: {frame}");
                    if matches!(serde_json::from_str(&frame)?, FromGuest::Answer { id: answered, .. } if answered == id)
                    {
                        break;
                    }
                }
            }
            loop {
                println!("guest: {}", vsock::read_frame(&connection)?);
            }
        }
        Hello::Stream { stream } => {
            let mut bytes = Vec::new();
            let mut connection = connection;
            connection.read_to_end(&mut bytes)?;
            println!("stream {stream}: {}", bytes.escape_ascii());
            Ok(())
        }
    }
}

/// Answers each datagram to port 7 with itself, for the guest's network test.
fn echo_datagrams() {
    let Ok(socket) = std::net::UdpSocket::bind("0.0.0.0:7") else { return };
    let mut buffer = [0; 2048];
    while let Ok((bytes, from)) = socket.recv_from(&mut buffer) {
        println!("datagram from {from}: {bytes} bytes");
        if socket.send_to(&buffer[..bytes], from).is_err() {
            return;
        }
    }
}
