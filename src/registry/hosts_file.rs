//! `hosts.toml`, as containerd has it: text in, hosts out. Pure.
//!
//! ```toml
//! server = "https://registry-1.docker.io"      # the registry itself, asked last; default: the host of the image
//! [host."https://mirror.example:5000"]         # asked before it, in the order of the file
//!   capabilities = ["pull", "resolve", "push"] # default: all
//!   ca = "ca.crt"                              # or a list; relative to the file
//!   client = [["client.cert", "client.key"]]   # or one file, or a list of files with both
//!   skip_verify = false
//!   override_path = false                      # true: the URL's path is the API's, nothing is added to it
//!   dial_timeout = "3s"
//!   [host."https://mirror.example:5000".header]
//!     x-token = "…"                            # or a list
//! ```
//! Keys beside `server` are about the registry itself. A key that is not known is remarked upon and ignored, as containerd does.

use http::{HeaderName, HeaderValue};
use std::{
    fmt,
    ops::Range,
    path::{Path, PathBuf},
    time::Duration,
};
use toml_edit::{Document, Item, TableLike};

/// Largest file read. A hundred mirrors fit many times over.
pub(super) const MAX_FILE: u64 = 256 << 10;
/// Hosts of one file. Each may cost a time-out.
const MAX_HOSTS: usize = 32;

/// What a host may be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    /// Manifests by digest, and blobs.
    pub pull: bool,
    /// What a tag means.
    pub resolve: bool,
    /// Uploads.
    pub push: bool,
}

impl Capabilities {
    pub const ALL: Capabilities = Capabilities { pull: true, resolve: true, push: true };
    /// What a mirror is for.
    pub const READ: Capabilities = Capabilities { pull: true, resolve: true, push: false };
}

/// One host of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    /// Base URL of the API, without trailing slash. None for the registry itself where `server` does not say.
    pub base: Option<::url::Url>,
    pub capabilities: Capabilities,
    pub authorities: Vec<PathBuf>,
    pub identities: Vec<(PathBuf, PathBuf)>,
    pub skip_verify: bool,
    pub dial_timeout: Option<Duration>,
    pub headers: Vec<(HeaderName, HeaderValue)>,
}

/// What the file says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct HostsFile {
    /// In order; the registry itself is the last.
    pub entries: Vec<Entry>,
    /// Keys that mean nothing, as `line:column: key`.
    pub unknown: Vec<String>,
}

/// Where the file cannot be understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{line}:{column}: {what}")]
pub(super) struct Invalid {
    line: usize,
    column: usize,
    what: String,
}

struct Reader<'t> {
    text: &'t str,
    /// Where relative paths start.
    directory: &'t Path,
    unknown: Vec<String>,
}

/// Reads the file in `directory`.
pub(super) fn parse(text: &str, directory: &Path) -> Result<HostsFile, Invalid> {
    let mut reader = Reader { text, directory, unknown: Vec::new() };
    let document =
        Document::parse(text).map_err(|e| reader.invalid(e.span(), e.message().trim().replace('\n', ", ")))?;
    let root = document.as_table();
    let mut entries = Vec::new();
    if let Some(hosts) = root.get("host") {
        let table = hosts.as_table_like().ok_or_else(|| reader.wrong(hosts, "[host.\"https://…\"] tables"))?;
        let mut tables: Vec<(&str, &Item)> = table.iter().collect();
        // Tables may be written in any order and inside each other; what counts is where each is first named.
        tables.sort_by_key(|(name, item)| {
            let key = table.key(name).and_then(|key| key.span());
            key.or_else(|| item.span()).map_or(usize::MAX, |span| span.start)
        });
        if tables.len() > MAX_HOSTS {
            return Err(reader.invalid(hosts.span(), format!("more than {MAX_HOSTS} hosts")));
        }
        for (url, item) in tables {
            let settings = item.as_table_like().ok_or_else(|| reader.wrong(item, "a table of settings"))?;
            let span = table.key(url).and_then(|key| key.span()).or_else(|| item.span());
            entries.push(reader.entry(Some((url, span)), settings, &[])?);
        }
    }
    let server = match root.get("server") {
        None => None,
        Some(item) => Some((reader.text(item)?, item.span())).filter(|(url, _)| !url.is_empty()),
    };
    entries.push(reader.entry(server, root, &["server", "host"])?);
    Ok(HostsFile { entries, unknown: reader.unknown })
}

const KEYS: [&str; 7] = ["capabilities", "ca", "client", "skip_verify", "override_path", "dial_timeout", "header"];

