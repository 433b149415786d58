//! Two directory trees, compared as a program in a container could tell them apart.

use soci::oci::Digest;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Everything about a path. Sizes of directories are the filesystem's business and not in it.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    pub kind: &'static str,
    pub mode: u32,
    pub owner: (u32, u32),
    pub mtime: (i64, i64),
    pub size: u64,
    pub links: u64,
    /// The first path of this file, if it has several.
    pub same_as: Option<PathBuf>,
    pub device: u64,
    /// Of a file, the digest of its content; of a symlink, its target.
    pub content: String,
    pub xattrs: BTreeMap<OsString, Vec<u8>>,
}

pub type Tree = BTreeMap<PathBuf, Node>;

/// Reads all of `root`, content included. Paths are relative to it; it is the empty path itself.
pub fn read(root: &Path) -> Tree {
    let mut tree = Tree::new();
    let mut first = HashMap::new();
    let mut todo = vec![PathBuf::new()];
    while let Some(path) = todo.pop() {
        let full = root.join(&path);
        let node = node(&full, &path, &mut first).unwrap_or_else(|e| panic!("{}: {e}", full.display()));
        if node.kind == "directory" {
            let mut names: Vec<_> = fs::read_dir(&full).unwrap().map(|e| e.unwrap().file_name()).collect();
            names.sort(); // so that the first path of a file is the same one on both sides
            todo.extend(names.into_iter().rev().map(|name| path.join(name)));
        }
        tree.insert(path, node);
    }
    tree
}

fn node(full: &Path, path: &Path, first: &mut HashMap<(u64, u64), PathBuf>) -> std::io::Result<Node> {
    let meta = fs::symlink_metadata(full)?;
    let kind = match meta.file_type() {
        t if t.is_dir() => "directory",
        t if t.is_file() => "file",
        t if t.is_symlink() => "symlink",
        t if t.is_char_device() => "character device",
        t if t.is_block_device() => "block device",
        t if t.is_fifo() => "fifo",
        _ => "socket",
    };
    let content = match kind {
        "file" => digest(full)?,
        "symlink" => String::from_utf8_lossy(fs::read_link(full)?.as_os_str().as_bytes()).into_owned(),
        _ => String::new(),
    };
    let shared = kind != "directory" && meta.nlink() > 1;
    let same_as = shared.then(|| first.entry((meta.dev(), meta.ino())).or_insert_with(|| path.to_path_buf()).clone());
    Ok(Node {
        kind,
        mode: meta.mode() & 0o7777,
        owner: (meta.uid(), meta.gid()),
        mtime: (meta.mtime(), meta.mtime_nsec()),
        size: if kind == "directory" { 0 } else { meta.size() },
        links: meta.nlink(),
        same_as,
        device: if kind.ends_with("device") { meta.rdev() } else { 0 },
        content,
        xattrs: xattrs(full)?,
    })
}

fn digest(path: &Path) -> std::io::Result<String> {
    let mut file = fs::File::open(path)?;
    let mut hasher = soci::oci::Hasher::new();
    let mut buffer = vec![0; 1 << 18];
    loop {
        match std::io::Read::read(&mut file, &mut buffer)? {
            0 => return Ok(hasher.finish().to_string()),
            n => hasher.update(&buffer[..n]),
        }
    }
}

fn xattrs(path: &Path) -> std::io::Result<BTreeMap<OsString, Vec<u8>>> {
    let mut names = vec![0u8; 65_536]; // XATTR_LIST_MAX
    let length = match rustix::fs::llistxattr(path, &mut names) {
        Ok(length) => length,
        Err(rustix::io::Errno::OPNOTSUPP) => 0,
        Err(e) => return Err(e.into()),
    };
    let mut out = BTreeMap::new();
    for name in names[..length].split(|b| *b == 0).filter(|n| !n.is_empty()) {
        let name = OsString::from_vec(name.to_vec());
        let mut value = vec![0u8; 65_536]; // XATTR_SIZE_MAX
        let length = rustix::fs::lgetxattr(path, &name, &mut value)?;
        value.truncate(length);
        out.insert(name, value);
    }
    Ok(out)
}

/// What is different, a line each. `own_time` are directories whose modification time is nobody's promise.
pub fn differences(theirs: &Tree, ours: &Tree, own_time: &BTreeSet<PathBuf>) -> Vec<String> {
    let mut out = Vec::new();
    for path in theirs.keys().chain(ours.keys()).collect::<BTreeSet<_>>() {
        let name = path.display();
        let (a, b) = match (theirs.get(path), ours.get(path)) {
            (Some(a), Some(b)) => (a, b),
            (Some(a), None) => {
                out.push(format!("/{name}: missing ({})", a.kind));
                continue;
            }
            _ => {
                out.push(format!("/{name}: should not be there"));
                continue;
            }
        };
        let mut differ = |what: &str, a: &dyn std::fmt::Debug, b: &dyn std::fmt::Debug, same: bool| {
            if !same {
                out.push(format!("/{name}: {what} {b:?}, not {a:?}"));
            }
        };
        differ("kind", &a.kind, &b.kind, a.kind == b.kind);
        differ("mode", &format!("{:o}", a.mode), &format!("{:o}", b.mode), a.mode == b.mode);
        differ("owner", &a.owner, &b.owner, a.owner == b.owner);
        differ("mtime", &a.mtime, &b.mtime, a.mtime == b.mtime || own_time.contains(path));
        differ("size", &a.size, &b.size, a.size == b.size);
        differ("link count", &a.links, &b.links, a.links == b.links);
        differ("first link", &a.same_as, &b.same_as, a.same_as == b.same_as);
        differ("device", &a.device, &b.device, a.device == b.device);
        differ("content", &a.content, &b.content, a.content == b.content);
        differ("xattrs", &a.xattrs, &b.xattrs, a.xattrs == b.xattrs);
    }
    out
}

/// The directories that the topmost layer touching them implies without listing them: whoever unpacks decides on their time.
/// `layers`: the names in each layer's tar, bottom first.
pub fn implied_directories(layers: &[Vec<PathBuf>]) -> BTreeSet<PathBuf> {
    let mut implied = BTreeSet::new();
    for names in layers {
        let clean = |name: &PathBuf| {
            name.components().filter(|c| matches!(c, std::path::Component::Normal(_))).collect::<PathBuf>()
        };
        let listed: BTreeSet<PathBuf> = names.iter().map(clean).collect();
        for name in &listed {
            implied.extend(name.ancestors().skip(1).filter(|a| !listed.contains(*a)).map(Path::to_path_buf));
        }
        for name in &listed {
            implied.remove(name);
        }
    }
    implied.insert(PathBuf::new()); // the root itself is rarely in a tar
    implied
}

/// The names in the tars of an OCI layout's image, bottom layer first.
pub fn names_in_layers(layout: &Path) -> Vec<Vec<PathBuf>> {
    let (_, manifest) = super::registry::image_manifest(layout);
    let list = |digest: &Digest| {
        let blob = super::registry::blob_path(layout, digest);
        let list = super::command::attempt(
            std::process::Command::new("tar").args(["--list", "--quoting-style=literal", "-f"]).arg(blob),
        );
        assert!(list.status.success(), "{}", super::command::text(&list.stderr));
        list.stdout
            .split(|b| *b == b'\n')
            .filter(|l| !l.is_empty())
            .map(|l| PathBuf::from(OsString::from_vec(l.to_vec())))
            .collect()
    };
    manifest.layers.iter().map(|layer| list(&layer.digest)).collect()
}
