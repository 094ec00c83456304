//! The stable half of fuzzing: a test replays what was found before, then tries mutations of it for a moment.
//!
//! ```text
//! crate/src/…/fuzz.rs: one body per target ──► replay(…) in `cargo test`, for a second
//!                                          └─► fuzz/targets/src/<target>.rs for `cargo fuzz` (nightly), for hours
//! ```
//!
//! Called by the unit tests of the crates that read what strangers send. Invariant: the inputs tried are the same at
//! each run (as many of them as the time allows), so a failure can be seen again.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long mutations are tried; `ATOLL_FUZZ_SECONDS` says otherwise.
const SECONDS: f64 = 1.0;
/// Longest time for one input.
const SLOW: Duration = Duration::from_secs(10);
/// Longest input that mutations make.
const MAX_INPUT: usize = 64 << 10;

/// The committed inputs of a target.
fn corpus(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target)
}

/// Runs `body` on every committed input and every seed, then on mutations of them. `seeds` come from the code that writes
/// the format; with `ATOLL_FUZZ_WRITE` set they are written into the corpus, where `cargo fuzz` finds them.
///
/// # Panics
/// When the body does, or takes too long; the message names a file with the input.
pub fn replay(target: &str, seeds: Vec<Vec<u8>>, body: impl Fn(&[u8])) {
    let directory = corpus(target);
    if std::env::var_os("ATOLL_FUZZ_WRITE").is_some() {
        write(&directory, &seeds);
    }
    let inputs = read(&directory);
    assert!(
        !inputs.is_empty(),
        "{} has no input: run this test with ATOLL_FUZZ_WRITE=1",
        directory.display()
    );
    let inputs: Vec<Vec<u8>> = inputs.into_iter().chain(seeds).collect();
    for input in &inputs {
        check(target, input, &body);
    }
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<f64>().ok());
    let seconds = number("ATOLL_FUZZ_SECONDS").unwrap_or(SECONDS);
    let mut chance = Chance(number("ATOLL_FUZZ_SEED").unwrap_or(1.0).to_bits());
    let until = Instant::now() + Duration::from_secs_f64(seconds);
    let mut tried = 0u64;
    while Instant::now() < until {
        check(target, &mutate(&inputs, &mut chance), &body);
        tried += 1;
    }
    println!("{target}: {} inputs and {tried} mutations", inputs.len());
}

fn read(directory: &Path) -> Vec<Vec<u8>> {
    let Ok(entries) = std::fs::read_dir(directory) else { return Vec::new() };
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    paths.iter().map(|path| std::fs::read(path).expect("a committed input can be read")).collect()
}

fn write(directory: &Path, seeds: &[Vec<u8>]) {
    std::fs::create_dir_all(directory).expect("the corpus can be written");
    for (number, seed) in seeds.iter().enumerate() {
        std::fs::write(directory.join(format!("seed-{number:02}")), seed).expect("the corpus can be written");
    }
}

fn check(target: &str, input: &[u8], body: &impl Fn(&[u8])) {
    let started = Instant::now();
    let outcome = catch_unwind(AssertUnwindSafe(|| body(input)));
    let slow = started.elapsed() > SLOW;
    if outcome.is_ok() && !slow {
        return;
    }
    let path = std::env::temp_dir().join(format!("atoll-fuzz-{target}-{:016x}", fingerprint(input)));
    // Without the file there is still the message of the panic itself.
    let _ = std::fs::write(&path, input);
    let what = if slow { format!("took {:?} on", started.elapsed()) } else { "failed on".to_owned() };
    panic!(
        "target {target} {what} the input in {}: mend it, then keep the file in {}",
        path.display(),
        corpus(target).display()
    );
}

/// FNV-1a: for a file name.
fn fingerprint(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

/// Numbers that look random and are the same each time (splitmix64).
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Below `end`, which is not zero.
    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    /// A range of at most `most` bytes in something of the given length.
    fn range(&mut self, length: usize, most: usize) -> std::ops::Range<usize> {
        let start = self.below(length + 1);
        let end = (start + 1 + self.below(most)).min(length);
        start..end.max(start)
    }
}

/// Numbers at which things break.
const ODD: [u64; 14] = [
    0,
    1,
    0x7f,
    0x80,
    0xff,
    0x7fff,
    0x8000,
    0xffff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x7fff_ffff_ffff_ffff,
    0x8000_0000_0000_0000,
    u64::MAX,
];

