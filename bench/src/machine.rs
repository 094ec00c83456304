//! QEMU under the repeatable clock: each instruction takes a nanosecond, and whenever the processor is idle the clock
//! leaps to the next timer. Nothing outside is waited for: no disk, no network peer, no random numbers of this machine.

use crate::scripted::{SCOPE_FILE, Scope, machine_config};
use anyhow::{Context, bail};
use atoll_qemu_test::process::Background;
use atoll_qemu_test::serial::Serial;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// Longest time for a whole run, by the wall clock.
const DEADLINE: Duration = Duration::from_secs(40 * 60);

/// Boots `uki`, lets it measure, and answers its console.
///
/// # Errors
/// When QEMU does not start, the bench inside fails, or the deadline passes; the console's end is in the error.
pub fn run(
    uki: &Path,
    directory: &Path,
    scope: Scope,
    mut progress: impl FnMut(&str),
) -> anyhow::Result<String> {
    if directory.exists() {
        std::fs::remove_dir_all(directory)
            .with_context(|| format!("cannot clear {}", directory.display()))?;
    }
    std::fs::create_dir_all(directory)?;
    let console = directory.join("serial.log");
    let mut command = command(uki, directory, scope, &console)?;
    let mut qemu = Background::spawn("QEMU", &mut command, &directory.join("qemu.log"))?;
    let serial = Serial::new(&console);
    let begun = Instant::now();
    let mut shown = 0;
    loop {
        let text = serial.text();
        // Only whole lines: the last one may still be coming.
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        let lines: Vec<&str> = whole.lines().collect();
        lines.iter().skip(shown).for_each(|line| progress(line));
        shown = shown.max(lines.len());
        if let Some(line) = lines.iter().find(|line| line.contains("the bench failed: ")) {
            bail!("{line}; console: {}", console.display());
        }
        if lines.iter().any(|line| line.contains("the bench is done")) {
            return Ok(text);
        }
        qemu.check_alive()?;
        if begun.elapsed() > DEADLINE {
            let end = lines[lines.len().saturating_sub(20)..].join("\n");
            bail!("the bench did not end within {} minutes:\n{end}", DEADLINE.as_secs() / 60);
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

fn command(uki: &Path, directory: &Path, scope: Scope, console: &Path) -> anyhow::Result<Command> {
    let file = |name: &str| directory.join(name).display().to_string();
    std::fs::copy("/usr/share/OVMF/OVMF_VARS_4M.fd", directory.join("vars.fd"))
        .context("no UEFI firmware: install the package ovmf (./just setup)")?;
    std::fs::write(directory.join("machine.yaml"), machine_config())?;
    std::fs::write(directory.join("scope"), scope.name())?;
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-machine", "q35,smm=off"])
        .args(["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off", "-smp", "1"])
        // Without -cx16 the emulation leaves garbage in EFLAGS after cmpxchg16b.
        .args(["-cpu", "EPYC,+svm,+npt,-cx16", "-m", "8192", "-seed", "1"])
        .args(["-rtc", "base=2026-01-01,clock=vm"])
        .args(["-drive", "if=pflash,format=raw,readonly=on,file=/usr/share/OVMF/OVMF_CODE_4M.fd"])
        .args(["-drive", &format!("if=pflash,format=raw,file={}", file("vars.fd"))])
        .arg("-kernel")
        .arg(uki)
        // A card without a peer: what it sends is gone at once.
        .args(["-device", "virtio-net-pci,romfile=,mac=52:54:00:00:00:01"])
        .args(["-fw_cfg", &format!("name=opt/dev.atoll/machine.yaml,file={}", file("machine.yaml"))])
        .args(["-fw_cfg", &format!("name={SCOPE_FILE},file={}", file("scope"))])
        .args(["-serial", &format!("file:{}", console.display())]);
    Ok(command)
}
