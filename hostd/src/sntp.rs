//! SNTP packets (RFC 4330, 5905): one question, one answer, the offset between two clocks. ◇

/// Length of a packet without extensions.
pub const PACKET: usize = 48;
/// Seconds from 1900, where NTP counts from, to 1970.
const NTP_TO_UNIX: i128 = 2_208_988_800;
/// Nanoseconds in a second.
const NANOS: i128 = 1_000_000_000;
/// Nanoseconds in one turn of NTP's 32-bit seconds.
const ERA: i128 = (1 << 32) * NANOS;

/// A time so long after the earliest possible one is no true time: the next turn is what the years before that time
/// look like, which a server says whose own clock was never set.
const LATEST: i128 = 50 * 365 * 86_400 * NANOS;

/// Nanoseconds since 1970 as an NTP timestamp.
pub fn to_ntp(unix_nanos: i128) -> u64 {
    let nanos = (unix_nanos + NTP_TO_UNIX * NANOS).rem_euclid(ERA);
    ((nanos << 32) / NANOS) as u64
}

/// An NTP timestamp as nanoseconds since 1970: that of its possible values (one each 136 years) that is after
/// `not_before`, because a clock that was never set may be decades behind.
pub fn from_ntp(timestamp: u64, not_before: i128) -> i128 {
    let nanos = ((i128::from(timestamp) * NANOS) >> 32) - NTP_TO_UNIX * NANOS;
    let eras =
        (not_before - nanos).max(0).div_euclid(ERA) + i128::from((not_before - nanos).max(0) % ERA != 0);
    nanos + eras * ERA
}

/// The question. The nonce comes back in the answer, so that a blind forger cannot guess it; the real time of
/// sending stays here.
pub fn request(nonce: u64) -> [u8; PACKET] {
    let mut packet = [0; PACKET];
    packet[0] = (4 << 3) | 3;
    packet[40..48].copy_from_slice(&nonce.to_be_bytes());
    packet
}

/// Why an answer is not used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Not an answer to the question, or not NTP at all.
    #[error("the answer does not fit the question")]
    NotOurs,
    /// The server itself is not synchronised.
    #[error("the server says that its own clock is not set")]
    Unsynchronised,
    /// The server sends a kiss code instead of the time.
    #[error("the server refuses (asked too often, or access denied)")]
    Refused,
    /// The server says a time decades off.
    #[error("the server says a time that cannot be right: its own clock is decades off")]
    Implausible,
}

/// A usable answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answer {
    /// When the server got the question.
    received: u64,
    /// When it sent the answer.
    sent: u64,
    /// How far the server is from a reference clock.
    pub stratum: u8,
}

/// What the exchange tells about this machine's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sample {
    /// Nanoseconds to add to our clock.
    pub offset: i128,
    /// Nanoseconds on the way.
    pub delay: i128,
}

/// Reads an answer.
pub fn parse(packet: &[u8], nonce: u64) -> Result<Answer, Refusal> {
    let packet = packet.get(..PACKET).ok_or(Refusal::NotOurs)?;
    let word = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&packet[at..at + 8]);
        u64::from_be_bytes(bytes)
    };
    let (leap, version, mode, stratum) = (packet[0] >> 6, (packet[0] >> 3) & 7, packet[0] & 7, packet[1]);
    if mode != 4 || !(3..=4).contains(&version) || word(24) != nonce {
        return Err(Refusal::NotOurs);
    }
    match stratum {
        0 => Err(Refusal::Refused),
        1..=15 if leap != 3 && word(32) != 0 && word(40) != 0 => {
            Ok(Answer { received: word(32), sent: word(40), stratum })
        }
        _ => Err(Refusal::Unsynchronised),
    }
}

