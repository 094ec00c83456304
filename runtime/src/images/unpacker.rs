//! The unpack helper: `<runtime> unpack-layer …`, one process for each layer, in a cage.
//!
//! ```text
//! compressed blob (stdin) ─► decompress ─► scan ─► mkfs.erofs ─► work/layer.erofs
//!                                      └─► hash ─► compared with the diff_id at the end
//! ```
//!
//! It speaks to its parent by its exit status and its standard error, whose last line is the reason for a failure.

use super::digest::Digest;
use super::jail;
use super::tarscan::{Limits, Scanner};
use sha2::{Digest as _, Sha256};
use std::io::{BufRead as _, BufReader, Read, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};

/// First argument that makes the runtime a helper.
pub const ROLE: &str = "unpack-layer";
/// The file it makes in the working directory.
pub const OUTPUT: &str = "layer.erofs";

const CHUNK: usize = 128 * 1024;
/// zstd frames may ask for a window of this many bits.
const MAX_WINDOW: u32 = 27;

/// What the helper is told.
#[derive(Debug, PartialEq, Eq)]
pub struct Job {
    /// The program.
    pub mkfs_erofs: PathBuf,
    /// Directory for everything it writes.
    pub work: PathBuf,
    /// What the tar must hash to.
    pub diff_id: Digest,
    /// Who to become.
    pub uid: Option<u32>,
    /// Bytes that the work may take of the disk.
    pub room: u64,
    /// More places that the program is made of.
    pub programs: Vec<PathBuf>,
}

impl Job {
    /// As arguments, the role first.
    pub fn arguments(&self) -> Vec<std::ffi::OsString> {
        let mut arguments: Vec<std::ffi::OsString> = vec![
            ROLE.into(),
            self.mkfs_erofs.clone().into(),
            self.work.clone().into(),
            self.diff_id.as_str().into(),
            self.uid.map_or_else(|| "-".to_owned(), |uid| uid.to_string()).into(),
            self.room.to_string().into(),
        ];
        arguments.extend(self.programs.iter().map(|path| path.clone().into()));
        arguments
    }

    /// From the arguments after the role.
    fn parse(arguments: &[String]) -> Option<Self> {
        let [mkfs_erofs, work, diff_id, uid, room, programs @ ..] = arguments else { return None };
        let uid = match uid.as_str() {
            "-" => None,
            number => Some(number.parse().ok()?),
        };
        Some(Self {
            mkfs_erofs: mkfs_erofs.into(),
            work: work.into(),
            diff_id: diff_id.parse().ok()?,
            uid,
            room: room.parse().ok()?,
            programs: programs.iter().map(PathBuf::from).collect(),
        })
    }
}

/// Entry of the helper; `arguments` are those after [`ROLE`]. Call it first thing in `main`, before any thread.
pub fn main(arguments: &[String]) -> ExitCode {
    let Some(job) = Job::parse(arguments) else {
        eprintln!(
            "usage: {ROLE} MKFS WORK DIFF_ID UID|- ROOM [PROGRAM-PATH…]: called by the runtime, not by people"
        );
        return ExitCode::from(2);
    };
    match run(&job) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}

fn run(job: &Job) -> Result<(), String> {
    // mkfs.erofs keeps the content of files in a temporary one beside its output.
    let limits = Limits { room: job.room / 2, ..Limits::default() };
    let openings = jail::Openings { work: &job.work, programs: &job.programs, uid: job.uid };
    jail::close(&openings)?;
    let mut child = start_mkfs(job)?;
    let outcome = feed(job, limits, &mut child);
    if outcome.is_err() {
        // Seen: mkfs.erofs 1.8 never comes to an end when its input stops in the middle of a file.
        child.kill().map_err(|error| format!("cannot end mkfs.erofs: {error}"))?;
    }
    // Its input is closed by now, so it comes to an end.
    let status = child.wait().map_err(|error| format!("cannot wait for mkfs.erofs: {error}"))?;
    outcome?;
    if !status.success() {
        return Err(format!("mkfs.erofs failed ({status})"));
    }
    let file = std::fs::File::open(job.work.join(OUTPUT))
        .map_err(|error| format!("cannot open the layer: {error}"))?;
    file.sync_all().map_err(|error| format!("cannot write the layer to disk: {error}"))
}

