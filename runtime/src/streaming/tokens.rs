//! One-time tokens. ◇ Pure: the clock is an argument.
//!
//! Invariants: a token is redeemed at most once, and not after [`LIFETIME`]; at most [`MOST`] are outstanding.

use super::Job;
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// How long a token is good for.
const LIFETIME: Duration = Duration::from_secs(60);
/// Most outstanding tokens.
const MOST: usize = 1000;

/// Outstanding tokens.
#[derive(Debug, Default)]
pub struct Tokens {
    jobs: HashMap<String, (Job, Instant)>,
}

impl Tokens {
    /// Keeps a job for `token`.
    pub fn put(&mut self, token: String, job: Job, now: Instant) -> Result<(), String> {
        self.jobs.retain(|_, (_, made)| now.duration_since(*made) < LIFETIME);
        if self.jobs.len() >= MOST {
            return Err(format!("{MOST} streaming requests are waiting to be opened: try again in a minute"));
        }
        self.jobs.insert(token, (job, now));
        Ok(())
    }

    /// The job of `token`, once.
    pub fn take(&mut self, token: &str, now: Instant) -> Option<Job> {
        let (job, made) = self.jobs.remove(token)?;
        (now.duration_since(made) < LIFETIME).then_some(job)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_works_once_and_not_for_ever() {
        let job = Job::PortForward { sandbox: "s".into(), ports: vec![] };
        let start = Instant::now();
        let mut tokens = Tokens::default();
        tokens.put("a".into(), job.clone(), start).unwrap();
        assert_eq!(tokens.take("b", start), None);
        assert_eq!(tokens.take("a", start), Some(job.clone()));
        assert_eq!(tokens.take("a", start), None);
        tokens.put("c".into(), job.clone(), start).unwrap();
        assert_eq!(tokens.take("c", start + LIFETIME), None);
        for n in 0..MOST {
            tokens.put(n.to_string(), job.clone(), start).unwrap();
        }
        assert!(tokens.put("x".into(), job.clone(), start).is_err());
        assert!(tokens.put("x".into(), job, start + LIFETIME).is_ok());
    }
}
