//! The journal: what an operator may have to act on is said through the message catalog, with the fields that its explanation names.

#[path = "journal/real.rs"]
mod real;

use regex::Regex;
use soci::telemetry::catalog::Message;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// Warnings that no operator acts on, with the reason.
const NOT_CATALOGUED: &[(&str, &str)] = &[
    ("daemon/run.rs: skipped snapshotter is supported check", "the operator has asked for it; Go's text and level"),
    ("grpc/server.rs: cannot accept", "the client sees it; out of descriptors is said elsewhere"),
];

fn sources() -> Vec<(String, String)> {
    fn walk(directory: &Path, out: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => walk(&path, out),
                false if path.extension().is_some_and(|e| e == "rs") => out.push(path),
                false => {}
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    walk(&root, &mut files);
    let is_code = |path: &PathBuf| {
        let name = path.strip_prefix(&root).unwrap();
        !name.starts_with("cli") && !name.ends_with("tests.rs") && !name.starts_with("telemetry")
    };
    files
        .into_iter()
        .filter(is_code)
        .map(|path| {
            let text = fs::read_to_string(&path).unwrap();
            // Tests stand last.
            let code = text.rsplit_once("#[cfg(test)]").map_or(text.as_str(), |(code, _)| code).to_owned();
            (path.strip_prefix(&root).unwrap().display().to_string(), code)
        })
        .collect()
}

/// The arguments of each call of the macro `name`, with the file it is in.
fn calls(name: &str) -> Vec<(String, String)> {
    let start = Regex::new(&format!(r"\b{name}!\(")).unwrap();
    let mut out = Vec::new();
    for (file, text) in sources() {
        for found in start.find_iter(&text) {
            let mut depth = 1;
            let rest = &text[found.end()..];
            let end = rest.char_indices().find(|(_, c)| {
                depth += i32::from(*c == '(') - i32::from(*c == ')');
                depth == 0
            });
            out.push((file.clone(), rest[..end.expect("a closing bracket").0].to_owned()));
        }
    }
    out
}

#[test]
fn warnings_and_errors_are_said_through_the_catalog() {
    let mut wrong = Vec::new();
    for name in ["warn", "error"] {
        for (file, arguments) in calls(&format!("tracing::{name}")) {
            let known = |(what, _): &(&str, &str)| {
                let (place, words) = what.split_once(": ").unwrap();
                place == file && arguments.contains(words)
            };
            if !NOT_CATALOGUED.iter().any(known) {
                wrong.push(format!("{file}: {name}!({})", arguments.split_whitespace().collect::<Vec<_>>().join(" ")));
            }
        }
    }
    assert!(wrong.is_empty(), "say these with telemetry::catalog::say!:\n{}", wrong.join("\n"));
}

#[test]
fn every_message_is_said_somewhere_with_the_fields_its_explanation_names() {
    let named = Regex::new(r"@SOCI_([A-Z_]+)@").unwrap();
    let mut places: BTreeMap<String, usize> = BTreeMap::new();
    let mut wrong = Vec::new();
    for (file, arguments) in calls("say") {
        let name = arguments.trim_start().split(|c: char| !c.is_alphanumeric()).next().unwrap_or_default();
        *places.entry(name.to_owned()).or_default() += 1;
        let message = Message::ALL.iter().find(|m| m.name() == name).expect("the compiler knows it");
        let entry = message.entry();
        let texts = [entry.happened, entry.means, entry.act].concat();
        let wanted: BTreeSet<String> = named.captures_iter(&texts).map(|c| c[1].to_lowercase()).collect();
        for field in wanted {
            if !Regex::new(&format!(r"[%?\s(,]{field}\b")).unwrap().is_match(&arguments) {
                wrong.push(format!("{file}: {name} is said without {field}"));
            }
        }
    }
    // Said by `logs::fatal`.
    places.insert(Message::CannotStart.name().to_owned(), 1);
    let silent = Message::ALL.iter().filter(|m| !places.contains_key(m.name()));
    wrong.extend(silent.map(|m| format!("{} is never said", m.name())));
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
