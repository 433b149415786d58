//! Which spans of a layer are likely to be read soon: a cheap prior over the paths of the files in them.
//!
//! Nothing here knows the image. The classes come from what starts read on eight real images (`tests/bench`): a program, its
//! shared libraries, the modules of its interpreter; never documentation, locales, headers, static archives or tests.
//!
//! Absent on purpose: state. What was read on this node is the scheduler's business.

/// How likely a file is to be read while a container starts, most likely first. The order is the order of streaming.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Likelihood {
    /// The dynamic loader, the C library, shells, the configuration that every start reads.
    Always,
    /// Programs, shared libraries, compiled modules of interpreters.
    Code,
    /// Source modules, configuration, small data.
    Modules,
    /// Everything not told apart.
    Other,
    /// Documentation, locales, headers, static archives, tests, package databases.
    Rarely,
}

impl Likelihood {
    /// Relative value of a byte of this class. Ratios matter, not units: a span with one megabyte of code beats four of other data.
    fn weight(self) -> f32 {
        match self {
            Likelihood::Always => 16.0,
            Likelihood::Code => 8.0,
            Likelihood::Modules => 4.0,
            Likelihood::Other => 1.5,
            Likelihood::Rarely => 0.1,
        }
    }
}

fn has_any(path: &[u8], parts: &[&str]) -> bool {
    parts.iter().any(|part| path.windows(part.len()).any(|window| window == part.as_bytes()))
}

fn starts_any(path: &[u8], prefixes: &[&str]) -> bool {
    prefixes.iter().any(|prefix| path.starts_with(prefix.as_bytes()))
}

/// The class of the file `path` (no leading slash) with permission bits `mode`.
pub fn likelihood(path: &[u8], mode: u32) -> Likelihood {
    let name = path.rsplit(|&c| c == b'/').next().unwrap_or_default();
    let extension = name.rsplit(|&c| c == b'.').next().filter(|e| e.len() < name.len()).unwrap_or_default();
    if starts_any(
        path,
        &[
            "usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "usr/share/help", "usr/share/icons",
            "usr/share/bash-completion", "usr/share/lintian", "usr/share/zsh", "usr/share/perl5/pod", "usr/include/",
            "usr/src/", "usr/local/include/", "usr/local/share/man", "usr/local/share/doc", "var/cache/", "var/lib/dpkg",
            "var/lib/apt", "var/lib/rpm", "var/lib/apk", "var/log/", "usr/share/mime", "usr/share/i18n", "boot/",
        ],
    ) || matches!(extension, b"a" | b"la" | b"h" | b"hpp" | b"hh" | b"cuh" | b"inc" | b"c" | b"cc" | b"cpp" | b"pyi" | b"map" | b"md" | b"rst" | b"po" | b"mo" | b"pod" | b"gz" | b"ts" | b"debug")
        || has_any(path, &["/tests/", "/test/", "/testing/tests", "/examples/", "/include/", "/docs/", "dist-info/", "/licenses/"])
    {
        return Likelihood::Rarely;
    }
    if starts_any(name, &["ld-linux", "libc.so", "libm.so", "libpthread", "libdl.so", "libselinux", "libpcre2-8", "libtinfo"])
        || matches!(name, b"sh" | b"dash" | b"bash" | b"env" | b"libz.so.1" | b"ld.so.cache" | b"passwd" | b"group" | b"nsswitch.conf" | b"busybox")
    {
        return Likelihood::Always;
    }
    let library = extension == b"so" || has_any(name, &[".so."]);
    if library || matches!(extension, b"pyc" | b"beam" | b"jar" | b"node" | b"mjs" | b"ko" | b"jsa" | b"app") {
        return Likelihood::Code;
    }
    if mode & 0o111 != 0 {
        return Likelihood::Code;
    }
    if matches!(extension, b"py" | b"js" | b"cjs" | b"rb" | b"pl" | b"pm" | b"lua" | b"php" | b"json" | b"conf" | b"sql" | b"bki" | b"cfg" | b"toml" | b"yaml" | b"yml" | b"control" | b"html")
        || starts_any(path, &["etc/", "opt/", "app/", "srv/", "home/"])
    {
        return Likelihood::Modules;
    }
    Likelihood::Other
}

