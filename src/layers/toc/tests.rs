use super::*;
use crate::oci::Digest;

fn entry<'a>(name: &'a str, kind: EntryKind) -> Entry<'a> {
    Entry {
        name: name.as_bytes(),
        kind,
        offset: 1024,
        header: 512,
        size: 0,
        link: b"",
        mode: 0o644,
        uid: 1,
        gid: 2,
        mtime: (1_700_000_000, 5),
        devmajor: 0,
        devminor: 0,
        xattrs: Vec::new(),
    }
}

fn file(name: &str) -> Entry<'_> {
    entry(name, EntryKind::Regular)
}

fn dir(name: &str) -> Entry<'_> {
    Entry { mode: 0o700, ..entry(name, EntryKind::Directory) }
}

fn link<'a>(name: &'a str, kind: EntryKind, target: &'a str) -> Entry<'a> {
    Entry { link: target.as_bytes(), ..entry(name, kind) }
}

fn layer() -> Digest {
    Digest::of(b"layer")
}

fn toc<'a>(entries: impl IntoIterator<Item = Entry<'a>>) -> Toc {
    Toc::from_bytes(build_entries(&layer(), 0, entries).unwrap(), &layer()).unwrap()
}

fn refusal<'a>(entries: impl IntoIterator<Item = Entry<'a>>) -> BuildError {
    build_entries(&layer(), 0, entries).unwrap_err()
}

fn at(toc: &Toc, path: &str) -> Node {
    toc.resolve(path.as_bytes()).and_then(|node| toc.node(node)).unwrap_or_else(|| panic!("no {path}"))
}

fn names(toc: &Toc, path: &str) -> Vec<String> {
    toc.children(at(toc, path).index).map(|(name, _)| String::from_utf8_lossy(name).into_owned()).collect()
}

#[test]
fn names_are_cleaned_as_if_they_were_absolute() {
    let toc = toc([file("./a/b"), file("/c"), file("../d"), file("e//f/../g/"), file("x/./y")]);
    assert_eq!(names(&toc, ""), ["a", "c", "d", "e", "x"]);
    assert_eq!(names(&toc, "e"), ["g"]);
    assert_eq!(names(&toc, "x"), ["y"]);
}

#[test]
fn parents_that_are_not_listed_are_implied_until_they_are() {
    let toc = toc([file("a/b/c"), dir("a/"), file("z")]);
    let (a, b) = (at(&toc, "a"), at(&toc, "a/b"));
    assert!(!a.implied && a.mode == 0o040700 && a.uid == 1);
    assert!(b.implied && b.mode == 0o040755 && b.uid == 0 && b.gid == 0);
    assert_eq!(toc.implied_dirs().collect::<Vec<_>>(), [(ROOT, b"".to_vec()), (b.index, b"a/b".to_vec())]);
}

#[test]
fn a_root_entry_sets_the_attributes_of_the_root_and_makes_no_child() {
    let toc = toc([dir("./"), file("./a")]);
    let root = at(&toc, "");
    assert!(!root.implied && root.mode == 0o040700 && root.uid == 1);
    assert_eq!(names(&toc, ""), ["a"]);
    assert_eq!(refusal([file(".")]), BuildError::Root);
}

#[test]
fn the_last_of_two_members_with_one_name_wins_and_a_directory_listed_twice_keeps_its_children() {
    let toc = toc([
        dir("d"),
        file("d/kept"),
        Entry { mode: 0o1777, ..dir("./d/") },
        Entry { size: 1, ..file("f") },
        Entry { size: 2, ..file("f") },
        dir("gone"),
        file("gone/x"),
        file("gone"),
    ]);
    assert_eq!(at(&toc, "d").mode, 0o041777);
    assert_eq!(names(&toc, "d"), ["kept"]);
    assert_eq!((at(&toc, "f").size, at(&toc, "f").nlink), (2, 1));
    assert_eq!(at(&toc, "gone").kind, Kind::Regular);
    assert_eq!(toc.resolve(b"gone/x"), None);
    assert_eq!(toc.len(), 5, "what was replaced leaves no node");
}