fn mutate(inputs: &[Vec<u8>], chance: &mut Chance) -> Vec<u8> {
    let mut input = inputs[chance.below(inputs.len())].clone();
    for _ in 0..=chance.below(6) {
        change(&mut input, inputs, chance);
    }
    input.truncate(MAX_INPUT);
    input
}

/// One mutation.
fn change(input: &mut Vec<u8>, inputs: &[Vec<u8>], chance: &mut Chance) {
    let length = input.len();
    match chance.below(9) {
        0 if length > 0 => input[chance.below(length)] ^= 1 << chance.below(8),
        1 if length > 0 => input[chance.below(length)] = chance.next() as u8,
        2 => drop(input.drain(chance.range(length, 64))),
        3 => {
            let piece = input[chance.range(length, 64)].to_vec();
            let at = chance.below(length + 1);
            input.splice(at..at, piece);
        }
        4 => {
            let piece: Vec<u8> = (0..=chance.below(16)).map(|_| chance.next() as u8).collect();
            let at = chance.below(length + 1);
            input.splice(at..at, piece);
        }
        5 => {
            let bytes = ODD[chance.below(ODD.len())];
            let width = [1, 2, 4, 8][chance.below(4)];
            let bytes = if chance.below(2) == 0 {
                bytes.to_le_bytes()
            } else {
                bytes.rotate_right(8 * width as u32).to_be_bytes()
            };
            overwrite(input, chance.below(length + 1), &bytes[..width]);
        }
        6 => {
            // The rest of another input.
            let other = &inputs[chance.below(inputs.len())];
            input.truncate(chance.below(length + 1));
            input.extend_from_slice(&other[chance.below(other.len() + 1)..]);
        }
        7 => {
            let other = &inputs[chance.below(inputs.len())];
            let piece = other[chance.range(other.len(), 256)].to_vec();
            overwrite(input, chance.below(length + 1), &piece);
        }
        _ => input.truncate(chance.below(length + 1)),
    }
}

fn overwrite(input: &mut [u8], at: usize, bytes: &[u8]) {
    let end = (at + bytes.len()).min(input.len());
    input[at..end].copy_from_slice(&bytes[..end - at]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn names(directory: &Path, suffix: &str) -> BTreeSet<String> {
        let entries = std::fs::read_dir(directory).unwrap();
        entries
            .filter_map(|e| Some(e.unwrap().file_name().to_str()?.strip_suffix(suffix)?.to_owned()))
            .collect()
    }

    #[test]
    fn every_target_has_a_corpus_and_is_built() {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let targets = names(&here.join("targets/src"), ".rs");
        assert_eq!(names(&here.join("corpus"), ""), targets);
        let manifest = std::fs::read_to_string(here.join("targets/Cargo.toml")).unwrap();
        for target in &targets {
            assert!(
                manifest.contains(&format!("path = \"src/{target}.rs\"")),
                "{target} is not in Cargo.toml"
            );
        }
    }

    #[test]
    fn corpora_stay_small() {
        for target in names(&corpus(""), "") {
            let files = read(&corpus(&target));
            let bytes: usize = files.iter().map(Vec::len).sum();
            assert!(files.len() <= 200 && bytes <= 1 << 20, "{target}: {} files, {bytes} bytes", files.len());
        }
    }

    #[test]
    fn mutations_are_the_same_at_each_run_and_find_what_is_near() {
        let inputs = [b"length 7, seven!".to_vec()];
        let run = || {
            let mut chance = Chance(3);
            (0..2000).map(|_| mutate(&inputs, &mut chance)).collect::<Vec<_>>()
        };
        assert_eq!(run(), run());
        assert!(
            run().iter().any(|input| input.contains(&0xff)) && run().iter().any(|input| input.len() > 20)
        );
    }

    #[test]
    fn a_failing_body_is_told_with_its_input() {
        let outcome = catch_unwind(|| check("test", b"boom", &|_: &[u8]| panic!("no")));
        let message = *outcome.unwrap_err().downcast::<String>().unwrap();
        let path =
            message.split(' ').find(|word| word.contains("atoll-fuzz-test")).unwrap().trim_end_matches(':');
        assert_eq!(std::fs::read(path).unwrap(), b"boom");
        std::fs::remove_file(path).unwrap();
    }
}
