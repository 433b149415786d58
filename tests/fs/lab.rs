//! A tar in memory, a layer that can be told to keep its readers waiting, and a mount that never outlives its test.

use crate::support::leaks;
use bytes::Bytes;
use nix::mount::{MntFlags, MsFlags};
use soci::fs::wire::{Resend, answer_init};
use soci::fs::{
    Connection, HeaderCheck, InitParams, Journal, LayerData, LazyLayer, Nobody, Observer, OpaqueMark, ReadError,
    Session, SessionOptions, Tree, Xattrs,
};
use soci::layers::toc::{self, Entry, EntryKind, Toc};
use soci::layout::SnapshotId;
use soci::oci::Digest;
use std::collections::HashMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use std::{future::Future, ops::Range, pin::Pin};
use tokio::sync::watch;

/// A member of the tar, and where it came to lie.
#[derive(Clone)]
pub struct Member {
    pub name: String,
    pub kind: EntryKind,
    pub link: String,
    pub content: Vec<u8>,
    pub mode: u32,
    pub owner: (u32, u32),
    pub mtime: (i64, u32),
    pub device: (u32, u32),
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub header: u64,
    pub offset: u64,
}

impl Member {
    pub fn new(name: &str, kind: EntryKind) -> Member {
        Member {
            name: name.into(),
            kind,
            link: String::new(),
            content: Vec::new(),
            mode: 0o644,
            owner: (0, 0),
            mtime: (1_600_000_000, 0),
            device: (0, 0),
            xattrs: Vec::new(),
            header: 0,
            offset: 0,
        }
    }
    pub fn file(name: &str, content: impl Into<Vec<u8>>) -> Member {
        Member { content: content.into(), ..Member::new(name, EntryKind::Regular) }
    }
    pub fn dir(name: &str, mode: u32) -> Member {
        Member { mode, ..Member::new(name, EntryKind::Directory) }
    }
    pub fn link(name: &str, kind: EntryKind, target: &str) -> Member {
        Member { link: target.into(), mode: 0o777, ..Member::new(name, kind) }
    }
}

/// Bytes that differ from place to place.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .collect()
}

/// A tar as bytes, with the list of its members.
pub struct Tar {
    pub bytes: Vec<u8>,
    pub members: Vec<Member>,
}

impl Tar {
    pub fn new(members: impl IntoIterator<Item = Member>) -> Tar {
        let mut tar = Tar { bytes: Vec::new(), members: Vec::new() };
        members.into_iter().for_each(|member| tar.push(member));
        tar.bytes.resize(tar.bytes.len() + 1024, 0);
        tar
    }

    fn push(&mut self, mut member: Member) {
        member.header = self.bytes.len() as u64;
        let mut records = Vec::new();
        let mut record = |key: &[u8], value: &[u8]| {
            let bare = key.len() + value.len() + 3;
            let mut len = bare + bare.to_string().len();
            len = bare + len.to_string().len();
            records.extend_from_slice(format!("{len} ").as_bytes());
            records.extend_from_slice(&[key, b"=", value, b"\n"].concat());
        };
        if member.name.len() > 100 {
            record(b"path", member.name.as_bytes());
        }
        if member.mtime.1 != 0 || member.mtime.0 < 0 {
            let nanos = i128::from(member.mtime.0) * 1_000_000_000 + i128::from(member.mtime.1);
            let (sign, nanos) = (if nanos < 0 { "-" } else { "" }, nanos.unsigned_abs());
            record(b"mtime", format!("{sign}{}.{:09}", nanos / 1_000_000_000, nanos % 1_000_000_000).as_bytes());
        }
        for (name, value) in &member.xattrs {
            record(&[b"SCHILY.xattr.", &name[..]].concat(), value);
        }
        if !records.is_empty() {
            self.header("pax", b'x', &records, &Member::new("", EntryKind::Regular));
            self.data(&records);
        }
        let flag = match member.kind {
            EntryKind::Regular => b'0',
            EntryKind::Hardlink => b'1',
            EntryKind::Symlink => b'2',
            EntryKind::Char => b'3',
            EntryKind::Block => b'4',
            EntryKind::Directory => b'5',
            EntryKind::Fifo => b'6',
        };
        let name = member.name.chars().take(100).collect::<String>();
        self.header(&name, flag, &member.content, &member);
        member.offset = self.bytes.len() as u64;
        self.data(&member.content);
        self.members.push(member);
    }

