//! What the user sees: result lines on stdout, warnings and progress on stderr.
//!
//! Lines are exactly those of the Go CLI, in an order that does not depend on scheduling. Progress bars appear on a terminal only,
//! and step aside for lines. Warnings are kept, because `--json` repeats them.

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::{
    io::{self, IsTerminal, Read, Write},
    sync::{Mutex, PoisonError},
};

/// Where result lines go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lines {
    Stdout,
    /// Stdout is taken by something else.
    Stderr,
    /// A JSON document will say it all.
    Nowhere,
    /// Nobody wants to see them, nor any progress.
    Silent,
}

/// The user's screen, or log file.
#[derive(Debug)]
pub struct Console {
    lines: Lines,
    bars: Option<MultiProgress>,
    warnings: Mutex<Vec<String>>,
}

impl Lines {
    /// As `--json` and `--quiet` say.
    pub fn of(json: bool, quiet: bool) -> Lines {
        match (json, quiet) {
            (_, true) => Lines::Silent,
            (true, false) => Lines::Nowhere,
            (false, false) => Lines::Stdout,
        }
    }
}

impl Console {
    /// A console; with bars if stderr is a terminal.
    pub fn new(lines: Lines) -> Console {
        let shown = lines != Lines::Silent && io::stderr().is_terminal();
        let bars = shown.then(|| MultiProgress::with_draw_target(ProgressDrawTarget::stderr_with_hz(8)));
        Console { lines, bars, warnings: Mutex::default() }
    }

    fn undisturbed<T>(&self, print: impl FnOnce() -> T) -> T {
        match &self.bars {
            Some(bars) => bars.suspend(print),
            None => print(),
        }
    }

    /// One line of the result.
    pub fn line(&self, text: &str) -> io::Result<()> {
        self.undisturbed(|| match self.lines {
            Lines::Stdout => writeln!(io::stdout().lock(), "{text}"),
            Lines::Stderr => writeln!(io::stderr().lock(), "{text}"),
            Lines::Nowhere | Lines::Silent => Ok(()),
        })
    }

    /// Something the user should know, and that does not fail the command.
    pub fn warn(&self, text: impl Into<String>) {
        let text = text.into();
        self.undisturbed(|| {
            let mut stderr = io::stderr().lock();
            // Nobody is left to tell when stderr cannot be written.
            let _ = if stderr.is_terminal() {
                writeln!(stderr, "warning: {text}")
            } else {
                let now = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ");
                writeln!(stderr, "time=\"{now}\" level=warning msg={text:?}")
            };
        });
        self.warnings.lock().unwrap_or_else(PoisonError::into_inner).push(text);
    }

    /// The warnings so far.
    pub fn warnings(&self) -> Vec<String> {
        self.warnings.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// `reader`, with a bar that shows how far it was read. The bar goes away with it.
    pub fn progress<R: Read>(&self, name: String, length: u64, reader: R) -> Progress<R> {
        let bar = self.bars.as_ref().map(|bars| {
            let style = "{prefix} {bar:30} {binary_bytes:>10}/{binary_total_bytes} {binary_bytes_per_sec}";
            let bar = bars.add(ProgressBar::new(length)).with_prefix(name);
            // A malformed template is ours; the plain style does as well.
            bar.set_style(ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar
        });
        Progress { reader, bar }
    }
}

/// See [`Console::progress`].
pub struct Progress<R> {
    reader: R,
    bar: Option<ProgressBar>,
}

impl<R: Read> Read for Progress<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let read = self.reader.read(out)?;
        if let Some(bar) = &self.bar {
            bar.inc(read as u64);
        }
        Ok(read)
    }
}

