//! The same tars unpacked by containerd and by us: the trees must be the same, layer by layer, whiteouts and implied directories included.

use super::{
    super::lab::{Lab, block_on},
    KERNELS, PLENTY, unpack,
};
use crate::support::{
    command::output,
    containerd::{Containerd, Options, Version},
    image::{Form, Image, Kind, Layer, MTIME, everything},
    slot::Slot,
    tree,
};
use proptest::{prelude::*, strategy::ValueTree, test_runner::TestRunner};
use soci::{
    custodian::{DirectoryAttributes, Found, Lower, Place},
    layout::SnapshotId,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsStr,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

/// Layers per image, images per containerd: what a minute has room for.
const LAYERS: usize = 16;
const IMAGES: usize = 4;

/// An entry as it is drawn; whether it makes sense depends on those before it.
#[derive(Debug, Clone)]
struct Draft {
    path: Vec<u8>,
    what: What,
    mode: u32,
    owner: (u32, u32),
    mtime: (i64, u32),
    xattr: bool,
}

#[derive(Debug, Clone)]
enum What {
    File(usize),
    Directory,
    Symlink,
    /// To the file that was drawn so many before.
    Hardlink(prop::sample::Index),
    Char,
    Block,
    Fifo,
    Whiteout,
    Opaque,
}

fn drafts() -> impl Strategy<Value = Vec<Draft>> {
    let what = prop_oneof![
        4 => (0usize..300_000).prop_map(What::File),
        4 => Just(What::Directory),
        2 => Just(What::Symlink),
        2 => any::<prop::sample::Index>().prop_map(What::Hardlink),
        1 => Just(What::Char),
        1 => Just(What::Block),
        1 => Just(What::Fifo),
        2 => Just(What::Whiteout),
        1 => Just(What::Opaque),
    ];
    let mode = prop::sample::select(vec![0o644, 0o755, 0o600, 0o4755, 0o2755, 0o1777, 0o2770, 0o000]);
    let owner = prop::sample::select(vec![(0, 0), (0, 42), (1000, 1000), (4_000_000_000, 3)]);
    let mtime = (0..2 * MTIME, 0..1_000_000_000u32);
    // Directories have names of their own: containerd fails where a layer implies a directory below what is none in a layer underneath.
    let above = prop::collection::vec(prop::sample::select(vec!["a", "b", "c", "usr", "tmp"]), 1..4);
    let leaf = prop::sample::select(vec!["f", "g", "h", "gone"]);
    let draft = (above, leaf, what, mode, owner, mtime, any::<bool>()).prop_map(
        |(mut parts, leaf, what, mode, owner, mtime, xattr)| {
            if !matches!(what, What::Directory | What::Opaque) {
                parts.push(leaf);
            }
            Draft { path: parts.join("/").into_bytes(), what, mode, owner, mtime, xattr }
        },
    );
    prop::collection::vec(draft, 1..60)
}

/// What of a draft both sides understand: nothing goes through links or files (we refuse that), hard links go to files that are there, no whiteout names
/// what its own layer has (containerd fails then), no directory is listed after what is in it (containerd then adds its attributes to those of a lower
/// layer's), nothing but a directory takes a directory's place (containerd gives it the directory's time), and
/// the bottom layer hides nothing (containerd takes that for an order to remove what it has just made).
fn layer(drafts: &[Draft], place: Place) -> Layer {
    let mut layer = Layer::new().form(Form::Tar);
    // Paths that are there, and whether they are directories.
    let mut there: BTreeMap<PathBuf, bool> = BTreeMap::new();
    let mut listed: BTreeSet<PathBuf> = BTreeSet::new();
    let mut whiteouts: BTreeSet<PathBuf> = BTreeSet::new();
    for draft in drafts {
        let path = Path::new(OsStr::from_bytes(&draft.path)).to_owned();
        let blocked =
            path.ancestors().skip(1).any(|above| there.get(above) == Some(&false) || whiteouts.contains(above));
        let hidden = matches!(draft.what, What::Whiteout) && (there.contains_key(&path) || whiteouts.contains(&path));
        let hides = matches!(draft.what, What::Whiteout | What::Opaque);
        let replaces = there.get(&path) == Some(&true) && !hides && !matches!(draft.what, What::Directory);
        let late = matches!(draft.what, What::Directory) && there.contains_key(&path) && !listed.contains(&path);
        if blocked || hidden || replaces || late || (hides && place == Place::Bottom) {
            continue;
        }
        let files: Vec<&PathBuf> =
            there.iter().filter(|(at, directory)| !**directory && **at != path).map(|(at, _)| at).collect();
        let kind = match &draft.what {
            What::File(size) => Kind::File(vec![b'x'; *size]),
            What::Directory => Kind::Directory,
            What::Symlink => Kind::Symlink(b"../somewhere/else".to_vec()),
            What::Hardlink(_) if files.is_empty() => continue,
            What::Hardlink(index) => Kind::Hardlink(index.get(&files).as_os_str().as_bytes().to_vec()),
            What::Char => Kind::Char(1, 3),
            What::Block => Kind::Block(7, 1),
            What::Fifo => Kind::Fifo,
            What::Whiteout | What::Opaque => Kind::File(Vec::new()),
        };
        for above in path.ancestors().skip(1).filter(|above| *above != Path::new("")) {
            there.insert(above.to_owned(), true);
        }
        let name = path.file_name().expect("a name").as_bytes();
        let beside = |name: &[u8]| path.parent().expect("a parent").join(OsStr::from_bytes(name));
        let written = match draft.what {
            What::Whiteout => {
                whiteouts.insert(path.clone());
                beside(&[b".wh.", name].concat())
            }
            What::Opaque => beside(b".wh..wh..opq"),
            _ => {
                whiteouts.remove(&path);
                there.insert(path.clone(), matches!(draft.what, What::Directory));
                if matches!(draft.what, What::Directory) {
                    listed.insert(path.clone());
                }
                path.clone()
            }
        };
        let entry = layer.add(written.as_os_str().as_bytes(), kind);
        entry.owner(draft.owner.0, draft.owner.1).mtime(draft.mtime.0, draft.mtime.1);
        if !matches!(draft.what, What::Symlink) {
            entry.mode(draft.mode);
        }
        if draft.xattr && matches!(draft.what, What::File(_) | What::Directory) {
            entry.xattr("user.drawn", b"\x00yes").xattr("trusted.never", b"x");
            let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
            if matches!(draft.what, What::File(_)) {
                entry.xattr("security.capability", &capability);
            }
        }
    }
    layer
}

/// What containerd made of an image: its layers' directories, bottom first.
fn unpacked_by_containerd(containerd: &Containerd, image: &Image, name: &str, work: &Path) -> Vec<PathBuf> {
    let layout = work.join(name);
    image.write(&layout);
    let archive = work.join(format!("{name}.tar"));
    output(std::process::Command::new("tar").arg("-C").arg(&layout).arg("-cf").arg(&archive).arg("."));
    let mut import = containerd.ctr();
    import.args(["images", "import", "--snapshotter", "overlayfs", "--base-name", name]).arg(archive);
    output(&mut import);
    let top = containerd.chain_id("default", &format!("{name}:latest"));
    let mut snapshots = containerd.ctr();
    let mounts = output(snapshots.args([
        "snapshots",
        "--snapshotter",
        "overlayfs",
        "view",
        "--mounts",
        &format!("view-{name}"),
        &top,
    ]));
    let lower =
        mounts.split([',', ' ', '"', '\n']).find_map(|word| word.strip_prefix("lowerdir=")).expect("an overlay");
    lower.trim().split(':').rev().map(PathBuf::from).collect()
}

/// The directories that a layer's tar implies, the root, and whiteouts: their time is that of the unpacking.
fn own_time(layer: &Layer) -> BTreeSet<PathBuf> {
    let names: Vec<PathBuf> = layer.entries.iter().map(|entry| OsStr::from_bytes(&entry.path).into()).collect();
    let hidden = |name: &PathBuf| {
        let hidden = name.file_name()?.as_bytes().strip_prefix(b".wh.")?;
        Some(name.with_file_name(OsStr::from_bytes(hidden)))
    };
    let whiteouts: Vec<PathBuf> = names.iter().filter_map(hidden).collect();
    let mut free = tree::implied_directories(&[names]);
    free.extend(whiteouts);
    free
}

/// Unpacks an image's layers with our custodian, in the snapshots from `first` on.
fn unpack_here(lab: &Lab, client: &soci::custodian::Client, image: &Image, first: u32) -> Vec<PathBuf> {
    let mut made = Vec::new();
    for (number, layer) in (first..).zip(&image.layers) {
        let mut tar = Vec::new();
        let layer = Layer { entries: layer.entries.clone(), form: Form::Tar };
        layer.write(&mut tar).expect("written");
        let place = if number == first { Place::Bottom } else { Place::Above };
        let path = lab.fs(number);
        unpack(client, number, tar, place, PLENTY).expect("unpacked");
        let parents: Vec<Lower<'_>> = (first..number).rev().map(|below| Lower::Unpacked(SnapshotId(below))).collect();
        block_on(client.publish(SnapshotId(number), &parents)).expect("published");
        made.push(path);
    }
    made
}

#[test]
fn privileged_proptest_what_containerd_unpacks_we_unpack_alike() {
    let slot = Slot::take();
    let root = slot.root();
    let containerd = Containerd::start(&root, Version::V16, &Options::default());
    let mut runner = TestRunner::new(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() });
    let mut images = vec![everything(1)];
    for _ in 0..IMAGES {
        let drawn = prop::collection::vec(drafts(), LAYERS).new_tree(&mut runner).expect("drawn").current();
        let place = |number| if number == 0 { Place::Bottom } else { Place::Above };
        let layers = drawn.iter().enumerate().map(|(number, drafts)| layer(drafts, place(number)));
        images.push(Image::new(layers.collect()));
    }
    for (number, image) in images.iter().enumerate() {
        let theirs = unpacked_by_containerd(&containerd, image, &format!("drawn{number}"), &root.dir("images"));
        assert_eq!(theirs.len(), image.layers.len());
        for arguments in KERNELS {
            let lab = Lab::new();
            let _unit = lab.as_a_unit(arguments);
            let ours = unpack_here(&lab, &lab.client(), image, 1);
            for ((theirs, ours), layer) in theirs.iter().zip(&ours).zip(&image.layers) {
                let differences = tree::differences(&tree::read(theirs), &tree::read(ours), &own_time(layer));
                assert_eq!(
                    differences,
                    Vec::<String>::new(),
                    "image {number}, {arguments:?}: {:#?}",
                    layer
                        .entries
                        .iter()
                        .map(|e| (String::from_utf8_lossy(&e.path).into_owned(), e.mode))
                        .collect::<Vec<_>>()
                );
            }
        }
    }
}

