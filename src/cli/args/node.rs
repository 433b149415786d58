//! Flags of the commands about this node: `status`, `explain`, `doctor`, `enable` and `disable`.

use super::values;
use crate::layout;
use clap::Args as ClapArgs;
use std::path::PathBuf;

/// Where the daemon is.
#[derive(Debug, Clone, ClapArgs)]
pub struct Daemon {
    /// Socket that containerd reaches the snapshotter at
    #[arg(long, value_name = "SOCKET", default_value = layout::DEFAULT_ADDRESS, value_parser = socket)]
    pub daemon: PathBuf,
}

/// A path, which may be written as containerd writes it: `unix:///run/…`.
fn socket(text: &str) -> Result<PathBuf, std::convert::Infallible> {
    Ok(text.strip_prefix("unix://").unwrap_or(text).into())
}

/// `soci status`.
#[derive(Debug, ClapArgs)]
pub struct Status {
    #[command(flatten)]
    pub daemon: Daemon,
    /// Print one JSON document
    #[arg(long, num_args = 0..=1, require_equals = true, default_value_t = false, hide_default_value = true, value_name = "BOOL", default_missing_value = "true", value_parser = values::boolean)]
    pub json: bool,
}

/// `soci explain`.
#[derive(Debug, ClapArgs)]
pub struct Explain {
    #[command(flatten)]
    pub daemon: Daemon,
    /// Configuration of the daemon
    #[arg(long, value_name = "FILE", default_value = layout::DEFAULT_CONFIG)]
    pub config: PathBuf,
    /// Digest of the SOCI index to look at, as a client would name it
    #[arg(long, value_name = "DIGEST")]
    pub index: Option<String>,
    /// Print one JSON document
    #[arg(long, num_args = 0..=1, require_equals = true, default_value_t = false, hide_default_value = true, value_name = "BOOL", default_missing_value = "true", value_parser = values::boolean)]
    pub json: bool,
    /// The image, written in full: docker.io/library/redis:7
    #[arg(value_name = "IMAGE")]
    pub operands: Vec<String>,
}

/// `soci doctor`.
#[derive(Debug, ClapArgs)]
pub struct Doctor {
    #[command(flatten)]
    pub daemon: Daemon,
    /// Configuration of the daemon
    #[arg(long, value_name = "FILE", default_value = layout::DEFAULT_CONFIG)]
    pub config: PathBuf,
    /// The program containerd, where it cannot be found
    #[arg(long, value_name = "FILE")]
    pub containerd: Option<PathBuf>,
    /// containerd's configuration, where it is not the one it runs with
    #[arg(long, value_name = "FILE")]
    pub containerd_config: Option<PathBuf>,
    /// Print one JSON document
    #[arg(long, num_args = 0..=1, require_equals = true, default_value_t = false, hide_default_value = true, value_name = "BOOL", default_missing_value = "true", value_parser = values::boolean)]
    pub json: bool,
    /// An image, whose registry is then looked at, too
    #[arg(value_name = "IMAGE")]
    pub operands: Vec<String>,
}

/// `soci enable` and `soci disable`.
#[derive(Debug, ClapArgs)]
pub struct Enable {
    /// containerd: clients may name the snapshotter; cri: Kubernetes uses it, too; docker, k3s: print what to put where
    #[arg(value_enum)]
    pub target: Target,
    /// Show what would change, and change nothing
    #[arg(long, num_args = 0..=1, require_equals = true, default_value_t = false, hide_default_value = true, value_name = "BOOL", default_missing_value = "true", value_parser = values::boolean)]
    pub dry_run: bool,
    /// Take back what enable did, as disable does
    #[arg(long, num_args = 0..=1, require_equals = true, default_value_t = false, hide_default_value = true, value_name = "BOOL", default_missing_value = "true", value_parser = values::boolean)]
    pub undo: bool,
    #[command(flatten)]
    pub daemon: Daemon,
    /// The program containerd, where it cannot be found
    #[arg(long, value_name = "FILE")]
    pub containerd: Option<PathBuf>,
    /// containerd's configuration, where it is not the one it runs with
    #[arg(long, value_name = "FILE")]
    pub containerd_config: Option<PathBuf>,
}

/// Who is to use the snapshotter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Target {
    Containerd,
    Cri,
    Docker,
    K3s,
}

impl Target {
    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Target::Containerd => "containerd",
            Target::Cri => "cri",
            Target::Docker => "docker",
            Target::K3s => "k3s",
        }
    }
}
