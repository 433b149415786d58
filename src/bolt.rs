//! bbolt, the file format of the Go programs' databases: `artifacts.db`, which both tools use in turn, and `snapshotter/metadata.db`, which is
//! read once when a node is taken over. Pure: bytes in, values or pages out.
//!
//! ```text
//!   page 0, 1: meta (the valid one with the higher transaction id counts) ── root ──▶ branch pages ──▶ leaf pages
//!   leaf element: key and value, or key and bucket; a small bucket is a page of its own inside the value
//! ```
//!
//! The files are small (a kB or so for each layer of each image), so they are read as a whole and their tree is written anew. A
//! commit puts the new tree on pages that the current one does not use, and then the other meta page: at every moment one meta page
//! describes a complete tree. No list of free pages is kept; bbolt makes its own when it finds none.
//!
//! The file is hostile input: every offset is checked, no page is visited twice, keys must be in order, buckets nest [`MAX_DEPTH`] deep, and all
//! that is taken out of a file is never more than the file.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};

const MAGIC: u32 = 0xED0C_DAED;
const VERSION: u32 = 2;
/// Page size of new files: the usual memory page, which Go's bbolt takes.
const PAGE: usize = 4096;
/// Bytes of the two meta pages of a new file.
pub const METAS: usize = 2 * PAGE;
const PAGE_HEADER: usize = 16;
const ELEMENT: usize = 16;
const BUCKET_HEADER: usize = 16;
const META_LEN: usize = 64;
/// "There is no list of free pages."
const NO_FREELIST: u64 = u64::MAX;

const BRANCH: u16 = 0x01;
const LEAF: u16 = 0x02;
const META: u16 = 0x04;
const IS_BUCKET: u32 = 0x01;
/// Buckets within buckets. The deepest schema that is read here has four; a file made of nothing but buckets shall not end the stack.
pub const MAX_DEPTH: usize = 16;
/// Enough of a file for [`transaction`]: two meta pages of the largest size.
pub const HEAD: usize = 2 << 16;

/// Why bytes are not a database.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Damaged {
    #[error("it is not a bbolt database")]
    NotBolt,
    #[error("neither of its meta pages is intact")]
    Meta,
    #[error("page {0} is damaged")]
    Page(u64),
}

/// What a key stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    Bytes(Vec<u8>),
    Bucket(Bucket),
}

/// A set of keys, in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Bucket {
    pub sequence: u64,
    pub entries: BTreeMap<Vec<u8>, Value>,
}

/// A database as it was read.
#[derive(Debug)]
pub struct Database {
    pub root: Bucket,
    page_size: usize,
    transaction: u64,
    /// Pages that the valid meta page needs.
    used: BTreeSet<u64>,
    /// Pages that the file has had.
    pages: u64,
}

/// What to write, in this order: [`Commit::pages`], sync, [`Commit::meta`], sync.
#[derive(Debug)]
pub struct Commit {
    /// Where, and what.
    pub pages: Vec<(u64, Vec<u8>)>,
    pub meta: (u64, Vec<u8>),
}

struct Meta {
    page_size: usize,
    root: u64,
    sequence: u64,
    freelist: u64,
    pages: u64,
    transaction: u64,
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2)?.try_into().ok().map(u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..at + 8)?.try_into().ok().map(u64::from_le_bytes)
}

/// FNV-1a, 64 bits.
fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

impl Meta {
    fn read(page: &[u8]) -> Option<Meta> {
        let body = page.get(PAGE_HEADER..PAGE_HEADER + META_LEN)?;
        let page_size = usize::try_from(u32_at(body, 8)?).ok()?;
        let sane = u16_at(page, 8)? & META != 0
            && u32_at(body, 0)? == MAGIC
            && u32_at(body, 4)? == VERSION
            && u64_at(body, 56)? == checksum(&body[..56])
            && page_size.is_power_of_two()
            && (512..=1 << 16).contains(&page_size);
        sane.then_some(Meta {
            page_size,
            root: u64_at(body, 16)?,
            sequence: u64_at(body, 24)?,
            freelist: u64_at(body, 32)?,
            pages: u64_at(body, 40)?,
            transaction: u64_at(body, 48)?,
        })
    }