impl<R> Drop for Progress<R> {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// A number of bytes for people: `12.3 MiB`.
pub fn bytes(bytes: u64) -> String {
    indicatif::HumanBytes(bytes).to_string()
}

/// Lines around a change that are shown.
const CONTEXT: usize = 3;

/// Turns `before` into `after`: removed lines with `-`, new ones with `+`, what is near them with a blank, the rest left out.
pub fn diff(before: &[&str], after: &[&str]) -> String {
    // common[i][j]: longest common subsequence of before[i..] and after[j..]. Configurations have some hundred lines.
    let mut common = vec![vec![0u32; after.len() + 1]; before.len() + 1];
    for i in (0..before.len()).rev() {
        for j in (0..after.len()).rev() {
            common[i][j] = match before[i] == after[j] {
                true => common[i + 1][j + 1] + 1,
                false => common[i + 1][j].max(common[i][j + 1]),
            };
        }
    }
    let (mut i, mut j, mut lines) = (0, 0, Vec::new());
    while i < before.len() || j < after.len() {
        if i < before.len() && j < after.len() && before[i] == after[j] {
            lines.push((' ', before[i]));
            (i, j) = (i + 1, j + 1);
        } else if j < after.len() && (i == before.len() || common[i][j + 1] > common[i + 1][j]) {
            lines.push(('+', after[j]));
            j += 1;
        } else {
            lines.push(('-', before[i]));
            i += 1;
        }
    }
    let changed = |at: usize| lines.get(at).is_some_and(|(sign, _)| *sign != ' ');
    let near = |at: usize| (at.saturating_sub(CONTEXT)..=at + CONTEXT).any(changed);
    let mut out = String::new();
    let mut left_out = false;
    for (at, (sign, line)) in lines.iter().enumerate() {
        if near(at) {
            out.push_str(&format!("{sign}{line}\n"));
            left_out = false;
        } else if !std::mem::replace(&mut left_out, true) {
            out.push_str(" …\n");
        }
    }
    out
}

/// An error and its causes, outermost first.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// Indents JSON by two blanks, as Go's `json.Indent`: bytes of strings and numbers are left as they are.
pub fn indent(json: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(json.len() * 2);
    let (mut depth, mut in_string, mut escaped, mut opened) = (0usize, false, false, false);
    let newline = |out: &mut Vec<u8>, depth: usize| {
        out.push(b'\n');
        out.extend(std::iter::repeat_n(b' ', depth * 2));
    };
    for &byte in json {
        if in_string {
            out.push(byte);
            in_string = escaped || byte != b'"';
            escaped = !escaped && byte == b'\\';
            continue;
        }
        if byte.is_ascii_whitespace() {
            continue;
        }
        // An empty object or list stays on one line.
        let was_opened = std::mem::take(&mut opened);
        if was_opened && !matches!(byte, b'}' | b']') {
            depth += 1;
            newline(&mut out, depth);
        }
        match byte {
            b'{' | b'[' => {
                opened = true;
                out.push(byte);
            }
            b'}' | b']' => {
                if !was_opened {
                    depth = depth.saturating_sub(1);
                    newline(&mut out, depth);
                }
                out.push(byte);
            }
            b',' => {
                out.push(byte);
                newline(&mut out, depth);
            }
            b':' => out.extend_from_slice(b": "),
            b'"' => {
                in_string = true;
                out.push(byte);
            }
            _ => out.push(byte),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_shows_what_changes_and_what_is_near() {
        let before: Vec<String> = (0..20).map(|n| format!("line {n}")).collect();
        let before: Vec<&str> = before.iter().map(String::as_str).collect();
        let mut after = before.clone();
        after[10] = "other";
        after.push("more");
        let wanted = " …\n line 7\n line 8\n line 9\n-line 10\n+other\n line 11\n line 12\n line 13\n …\n line 17\n line 18\n line 19\n+more\n";
        assert_eq!(diff(&before, &after), wanted);
        assert_eq!(diff(&[], &["a"]), "+a\n");
    }

    #[test]
    fn json_is_indented_without_touching_its_values() {
        let json = br#"{"a":[1,{"b":"x\"{,:\\"}],"c":{},"d":[ ] , "e" : 1e+5}"#;
        let want = "{\n  \"a\": [\n    1,\n    {\n      \"b\": \"x\\\"{,:\\\\\"\n    }\n  ],\n  \"c\": {},\n  \"d\": [],\n  \"e\": 1e+5\n}";
        assert_eq!(String::from_utf8(indent(json)).unwrap(), want);
    }
}
