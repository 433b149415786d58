//! From a parsed document to settings: finds each key, remembers where it stands, and remarks on what it does not know.

use super::codec::{Codec, Fault, Remark, mismatch};
use super::{Position, Problem, Warning, WarningKind};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use toml_edit::{Item, TableLike};

/// A table of settings, declared with [`super::settings::settings!`].
pub trait Section: Default {
    const DOC: &'static [&'static str];
    fn read(&mut self, table: &mut TableReader<'_, '_>);
    fn write(&self, writer: &mut super::writer::Writer);
    /// Every key of the table and of the tables in it, with its documentation.
    fn catalogue(path: &str, out: &mut Vec<Entry>);
}

/// One documented key.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Dotted path: `http.MaxRetries`.
    pub path: String,
    pub doc: &'static [&'static str],
}

/// Where a key was written, and whether with its zero value.
#[derive(Debug, Clone, Copy)]
pub struct Written {
    pub at: Position,
    pub zero: bool,
}

/// What reading one document has brought to light.
pub struct Reader<'t> {
    text: &'t str,
    catalogue: Vec<Entry>,
    /// Keys that were written, by their canonical path.
    pub written: BTreeMap<String, Written>,
    /// Values of the wrong type.
    pub undecodable: Vec<Problem>,
    /// Values that the setting cannot have.
    pub unusable: Vec<Problem>,
    pub warnings: Vec<Warning>,
}

impl<'t> Reader<'t> {
    pub fn new(text: &'t str, catalogue: Vec<Entry>) -> Reader<'t> {
        let (written, undecodable, unusable, warnings) = Default::default();
        Reader { text, catalogue, written, undecodable, unusable, warnings }
    }

    /// Reads one table into `section`.
    pub fn read<S: Section>(&mut self, path: &str, table: &dyn TableLike, section: &mut S) {
        let mut reader = TableReader { reader: self, path, table, used: BTreeSet::new(), known: Vec::new() };
        section.read(&mut reader);
        reader.finish();
    }

    pub fn position(&self, span: Option<Range<usize>>) -> Position {
        span.map_or(Position { line: 1, column: 1 }, |span| Position::of(self.text, span.start))
    }

    fn fault(&mut self, at: Position, key: String, fault: Fault) {
        match fault {
            Fault::Type(message) => self.undecodable.push(Problem { at, key, message }),
            Fault::Value(message) => self.unusable.push(Problem { at, key, message }),
        }
    }

    fn warn_unknown(&mut self, at: Position, key: String, siblings: &[&str]) {
        let nearest = nearest(&key, siblings, &self.catalogue);
        self.warnings.push(Warning { at, kind: WarningKind::UnknownKey { key, nearest } });
    }
}

/// One table being read.
pub struct TableReader<'r, 't> {
    reader: &'r mut Reader<'t>,
    path: &'r str,
    table: &'r dyn TableLike,
    used: BTreeSet<String>,
    known: Vec<&'static str>,
}

impl TableReader<'_, '_> {
    fn path_of(&self, key: &str) -> String {
        join(self.path, key)
    }

    /// The name under which `key` is written: exactly, or else in any case.
    fn find(&self, key: &str) -> Option<(String, Position)> {
        let name = match self.table.contains_key(key) {
            true => key.to_owned(),
            false => self.table.iter().find(|(name, _)| name.eq_ignore_ascii_case(key))?.0.to_owned(),
        };
        let span = self.table.key(&name).and_then(|key| key.span());
        let span = span.or_else(|| self.table.get(&name).and_then(Item::span));
        Some((name, self.reader.position(span)))
    }

    fn take(&mut self, key: &'static str) -> Option<(String, Position)> {
        self.known.push(key);
        let (name, at) = self.find(key)?;
        self.used.insert(name.clone());
        Some((name, at))
    }