impl Answer {
    /// Compares the clocks. `asked` and `answered` are ours, in nanoseconds since 1970; the true time is not before
    /// `not_before`, nor decades after it.
    pub fn sample(&self, asked: i128, answered: i128, not_before: i128) -> Result<Sample, Refusal> {
        let received = from_ntp(self.received, not_before);
        let sent = from_ntp(self.sent, not_before);
        if received.max(sent) > not_before + LATEST {
            return Err(Refusal::Implausible);
        }
        let delay = ((answered - asked) - (sent - received)).max(0);
        Ok(Sample { offset: ((received - asked) + (sent - answered)) / 2, delay })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// 2025-01-01, in nanoseconds.
    const RECENT: i128 = 1_735_689_600 * NANOS;

    fn answer(nonce: u64, received: i128, sent: i128) -> [u8; PACKET] {
        let mut packet = [0; PACKET];
        packet[0] = (4 << 3) | 4;
        packet[1] = 2;
        packet[24..32].copy_from_slice(&nonce.to_be_bytes());
        packet[32..40].copy_from_slice(&to_ntp(received).to_be_bytes());
        packet[40..48].copy_from_slice(&to_ntp(sent).to_be_bytes());
        packet
    }

    #[test]
    fn bad_answers_are_named() {
        let good = answer(7, RECENT, RECENT);
        assert!(parse(&good, 7).is_ok());
        assert_eq!(parse(&good, 8), Err(Refusal::NotOurs));
        assert_eq!(parse(&good[..40], 7), Err(Refusal::NotOurs));
        let with = |at: usize, byte: u8| {
            let mut packet = good;
            packet[at] = byte;
            parse(&packet, 7)
        };
        assert_eq!(with(0, (4 << 3) | 3), Err(Refusal::NotOurs));
        assert_eq!(with(0, (3 << 6) | (4 << 3) | 4), Err(Refusal::Unsynchronised));
        assert_eq!(with(1, 0), Err(Refusal::Refused));
        assert_eq!(with(1, 16), Err(Refusal::Unsynchronised));
    }

    #[test]
    fn the_turn_of_2036_changes_nothing() {
        for seconds in [2_085_978_495i128, 2_085_978_496, 2_085_978_497, 4_000_000_000] {
            let time = seconds * NANOS;
            assert!((from_ntp(to_ntp(time), RECENT) - time).abs() <= 1, "{seconds}");
        }
    }

    #[test]
    fn a_server_whose_clock_is_dead_does_not_count_as_one_of_the_next_turn() {
        let year = 365 * 86_400 * NANOS;
        let sample = |time: i128| parse(&answer(7, time, time), 7).unwrap().sample(RECENT, RECENT, RECENT);
        assert_eq!(sample(RECENT - 10 * year), Err(Refusal::Implausible), "2015, which looks like 2151");
        assert_eq!(sample(RECENT + 51 * year), Err(Refusal::Implausible));
        assert!(sample(RECENT + 49 * year).is_ok(), "beyond the turn of 2036");
    }

    proptest! {
        #[test]
        fn any_recent_time_survives(nanos in RECENT..RECENT + 100 * 365 * 86_400 * NANOS) {
            prop_assert!((from_ntp(to_ntp(nanos), RECENT) - nanos).abs() <= 1);
        }

        #[test]
        fn the_offset_is_found_within_half_the_delay(
            error in -50i128 * 365 * 86_400 * NANOS..10 * NANOS, there in 0i128..NANOS, back in 0i128..NANOS, nonce: u64,
        ) {
            let truth = RECENT + 86_400 * NANOS;
            let ours = truth - error;
            let packet = answer(nonce, truth + there, truth + there + 1000);
            let sample = parse(&packet, nonce).unwrap().sample(ours, ours + there + 1000 + back, RECENT).unwrap();
            prop_assert!((sample.offset - error).abs() <= (there + back) / 2 + 2, "{sample:?}");
            prop_assert!((sample.delay - there - back).abs() <= 4);
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..100), nonce: u64, now in any::<i64>()) {
            if let Ok(answer) = parse(&bytes, nonce) { let _ = answer.sample(now.into(), now.into(), RECENT); }
            from_ntp(nonce, now.into());
        }
    }
}
