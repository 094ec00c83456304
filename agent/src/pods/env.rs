//! A container's environment ◇: literals, ConfigMaps, Secrets, fields, `$(VAR)`.
//!
//! Called by `container_config` once every object the container names has been fetched. Invariant: the result depends
//! on nothing but the arguments.

use super::desired::Desired;
use super::resources;
use k8s_openapi::api::core::v1 as api;
use std::collections::BTreeMap;

/// Data of the ConfigMaps and Secrets of one pod, by name.
#[derive(Debug, Default, Clone)]
pub struct Objects {
    /// ConfigMaps; `None`: there is none of that name.
    pub config_maps: BTreeMap<String, Option<BTreeMap<String, Vec<u8>>>>,
    /// Secrets; `None`: there is none of that name.
    pub secrets: BTreeMap<String, Option<BTreeMap<String, Vec<u8>>>>,
}

/// What the downward API can tell beside the pod itself.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// Name of the node.
    pub node_name: String,
    /// Addresses of the node.
    pub host_ips: Vec<String>,
    /// Addresses of the pod.
    pub pod_ips: Vec<String>,
    /// Processors pods may use, in thousandths.
    pub node_cpu_millis: i64,
    /// Memory pods may use, in bytes.
    pub node_memory: i64,
    /// Storage pods may use, in bytes.
    pub node_storage: i64,
    /// Address and port of the API server, for `KUBERNETES_SERVICE_*`.
    pub api_server: Option<(String, u16)>,
}

impl Facts {
    fn allocatable(&self, name: &str) -> i64 {
        match name {
            "cpu" => self.node_cpu_millis,
            "memory" => self.node_memory,
            "ephemeral-storage" => self.node_storage,
            _ => 0,
        }
    }

    /// The value of a `resourceFieldRef` of `container`.
    ///
    /// # Errors
    /// When there is no such field.
    pub fn resource(
        &self,
        desired: &Desired,
        container: &str,
        field: &api::ResourceFieldSelector,
    ) -> Result<String, String> {
        let name = field.container_name.as_deref().filter(|n| !n.is_empty()).unwrap_or(container);
        let found = desired.container(name).ok_or_else(|| format!("the pod has no container '{name}'"))?;
        resources::field(&found.spec, &field.resource, field.divisor.as_ref(), |n| self.allocatable(n))
    }
}

/// Names of the objects a container's environment is made from.
pub fn references(container: &api::Container) -> (Vec<String>, Vec<String>) {
    let (mut maps, mut secrets) = (Vec::new(), Vec::new());
    for from in container.env_from.iter().flatten() {
        maps.extend(from.config_map_ref.as_ref().map(|r| r.name.clone()));
        secrets.extend(from.secret_ref.as_ref().map(|r| r.name.clone()));
    }
    for from in container.env.iter().flatten().filter_map(|e| e.value_from.as_ref()) {
        maps.extend(from.config_map_key_ref.as_ref().map(|r| r.name.clone()));
        secrets.extend(from.secret_key_ref.as_ref().map(|r| r.name.clone()));
    }
    (maps, secrets)
}

/// The environment, in order; a name said twice keeps its last value.
///
/// # Errors
/// A sentence that names what is missing.
pub fn resolve(
    desired: &Desired,
    container: &api::Container,
    objects: &Objects,
    facts: &Facts,
) -> Result<Vec<(String, String)>, String> {
    let mut env = Env { names: Vec::new(), values: BTreeMap::new() };
    for (name, value) in service_variables(facts) {
        env.set(name, value);
    }
    for from in container.env_from.iter().flatten() {
        env.take_all(desired, from, objects)?;
    }
    for variable in container.env.iter().flatten() {
        let value = match &variable.value_from {
            None => Some(expand(variable.value.as_deref().unwrap_or_default(), &env.values)),
            Some(source) => one(desired, container, source, objects, facts)?,
        };
        if let Some(value) = value {
            env.set(variable.name.clone(), value);
        }
    }
    Ok(env.names.into_iter().filter_map(|n| env.values.remove(&n).map(|v| (n, v))).collect())
}

