//! Looks for bytes in the files of a booted host: what must not be on its disk.

use anyhow::Context;
use rustix::fs::SeekFrom;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const PIECE: usize = 1 << 20;

/// The files below `directory` that hold `text`. Holes of sparse files are passed over.
///
/// # Errors
/// When a file that is there cannot be read.
pub fn holders(directory: &Path, text: &[u8]) -> anyhow::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).with_context(|| format!("cannot list {}", directory.display()))? {
        let entry = entry?;
        let (path, kind) = (entry.path(), entry.file_type()?);
        let looked = match (kind.is_dir(), kind.is_file()) {
            (true, _) => holders(&path, text).map(|more| found.extend(more)),
            (_, true) => holds(&path, text).map(|holds| found.extend(holds.then(|| path.clone()))),
            _ => Ok(()),
        };
        // What goes away while it is looked at is not there.
        if path.symlink_metadata().is_ok() {
            looked?;
        }
    }
    Ok(found)
}

fn holds(path: &Path, text: &[u8]) -> anyhow::Result<bool> {
    let file = fs::File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut buffer = vec![0; PIECE + text.len()];
    let mut at = 0;
    loop {
        at = match rustix::fs::seek(&file, SeekFrom::Data(at)) {
            Ok(at) => at,
            Err(rustix::io::Errno::NXIO) => return Ok(false),
            Err(error) => return Err(error).with_context(|| format!("cannot search {}", path.display())),
        };
        let length =
            file.read_at(&mut buffer, at).with_context(|| format!("cannot read {}", path.display()))?;
        if buffer[..length].windows(text.len()).any(|window| window == text) {
            return Ok(true);
        }
        // Pieces overlap, so that nothing lies across their border.
        at += length.saturating_sub(text.len() - 1).max(1) as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_found_wherever_it_lies() {
        let root = std::env::temp_dir().join(format!("atoll-search-{}", std::process::id()));
        fs::create_dir(&root).unwrap();
        fs::create_dir(root.join("a")).unwrap();
        fs::write(root.join("a/empty"), "").unwrap();
        fs::write(root.join("a/none"), "needl e").unwrap();
        let across = root.join("a/across");
        let file = fs::File::create(&across).unwrap();
        file.write_all_at(&[b'x'; PIECE + 4], 0).unwrap();
        file.write_all_at(b"needle", PIECE as u64 + 3).unwrap();
        let sparse = root.join("sparse");
        let file = fs::File::create(&sparse).unwrap();
        file.set_len(1 << 40).unwrap();
        file.write_all_at(b"needle", (1 << 39) + 5).unwrap();
        let mut found = holders(&root, b"needle").unwrap();
        found.sort();
        fs::remove_dir_all(&root).unwrap();
        assert_eq!(found, [across, sparse]);
    }
}