/// One regular file, as much as the prior needs of it.
#[derive(Debug, Clone, Copy)]
pub struct File<'a> {
    pub path: &'a [u8],
    pub mode: u32,
    /// Where its content lies in the uncompressed layer.
    pub offset: u64,
    pub size: u64,
}

/// Sums up how valuable the spans of a layer are.
///
/// A span's value is the mean weight of its bytes; equal values keep the order of the layer, so that neighbours merge.
pub struct Values<'a> {
    ends: &'a [u64],
    value: Vec<f32>,
}

impl<'a> Values<'a> {
    /// `ends[i]` is where span `i` ends in the uncompressed layer, ascending.
    pub fn new(ends: &'a [u64]) -> Values<'a> {
        Values { ends, value: vec![0.0; ends.len()] }
    }

    /// Counts one file.
    pub fn add(&mut self, file: File<'_>) {
        let weight = likelihood(file.path, file.mode).weight();
        let mut at = file.offset;
        let end = file.offset.saturating_add(file.size);
        let mut span = self.ends.partition_point(|&e| e <= at);
        while at < end && span < self.ends.len() {
            let part = end.min(self.ends[span]) - at;
            self.value[span] += weight * part as f32;
            at += part;
            span += 1;
        }
    }

    /// The order in which to stream the spans.
    pub fn order(self) -> Vec<Ranked> {
        let mut start = 0;
        let mut ranked: Vec<Ranked> = self
            .ends
            .iter()
            .zip(self.value)
            .enumerate()
            .map(|(span, (&end, value))| {
                let length = end.saturating_sub(start).max(1);
                start = end;
                Ranked { span, value: value / length as f32 }
            })
            .collect();
        // Steps of a half keep runs of similar spans together: contiguous ranges are cheaper than a perfect order.
        ranked.sort_by(|a, b| ((b.value * 2.0) as u32).cmp(&((a.value * 2.0) as u32)).then(a.span.cmp(&b.span)));
        ranked
    }
}

/// A span and the mean weight of its bytes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ranked {
    pub span: usize,
    pub value: f32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_starts_a_container_comes_before_what_documents_it() {
        let of = |path: &str, mode| likelihood(path.as_bytes(), mode);
        assert_eq!(of("lib/x86_64-linux-gnu/ld-linux-x86-64.so.2", 0o755), Likelihood::Always);
        assert_eq!(of("usr/bin/redis-server", 0o755), Likelihood::Code);
        assert_eq!(of("usr/lib/libssl.so.3", 0o644), Likelihood::Code);
        assert_eq!(of("usr/lib/python3/dist-packages/numpy/core/multiarray.py", 0o644), Likelihood::Modules);
        assert_eq!(of("usr/share/doc/redis/changelog", 0o644), Likelihood::Rarely);
        assert_eq!(of("usr/lib/libfoo.a", 0o644), Likelihood::Rarely);
        assert_eq!(of("usr/lib/python3/numpy/core/tests/test_x.py", 0o644), Likelihood::Rarely);
        assert_eq!(of("", 0), Likelihood::Other);
    }

    #[test]
    fn spans_with_code_are_streamed_first_and_all_spans_are_streamed() {
        let ends = [100, 200, 300];
        let files = [
            File { path: b"usr/share/doc/a", mode: 0o644, offset: 0, size: 100 },
            File { path: b"usr/bin/b", mode: 0o755, offset: 100, size: 90 },
            File { path: b"var/x", mode: 0o644, offset: 190, size: 500 },
        ];
        let mut values = Values::new(&ends);
        files.into_iter().for_each(|file| values.add(file));
        let spans: Vec<usize> = values.order().iter().map(|r| r.span).collect();
        assert_eq!(spans, [1, 2, 0]);
    }
}
