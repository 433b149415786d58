//! containerd's filter grammar, over snapshots.
//!
//! ```text
//! filter    := selector (',' selector)*                 all of them
//! selector  := fieldpath [ operator value ]             without operator: the field is there
//! fieldpath := field ('.' field)*
//! field     := [A-Za-z0-9_]+ | quoted
//! operator  := '==' | '!=' | '~='
//! value     := quoted | anything up to a blank or ','
//! quoted    := "…" with Go's escapes; after ~= also |…| and /…/
//! ```
//! Several filters match what any of them matches; no filter and an empty one match everything.

use crate::snapshot::{Info, Kind};
use regex::Regex;

/// Most filters in one request. containerd sends one.
const MAX_FILTERS: usize = 64;
/// Longest filter. Its longest part is a label, and containerd's labels end at 4096 bytes.
const MAX_LENGTH: usize = 16 << 10;
/// Most selectors in all filters of one request: each may be a compiled expression.
const MAX_SELECTORS: usize = 64;
/// Memory of one compiled expression.
const REGEX_BYTES: usize = 256 << 10;

/// A filter that cannot be understood.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    #[error("filter {filter:?}, at byte {at}: {what}")]
    Syntax { filter: String, at: usize, what: &'static str },
    #[error("filter {filter:?}, at byte {at}")]
    Regex { filter: String, at: usize, source: Box<regex::Error> },
    #[error("too many or too long filters")]
    TooMuch,
}

/// Any of these.
#[derive(Debug, Default)]
pub struct Filters(Vec<Vec<Selector>>);

#[derive(Debug)]
struct Selector {
    path: Vec<String>,
    test: Test,
}

#[derive(Debug)]
enum Test {
    Present,
    Equal(String),
    NotEqual(String),
    Matches(Regex),
}

impl Filters {
    /// Reads the filters of one request.
    pub fn parse<S: AsRef<str>>(filters: &[S]) -> Result<Filters, FilterError> {
        if filters.len() > MAX_FILTERS || filters.iter().any(|filter| filter.as_ref().len() > MAX_LENGTH) {
            return Err(FilterError::TooMuch);
        }
        if filters.iter().any(|filter| filter.as_ref().is_empty()) {
            return Ok(Filters::default());
        }
        let mut left = MAX_SELECTORS;
        let parse = |filter: &S| Parser { text: filter.as_ref(), at: 0 }.selectors(&mut left);
        filters.iter().map(parse).collect::<Result<_, _>>().map(Filters)
    }

    /// Whether `info` is wanted.
    pub fn matches(&self, info: &Info) -> bool {
        self.0.is_empty() || self.0.iter().any(|all| all.iter().all(|selector| selector.matches(info)))
    }
}

impl Selector {
    fn matches(&self, info: &Info) -> bool {
        let value = field(info, &self.path);
        match &self.test {
            Test::Present => value.is_some(),
            Test::Equal(wanted) => value == Some(wanted),
            // A field that is not there differs from everything, as in containerd.
            Test::NotEqual(unwanted) => value.unwrap_or_default() != unwanted,
            Test::Matches(expression) => expression.is_match(value.unwrap_or_default()),
        }
    }
}

fn field<'a>(info: &'a Info, path: &[String]) -> Option<&'a str> {
    match path.first()?.as_str() {
        "name" => Some(&info.name),
        "parent" => Some(info.parent.as_deref().unwrap_or_default()),
        "kind" => Some(match info.kind {
            kind @ (Kind::Active | Kind::View | Kind::Committed) => kind.name(),
        }),
        "labels" => info.labels.get(&path[1..].join(".")).map(String::as_str),
        _ => None,
    }
}

struct Parser<'t> {
    text: &'t str,
    at: usize,
}

