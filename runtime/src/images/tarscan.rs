//! Checks a layer's tar while it passes through: nothing reaches mkfs.erofs before its header has been read here.
//!
//! Why: mkfs.erofs is a C program that trusts its input more than an archive from a registry deserves. Refused are
//! paths that lead out or through something that is no directory, headers that do not add up, kinds of entries that
//! no image has, and more entries or bytes than any image needs.
//!
//! Two things are put right on the way, because mkfs.erofs has its own view of them: files of the oldest kind
//! (type byte 0), which it would leave out without a word, become those of type `0`; and directories that the
//! archive only implies, which it would give mode 0777, get an entry with 0755.
//!
//! ```text
//! Header ─► entry with data ─► Data(n) ─► Header …
//!        ─► pax or long name ─► Meta(n), kept ─► Header of the entry it describes: both passed on
//!        ─► zero block twice ─► End: what follows is dropped
//! ```

use std::collections::HashMap;
use std::hash::{BuildHasher as _, RandomState};

/// Bytes of a tar block.
const BLOCK: usize = 512;
/// Longest pax header or long name.
const MAX_META: u64 = 1 << 20;
/// Most bytes of such headers before one entry.
const MAX_PENDING: usize = 4 << 20;
const MAX_PATH: usize = 4096;
const MAX_NAME: usize = 255;

/// The error for an archive that the disk has no room for, in the words of mkfs.erofs.
pub const NO_ROOM: &str = "No space left on device";

/// Bounds of one layer.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Uncompressed bytes of the whole archive.
    pub bytes: u64,
    /// Entries.
    pub entries: u64,
    /// Bytes that there is room for.
    pub room: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { bytes: 64 << 30, entries: 2_000_000, room: u64::MAX }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Meta {
    Pax,
    GlobalPax,
    LongName,
    LongLink,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Header,
    Data,
    Meta(Meta),
    End,
}

/// The checker. Feed it blocks; it says how many of the bytes to pass on.
pub struct Scanner {
    limits: Limits,
    part: Part,
    /// Bytes left of data or meta, without padding.
    left: u64,
    block: Vec<u8>,
    meta: Vec<u8>,
    /// Overrides from pax and long-name headers for the next entry.
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    zero_blocks: u32,
    entries: u64,
    bytes: u64,
    /// Extension headers of the next entry, not passed on yet.
    pending: Vec<u8>,
    /// Where in `pending` the present one begins.
    pending_from: usize,
    /// Checked, to be passed on.
    out: Vec<u8>,
    /// Paths so far, by keyed hash, and whether each is a directory.
    paths: HashMap<u64, bool>,
    hasher: RandomState,
}