    fn page(&self, number: u64) -> Vec<u8> {
        let mut page = header(number, META, 0, 0);
        let mut body = Vec::with_capacity(META_LEN);
        body.extend_from_slice(&MAGIC.to_le_bytes());
        body.extend_from_slice(&VERSION.to_le_bytes());
        body.extend_from_slice(&(self.page_size as u32).to_le_bytes()); // at most 64 KiB
        body.extend_from_slice(&0u32.to_le_bytes());
        for field in [self.root, self.sequence, self.freelist, self.pages, self.transaction] {
            body.extend_from_slice(&field.to_le_bytes());
        }
        let sum = checksum(&body);
        body.extend_from_slice(&sum.to_le_bytes());
        page.extend_from_slice(&body);
        page.resize(self.page_size, 0);
        page
    }
}

fn header(number: u64, flags: u16, count: u16, overflow: u32) -> Vec<u8> {
    let mut out = Vec::with_capacity(PAGE_HEADER);
    out.extend_from_slice(&number.to_le_bytes());
    out.extend_from_slice(&flags.to_le_bytes());
    out.extend_from_slice(&count.to_le_bytes());
    out.extend_from_slice(&overflow.to_le_bytes());
    out
}

/// An empty database, not yet on disk: committing it gives a valid file.
pub fn empty() -> Database {
    Database { root: Bucket::default(), page_size: PAGE, transaction: 0, used: BTreeSet::from([0, 1]), pages: 2 }
}

/// The meta page that counts.
fn meta(file: &[u8]) -> Result<Meta, Damaged> {
    let first = Meta::read(file);
    // Where the second is depends on the page size, which the first may be too damaged to tell.
    let size = first.as_ref().map(|m| m.page_size);
    let sizes = size.map_or_else(|| (9..=16).map(|n| 1usize << n).collect(), |size| vec![size]);
    let mut second = sizes.into_iter().filter_map(|size| Meta::read(file.get(size..)?).filter(|m| m.page_size == size));
    let metas = first.into_iter().chain(second.next());
    metas.max_by_key(|m| m.transaction).ok_or_else(|| {
        let magic = u32_at(file, PAGE_HEADER) == Some(MAGIC);
        if magic { Damaged::Meta } else { Damaged::NotBolt }
    })
}

/// The number of the last transaction in a file, of which the first [`HEAD`] bytes are enough: it grows with every change.
pub fn transaction(head: &[u8]) -> Result<u64, Damaged> {
    meta(head).map(|meta| meta.transaction)
}

/// Reads a whole file.
pub fn read(file: &[u8]) -> Result<Database, Damaged> {
    let meta = meta(file)?;
    let mut walk = Walk { file, page_size: meta.page_size, used: BTreeSet::from([0, 1]), budget: file.len(), depth: 0 };
    let mut root = Bucket { sequence: meta.sequence, entries: BTreeMap::new() };
    walk.tree(meta.root, &mut root)?;
    if meta.freelist != NO_FREELIST {
        walk.page(meta.freelist)?;
    }
    let have = (file.len() / meta.page_size) as u64;
    Ok(Database {
        root,
        page_size: meta.page_size,
        transaction: meta.transaction,
        used: walk.used,
        pages: meta.pages.min(have).max(2),
    })
}

struct Walk<'a> {
    file: &'a [u8],
    page_size: usize,
    used: BTreeSet<u64>,
    /// Bytes that may still be taken out of the file. In a sound one no byte is in two elements; in another, elements may share their bytes.
    budget: usize,
    depth: usize,
}

