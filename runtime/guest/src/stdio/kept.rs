//! Output of a container that the runtime has not acknowledged: what a new stream begins with.
//!
//! Called by the container's stdio thread. Invariant: a byte leaves only when the runtime says that it is in the log.

use super::CHUNK;
use super::packet::packet;
use atoll_spec::guest::Channel;
use std::collections::VecDeque;

/// Bytes of the two output channels.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Of output.
    pub stdout: u64,
    /// Of error output.
    pub stderr: u64,
}

/// What a container said and the runtime has not acknowledged, one queue a channel. How the two were interleaved is not
/// kept: only a runtime that was killed in between sees them apart.
#[derive(Default)]
pub struct Kept {
    stdout: VecDeque<u8>,
    stderr: VecDeque<u8>,
    /// What the present stream's runtime has acknowledged.
    done: Counts,
}

impl Kept {
    fn queue(&mut self, channel: Channel) -> &mut VecDeque<u8> {
        if channel == Channel::Stderr { &mut self.stderr } else { &mut self.stdout }
    }

    /// Keeps what is about to be sent.
    pub fn keep(&mut self, channel: Channel, bytes: &[u8]) {
        self.queue(channel).extend(bytes);
    }

    /// Bytes kept.
    pub fn len(&self) -> usize {
        self.stdout.len() + self.stderr.len()
    }

    /// Forgets what `counts` has beyond the last ones. A runtime that claims more than was said gets no further.
    pub fn acknowledge(&mut self, counts: Counts) {
        forget(&mut self.stdout, self.done.stdout, counts.stdout);
        forget(&mut self.stderr, self.done.stderr, counts.stderr);
        self.done = Counts {
            stdout: self.done.stdout.max(counts.stdout),
            stderr: self.done.stderr.max(counts.stderr),
        };
    }

    /// Everything kept, as the packets that a new stream begins with.
    pub fn replay(&mut self) -> VecDeque<Vec<u8>> {
        self.done = Counts::default();
        let mut packets = VecDeque::new();
        for channel in [Channel::Stdout, Channel::Stderr] {
            let bytes = self.queue(channel).make_contiguous();
            packets.extend(bytes.chunks(CHUNK).map(|chunk| packet(channel, chunk)));
        }
        packets
    }
}

fn forget(queue: &mut VecDeque<u8>, was: u64, is: u64) {
    let count = usize::try_from(is.saturating_sub(was)).unwrap_or(usize::MAX).min(queue.len());
    drop(queue.drain(..count));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_acknowledged_is_said_again() {
        let mut kept = Kept::default();
        kept.keep(Channel::Stdout, b"abcdef");
        kept.keep(Channel::Stderr, b"xyz");
        kept.acknowledge(Counts { stdout: 2, stderr: 0 });
        kept.acknowledge(Counts { stdout: 4, stderr: 1 });
        // An old count changes nothing.
        kept.acknowledge(Counts { stdout: 1, stderr: 0 });
        let packets: Vec<Vec<u8>> = kept.replay().into();
        assert_eq!(packets, [packet(Channel::Stdout, b"ef"), packet(Channel::Stderr, b"yz")]);
        // Counts begin anew with the new stream; more than there is takes all there is.
        kept.acknowledge(Counts { stdout: 1, stderr: 900 });
        assert_eq!((kept.stdout.len(), kept.stderr.len()), (1, 0));
    }
}