fn start_mkfs(job: &Job) -> Result<Child, String> {
    // Same input, same file: no random UUID, and no time but those in the archive.
    jail::tie(&mut Command::new(&job.mkfs_erofs))
        .args(["--tar=f", "--aufs", "--quiet", "-T0", "--mkfs-time", "-Uclear"])
        .arg(job.work.join(OUTPUT))
        .env_clear()
        .env("TMPDIR", &job.work)
        .env("PATH", "/usr/bin:/bin")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .map_err(|error| format!("cannot run {}: {error}", job.mkfs_erofs.display()))
}

/// Decompressed bytes go through the scanner into mkfs.erofs, and all of them into the hash.
fn feed(job: &Job, limits: Limits, child: &mut Child) -> Result<(), String> {
    let mut input = child.stdin.take().ok_or("mkfs.erofs has no input")?;
    let mut archive = decompress(std::io::stdin())?;
    let (mut scanner, mut hasher) = (Scanner::new(limits), Sha256::new());
    let mut buffer = vec![0; CHUNK];
    let broken = |error: std::io::Error| format!("mkfs.erofs stopped reading: {error}");
    loop {
        let count = archive.read(&mut buffer).map_err(|error| format!("cannot decompress: {error}"))?;
        if count == 0 {
            break;
        }
        hasher.update(&buffer[..count]);
        scanner.feed(&buffer[..count], |bytes| input.write_all(bytes).map_err(broken))?;
    }
    let actual = Digest::finish(hasher);
    if actual != job.diff_id {
        return Err(format!("its content hashes to {actual}, not to what the image config says"));
    }
    input.write_all(scanner.finish()?).map_err(broken)
}

/// By the first bytes: registries do not always tell the truth about types.
pub(super) fn decompress(input: impl Read + 'static) -> Result<Box<dyn Read>, String> {
    let mut input = BufReader::with_capacity(CHUNK, input);
    let head = input.fill_buf().map_err(|error| format!("cannot read the blob: {error}"))?;
    if head.starts_with(&[0x1f, 0x8b]) {
        Ok(Box::new(flate2::bufread::MultiGzDecoder::new(input)))
    } else if head.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        let mut decoder =
            zstd::Decoder::with_buffer(input).map_err(|error| format!("cannot decompress: {error}"))?;
        decoder.window_log_max(MAX_WINDOW).map_err(|error| format!("cannot decompress: {error}"))?;
        Ok(Box::new(decoder))
    } else {
        Ok(Box::new(input))
    }
}

/// Where mkfs.erofs and its libraries are on a Debian system.
pub fn program_paths(mkfs_erofs: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> =
        ["/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache"].map(PathBuf::from).to_vec();
    paths.extend(mkfs_erofs.parent().map(Path::to_path_buf));
    paths
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_survives_the_command_line() {
        let job = Job {
            mkfs_erofs: "/usr/bin/mkfs.erofs".into(),
            work: "/data/images/tmp/x".into(),
            diff_id: Digest::of(b""),
            uid: Some(65534),
            room: 1 << 30,
            programs: vec!["/usr".into()],
        };
        let arguments: Vec<String> =
            job.arguments().into_iter().skip(1).map(|text| text.into_string().unwrap()).collect();
        assert_eq!(Job::parse(&arguments), Some(job));
        assert_eq!(Job::parse(&[]), None);
    }

    #[test]
    fn compression_is_seen_in_the_bytes() {
        use flate2::Compression;
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), Compression::fast());
        gzip.write_all(b"content").unwrap();
        let zstd = zstd::encode_all(&b"content"[..], 1).unwrap();
        for blob in [gzip.finish().unwrap(), zstd, b"content".to_vec()] {
            let mut text = Vec::new();
            decompress(std::io::Cursor::new(blob)).unwrap().read_to_end(&mut text).unwrap();
            assert_eq!(text, b"content");
        }
    }
}