impl Scanner {
    /// At the start of an archive.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            part: Part::Header,
            left: 0,
            block: Vec::with_capacity(BLOCK),
            meta: Vec::new(),
            path: None,
            link: None,
            size: None,
            zero_blocks: 0,
            entries: 0,
            bytes: 0,
            pending: Vec::new(),
            pending_from: 0,
            out: Vec::new(),
            paths: HashMap::new(),
            hasher: RandomState::new(),
        }
    }

    /// Takes bytes of the archive; `pass` gets those that are checked. The error is one line.
    pub fn feed(
        &mut self,
        bytes: &[u8],
        mut pass: impl FnMut(&[u8]) -> Result<(), String>,
    ) -> Result<(), String> {
        self.bytes += bytes.len() as u64;
        if self.bytes > self.limits.bytes {
            return Err(format!("it unpacks to more than {} bytes", self.limits.bytes));
        }
        if self.bytes > self.limits.room {
            return Err(NO_ROOM.to_owned());
        }
        let mut rest = bytes;
        while !rest.is_empty() && self.part != Part::End {
            // Whole blocks of data need no copy.
            if self.part == Part::Data
                && self.block.is_empty()
                && self.left >= BLOCK as u64
                && rest.len() >= BLOCK
            {
                let whole = usize::try_from(self.left).unwrap_or(usize::MAX).min(rest.len()) / BLOCK * BLOCK;
                pass(&rest[..whole])?;
                self.left -= whole as u64;
                rest = &rest[whole..];
                self.after_data();
                continue;
            }
            let take = (BLOCK - self.block.len()).min(rest.len());
            self.block.extend_from_slice(&rest[..take]);
            rest = &rest[take..];
            if self.block.len() == BLOCK {
                let block = std::mem::take(&mut self.block);
                self.take_block(&block)?;
                if !self.out.is_empty() {
                    pass(&self.out)?;
                    self.out.clear();
                }
                self.block = block;
                self.block.clear();
            }
        }
        Ok(())
    }

    /// The archive has ended: was it whole? Gives what is missing of the end mark.
    pub fn finish(&self) -> Result<&'static [u8], String> {
        const END: [u8; 2 * BLOCK] = [0; 2 * BLOCK];
        match self.part {
            Part::End => Ok(&[]),
            // Some writers leave the end mark out.
            Part::Header if self.block.is_empty() && self.pending.is_empty() => Ok(&END),
            _ => Err("the archive is cut short".into()),
        }
    }

    fn take_block(&mut self, block: &[u8]) -> Result<(), String> {
        match self.part {
            Part::Header => self.take_header(block),
            Part::Data => {
                self.out.extend_from_slice(block);
                self.left = self.left.saturating_sub(BLOCK as u64);
                self.after_data();
                Ok(())
            }
            Part::Meta(kind) => {
                let count = usize::try_from(self.left).unwrap_or(BLOCK).min(BLOCK);
                self.meta.extend_from_slice(&block[..count]);
                self.left -= count as u64;
                self.pending.extend_from_slice(block);
                if self.left == 0 { self.after_meta(kind) } else { Ok(()) }
            }
            Part::End => Ok(()),
        }
    }

    fn after_data(&mut self) {
        if self.left == 0 {
            self.part = Part::Header;
        }
    }

    fn after_meta(&mut self, kind: Meta) -> Result<(), String> {
        self.part = Part::Header;
        let meta = std::mem::take(&mut self.meta);
        let text = || meta.split(|byte| *byte == 0).next().unwrap_or(&[]).to_vec();
        match kind {
            Meta::LongName => self.path = Some(text()),
            Meta::LongLink => self.link = Some(text()),
            Meta::Pax => self.take_pax(&meta, false)?,
            Meta::GlobalPax => {
                self.take_pax(&meta, true)?;
                // Says nothing about entries, so nobody misses it.
                self.pending.truncate(self.pending_from);
            }
        }
        Ok(())
    }

    /// Records `length key=value\n`.
    fn take_pax(&mut self, mut records: &[u8], global: bool) -> Result<(), String> {
        let odd = || "it has a pax header that does not add up".to_owned();
        while !records.is_empty() {
            let space = records.iter().position(|byte| *byte == b' ').ok_or_else(odd)?;
            let length =
                std::str::from_utf8(&records[..space]).ok().and_then(|text| text.parse::<usize>().ok());
            let length =
                length.filter(|length| *length > space + 1 && *length <= records.len()).ok_or_else(odd)?;
            let (record, rest) = records.split_at(length);
            let record = record[space + 1..].strip_suffix(b"\n").ok_or_else(odd)?;
            let equals = record.iter().position(|byte| *byte == b'=').ok_or_else(odd)?;
            let (key, value) = (&record[..equals], &record[equals + 1..]);
            self.take_pax_record(key, value, global)?;
            records = rest;
        }
        Ok(())
    }

    fn take_pax_record(&mut self, key: &[u8], value: &[u8], global: bool) -> Result<(), String> {
        let changes_layout = matches!(key, b"path" | b"linkpath" | b"size") || key.starts_with(b"GNU.sparse");
        if global && changes_layout {
            return Err("it has a global pax header that changes entries".into());
        }
        match key {
            b"path" => self.path = Some(value.to_vec()),
            b"linkpath" => self.link = Some(value.to_vec()),
            b"size" => {
                let size = std::str::from_utf8(value).ok().and_then(|text| text.parse().ok());
                self.size = Some(size.ok_or("it has a pax header with an odd size")?);
            }
            key if key.starts_with(b"GNU.sparse") => {
                return Err("it has a sparse file of GNU tar's kind".into());
            }
            _ => {}
        }
        Ok(())
    }

    fn take_header(&mut self, block: &[u8]) -> Result<(), String> {
        if block.iter().all(|byte| *byte == 0) {
            if !self.pending.is_empty() {
                return Err("it ends after an extension header".into());
            }
            self.zero_blocks += 1;
            self.out.extend_from_slice(block);
            if self.zero_blocks == 2 {
                self.part = Part::End;
            }
            return Ok(());
        }
        if self.zero_blocks > 0 {
            return Err("it goes on after a zero block".into());
        }
        check_sum(block)?;
        let size = number(&block[124..136]).ok_or("it has an entry with an odd size")?;
        let kind = block[156];
        match kind {
            b'x' => return self.start_meta(block, Meta::Pax, size),
            b'g' => return self.start_meta(block, Meta::GlobalPax, size),
            b'L' => return self.start_meta(block, Meta::LongName, size),
            b'K' => return self.start_meta(block, Meta::LongLink, size),
            _ => {}
        }
        self.take_entry(block, kind, size)
    }

    fn take_entry(&mut self, block: &[u8], kind: u8, size: u64) -> Result<(), String> {
        self.entries += 1;
        if self.entries > self.limits.entries {
            return Err(format!("it has more than {} entries", self.limits.entries));
        }
        let path = self.path.take().unwrap_or_else(|| header_path(block));
        let link = self.link.take().unwrap_or_else(|| until_zero(&block[157..257]).to_vec());
        let size = self.size.take().unwrap_or(size);
        check_path(&path).map_err(|why| format!("its entry '{}' {why}", show(&path)))?;
        let kind = match kind {
            0 | b'0' if path.ends_with(b"/") => b'5',
            0 | b'7' => b'0',
            other => other,
        };
        let size = match kind {
            b'0' => size,
            b'1' => {
                check_path(&link)
                    .map_err(|why| format!("its hard link '{}' to '{}' {why}", show(&path), show(&link)))?;
                if size > 0 {
                    return Err(format!("its hard link '{}' has data of its own", show(&path)));
                }
                0
            }
            b'2' => {
                if link.is_empty() || link.len() > MAX_PATH || link.contains(&0) {
                    return Err(format!("its symbolic link '{}' has an odd target", show(&path)));
                }
                0
            }
            b'3' | b'4' | b'5' | b'6' => 0,
            other => return Err(format!("its entry '{}' is of kind {other}", show(&path))),
        };
        if size > self.limits.bytes {
            return Err(format!("its file '{}' has {size} bytes", show(&path)));
        }
        if size > self.limits.room {
            return Err(NO_ROOM.to_owned());
        }
        self.place(&path, kind == b'5')?;
        self.out.append(&mut self.pending);
        let mut header = block.to_vec();
        if header[156] != kind {
            header[156] = kind;
            set_check_sum(&mut header);
        }
        self.out.append(&mut header);
        self.left = size;
        self.part = if size > 0 { Part::Data } else { Part::Header };
        Ok(())
    }

    /// Enters a path, after an entry for each directory above it that has had none.
    fn place(&mut self, path: &[u8], directory: bool) -> Result<(), String> {
        let parts = || path.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".");
        let count = parts().count();
        let mut prefix = Vec::with_capacity(path.len() + 2);
        if count > 0 {
            self.imply(b"./", path)?;
        }
        for part in parts().take(count.saturating_sub(1)) {
            prefix.extend_from_slice(part);
            prefix.push(b'/');
            self.imply(&prefix, path)?;
        }
        match parts().next_back() {
            Some(name) => prefix.extend_from_slice(name),
            None => prefix.push(b'.'),
        }
        prefix.push(b'/');
        self.paths.insert(self.hasher.hash_one(&prefix), directory);
        Ok(())
    }

    fn imply(&mut self, directory: &[u8], path: &[u8]) -> Result<(), String> {
        match self.paths.get(&self.hasher.hash_one(directory)) {
            Some(true) => Ok(()),
            Some(false) => Err(format!(
                "its entry '{}' lies below '{}', which is no directory",
                show(path),
                show(directory)
            )),
            None => {
                self.paths.insert(self.hasher.hash_one(directory), true);
                implied_directory(&mut self.out, directory);
                Ok(())
            }
        }
    }

    fn start_meta(&mut self, block: &[u8], kind: Meta, size: u64) -> Result<(), String> {
        if size == 0 || size > MAX_META || self.pending.len() > MAX_PENDING {
            return Err(format!("it has an extension header of {size} bytes"));
        }
        self.pending_from = self.pending.len();
        self.pending.extend_from_slice(block);
        self.left = size;
        self.part = Part::Meta(kind);
        Ok(())
    }
}

