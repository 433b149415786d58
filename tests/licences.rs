//! Every crate we depend on, tests included, may be used under a licence that `.deny.toml` allows.

use std::process::Command;

#[test]
fn every_dependency_has_an_allowed_licence() {
    let allowed = allowed();
    // Only what this machine builds: what it does not need, it may not have.
    let rustc = Command::new("rustc").arg("-vV").output().unwrap().stdout;
    let host =
        String::from_utf8(rustc).unwrap().lines().find_map(|l| l.strip_prefix("host: ").map(String::from)).unwrap();
    let metadata = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--locked", "--offline", "--filter-platform", &host])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert!(metadata.status.success(), "{}", String::from_utf8_lossy(&metadata.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&metadata.stdout).unwrap();
    let refused: Vec<String> = metadata["packages"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|p| !p["source"].is_null()) // ours have none
        .filter(|p| !p["license"].as_str().is_some_and(|l| permits(l, &allowed)))
        .map(|p| format!("{} {}: {}", p["name"], p["version"], p["license"]))
        .collect();
    assert!(refused.is_empty(), "not under a licence of .deny.toml:\n{}", refused.join("\n"));
}

#[test]
fn licence_expressions_are_understood() {
    let allowed = ["MIT".to_string(), "Apache-2.0".to_string(), "Apache-2.0 WITH LLVM-exception".to_string()];
    for expression in
        ["MIT", "GPL-2.0 OR MIT", "GPL-2.0/MIT", "(GPL-2.0 OR MIT) AND Apache-2.0", "Apache-2.0 WITH LLVM-exception"]
    {
        assert!(permits(expression, &allowed), "{expression}");
    }
    for expression in
        ["", "GPL-2.0", "MIT AND GPL-2.0", "(MIT OR Apache-2.0) AND Unicode-3.0", "MIT WITH x", "MIT OR", "(MIT"]
    {
        assert!(!permits(expression, &allowed), "{expression}");
    }
}

fn allowed() -> Vec<String> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/.deny.toml");
    let file: toml_edit::DocumentMut = std::fs::read_to_string(path).unwrap().parse().unwrap();
    let allow = file["licenses"]["allow"].as_array().unwrap();
    allow.iter().map(|l| l.as_str().unwrap().to_string()).collect()
}

/// Whether an SPDX expression (or the old form with slashes) can be met with licences of `allowed` alone. What does not parse cannot.
fn permits(expression: &str, allowed: &[String]) -> bool {
    let spaced = expression.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut rest = &words[..];
    any(&mut rest, allowed).is_some_and(|yes| yes && rest.is_empty())
}

fn any(words: &mut &[&str], allowed: &[String]) -> Option<bool> {
    let mut met = all(words, allowed)?;
    while words.first() == Some(&"OR") {
        *words = &words[1..];
        met |= all(words, allowed)?;
    }
    Some(met)
}

fn all(words: &mut &[&str], allowed: &[String]) -> Option<bool> {
    let mut met = one(words, allowed)?;
    while words.first() == Some(&"AND") {
        *words = &words[1..];
        met &= one(words, allowed)?;
    }
    Some(met)
}

fn one(words: &mut &[&str], allowed: &[String]) -> Option<bool> {
    let (&first, rest) = words.split_first()?;
    *words = rest;
    match first {
        "(" => {
            let met = any(words, allowed)?;
            let (&close, rest) = words.split_first()?;
            *words = rest;
            (close == ")").then_some(met)
        }
        ")" | "AND" | "OR" | "WITH" => None,
        _ if words.first() == Some(&"WITH") => {
            let exception = words.get(1)?;
            *words = &words[2..];
            Some(allowed.contains(&format!("{first} WITH {exception}")))
        }
        _ => Some(allowed.iter().any(|a| a == first)),
    }
}