impl Reader<'_> {
    fn position(&self, span: Option<Range<usize>>) -> (usize, usize) {
        let before = span.and_then(|span| self.text.get(..span.start)).unwrap_or("");
        let line_start = before.rfind('\n').map_or(0, |end| end + 1);
        (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
    }

    fn invalid(&self, span: Option<Range<usize>>, what: impl Into<String>) -> Invalid {
        let (line, column) = self.position(span);
        Invalid { line, column, what: what.into() }
    }

    fn wrong(&self, item: &Item, expected: &str) -> Invalid {
        self.invalid(item.span(), format!("expected {expected}, found {}", item.type_name()))
    }

    fn text<'i>(&self, item: &'i Item) -> Result<&'i str, Invalid> {
        item.as_str().ok_or_else(|| self.wrong(item, "a string"))
    }

    fn flag(&self, table: &dyn TableLike, key: &str) -> Result<bool, Invalid> {
        match table.get(key) {
            None => Ok(false),
            Some(item) => item.as_bool().ok_or_else(|| self.wrong(item, "true or false")),
        }
    }

    /// A string, or a list of strings.
    fn texts(&self, item: &Item) -> Result<Vec<String>, Invalid> {
        if let Some(one) = item.as_str() {
            return Ok(vec![one.to_owned()]);
        }
        let list = item.as_array().and_then(|l| l.iter().map(|v| v.as_str().map(str::to_owned)).collect());
        list.ok_or_else(|| self.wrong(item, "a string or a list of strings"))
    }

    fn path(&self, text: &str) -> PathBuf {
        self.directory.join(text)
    }

    fn entry(
        &mut self,
        url: Option<(&str, Option<Range<usize>>)>,
        table: &dyn TableLike,
        also: &[&str],
    ) -> Result<Entry, Invalid> {
        for (name, item) in table.iter() {
            if !KEYS.contains(&name) && !also.contains(&name) {
                let span = table.key(name).and_then(|key| key.span()).or_else(|| item.span());
                let (line, column) = self.position(span);
                self.unknown.push(format!("{line}:{column}: {name}"));
            }
        }
        let overridden = self.flag(table, "override_path")?;
        let base = match url {
            None => None,
            Some((url, span)) => Some(base(url, overridden).map_err(|what| self.invalid(span, what))?),
        };
        let authorities = match table.get("ca") {
            None => Vec::new(),
            Some(item) => self.texts(item)?.iter().map(|path| self.path(path)).collect(),
        };
        let dial_timeout = match table.get("dial_timeout") {
            None => None,
            Some(item) => {
                let read = crate::notation::go_duration(self.text(item)?).filter(|d| !d.is_zero());
                Some(read.ok_or_else(|| self.invalid(item.span(), "expected a duration such as \"3s\""))?)
            }
        };
        Ok(Entry {
            base,
            capabilities: self.capabilities(table)?,
            authorities,
            identities: self.identities(table)?,
            skip_verify: self.flag(table, "skip_verify")?,
            dial_timeout,
            headers: self.headers(table)?,
        })
    }

    fn capabilities(&self, table: &dyn TableLike) -> Result<Capabilities, Invalid> {
        let Some(item) = table.get("capabilities") else { return Ok(Capabilities::ALL) };
        let words = self.texts(item)?;
        if words.is_empty() {
            return Ok(Capabilities::ALL);
        }
        let mut out = Capabilities { pull: false, resolve: false, push: false };
        for word in words {
            match word.to_ascii_lowercase().as_str() {
                "pull" => out.pull = true,
                "resolve" => out.resolve = true,
                "push" => out.push = true,
                // containerd 2.2; who may pull is asked for referrers here anyway.
                "referrers" => {}
                _ => {
                    let what = format!("unknown capability {word:?}; known are pull, resolve and push");
                    return Err(self.invalid(item.span(), what));
                }
            }
        }
        Ok(out)
    }

    /// One file with certificate and key, a list of such files, or a list of pairs whose second may be empty.
    fn identities(&self, table: &dyn TableLike) -> Result<Vec<(PathBuf, PathBuf)>, Invalid> {
        let Some(item) = table.get("client") else { return Ok(Vec::new()) };
        let wrong = || self.wrong(item, "a file, a list of files, or a list of [certificate, key]");
        let both = |path: &str| (self.path(path), self.path(path));
        if let Some(one) = item.as_str() {
            return Ok(vec![both(one)]);
        }
        let mut out = Vec::new();
        for value in item.as_array().ok_or_else(wrong)?.iter() {
            if let Some(path) = value.as_str() {
                out.push(both(path));
                continue;
            }
            let pair: Option<Vec<&str>> = value.as_array().and_then(|pair| pair.iter().map(|v| v.as_str()).collect());
            match pair.as_deref() {
                Some([certificate, key]) if !key.is_empty() => out.push((self.path(certificate), self.path(key))),
                Some([both_in_one] | [both_in_one, _]) => out.push(both(both_in_one)),
                _ => return Err(wrong()),
            }
        }
        Ok(out)
    }

    fn headers(&self, table: &dyn TableLike) -> Result<Vec<(HeaderName, HeaderValue)>, Invalid> {
        let Some(item) = table.get("header") else { return Ok(Vec::new()) };
        let headers = item.as_table_like().ok_or_else(|| self.wrong(item, "a table of headers"))?;
        let mut out = Vec::new();
        for (name, item) in headers.iter() {
            let name: HeaderName =
                name.parse().map_err(|_| self.invalid(item.span(), format!("{name:?} is no name of a header")))?;
            for text in self.texts(item)? {
                // The value may be a secret: it is not repeated.
                let mut value = HeaderValue::from_str(&text)
                    .map_err(|_| self.invalid(item.span(), format!("the value of {name} cannot be sent")))?;
                value.set_sensitive(true);
                out.push((name.clone(), value));
            }
        }
        Ok(out)
    }
}

