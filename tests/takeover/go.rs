//! What the Go snapshotter leaves behind.

use crate::support::command::run;
use soci::bolt::{self, Bucket, Value};
use soci::layout::Layout;
use soci::snapshot::{Info, Kind, Store};
use std::collections::BTreeMap;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, FileExt};
use std::path::Path;
use std::process::Command;

/// One file of the golden archive.
pub fn golden(name: &str) -> Vec<u8> {
    let data = include_bytes!("../data/golden-goroot.tar.gz");
    let mut archive = Vec::new();
    flate2::read::GzDecoder::new(&data[..]).read_to_end(&mut archive).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("golden.tar");
    std::fs::write(&path, archive).unwrap();
    run(Command::new("tar").arg("-C").arg(dir.path()).arg("-xf").arg(path));
    std::fs::read(dir.path().join(name)).unwrap()
}

fn uvarint(mut value: u64) -> Vec<u8> {
    let mut out = Vec::new();
    while value >= 0x80 {
        out.push((value as u8) | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
    out
}

fn time(at: soci::snapshot::Timestamp) -> Vec<u8> {
    let mut out = vec![1];
    out.extend_from_slice(&(at.seconds + 62_135_596_800).to_be_bytes());
    out.extend_from_slice(&at.nanos.to_be_bytes());
    out.extend_from_slice(&(-1i16).to_be_bytes());
    out
}

fn record(info: &Info) -> Bucket {
    let kind = match info.kind {
        Kind::View => 1,
        Kind::Active => 2,
        Kind::Committed => 3,
    };
    let bytes = |name: &str, value: Vec<u8>| (name.as_bytes().to_vec(), Value::Bytes(value));
    let mut entries = BTreeMap::from([
        bytes("id", uvarint(info.id.0.into())),
        bytes("kind", vec![kind]),
        bytes("createdat", time(info.created)),
        bytes("updatedat", time(info.updated)),
    ]);
    entries.extend(info.parent.as_ref().map(|parent| bytes("parent", parent.clone().into_bytes())));
    if info.kind == Kind::Committed {
        // The Go snapshotter counts nothing for what it loads lazily.
        let usage = if info.is_lazy() { Default::default() } else { info.usage };
        entries.extend([bytes("size", uvarint(usage.size << 1)), bytes("inodes", uvarint(usage.inodes << 1))]);
    }
    if !info.labels.is_empty() {
        let labels = info.labels.iter().map(|(key, value)| bytes(key, value.clone().into_bytes())).collect();
        entries.insert(b"labels".to_vec(), Value::Bucket(Bucket { sequence: 0, entries: labels }));
    }
    Bucket { sequence: 0, entries }
}

/// A database with these snapshots.
pub fn write_database(path: &Path, infos: &[Info], sequence: u64) {
    let entries = infos.iter().map(|info| (info.name.clone().into_bytes(), Value::Bucket(record(info)))).collect();
    let nest = |name: &str, bucket| BTreeMap::from([(name.as_bytes().to_vec(), Value::Bucket(bucket))]);
    let v1 = Bucket { sequence: 0, entries: nest("snapshots", Bucket { sequence, entries }) };
    let database = bolt::empty();
    let commit = database.commit(&Bucket { sequence: 0, entries: nest("v1", v1) });
    let file = std::fs::File::create(path).unwrap();
    for (page, bytes) in commit.pages.iter().chain([&commit.meta]) {
        file.write_all_at(bytes, database.offset(*page)).unwrap();
    }
}

/// What of the content store the Go snapshotter has left, too.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// SOCI indexes and zTOCs; it keeps no image manifests.
    Artifacts,
    Nothing,
}

/// Makes of the root of a daemon of ours that has ended one of the Go snapshotter's; its snapshots.
pub fn leave(root: &Path, manifests: &[soci::oci::Digest], content: Content) -> Vec<Info> {
    let layout = Layout::new(root);
    run(Command::new(env!("CARGO_BIN_EXE_soci-mount")).arg("--root").arg(root).arg("--unmount"));
    let store = Store::open(&layout.snapshot_db(), 1, None, || Ok(None), || Ok(())).unwrap();
    let infos = store.page(None, usize::MAX, &|_| true).unwrap();
    let sequence = store.allocate().unwrap().0 - 1;
    drop(store);
    write_database(&layout.go_snapshot_db(), &infos, sequence.into());
    std::fs::remove_file(layout.snapshot_db()).unwrap();
    for path in [root.join("layers"), layout.lazy()] {
        std::fs::remove_dir_all(path).unwrap();
    }
    for path in [layout.settings_kept(), layout.holder_parameters()] {
        let _ = std::fs::remove_file(path);
    }
    match content {
        Content::Nothing => std::fs::remove_dir_all(layout.content()).unwrap(),
        Content::Artifacts => manifests.iter().for_each(|m| drop(std::fs::remove_file(layout.content_blob(m)))),
    }
    for info in infos.iter().filter(|info| info.is_lazy()) {
        std::fs::remove_file(layout.snapshot_lazy_record(info.id)).unwrap();
        let fs = layout.snapshot_fs(info.id);
        std::fs::remove_file(&fs).unwrap();
        std::fs::DirBuilder::new().mode(0o755).create(&fs).unwrap();
        std::fs::DirBuilder::new().mode(0o711).create(layout.snapshot_work(info.id)).unwrap();
        // Its process is gone and so is its descriptor.
        let device = soci::sys::fuse::open_device().unwrap();
        soci::sys::fuse::mount(device.as_fd(), &fs).unwrap();
        drop(device);
        assert_eq!(std::fs::metadata(&fs).unwrap_err().kind(), std::io::ErrorKind::NotConnected);
    }
    infos
}
