//! What a volume shows ◇: files from ConfigMaps, Secrets, fields of the pod, and tokens.

use crate::pods::desired::Desired;
use crate::pods::env::{self, Facts, Objects};
use k8s_openapi::api::core::v1 as api;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

/// One file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct File {
    /// Path in the volume.
    pub path: PathBuf,
    /// Permissions.
    pub mode: u32,
    /// Content.
    pub data: Vec<u8>,
}

/// What has to be fetched for a volume.
#[derive(Debug, Default)]
pub struct Needs {
    /// ConfigMaps, by name.
    pub config_maps: Vec<String>,
    /// Secrets, by name.
    pub secrets: Vec<String>,
    /// Tokens, in order.
    pub tokens: Vec<api::ServiceAccountTokenProjection>,
}

/// Reads what a volume names.
pub fn needs(volume: &api::Volume) -> Needs {
    let mut needs = Needs::default();
    needs.config_maps.extend(volume.config_map.as_ref().map(|c| c.name.clone()));
    needs.secrets.extend(volume.secret.as_ref().and_then(|s| s.secret_name.clone()));
    for source in volume.projected.iter().flat_map(|p| p.sources.iter().flatten()) {
        needs.config_maps.extend(source.config_map.as_ref().map(|c| c.name.clone()));
        needs.secrets.extend(source.secret.as_ref().map(|s| s.name.clone()));
        needs.tokens.extend(source.service_account_token.clone());
    }
    needs
}

struct Builder<'a> {
    desired: &'a Desired,
    objects: &'a Objects,
    facts: &'a Facts,
    default_mode: u32,
    files: BTreeMap<PathBuf, File>,
}

/// The files of a volume. `tokens` are those of [`needs`], in order.
///
/// # Errors
/// A sentence that names what is missing.
pub fn files(
    desired: &Desired,
    volume: &api::Volume,
    objects: &Objects,
    tokens: &[String],
    facts: &Facts,
) -> Result<Vec<File>, String> {
    let mut builder = Builder { desired, objects, facts, default_mode: 0o644, files: BTreeMap::new() };
    if let Some(map) = &volume.config_map {
        builder.default_mode = mode(map.default_mode, 0o644);
        builder.config_map(&map.name, &map.items, map.optional)?;
    } else if let Some(secret) = &volume.secret {
        builder.default_mode = mode(secret.default_mode, 0o644);
        builder.secret(secret.secret_name.as_deref().unwrap_or_default(), &secret.items, secret.optional)?;
    } else if let Some(downward) = &volume.downward_api {
        builder.default_mode = mode(downward.default_mode, 0o644);
        builder.downward(&downward.items)?;
    } else if let Some(projected) = &volume.projected {
        builder.default_mode = mode(projected.default_mode, 0o644);
        let mut tokens = tokens.iter();
        for source in projected.sources.iter().flatten() {
            if let Some(map) = &source.config_map {
                builder.config_map(&map.name, &map.items, map.optional)?;
            }
            if let Some(secret) = &source.secret {
                builder.secret(&secret.name, &secret.items, secret.optional)?;
            }
            if let Some(downward) = &source.downward_api {
                builder.downward(&downward.items)?;
            }
            if let (Some(token), Some(value)) = (&source.service_account_token, tokens.next()) {
                let mode = builder.default_mode;
                builder.add(&token.path, mode, value.clone().into_bytes());
            }
        }
    }
    Ok(builder.files.into_values().collect())
}

fn mode(mode: Option<i32>, default: u32) -> u32 {
    mode.and_then(|m| u32::try_from(m).ok()).unwrap_or(default) & 0o777
}

