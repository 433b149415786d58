//! `soci doctor [IMAGE]`: looks at everything that lazy loading needs on this node, says what is wrong, and how to put it right.
//!
//! * It changes nothing and starts nothing.
//! * Each check gives findings of its own; none stops the others.
//! * Exit code: 0 if no finding is a problem, 1 otherwise. Warnings are for people.

mod containerd;
mod host;
mod image;

use super::{args, daemon, status::json};
use crate::{
    config::{self, Config},
    telemetry::status::{State, Status},
};
use serde::Serialize;
use std::{
    fmt::Write as _,
    io::{self, Write},
    path::Path,
};

/// Why the command failed.
#[derive(Debug, thiserror::Error)]
pub enum DoctorError {
    #[error("{problems} of {checks} checks found a problem")]
    Problems { problems: usize, checks: usize },
    #[error("doctor looks at one image at most")]
    Operands,
    #[error("cannot print")]
    Print(#[from] io::Error),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Verdict {
    Ok,
    /// Works, but perhaps not as meant.
    Warning,
    /// Does not work.
    Problem,
    /// Could not be looked at, or does not apply here.
    Skipped,
}

/// What one look found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Finding {
    pub check: &'static str,
    pub verdict: Verdict,
    pub found: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
}

impl Finding {
    pub fn ok(check: &'static str, found: impl Into<String>) -> Finding {
        Finding { check, verdict: Verdict::Ok, found: found.into(), fix: None }
    }
    pub fn skipped(check: &'static str, found: impl Into<String>) -> Finding {
        Finding { check, verdict: Verdict::Skipped, found: found.into(), fix: None }
    }
    pub fn warning(check: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Finding {
        Finding { check, verdict: Verdict::Warning, found: found.into(), fix: Some(fix.into()) }
    }
    pub fn problem(check: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Finding {
        Finding { check, verdict: Verdict::Problem, found: found.into(), fix: Some(fix.into()) }
    }
}

#[derive(Serialize)]
struct Report<'a> {
    healthy: bool,
    findings: &'a [Finding],
}

/// Looks, prints, judges.
pub fn run(args: &args::Doctor, global: &args::Global) -> Result<(), DoctorError> {
    if args.operands.len() > 1 {
        return Err(DoctorError::Operands);
    }
    let mut findings = host::kernel();
    findings.extend(host::root(&global.root));
    let loaded = config::load(&args.config);
    findings.extend(configuration(&args.config, &loaded));
    findings.extend(host::units());
    findings.extend(snapshotter(&args.daemon.daemon));
    let containerd = Path::new(global.address.trim_start_matches("unix://"));
    findings.extend(containerd::look(containerd, args, &args.daemon.daemon));
    if let Some(name) = args.operands.first() {
        let config = loaded.map_or_else(|_| Config::default(), |loaded| loaded.config);
        findings.extend(image::look(name, &config));
    }
    let problems = findings.iter().filter(|finding| finding.verdict == Verdict::Problem).count();
    let text = match args.json {
        true => json(&Report { healthy: problems == 0, findings: &findings })?,
        false => text(&findings),
    };
    io::stdout().lock().write_all(text.as_bytes())?;
    match problems {
        0 => Ok(()),
        _ => Err(DoctorError::Problems { problems, checks: findings.len() }),
    }
}

fn text(findings: &[Finding]) -> String {
    let mut out = String::new();
    for Finding { check, verdict, found, fix } in findings {
        let word = match verdict {
            Verdict::Ok => "ok",
            Verdict::Warning => "WARNING",
            Verdict::Problem => "PROBLEM",
            Verdict::Skipped => "skipped",
        };
        // Writing to a String cannot fail.
        let _ = writeln!(out, "{word:8} {check}: {found}");
        if let Some(fix) = fix {
            let _ = writeln!(out, "         fix: {fix}");
        }
    }
    out
}

fn configuration(path: &Path, loaded: &Result<config::Loaded, config::ConfigError>) -> Vec<Finding> {
    const CHECK: &str = "configuration";
    match loaded {
        Err(error) => vec![Finding::problem(
            CHECK,
            super::output::chain(error),
            format!("correct {}; soci-snapshotter-grpc config check --config {0} shows all of it", path.display()),
        )],
        Ok(loaded) if loaded.warnings.is_empty() => vec![Finding::ok(CHECK, path.display().to_string())],
        Ok(loaded) => {
            let fix = "a key that is not known is a setting that is not in effect: correct it or take it out";
            loaded.warning_lines().into_iter().map(|line| Finding::warning(CHECK, line, fix)).collect()
        }
    }
}

/// The daemon, by what it says of itself.
fn snapshotter(address: &Path) -> Vec<Finding> {
    const CHECK: &str = "snapshotter";
    let start = "systemctl start soci-snapshotter; journalctl -u soci-snapshotter -x says why it does not start";
    if let Err(error) = super::node::answers(address) {
        let found = format!("nobody listens at {}: {error}", address.display());
        return vec![Finding::problem("socket", found, "systemctl enable --now soci-snapshotter.socket")];
    }
    let mut out = vec![Finding::ok("socket", address.display().to_string())];
    let status: Status = match daemon::ask(address) {
        Ok(status) => status,
        Err(error) => {
            out.push(Finding::problem(CHECK, super::output::chain(&error), start));
            return out;
        }
    };
    let (own, _) = config::args::version();
    let name = format!("soci-snapshotter {}, pid {}", status.version, status.pid);
    out.push(match (&status.state, &status.trouble) {
        (State::Serving, _) => Finding::ok(CHECK, format!("{name}, serving")),
        (State::Starting, _) => Finding::warning(CHECK, format!("{name}, is still starting"), "wait, and ask again"),
        (State::Degraded | State::Unknown, Some(trouble)) => Finding::problem(
            CHECK,
            format!("{name}, takes nothing new ({}): {}", trouble.reason, trouble.error),
            "correct what it names; then systemctl restart soci-snapshotter",
        ),
        (State::Degraded | State::Unknown, None) => Finding::warning(
            CHECK,
            format!("{name}, in a state that this soci does not know"),
            "use the soci of the same version",
        ),
    });
    if own != status.version {
        let found = format!("the daemon that runs is {}, this soci is {own}", status.version);
        out.push(Finding::warning("version", found, "systemctl restart soci-snapshotter (containers go on)"));
    }
    out.push(match status.connection_kept {
        true => Finding::ok("soci-mount", "keeps the FUSE connection for the next daemon"),
        false => Finding::problem(
            "soci-mount",
            "does not answer: if the daemon ends now, containers lose their lazily loaded layers",
            "systemctl restart soci-mount, before anything restarts soci-snapshotter",
        ),
    });
    for (image, layer) in status.images.iter().flat_map(|i| i.layers.iter().map(move |l| (i, l))) {
        if let Some(lazy) = layer.lazy.as_ref().filter(|lazy| lazy.read_errors > 0) {
            let last = lazy.last_error.as_deref().unwrap_or_default();
            let found = format!(
                "{}: {} reads of layer {} failed, the last: {last}",
                image.image, lazy.read_errors, layer.layer
            );
            out.push(Finding::warning("reads", found, format!("soci doctor {}", image.image)));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_is_seen_at_once_and_comes_with_its_fix() {
        let findings = [Finding::ok("kernel", "6.1"), Finding::problem("socket", "nobody listens", "start it")];
        let shown = text(&findings);
        assert_eq!(shown, "ok       kernel: 6.1\nPROBLEM  socket: nobody listens\n         fix: start it\n");
    }
}
