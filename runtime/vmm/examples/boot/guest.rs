//! As PID 1 of a guest: tries every device once, says what it found, resets the machine.

use crate::host::sum;
use crate::vsock;
use rustix::mount::{MountFlags, mount};
use std::error::Error;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

type Test = (&'static str, fn() -> Result<String>);
type Result<T> = std::result::Result<T, Box<dyn Error>>;

pub fn main() -> Result<()> {
    for (source, at, kind) in
        [("proc", "/proc", "proc"), ("sys", "/sys", "sysfs"), ("dev", "/dev", "devtmpfs")]
    {
        std::fs::create_dir_all(at)?;
        // devtmpfs may be mounted already.
        let _ = mount(source, at, kind, MountFlags::empty(), None);
    }
    let mut log = OpenOptions::new().write(true).open("/dev/kmsg")?;
    let mut say = |text: String| drop(log.write_all(format!("<1>boot guest: {text}\n").as_bytes()));
    say(format!("up {}", std::fs::read_to_string("/proc/uptime")?.trim()));
    let tests: [Test; 8] = [
        ("cpus", cpus),
        ("layers", layers),
        ("scratch", scratch),
        ("entropy", entropy),
        ("vsock", vsock_hello),
        ("network", network),
        ("clock", clock),
        ("memory", memory),
    ];
    for (name, test) in tests {
        match test() {
            Ok(found) => say(format!("{name}: ok: {found}")),
            Err(error) => say(format!("{name}: FAILED: {error}")),
        }
    }
    if std::fs::read_to_string("/proc/cmdline")?.contains("boot.crash") {
        std::fs::write("/proc/sysrq-trigger", "c")?;
    }
    rustix::system::reboot(rustix::system::RebootCommand::Restart)?;
    Ok(())
}

fn cpus() -> Result<String> {
    Ok(std::fs::read_to_string("/sys/devices/system/cpu/online")?.trim().to_owned())
}

fn layers() -> Result<String> {
    let cmdline = std::fs::read_to_string("/proc/cmdline")?;
    let disk = File::open("/dev/vda")?;
    let mut found = format!("{} sectors", std::fs::read_to_string("/sys/block/vda/size")?.trim());
    let layers = cmdline.split_whitespace().filter_map(|word| word.strip_prefix("boot.layer="));
    for (number, layer) in (1..).zip(layers) {
        let (offset, length) = layer.split_once(':').ok_or("boot.layer")?;
        let (offset, length) = (offset.parse()?, length.parse()?);
        // The host maps a layer after the boot: wait for it to be there.
        let until = Instant::now() + Duration::from_secs(20);
        let mut head = [0; 2048];
        loop {
            disk.read_exact_at(&mut head, offset as u64)?;
            if head.iter().any(|byte| *byte != 0) || Instant::now() > until {
                break;
            }
            // SAFETY: BLKFLSBUF takes no argument; it drops what was read too early.
            unsafe { libc::ioctl(disk.as_raw_fd(), BLKFLSBUF) };
            std::thread::sleep(Duration::from_millis(10));
        }
        add_partition(&disk, number, offset, length)?;
        let path = format!("/dev/vda{number}");
        let start = Instant::now();
        found.push_str(&format!(
            ", layer sum {:016x} in {} ms",
            sum(&path, length as u64)?,
            start.elapsed().as_millis()
        ));
        if mount_erofs(&path, number).is_ok() {
            let names = std::fs::read_dir(format!("/layer{number}"))?.count();
            found.push_str(&format!(", erofs with {names} names"));
        }
    }
    let mut far = [1; 512];
    disk.read_exact_at(&mut far, (1 << 40) - 512)?;
    if far != [0; 512] {
        return Err("the end of the window is not zero".into());
    }
    if OpenOptions::new().write(true).open("/dev/vda").is_ok_and(|disk| disk.write_at(&[1; 512], 0).is_ok()) {
        return Err("the window can be written".into());
    }
    Ok(found)
}

const BLKFLSBUF: libc::Ioctl = 0x1261;
const BLKPG: libc::Ioctl = 0x1269;
const BLKDISCARD: libc::Ioctl = 0x1277;

fn add_partition(disk: &File, number: i32, start: i64, length: i64) -> Result<()> {
    #[repr(C)]
    struct Partition {
        start: i64,
        length: i64,
        number: i32,
        names: [u8; 128],
    }
    #[repr(C)]
    struct Argument {
        operation: i32,
        flags: i32,
        length: i32,
        data: *const Partition,
    }
    let partition = Partition { start, length, number, names: [0; 128] };
    let argument = Argument {
        operation: 1,
        flags: 0,
        length: size_of::<Partition>() as i32,
        data: &raw const partition,
    };
    // SAFETY: both structures outlive the call and are laid out as the kernel's.
    if unsafe { libc::ioctl(disk.as_raw_fd(), BLKPG, &raw const argument) } != 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    Ok(())
}

fn mount_erofs(device: &str, number: i32) -> Result<()> {
    let at = format!("/layer{number}");
    std::fs::create_dir_all(&at)?;
    Ok(mount(device, at.as_str(), "erofs", MountFlags::RDONLY, None)?)
}

fn scratch() -> Result<String> {
    let disk = match OpenOptions::new().read(true).write(true).open("/dev/vdb") {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok("none".into()),
        disk => disk?,
    };
    let pattern: Vec<u8> = (0..1u32 << 20).map(|at| ((at * 31) >> 3) as u8).collect();
    let start = Instant::now();
    disk.write_all_at(&pattern, 4096)?;
    disk.sync_all()?;
    let written = start.elapsed().as_millis();
    let mut back = vec![0; pattern.len()];
    // SAFETY: takes no argument.
    unsafe { libc::ioctl(disk.as_raw_fd(), BLKFLSBUF) };
    disk.read_exact_at(&mut back, 4096)?;
    if back != pattern {
        return Err("read something else than was written".into());
    }
    let range = [8192u64, 65536];
    // SAFETY: takes a pointer to two 64-bit numbers.
    if unsafe { libc::ioctl(disk.as_raw_fd(), BLKDISCARD, range.as_ptr()) } != 0 {
        return Err(format!("discard: {}", std::io::Error::last_os_error()).into());
    }
    disk.read_exact_at(&mut back, 4096)?;
    if back[4096..4096 + 65536].iter().any(|byte| *byte != 0) || back[..4096] != pattern[..4096] {
        return Err("the discarded range does not read zeros".into());
    }
    Ok(format!("1 MiB written and flushed in {written} ms, discarded"))
}

fn entropy() -> Result<String> {
    let mut bytes = [0; 16];
    File::open("/dev/hwrng")?.read_exact(&mut bytes)?;
    if bytes == [0; 16] { Err("zeros".into()) } else { Ok("16 bytes".into()) }
}

fn vsock_hello() -> Result<String> {
    let connection = vsock::connect(vsock::HOST, atoll_spec::guest::HOST_PORT)?;
    let hello =
        atoll_spec::guest::Hello::Control { protocol: atoll_spec::guest::PROTOCOL, ready_us: uptime_us() };
    vsock::write_frame(&connection, &serde_json::to_string(&hello)?)?;
    Ok("hello sent".into())
}

fn uptime_us() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000 + now.tv_nsec as u64 / 1000
}