/// How to reach the API server. There is no ClusterIP routing on this node, so these are the server's own address
/// and port, and other services have no variables: they are found by DNS.
fn service_variables(facts: &Facts) -> Vec<(String, String)> {
    let Some((host, port)) = &facts.api_server else { return Vec::new() };
    let bracketed = if host.contains(':') { format!("[{host}]") } else { host.clone() };
    let url = format!("tcp://{bracketed}:{port}");
    [
        ("KUBERNETES_SERVICE_HOST", host.clone()),
        ("KUBERNETES_SERVICE_PORT", port.to_string()),
        ("KUBERNETES_SERVICE_PORT_HTTPS", port.to_string()),
        ("KUBERNETES_PORT", url.clone()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into()
}

struct Env {
    names: Vec<String>,
    values: BTreeMap<String, String>,
}

impl Env {
    fn set(&mut self, name: String, value: String) {
        if self.values.insert(name.clone(), value).is_none() {
            self.names.push(name);
        }
    }

    fn take_all(
        &mut self,
        desired: &Desired,
        from: &api::EnvFromSource,
        objects: &Objects,
    ) -> Result<(), String> {
        let namespace = &desired.key.namespace;
        let (data, optional, what) = if let Some(source) = &from.config_map_ref {
            let data = objects.config_maps.get(&source.name).and_then(Option::as_ref);
            (
                data,
                source.optional,
                format!("configmap \"{}\" not found in namespace {namespace}", source.name),
            )
        } else if let Some(source) = &from.secret_ref {
            let data = objects.secrets.get(&source.name).and_then(Option::as_ref);
            (data, source.optional, format!("secret \"{}\" not found in namespace {namespace}", source.name))
        } else {
            return Ok(());
        };
        let Some(data) = data else {
            return if optional == Some(true) { Ok(()) } else { Err(what) };
        };
        let prefix = from.prefix.as_deref().unwrap_or_default();
        for (key, value) in data {
            let name = format!("{prefix}{key}");
            // What cannot be a variable's name is left out, as the API says.
            if is_name(&name) {
                self.set(name, String::from_utf8_lossy(value).into_owned());
            }
        }
        Ok(())
    }
}

fn is_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|b| (0x20..0x7f).contains(&b) && b != b'=')
}

fn one(
    desired: &Desired,
    container: &api::Container,
    source: &api::EnvVarSource,
    objects: &Objects,
    facts: &Facts,
) -> Result<Option<String>, String> {
    if let Some(field) = &source.field_ref {
        return self::field(desired, &field.field_path, facts).map(Some);
    }
    if let Some(resource) = &source.resource_field_ref {
        return facts.resource(desired, &container.name, resource).map(Some);
    }
    let (data, key, optional, what, name) = if let Some(key) = &source.config_map_key_ref {
        (objects.config_maps.get(&key.name), &key.key, key.optional, "configmap", &key.name)
    } else if let Some(key) = &source.secret_key_ref {
        (objects.secrets.get(&key.name), &key.key, key.optional, "secret", &key.name)
    } else {
        return Err("a valueFrom of a kind this node does not know".into());
    };
    let value = data.and_then(Option::as_ref).map(|data| data.get(key));
    match (value, optional == Some(true)) {
        (Some(Some(value)), _) => Ok(Some(String::from_utf8_lossy(value).into_owned())),
        (_, true) => Ok(None),
        (None, _) => Err(format!("{what} \"{name}\" not found")),
        (Some(None), _) => {
            let title = if what == "secret" { "Secret" } else { "ConfigMap" };
            Err(format!("couldn't find key {key} in {title} {}/{name}", desired.key.namespace))
        }
    }
}

/// The value of a `fieldRef`.
///
/// # Errors
/// When the downward API has no such field.
pub fn field(desired: &Desired, path: &str, facts: &Facts) -> Result<String, String> {
    let meta = &desired.pod.metadata;
    let spec = desired.spec();
    let table = |map: &Option<BTreeMap<String, String>>, key: &str| {
        map.as_ref().and_then(|m| m.get(key)).cloned().unwrap_or_default()
    };
    if let Some(key) = path.strip_prefix("metadata.labels['").and_then(|p| p.strip_suffix("']")) {
        return Ok(table(&meta.labels, key));
    }
    if let Some(key) = path.strip_prefix("metadata.annotations['").and_then(|p| p.strip_suffix("']")) {
        return Ok(table(&meta.annotations, key));
    }
    Ok(match path {
        "metadata.name" => desired.key.name.clone(),
        "metadata.namespace" => desired.key.namespace.clone(),
        "metadata.uid" => desired.key.uid.clone(),
        "metadata.labels" => lines(&meta.labels),
        "metadata.annotations" => lines(&meta.annotations),
        "spec.nodeName" => facts.node_name.clone(),
        "spec.serviceAccountName" => spec.service_account_name.clone().unwrap_or_default(),
        "status.hostIP" => facts.host_ips.first().cloned().unwrap_or_default(),
        "status.hostIPs" => facts.host_ips.join(","),
        "status.podIP" => facts.pod_ips.first().cloned().unwrap_or_default(),
        "status.podIPs" => facts.pod_ips.join(","),
        _ => return Err(format!("unsupported fieldPath: {path}")),
    })
}

