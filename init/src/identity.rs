//! Who this machine is before its config has been read: machine id, provisional host name, loopback interface.

use crate::error::{Error, Result};
use crate::sys::Syscalls;
use atoll_spec::control::MACHINE_ID_FILE;
use sha2::{Digest, Sha256};

/// Mixed into the hash, so that the id cannot be turned into the firmware's UUID, which is a secret on some boards.
const APPLICATION_KEY: &[u8] = b"dev.atoll machine id v1\0";

/// UUIDs that vendors ship on whole series of boards, besides all zeroes and all ones.
const SHARED_UUIDS: [&str; 2] =
    ["03000200-0400-0500-0006-000700080009", "12345678-1234-5678-90ab-cddeefaabbcc"];

/// Names the host `localhost`, brings up the loopback interface and writes the machine id.
///
/// # Errors
/// All that failed of it.
pub fn establish(sys: &dyn Syscalls) -> Result<()> {
    let mut failures = Vec::new();
    failures.extend(sys.set_hostname("localhost").err().map(Error::system("name the host localhost")));
    failures.extend(sys.loopback_up().err().map(Error::system("bring up the loopback interface")));
    let id = match sys.read("/sys/class/dmi/id/product_uuid").ok().as_deref().and_then(machine_id) {
        Some(id) => id,
        None => random_id()?,
    };
    let written = sys.write(MACHINE_ID_FILE, &format!("{id}\n"));
    failures.extend(written.err().map(Error::file("write", MACHINE_ID_FILE)));
    Error::all(failures)
}

/// The id of the machine with this firmware UUID; `None` when many machines share the UUID.
fn machine_id(uuid: &str) -> Option<String> {
    let uuid = uuid.trim().to_ascii_lowercase();
    let digits: Vec<u8> = uuid.bytes().filter(|byte| *byte != b'-').collect();
    let uniform = digits.first().is_none_or(|first| digits.iter().all(|digit| digit == first));
    if digits.len() != 32
        || !digits.iter().all(u8::is_ascii_hexdigit)
        || uniform
        || SHARED_UUIDS.contains(&uuid.as_str())
    {
        return None;
    }
    Some(hexadecimal(&Sha256::new().chain_update(APPLICATION_KEY).chain_update(uuid).finalize()[..16]))
}

fn random_id() -> Result<String> {
    let mut bytes = [0; 16];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .map_err(Error::system("get random bytes for a machine id"))?;
    Ok(hexadecimal(&bytes))
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_stable_and_not_the_uuid() {
        let id = machine_id("A7011000-0000-4000-8000-000000000001\n").unwrap();
        assert_eq!(Some(&id), machine_id("a7011000-0000-4000-8000-000000000001").as_ref());
        assert_eq!(id.len(), 32);
        assert_ne!(id, "a7011000000040008000000000000001");
        assert_ne!(Some(id), machine_id("a7011000-0000-4000-8000-000000000002"));
    }

    #[test]
    fn a_uuid_that_others_have_too_is_none() {
        for uuid in [
            "",
            "Not Settable",
            "00000000-0000-0000-0000-000000000000",
            "FFFFFFFF-FFFF-FFFF-FFFF-FFFFFFFFFFFF",
            SHARED_UUIDS[0],
        ] {
            assert_eq!(machine_id(uuid), None, "{uuid}");
        }
        assert_ne!(random_id().unwrap(), random_id().unwrap());
    }
}