impl Builder<'_> {
    fn add(&mut self, path: &str, mode: u32, data: Vec<u8>) {
        self.files.insert(path.into(), File { path: path.into(), mode, data });
    }

    fn config_map(
        &mut self,
        name: &str,
        items: &Option<Vec<api::KeyToPath>>,
        optional: Option<bool>,
    ) -> Result<(), String> {
        let data = self.objects.config_maps.get(name).and_then(Option::as_ref);
        self.object("configmap", name, data, items, optional == Some(true))
    }

    fn secret(
        &mut self,
        name: &str,
        items: &Option<Vec<api::KeyToPath>>,
        optional: Option<bool>,
    ) -> Result<(), String> {
        let data = self.objects.secrets.get(name).and_then(Option::as_ref);
        self.object("secret", name, data, items, optional == Some(true))
    }

    fn object(
        &mut self,
        what: &str,
        name: &str,
        data: Option<&BTreeMap<String, Vec<u8>>>,
        items: &Option<Vec<api::KeyToPath>>,
        optional: bool,
    ) -> Result<(), String> {
        let Some(data) = data else {
            return if optional { Ok(()) } else { Err(format!("{what} \"{name}\" not found")) };
        };
        let Some(items) = items.as_ref().filter(|i| !i.is_empty()) else {
            for (key, value) in data {
                let mode = self.default_mode;
                self.add(key, mode, value.clone());
            }
            return Ok(());
        };
        for item in items {
            match data.get(&item.key) {
                Some(value) => self.add(&item.path, mode(item.mode, self.default_mode), value.clone()),
                None if optional => {}
                None => return Err(format!("references non-existent {what} key: {}", item.key)),
            }
        }
        Ok(())
    }

    fn downward(&mut self, items: &Option<Vec<api::DownwardAPIVolumeFile>>) -> Result<(), String> {
        for item in items.iter().flatten() {
            let value = if let Some(field) = &item.field_ref {
                env::field(self.desired, &field.field_path, self.facts)?
            } else if let Some(resource) = &item.resource_field_ref {
                self.facts.resource(self.desired, "", resource)?
            } else {
                return Err(format!("{}: it names no field", item.path));
            };
            self.add(&item.path, mode(item.mode, self.default_mode), value.into_bytes());
        }
        Ok(())
    }
}

/// Names without repetition, in order.
pub fn unique(names: impl IntoIterator<Item = String>) -> BTreeSet<String> {
    names.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::testing::pod_with;

    fn show(volume: &str) -> Result<Vec<(String, u32, String)>, String> {
        let spec = format!("{{containers: [{{name: a, image: i}}], volumes: [{volume}]}}");
        let desired = pod_with("{namespace: ns, name: p, uid: u, labels: {x: y}}", &spec, "{}");
        let data = |pairs: &[(&str, &str)]| {
            Some(pairs.iter().map(|(k, v)| ((*k).to_owned(), v.as_bytes().to_vec())).collect())
        };
        let objects = Objects {
            config_maps: [("c".into(), data(&[("a", "1"), ("b", "2")])), ("gone".into(), None)].into(),
            secrets: [("s".into(), data(&[("k", "v")]))].into(),
        };
        let volume = &desired.spec().volumes.as_ref().unwrap()[0];
        let files = files(&desired, volume, &objects, &["T".into()], &Facts::default())?;
        let text = |f: File| (f.path.display().to_string(), f.mode, String::from_utf8(f.data).unwrap());
        Ok(files.into_iter().map(text).collect())
    }

    fn want(files: &[(&str, u32, &str)]) -> Vec<(String, u32, String)> {
        files.iter().map(|(p, m, d)| ((*p).to_owned(), *m, (*d).to_owned())).collect()
    }

    #[test]
    fn config_maps_and_secrets() {
        let all = show("{name: v, configMap: {name: c, defaultMode: 256}}").unwrap();
        assert_eq!(all, want(&[("a", 0o400, "1"), ("b", 0o400, "2")]));
        let some = show("{name: v, configMap: {name: c, items: [{key: b, path: x/y, mode: 384}]}}").unwrap();
        assert_eq!(some, want(&[("x/y", 0o600, "2")]));
        assert_eq!(show("{name: v, configMap: {name: gone}}").unwrap_err(), "configmap \"gone\" not found");
        assert!(show("{name: v, configMap: {name: gone, optional: true}}").unwrap().is_empty());
        let missing = show("{name: v, secret: {secretName: s, items: [{key: z, path: z}]}}").unwrap_err();
        assert_eq!(missing, "references non-existent secret key: z");
    }

    #[test]
    fn a_service_account_volume() {
        let files = show(
            "{name: v, projected: {sources: [{serviceAccountToken: {path: token}}, {configMap: {name: c, items: [{key: a, path: ca.crt}]}},
               {downwardAPI: {items: [{path: namespace, fieldRef: {fieldPath: metadata.namespace}}, {path: labels, fieldRef: {fieldPath: metadata.labels}}]}}]}}",
        )
        .unwrap();
        let expected = [
            ("ca.crt", 0o644, "1"),
            ("labels", 0o644, "x=\"y\""),
            ("namespace", 0o644, "ns"),
            ("token", 0o644, "T"),
        ];
        assert_eq!(files, want(&expected));
    }
}
