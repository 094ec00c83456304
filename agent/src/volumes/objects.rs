//! Fetches ConfigMaps and Secrets, one by one: a node may read only those its pods name.
//!
//! Just after a pod was bound, the API server may not know yet that it is this node's, and answers 403; that is
//! tried again for a while. While the API server is away, what a pod of this node used before is used again: a
//! container that ends then is restarted as at any other time.

use crate::error::is_away;
use crate::pods::env::Objects;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::Resource;
use kube::api::Api;
use serde::de::DeserializeOwned;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Deadline of one request.
const REQUEST: Duration = Duration::from_secs(10);
/// Waits between tries that were forbidden.
const FORBIDDEN_WAITS: [u64; 5] = [100, 300, 700, 1500, 3000];

const CONFIG_MAP: &str = "configmap";
const SECRET: &str = "secret";

/// Content of an object; `None`: it does not exist.
type Data = Option<BTreeMap<String, Vec<u8>>>;
/// Kind, namespace, name.
type Key = (&'static str, String, String);

struct Kept {
    data: Data,
    /// Uids of the pods that use it.
    users: BTreeSet<String>,
}

/// Fetches, and remembers for as long as a pod of this node uses it.
pub struct Reader {
    client: kube::Client,
    kept: Mutex<HashMap<Key, Kept>>,
}

impl Reader {
    /// Nothing is known yet.
    pub fn new(client: kube::Client) -> Self {
        Self { client, kept: Mutex::default() }
    }

    /// Fetches everything of these names for the pod `uid`; what does not exist is `None`.
    ///
    /// # Errors
    /// When the API server refuses, or cannot be asked for something that is not known.
    pub async fn fetch(
        &self,
        namespace: &str,
        uid: &str,
        config_maps: &[String],
        secrets: &[String],
    ) -> Result<Objects, String> {
        let mut objects = Objects::default();
        for name in super::content::unique(config_maps.iter().cloned()) {
            let found = get::<ConfigMap>(&self.client, namespace, &name, CONFIG_MAP).await;
            let found = found.map(|map| map.map(config_map_data));
            let data = self.or_kept((CONFIG_MAP, namespace.into(), name.clone()), uid, found)?;
            objects.config_maps.insert(name, data);
        }
        for name in super::content::unique(secrets.iter().cloned()) {
            let found = get::<Secret>(&self.client, namespace, &name, SECRET).await;
            let found = found.map(|secret| secret.map(secret_data));
            let data = self.or_kept((SECRET, namespace.into(), name.clone()), uid, found)?;
            objects.secrets.insert(name, data);
        }
        Ok(objects)
    }

    /// Forgets what only this pod used.
    pub fn forget(&self, uid: &str) {
        self.lock().retain(|_, kept| {
            kept.users.remove(uid);
            !kept.users.is_empty()
        });
    }

    fn or_kept(&self, key: Key, uid: &str, found: Result<Data, Failed>) -> Result<Data, String> {
        let mut all = self.lock();
        match found {
            Ok(data) => {
                let kept = all.entry(key).or_insert_with(|| Kept { data: None, users: BTreeSet::new() });
                kept.data.clone_from(&data);
                kept.users.insert(uid.to_owned());
                Ok(data)
            }
            // Only to a pod that had it: another one may have lost the right to it meanwhile.
            Err(failed) => match all.get(&key).filter(|kept| failed.away && kept.users.contains(uid)) {
                Some(kept) => Ok(kept.data.clone()),
                None => Err(failed.why),
            },
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn config_map_data(map: ConfigMap) -> BTreeMap<String, Vec<u8>> {
    let text = map.data.unwrap_or_default().into_iter().map(|(k, v)| (k, v.into_bytes()));
    let binary = map.binary_data.unwrap_or_default().into_iter().map(|(k, v)| (k, v.0));
    text.chain(binary).collect()
}

fn secret_data(secret: Secret) -> BTreeMap<String, Vec<u8>> {
    secret.data.unwrap_or_default().into_iter().map(|(k, v)| (k, v.0)).collect()
}

/// Why there is no object.
struct Failed {
    why: String,
    /// The API server cannot be asked now.
    away: bool,
}

/// One Secret; `None` when it does not exist.
///
/// # Errors
/// When the API server cannot be asked, or refuses.
pub async fn secret(client: &kube::Client, namespace: &str, name: &str) -> Result<Option<Secret>, String> {
    get(client, namespace, name, SECRET).await.map_err(|failed| failed.why)
}

async fn get<K>(client: &kube::Client, namespace: &str, name: &str, what: &str) -> Result<Option<K>, Failed>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
        + Clone
        + DeserializeOwned
        + std::fmt::Debug,
{
    let api: Api<K> = Api::namespaced(client.clone(), namespace);
    let mut waits = FORBIDDEN_WAITS.into_iter();
    loop {
        let error = match tokio::time::timeout(REQUEST, api.get_opt(name)).await {
            Ok(Ok(found)) => return Ok(found),
            Ok(Err(error)) => error,
            Err(_) => {
                let seconds = REQUEST.as_secs();
                let why = format!("cannot fetch {what} \"{name}\": no answer within {seconds} s");
                return Err(Failed { why, away: true });
            }
        };
        let forbidden = matches!(&error, kube::Error::Api(status) if status.code == 403);
        match waits.next().filter(|_| forbidden) {
            Some(wait) => tokio::time::sleep(Duration::from_millis(wait)).await,
            None => {
                let why = format!("cannot fetch {what} \"{name}\": {}", short(&error));
                return Err(Failed { why, away: is_away(&error) });
            }
        }
    }
}

/// What the API server said, without the structure around it.
pub fn short(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => status.message.clone(),
        other => crate::error::chain(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reader() -> Reader {
        let config = kube::Config::new("http://127.0.0.1:9".parse().unwrap());
        Reader::new(kube::Client::try_from(config).unwrap())
    }

    fn key() -> Key {
        (SECRET, "ns".into(), "s".into())
    }

    fn failed(away: bool) -> Result<Data, Failed> {
        Err(Failed { why: "why".into(), away })
    }

    #[tokio::test]
    async fn while_the_api_server_is_away_a_pod_gets_what_it_had() {
        let reader = reader();
        let data: Data = Some(BTreeMap::from([("k".to_owned(), b"v".to_vec())]));
        assert_eq!(reader.or_kept(key(), "one", failed(true)), Err("why".into()));
        assert_eq!(reader.or_kept(key(), "one", Ok(data.clone())), Ok(data.clone()));
        assert_eq!(reader.or_kept(key(), "one", failed(true)), Ok(data.clone()));
        // Not what it was refused, and not what another pod had.
        assert!(reader.or_kept(key(), "one", failed(false)).is_err());
        assert!(reader.or_kept(key(), "two", failed(true)).is_err());
        reader.forget("one");
        assert!(reader.or_kept(key(), "one", failed(true)).is_err());
        assert!(reader.lock().is_empty());
    }
}