    fn header(&mut self, name: &str, flag: u8, content: &[u8], member: &Member) {
        let mut block = [0u8; 512];
        let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, name.as_bytes());
        put(100, format!("{:07o}", member.mode & 0o7777).as_bytes());
        put(108, format!("{:07o}", member.owner.0).as_bytes());
        put(116, format!("{:07o}", member.owner.1).as_bytes());
        put(124, format!("{:011o}", content.len()).as_bytes());
        put(136, format!("{:011o}", member.mtime.0.max(0)).as_bytes());
        put(148, b"        ");
        put(156, &[flag]);
        put(157, member.link.as_bytes());
        put(257, b"ustar\x0000");
        put(329, format!("{:07o}", member.device.0).as_bytes());
        put(337, format!("{:07o}", member.device.1).as_bytes());
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.bytes.extend_from_slice(&block);
    }

    fn data(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
    }

    pub fn toc(&self, layer: &Digest) -> Toc {
        let entries = self.members.iter().map(|member| Entry {
            name: member.name.as_bytes(),
            kind: member.kind,
            offset: member.offset,
            header: member.header,
            size: member.content.len() as u64,
            link: member.link.as_bytes(),
            mode: member.mode,
            uid: member.owner.0,
            gid: member.owner.1,
            mtime: member.mtime,
            devmajor: member.device.0,
            devminor: member.device.1,
            xattrs: member.xattrs.iter().map(|(name, value)| (&name[..], &value[..])).collect(),
        });
        Toc::from_bytes(toc::build_entries(layer, 0, entries).unwrap(), layer).unwrap()
    }

    /// What `tar` makes of it.
    pub fn unpack(&self, into: &Path) {
        use std::io::Write;
        let mut tar = std::process::Command::new("tar")
            .args(["--extract", "--preserve-permissions", "--same-owner", "--numeric-owner", "--xattrs"])
            .args(["--xattrs-include=*", "--delay-directory-restore", "--directory"])
            .arg(into)
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        tar.stdin.take().unwrap().write_all(&self.bytes).unwrap();
        assert!(tar.wait().unwrap().success());
    }
}

/// Where a layer's bytes are.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Place {
    Memory,
    Disk,
}

/// A layer's bytes; reads wait while the gate is shut.
pub struct Source {
    bytes: Bytes,
    place: Place,
    digest: Digest,
    gate: watch::Sender<bool>,
    pub waiting: AtomicUsize,
    pub dropped: AtomicUsize,
    pub served: AtomicU64,
    pub failing: Mutex<Option<ReadError>>,
}

impl Source {
    pub fn new(bytes: &[u8], place: Place) -> Arc<Source> {
        Arc::new(Source {
            bytes: Bytes::copy_from_slice(bytes),
            place,
            digest: Digest::of(bytes),
            gate: watch::channel(true).0,
            waiting: AtomicUsize::new(0),
            dropped: AtomicUsize::new(0),
            served: AtomicU64::new(0),
            failing: Mutex::new(None),
        })
    }
    pub fn shut(&self) {
        self.gate.send_replace(false);
    }
    pub fn open(&self) {
        self.gate.send_replace(true);
    }
    fn slice(&self, range: &Range<u64>) -> Bytes {
        self.served.fetch_add(range.end - range.start, Ordering::SeqCst);
        self.bytes.slice(range.start as usize..range.end as usize)
    }
    pub fn until_waiting(&self, readers: usize) {
        until("readers wait", || self.waiting.load(Ordering::SeqCst) >= readers);
    }
}

struct Leave<'a>(&'a Source, bool);

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::SeqCst);
        if !self.1 {
            self.0.dropped.fetch_add(1, Ordering::SeqCst);
        }
    }
}

impl LayerData for Source {
    fn try_read(&self, range: Range<u64>) -> Option<Bytes> {
        (self.place == Place::Memory && *self.gate.borrow()).then(|| self.slice(&range))
    }
    fn read(&self, range: Range<u64>) -> Pin<Box<dyn Future<Output = Result<Bytes, ReadError>> + Send + '_>> {
        Box::pin(async move {
            self.waiting.fetch_add(1, Ordering::SeqCst);
            let mut leave = Leave(self, false);
            self.gate.subscribe().wait_for(|open| *open).await.unwrap();
            leave.1 = true;
            match self.failing.lock().unwrap().clone() {
                Some(error) => Err(error),
                None => Ok(self.slice(&range)),
            }
        })
    }
    fn fetched(&self) -> u64 {
        self.served.load(Ordering::SeqCst).min(self.compressed_size())
    }
    fn compressed_size(&self) -> u64 {
        self.bytes.len() as u64
    }
    fn digest(&self) -> Digest {
        self.digest
    }
}

