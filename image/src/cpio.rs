//! Writes the initramfs: a `newc` cpio archive whose bytes depend on its content alone (times, owners and inode
//! numbers are fixed). Pure: it appends to a buffer.

/// Inode types of the archive's modes.
const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const CHARACTER: u32 = 0o020_000;
const SYMLINK: u32 = 0o120_000;

/// An archive that is being written.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    inodes: u32,
}

impl Archive {
    /// A directory; parents first.
    pub fn directory(&mut self, path: &str, mode: u32) {
        self.entry(path, DIRECTORY | mode, &[], (0, 0));
    }

    /// A regular file.
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.entry(path, REGULAR | mode, content, (0, 0));
    }

    /// A symbolic link.
    pub fn symlink(&mut self, path: &str, target: &str) {
        self.entry(path, SYMLINK | 0o777, target.as_bytes(), (0, 0));
    }

    /// A character device.
    pub fn character_device(&mut self, path: &str, mode: u32, major: u32, minor: u32) {
        self.entry(path, CHARACTER | mode, &[], (major, minor));
    }

    /// The finished archive, padded as kernels like it.
    pub fn finish(mut self) -> Vec<u8> {
        self.inodes = 0;
        self.header("TRAILER!!!", 0, 0, (0, 0), 0);
        self.pad(512);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8], device: (u32, u32)) {
        self.inodes += 1;
        let size = u32::try_from(content.len()).expect("a file of an initramfs is far below 4 GiB");
        self.header(path.trim_start_matches('/'), mode, size, device, self.inodes);
        self.bytes.extend_from_slice(content);
        self.pad(4);
    }

    fn header(&mut self, name: &str, mode: u32, size: u32, device: (u32, u32), inode: u32) {
        let links = if mode & DIRECTORY == DIRECTORY { 2 } else { 1 };
        let name_size = u32::try_from(name.len() + 1).expect("paths are short");
        // inode, mode, uid, gid, links, mtime, size, dev major, dev minor, rdev major, rdev minor, name size, check
        let fields = [inode, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad(4);
    }

    fn pad(&mut self, to: usize) {
        let size = self.bytes.len().next_multiple_of(to);
        self.bytes.resize(size, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_are_those_of_newc() {
        let mut archive = Archive::default();
        archive.directory("/dev", 0o755);
        archive.character_device("/dev/console", 0o600, 5, 1);
        archive.file("/init", 0o755, b"hello");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 512, 0);
        let text = String::from_utf8_lossy(&bytes);
        assert!(text.starts_with("07070100000001000041ED"));
        assert!(text.contains("00002180") && text.contains("0000000500000001"));
        assert!(text.contains("init\0"));
        let hello = bytes.windows(5).position(|w| w == b"hello").unwrap();
        assert_eq!(hello % 4, 0);
    }
}
