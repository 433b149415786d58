//! Who may name whom (`src/lib.rs`): the table is the architecture, this test keeps it.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};
use syn::visit::Visit;

/// For each module of `src/`: the modules of this crate it may name.
const MAY_NAME: &[(&str, &[&str])] = &[
    ("oci", &[]),
    ("layout", &["oci"]),
    ("inflate", &[]),
    ("tar", &[]),
    ("bolt", &[]),
    ("ztoc", &["inflate", "tar", "oci"]),
    ("sys", &[]),
    ("sync", &[]),
    ("notation", &[]),
    ("tls", &["telemetry"]),
    ("registry", &["oci", "keychain", "notation", "tls", "telemetry"]),
    ("keychain", &["oci", "notation", "tls", "telemetry"]),
    ("index", &["oci", "layout", "registry", "ztoc", "telemetry"]),
    ("layers", &["oci", "layout", "registry", "ztoc", "inflate", "tar", "fs", "sys", "sync", "telemetry"]),
    ("fs", &["oci", "layout", "layers", "ztoc", "tar", "telemetry", "sys", "sync"]),
    ("snapshot", &["oci", "layout", "config", "telemetry", "bolt"]),
    ("pull", &["oci", "layout", "registry", "inflate", "snapshot", "telemetry"]),
    ("grpc", &["oci", "layout", "snapshot", "layers", "registry", "keychain"]),
    ("config", &["layout", "oci"]),
    ("telemetry", &["oci", "sys"]),
    ("custodian", &["oci", "layout", "sys", "snapshot", "unpack"]),
    ("unpack", &["oci", "sys", "tar"]),
    ("holder", &["layout", "sys", "fs"]),
    (
        "cli",
        // containerd and registries are what the tool's commands are about.
        &[
            "oci",
            "layout",
            "ztoc",
            "inflate",
            "tar",
            "bolt",
            "index",
            "config",
            "daemon",
            "grpc",
            "registry",
            "keychain",
            "telemetry",
            "sys",
        ],
    ),
    (
        "daemon",
        &[
            "oci",
            "layout",
            "config",
            "telemetry",
            "keychain",
            "registry",
            "index",
            "layers",
            "fs",
            "snapshot",
            "grpc",
            "custodian",
            "holder",
            "pull",
            "sys",
            "ztoc",
        ],
    ),
];

/// Crates that only some modules may name.
const CRATES: &[(&str, &[&str])] = &[
    (
        "tokio",
        &[
            "registry",
            "keychain",
            "index",
            "layers",
            "fs",
            "snapshot",
            "pull",
            "grpc",
            "custodian",
            "telemetry",
            "daemon",
            "cli",
        ],
    ),
    ("reqwest", &["registry", "keychain"]),
    ("rustls", &["tls"]),
    ("x509_cert", &["tls"]),
    ("tonic", &["grpc"]),
    ("fuser", &["fs"]),
    // hosts.toml is not ours: its reader lives with what it decides; and `soci enable` edits containerd's configuration.
    ("toml_edit", &["config", "registry", "cli"]),
    ("redb", &["snapshot"]),
    ("clap", &["cli", "config", "custodian", "holder"]),
];

struct Names(BTreeSet<String>, BTreeSet<String>);

impl Names {
    fn path(&mut self, segments: Vec<String>) {
        match segments.first().map(String::as_str) {
            Some("crate") => {
                if let Some(second) = segments.get(1) {
                    self.0.insert(second.clone());
                }
            }
            Some(first) => {
                self.1.insert(first.to_owned());
            }
            None => {}
        }
    }

    fn tree(&mut self, before: Vec<String>, tree: &syn::UseTree) {
        match tree {
            syn::UseTree::Path(path) => {
                let mut next = before;
                next.push(path.ident.to_string());
                self.tree(next, &path.tree);
            }
            syn::UseTree::Group(group) => group.items.iter().for_each(|item| self.tree(before.clone(), item)),
            syn::UseTree::Name(name) => {
                let mut next = before;
                next.push(name.ident.to_string());
                self.path(next);
            }
            syn::UseTree::Rename(name) => {
                let mut next = before;
                next.push(name.ident.to_string());
                self.path(next);
            }
            syn::UseTree::Glob(_) => self.path(before),
        }
    }
}

impl<'ast> Visit<'ast> for Names {
    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        self.tree(Vec::new(), &item.tree);
    }
    fn visit_path(&mut self, path: &'ast syn::Path) {
        self.path(path.segments.iter().map(|s| s.ident.to_string()).collect());
        syn::visit::visit_path(self, path);
    }
}

fn rust_files(directory: &Path, out: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, out);
        } else if path.extension().is_some_and(|e| e == "rs") {
            out.push(path);
        }
    }
}

fn source() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

fn files_of(module: &str) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let single = source().join(format!("{module}.rs"));
    if single.exists() {
        files.push(single);
    } else {
        rust_files(&source().join(module), &mut files);
    }
    files
}

#[test]
fn modules_name_only_what_the_architecture_lets_them() {
    let known: BTreeSet<&str> = MAY_NAME.iter().map(|(name, _)| *name).collect();
    let mut wrong = Vec::new();
    for (module, allowed) in MAY_NAME {
        for file in files_of(module) {
            let parsed = syn::parse_file(&fs::read_to_string(&file).unwrap()).unwrap();
            let mut names = Names(BTreeSet::new(), BTreeSet::new());
            names.visit_file(&parsed);
            for named in names.0.iter().filter(|n| known.contains(n.as_str()) && n != module) {
                if !allowed.contains(&named.as_str()) {
                    wrong.push(format!("{} names crate::{named}", file.display()));
                }
            }
            for (name, users) in CRATES {
                if names.1.contains(*name) && !users.contains(module) {
                    wrong.push(format!("{} names the crate {name}", file.display()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_module_is_in_the_table() {
    let known: BTreeSet<String> = MAY_NAME.iter().map(|(name, _)| (*name).to_owned()).collect();
    let found: BTreeSet<String> = fs::read_dir(source())
        .unwrap()
        .map(|e| e.unwrap().path().file_stem().unwrap().to_string_lossy().into_owned())
        .filter(|name| name != "bin" && name != "lib")
        .collect();
    assert_eq!(known, found);
}

#[test]
fn unsafe_code_has_one_address_and_one_seam() {
    let mut files = Vec::new();
    rust_files(&source(), &mut files);
    let mut wrong = Vec::new();
    for file in files {
        let relative = file.strip_prefix(source()).unwrap().to_string_lossy().into_owned();
        if relative.starts_with("sys/") || relative == "inflate/raw.rs" {
            continue;
        }
        let text = fs::read_to_string(&file).unwrap();
        let words = text.lines().filter(|l| !l.trim_start().starts_with("//") && !l.contains("forbid(unsafe_code)"));
        if words.flat_map(|l| l.split(|c: char| !c.is_alphanumeric() && c != '_')).any(|word| word == "unsafe") {
            wrong.push(relative);
        }
    }
    assert!(wrong.is_empty(), "unsafe in {wrong:?}");
}

#[test]
fn every_module_forbids_unsafe_code_at_its_head() {
    for (module, _) in MAY_NAME.iter().filter(|(name, _)| !matches!(*name, "sys" | "inflate")) {
        let directory = source().join(module).join("mod.rs");
        let head = if directory.exists() { directory } else { source().join(format!("{module}.rs")) };
        assert!(fs::read_to_string(&head).unwrap().contains("#![forbid(unsafe_code)]"), "{}", head.display());
    }
}
