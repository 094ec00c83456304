//! Entries of a tar with every byte as given: what no packing library would write.

/// A header with every byte as given, its checksum aside.
///
/// # Panics
/// When the name has more than 100 bytes.
pub fn header(name: &[u8], kind: u8, size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.as_gnu_mut().expect("it is GNU's").name[..name.len()].copy_from_slice(name);
    header.as_mut_bytes()[156] = kind;
    header.set_size(size);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_cksum();
    header
}

/// Header and data, filled up to whole blocks.
pub fn entry(name: &[u8], kind: u8, data: &[u8]) -> Vec<u8> {
    let mut bytes = header(name, kind, data.len() as u64).as_bytes().to_vec();
    bytes.extend(data);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

/// A hard (`1`) or symbolic (`2`) link.
///
/// # Panics
/// When the target has more than 100 bytes.
pub fn link(name: &[u8], kind: u8, target: &str) -> Vec<u8> {
    let mut header = header(name, kind, 0);
    header.set_link_name_literal(target).expect("a short target");
    header.set_cksum();
    header.as_bytes().to_vec()
}

/// A character (`3`) or block (`4`) device.
///
/// # Panics
/// Never: the header is GNU's, which has room for both numbers.
pub fn device(name: &[u8], kind: u8, (major, minor): (u32, u32)) -> Vec<u8> {
    let mut header = header(name, kind, 0);
    header.set_device_major(major).expect("it is GNU's");
    header.set_device_minor(minor).expect("it is GNU's");
    header.set_cksum();
    header.as_bytes().to_vec()
}

/// A file with this mode, owner and group.
pub fn file(name: &[u8], (mode, uid, gid): (u32, u64, u64), data: &[u8]) -> Vec<u8> {
    let mut header = header(name, b'0', data.len() as u64);
    header.set_mode(mode);
    header.set_uid(uid);
    header.set_gid(gid);
    header.set_cksum();
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend(data);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

/// A name too long for a header, in GNU's way.
pub fn long(name: &[u8], kind: u8, data: &[u8]) -> Vec<u8> {
    [entry(b"././@LongLink", b'L', &[name, b"\0"].concat()), entry(b"cut", kind, data)].concat()
}

/// What an archive ends with.
pub fn end() -> Vec<u8> {
    vec![0; 1024]
}
