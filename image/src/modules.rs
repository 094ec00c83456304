//! Which kernel modules a declared list stands for: the modules and all that they need, in loading order. Pure.
//!
//! Reads the text of what `depmod` wrote for the whole kernel package.

use crate::error::{Error, Result};
use std::collections::{BTreeMap, BTreeSet};

/// The kernel's modules by name.
pub struct Index {
    /// Name → path under `/lib/modules/<release>`, as in modules.dep.
    paths: BTreeMap<String, String>,
    /// Path → paths it needs, in modules.dep's order (nearest first).
    needs: BTreeMap<String, Vec<String>>,
    /// Name → names and aliases it wishes to be loaded before it.
    soft: BTreeMap<String, Vec<String>>,
    /// Alias without wildcards → names.
    aliases: BTreeMap<String, Vec<String>>,
    /// Names of what is in the kernel itself.
    builtin: BTreeSet<String>,
}

/// The name of a module file: no directory, no suffix, dashes as underscores.
pub fn name_of(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

impl Index {
    /// From modules.dep, modules.softdep, modules.alias and modules.builtin.
    pub fn new(dep: &str, softdep: &str, alias: &str, builtin: &str) -> Self {
        let mut index = Self {
            paths: BTreeMap::new(),
            needs: BTreeMap::new(),
            soft: BTreeMap::new(),
            aliases: BTreeMap::new(),
            builtin: builtin.lines().map(name_of).collect(),
        };
        for line in dep.lines() {
            let Some((path, needs)) = line.split_once(':') else { continue };
            index.paths.insert(name_of(path), path.to_string());
            index.needs.insert(path.to_string(), needs.split_whitespace().map(str::to_string).collect());
        }
        for line in softdep.lines() {
            let mut words = line.split_whitespace();
            let (Some("softdep"), Some(module)) = (words.next(), words.next()) else { continue };
            let wishes = words.filter(|w| !w.ends_with(':')).map(str::to_string);
            index.soft.entry(name_of(module)).or_default().extend(wishes);
        }
        for line in alias.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            if let ["alias", alias, module] = words[..]
                && !alias.contains('*')
            {
                index.aliases.entry(alias.to_string()).or_default().push(name_of(module));
            }
        }
        index
    }

    /// Paths of `names` and all they need, each after what it needs. A name that is built into the kernel is fine
    /// and gives nothing; one that does not exist is an error.
    pub fn closure(&self, names: &[String]) -> Result<Vec<String>> {
        let (mut order, mut seen) = (Vec::new(), BTreeSet::new());
        for name in names {
            let normal = name.replace('-', "_");
            match self.paths.get(&normal) {
                Some(path) => self.visit(path, &mut order, &mut seen),
                None if self.builtin.contains(&normal) => {}
                None => {
                    return Err(Error::Missing {
                        kind: "kernel module",
                        name: name.clone(),
                        place: "in the host kernel's package".into(),
                        remedy: "correct or remove it in the profile".into(),
                    });
                }
            }
        }
        Ok(order)
    }

    fn visit(&self, path: &str, order: &mut Vec<String>, seen: &mut BTreeSet<String>) {
        if !seen.insert(path.to_string()) {
            return;
        }
        for wish in self.soft.get(&name_of(path)).into_iter().flatten() {
            // A soft dependency is a wish: one that no module of this kernel fulfils is left out.
            for provider in self.providers(wish) {
                self.visit(&provider, order, seen);
            }
        }
        for need in self.needs.get(path).into_iter().flatten().rev() {
            self.visit(need, order, seen);
        }
        order.push(path.to_string());
    }

    fn providers(&self, wish: &str) -> Vec<String> {
        let by_name = self.paths.get(&wish.replace('-', "_"));
        let by_alias = self.aliases.get(wish).into_iter().flatten().filter_map(|name| self.paths.get(name));
        by_name.into_iter().chain(by_alias).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index() -> Index {
        let dep = "kernel/fs/erofs/erofs.ko.xz: kernel/lib/libcrc32c.ko.xz\nkernel/lib/libcrc32c.ko.xz:\n\
                   kernel/crypto/crc32c_generic.ko.xz:\nkernel/arch/x86/kvm/kvm-amd.ko.xz: kernel/ccp.ko.xz kernel/kvm.ko.xz kernel/bypass.ko.xz\n\
                   kernel/ccp.ko.xz:\nkernel/kvm.ko.xz: kernel/bypass.ko.xz\nkernel/bypass.ko.xz:\n";
        let softdep = "# x\nsoftdep libcrc32c pre: crypto-crc32c crypto-nowhere\n";
        let alias = "alias crypto-crc32c crc32c_generic\nalias pci:v*d* kvm_amd\n";
        Index::new(dep, softdep, alias, "kernel/drivers/virtio/virtio_pci.ko\n")
    }

    fn names(index: &Index, of: &[&str]) -> Vec<String> {
        let of: Vec<String> = of.iter().map(|s| s.to_string()).collect();
        index.closure(&of).unwrap().iter().map(|p| name_of(p)).collect()
    }

    #[test]
    fn needs_come_first_and_wishes_before_them() {
        assert_eq!(names(&index(), &["erofs"]), ["crc32c_generic", "libcrc32c", "erofs"]);
        assert_eq!(names(&index(), &["kvm_amd", "kvm-amd"]), ["bypass", "kvm", "ccp", "kvm_amd"]);
    }

    #[test]
    fn built_in_is_fine_and_unknown_is_not() {
        assert!(names(&index(), &["virtio-pci"]).is_empty());
        let error = index().closure(&["nvmee".into()]).unwrap_err().to_string();
        assert!(error.contains("no kernel module nvmee"), "{error}");
    }
}
