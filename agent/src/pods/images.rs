//! Brings a container's image to the node: pull policy, pull secrets, back-off.
//!
//! Called by `start`. Invariant: at most [`PARALLEL`] pulls at a time; one image of one pod is not asked for again
//! before its back-off is over.

use super::backoff::Backoff;
use super::desired::{Container, Desired, Pull};
use super::pull_secrets;
use super::start::StartError;
use crate::cri::Cri;
use crate::events::{Recorder, Severity, pod_reference};
use crate::volumes::objects;
use atoll_cri::v1;
use jiff::Timestamp;
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;

const PARALLEL: usize = 4;

#[derive(Default)]
struct Failures {
    backoff: Backoff,
    last: HashMap<String, String>,
}

/// The image side of the runtime.
pub struct Images {
    cri: Cri,
    client: kube::Client,
    events: Recorder,
    failures: Mutex<Failures>,
    parallel: Semaphore,
}

impl Images {
    /// Pulls through `cri`; secrets come from `client`.
    pub fn new(cri: Cri, client: kube::Client, events: Recorder) -> Self {
        Self { cri, client, events, failures: Mutex::default(), parallel: Semaphore::new(PARALLEL) }
    }

    /// Makes sure the runtime has the image; answers it.
    ///
    /// # Errors
    /// With the reason that people know.
    pub async fn ensure(
        &self,
        desired: &Desired,
        container: &Container,
        sandbox: &v1::PodSandboxConfig,
    ) -> Result<v1::Image, StartError> {
        let event = |severity, reason, message| self.event(desired, container, severity, reason, message);
        let name = pull_secrets::with_tag(&container.image).map_err(|why| {
            let message = format!("Failed to apply default image tag {:?}: {why}", container.image);
            event(Severity::Warning, "InspectFailed", message.clone());
            StartError::later("InvalidImageName", message)
        })?;
        let present = self.cri.image(&name).await.map_err(|error| {
            let message = format!("Failed to inspect image {name:?}: {error}");
            event(Severity::Warning, "InspectFailed", message.clone());
            StartError::later("ImageInspectError", message)
        })?;
        match (present, container.pull) {
            (Some(image), Pull::IfNotPresent | Pull::Never) => {
                let message = format!("Container image {:?} already present on machine", container.image);
                event(Severity::Normal, "Pulled", message);
                Ok(image)
            }
            (None, Pull::Never) => {
                let message =
                    format!("Container image {:?} is not present with pull policy of Never", container.image);
                event(Severity::Warning, "ErrImageNeverPull", message.clone());
                Err(StartError::later("ErrImageNeverPull", message))
            }
            (_, Pull::Always | Pull::IfNotPresent) => self.pull(desired, container, sandbox, &name).await,
        }
    }

    async fn pull(
        &self,
        desired: &Desired,
        container: &Container,
        sandbox: &v1::PodSandboxConfig,
        name: &str,
    ) -> Result<v1::Image, StartError> {
        let event = |severity, reason, message| self.event(desired, container, severity, reason, message);
        let key = format!("{}_{name}", desired.key.uid);
        if let Some((until, last)) = self.backing_off(&key) {
            let message = format!("Back-off pulling image {:?}", container.image);
            event(Severity::Normal, "BackOff", message.clone());
            event(Severity::Warning, "Failed", "Error: ImagePullBackOff".to_owned());
            let message = format!("{message}: ErrImagePull: {last}");
            return Err(StartError { reason: "ImagePullBackOff", message, again: until });
        }
        event(Severity::Normal, "Pulling", format!("Pulling image {:?}", container.image));
        let asked = Instant::now();
        match self.pull_now(desired, sandbox, name).await {
            Ok((image, pulling)) => {
                let mut failures = self.failures();
                failures.backoff.forget(&key);
                failures.last.remove(&key);
                drop(failures);
                let message = format!(
                    "Successfully pulled image {:?} in {} ({} including waiting). Image size: {} bytes.",
                    container.image,
                    seconds(pulling),
                    seconds(asked.elapsed()),
                    image.size
                );
                event(Severity::Normal, "Pulled", message);
                Ok(image)
            }
            Err(why) => {
                let mut failures = self.failures();
                let now = Timestamp::now();
                failures.backoff.tidy(now);
                let Failures { backoff, last } = &mut *failures;
                last.retain(|key, _| backoff.delay_seconds(key) > 0);
                backoff.tried(&key, now, now);
                last.insert(key, why.clone());
                drop(failures);
                // The cause alone may name a layer, by a digest that says nothing to people.
                let message = format!("Failed to pull image {:?}: {why}", container.image);
                event(Severity::Warning, "Failed", message.clone());
                event(Severity::Warning, "Failed", "Error: ErrImagePull".to_owned());
                // Soon asked again, to say that the next try has to wait.
                let again = now + Duration::from_secs(2);
                Err(StartError { reason: "ErrImagePull", message, again })
            }
        }
    }

    async fn pull_now(
        &self,
        desired: &Desired,
        sandbox: &v1::PodSandboxConfig,
        name: &str,
    ) -> Result<(v1::Image, Duration), String> {
        let mut keyring = Vec::new();
        for reference in desired.spec().image_pull_secrets.iter().flatten() {
            // A pull secret that is missing is no error of its own: the image may be public.
            match objects::secret(&self.client, &desired.key.namespace, &reference.name).await {
                Ok(Some(secret)) => keyring.extend(pull_secrets::credentials(&secret, name)),
                Ok(None) => {}
                Err(error) => {
                    tracing::warn!(pod = %desired.key, secret = reference.name, error, "pull secret")
                }
            }
        }
        // A closed semaphore cannot be: nothing closes it.
        let _turn = self.parallel.acquire().await;
        let started = Instant::now();
        let tries = if keyring.is_empty() { vec![None] } else { keyring.into_iter().map(Some).collect() };
        let mut last = String::new();
        for auth in tries {
            match self.cri.pull(name, auth, sandbox.clone()).await {
                Ok(reference) => {
                    let image = self.pulled(&reference, name).await?;
                    return Ok((image, started.elapsed()));
                }
                Err(error) => last = error.status.message().to_owned(),
            }
        }
        Err(last)
    }

    /// What was pulled, by the runtime's own reference or by its name.
    async fn pulled(&self, reference: &str, name: &str) -> Result<v1::Image, String> {
        for by in [reference, name] {
            if let Some(image) = self.cri.image(by).await.map_err(|e| e.to_string())? {
                return Ok(image);
            }
        }
        Err(format!("image {name} was removed while it was pulled"))
    }

    fn backing_off(&self, key: &str) -> Option<(Timestamp, String)> {
        let failures = self.failures();
        let until = failures.backoff.until_after_try(key, Timestamp::now())?;
        Some((until, failures.last.get(key).cloned().unwrap_or_default()))
    }

    fn failures(&self) -> MutexGuard<'_, Failures> {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn event(
        &self,
        desired: &Desired,
        container: &Container,
        severity: Severity,
        reason: &'static str,
        message: String,
    ) {
        self.events.record(pod_reference(&desired.pod, Some(container.field())), severity, reason, message);
    }
}

fn seconds(duration: Duration) -> String {
    if duration.as_secs() == 0 {
        format!("{}ms", duration.as_millis())
    } else {
        format!("{:.3}s", duration.as_secs_f64())
    }
}
