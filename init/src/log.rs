//! What services say on their standard output: split into lines, stamped, kept in a bounded ring for each service
//! and handed on to the console.

use atoll_spec::control::LogLine;
use std::collections::VecDeque;

/// Bytes kept of each service.
const KEPT: usize = 256 * 1024;
/// What a line costs beside its bytes.
const LINE_COST: usize = 32;
/// Longest line; a longer one is cut into several.
const LONGEST_LINE: usize = 4096;

/// The log of one service.
#[derive(Debug, Default)]
pub struct ServiceLog {
    lines: VecDeque<LogLine>,
    size: usize,
    partial: Vec<u8>,
}

impl ServiceLog {
    /// Takes in what was read and returns the lines it completed.
    pub fn take(&mut self, at_ms: u64, bytes: &[u8]) -> Vec<String> {
        let mut complete = Vec::new();
        for byte in bytes {
            match byte {
                b'\n' => complete.extend(self.complete(at_ms)),
                byte => {
                    self.partial.push(*byte);
                    if self.partial.len() >= LONGEST_LINE {
                        complete.extend(self.complete(at_ms));
                    }
                }
            }
        }
        complete
    }

    /// The writer is gone: what it left without a line end is a line too.
    pub fn finish(&mut self, at_ms: u64) -> Option<String> {
        self.complete(at_ms)
    }

    /// Adds a line that init itself has to say about the service.
    pub fn add(&mut self, at_ms: u64, text: &str) {
        self.keep(LogLine { at_ms, text: text.to_owned() });
    }

    /// The last lines, oldest first; all for 0.
    pub fn last(&self, count: usize) -> Vec<LogLine> {
        let count = if count == 0 { self.lines.len() } else { count };
        self.lines.iter().skip(self.lines.len().saturating_sub(count)).cloned().collect()
    }

    fn complete(&mut self, at_ms: u64) -> Option<String> {
        let bytes = std::mem::take(&mut self.partial);
        // Control characters would let a service paint on the console.
        let text: String =
            String::from_utf8_lossy(&bytes).chars().filter(|c| *c == '\t' || !c.is_control()).collect();
        if text.trim().is_empty() {
            return None;
        }
        self.keep(LogLine { at_ms, text: text.clone() });
        Some(text)
    }

    fn keep(&mut self, line: LogLine) {
        self.size += line.text.len() + LINE_COST;
        self.lines.push_back(line);
        while self.size > KEPT
            && let Some(oldest) = self.lines.pop_front()
        {
            self.size -= oldest.text.len() + LINE_COST;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lines_come_whole_and_clean() {
        let mut log = ServiceLog::default();
        assert!(log.take(1, b"one").is_empty());
        assert_eq!(log.take(2, b" line\r\n\n\x1b[31mtwo\nthr"), ["one line", "[31mtwo"]);
        assert_eq!(log.finish(3).as_deref(), Some("thr"));
        let kept: Vec<(u64, String)> = log.last(2).into_iter().map(|line| (line.at_ms, line.text)).collect();
        assert_eq!(kept, [(2, "[31mtwo".to_owned()), (3, "thr".to_owned())]);
        assert_eq!(log.last(0).len(), 3);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(12))]
        #[test]
        fn memory_is_bounded_whatever_is_written(writes in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..9000), 0..40)) {
            let mut log = ServiceLog::default();
            for bytes in &writes {
                for _ in 0..4 {
                    log.take(0, bytes);
                }
            }
            let size: usize = log.lines.iter().map(|line| line.text.len() + LINE_COST).sum();
            prop_assert_eq!(size, log.size);
            // Bytes that are no UTF-8 grow to three when replaced.
            prop_assert!(size <= KEPT + LONGEST_LINE * 3 + LINE_COST && log.partial.len() < LONGEST_LINE);
        }
    }
}