/// `key="value"`, one a line, as the downward API writes maps.
fn lines(map: &Option<BTreeMap<String, String>>) -> String {
    let line = |(key, value): (&String, &String)| format!("{key}={value:?}");
    map.iter().flatten().map(line).collect::<Vec<_>>().join("\n")
}

/// Replaces `$(NAME)` by its value; an unknown name stays as it is, `$$` is a dollar.
pub fn expand(text: &str, values: &BTreeMap<String, String>) -> String {
    let mut result = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        result.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        if let Some(tail) = after.strip_prefix('$') {
            result.push('$');
            rest = tail;
        } else if let Some((name, tail)) = after.strip_prefix('(').and_then(|t| t.split_once(')')) {
            match values.get(name) {
                Some(value) => result.push_str(value),
                None => {
                    result.push_str("$(");
                    result.push_str(name);
                    result.push(')');
                }
            }
            rest = tail;
        } else {
            result.push('$');
            rest = after;
        }
    }
    result + rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::testing::pod_with;

    fn objects() -> Objects {
        let data = |pairs: &[(&str, &str)]| {
            Some(pairs.iter().map(|(k, v)| ((*k).to_owned(), v.as_bytes().to_vec())).collect())
        };
        Objects {
            config_maps: [("c".into(), data(&[("A", "1"), ("b.c", "2"), ("no=name", "3")]))].into(),
            secrets: [("s".into(), data(&[("K", "v")])), ("gone".into(), None)].into(),
        }
    }

    fn env(container: &str) -> Result<Vec<(String, String)>, String> {
        let meta = "{namespace: ns, name: p, uid: u, labels: {app: x}}";
        let spec = format!("{{serviceAccountName: sa, containers: [{container}]}}");
        let desired = pod_with(meta, &spec, "{}");
        let facts = Facts {
            node_name: "n".into(),
            pod_ips: vec!["10.0.0.2".into()],
            node_cpu_millis: 4000,
            ..Facts::default()
        };
        resolve(&desired, &desired.containers[0].spec, &objects(), &facts)
    }

    fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn expansion() {
        let values: BTreeMap<String, String> = [("A".to_owned(), "1".to_owned())].into();
        let table = [
            ("$(A)", "1"),
            ("x$(A)y$(B)z", "x1y$(B)z"),
            ("$$(A)", "$(A)"),
            ("$A", "$A"),
            ("$(A", "$(A"),
            ("a$", "a$"),
            ("$$$(A)", "$1"),
        ];
        for (text, want) in table {
            assert_eq!(expand(text, &values), want, "{text}");
        }
    }

    #[test]
    fn order_and_references() {
        let got = env("{name: a, image: i, envFrom: [{prefix: P_, configMapRef: {name: c}}], env: [
            {name: X, value: '$(P_A)-$(Y)'}, {name: Y, value: y}, {name: P_A, value: over},
            {name: S, valueFrom: {secretKeyRef: {name: s, key: K}}},
            {name: IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}},
            {name: L, valueFrom: {fieldRef: {fieldPath: 'metadata.labels[''app'']'}}},
            {name: CPU, valueFrom: {resourceFieldRef: {resource: limits.cpu}}},
            {name: NO, valueFrom: {secretKeyRef: {name: gone, key: K, optional: true}}}]}")
        .unwrap();
        let want = [
            ("P_A", "over"),
            ("P_b.c", "2"),
            ("X", "1-$(Y)"),
            ("Y", "y"),
            ("S", "v"),
            ("IP", "10.0.0.2"),
            ("L", "x"),
            ("CPU", "4"),
        ];
        assert_eq!(got, pairs(&want));
    }

    #[test]
    fn what_is_missing_is_named() {
        let of = |source: &str| {
            env(&format!("{{name: a, image: i, env: [{{name: X, valueFrom: {source}}}]}}")).unwrap_err()
        };
        assert_eq!(of("{secretKeyRef: {name: gone, key: K}}"), "secret \"gone\" not found");
        assert_eq!(of("{secretKeyRef: {name: s, key: Z}}"), "couldn't find key Z in Secret ns/s");
        assert_eq!(of("{fieldRef: {fieldPath: spec.x}}"), "unsupported fieldPath: spec.x");
    }
}
