//! Whether a pod is to run or to end, and why ◇.

use super::actual::Actual;
use super::desired::Desired;
use super::plan::{self, Verdict};
use super::refuse::Refusal;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::PodStatus;
use std::time::Duration;

/// A pod's fate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// To run.
    Run,
    /// To end.
    End {
        /// Time its containers get.
        grace: Duration,
        /// Nothing of it is kept.
        remove: bool,
        /// Reason and message, when the node ends it.
        failed: Option<(&'static str, String)>,
    },
}

impl Fate {
    /// Reason and message, when the node ends the pod.
    pub fn failed(&self) -> Option<(&'static str, &str)> {
        match self {
            Self::End { failed: Some((reason, message)), .. } => Some((reason, message)),
            _ => None,
        }
    }
}

/// Time that the containers of an evicted pod get, as from other node agents.
const EVICTION_GRACE: Duration = Duration::from_secs(1);

/// Decides. `removed`: the API server does not have the pod any more. `evicted`: why it must not stay.
pub fn decide(
    desired: &Desired,
    actual: &Actual,
    removed: bool,
    refusal: Option<Refusal>,
    evicted: Option<&str>,
    status: &PodStatus,
    now: Timestamp,
) -> Fate {
    if removed || desired.deleted.is_some() {
        return Fate::End { grace: desired.deleted.unwrap_or(desired.grace), remove: true, failed: None };
    }
    let end = |failed| Fate::End { grace: desired.grace, remove: false, failed };
    if desired.terminal_phase().is_some() {
        return end(None);
    }
    if let Some(refusal) = refusal {
        return end(Some((refusal.reason, refusal.message)));
    }
    if let Some(message) = evicted {
        let failed = Some(("Evicted", message.to_owned()));
        return Fate::End { grace: desired.grace.min(EVICTION_GRACE), remove: false, failed };
    }
    let started = status.start_time.as_ref().map(|t| t.0);
    if let (Some(limit), Some(started)) = (desired.active_deadline, started)
        && now >= started + limit
    {
        let message = "Pod was active on the node longer than the specified deadline".to_owned();
        return end(Some(("DeadlineExceeded", message)));
    }
    match plan::verdict(desired, actual) {
        Verdict::Over => end(None),
        Verdict::Active => Fate::Run,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::actual::State;
    use crate::pods::testing::{actual, pod_with, ran};

    fn fate(metadata: &str, spec: &str, status: &str, seen: &Actual) -> Fate {
        let metadata = format!("{{namespace: ns, name: p, uid: u, {metadata}}}");
        let desired = pod_with(&metadata, spec, status);
        let status = desired.pod.status.clone().unwrap_or_default();
        decide(&desired, seen, false, None, None, &status, Timestamp::from_second(1_000).unwrap())
    }

    #[test]
    fn an_evicted_pod_ends_at_once_and_failed_unless_it_goes_anyway() {
        let seen = actual(vec![ran("a", 0, State::Running, 0)]);
        let decide = |metadata: &str| {
            let desired = pod_with(metadata, "{containers: [{name: a, image: i}]}", "{}");
            let now = Timestamp::from_second(1_000).unwrap();
            decide(&desired, &seen, false, None, Some("too much"), &PodStatus::default(), now)
        };
        let fate = decide("{namespace: ns, name: p, uid: u}");
        assert_eq!(fate.failed(), Some(("Evicted", "too much")));
        assert!(matches!(fate, Fate::End { grace: EVICTION_GRACE, remove: false, .. }));
        let deleted = "{namespace: ns, name: p, uid: u, deletionTimestamp: '1970-01-01T00:16:00Z'}";
        assert_eq!(decide(deleted).failed(), None);
    }

    #[test]
    fn longest_grace_is_a_time() {
        let metadata = "{namespace: ns, name: p, uid: u, deletionTimestamp: '1970-01-01T00:16:00Z',
            deletionGracePeriodSeconds: 9223372036854775807}";
        let spec = "{terminationGracePeriodSeconds: 9223372036854775807,
            activeDeadlineSeconds: 9223372036854775807, containers: [{name: a, image: i}]}";
        let seen = actual(vec![ran("a", 0, State::Running, 0)]);
        let now = Timestamp::now();
        let status = "{startTime: '2026-01-01T00:00:00Z'}";
        for metadata in [metadata, "{namespace: ns, name: p, uid: u}"] {
            let desired = pod_with(metadata, spec, status);
            let status = desired.pod.status.clone().unwrap();
            let stop = match decide(&desired, &seen, false, None, None, &status, now) {
                Fate::End { grace, .. } => now + grace,
                Fate::Run => now + desired.grace,
            };
            let stop = plan::Stop { why: String::new(), deadline: stop, remove: true };
            let plan = plan::stop(&desired, &seen, &plan::Memory::default(), &stop, now);
            assert!(
                matches!(&plan.actions[..], [plan::Action::Kill { grace, .. }] if now + *grace == stop.deadline)
            );
        }
    }

    #[test]
    fn fates() {
        let spec = "{restartPolicy: Never, activeDeadlineSeconds: 100, containers: [{name: a, image: i}]}";
        let started = |second: &str| format!("{{startTime: '1970-01-01T00:{second}Z'}}");
        let running = actual(vec![ran("a", 0, State::Running, 0)]);
        assert_eq!(fate("", spec, &started("15:30"), &running), Fate::Run);
        let late = fate("", spec, &started("15:00"), &running);
        assert_eq!(late.failed().unwrap().0, "DeadlineExceeded");
        let done = actual(vec![ran("a", 0, State::Exited, 0)]);
        let over = Fate::End { grace: Duration::from_secs(30), remove: false, failed: None };
        assert_eq!(fate("", spec, &started("15:30"), &done), over);
        // What the API server has as finished is never run again.
        assert_eq!(fate("", spec, "{phase: Succeeded}", &Actual::default()), over);
        let deleted = "deletionTimestamp: '1970-01-01T00:16:00Z', deletionGracePeriodSeconds: 3";
        let gone = Fate::End { grace: Duration::from_secs(3), remove: true, failed: None };
        assert_eq!(fate(deleted, spec, &started("15:30"), &running), gone);
    }
}
