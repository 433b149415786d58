//! SIGHUP: the configuration is read again, and what can change does.
//!
//! ```text
//! file ──▶ load ──┬─ cannot be used: nothing changes, the error is logged and stays in the status line
//!                 └─ usable ──▶ compare with what runs ──┬─ keys of LIVE: applied
//!                                                        └─ others: named, as they need a restart
//! ```
//!
//! Invariant: all or nothing of the live keys is applied; a file with an error in its last line changes nothing.
//! Invariant: a key that needs a restart is named at every reload until the daemon was restarted or the file was put back.

use super::{
    condition::{Cause, Condition},
    lazy::LazyMounts,
    observe::{Observers, OperationLog},
    registries::{hosts, http_settings},
    run::{discovery, lazy_settings, scheduling},
    settings,
    systemd::{self, Note},
};
use crate::{
    config::{self, Config},
    layout::Layout,
    snapshot,
    telemetry::{catalog::say, metrics::Metrics},
};
use std::{path::PathBuf, sync::Arc};
use tokio::signal::unix::Signal;

/// Settings, or tables of settings, that take effect without a restart. For layers that are mounted already, requests keep the
/// mirrors and time-outs they began with; everything else holds at once.
const LIVE: &[&str] = &[
    "debug",
    "disable_verification",
    "mount_timeout_sec",
    "fuse.log_fuse_operations",
    "http",
    "blob",
    "resolver.host",
    "registry",
    "background_fetch.disable",
    "background_fetch.fetch_period_msec",
    "background_fetch.silence_period_msec",
    "background_fetch.max_bytes_per_sec",
    "pull_modes.soci_v1",
    "pull_modes.soci_v2",
    "prefetch.enable",
    "layer_store.max_size",
    "layer_store.high_water",
    "layer_store.low_water",
];

fn is_live(key: &str) -> bool {
    LIVE.iter().any(|live| key.strip_prefix(live).is_some_and(|rest| rest.is_empty() || rest.starts_with('.')))
}

/// What a new configuration means for a running daemon.
#[derive(Debug, PartialEq, Eq)]
struct Difference {
    /// Keys that are applied now.
    applied: Vec<String>,
    /// Keys that differ from what the daemon was started with, and stay as they were.
    restart: Vec<String>,
}

/// `started`: what the daemon was started with; `applied`: what the last reload made of it.
fn difference(started: &Config, applied: &Config, new: &Config) -> Difference {
    let live = config::changes(applied, new).into_iter().filter(|key| is_live(key)).collect();
    let restart = config::changes(started, new).into_iter().filter(|key| !is_live(key)).collect();
    Difference { applied: live, restart }
}

/// What can be changed.
pub struct Parts {
    pub layout: Layout,
    pub lazy: Arc<LazyMounts>,
    pub observers: Arc<Observers>,
    pub metrics: Metrics,
    pub condition: Arc<Condition>,
}

impl Parts {
    fn apply(&self, config: &Config) -> Result<(), crate::registry::RegistryError> {
        // The only step that can fail comes first.
        self.lazy.registry.reconfigure(http_settings(config), hosts(config))?;
        self.lazy.store.shared().scheduler.reconfigure(scheduling(config));
        self.lazy.indexes.reconfigure(discovery(config));
        self.lazy.reconfigure(lazy_settings(config));
        self.observers.log_operations(OperationLog::of(config));
        if !config.background_fetch.disable {
            self.metrics.background_fetch_enabled();
        }
        Ok(())
    }
}

/// Reads `path` again whenever `hangup` comes.
pub async fn on_hangup(mut hangup: Signal, path: PathBuf, started: Config, parts: Parts, note: Note) {
    let mut applied = started.clone();
    while hangup.recv().await.is_some() {
        systemd::reloading();
        let file = path.clone();
        let loaded = tokio::task::spawn_blocking(move || config::load(&file)).await;
        if let Ok(loaded) = loaded {
            note.set(reload(loaded, &started, &mut applied, &parts));
        }
        systemd::ready();
    }
}

/// What is to be seen in the status line from now on.
fn reload(
    loaded: Result<config::Loaded, config::ConfigError>,
    started: &Config,
    applied: &mut Config,
    parts: &Parts,
) -> Option<String> {
    let refused = |error: String| {
        say!(
            ConfigNotReloaded,
            error,
            "the configuration was not reloaded, nothing has changed: correct the file and reload again"
        );
        Some(format!("CONFIGURATION NOT RELOADED: {error}"))
    };
    let loaded = match loaded {
        Ok(loaded) => loaded,
        Err(error) => return refused(snapshot::chain(&error)),
    };
    for warning in loaded.warning_lines() {
        say!(ConfigDoubtful, "{warning}");
    }
    let new = loaded.config;
    let Difference { applied: changed, restart } = difference(started, applied, &new);
    if !changed.is_empty()
        && let Err(error) = parts.apply(&new)
    {
        return refused(snapshot::chain(&error));
    }
    settings::keep(&parts.layout, &new);
    // A daemon that was started with a broken file has waited for this one.
    parts.condition.over(Cause::Config);
    *applied = new;
    match changed.is_empty() {
        true => tracing::info!("configuration reloaded: nothing that can change without a restart has changed"),
        false => say!(ConfigReloaded, applied = changed.join(", "), "configuration reloaded"),
    }
    if restart.is_empty() {
        return None;
    }
    let keys = restart.join(", ");
    say!(
        ConfigNeedsRestart,
        keys,
        "these settings take effect after a restart of the daemon, which running containers survive: \
         systemctl restart soci-snapshotter"
    );
    Some(format!("restart needed for {keys}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn parsed(text: &str) -> Config {
        config::parse(text, Path::new("test.toml")).unwrap().config
    }

    #[test]
    fn every_live_key_is_a_key() {
        let keys: Vec<String> = config::keys().into_iter().map(|(key, _)| key).collect();
        for live in LIVE {
            assert!(keys.iter().any(|key| key == live), "{live}");
        }
    }

    #[test]
    fn what_can_change_is_told_from_what_needs_a_restart() {
        let started = Config::default();
        let new = parsed(
            "metrics_address = \"127.0.0.1:1\"\n[background_fetch]\nmax_bytes_per_sec = 1000\n\
             [[resolver.host.\"docker.io\".mirrors]]\nhost = \"https://mirror.example\"\n",
        );
        let found = difference(&started, &started, &new);
        assert_eq!(found.restart, ["metrics_address"]);
        assert_eq!(found.applied.len(), 2, "{found:?}");
        assert_eq!(found.applied[0], "background_fetch.max_bytes_per_sec");
        assert!(found.applied[1].starts_with("resolver.host."), "{found:?}");
    }

    #[test]
    fn a_key_that_needs_a_restart_is_named_until_the_file_is_put_back() {
        let (started, new) = (Config::default(), parsed("[layer_store]\ncache_memory_mb = 99\n"));
        // Already seen by the last reload, and still not in effect.
        assert_eq!(difference(&started, &new, &new).restart, ["layer_store.cache_memory_mb"]);
        assert_eq!(difference(&started, &new, &started), Difference { applied: Vec::new(), restart: Vec::new() });
    }

    #[test]
    fn what_has_no_effect_anyway_is_not_mentioned() {
        let started = Config::default();
        let new = parsed("metadata_store = \"db-multi\"\n[fuse]\nattr_timeout = 7\n");
        assert_eq!(difference(&started, &started, &new), Difference { applied: Vec::new(), restart: Vec::new() });
    }
}
