//! The shared libraries that programs need, found in unpacked Debian packages: what `ldd` would say on a Debian 13
//! machine, without running anything.

use crate::error::{Error, Result};
use crate::tree::{Content, Node, Tree};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Where Debian keeps libraries; also where they go in the image.
const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";

/// What an ELF file asks of the dynamic loader.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// The loader's path; `None` for a static program.
    pub loader: Option<String>,
    /// Library names.
    pub libraries: Vec<String>,
}

/// Reads an ELF file; anything else needs nothing.
pub fn needs(path: &Path) -> Result<Needs> {
    let bytes = fs::read(path).map_err(Error::file("read", path))?;
    if !bytes.starts_with(b"\x7fELF") {
        return Ok(Needs::default());
    }
    let elf = goblin::elf::Elf::parse(&bytes)
        .map_err(|e| Error::format(path.display().to_string(), e.to_string()))?;
    Ok(Needs {
        loader: elf.interpreter.map(str::to_string),
        libraries: elf.libraries.iter().map(|name| name.to_string()).collect(),
    })
}

/// Adds to `tree` every library that its programs and their libraries need, from the packages merged in `root`.
pub fn complete(tree: &mut Tree, root: &Path) -> Result<()> {
    let mut pending: Vec<PathBuf> = Vec::new();
    for (_, node) in tree.nodes() {
        if let Node::File(0o755, Content::File(from)) = node {
            pending.push(from.clone());
        }
    }
    let mut seen = BTreeSet::new();
    while let Some(program) = pending.pop() {
        let needs = needs(&program)?;
        if let Some(loader) = needs.loader {
            add(tree, root, &loader, &mut seen, &mut pending, &program)?;
        }
        for library in needs.libraries {
            add(tree, root, &format!("/{LIBRARIES}/{library}"), &mut seen, &mut pending, &program)?;
        }
    }
    Ok(())
}

fn add(
    tree: &mut Tree,
    root: &Path,
    wanted: &str,
    seen: &mut BTreeSet<String>,
    pending: &mut Vec<PathBuf>,
    by: &Path,
) -> Result<()> {
    let name = wanted.rsplit('/').next().unwrap_or(wanted);
    if !seen.insert(name.to_string()) {
        return Ok(());
    }
    let from = root.join(LIBRARIES).join(name);
    let from = fs::canonicalize(&from).map_err(|_| Error::Missing {
        kind: "shared library",
        name: name.to_string(),
        place: format!("in the profile's packages, needed by {}", by.display()),
        remedy: "add the Debian package that has it to `libraries` and run `atoll-image lock`".into(),
    })?;
    tree.insert(&format!("/{LIBRARIES}/{name}"), Node::File(0o755, Content::File(from.clone())));
    pending.push(from);
    Ok(())
}
