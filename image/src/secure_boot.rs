//! Enrolment of the user's key: signed updates of the firmware's variables `db`, `KEK` and `PK`, which the boot
//! loader offers while the firmware is in setup mode (in a virtual machine it takes them by itself).
//!
//! All three hold the one certificate that signs the boot files: the machine then starts what its owner signed,
//! and nothing else.

use crate::error::{Error, Result};
use crate::program::Tools;
use crate::sign::Signer;
use std::fs;
use std::path::{Path, PathBuf};

/// Non-volatile, for boot and run time, authenticated by time.
const ATTRIBUTES: u32 = 0x27;
/// 2026-01-01 00:00:00 as an `EFI_TIME`.
const TIME: [u8; 16] = [0xea, 0x07, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
const X509: &str = "a5c059a1-94e4-4aa7-87b5-ab155c2bf072";
const PKCS7: &str = "4aafd29d-68df-49ee-8aa9-347d375665a7";
const GLOBAL_VARIABLES: &str = "8be4df61-93ca-11d2-aa0d-00e098032b8c";
const SECURITY_DATABASE: &str = "d719b2cb-3d3a-4596-a3bc-dad00e67656f";
/// Names Atoll as the owner of an entry; without meaning to firmware.
const OWNER: &str = "a7011001-0a70-4110-8a70-110000000001";

/// Variable and vendor, in the order of enrolment: the platform key, which ends setup mode, is last.
const VARIABLES: [(&str, &str); 3] =
    [("db", SECURITY_DATABASE), ("KEK", GLOBAL_VARIABLES), ("PK", GLOBAL_VARIABLES)];

/// Paths of the updates on the ESP, where the boot loader looks for them.
pub fn paths() -> [String; 3] {
    VARIABLES.map(|(name, _)| format!("loader/keys/auto/{name}.auth"))
}

/// Makes the updates in `dir`; the order is that of [`paths`].
pub fn updates(tools: &Tools, signer: &Signer, dir: &Path) -> Result<Vec<PathBuf>> {
    let der = dir.join("certificate.der");
    let convert = tools.openssl("read the certificate").args(["x509", "-outform", "DER"]);
    convert.arg("-in").arg(&signer.certificate).arg("-out").arg(&der).run()?;
    let list = signature_list(&fs::read(&der).map_err(Error::file("read", &der))?)?;
    let make = |(name, vendor): (&str, &str)| {
        let payload = dir.join(format!("{name}.payload"));
        fs::write(&payload, signed_content(name, vendor, &list)).map_err(Error::file("write", &payload))?;
        let sign =
            tools.openssl("sign the Secure Boot variables").args(["smime", "-sign", "-binary", "-noattr"]);
        let sign = sign.args(["-md", "sha256", "-outform", "DER", "-signer"]).arg(&signer.certificate);
        let signature = sign.arg("-inkey").arg(&signer.key).arg("-in").arg(&payload).run()?;
        let update = dir.join(format!("{name}.auth"));
        fs::write(&update, authenticated(&signature, &list)?).map_err(Error::file("write", &update))?;
        Ok(update)
    };
    VARIABLES.into_iter().map(make).collect()
}

/// An `EFI_SIGNATURE_LIST` of one certificate.
fn signature_list(certificate: &[u8]) -> Result<Vec<u8>> {
    let size = small(16 + certificate.len())?;
    let mut list = guid(X509).to_vec();
    list.extend((28 + size).to_le_bytes());
    list.extend(0u32.to_le_bytes());
    list.extend(size.to_le_bytes());
    list.extend(guid(OWNER));
    list.extend(certificate);
    Ok(list)
}

/// What the signature of an update covers.
fn signed_content(name: &str, vendor: &str, list: &[u8]) -> Vec<u8> {
    let mut content: Vec<u8> = name.encode_utf16().flat_map(u16::to_le_bytes).collect();
    content.extend(guid(vendor));
    content.extend(ATTRIBUTES.to_le_bytes());
    content.extend(TIME);
    content.extend(list);
    content
}

/// `EFI_VARIABLE_AUTHENTICATION_2` and the new content.
fn authenticated(signature: &[u8], list: &[u8]) -> Result<Vec<u8>> {
    let signature = signed_data(signature)
        .ok_or_else(|| Error::format("signature of a Secure Boot variable", "not PKCS #7 signed data"))?;
    let mut update = TIME.to_vec();
    update.extend(small(24 + signature.len())?.to_le_bytes());
    update.extend([0x00, 0x02, 0xf1, 0x0e]);
    update.extend(guid(PKCS7));
    update.extend(signature);
    update.extend(list);
    Ok(update)
}

/// The `SignedData` inside a PKCS #7 `ContentInfo`: older firmware knows only the former.
fn signed_data(content_info: &[u8]) -> Option<&[u8]> {
    let (sequence, _) = der(content_info, 0x30)?;
    let (_, rest) = der(sequence, 0x06)?;
    der(rest, 0xa0).map(|(inner, _)| inner)
}

/// The content of a DER element with this tag, and what follows it.
fn der(bytes: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    let (&[found, length], rest) = bytes.split_first_chunk()?;
    if found != tag {
        return None;
    }
    let (length, rest) = match length {
        0..=0x7f => (usize::from(length), rest),
        0x81..=0x84 => {
            let (digits, rest) = rest.split_at_checked(usize::from(length - 0x80))?;
            (digits.iter().fold(0, |n, digit| n << 8 | usize::from(*digit)), rest)
        }
        _ => return None,
    };
    rest.split_at_checked(length)
}

/// The bytes of a GUID that is written as text: the first three groups little endian.
fn guid(text: &str) -> [u8; 16] {
    let digits: Vec<u8> = text.bytes().filter(|b| *b != b'-').collect();
    let mut bytes = [0; 16];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let digit = |c: u8| char::from(c).to_digit(16).map_or(0, |d| d as u8);
        *byte = digit(pair[0]) << 4 | digit(pair[1]);
    }
    bytes[..4].reverse();
    bytes[4..6].reverse();
    bytes[6..8].reverse();
    bytes
}

fn small(size: usize) -> Result<u32> {
    u32::try_from(size).map_err(|_| Error::format("certificate", "larger than 4 GiB"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guids_are_mixed_endian() {
        let expected =
            [0xa1, 0x59, 0xc0, 0xa5, 0xe4, 0x94, 0xa7, 0x4a, 0x87, 0xb5, 0xab, 0x15, 0x5c, 0x2b, 0xf0, 0x72];
        assert_eq!(guid(X509), expected);
    }

    #[test]
    fn the_list_says_its_sizes() {
        let list = signature_list(&[9; 100]).unwrap();
        assert_eq!(list.len(), 144);
        assert_eq!(list[16..28], [144, 0, 0, 0, 0, 0, 0, 0, 116, 0, 0, 0]);
    }

    #[test]
    fn signed_data_is_unwrapped_and_nonsense_refused() {
        let wrapped = [0x30, 7, 0x06, 1, 42, 0xa0, 2, 0x30, 0];
        assert_eq!(signed_data(&wrapped), Some([0x30, 0].as_slice()));
        for cut in 0..wrapped.len() {
            assert_eq!(signed_data(&wrapped[..cut]), None);
        }
        assert_eq!(signed_data(&[0x30, 0x84, 0xff, 0xff, 0xff, 0xff, 0]), None);
    }
}
