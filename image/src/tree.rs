//! A file tree that is only described, and its deterministic tar stream. Nothing of the build machine (owners,
//! times, order of a directory) can enter it, and no root rights are needed to make files that root owns.

use crate::error::{Error, Result};
use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Content of a file.
#[derive(Debug, Clone)]
pub enum Content {
    /// In memory.
    Bytes(Vec<u8>),
    /// In a file of the cache or of `--bin-dir`.
    File(PathBuf),
}

/// One entry.
#[derive(Debug, Clone)]
pub enum Node {
    /// A directory with this mode.
    Directory(u32),
    /// A file with this mode.
    File(u32, Content),
    /// A symbolic link.
    Symlink(String),
}

/// Paths (absolute, normal) → entries, sorted; a parent sorts before its children.
#[derive(Debug, Default, Clone)]
pub struct Tree {
    nodes: BTreeMap<String, Node>,
}

impl Tree {
    /// Adds an entry and its parents; a later one replaces an earlier one.
    pub fn insert(&mut self, path: &str, node: Node) {
        let mut at = 0;
        while let Some(next) = path[at + 1..].find('/') {
            at += 1 + next;
            let parent = &path[..at];
            if !self.nodes.contains_key(parent) {
                self.nodes.insert(parent.to_string(), Node::Directory(0o755));
            }
        }
        self.nodes.insert(path.to_string(), node);
    }

    /// Adds a directory.
    pub fn directory(&mut self, path: &str, mode: u32) {
        self.insert(path, Node::Directory(mode));
    }

    /// Adds a text file, mode 0644.
    pub fn text(&mut self, path: &str, text: impl Into<Vec<u8>>) {
        self.insert(path, Node::File(0o644, Content::Bytes(text.into())));
    }

    /// Adds a link.
    pub fn symlink(&mut self, path: &str, target: &str) {
        self.insert(path, Node::Symlink(target.to_string()));
    }

    /// Adds a file or directory of the build machine; modes keep only whether they can be executed.
    pub fn copy(&mut self, from: &Path, path: &str) -> Result<()> {
        let meta = fs::symlink_metadata(from).map_err(Error::file("read", from))?;
        if meta.is_symlink() {
            let target = fs::read_link(from).map_err(Error::file("read link", from))?;
            self.symlink(path, &target.to_string_lossy());
        } else if meta.is_dir() {
            self.directory(path, 0o755);
            for entry in fs::read_dir(from).map_err(Error::file("read", from))? {
                let entry = entry.map_err(Error::file("read", from))?;
                self.copy(&entry.path(), &format!("{path}/{}", entry.file_name().to_string_lossy()))?;
            }
        } else {
            let executable = std::os::unix::fs::PermissionsExt::mode(&meta.permissions()) & 0o100 != 0;
            let mode = if executable { 0o755 } else { 0o644 };
            self.insert(path, Node::File(mode, Content::File(from.to_path_buf())));
        }
        Ok(())
    }

    /// All entries.
    pub fn nodes(&self) -> impl Iterator<Item = (&str, &Node)> {
        self.nodes.iter().map(|(path, node)| (path.as_str(), node))
    }

    /// Unpacked sizes of its parts, for the builder's table: programs, libraries, modules, guest, the rest.
    pub fn sizes(&self) -> Result<Vec<(String, u64)>> {
        const PARTS: [(&str, &str); 5] = [
            ("/usr/lib/modules/", "host modules"),
            ("/usr/lib/atoll/", "guest kernel and first process"),
            ("/usr/bin/atoll-", "Atoll's programs"),
            ("/usr/lib/", "shared libraries"),
            ("", "Debian's programs and the rest"),
        ];
        let mut sizes = [0; PARTS.len()];
        for (path, node) in &self.nodes {
            let size = match node {
                Node::File(_, Content::Bytes(bytes)) => bytes.len() as u64,
                Node::File(_, Content::File(from)) => {
                    fs::metadata(from).map_err(Error::file("read", from))?.len()
                }
                _ => continue,
            };
            if let Some(part) = PARTS.iter().position(|(prefix, _)| path.starts_with(prefix)) {
                sizes[part] += size;
            }
        }
        Ok(PARTS.iter().zip(sizes).map(|((_, what), size)| (format!("system: {what}"), size)).collect())
    }

    /// Writes the tree as a tar stream: root owns all, times are 0.
    pub fn write_tar(&self, to: impl Write) -> Result<()> {
        let mut tar = tar::Builder::new(to);
        for (path, node) in &self.nodes {
            append(&mut tar, path, node).map_err(Error::file("pack", path))?;
        }
        tar.finish().map_err(Error::file("pack", "the end of the tree"))
    }
}

fn append(tar: &mut tar::Builder<impl Write>, path: &str, node: &Node) -> std::io::Result<()> {
    let name = if path == "/" { "." } else { path.trim_start_matches('/') };
    let mut header = tar::Header::new_gnu();
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(0);
    match node {
        Node::Directory(mode) => {
            header.set_entry_type(tar::EntryType::Directory);
            header.set_mode(*mode);
            tar.append_data(&mut header, format!("{name}/"), std::io::empty())
        }
        Node::Symlink(target) => {
            header.set_entry_type(tar::EntryType::Symlink);
            header.set_mode(0o777);
            tar.append_link(&mut header, name, target)
        }
        Node::File(mode, content) => {
            header.set_entry_type(tar::EntryType::Regular);
            header.set_mode(*mode);
            match content {
                Content::Bytes(bytes) => {
                    header.set_size(bytes.len() as u64);
                    tar.append_data(&mut header, name, bytes.as_slice())
                }
                Content::File(from) => {
                    let file = fs::File::open(from)?;
                    header.set_size(file.metadata()?.len());
                    tar.append_data(&mut header, name, file)
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_of_insertion_does_not_show() {
        let tar = |paths: [&str; 2]| {
            let mut tree = Tree::default();
            for path in paths {
                tree.text(path, path);
            }
            tree.symlink("/a", "usr/a");
            let mut bytes = Vec::new();
            tree.write_tar(&mut bytes).unwrap();
            bytes
        };
        let bytes = tar(["/usr/b/c", "/usr/a"]);
        assert_eq!(bytes, tar(["/usr/a", "/usr/b/c"]));
        let mut archive = tar::Archive::new(bytes.as_slice());
        let names: Vec<String> = archive
            .entries()
            .unwrap()
            .map(|e| e.unwrap().path().unwrap().to_string_lossy().into_owned())
            .collect();
        assert_eq!(names, ["a", "usr/", "usr/a", "usr/b/", "usr/b/c"]);
    }
}