impl<'a> Walk<'a> {
    /// A page with its overflow; each only once.
    fn page(&mut self, number: u64) -> Result<&'a [u8], Damaged> {
        let bad = || Damaged::Page(number);
        let start = usize::try_from(number).ok().and_then(|n| n.checked_mul(self.page_size)).ok_or_else(bad)?;
        let overflow = u32_at(self.file.get(start..).ok_or_else(bad)?, 12).ok_or_else(bad)?;
        let length =
            usize::try_from(overflow).ok().and_then(|n| (n + 1).checked_mul(self.page_size)).ok_or_else(bad)?;
        let end = start.checked_add(length).ok_or_else(bad)?;
        let page = self.file.get(start..end).ok_or_else(bad)?;
        if u64_at(page, 0) != Some(number) || (number..=number + u64::from(overflow)).any(|n| !self.used.insert(n)) {
            return Err(bad());
        }
        Ok(page)
    }

    fn tree(&mut self, root: u64, into: &mut Bucket) -> Result<(), Damaged> {
        // Depth first, left to right. A stack of our own: the file decides how deep it gets.
        let mut pending = vec![root];
        while let Some(number) = pending.pop() {
            let page = self.page(number)?;
            let bad = || Damaged::Page(number);
            let flags = u16_at(page, 8).ok_or_else(bad)?;
            let count = usize::from(u16_at(page, 10).ok_or_else(bad)?);
            if flags & BRANCH != 0 {
                let children: Option<Vec<u64>> =
                    (0..count).rev().map(|i| u64_at(page, PAGE_HEADER + i * ELEMENT + 8)).collect();
                pending.extend(children.ok_or_else(bad)?);
            } else if flags & LEAF != 0 {
                self.leaf(page, number, into)?;
            } else {
                return Err(bad());
            }
        }
        Ok(())
    }

    fn leaf(&mut self, page: &'a [u8], number: u64, into: &mut Bucket) -> Result<(), Damaged> {
        let bad = || Damaged::Page(number);
        let count = usize::from(u16_at(page, 10).ok_or_else(bad)?);
        for i in 0..count {
            let at = PAGE_HEADER + i * ELEMENT;
            let field = |n: usize| u32_at(page, at + n).and_then(|v| usize::try_from(v).ok()).ok_or_else(bad);
            let (flags, key_at) = (field(0)?, at + field(4)?);
            let value_at = key_at + field(8)?;
            let end = value_at + field(12)?;
            let key = page.get(key_at..value_at).ok_or_else(bad)?;
            let value = page.get(value_at..end).ok_or_else(bad)?;
            let is_bucket = flags & IS_BUCKET as usize != 0;
            let taken = ELEMENT + key.len() + if is_bucket { BUCKET_HEADER } else { value.len() };
            self.budget = self.budget.checked_sub(taken).ok_or_else(bad)?;
            if into.entries.last_key_value().is_some_and(|(last, _)| last.as_slice() >= key) {
                return Err(bad());
            }
            let key = key.to_vec();
            let value =
                if is_bucket { Value::Bucket(self.bucket(value, number)?) } else { Value::Bytes(value.to_vec()) };
            into.entries.insert(key, value);
        }
        Ok(())
    }

    fn bucket(&mut self, value: &'a [u8], number: u64) -> Result<Bucket, Damaged> {
        let bad = || Damaged::Page(number);
        let root = u64_at(value, 0).ok_or_else(bad)?;
        let mut bucket = Bucket { sequence: u64_at(value, 8).ok_or_else(bad)?, entries: BTreeMap::new() };
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(bad());
        }
        if root != 0 {
            self.tree(root, &mut bucket)?;
        } else {
            // A page inside the value.
            let page = value.get(BUCKET_HEADER..).ok_or_else(bad)?;
            if u16_at(page, 8).ok_or_else(bad)? & LEAF == 0 {
                return Err(bad());
            }
            self.leaf(page, number, &mut bucket)?;
        }
        self.depth -= 1;
        Ok(bucket)
    }
}

impl Bucket {
    /// The bucket of that name.
    pub fn bucket(&self, name: &[u8]) -> Option<&Bucket> {
        match self.entries.get(name)? {
            Value::Bucket(bucket) => Some(bucket),
            Value::Bytes(_) => None,
        }
    }