#[test]
fn a_directory_that_came_back_after_being_replaced_is_empty() {
    let toc = toc([file("d/x"), file("d/y"), file("d"), dir("d"), file("d/z")]);
    assert_eq!(names(&toc, "d"), ["z"]);
}

#[test]
fn hard_links_share_a_node_and_count_only_names_that_exist() {
    let toc = toc([
        Entry { size: 7, ..file("a") },
        link("b", EntryKind::Hardlink, "./a"),
        link("sub/c", EntryKind::Hardlink, "/b"),
        file("a"),
    ]);
    let (a, b, c) = (at(&toc, "a"), at(&toc, "b"), at(&toc, "sub/c"));
    assert_eq!(b.index, c.index);
    assert_ne!(a.index, b.index);
    assert_eq!((a.nlink, b.nlink, b.size), (1, 2, 7));
    assert!(b.renamed && !a.renamed);
    assert_eq!(toc.path(b.index), b"b");
    let missing = refusal([link("b", EntryKind::Hardlink, "a"), file("a")]);
    assert_eq!(missing, BuildError::HardlinkTarget { path: "b".into(), target: "a".into() });
    assert!(matches!(refusal([dir("d"), link("b", EntryKind::Hardlink, "d")]), BuildError::HardlinkToDirectory(_)));
}

#[test]
fn directories_count_their_subdirectories_as_links() {
    let toc = toc([dir("a"), dir("a/b"), dir("a/c"), file("a/f"), file("implied/x/y")]);
    assert_eq!(at(&toc, "a").nlink, 4);
    assert_eq!(at(&toc, "").nlink, 4);
    assert_eq!(at(&toc, "implied").nlink, 3);
}

#[test]
fn whiteouts_become_devices_unless_the_layer_has_the_name_itself() {
    let toc = toc([
        file("d/.wh.gone"),
        file("d/.wh.both"),
        file("d/both"),
        file("d/first"),
        file("d/.wh.first"),
        file("o/.wh..wh..opq"),
        file("o/sibling"),
        file(".wh..wh.plnk/1"),
        file(".wh..wh.aufs"),
        file(".wh."),
        file(".wh..."),
    ]);
    assert_eq!(names(&toc, "d"), ["both", "first", "gone"]);
    let gone = at(&toc, "d/gone");
    assert!(gone.whiteout && gone.mode == 0o020000 && gone.rdev == 0 && gone.uid == 0 && gone.nlink == 1);
    assert_eq!(gone.mtime, (1_700_000_000, 5));
    assert!(at(&toc, "d/both").kind == Kind::Regular && at(&toc, "d/first").kind == Kind::Regular);
    assert!(at(&toc, "o").opaque && !at(&toc, "d").opaque);
    assert_eq!(names(&toc, "o"), ["sibling"]);
    assert_eq!(names(&toc, ""), ["d", "o"]);
    assert!(toc.has_opaque() && !toc.has_xattrs());
}

#[test]
fn landmarks_of_other_formats_are_ordinary_files() {
    assert_eq!(names(&toc([file(".prefetch.landmark"), file("stargz.index.json")]), "").len(), 2);
}

