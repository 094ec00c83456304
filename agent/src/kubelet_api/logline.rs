//! One line of a container's log file: `<RFC 3339 time> <stdout|stderr> <P|F tags> <text>` (CRI's log format).

/// A parsed line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LogLine<'a> {
    /// RFC 3339 with nanoseconds, as written.
    pub time: &'a str,
    /// `stdout` or `stderr`.
    pub stream: &'a str,
    /// The container's line goes on in the next one.
    pub partial: bool,
    /// What the container wrote, without the line's end.
    pub text: &'a [u8],
}

/// Parses a line without its newline; `None` for what the runtime did not write.
pub(super) fn parse(line: &[u8]) -> Option<LogLine<'_>> {
    let mut parts = line.splitn(4, |byte| *byte == b' ');
    let time = std::str::from_utf8(parts.next()?).ok()?;
    let stream = std::str::from_utf8(parts.next()?).ok()?;
    let tags = parts.next()?;
    let text = parts.next()?;
    if !matches!(stream, "stdout" | "stderr") || time.is_empty() {
        return None;
    }
    let partial = match tags.split(|byte| *byte == b':').next()? {
        b"P" => true,
        b"F" => false,
        _ => return None,
    };
    Some(LogLine { time, stream, partial, text })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lines_of_the_runtime_are_parsed() {
        let line = parse(b"2026-01-02T03:04:05.000000001Z stdout F hello  world").unwrap();
        assert_eq!(line.text, b"hello  world");
        assert!(!line.partial);
        assert!(parse(b"2026-01-02T03:04:05Z stderr P ").unwrap().partial);
        assert_eq!(parse(b"hello world"), None);
        assert_eq!(parse(b"2026-01-02T03:04:05Z stdin F x"), None);
    }

    proptest! {
        #[test]
        fn parsing_never_panics(line in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&line);
        }
    }
}
