//! Checks a layer's tar while it passes through: nothing reaches mkfs.erofs before its header has been read here.
//!
//! Why: mkfs.erofs is a C program that trusts its input more than an archive from a registry deserves. Refused are
//! paths that lead out, headers that do not add up, kinds of entries that no image has, and more entries or bytes
//! than any image needs. The scanner keeps a few kilobytes, whatever the archive says.
//!
//! ```text
//! Header ─► entry with data ─► Data(n) ─► Padding ─► Header …
//!        ─► pax or long name ─► Meta(n) ─► Padding ─► Header (of the entry it describes)
//!        ─► zero block twice ─► End: what follows is dropped
//! ```

/// Bytes of a tar block.
const BLOCK: usize = 512;
/// Longest pax header or long name.
const MAX_META: u64 = 1 << 20;
const MAX_PATH: usize = 4096;
const MAX_NAME: usize = 255;

/// Bounds of one layer.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Uncompressed bytes of the whole archive.
    pub bytes: u64,
    /// Entries.
    pub entries: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { bytes: 64 << 30, entries: 2_000_000 }
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
                pass(&block)?;
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
            Part::Header if self.block.is_empty() && self.path.is_none() && self.size.is_none() => Ok(&END),
            _ => Err("the archive is cut short".into()),
        }
    }

    fn take_block(&mut self, block: &[u8]) -> Result<(), String> {
        match self.part {
            Part::Header => self.take_header(block),
            Part::Data => {
                self.left = self.left.saturating_sub(BLOCK as u64);
                self.after_data();
                Ok(())
            }
            Part::Meta(kind) => {
                let count = usize::try_from(self.left).unwrap_or(BLOCK).min(BLOCK);
                self.meta.extend_from_slice(&block[..count]);
                self.left -= count as u64;
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
            Meta::GlobalPax => self.take_pax(&meta, true)?,
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
            self.zero_blocks += 1;
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
            b'x' => return self.start_meta(Meta::Pax, size),
            b'g' => return self.start_meta(Meta::GlobalPax, size),
            b'L' => return self.start_meta(Meta::LongName, size),
            b'K' => return self.start_meta(Meta::LongLink, size),
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
        let size = match kind {
            b'0' | 0 | b'7' => size,
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
        self.left = size;
        self.part = if size > 0 { Part::Data } else { Part::Header };
        Ok(())
    }

    fn start_meta(&mut self, kind: Meta, size: u64) -> Result<(), String> {
        if size == 0 || size > MAX_META {
            return Err(format!("it has an extension header of {size} bytes"));
        }
        self.left = size;
        self.part = Part::Meta(kind);
        Ok(())
    }
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
    if field[0] & 0x80 != 0 {
        let (high, low) = field.split_at(field.len() - 8);
        let zero = high[0] & 0x7f == 0 && high[1..].iter().all(|byte| *byte == 0);
        return if zero { Some(u64::from_be_bytes(low.try_into().ok()?)) } else { None };
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
