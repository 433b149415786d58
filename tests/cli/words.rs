//! Completions and man pages.

use super::soci;
use crate::support::command::attempt;
use std::process::Command;

#[test]
fn completions_are_what_a_shell_understands() {
    for (shell, part) in [
        ("bash", "complete -F"),
        ("zsh", "#compdef soci"),
        ("fish", "complete -c soci"),
        ("elvish", "soci"),
        ("powershell", "soci"),
    ] {
        let text = soci(["completions", shell]).ok();
        assert!(text.text().contains(part) && text.text().contains("min-layer-size"), "{shell}");
    }
    let script = soci(["completions", "bash"]).ok();
    let checked = attempt(Command::new("bash").args(["-n", "-c", script.text()]));
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
    assert_eq!(soci(["completions", "tcsh"]).code, 1);
}

#[test]
fn every_command_has_a_man_page() {
    let dir = tempfile::tempdir().unwrap();
    soci(["man", dir.path().to_str().unwrap()]).ok();
    let names = super::names(dir.path());
    for name in [
        "soci.1",
        "soci-create.1",
        "soci-convert.1",
        "soci-push.1",
        "soci-index.1",
        "soci-index-list.1",
        "soci-index-remove.1",
        "soci-ztoc-get-file.1",
        "soci-prefetch-info.1",
        "soci-rebuild-db.1",
        "soci-ci.7",
        "soci-check.7",
    ] {
        assert!(names.iter().any(|n| n == name), "{name} is not among {names:?}");
    }
    for name in names {
        let text = std::fs::read_to_string(dir.path().join(&name)).unwrap();
        let title = text.lines().find(|l| l.starts_with(".TH ")).unwrap_or_else(|| panic!("{name} has no title"));
        assert!(title.to_lowercase().contains(name.split('.').next().unwrap()), "{title}");
        assert!(text.contains(".SH NAME"), "{name}");
    }
    let page = std::fs::read_to_string(dir.path().join("soci.1")).unwrap();
    assert!(page.contains("EXIT STATUS") && page.contains("CONTAINERD_ADDRESS"));
}
