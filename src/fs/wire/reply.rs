//! Answers, as the bytes to write to the device.

use super::abi::{
    Attr, AttrOut, Dirent, EntryOut, InvalInodeOut, NOTIFY_INVAL_INODE, NOTIFY_RESEND, OutHeader, StatfsOut, XattrSize,
};
use rustix::io::Errno;
use zerocopy::IntoBytes;

const HEADER_LEN: usize = size_of::<OutHeader>();

/// How long the kernel may use an answer without asking again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ttl {
    /// A year: what is said about a layer is true for ever, but some kernels multiply by HZ.
    Forever,
    None,
}

impl Ttl {
    fn seconds(self) -> u64 {
        match self {
            Ttl::Forever => 31_536_000,
            Ttl::None => 0,
        }
    }
}

/// An answer under construction in a reusable buffer: room for the header first, then the body.
pub struct Reply<'a> {
    buffer: &'a mut Vec<u8>,
    unique: u64,
}

impl<'a> Reply<'a> {
    pub fn new(buffer: &'a mut Vec<u8>, unique: u64) -> Reply<'a> {
        buffer.clear();
        buffer.resize(HEADER_LEN, 0);
        Reply { buffer, unique }
    }

    fn finish(self, error: i32) {
        let len = u32::try_from(self.buffer.len()).unwrap_or(u32::MAX);
        let header = OutHeader { len, error, unique: self.unique };
        self.buffer[..HEADER_LEN].copy_from_slice(header.as_bytes());
    }

    pub fn error(self, errno: Errno) {
        self.buffer.truncate(HEADER_LEN);
        self.finish(-errno.raw_os_error());
    }

    pub fn ok(self) {
        self.finish(0);
    }

    pub fn bytes(self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
        self.finish(0);
    }

    pub fn entry(self, nodeid: u64, attr: Attr, entry_ttl: Ttl, attr_ttl: Ttl) {
        self.bytes(entry(nodeid, attr, entry_ttl, attr_ttl).as_bytes());
    }

    /// There is no such name, and never will be.
    pub fn no_entry_forever(self) {
        self.entry(0, Attr::default(), Ttl::Forever, Ttl::None);
    }

    pub fn attr(self, attr: Attr, ttl: Ttl) {
        self.bytes(AttrOut { attr_valid: ttl.seconds(), attr_valid_nsec: 0, dummy: 0, attr }.as_bytes());
    }

    pub fn statfs(self, statfs: StatfsOut) {
        self.bytes(statfs.as_bytes());
    }

    /// The length of an xattr, or of the list of their names.
    pub fn xattr_size(self, size: u32) {
        self.bytes(XattrSize { size, padding: 0 }.as_bytes());
    }

    /// A listing of at most `max` bytes.
    pub fn listing(self, max: u32, fill: impl FnOnce(&mut DirBuffer<'_>)) {
        let end = HEADER_LEN + max as usize;
        fill(&mut DirBuffer { buffer: self.buffer, end });
        self.finish(0);
    }
}

fn entry(nodeid: u64, attr: Attr, entry_ttl: Ttl, attr_ttl: Ttl) -> EntryOut {
    EntryOut {
        nodeid,
        generation: 0,
        entry_valid: entry_ttl.seconds(),
        attr_valid: attr_ttl.seconds(),
        entry_valid_nsec: 0,
        attr_valid_nsec: 0,
        attr,
    }
}

/// The body of a READDIR or READDIRPLUS answer. Each `add` says whether the entry still fitted.
pub struct DirBuffer<'a> {
    buffer: &'a mut Vec<u8>,
    end: usize,
}

impl DirBuffer<'_> {
    fn dirent(&mut self, prefix: &[u8], ino: u64, mode: u32, next: u64, name: &[u8]) -> bool {
        let len = (prefix.len() + size_of::<Dirent>() + name.len()).next_multiple_of(8);
        if self.buffer.len() + len > self.end {
            return false;
        }
        let namelen = u32::try_from(name.len()).unwrap_or(0);
        let full = self.buffer.len() + len;
        self.buffer.extend_from_slice(prefix);
        self.buffer.extend_from_slice(Dirent { ino, off: next, namelen, kind: mode >> 12 & 0xf }.as_bytes());
        self.buffer.extend_from_slice(name);
        self.buffer.resize(full, 0);
        true
    }

    /// An entry of READDIR; `next` is the offset at which a listing goes on after it.
    pub fn add(&mut self, ino: u64, mode: u32, next: u64, name: &[u8]) -> bool {
        self.dirent(&[], ino, mode, next, name)
    }

    /// An entry of READDIRPLUS.
    pub fn add_plus(&mut self, nodeid: u64, attr: Attr, ttl: Ttl, next: u64, name: &[u8]) -> bool {
        let entry = entry(nodeid, attr, ttl, Ttl::Forever);
        self.dirent(entry.as_bytes(), attr.ino, attr.mode, next, name)
    }

    /// `.` or `..` in READDIRPLUS: named, but not looked up.
    pub fn add_dot(&mut self, ino: u64, next: u64, name: &[u8]) -> bool {
        let entry = entry(0, Attr::default(), Ttl::None, Ttl::None);
        self.dirent(entry.as_bytes(), ino, 0o040000, next, name)
    }
}

/// A whole answer that only says how a request failed.
pub fn error_reply(unique: u64, errno: Errno) -> [u8; HEADER_LEN] {
    header(unique, -errno.raw_os_error(), HEADER_LEN)
}

/// The header of an answer that carries `len` bytes.
pub fn ok_reply(unique: u64, len: usize) -> [u8; HEADER_LEN] {
    header(unique, 0, HEADER_LEN + len)
}

fn header(unique: u64, error: i32, len: usize) -> [u8; HEADER_LEN] {
    let mut out = [0; HEADER_LEN];
    let len = u32::try_from(len).unwrap_or(u32::MAX);
    out.copy_from_slice(OutHeader { len, error, unique }.as_bytes());
    out
}

/// Asks the kernel to hand out again every request that was read and not answered (Linux 6.9). Repeated requests carry
/// bit 63 in their unique number, and the kernel expects it in the answer: it is part of the number from then on.
pub fn resend_notification() -> [u8; HEADER_LEN] {
    header(0, NOTIFY_RESEND, HEADER_LEN)
}

/// Tells the kernel that its cached listing of the mount's root is old.
pub fn root_changed_notification() -> Notification {
    node_changed_notification(crate::fs::ROOT_NODE)
}

/// What [`node_changed_notification`] makes.
pub type Notification = [u8; HEADER_LEN + size_of::<InvalInodeOut>()];

/// Tells the kernel that what it keeps of a node, attributes and content, is old. It waits for reads of the node that are under way.
pub fn node_changed_notification(node: u64) -> Notification {
    let mut out = [0; HEADER_LEN + size_of::<InvalInodeOut>()];
    let (head, body) = out.split_at_mut(HEADER_LEN);
    head.copy_from_slice(&header(0, NOTIFY_INVAL_INODE, HEADER_LEN + size_of::<InvalInodeOut>()));
    body.copy_from_slice(InvalInodeOut { ino: node, off: 0, len: 0 }.as_bytes());
    out
}