/// An entry for a directory, root's, mode 0755, with a long name in GNU's way where it needs one.
fn implied_directory(out: &mut Vec<u8>, path: &[u8]) {
    if path.len() > 100 {
        out.extend(made_header(b"././@LongLink", b'L', path.len() + 1));
        out.extend_from_slice(path);
        out.resize(out.len() + BLOCK - path.len() % BLOCK, 0);
    }
    out.extend(made_header(&path[..path.len().min(100)], b'5', 0));
}

fn made_header(name: &[u8], kind: u8, size: usize) -> Vec<u8> {
    let mut header = vec![0; BLOCK];
    header[..name.len()].copy_from_slice(name);
    header[100..108].copy_from_slice(b"0000755\0");
    header[108..116].copy_from_slice(b"0000000\0");
    header[116..124].copy_from_slice(b"0000000\0");
    header[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
    header[136..148].copy_from_slice(b"00000000000\0");
    header[156] = kind;
    header[257..265].copy_from_slice(b"ustar  \0");
    set_check_sum(&mut header);
    header
}

fn set_check_sum(header: &mut [u8]) {
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

fn show(path: &[u8]) -> String {
    String::from_utf8_lossy(&path[..path.len().min(200)]).escape_debug().to_string()
}

fn until_zero(field: &[u8]) -> &[u8] {
    field.split(|byte| *byte == 0).next().unwrap_or(&[])
}

/// Name, with the prefix that ustar keeps apart.
fn header_path(block: &[u8]) -> Vec<u8> {
    let name = until_zero(&block[..100]);
    let prefix =
        if &block[257..262] == b"ustar" && block[262] == 0 { until_zero(&block[345..500]) } else { &[] };
    if prefix.is_empty() { name.to_vec() } else { [prefix, b"/", name].concat() }
}

/// An octal number, or a binary one where the first bit is set.
fn number(field: &[u8]) -> Option<u64> {
    if let [first, rest @ ..] = field
        && first & 0x80 != 0
    {
        let start = u64::from(first & 0x7f);
        return rest
            .iter()
            .try_fold(start, |value, byte| value.checked_mul(256)?.checked_add(u64::from(*byte)));
    }
    let digits = field.split(|byte| *byte == 0).next()?;
    let text = std::str::from_utf8(digits).ok()?.trim_matches(' ');
    if text.is_empty() { Some(0) } else { u64::from_str_radix(text, 8).ok() }
}

fn check_sum(block: &[u8]) -> Result<(), String> {
    let sum: u64 =
        block[..148].iter().chain(&block[156..]).map(|byte| u64::from(*byte)).sum::<u64>() + 8 * 32;
    let signed: i64 =
        block[..148].iter().chain(&block[156..]).map(|byte| i64::from(*byte as i8)).sum::<i64>() + 8 * 32;
    let stated = number(&block[148..156]);
    // Old writers summed signed bytes.
    if stated == Some(sum) || stated.is_some_and(|stated| i64::try_from(stated) == Ok(signed)) {
        Ok(())
    } else {
        Err("it has a header whose checksum is wrong: this is no tar archive, or a damaged one".into())
    }
}

/// A path of the image: never above its root.
fn check_path(path: &[u8]) -> Result<(), &'static str> {
    if path.is_empty() {
        return Err("has no name");
    }
    if path.len() > MAX_PATH {
        return Err("has too long a name");
    }
    if path.contains(&0) {
        return Err("has a zero byte in its name");
    }
    for part in path.split(|byte| *byte == b'/') {
        if part == b".." {
            return Err("leads out of the image");
        }
        if part.len() > MAX_NAME {
            return Err("has too long a name");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