    /// Reads the setting `key`, or one of the names it had before, into `field`.
    pub fn setting<C: Codec>(&mut self, key: &'static str, aliases: &[&'static str], codec: &C, field: &mut C::Value) {
        let current = self.take(key);
        let current = current.map(|(name, at)| (self.decode(&name, key, at, codec), at));
        if let Some((Some(value), _)) = &current {
            *field = value.clone();
        }
        for alias in aliases {
            let Some((name, at)) = self.take(alias) else { continue };
            let (alias, key) = (self.path_of(alias), self.path_of(key));
            let Some(value) = self.decode(&name, &name, at, codec) else { continue };
            match &current {
                Some((Some(other), first)) if *other != value => {
                    let message = format!("is the former name of {key} (line {}), which has another value", first.line);
                    self.reader.unusable.push(Problem { at, key: alias.clone(), message });
                }
                _ => *field = value,
            }
            self.reader.warnings.push(Warning { at, kind: WarningKind::Deprecated { key: alias, now: key } });
        }
    }

    fn decode<C: Codec>(&mut self, name: &str, key: &str, at: Position, codec: &C) -> Option<C::Value> {
        let item = self.table.get(name)?;
        let mut remarks = Vec::new();
        let decoded = codec.decode(item, &mut remarks);
        let path = self.path_of(key);
        for Remark { span, key, known } in remarks {
            let at = self.reader.position(span);
            self.reader.warn_unknown(at, join(&path, &key), known);
        }
        match decoded {
            Ok(value) => {
                let zero = item.as_integer() == Some(0) || item.as_str() == Some("");
                self.reader.written.insert(path, Written { at, zero });
                Some(value)
            }
            Err(fault) => {
                let at = item.span().map_or(at, |span| self.reader.position(Some(span)));
                self.reader.fault(at, path, fault);
                None
            }
        }
    }

    /// Reads the table `key` into `section`.
    pub fn section<S: Section>(&mut self, key: &'static str, section: &mut S) {
        let Some((name, at)) = self.take(key) else { return };
        let Some(item) = self.table.get(&name) else { return };
        let path = self.path_of(key);
        match item.as_table_like() {
            Some(table) => self.reader.read(&path, table, section),
            None => self.reader.fault(at, path, mismatch("a table", item)),
        }
    }

    fn finish(self) {
        for (name, item) in self.table.iter() {
            if !self.used.contains(name) {
                let span = self.table.key(name).and_then(|key| key.span()).or_else(|| item.span());
                let at = self.reader.position(span);
                let path = join(self.path, name);
                self.reader.warn_unknown(at, path, &self.known);
            }
        }
    }
}

fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

/// How alike two keys are, from 0 to 1; case and underscores do not count.
fn likeness(a: &str, b: &str) -> f64 {
    let plain = |key: &str| key.to_ascii_lowercase().replace('_', "");
    strsim::jaro_winkler(&plain(a), &plain(b))
}

/// Below this likeness a proposal would be noise: `maxretries`/`min_wait_msec` is 0.6, `enabled`/`enable` 0.97.
const ALIKE: f64 = 0.8;

/// The known key that `path` probably means: a sibling if one is alike, else the most alike key of any table.
fn nearest(path: &str, siblings: &[&str], catalogue: &[Entry]) -> Option<String> {
    let (table, name) = path.rsplit_once('.').unwrap_or(("", path));
    let name = bounded(name);
    let best = |candidates: &mut dyn Iterator<Item = (f64, String)>| {
        candidates.filter(|(score, _)| *score >= ALIKE).max_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, path)| path)
    };
    best(&mut siblings.iter().map(|key| (likeness(name, key), join(table, key)))).or_else(|| {
        best(&mut catalogue.iter().map(|entry| {
            let last = entry.path.rsplit('.').next().unwrap_or(&entry.path);
            (likeness(name, last), entry.path.clone())
        }))
    })
}

/// No known key is longer; comparing is quadratic.
fn bounded(name: &str) -> &str {
    name.char_indices().nth(80).map_or(name, |(end, _)| &name[..end])
}