/// The base of a host's API: `https://` unless the URL says otherwise, `/v2` behind its path unless the path is overridden.
fn base(text: &str, overridden: bool) -> Result<::url::Url, String> {
    let shown = text.rsplit('@').next().unwrap_or(text);
    let with_scheme = if text.contains("://") { text.to_owned() } else { format!("https://{text}") };
    let invalid = || format!("{shown:?} is not a URL such as \"https://mirror.example:5000\"");
    let mut url = ::url::Url::parse(&with_scheme).map_err(|_| invalid())?;
    if !matches!(url.scheme(), "http" | "https") || !url.has_host() {
        return Err(invalid());
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(format!(
            "{shown:?}: credentials do not belong into a URL; use the docker configuration or a header"
        ));
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(format!("{shown:?}: the URL of a host has no query"));
    }
    if matches!(url.host_str(), Some("docker.io" | "index.docker.io")) {
        // docker.io itself is a web site.
        url.set_host(Some("registry-1.docker.io")).map_err(|_| invalid())?;
    }
    let path = url.path().trim_end_matches('/').to_owned();
    let path = if overridden || path.ends_with("/v2") { path } else { format!("{path}/v2") };
    url.set_path(&path);
    Ok(url)
}

impl fmt::Display for Capabilities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = [(self.pull, "pull"), (self.resolve, "resolve"), (self.push, "push")];
        let words: Vec<_> = words.into_iter().filter(|(has, _)| *has).map(|(_, word)| word).collect();
        f.write_str(&words.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<HostsFile, String> {
        parse(text, Path::new("/d")).map_err(|e| e.to_string())
    }

    #[test]
    fn hosts_are_read_as_containerd_reads_them() {
        let file = read(
            r#"
            server = "https://docker.io"
            skip_verify = true

            [host."http://b.example:5000"]
              capabilities = ["pull"]
              ca = ["x.crt", "/abs/y.crt"]
              client = [["c.cert", "c.key"], ["both.pem", ""]]
              dial_timeout = "1m30s"
              [host."http://b.example:5000".header]
                x-one = "1"
                X-Two = ["2", "3"]

            [host."a.example/proxy/hub/"]
              override_path = true
              client = "both.pem"
            [host."https://c.example/proxy"]
              rewrite = 1
            "#,
        )
        .unwrap();
        let urls: Vec<_> = file.entries.iter().map(|e| e.base.as_ref().unwrap().as_str()).collect();
        assert_eq!(
            urls,
            [
                "http://b.example:5000/v2",
                "https://a.example/proxy/hub",
                "https://c.example/proxy/v2",
                "https://registry-1.docker.io/v2"
            ]
        );
        let first = &file.entries[0];
        assert_eq!(first.capabilities, Capabilities { pull: true, resolve: false, push: false });
        assert_eq!(first.authorities, [Path::new("/d/x.crt"), Path::new("/abs/y.crt")]);
        assert_eq!(first.identities[0], ("/d/c.cert".into(), "/d/c.key".into()));
        assert_eq!(first.identities[1], ("/d/both.pem".into(), "/d/both.pem".into()));
        assert_eq!(first.dial_timeout, Some(Duration::from_secs(90)));
        assert_eq!(first.headers.len(), 3);
        assert!(!first.skip_verify && file.entries[3].skip_verify);
        assert_eq!(file.entries[1].identities, [(PathBuf::from("/d/both.pem"), PathBuf::from("/d/both.pem"))]);
        assert_eq!(file.entries[3].capabilities, Capabilities::ALL);
        assert_eq!(file.unknown, ["18:15: rewrite"]);
        assert_eq!(read("").unwrap().entries.len(), 1, "an empty file is the registry itself");
    }

    #[test]
    fn what_cannot_be_understood_is_named_with_its_place() {
        for (text, expected) in [
            ("server = 7", "1:10: expected a string"),
            ("\n[host.\"ftp://x\"]", "2:7: \"ftp://x\" is not a URL"),
            ("[host.\"https://u:hunter2@x\"]", "1:7: \"x\": credentials"),
            ("capabilities = [\"fly\"]", "1:16: unknown capability \"fly\""),
            ("dial_timeout = \"soon\"", "1:16: expected a duration"),
            ("[host.\"https://x\".header]\nx = \"a\\nhunter2\"", "2:5: the value of x"),
            ("client = [[1]]", "1:10: expected a file"),
            ("skip_verify = \"yes\"", "1:15: expected true or false"),
            ("host = 1", "1:8: expected [host"),
            ("server =", "1:9: "),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.starts_with(expected) && !error.contains("hunter2"), "{text}: {error}");
        }
        let many: String = (0..40).map(|n| format!("[host.\"https://h{n}\"]\n")).collect();
        assert!(read(&many).unwrap_err().contains("more than 32 hosts"));
    }
}