#[test]
fn every_kind_keeps_its_attributes() {
    let toc = toc([
        Entry { mode: 0o104755, size: 10, offset: 4096, header: 2048, ..file("suid") },
        link("l", EntryKind::Symlink, "../target"),
        Entry { devmajor: 0x123, devminor: 0x45678, ..entry("c", EntryKind::Char) },
        Entry { devmajor: 8, devminor: 1, ..entry("b", EntryKind::Block) },
        Entry { size: 9, ..entry("p", EntryKind::Fifo) },
        Entry { mtime: (-62_135_596_800, 0), ..dir("d") },
    ]);
    let suid = at(&toc, "suid");
    assert_eq!((suid.mode, suid.size, suid.header()), (0o104755, 10, 2048..4096));
    assert_eq!((at(&toc, "l").size, toc.link_target(at(&toc, "l").index)), (9, &b"../target"[..]));
    assert_eq!(at(&toc, "c").rdev, 0x4561_2378);
    assert_eq!((at(&toc, "b").rdev, at(&toc, "b").kind), (0x801, Kind::Block));
    assert_eq!((at(&toc, "p").kind, at(&toc, "p").size), (Kind::Fifo, 0));
    assert_eq!(at(&toc, "d").mtime.0, -62_135_596_800);
    assert_eq!(toc.files().map(|file| (file.name, file.offset)).collect::<Vec<_>>(), [(&b"suid"[..], 4096)]);
}

#[test]
fn xattrs_are_kept_except_those_that_unpacking_would_not_set() {
    let xattrs: Vec<(&[u8], &[u8])> = vec![
        (b"user.b", b"2\0"),
        (b"security.capability", &[0xff; 20]),
        (b"trusted.overlay.redirect", b"/etc"),
        (b"user.empty", b""),
    ];
    let toc = toc([Entry { xattrs: xattrs.clone(), ..file("f") }, Entry { xattrs, ..file("g") }, file("plain")]);
    let expected: Vec<(&[u8], &[u8])> =
        vec![(b"security.capability", &[0xff; 20]), (b"user.b", b"2\0"), (b"user.empty", b"")];
    for name in ["f", "g"] {
        assert_eq!(toc.xattrs(at(&toc, name).index).collect::<Vec<_>>(), expected);
    }
    assert!(toc.has_xattrs() && !at(&toc, "plain").has_xattrs);
    assert_eq!(toc.xattrs(at(&toc, "plain").index).count(), 0);
}

#[test]
fn what_unpacking_could_not_do_is_refused() {
    let long = "n".repeat(256);
    let deep = "d/".repeat(2049);
    let target = "t".repeat(4096);
    assert!(matches!(refusal([file(&long)]), BuildError::Name(_)));
    assert!(matches!(refusal([file("a\0b")]), BuildError::Name(_)));
    assert!(matches!(refusal([file("x"), file("y"), file("nul\0/b")]), BuildError::Name(_)));
    assert!(matches!(refusal([dir(&deep)]), BuildError::TooDeep(_)));
    assert!(matches!(refusal([link("l", EntryKind::Symlink, &target)]), BuildError::LinkTarget(_)));
    assert!(matches!(refusal([link("l", EntryKind::Symlink, "")]), BuildError::LinkTarget(_)));
    assert!(matches!(refusal([file("f"), file("f/x")]), BuildError::NotADirectory(_)));
    assert!(matches!(
        refusal([link("l", EntryKind::Symlink, "d"), dir("d"), file("l/x")]),
        BuildError::NotADirectory(_)
    ));
    assert!(matches!(refusal([Entry { header: 2000, ..file("f") }]), BuildError::Offsets(_)));
    assert!(matches!(refusal([Entry { size: u64::MAX, ..file("f") }]), BuildError::Offsets(_)));
    assert!(matches!(refusal([Entry { devmajor: 4096, ..entry("c", EntryKind::Char) }]), BuildError::Device(_)));
    let big = vec![0; 65537];
    assert!(matches!(refusal([Entry { xattrs: vec![(b"user.x", &big)], ..file("f") }]), BuildError::Xattr(_)));
}

#[test]
fn the_file_is_a_pure_function_of_the_members() {
    let entries = || (0..500).map(|n| format!("d{}/f{}", n % 7, n)).collect::<Vec<_>>();
    let (one, two) = (entries(), entries());
    let build_of = |names: &[String]| build_entries(&layer(), 0, names.iter().map(|name| file(name))).unwrap();
    assert_eq!(build_of(&one), build_of(&two));
}

