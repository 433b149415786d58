//! The directories of a tree that is being made: which there are, how to get at them, and what they will look like at the end.
//!
//! Nobody else writes to the tree, so this table is the truth about it: a name is a directory if it is here. Descriptors of recently used ones stay
//! open; every other is opened again from its parent, one component at a time.

use super::{Refusal, apply::Why};
use crate::sys::beneath;
use rustix::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    io::Errno,
};
use std::{
    collections::{HashMap, VecDeque},
    ffi::{CStr, CString},
};

/// Descriptors kept open. A tar goes through a tree depth first, so a few levels would do; more spare the ones that jump.
const KEPT_OPEN: usize = 64;
/// Memory for names and attributes of directories: about 300,000 of them, ten times what the largest images have.
const MEMORY: usize = 64 << 20;
/// What one directory takes here beside its name (kept twice) and extended attributes.
const OVERHEAD: usize = 192;

/// S_ISGID.
pub const SET_GROUP_ID: u32 = 0o2000;

/// The table's number of the tree's own root.
pub const ROOT: usize = 0;

/// What a directory's entry says about it. Applied at the end.
#[derive(Debug, Clone)]
pub struct Attributes {
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: (i64, u32),
    pub xattrs: Vec<(CString, Vec<u8>)>,
}

struct Directory {
    parent: usize,
    name: CString,
    fd: Option<OwnedFd>,
    /// `None`: the tar only implies it.
    attributes: Option<Attributes>,
    /// Of one that was implied below a directory with the set-group-ID bit: the kernel gives it that directory's group and the bit.
    group: Option<u32>,
    opaque: bool,
    /// Another entry took its name; it and what is below it are in the trash.
    replaced: bool,
}

/// How to open a child without being led elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Opener {
    /// openat2 (Linux 5.6) refuses links, mounts and ways up itself.
    Kernel,
    /// O_NOFOLLOW and a single component: the same, as nobody mounts anything in a directory that is a few seconds old.
    NoFollow,
}

pub struct Directories {
    root: OwnedFd,
    opener: Opener,
    /// A parent stands before its children.
    table: Vec<Directory>,
    /// By number of the parent, then name.
    by_name: HashMap<Box<[u8]>, usize>,
    /// Those with an open descriptor, oldest first.
    open: VecDeque<usize>,
    memory: usize,
}

fn key(parent: usize, name: &CStr) -> Vec<u8> {
    [&parent.to_ne_bytes(), name.to_bytes()].concat()
}

impl Directories {
    pub fn new(root: OwnedFd, old_kernel: bool) -> Result<Directories, Errno> {
        let opener = match beneath::open(root.as_fd(), c".") {
            Ok(_) if !old_kernel => Opener::Kernel,
            Ok(_) | Err(Errno::NOSYS | Errno::PERM) => Opener::NoFollow,
            Err(error) => return Err(error),
        };
        let top = Directory {
            parent: ROOT,
            name: CString::default(),
            fd: None,
            attributes: None,
            group: None,
            opaque: false,
            replaced: false,
        };
        Ok(Directories { root, opener, table: vec![top], by_name: HashMap::new(), open: VecDeque::new(), memory: 0 })
    }

    pub fn get(&self, parent: usize, name: &CStr) -> Option<usize> {
        self.by_name.get(key(parent, name).as_slice()).copied()
    }

    /// Records a directory that was just made.
    pub fn add(&mut self, parent: usize, name: &CStr) -> Result<usize, Why> {
        self.account(OVERHEAD + 2 * name.count_bytes())?;
        let number = self.table.len();
        let above = &self.table[parent];
        let group = match &above.attributes {
            Some(attributes) => (attributes.mode & SET_GROUP_ID != 0).then_some(attributes.gid),
            None => above.group,
        };
        self.table.push(Directory {
            parent,
            name: name.to_owned(),
            fd: None,
            attributes: None,
            group,
            opaque: false,
            replaced: false,
        });
        self.by_name.insert(key(parent, name).into(), number);
        Ok(number)
    }

    fn account(&mut self, bytes: usize) -> Result<(), Why> {
        self.memory += bytes;
        match self.memory <= MEMORY {
            true => Ok(()),
            false => Err(Why::Refused(Refusal::TooManyDirectories)),
        }
    }

    /// The name is going to be something else: forgets the directory, and with it everything below.
    pub fn forget(&mut self, parent: usize, name: &CStr) {
        if let Some(number) = self.by_name.remove(key(parent, name).as_slice()) {
            self.table[number].replaced = true;
        }
    }

    pub fn set_attributes(&mut self, number: usize, attributes: Attributes) -> Result<(), Why> {
        self.account(attributes.xattrs.iter().map(|(name, value)| name.count_bytes() + value.len() + 64).sum())?;
        self.table[number].attributes = Some(attributes);
        Ok(())
    }

    pub fn set_opaque(&mut self, number: usize) {
        self.table[number].opaque = true;
    }

    /// A descriptor of the directory.
    pub fn fd(&mut self, number: usize) -> Result<BorrowedFd<'_>, Errno> {
        let mut closed = Vec::new();
        let mut at = number;
        while at != ROOT && self.table[at].fd.is_none() {
            closed.push(at);
            at = self.table[at].parent;
        }
        for at in closed.into_iter().rev() {
            let Directory { parent, name, .. } = &self.table[at];
            let above = self.table[*parent].fd.as_ref().unwrap_or(&self.root).as_fd();
            let opened = match self.opener {
                Opener::Kernel => beneath::open(above, name)?,
                Opener::NoFollow => beneath::open_nofollow(above, name)?,
            };
            self.table[at].fd = Some(opened);
            self.open.push_back(at);
            if self.open.len() > KEPT_OPEN {
                // The oldest, which is never the one just opened.
                if let Some(oldest) = self.open.pop_front() {
                    self.table[oldest].fd = None;
                }
            }
        }
        Ok(self.table[number].fd.as_ref().unwrap_or(&self.root).as_fd())
    }

    /// Numbers of the directories that are in the tree at the end, each before its children.
    pub fn remaining(&self) -> Vec<usize> {
        let mut there = vec![true; self.table.len()];
        for (number, directory) in self.table.iter().enumerate() {
            // The root is its own parent.
            there[number] = !directory.replaced && there[directory.parent];
        }
        (0..self.table.len()).filter(|number| there[*number]).collect()
    }

    /// What its entry said, if there was one.
    pub fn wanted(&self, number: usize) -> Option<&Attributes> {
        self.table[number].attributes.as_ref()
    }

    /// The group that an implied directory inherits.
    pub fn inherited_group(&self, number: usize) -> Option<u32> {
        self.table[number].group
    }

    pub fn is_opaque(&self, number: usize) -> bool {
        self.table[number].opaque
    }

    /// The path from the root, without a slash at either end.
    pub fn path(&self, number: usize) -> Vec<u8> {
        let mut names = Vec::new();
        let mut at = number;
        while at != ROOT {
            names.push(self.table[at].name.to_bytes());
            at = self.table[at].parent;
        }
        names.reverse();
        names.join(&b'/')
    }
}
