//! Which spans of a layer are likely to be read soon: a cheap prior over the paths of the files in them.
//!
//! Nothing here knows the image. The classes come from what starts read on eight real images (`tests/bench`): a program, its
//! shared libraries, the modules of its interpreter; never documentation, locales, headers, static archives or tests.
//!
//! Absent on purpose: state. What was read on this node is the scheduler's business.

use super::toc::Toc;
use crate::ztoc::SpanTable;

/// How likely a file is to be read while a container starts, most likely first. The order is the order of streaming.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Likelihood {
    /// The dynamic loader, the C library, shells, the configuration that every start reads.
    Always,
    /// Shared libraries, compiled modules of interpreters.
    Code,
    /// Programs: a layer may have hundreds, and a container runs a few.
    Programs,
    /// Source modules, configuration, small data.
    Modules,
    /// Everything not told apart.
    Other,
    /// Documentation, locales, headers, static archives, tests, package databases.
    Rarely,
}

const CLASSES: usize = 6;

impl Likelihood {
    /// How likely a file of this class and `weight` is to be read while a container starts, where the files of the class weigh `total`.
    ///
    /// What a start reads of a class does not grow with the layer: a base image has hundreds of programs and runs a handful. So the
    /// expected number is shared among them. Interpreters' modules are read in proportion: whole packages at a time.
    fn probability(self, weight: f32, total: f32) -> f32 {
        let share = |expected: f32| expected * weight / total.max(1.0);
        // A file that weighs more than most is what its layer is for.
        let most = 0.5 * (weight / 3.0).max(1.0);
        match self {
            Likelihood::Always => 0.7,
            Likelihood::Code => share(15.0).max(0.02).min(most),
            Likelihood::Programs => share(1.5).min(most),
            Likelihood::Modules => share(2.0).clamp(0.02, 0.5),
            Likelihood::Other => share(1.0).clamp(0.001, 0.5),
            Likelihood::Rarely => 0.0002,
        }
    }

    /// How much a file of `size` bytes weighs among its class. Of programs and libraries the large ones are why an image was made; small
    /// ones come along by the hundred.
    fn weight(self, size: u64) -> f32 {
        match self {
            Likelihood::Code | Likelihood::Programs => {
                1.0 + 2.0 * (size as f32 / ORDINARY_CODE).log2().clamp(0.0, MOST_DOUBLINGS)
            }
            _ => 1.0,
        }
    }
}

/// Programs and libraries up to this size are ordinary.
const ORDINARY_CODE: f32 = 262_144.0;
/// A library of 16 MB or more is as likely as they get.
const MOST_DOUBLINGS: f32 = 6.0;

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
            "usr/share/doc",
            "usr/share/man",
            "usr/share/locale",
            "usr/share/info",
            "usr/share/help",
            "usr/share/icons",
            "usr/share/bash-completion",
            "usr/share/lintian",
            "usr/share/zsh",
            "usr/share/perl5/pod",
            "usr/include/",
            "usr/src/",
            "usr/local/include/",
            "usr/local/share/man",
            "usr/local/share/doc",
            "var/cache/",
            "var/lib/dpkg",
            "var/lib/apt",
            "var/lib/rpm",
            "var/lib/apk",
            "var/log/",
            "usr/share/mime",
            "usr/share/i18n",
            "boot/",
        ],
    ) || matches!(
        extension,
        b"a" | b"la"
            | b"h"
            | b"hpp"
            | b"hh"
            | b"cuh"
            | b"inc"
            | b"c"
            | b"cc"
            | b"cpp"
            | b"pyi"
            | b"map"
            | b"md"
            | b"rst"
            | b"po"
            | b"mo"
            | b"pod"
            | b"gz"
            | b"ts"
            | b"debug"
    ) || has_any(
        path,
        &["/tests/", "/test/", "/testing/tests", "/examples/", "/include/", "/docs/", "dist-info/", "/licenses/"],
    ) {
        return Likelihood::Rarely;
    }
    if has_any(path, &["/gconv/"]) && extension == b"so" {
        return Likelihood::Rarely;
    }
    if starts_any(path, &["usr/lib/locale/C."]) {
        return Likelihood::Always;
    }
    if starts_any(
        name,
        &[
            "ld-linux",
            "libnss_",
            "libgcc_s",
            "libstdc++.so",
            "libcrypt.so",
            "libexpat.so",
            "librt.so",
            "libresolv.so",
            "libc.so",
            "libm.so",
            "libpthread",
            "libdl.so",
            "libselinux",
            "libpcre2-8",
            "libtinfo",
        ],
    ) || matches!(
        name,
        b"sh"
            | b"dash"
            | b"bash"
            | b"env"
            | b"libz.so.1"
            | b"ld.so.cache"
            | b"passwd"
            | b"group"
            | b"nsswitch.conf"
            | b"busybox"
            | b"gconv-modules.cache"
            | b"localtime"
    ) {
        return Likelihood::Always;
    }
    if has_any(path, &["/perl/", "/perl5/", "/perl-base/"]) {
        return Likelihood::Other;
    }
    let library = extension == b"so" || has_any(name, &[".so."]);
    if library || matches!(extension, b"pyc" | b"beam" | b"jar" | b"node" | b"mjs" | b"ko" | b"jsa" | b"app") {
        return Likelihood::Code;
    }
    if mode & 0o111 != 0 {
        return Likelihood::Programs;
    }
    if matches!(
        extension,
        b"py"
            | b"js"
            | b"cjs"
            | b"rb"
            | b"pl"
            | b"pm"
            | b"lua"
            | b"php"
            | b"json"
            | b"conf"
            | b"sql"
            | b"bki"
            | b"cfg"
            | b"toml"
            | b"yaml"
            | b"yml"
            | b"control"
            | b"html"
    ) || starts_any(path, &["etc/", "opt/", "app/", "srv/", "home/"])
    {
        return Likelihood::Modules;
    }
    Likelihood::Other
}

