//! QEMU as the yardstick for our VMM: the build machine's own, with its libraries and firmware, in one archive that the
//! bench image carries.

use anyhow::{Context, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The archive's name in the image's `/usr/bin`, where the image builder puts what it is given.
pub const ARCHIVE: &str = "atoll-bench-qemu.tar";
/// The program in the archive.
pub const PROGRAM: &str = "qemu-system-x86_64";
/// The dynamic loader in the archive: the image has another C library than the build machine.
pub const LOADER: &str = "ld-linux-x86-64.so.2";
/// Firmware of the `microvm` machine, and what it loads to start a kernel.
const FIRMWARE: [&str; 3] = ["linuxboot_dma.bin", "pvh.bin", "qboot.rom"];

/// Packs QEMU, everything that it loads, and its firmware, flat.
///
/// # Errors
/// When QEMU is not installed, or lacks one of them.
pub fn pack(archive: &Path) -> anyhow::Result<()> {
    let program = Path::new("/usr/bin").join(PROGRAM);
    let firmware = FIRMWARE.map(|name| Path::new("/usr/share/qemu").join(name));
    let mut files: Vec<PathBuf> = libraries(&program)?;
    files.push(program);
    files.extend(firmware);
    files.sort();
    let partial = archive.with_extension("partial");
    let file =
        std::fs::File::create(&partial).with_context(|| format!("cannot create {}", partial.display()))?;
    let mut tar = tar::Builder::new(file);
    for path in files {
        let name = path.file_name().context("a file without a name")?;
        let content = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o755);
        header.set_size(content.len() as u64);
        tar.append_data(&mut header, name, content.as_slice())?;
    }
    tar.into_inner()?.sync_all()?;
    std::fs::rename(&partial, archive).with_context(|| format!("cannot place {}", archive.display()))
}

fn libraries(program: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("cannot run ldd")?;
    ensure!(
        output.status.success(),
        "{} is not there: install qemu-system-x86 (./just setup)",
        program.display()
    );
    Ok(paths(&String::from_utf8_lossy(&output.stdout)))
}

/// `name => /path (address)`, and the loader as `/path (address)`.
fn paths(text: &str) -> Vec<PathBuf> {
    let absolute = |line: &str| line.split_whitespace().find(|word| word.starts_with('/')).map(PathBuf::from);
    text.lines().filter_map(absolute).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_and_the_loader_are_found() {
        let text = "\tlinux-vdso.so.1 (0x7ffd)\n\tlibz.so.1 => /lib/x86_64-linux-gnu/libz.so.1 (0x7f)\n\t/lib64/ld-linux-x86-64.so.2 (0x7f)\n";
        let found = paths(text);
        assert_eq!(
            found,
            [Path::new("/lib/x86_64-linux-gnu/libz.so.1"), Path::new("/lib64/ld-linux-x86-64.so.2")]
        );
        assert!(found[1].ends_with(LOADER));
    }
}