impl Parser<'_> {
    fn error<T>(&self, what: &'static str) -> Result<T, FilterError> {
        Err(FilterError::Syntax { filter: self.text.chars().take(200).collect(), at: self.at, what })
    }

    fn rest(&self) -> &str {
        &self.text[self.at..]
    }

    fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    fn skip_blanks(&mut self) {
        self.at = self.text.len() - self.rest().trim_start().len();
    }

    /// Takes characters as long as `wanted` holds.
    fn take_while(&mut self, wanted: impl Fn(char) -> bool) -> String {
        let end = self.rest().find(|c| !wanted(c)).unwrap_or(self.rest().len());
        let taken = self.rest()[..end].to_owned();
        self.at += end;
        taken
    }

    fn take(&mut self, text: &str) -> bool {
        let found = self.rest().starts_with(text);
        if found {
            self.at += text.len();
        }
        found
    }

    fn selectors(&mut self, left: &mut usize) -> Result<Vec<Selector>, FilterError> {
        let mut out = Vec::new();
        loop {
            *left = left.checked_sub(1).ok_or(FilterError::TooMuch)?;
            out.push(self.selector()?);
            self.skip_blanks();
            if self.peek().is_none() {
                return Ok(out);
            }
            if !self.take(",") {
                return self.error("expected , or the end");
            }
        }
    }

    fn selector(&mut self) -> Result<Selector, FilterError> {
        let mut path = vec![self.field()?];
        while self.take(".") {
            path.push(self.field()?);
        }
        self.skip_blanks();
        let test = match self.peek() {
            None | Some(',') => Test::Present,
            _ if self.take("==") => Test::Equal(self.value(&['"'])?),
            _ if self.take("!=") => Test::NotEqual(self.value(&['"'])?),
            _ if self.take("~=") => Test::Matches(self.expression()?),
            _ => return self.error("expected ==, != or ~="),
        };
        Ok(Selector { path, test })
    }

    fn field(&mut self) -> Result<String, FilterError> {
        self.skip_blanks();
        match self.peek() {
            Some('"') => self.quoted(),
            _ => {
                let field = self.take_while(|c| c == '_' || c.is_ascii_alphanumeric());
                if field.is_empty() { self.error("expected a field or a quoted field") } else { Ok(field) }
            }
        }
    }

    fn value(&mut self, quotes: &[char]) -> Result<String, FilterError> {
        self.skip_blanks();
        match self.peek() {
            Some(c) if quotes.contains(&c) => self.quoted(),
            Some('"' | '|' | '/') => self.error("this quote is only for regular expressions"),
            _ => {
                let value = self.take_while(|c| c != ',' && !c.is_whitespace());
                if value.is_empty() { self.error("expected a value") } else { Ok(value) }
            }
        }
    }

    fn expression(&mut self) -> Result<Regex, FilterError> {
        let at = self.at;
        let text = self.value(&['"', '|', '/'])?;
        regex::RegexBuilder::new(&text).size_limit(REGEX_BYTES).dfa_size_limit(REGEX_BYTES).build().map_err(|source| {
            FilterError::Regex { filter: self.text.chars().take(200).collect(), at, source: Box::new(source) }
        })
    }

    /// A quoted string with the escapes of Go; in the quotes of expressions other backslashes stay.
    fn quoted(&mut self) -> Result<String, FilterError> {
        let Some(quote) = self.peek() else { return self.error("expected a quote") };
        self.at += quote.len_utf8();
        let mut bytes = Vec::new();
        loop {
            let Some(c) = self.peek() else { return self.error("the quote does not end") };
            self.at += c.len_utf8();
            if c == quote {
                break;
            }
            if c != '\\' {
                bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
                continue;
            }
            let Some(c) = self.peek() else { return self.error("the quote does not end") };
            self.at += c.len_utf8();
            match c {
                'a' if quote == '"' => bytes.push(7),
                'b' if quote == '"' => bytes.push(8),
                'f' if quote == '"' => bytes.push(12),
                'n' if quote == '"' => bytes.push(b'\n'),
                'r' if quote == '"' => bytes.push(b'\r'),
                't' if quote == '"' => bytes.push(b'\t'),
                'v' if quote == '"' => bytes.push(11),
                '\\' if quote == '"' => bytes.push(b'\\'),
                'x' if quote == '"' => bytes.push(self.byte(16, 2)?),
                '0'..='3' if quote == '"' => {
                    self.at -= 1;
                    bytes.push(self.byte(8, 3)?);
                }
                'u' | 'U' if quote == '"' => {
                    let code = self.digits(16, if c == 'u' { 4 } else { 8 })?;
                    let Some(c) = char::from_u32(code) else { return self.error("no such character") };
                    bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
                }
                c if c == quote => bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
                c if quote != '"' => {
                    bytes.push(b'\\');
                    bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
                }
                _ => return self.error("unknown escape"),
            }
        }
        match String::from_utf8(bytes) {
            Ok(text) => Ok(text),
            Err(_) => self.error("the escapes do not make UTF-8"),
        }
    }

    fn digits(&mut self, base: u32, count: usize) -> Result<u32, FilterError> {
        let digits = self.rest().get(..count).filter(|digits| digits.chars().all(|c| c.is_digit(base)));
        match digits.and_then(|digits| u32::from_str_radix(digits, base).ok()) {
            Some(value) => {
                self.at += count;
                Ok(value)
            }
            None => self.error("expected digits after the backslash"),
        }
    }

    fn byte(&mut self, base: u32, count: usize) -> Result<u8, FilterError> {
        let value = self.digits(base, count)?;
        u8::try_from(value).or_else(|_| self.error("the escape is larger than a byte"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::SnapshotId;
    use crate::snapshot::{Timestamp, Usage};

    fn info() -> Info {
        let at = Timestamp { seconds: 0, nanos: 0 };
        let labels = [("containerd.io/snapshot.ref", "sha256:1"), ("a.b", "x"), ("odd \"k\"", "ü")];
        let labels = labels.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
        let (id, kind, parent) = (SnapshotId(1), Kind::Committed, Some("default/3/par,ent".to_owned()));
        Info { id, name: "n/1".into(), parent, kind, created: at, updated: at, labels, usage: Usage::default() }
    }

    #[test]
    fn selectors_match_as_in_containerd() {
        let table: &[(&str, bool)] = &[
            ("", true),
            ("name", true),
            ("nonsense", false),
            ("name==n/1", true),
            ("name == n/1", true),
            ("name==n/2", false),
            ("name!=n/2", true),
            ("kind==committed", true),
            ("kind==active", false),
            (r#"parent=="default/3/par,ent""#, true),
            ("labels", false),
            (r#"labels."containerd.io/snapshot.ref"==sha256:1"#, true),
            (r#"labels."containerd.io/snapshot.ref"==sha256:1,parent=="default/3/par,ent""#, true),
            (r#"labels."containerd.io/snapshot.ref"==sha256:1,parent==p"#, false),
            ("labels.a.b==x", true),
            ("labels.a.b", true),
            ("labels.a.c", false),
            ("labels.a.c!=x", true),
            ("labels.a.c==x", false),
            (r#"labels."odd \"k\""=="\u00fc""#, true),
            (r#"labels."odd \"k\""=="\303\274""#, true),
            (r#"labels."odd \"k\""=="\xc3\xbc""#, true),
            ("name~=^n", true),
            (r"name~=|^n/\d$|", true),
            (r"name~=/^n\/\d$/", true),
            (r#"name~="^n/[0-9]$""#, true),
            ("name~=^x", false),
        ];
        for (filter, expected) in table {
            let filters = Filters::parse(&[filter]).unwrap_or_else(|e| panic!("{filter}: {e}"));
            assert_eq!(filters.matches(&info()), *expected, "{filter}");
        }
    }

    #[test]
    fn filters_are_alternatives_and_none_is_all() {
        let matches = |filters: &[&str]| Filters::parse(filters).unwrap().matches(&info());
        assert!(matches(&[]));
        assert!(matches(&["name==x", "kind==committed"]));
        assert!(!matches(&["name==x", "kind==view"]));
        assert!(matches(&["name==x", ""]));
    }

    #[test]
    fn what_is_not_a_filter_is_refused_with_its_place() {
        let bad = [
            ",",
            "==",
            "name==",
            "name=x",
            "name=~x",
            "name==x y",
            "name==x,",
            "labels.",
            r#"labels."x"#,
            "name==|x|",
            r#"name=="\q""#,
            r#"name=="\xff""#,
            r#"name=="\777""#,
            "name~=[",
            "name~=(a{1000}){1000}",
            "=",
            "é",
        ];
        for filter in bad {
            assert!(Filters::parse(&[filter]).is_err(), "{filter}");
        }
        assert!(Filters::parse(&vec!["name"; 65]).is_err());
        assert!(Filters::parse(&["a".repeat(20_000)]).is_err());
        assert!(Filters::parse(&[vec!["name"; 65].join(",")]).is_err());
    }

    proptest::proptest! {
        #[test]
        fn proptest_no_text_makes_the_parser_panic(text in r#"([a-z.,=!~"|/\\ \nux0-9é(\[]|\PC){0,60}"#) {
            if let Ok(filters) = Filters::parse(&[text]) {
                filters.matches(&info());
            }
        }
    }
}