#[test]
fn a_directorys_children_are_sorted_neighbours() {
    let toc = toc([file("b/2"), file("a/1"), file("b/1"), file("c")]);
    assert_eq!(names(&toc, ""), ["a", "b", "c"]);
    let numbers: Vec<u32> = toc.children(ROOT).map(|(_, node)| node).collect();
    assert_eq!(numbers, [1, 2, 3]);
    for (name, node) in toc.children(at(&toc, "b").index) {
        assert_eq!(toc.lookup(at(&toc, "b").index, name), Some(node));
        assert_eq!(toc.path(node), [b"b/", name].concat());
    }
    assert_eq!(toc.children(at(&toc, "c").index).len(), 0);
    assert_eq!(toc.lookup(at(&toc, "c").index, b"x"), None);
}

#[test]
fn a_changed_byte_anywhere_is_noticed() {
    let bytes = build_entries(&layer(), 0, [file("a/b"), link("l", EntryKind::Symlink, "t")]).unwrap();
    for at in 0..bytes.len() {
        let mut changed = bytes.clone();
        changed[at] ^= 1;
        assert!(Toc::from_bytes(changed, &layer()).is_err(), "byte {at}");
    }
    for len in 0..bytes.len() {
        assert!(Toc::from_bytes(bytes[..len].to_vec(), &layer()).is_err(), "length {len}");
    }
    let other = Toc::from_bytes(bytes, &Digest::of(b"other"));
    assert!(matches!(other, Err(OpenError::OtherLayer(digest)) if digest == layer()));
}

#[test]
fn records_that_lie_under_a_right_checksum_cause_no_panic() {
    use super::format::{HEADER_LEN, Header};
    use zerocopy::{FromBytes, IntoBytes};
    let clean = build_entries(&layer(), 0, [file("a/b"), link("l", EntryKind::Symlink, "t")]).unwrap();
    let mut seed = 1u64;
    for _ in 0..20_000 {
        let mut bytes = clean.clone();
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let at = HEADER_LEN + (seed >> 33) as usize % (bytes.len() - HEADER_LEN);
        bytes[at] = (seed >> 20) as u8;
        let crc = crc32fast::hash(&bytes[HEADER_LEN..]);
        let header = Header::mut_from_bytes(&mut bytes[..HEADER_LEN]).unwrap();
        header.body_crc = crc.into();
        header.header_crc = crc32fast::hash(&header.as_bytes()[..HEADER_LEN - 4]).into();
        let toc = Toc::from_bytes(bytes, &layer()).unwrap();
        for node in 0..toc.len() + 1 {
            let _ = (toc.node(node), toc.path(node), toc.link_target(node), toc.xattrs(node).count());
            let _ = (toc.children(node).count(), toc.lookup(node, b"b"), toc.name(node));
        }
        let _ = (toc.files().count(), toc.implied_dirs().count(), toc.resolve(b"a/b"));
    }
}

#[test]
fn a_million_files_are_built_within_seconds_and_opened_within_milliseconds() {
    // The promise (3 s, 50 ms) is for a release build; this one is looser so that it holds on any machine.
    let names: Vec<String> =
        (0..1_000_000).map(|n| format!("./usr/lib/package-{}/directory-{}/file-{n}", n / 1000, n / 50)).collect();
    let started = std::time::Instant::now();
    let bytes = build_entries(&layer(), 0, names.iter().map(|name| file(name))).unwrap();
    let built = started.elapsed();
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("toc");
    std::fs::write(&path, &bytes).unwrap();
    let started = std::time::Instant::now();
    let toc = Toc::open(&path, &layer()).unwrap();
    let opened = started.elapsed();
    eprintln!("{} bytes, built in {built:?}, opened in {opened:?}", bytes.len());
    assert_eq!(at(&toc, "usr/lib/package-999/directory-19999/file-999999").kind, Kind::Regular);
    assert!(built.as_secs() < 30 && opened.as_secs() < 2);
}
