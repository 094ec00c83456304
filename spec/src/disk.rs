//! Ids (GUIDs) of disks and partitions, as bytes in a partition table. The image builder makes them by a rule, so that
//! the same image has the same bytes; a disk that was flashed with it gets its own, from hostd at its first boot or from
//! `atoll-image config`. Both sides have to agree on which are which.

/// An id as it stands in a partition table: the first three groups little endian.
pub type Guid = [u8; 16];

/// The id that an image has for what this digest stands for: version 8 of RFC 9562, made by the vendor's rule.
pub fn of_the_image(digest: Guid) -> Guid {
    marked(digest, 8)
}

/// An id that no other disk has: version 4, random.
pub fn own(random: Guid) -> Guid {
    marked(random, 4)
}

/// Whether every disk flashed with the same image has this id.
pub fn is_of_the_image(id: &Guid) -> bool {
    id[7] >> 4 == 8 && id[8] >> 6 == 2
}

fn marked(mut id: Guid, version: u8) -> Guid {
    id[7] = (id[7] & 0x0f) | (version << 4);
    id[8] = (id[8] & 0x3f) | 0x80;
    id
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_of_the_image_is_told_from_what_is_a_disks_own() {
        for bytes in [[0; 16], [0xff; 16], [0x5a; 16]] {
            assert!(is_of_the_image(&of_the_image(bytes)));
            assert!(!is_of_the_image(&own(bytes)));
        }
        assert!(!is_of_the_image(&[0; 16]));
    }
}