fn network() -> Result<String> {
    let Ok(mac) = std::fs::read_to_string("/sys/class/net/eth0/address") else { return Ok("none".into()) };
    set_address("eth0", Ipv4Addr::new(169, 254, 1, 2))?;
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    let sent = [7u8; 1200];
    let start = Instant::now();
    socket.send_to(&sent, "169.254.1.1:7")?;
    let mut back = [0; 2048];
    let (bytes, _) = socket.recv_from(&mut back)?;
    if back[..bytes] != sent {
        return Err("another datagram came back".into());
    }
    Ok(format!("{} echoed in {} us", mac.trim(), start.elapsed().as_micros()))
}

fn set_address(interface: &str, address: Ipv4Addr) -> Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    // SAFETY: all zeros is a valid value of this plain structure.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes()) {
        *to = from as _;
    }
    let call = |number: libc::Ioctl, request: &mut libc::ifreq| {
        // SAFETY: both requests take a pointer to this structure.
        match unsafe { libc::ioctl(socket.as_raw_fd(), number, &raw mut *request) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    };
    let mut data = [0; 14];
    for (to, from) in data[2..6].iter_mut().zip(address.octets()) {
        *to = from as _;
    }
    request.ifr_ifru.ifru_addr = libc::sockaddr { sa_family: libc::AF_INET as _, sa_data: data };
    call(libc::SIOCSIFADDR as _, &mut request)?;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as _;
    Ok(call(libc::SIOCSIFFLAGS as _, &mut request)?)
}

/// Uses memory and gives it back: the host should see it return (`boot.memory` on the command line waits for that).
fn memory() -> Result<String> {
    if !std::fs::read_to_string("/proc/cmdline")?.contains("boot.memory") {
        return Ok("not asked for".into());
    }
    drop(std::hint::black_box(vec![1u8; 64 << 20]));
    std::thread::sleep(Duration::from_secs(6));
    Ok("64 MiB used and freed".into())
}

fn clock() -> Result<String> {
    let source = std::fs::read_to_string("/sys/devices/system/clocksource/clocksource0/current_clocksource")?;
    let start = Instant::now();
    std::thread::sleep(Duration::from_millis(20));
    Ok(format!(
        "{}, slept 20 ms in {} ms, up {}",
        source.trim(),
        start.elapsed().as_millis(),
        std::fs::read_to_string("/proc/uptime")?.trim()
    ))
}