    /// The value of that name.
    pub fn bytes(&self, name: &[u8]) -> Option<&[u8]> {
        match self.entries.get(name)? {
            Value::Bytes(bytes) => Some(bytes),
            Value::Bucket(_) => None,
        }
    }
}

impl Database {
    /// The number of the transaction that wrote it.
    pub fn transaction(&self) -> u64 {
        self.transaction
    }

    /// What to write so that the file holds `root`.
    pub fn commit(&self, root: &Bucket) -> Commit {
        let mut writer = Writer { database: self, pages: Vec::new(), next: 2, top: self.pages };
        let number = writer.tree(root);
        let meta = Meta {
            page_size: self.page_size,
            root: number,
            sequence: root.sequence,
            freelist: NO_FREELIST,
            pages: writer.top,
            transaction: self.transaction + 1,
        };
        let place = meta.transaction % 2;
        let mut pages = writer.pages;
        if self.transaction == 0 {
            // A new file has two: the other one describes the same tree, as an older transaction.
            let other = Meta { transaction: 0, ..meta };
            pages.push((1 - place, other.page(1 - place)));
        }
        Commit { pages, meta: (place, meta.page(place)) }
    }

    /// Where a page is in the file.
    pub fn offset(&self, page: u64) -> u64 {
        page * self.page_size as u64
    }
}

struct Writer<'a> {
    database: &'a Database,
    pages: Vec<(u64, Vec<u8>)>,
    next: u64,
    top: u64,
}

/// An element of a leaf or branch: its first word(s) and its bytes.
struct Element<'a> {
    key: &'a [u8],
    value: Vec<u8>,
    is_bucket: bool,
}

impl Writer<'_> {
    /// The first free run of `count` pages.
    fn allocate(&mut self, count: u64) -> u64 {
        let mut start = self.next;
        while let Some(taken) = (start..start + count).rev().find(|n| self.database.used.contains(n)) {
            start = taken + 1;
        }
        self.next = start + count;
        self.top = self.top.max(self.next);
        start
    }

    /// Writes a tree of pages; its root.
    fn tree(&mut self, bucket: &Bucket) -> u64 {
        let elements: Vec<Element<'_>> = bucket.entries.iter().map(|(key, value)| self.element(key, value)).collect();
        let mut level: Vec<(Vec<u8>, u64)> = Vec::new();
        for part in split(&elements, self.database.page_size, |e| e.key.len() + e.value.len()) {
            let page = leaf(part);
            let first = part.first().map(|e| e.key.to_vec()).unwrap_or_default();
            level.push((first, self.place(page, LEAF, part.len())));
        }
        while level.len() > 1 {
            let mut above = Vec::new();
            for part in split(&level, self.database.page_size, |(key, _)| key.len()) {
                above.push((part[0].0.clone(), self.place(branch(part), BRANCH, part.len())));
            }
            level = above;
        }
        // `split` gives at least one part, for an empty bucket, too.
        level.first().map_or(0, |(_, page)| *page)
    }

    fn element<'k>(&mut self, key: &'k [u8], value: &Value) -> Element<'k> {
        match value {
            Value::Bytes(bytes) => Element { key, value: bytes.clone(), is_bucket: false },
            Value::Bucket(bucket) => Element { key, value: self.bucket(bucket), is_bucket: true },
        }
    }

    fn bucket(&mut self, bucket: &Bucket) -> Vec<u8> {
        let plain: Option<Vec<Element<'_>>> = bucket
            .entries
            .iter()
            .map(|(key, value)| match value {
                Value::Bytes(bytes) => Some(Element { key, value: bytes.clone(), is_bucket: false }),
                Value::Bucket(_) => None,
            })
            .collect();
        // As bbolt: small and without buckets in it.
        let inline = plain.map(|elements| (elements.len(), leaf(&elements)));
        let inline = inline.filter(|(_, page)| PAGE_HEADER + page.len() <= self.database.page_size / 4);
        let root = if inline.is_some() { 0 } else { self.tree(bucket) };
        let mut value = Vec::new();
        value.extend_from_slice(&root.to_le_bytes());
        value.extend_from_slice(&bucket.sequence.to_le_bytes());
        if let Some((count, page)) = inline {
            value.extend_from_slice(&header(0, LEAF, u16::try_from(count).unwrap_or(u16::MAX), 0));
            value.extend_from_slice(&page);
        }
        value
    }

    fn place(&mut self, body: Vec<u8>, flags: u16, count: usize) -> u64 {
        let size = self.database.page_size;
        let pages = (PAGE_HEADER + body.len()).div_ceil(size).max(1);
        let number = self.allocate(pages as u64);
        let (count, overflow) =
            (u16::try_from(count).unwrap_or(u16::MAX), u32::try_from(pages - 1).unwrap_or(u32::MAX));
        let mut page = header(number, flags, count, overflow);
        page.extend_from_slice(&body);
        page.resize(pages * size, 0);
        self.pages.push((number, page));
        number
    }
}

