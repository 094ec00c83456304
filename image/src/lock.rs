//! `debian.lock`: which Debian packages, in which version, with which content, an image is made of. Pure.
//!
//! One package per line: `name version architecture sha256`. `atoll-image lock` writes it, every build reads it;
//! nothing is used whose content is not named here.

use crate::error::{Error, Result};

/// The lock file of this checkout, built in.
pub const BUILT_IN: &str = include_str!("../debian.lock");

/// One pinned package.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Package {
    /// Binary package name.
    pub name: String,
    /// Debian version.
    pub version: String,
    /// `amd64` or `all`.
    pub architecture: String,
    /// Of the .deb file, hexadecimal.
    pub sha256: String,
}

/// All pinned packages, in order of name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Lock {
    packages: Vec<Package>,
}

impl Lock {
    /// A lock of these packages.
    pub fn new(mut packages: Vec<Package>) -> Self {
        packages.sort();
        Self { packages }
    }

    /// Reads the file's text.
    pub fn parse(text: &str) -> Result<Self> {
        let mut packages = Vec::new();
        for (number, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let fields: Vec<&str> = line.split_whitespace().collect();
            let [name, version, architecture, sha256] = fields[..] else {
                let place = format!("debian.lock line {}", number + 1);
                return Err(Error::input(
                    place,
                    "want `name version architecture sha256`; run `atoll-image lock`",
                ));
            };
            if sha256.len() != 64 || !sha256.bytes().all(|b| b.is_ascii_hexdigit()) {
                let place = format!("debian.lock line {}", number + 1);
                return Err(Error::input(place, "the last field must be 64 hexadecimal digits"));
            }
            let own = |s: &str| s.to_string();
            let package = Package {
                name: own(name),
                version: own(version),
                architecture: own(architecture),
                sha256: own(sha256),
            };
            packages.push(package);
        }
        Ok(Self::new(packages))
    }

    /// The file's text.
    pub fn to_text(&self) -> String {
        let mut text = String::from(
            "# Debian 13 packages that an image is made of: name version architecture sha256.\n",
        );
        text.push_str("# Written by `atoll-image lock`; a change here is a change of the image.\n");
        for p in &self.packages {
            text.push_str(&format!("{} {} {} {}\n", p.name, p.version, p.architecture, p.sha256));
        }
        text
    }

    /// All packages.
    pub fn packages(&self) -> &[Package] {
        &self.packages
    }

    /// The package of this name.
    pub fn get(&self, name: &str) -> Result<&Package> {
        self.packages.iter().find(|p| p.name == name).ok_or_else(|| Error::Missing {
            kind: "package",
            name: name.into(),
            place: "in image/debian.lock".into(),
            remedy: "run `atoll-image lock`".into(),
        })
    }

    /// This lock with other versions of some packages: each of `newer` takes the place of its `gone`.
    pub fn with(&self, gone: &[&Package], newer: Vec<Package>) -> Self {
        let kept = self.packages.iter().filter(|p| !gone.contains(p)).cloned();
        Self::new(kept.chain(newer).collect())
    }

    /// The host kernel's package: the one whose name carries the kernel's release.
    pub fn kernel(&self) -> Result<(&Package, &str)> {
        let found = self.packages.iter().find_map(|p| Some((p, p.name.strip_prefix("linux-image-")?)));
        found.ok_or_else(|| Error::Missing {
            kind: "package",
            name: "linux-image-*".into(),
            place: "in image/debian.lock".into(),
            remedy: "run `atoll-image lock`".into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_survives_a_round_trip() {
        let lock = Lock::parse(BUILT_IN).unwrap();
        assert_eq!(Lock::parse(&lock.to_text()).unwrap(), lock);
        assert_eq!(lock.to_text(), BUILT_IN);
        assert!(lock.kernel().unwrap().1.starts_with("6.12."));
    }

    #[test]
    fn what_is_gone_gives_its_place_to_what_is_newer() {
        let lock = Lock::parse(BUILT_IN).unwrap();
        let (kernel, _) = lock.kernel().unwrap();
        let newer = Package {
            name: "linux-image-6.12.999-amd64".into(),
            version: "6.12.999-1".into(),
            ..kernel.clone()
        };
        let changed = lock.with(&[kernel], vec![newer.clone()]);
        assert_eq!(changed.kernel().unwrap(), (&newer, "6.12.999-amd64"));
        assert_eq!(changed.packages().len(), lock.packages().len());
        assert_eq!(changed.get("libc6").unwrap(), lock.get("libc6").unwrap());
    }

    #[test]
    fn a_bad_line_is_named() {
        let error = Lock::parse("# x\nlibc6 2.41\n").unwrap_err().to_string();
        assert!(error.contains("line 2"), "{error}");
    }
}
