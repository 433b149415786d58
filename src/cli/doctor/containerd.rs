//! containerd: whether it knows the snapshotter, and tells it what it needs to know.

use super::Finding;
use crate::cli::{
    args,
    node::{
        Node, NodeError,
        settings::{self, NAME},
    },
    output,
};
use std::{
    fs,
    path::{Path, PathBuf},
    time::SystemTime,
};

const CHECK: &str = "containerd";

pub fn look(address: &Path, args: &args::Doctor, snapshotter: &Path) -> Vec<Finding> {
    let node = match Node::find(address, args.containerd.as_deref(), args.containerd_config.as_deref()) {
        Ok(node) => node,
        Err(error @ NodeError::Version { .. }) => {
            let fix = "it may be a containerd inside something else: soci enable k3s prints what to do there";
            return vec![Finding::warning(CHECK, output::chain(&error), fix)];
        }
        Err(error) => return vec![Finding::problem(CHECK, output::chain(&error), "install and start containerd")],
    };
    let mut out = vec![match &node.running {
        Some(running) => Finding::ok(
            CHECK,
            format!("{} runs, pid {}, configuration {}", node.version, running.pid, node.config.display()),
        ),
        None => Finding::problem(
            CHECK,
            format!("{} is installed, but nobody listens at {}", node.version, address.display()),
            "systemctl start containerd; another socket can be named with --address",
        ),
    }];
    let dump = match node.dump(&node.config) {
        Ok(dump) => dump,
        Err(error) => {
            out.push(Finding::problem(CHECK, output::chain(&error), "correct its configuration"));
            return out;
        }
    };
    out.push(plugin(dump.plugin_address(), snapshotter));
    out.extend(dump.unpacks().map(|unpacks| match unpacks {
        true => Finding::ok("transfer service", "unpacks into the snapshotter"),
        false => Finding::warning(
            "transfer service",
            "does not know the snapshotter: ctr images pull --snapshotter soci fails with \"no unpack platforms defined\"",
            "soci enable containerd",
        ),
    }));
    out.push(cri(dump.cri()));
    if let Some(running) = &node.running
        && let Some(path) = files(&node.config).into_iter().find(|path| changed(path) > Some(running.started))
    {
        out.push(Finding::warning(
            CHECK,
            format!("{} was changed after containerd was started: it does not have that yet", path.display()),
            "systemctl restart containerd",
        ));
    }
    out
}

/// Pure.
fn plugin(address: Option<&str>, snapshotter: &Path) -> Finding {
    let fix = "soci enable containerd (with --dry-run to see first what it changes)";
    match address {
        None => Finding::problem(CHECK, format!("does not know the snapshotter: proxy_plugins.{NAME} is missing"), fix),
        Some(address) if Path::new(address.trim_start_matches("unix://")) == snapshotter => {
            Finding::ok(CHECK, format!("knows the snapshotter at {address}"))
        }
        Some(address) => Finding::problem(
            CHECK,
            format!("looks for the snapshotter at {address}, not at {}", snapshotter.display()),
            format!("{fix}; or name the daemon's socket with --daemon"),
        ),
    }
}

/// Pure. `settings`: CRI's snapshotter, and whether it is told of images.
fn cri(settings: Option<(&str, bool)>) -> Finding {
    const CHECK: &str = "CRI";
    match settings {
        None => Finding::skipped(CHECK, "is disabled: Kubernetes does not use this containerd"),
        Some((NAME, true)) => Finding::ok(CHECK, "uses the snapshotter and tells it of images"),
        Some((NAME, false)) => Finding::problem(
            CHECK,
            "uses the snapshotter but does not tell it of images (disable_snapshot_annotations is true): nothing is loaded lazily",
            "soci enable cri",
        ),
        Some((other, _)) => Finding::warning(
            CHECK,
            format!("uses the snapshotter {other}: pods are not loaded lazily"),
            "soci enable cri, if this node is to load pods lazily",
        ),
    }
}

/// The configuration and the files that it imports.
fn files(config: &Path) -> Vec<PathBuf> {
    let text = fs::read_to_string(config).unwrap_or_default();
    let directories = settings::imported_directories(&text, config).unwrap_or_default();
    let imported = directories.iter().filter_map(|directory| fs::read_dir(directory).ok()).flatten();
    let imported =
        imported.filter_map(|entry| Some(entry.ok()?.path())).filter(|p| p.extension().is_some_and(|e| e == "toml"));
    std::iter::once(config.to_owned()).chain(imported).collect()
}

fn changed(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).and_then(|m| m.modified()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::Verdict;

    #[test]
    fn annotations_that_are_off_are_a_problem_and_another_snapshotter_may_be_meant() {
        assert_eq!(cri(Some(("soci", true))).verdict, Verdict::Ok);
        assert_eq!(cri(Some(("soci", false))).verdict, Verdict::Problem);
        assert_eq!(cri(Some(("overlayfs", true))).verdict, Verdict::Warning);
        assert_eq!(cri(None).verdict, Verdict::Skipped);
    }

    #[test]
    fn the_plugin_must_be_where_the_daemon_listens() {
        let ours = Path::new("/run/s.sock");
        assert_eq!(plugin(Some("unix:///run/s.sock"), ours).verdict, Verdict::Ok);
        assert_eq!(plugin(Some("/run/other.sock"), ours).verdict, Verdict::Problem);
        assert!(plugin(None, ours).fix.is_some_and(|fix| fix.contains("soci enable")));
    }
}