pub fn layer(id: u32, tar: &Tar, data: &Arc<Source>) -> LazyLayer {
    LazyLayer {
        id: SnapshotId(id),
        toc: Arc::new(tar.toc(&data.digest())),
        implied: HashMap::new(),
        data: data.clone(),
        headers: HeaderCheck::Required,
        xattrs: Xattrs::Shown,
        maps: None,
    }
}

/// Waits for something that is bound to happen soon.
pub fn until(what: &str, mut happened: impl FnMut() -> bool) {
    for _ in 0..1000 {
        if happened() {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    panic!("{what}: not within 5 s");
}

/// A FUSE mount with a session; unmounted, and its connection closed, when the test ends in whatever way.
pub struct Mount {
    pub tree: Arc<Tree>,
    pub init: InitParams,
    pub runtime: tokio::runtime::Runtime,
    session: Option<Session>,
    device: Option<OwnedFd>,
    /// Of a kernel that cannot repeat requests, or is treated as one.
    pub journal: Option<OwnedFd>,
    home: tempfile::TempDir,
}

impl Mount {
    pub fn new() -> Mount {
        Mount::observed(Arc::new(Nobody))
    }

    pub fn observed(observer: Arc<dyn Observer>) -> Mount {
        let mut mount = Mount::unserved(observer, Resend::Wanted);
        mount.serve(Connection::First);
        mount
    }

    pub fn unserved(observer: Arc<dyn Observer>, resend: Resend) -> Mount {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("lazy");
        std::fs::create_dir(&path).unwrap();
        let file = std::fs::File::options().read(true).write(true).open("/dev/fuse").unwrap();
        let options =
            format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions", file.as_raw_fd());
        nix::mount::mount(Some("soci"), &path, Some("fuse.rawBridge"), MsFlags::MS_RDONLY, Some(&options[..])).unwrap();
        leaks::watch_connection(&path);
        let device = OwnedFd::from(file);
        let mut request = vec![0; 65536];
        let len = rustix::io::read(&device, &mut request[..]).unwrap();
        let (init, reply) = answer_init(&request[..len], resend).unwrap();
        let journal = (!init.can_resend()).then(|| soci::sys::shared::create("test", soci::fs::journal::SIZE).unwrap());
        assert_eq!(rustix::io::write(&device, &reply).unwrap(), reply.len());
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let tree = Arc::new(Tree::new(OpaqueMark::Trusted, observer));
        Mount { tree, init, runtime, session: None, device: Some(device), journal, home }
    }

    pub fn duplicate(&self) -> OwnedFd {
        self.device.as_ref().unwrap().try_clone().unwrap()
    }

    pub fn serve(&mut self, connection: Connection) {
        let journal = self.journal.as_ref().map(|file| Journal::open(file).unwrap());
        let options = SessionOptions { connection, journal, ..SessionOptions::default() };
        let (tree, handle) = (self.tree.clone(), self.runtime.handle().clone());
        self.session = Some(Session::start(self.duplicate(), self.init, tree, handle, options).unwrap());
    }

    pub fn session(&self) -> &Session {
        self.session.as_ref().unwrap()
    }

    pub fn stop(&mut self, patience: Duration) -> soci::fs::Drained {
        self.session.take().unwrap().stop(patience)
    }

    pub fn path(&self) -> PathBuf {
        self.home.path().join("lazy")
    }

    /// Root of a layer.
    pub fn at(&self, id: u32) -> PathBuf {
        self.path().join(id.to_string())
    }

    /// A directory beside the mount.
    pub fn beside(&self, name: &str) -> PathBuf {
        let path = self.home.path().join(name);
        std::fs::create_dir_all(&path).unwrap();
        path
    }

    pub fn unmount(&self) {
        let _ = nix::mount::umount2(&self.path(), MntFlags::MNT_DETACH);
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        self.unmount();
        drop(self.session.take());
        // The last descriptor: whoever still waits gets an error.
        drop(self.device.take());
        leaks::check(self.home.path());
    }
}

/// An overlay mount that goes away with its test.
pub struct Overlay(pub PathBuf);

impl Overlay {
    pub fn new(at: PathBuf, lower: &[PathBuf]) -> Overlay {
        let lower: Vec<_> = lower.iter().map(|path| path.to_str().unwrap()).collect();
        let options = format!("lowerdir={}", lower.join(":"));
        nix::mount::mount(Some("overlay"), &at, Some("overlay"), MsFlags::empty(), Some(&options[..])).unwrap();
        Overlay(at)
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, MntFlags::MNT_DETACH);
    }
}