/// Whether a file is a program or a library: when one page of it is touched, others follow.
pub fn is_code(name: &[u8], mode: u32) -> bool {
    matches!(likelihood(name, mode), Likelihood::Always | Likelihood::Code | Likelihood::Programs)
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

/// Sums up how likely each span of a layer is to be read.
///
/// A span is needed as soon as one of its files is, so its value is the probability of that: `1 - e^-sum`, with a little of the sum
/// itself to tell apart those that are all but certain.
pub struct Values<'a> {
    ends: &'a [u64],
    files: Vec<Counted>,
    /// What the files of each class weigh together.
    totals: [f32; CLASSES],
}

struct Counted {
    offset: u64,
    end: u64,
    class: Likelihood,
    weight: f32,
}

impl<'a> Values<'a> {
    /// `ends[i]` is where span `i` ends in the uncompressed layer, ascending.
    pub fn new(ends: &'a [u64]) -> Values<'a> {
        Values { ends, files: Vec::new(), totals: [0.0; CLASSES] }
    }

    /// Counts one file.
    pub fn add(&mut self, file: File<'_>) {
        if file.size == 0 {
            return;
        }
        let class = likelihood(file.path, file.mode);
        let weight = class.weight(file.size);
        self.totals[class as usize] += weight;
        self.files.push(Counted { offset: file.offset, end: file.offset.saturating_add(file.size), class, weight });
    }

    /// The order in which to stream the spans. `interest` multiplies how much of the layer is expected to be read.
    pub fn order(self, interest: f32) -> Vec<Ranked> {
        let mut sums = vec![0.0_f32; self.ends.len()];
        for file in &self.files {
            let chance = file.class.probability(file.weight, self.totals[file.class as usize]) * interest;
            let first = self.ends.partition_point(|&end| end <= file.offset);
            let mut start = file.offset;
            for (sum, &span_end) in sums.iter_mut().zip(self.ends).skip(first) {
                if start >= file.end {
                    break;
                }
                *sum += chance;
                start = span_end;
            }
        }
        let value = |sum: f32| 1.0 - (-sum).exp() + 0.02 * sum.ln_1p();
        let mut ranked: Vec<Ranked> =
            sums.into_iter().enumerate().map(|(span, sum)| Ranked { span, value: value(sum) }).collect();
        // Steps keep runs of similar spans together: contiguous ranges are cheaper than a perfect order.
        let step = |value: f32| (value * 20.0) as u32;
        ranked.sort_by(|a, b| step(b.value).cmp(&step(a.value)).then(a.span.cmp(&b.span)));
        ranked
    }
}

/// A span, and how likely it is to be read.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ranked {
    pub span: usize,
    pub value: f32,
}

/// The order in which to stream the spans of a layer, by the paths of its files; see [`Values::order`].
pub fn rank(table: &SpanTable, toc: &Toc, interest: f32) -> Vec<Ranked> {
    let ends: Vec<u64> = table.spans.iter().map(|s| s.uncompressed.end).collect();
    let mut value = Values::new(&ends);
    // Files of a directory are neighbours in the table, so its path is put together once.
    let (mut directory, mut path) = (None, Vec::new());
    for file in toc.files() {
        if directory != Some(file.parent) {
            directory = Some(file.parent);
            path = toc.path(file.parent);
            if !path.is_empty() {
                path.push(b'/');
            }
        }
        let length = path.len();
        path.extend_from_slice(file.name);
        value.add(File { path: &path, mode: file.mode & 0o7777, offset: file.offset, size: file.size });
        path.truncate(length);
    }
    value.order(interest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_starts_a_container_comes_before_what_documents_it() {
        let of = |path: &str, mode| likelihood(path.as_bytes(), mode);
        assert_eq!(of("lib/x86_64-linux-gnu/ld-linux-x86-64.so.2", 0o755), Likelihood::Always);
        assert_eq!(of("usr/bin/redis-server", 0o755), Likelihood::Programs);
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
        let spans: Vec<usize> = values.order(1.0).iter().map(|r| r.span).collect();
        assert_eq!(spans, [1, 2, 0]);
    }
}
