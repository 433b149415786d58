//! Which settings the daemon runs with: those of the file; or, where the file is broken and containers depend on this daemon, the last good ones.
//!
//! After each good start a copy of the settings is kept in the root directory. A broken file on a node without lazily loaded layers is an error:
//! nobody depends on the daemon there, and whoever starts it is looking.

use super::{
    record,
    registries::{self, RegistriesError},
};
use crate::{
    config::{self, Config, ConfigError},
    layout::Layout,
    snapshot::chain,
    telemetry::catalog::say,
};
use std::{
    io::{self, Write},
    os::unix::fs::PermissionsExt,
    path::Path,
};

/// What [`choose`] found.
#[derive(Debug)]
pub struct Chosen {
    pub config: Config,
    /// Lines for the log.
    pub warnings: Vec<String>,
    /// Why these are not the file's.
    pub trouble: Option<String>,
}

/// Why a file's settings are not used.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    #[error(transparent)]
    File(#[from] ConfigError),
    #[error(transparent)]
    Registries(#[from] RegistriesError),
}

/// What a file says, if a daemon on the socket `address` can run with it.
fn usable(path: &Path, address: &str) -> Result<Chosen, SettingsError> {
    let loaded = config::load(path)?;
    registries::no_circle(&loaded.config, address)?;
    let warnings = loaded.warning_lines();
    Ok(Chosen { config: loaded.config, warnings, trouble: None })
}

/// The settings to run with.
pub fn choose(path: &Path, address: &str, layout: &Layout) -> Result<Chosen, SettingsError> {
    let error = match usable(path, address) {
        Ok(chosen) => return Ok(chosen),
        Err(error) => error,
    };
    if record::all(layout).is_empty() {
        return Err(error);
    }
    let kept = layout.settings_kept();
    let (config, which) = match config::load(&kept) {
        Ok(loaded) => (loaded.config, format!("those of the last good start, in {}", kept.display())),
        Err(_) => (Config::default(), "the defaults, since there is no copy of earlier ones".to_owned()),
    };
    let trouble = format!("{}; the settings in use are {which}", chain(&error));
    Ok(Chosen { config, warnings: Vec::new(), trouble: Some(trouble) })
}

/// Keeps a copy of good settings for [`choose`]. Without it the daemon runs on, with a warning.
pub fn keep(layout: &Layout, config: &Config) {
    if let Err(error) = write(layout, config) {
        say!(SettingsNotKept, %error, "cannot keep a copy of the settings");
    }
}

/// What is there stays until the new copy is on disk.
fn write(layout: &Layout, config: &Config) -> io::Result<()> {
    let path = layout.settings_kept();
    let text = config::render(config);
    if std::fs::read_to_string(&path).is_ok_and(|there| there == text) {
        return Ok(());
    }
    let mut file = tempfile::Builder::new()
        .prefix("settings-")
        .permissions(std::fs::Permissions::from_mode(0o600))
        .tempfile_in(layout.root())?;
    file.write_all(text.as_bytes())?;
    file.as_file().sync_data()?;
    file.persist(path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broken_file_is_an_error_where_nobody_depends_on_us_and_else_the_last_good_settings_are_used() {
        let dir = tempfile::tempdir().unwrap();
        let (file, layout) = (dir.path().join("config.toml"), Layout::new(dir.path().join("root")));
        std::fs::create_dir_all(layout.snapshots().join("7")).unwrap();
        std::fs::write(&file, "mount_timeout_sec = 77").unwrap();
        let good = choose(&file, "/run/sock", &layout).unwrap();
        keep(&layout, &good.config);
        std::fs::write(&file, "mount_timeout_sec = nonsense").unwrap();
        assert!(choose(&file, "/run/sock", &layout).is_err());
        std::fs::write(layout.snapshot_lazy_record(crate::layout::SnapshotId(7)), "{}").unwrap();
        let chosen = choose(&file, "/run/sock", &layout).unwrap();
        assert_eq!(chosen.config.mount_timeout.duration(), Some(std::time::Duration::from_secs(77)));
        let trouble = chosen.trouble.unwrap();
        assert!(trouble.contains("config.toml") && trouble.contains("last good start"), "{trouble}");
        // And with no copy of earlier ones, the defaults.
        std::fs::remove_file(layout.settings_kept()).unwrap();
        assert!(choose(&file, "/run/sock", &layout).unwrap().trouble.unwrap().contains("defaults"));
        std::fs::remove_file(&file).unwrap();
        assert!(choose(&file, "/run/sock", &layout).unwrap().trouble.is_some(), "a file that is gone is no better");
    }
}
