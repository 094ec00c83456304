//! The file of a container's log: whole records, or nothing of them.
//!
//! Owned by the writer task of `logs`. A disk that fills up takes the beginning of what is written and refuses the rest; a
//! runtime that is killed leaves as little. Who reads the log would take the next record for the rest of the one before.
//! Invariants: records are added to the end of a whole record alone; a line of the container whose rest was lost is ended
//! before the next one begins; a loss is told once when it begins, and how much it was once the log is written again.

use crate::error::Result;
use crate::logs::{LINE_BYTES, LogPlace, Source, now};
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;

/// Longer than any record: time, stream, tag, message.
const RECORD_BYTES: usize = LINE_BYTES + 256;

/// Of which streams the last record is a piece of a line that goes on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Unended {
    /// Output.
    pub stdout: bool,
    /// Error output.
    pub stderr: bool,
}

impl Unended {
    /// Of one stream.
    pub fn of(&mut self, source: Source) -> &mut bool {
        match source {
            Source::Stdout => &mut self.stdout,
            Source::Stderr => &mut self.stderr,
        }
    }

    /// After these records, too.
    fn after(mut self, records: &[u8]) -> Self {
        for record in records.split(|byte| *byte == b'\n') {
            let mut fields = record.split(|byte| *byte == b' ').skip(1);
            let source = match fields.next() {
                Some(b"stdout") => Source::Stdout,
                Some(b"stderr") => Source::Stderr,
                _ => continue,
            };
            *self.of(source) = fields.next() == Some(b"P");
        }
        self
    }
}

/// An open log.
#[derive(Debug)]
pub struct LogFile {
    place: LogPlace,
    file: File,
    /// Where the last whole record ends, when the file goes on after it.
    torn: Option<u64>,
    /// What is in the file.
    unended: Unended,
    /// Bytes of records that were not written since the last that was.
    lost: u64,
}

impl LogFile {
    /// Opens a log; half a record, which a kill or a power cut left, is taken off its end. It has not been acknowledged.
    pub fn open(place: LogPlace) -> Result<Self> {
        let file = place.roots.log(&place.path)?;
        let mut log = Self { place, file, torn: None, unended: Unended::default(), lost: 0 };
        match log.half_a_record() {
            Ok(torn) => log.torn = torn,
            Err(error) => {
                tracing::warn!(path = %log.place.path.display(), %error, "cannot look at the end of a log")
            }
        }
        Ok(log)
    }

    /// Opens it again: it has been rotated away.
    pub fn reopen(&mut self) -> Result<()> {
        let new = Self::open(self.place.clone())?;
        (self.file, self.torn) = (new.file, new.torn);
        Ok(())
    }

    /// Where the last whole record ends, if that is not the end.
    fn half_a_record(&self) -> io::Result<Option<u64>> {
        let length = self.file.metadata()?.len();
        let start = length.saturating_sub(RECORD_BYTES as u64);
        let mut end = vec![0; (length - start) as usize];
        self.file.read_exact_at(&mut end, start)?;
        if end.last().is_none_or(|last| *last == b'\n') {
            return Ok(None);
        }
        Ok(Some(end.iter().rposition(|byte| *byte == b'\n').map_or(start, |at| start + at as u64 + 1)))
    }

    /// Adds records; `unended` is what they leave. A full disk loses them rather than blocking the container for ever.
    pub fn append(&mut self, records: &[u8], unended: Unended) {
        if records.is_empty() {
            return;
        }
        match self.try_append(records) {
            Ok(()) => {
                self.unended = unended;
                if self.lost > 0 {
                    let (path, lost) = (self.place.path.display(), self.lost);
                    tracing::warn!(%path, lost, "a container's log is written again, without what was lost");
                    self.lost = 0;
                }
            }
            Err((error, written)) => {
                if self.lost == 0 {
                    let path = self.place.path.display();
                    tracing::error!(%path, %error, "cannot write a container's log: output is lost until there is room");
                }
                self.unended = self.unended.after(&records[..written]);
                self.lost += (records.len() - written) as u64;
            }
        }
    }

    /// When it fails, with how many bytes of whole records are in the file.
    fn try_append(&mut self, records: &[u8]) -> std::result::Result<(), (io::Error, usize)> {
        let nothing = |error| (error, 0);
        if let Some(length) = self.torn {
            self.file.set_len(length).map_err(nothing)?;
            self.torn = None;
        }
        if self.lost > 0 {
            // The rest of these lines is among what was lost.
            let ends = self.ends();
            self.write(&ends).map_err(|(error, _)| (error, 0))?;
            self.unended = Unended::default();
        }
        self.write(records)
    }

    fn ends(&mut self) -> Vec<u8> {
        let mut ends = Vec::new();
        for source in [Source::Stdout, Source::Stderr] {
            if *self.unended.of(source) {
                ends.extend_from_slice(format!("{} {} F \n", now(), source.name()).as_bytes());
            }
        }
        ends
    }

    fn write(&mut self, records: &[u8]) -> std::result::Result<(), (io::Error, usize)> {
        // Nobody else writes to it.
        let start = self.file.metadata().map_err(|error| (error, 0))?.len();
        let Err(error) = self.file.write_all(records) else { return Ok(()) };
        let end = self.file.metadata().map_or(start, |metadata| metadata.len());
        let taken = usize::try_from(end.saturating_sub(start)).unwrap_or(0).min(records.len());
        let whole = records[..taken].iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let length = start + whole as u64;
        // Takes no room; where it fails all the same, it is done before anything else is written.
        if taken != whole && self.file.set_len(length).is_err() {
            self.torn = Some(length);
        }
        Err((error, whole))
    }
}
