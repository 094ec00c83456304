//! The list of what is in an image: SPDX 2.3 JSON of every Debian package, host kernel module and Rust crate, with
//! version and licence. Deterministic: its time and namespace come from its content.

use crate::cache::{Key, sha256_file};
use crate::error::{Error, Result};
use crate::lock::Package;
use crate::modules::name_of;
use crate::program::Program;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// A component of the image.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Component {
    /// `debian`, `module`, `crate` or `atoll`.
    pub origin: &'static str,
    /// Name.
    pub name: String,
    /// Version.
    pub version: String,
    /// SPDX expression, or the licence's own name.
    pub licence: String,
    /// Package URL, where there is one.
    pub purl: Option<String>,
    /// Sha256 of the file it came in, where there is one.
    pub sha256: Option<String>,
}

/// Debian packages, with the licences that their copyright files name; `roots` hold them unpacked, `kernel` is the
/// name of the host kernel's package.
pub fn debian(packages: &[&Package], kernel: &str, roots: &[&Path]) -> Vec<Component> {
    let describe = |p: &&Package| {
        // Packages of one source share its copyright; these two come without their own here.
        let documented = match p.name.as_str() {
            "libgcc-s1" => "gcc-14-base",
            name if name.starts_with("linux-source-") => kernel,
            name => name,
        };
        let copyright = format!("usr/share/doc/{documented}/copyright");
        let text = roots.iter().find_map(|root| fs::read_to_string(root.join(&copyright)).ok());
        Component {
            origin: "debian",
            name: p.name.clone(),
            version: p.version.clone(),
            licence: text.map_or_else(|| "NOASSERTION".into(), |t| licences(&t)),
            purl: Some(format!(
                "pkg:deb/debian/{}@{}?arch={}&distro=trixie",
                p.name,
                p.version.replace('+', "%2B"),
                p.architecture
            )),
            sha256: Some(p.sha256.clone()),
        }
    };
    packages.iter().map(describe).collect()
}

/// The short names of a machine-readable copyright file; older files are free text.
fn licences(copyright: &str) -> String {
    let names: BTreeSet<&str> = copyright
        .lines()
        .filter_map(|line| line.strip_prefix("License:"))
        .map(str::trim)
        .filter(|name| !name.is_empty())
        .collect();
    if names.is_empty() {
        return "see the package's copyright file".into();
    }
    names.into_iter().collect::<Vec<_>>().join(", ")
}

/// Host kernel modules, with the licence that each declares.
pub fn modules(dir: &Path, release: &str) -> Result<Vec<Component>> {
    let order = dir.join("modules.dep");
    let text = fs::read_to_string(&order).map_err(Error::file("read", &order))?;
    let mut found = Vec::new();
    for path in text.lines().filter_map(|line| line.split_once(':')).map(|(path, _)| path) {
        let file = dir.join(path);
        let bytes = fs::read(&file).map_err(Error::file("read", &file))?;
        found.push(Component {
            origin: "module",
            name: name_of(path),
            version: release.to_string(),
            licence: module_licence(&bytes).unwrap_or_else(|| "NOASSERTION".into()),
            purl: None,
            sha256: Some(sha256_file(&file)?),
        });
    }
    Ok(found)
}

/// `license=` of a module's `.modinfo`, whose strings end in NUL.
fn module_licence(module: &[u8]) -> Option<String> {
    const MARK: &[u8] = b"license=";
    let starts = |at: &usize| {
        let whole_word = *at == 0 || !module[at - 1].is_ascii_graphic();
        whole_word && module[*at..].starts_with(MARK)
    };
    let start = (0..module.len()).find(starts)? + MARK.len();
    let end = module[start..].iter().position(|byte| *byte == 0)?;
    String::from_utf8(module[start..start + end].to_vec()).ok()
}

/// The crates that the named programs are linked from, by `cargo metadata`.
pub fn crates(manifest: &Path, programs: &[String]) -> Result<Vec<Component>> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let program =
        Program::host(&cargo, "list the crates").args(["metadata", "--format-version=1", "--locked"]);
    let program =
        program.arg("--filter-platform=x86_64-unknown-linux-gnu").arg("--manifest-path").arg(manifest);
    let bad = |e: serde_json::Error| Error::format("cargo metadata", e.to_string());
    let metadata: Value = serde_json::from_slice(&program.run()?).map_err(bad)?;
    Ok(reachable(&metadata, programs))
}