#[test]
fn privileged_implied_directories_look_like_the_nearest_layer_that_has_them_lazy_ones_included() {
    for arguments in KERNELS {
        let lab = Lab::new();
        let _unit = lab.as_a_unit(arguments);
        let client = lab.client();
        let mut bottom = Layer::new();
        bottom.dir("tmp").mode(0o1777).mtime(MTIME, 5);
        bottom.dir("secret").mode(0o700).owner(1000, 1000);
        bottom.dir("secret/inner").mode(0o2711).owner(1000, 1001).xattr("user.note", b"kept");
        bottom.dir("hidden-by-lazy").mode(0o711);
        bottom.dir("both").mode(0o701);
        unpack_here(&lab, &client, &Image::new(vec![bottom]), 1);
        // Lazy: a link to where nobody ever answers. Whoever followed it would see this directory instead.
        std::fs::create_dir_all(lab.layout.snapshot(SnapshotId(2))).expect("mkdir");
        std::fs::create_dir_all(lab.layout.lazy().join("2/tmp")).expect("mkdir");
        std::os::unix::fs::symlink(
            soci::layout::Layout::lazy_link(SnapshotId(2)),
            lab.layout.snapshot_fs(SnapshotId(2)),
        )
        .expect("symlink");
        let lazy = |path: &[u8]| match path {
            b"both" => Found::Directory(DirectoryAttributes {
                mode: 0o3750,
                uid: 7,
                gid: 8,
                mtime: (MTIME + 1, 2),
                xattrs: vec![(b"user.lazy".to_vec(), b"yes".to_vec())],
            }),
            b"hidden-by-lazy" => Found::SomethingElse,
            _ => Found::Nothing,
        };
        let mut top = Layer::new().form(Form::Tar);
        for name in ["tmp/f", "secret/inner/f", "hidden-by-lazy/f", "both/f", "nowhere/f"] {
            top.file(name, "x");
        }
        let mut tar = Vec::new();
        top.write(&mut tar).expect("written");
        let path = lab.fs(3);
        unpack(&client, 3, tar, Place::Above, PLENTY).expect("unpacked");
        let parents = [Lower::Lazy(SnapshotId(2), &lazy), Lower::Unpacked(SnapshotId(1))];
        block_on(client.publish(SnapshotId(3), &parents)).expect("published");
        let made = tree::read(&path);
        let look = |name: &str| {
            let node = &made[Path::new(name)];
            (node.mode, node.owner)
        };
        assert_eq!(look("tmp"), (0o1777, (0, 0)));
        assert_eq!(made[Path::new("tmp")].mtime, (MTIME, 5));
        assert_eq!(look("secret"), (0o700, (1000, 1000)));
        assert_eq!(look("secret/inner"), (0o2711, (1000, 1001)));
        assert_eq!(made[Path::new("secret/inner")].xattrs.len(), 1);
        assert_eq!(look("both"), (0o3750, (7, 8)));
        assert_eq!(made[Path::new("both")].xattrs.len(), 1);
        assert_eq!(look("hidden-by-lazy"), (0o755, (0, 0)));
        assert_eq!(look("nowhere"), (0o755, (0, 0)));
    }
}
