//! Fetches ConfigMaps and Secrets, one by one: a node may read only those its pods name.
//!
//! Just after a pod was bound, the API server may not know yet that it is this node's, and answers 403; that is
//! tried again for a while.

use crate::pods::env::Objects;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::Resource;
use kube::api::Api;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::time::Duration;

/// Deadline of one request.
const REQUEST: Duration = Duration::from_secs(10);
/// Waits between tries that were forbidden.
const FORBIDDEN_WAITS: [u64; 5] = [100, 300, 700, 1500, 3000];

/// Fetches everything of these names; what does not exist is `None`.
///
/// # Errors
/// When the API server cannot be asked, or refuses.
pub async fn fetch(
    client: &kube::Client,
    namespace: &str,
    config_maps: &[String],
    secrets: &[String],
) -> Result<Objects, String> {
    let mut objects = Objects::default();
    for name in super::content::unique(config_maps.iter().cloned()) {
        let found: Option<ConfigMap> = get(client, namespace, &name, "configmap").await?;
        let data = found.map(|map| {
            let text = map.data.unwrap_or_default().into_iter().map(|(k, v)| (k, v.into_bytes()));
            let binary = map.binary_data.unwrap_or_default().into_iter().map(|(k, v)| (k, v.0));
            text.chain(binary).collect::<BTreeMap<_, _>>()
        });
        objects.config_maps.insert(name, data);
    }
    for name in super::content::unique(secrets.iter().cloned()) {
        let data = secret(client, namespace, &name).await?.map(secret_data);
        objects.secrets.insert(name, data);
    }
    Ok(objects)
}

fn secret_data(secret: Secret) -> BTreeMap<String, Vec<u8>> {
    secret.data.unwrap_or_default().into_iter().map(|(k, v)| (k, v.0)).collect()
}

/// One Secret; `None` when it does not exist.
///
/// # Errors
/// When the API server cannot be asked, or refuses.
pub async fn secret(client: &kube::Client, namespace: &str, name: &str) -> Result<Option<Secret>, String> {
    get(client, namespace, name, "secret").await
}

async fn get<K>(client: &kube::Client, namespace: &str, name: &str, what: &str) -> Result<Option<K>, String>
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
                return Err(format!(
                    "cannot fetch {what} \"{name}\": no answer within {} s",
                    REQUEST.as_secs()
                ));
            }
        };
        let forbidden = matches!(&error, kube::Error::Api(status) if status.code == 403);
        match waits.next().filter(|_| forbidden) {
            Some(wait) => tokio::time::sleep(Duration::from_millis(wait)).await,
            None => return Err(format!("cannot fetch {what} \"{name}\": {}", short(&error))),
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