fn reachable(metadata: &Value, programs: &[String]) -> Vec<Component> {
    let list = |value: &'_ Value| value.as_array().cloned().unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_string();
    let packages: BTreeMap<String, Value> =
        list(&metadata["packages"]).into_iter().map(|p| (text(&p["id"]), p)).collect();
    let nodes: BTreeMap<String, Value> =
        list(&metadata["resolve"]["nodes"]).into_iter().map(|n| (text(&n["id"]), n)).collect();
    let builds = |p: &Value| list(&p["targets"]).iter().any(|t| programs.contains(&text(&t["name"])));
    let mut pending: Vec<String> =
        packages.iter().filter(|(_, p)| builds(p)).map(|(id, _)| id.clone()).collect();
    let mut seen = BTreeSet::new();
    while let Some(id) = pending.pop() {
        if !seen.insert(id.clone()) {
            continue;
        }
        for dependency in nodes.get(&id).map(|n| list(&n["deps"])).unwrap_or_default() {
            let linked = list(&dependency["dep_kinds"]).iter().any(|k| k["kind"].is_null());
            if linked {
                pending.push(text(&dependency["pkg"]));
            }
        }
    }
    let describe = |p: &Value| {
        let (name, version) = (text(&p["name"]), text(&p["version"]));
        let own = p["source"].is_null();
        Component {
            origin: if own { "atoll" } else { "crate" },
            licence: p["license"].as_str().unwrap_or("NOASSERTION").to_string(),
            purl: (!own).then(|| format!("pkg:cargo/{name}@{version}")),
            sha256: None,
            name,
            version,
        }
    };
    let mut found: Vec<Component> = seen.iter().filter_map(|id| packages.get(id)).map(describe).collect();
    found.sort();
    found
}

/// The SPDX document.
pub fn document(name: &str, components: &[Component]) -> Result<String> {
    let mut custom = BTreeMap::new();
    let mut packages = Vec::new();
    for (index, component) in components.iter().enumerate() {
        let mut package = json!({
            "SPDXID": format!("SPDXRef-{}-{index}", component.origin),
            "name": component.name,
            "versionInfo": component.version,
            "downloadLocation": "NOASSERTION",
            "filesAnalyzed": false,
            "licenseConcluded": "NOASSERTION",
            "licenseDeclared": expression(component, &mut custom),
            "copyrightText": "NOASSERTION",
        });
        if let Some(purl) = &component.purl {
            package["externalRefs"] = json!([{"referenceCategory": "PACKAGE-MANAGER", "referenceType": "purl", "referenceLocator": purl}]);
        }
        if let Some(sha256) = &component.sha256 {
            package["checksums"] = json!([{"algorithm": "SHA256", "checksumValue": sha256}]);
        }
        packages.push(package);
    }
    let described: Vec<Value> = packages.iter().map(|p| p["SPDXID"].clone()).collect();
    let extracted: Vec<Value> = custom
        .into_iter()
        .map(|(id, text)| json!({"licenseId": id, "extractedText": format!("The component calls its licence: {text}")}))
        .collect();
    let mut document = json!({
        "spdxVersion": "SPDX-2.3",
        "dataLicense": "CC0-1.0",
        "SPDXID": "SPDXRef-DOCUMENT",
        "name": name,
        "creationInfo": {"created": "2026-01-01T00:00:00Z", "creators": ["Tool: atoll-image"]},
        "documentDescribes": described,
        "packages": packages,
        "hasExtractedLicensingInfos": extracted,
    });
    let namespace =
        format!("https://spdx.org/spdxdocs/{name}-{}", Key::default().with(document.to_string()).finish());
    document["documentNamespace"] = Value::String(namespace);
    let text =
        serde_json::to_string_pretty(&document).map_err(|e| Error::format("SPDX document", e.to_string()))?;
    Ok(text + "\n")
}

/// A crate's licence is an SPDX expression already; any other name becomes a reference to its own words.
fn expression(component: &Component, custom: &mut BTreeMap<String, String>) -> String {
    if component.licence == "NOASSERTION" {
        return component.licence.clone();
    }
    if matches!(component.origin, "crate" | "atoll") {
        // Old manifests write "or" as a slash.
        return component.licence.replace('/', " OR ");
    }
    let id = format!(
        "LicenseRef-{}-{}",
        component.origin,
        &Key::default().with(&component.licence).finish()[..12]
    );
    custom.insert(id.clone(), component.licence.clone());
    id
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn licences_are_found() {
        assert_eq!(licences("Files: *\nLicense: MIT\n text\nLicense: GPL-2+\nLicense: MIT\n"), "GPL-2+, MIT");
        assert_eq!(module_licence(b"x\0license=GPL v2\0y").unwrap(), "GPL v2");
    }

    #[test]
    fn only_linked_crates_count() {
        let package = |name: &str, source: Value| {
            json!({"id": name, "name": name, "version": "1.0.0", "license": "MIT/Apache-2.0", "source": source,
                   "targets": [{"name": name}]})
        };
        let metadata = json!({
            "packages": [package("atoll-init", Value::Null), package("used", json!("r")), package("build", json!("r")), package("other", json!("r"))],
            "resolve": {"nodes": [
                {"id": "atoll-init", "deps": [{"pkg": "used", "dep_kinds": [{"kind": null}]}, {"pkg": "build", "dep_kinds": [{"kind": "build"}]}]},
                {"id": "used", "deps": []}]},
        });
        let found = reachable(&metadata, &["atoll-init".into()]);
        let names: Vec<&str> = found.iter().map(|c| c.name.as_str()).collect();
        assert_eq!(names, ["atoll-init", "used"]);
        let text = document("test", &found).unwrap();
        assert!(text.contains("MIT OR Apache-2.0") && text.contains("pkg:cargo/used@1.0.0"));
        assert_eq!(text, document("test", &found).unwrap());
    }
}