/// Cuts elements into runs that fit a page; at least one run.
fn split<T>(elements: &[T], page_size: usize, length: impl Fn(&T) -> usize) -> Vec<&[T]> {
    let mut parts = Vec::new();
    let (mut from, mut size) = (0, PAGE_HEADER);
    for (at, element) in elements.iter().enumerate() {
        let more = ELEMENT + length(element);
        if at > from && size + more > page_size {
            parts.push(&elements[from..at]);
            (from, size) = (at, PAGE_HEADER);
        }
        size += more;
    }
    parts.push(&elements[from..]);
    parts
}

fn leaf(elements: &[Element<'_>]) -> Vec<u8> {
    let (mut heads, mut bodies) = (Vec::new(), Vec::new());
    for (i, element) in elements.iter().enumerate() {
        let position = (elements.len() - i) * ELEMENT + bodies.len();
        let words =
            [u32::from(element.is_bucket), narrow(position), narrow(element.key.len()), narrow(element.value.len())];
        words.iter().for_each(|word| heads.extend_from_slice(&word.to_le_bytes()));
        bodies.extend_from_slice(element.key);
        bodies.extend_from_slice(&element.value);
    }
    heads.extend_from_slice(&bodies);
    heads
}

fn branch(children: &[(Vec<u8>, u64)]) -> Vec<u8> {
    let (mut heads, mut bodies) = (Vec::new(), Vec::new());
    for (i, (key, page)) in children.iter().enumerate() {
        let position = (children.len() - i) * ELEMENT + bodies.len();
        heads.extend_from_slice(&narrow(position).to_le_bytes());
        heads.extend_from_slice(&narrow(key.len()).to_le_bytes());
        heads.extend_from_slice(&page.to_le_bytes());
        bodies.extend_from_slice(key);
    }
    heads.extend_from_slice(&bodies);
    heads
}

/// Lengths within one tree of ours, which is far below 4 GiB.
fn narrow(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file in memory, committed to as on disk.
    fn apply(file: &mut Vec<u8>, database: &Database, root: &Bucket) {
        let commit = database.commit(root);
        for (page, bytes) in commit.pages.iter().chain([&commit.meta]) {
            let at = database.offset(*page) as usize;
            file.resize(file.len().max(at + bytes.len()), 0);
            file[at..at + bytes.len()].copy_from_slice(bytes);
        }
    }

    fn sample(rows: usize, salt: usize) -> Bucket {
        let mut bucket = Bucket::default();
        for n in 0..rows {
            let row = (0..n % 13)
                .map(|k| (format!("key{k}").into_bytes(), Value::Bytes(vec![salt as u8; n % 400])))
                .collect();
            let row = Bucket { sequence: n as u64, entries: row };
            bucket.entries.insert(format!("sha256:{n:064}").into_bytes(), Value::Bucket(row));
        }
        bucket.entries.insert(b"large".to_vec(), Value::Bytes(vec![7; 20_000]));
        Bucket { sequence: 0, entries: BTreeMap::from([(b"soci_artifacts".to_vec(), Value::Bucket(bucket))]) }
    }

    #[test]
    fn what_was_written_is_read_again_transaction_after_transaction() {
        let mut file = Vec::new();
        apply(&mut file, &empty(), &Bucket::default());
        assert_eq!(read(&file).unwrap().root, Bucket::default());
        let mut sizes = Vec::new();
        for (salt, rows) in [3, 900, 901, 40, 0, 1000, 1000, 1000, 1000].into_iter().enumerate() {
            let database = read(&file).unwrap();
            let root = sample(rows, salt);
            apply(&mut file, &database, &root);
            assert_eq!(read(&file).unwrap().root, root);
            sizes.push(file.len());
        }
        assert!(sizes[8] <= sizes[5] * 2, "free pages are used again: {sizes:?}");
    }

    #[test]
    fn a_commit_that_breaks_off_leaves_the_tree_before_it() {
        let mut file = Vec::new();
        apply(&mut file, &empty(), &sample(50, 1));
        let database = read(&file).unwrap();
        let commit = database.commit(&sample(60, 2));
        for (page, bytes) in &commit.pages {
            let at = database.offset(*page) as usize;
            file.resize(file.len().max(at + bytes.len()), 0);
            file[at..at + bytes.len()].copy_from_slice(bytes);
            assert_eq!(read(&file).unwrap().root, sample(50, 1));
        }
        // Torn in the middle of the meta page.
        let at = database.offset(commit.meta.0) as usize;
        file[at..at + 60].copy_from_slice(&commit.meta.1[..60]);
        assert_eq!(read(&file).unwrap().root, sample(50, 1));
    }

    #[test]
    fn a_file_cannot_be_deeper_or_larger_inside_than_it_is() {
        let mut deep = Bucket::default();
        for _ in 0..MAX_DEPTH {
            deep = Bucket { sequence: 0, entries: BTreeMap::from([(b"b".to_vec(), Value::Bucket(deep))]) };
        }
        let mut file = Vec::new();
        apply(&mut file, &empty(), &deep);
        assert_eq!(read(&file).unwrap().root, deep);
        deep = Bucket { sequence: 0, entries: BTreeMap::from([(b"b".to_vec(), Value::Bucket(deep))]) };
        let mut file = Vec::new();
        apply(&mut file, &empty(), &deep);
        assert!(matches!(read(&file), Err(Damaged::Page(_))));

        // Keys whose values are the same bytes: more comes out than is in the file.
        let mut file = Vec::new();
        let rows =
            (0..40u8).map(|n| (vec![n], Value::Bytes(vec![n; 30]))).chain([(vec![200], Value::Bytes(vec![9; 2000]))]);
        apply(&mut file, &empty(), &Bucket { sequence: 0, entries: rows.collect() });
        read(&file).unwrap();
        let leaf = (0..file.len() / PAGE).find(|p| u16_at(&file, p * PAGE + 8) == Some(LEAF)).unwrap() * PAGE;
        for element in (0..40).map(|n| PAGE_HEADER + n * ELEMENT) {
            let key = element + u32_at(&file, leaf + element + 4).unwrap() as usize;
            let all = u32::try_from(PAGE - key - 1).unwrap();
            file[leaf + element + 12..leaf + element + 16].copy_from_slice(&all.to_le_bytes());
        }
        assert!(matches!(read(&file), Err(Damaged::Page(_))));
    }

    #[test]
    fn damage_is_an_error_and_never_more() {
        let mut file = Vec::new();
        apply(&mut file, &empty(), &sample(50, 1));
        assert_eq!(read(b"").unwrap_err(), Damaged::NotBolt);
        assert_eq!(read(&[0; 10_000]).unwrap_err(), Damaged::NotBolt);
        let mut damaged = 0;
        for at in (0..file.len()).step_by(7) {
            let mut torn = file.clone();
            torn[at] ^= 0xff;
            damaged += usize::from(read(&torn).is_err());
            let _ = read(&torn[..at]);
        }
        assert!(damaged > 10);
    }
}
