//! Brings a container's image to the node: pull policy, pull secrets, back-off.
//!
//! Called by `start`. Invariants: at most [`PARALLEL`] pulls at a time; one image of one pod is not asked for again
//! before its back-off is over; an image that was pulled with credentials is used by a pod that has them too, or after the
//! registry has been asked with what the pod has. As the upstream kubelet does by default, images that were put on the
//! node by hand are for everyone.

use super::backoff::Backoff;
use super::desired::{Container, Desired, Pull};
use super::pull_secrets;
use super::start::StartError;
use crate::cri::Cri;
use crate::events::{Recorder, Severity, pod_reference};
use crate::volumes::objects;
use atoll_cri::v1;
use atoll_spec::images::{Access, PullSecret};
use jiff::Timestamp;
use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;

const PARALLEL: usize = 4;
/// Most uses of images that are remembered; those that are forgotten are looked at again.
const MOST_ADMITTED: usize = 4096;

/// Credentials of a pod for one image, with the secret that each is from.
type Keyring = Vec<(PullSecret, v1::AuthConfig)>;

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
    /// Uid of a pod, name and id of an image that it may use: a container is started again while its secrets cannot be
    /// read, as when the Supervisor is away.
    admitted: Mutex<HashSet<(String, String, String)>>,
    parallel: Semaphore,
}

impl Images {
    /// Pulls through `cri`; secrets come from `client`.
    pub fn new(cri: Cri, client: kube::Client, events: Recorder) -> Self {
        Self {
            cri,
            client,
            events,
            failures: Mutex::default(),
            admitted: Mutex::default(),
            parallel: Semaphore::new(PARALLEL),
        }
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
        let present = self.cri.image_and_access(&name).await.map_err(|error| {
            let message = format!("Failed to inspect image {name:?}: {error}");
            event(Severity::Warning, "InspectFailed", message.clone());
            StartError::later("ImageInspectError", message)
        })?;
        match (present, container.pull) {
            (Some((image, access)), Pull::IfNotPresent | Pull::Never) => {
                if self.admits(desired, &name, &image, access).await {
                    let message = format!("Container image {:?} already present on machine", container.image);
                    event(Severity::Normal, "Pulled", message);
                    return Ok(image);
                }
                if container.pull == Pull::IfNotPresent {
                    return self.pull(desired, container, sandbox, &name).await;
                }
                let message = format!(
                    "Container image {:?} is present with pull policy of Never but does not have the proper \
                     credentials to access the image",
                    container.image
                );
                event(Severity::Warning, "ErrImageNeverPull", message.clone());
                Err(StartError::later("ErrImageNeverPull", message))
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

    /// Whether a pod may use an image that is here without asking the registry.
    async fn admits(&self, desired: &Desired, name: &str, image: &v1::Image, access: Option<Access>) -> bool {
        let Some(access) = access.filter(|access| !access.everyone) else { return true };
        if self.admitted().contains(&use_of(desired, name, image)) {
            return true;
        }
        let (secrets, _): (Vec<_>, Vec<_>) = self.keyring(desired, name).await.into_iter().unzip();
        let admitted = access.admits(&secrets);
        if admitted {
            self.admit(desired, name, image);
        }
        admitted
    }

    fn admit(&self, desired: &Desired, name: &str, image: &v1::Image) {
        let mut admitted = self.admitted();
        if admitted.len() >= MOST_ADMITTED {
            admitted.clear();
        }
        admitted.insert(use_of(desired, name, image));
    }

    fn admitted(&self) -> MutexGuard<'_, HashSet<(String, String, String)>> {
        self.admitted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn keyring(&self, desired: &Desired, name: &str) -> Keyring {
        let mut keyring = Keyring::new();
        for reference in desired.spec().image_pull_secrets.iter().flatten() {
            // A pull secret that is missing is no error of its own: the image may be public.
            match objects::secret(&self.client, &desired.key.namespace, &reference.name).await {
                Ok(Some(secret)) => {
                    let found = pull_secrets::credentials(&secret, name).into_iter();
                    keyring.extend(found.map(|auth| (pull_secrets::trace(&secret, &auth), auth)));
                }
                Ok(None) => {}
                Err(error) => {
                    tracing::warn!(pod = %desired.key, secret = reference.name, error, "pull secret")
                }
            }
        }
        keyring
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
                self.admit(desired, name, &image);
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
        let keyring = self.keyring(desired, name).await;
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

fn use_of(desired: &Desired, name: &str, image: &v1::Image) -> (String, String, String) {
    (desired.key.uid.clone(), name.to_owned(), image.id.clone())
}

fn seconds(duration: Duration) -> String {
    if duration.as_secs() == 0 {
        format!("{}ms", duration.as_millis())
    } else {
        format!("{:.3}s", duration.as_secs_f64())
    }
}
