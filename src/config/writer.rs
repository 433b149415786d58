//! From settings to text: with documentation for `config default`, without it for `config dump`.

use super::codec::{Codec, Text};

/// Whether the text explains itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    Documented,
    Plain,
}

/// Writes tables in the order of their declaration.
pub struct Writer {
    out: String,
    style: Style,
    path: String,
    /// Header of the table being written, until its first key makes it necessary.
    pending: Option<(String, &'static [&'static str])>,
}

impl Writer {
    pub fn new(style: Style) -> Writer {
        Writer { out: String::new(), style, path: String::new(), pending: None }
    }

    pub fn finish(self) -> String {
        self.out
    }

    /// Comment lines.
    pub fn comment(&mut self, doc: &[&str]) {
        if self.style == Style::Documented {
            for line in doc {
                self.out.push('#');
                self.out.push_str(line);
                self.out.push('\n');
            }
        }
    }

    fn blank(&mut self) {
        if !self.out.is_empty() && !self.out.ends_with("\n\n") {
            self.out.push('\n');
        }
    }

    fn header(&mut self) {
        if let Some((path, doc)) = self.pending.take() {
            self.blank();
            self.comment(doc);
            self.out.push_str(&format!("[{path}]\n"));
        }
    }

    fn key(&mut self, key: &str, value: &str) {
        self.out.push_str(&format!("{key} = {value}\n"));
    }

    /// One setting of the current table.
    pub fn setting<C: Codec>(&mut self, key: &str, doc: &'static [&'static str], codec: &C, value: &C::Value) {
        let text = codec.encode(value);
        let nothing = matches!(&text, Text::Tables(tables) if tables.is_empty());
        if nothing && self.style == Style::Plain {
            return;
        }
        self.header();
        if self.style == Style::Documented {
            self.blank();
            self.comment(doc);
        }
        match text {
            Text::Inline(value) => self.key(key, &value),
            Text::Tables(tables) => {
                let path = format!("{}.{key}", self.path);
                for (header, keys) in tables {
                    self.blank();
                    self.out.push_str(&header.replacen("{path}", &path, 1));
                    self.out.push('\n');
                    for (key, value) in keys {
                        self.key(&key, &value);
                    }
                }
            }
        }
    }

    /// A table in the current table.
    pub fn section<S: super::reader::Section>(&mut self, key: &str, section: &S) {
        let outer = self.path.clone();
        self.path = if outer.is_empty() { key.to_owned() } else { format!("{outer}.{key}") };
        self.pending = Some((self.path.clone(), S::DOC));
        section.write(self);
        self.pending = None;
        self.path = outer;
    }
}
