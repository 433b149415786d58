//! Flags of the commands that index images: `create`, `convert` and `push`.

use super::{
    REGISTRY,
    values::{self, BadValue},
};
use clap::Args as ClapArgs;
use std::{ffi::OsString, path::PathBuf};

/// How an image is indexed; the same for `create` and `convert`.
#[derive(Debug, ClapArgs)]
pub struct Indexing {
    #[command(flatten)]
    pub platforms: Platforms,
    /// Uncompressed bytes that are fetched and verified together: 65536 to 134217728
    #[arg(long, default_value = "4194304", value_parser = values::int64)]
    pub span_size: i64,
    /// Smaller layers get no zTOC
    #[arg(long, default_value = "10485760", value_parser = values::int64)]
    pub min_layer_size: i64,
    /// Optional optimisations; xattr marks layers that have no extended attributes
    #[arg(long, value_delimiter = ',')]
    pub optimizations: Vec<String>,
    /// Never reuse an existing zTOC
    #[arg(short, long, num_args = 0..=1, require_equals = true, default_value_t = false, hide_default_value = true, value_name = "BOOL", default_missing_value = "true", value_parser = values::boolean)]
    pub force: bool,
    /// A file of the image that should be fetched when a container starts (may be repeated)
    #[arg(long, value_delimiter = ',')]
    pub prefetch_file: Vec<String>,
    /// A JSON array of such files
    #[arg(long)]
    pub prefetch_files_json: Option<PathBuf>,
    /// Memory that layers being indexed may take together, for example 512MiB
    #[arg(long, default_value = "1GiB", value_name = "SIZE", value_parser = values::bytes)]
    pub max_memory: u64,
    /// Print one JSON document on stdout instead of a line for each layer
    #[arg(long, num_args = 0..=1, require_equals = true, default_value_t = false, hide_default_value = true, value_name = "BOOL", default_missing_value = "true", value_parser = values::boolean)]
    pub json: bool,
    /// Print nothing but warnings, errors and digests
    #[arg(short, long, num_args = 0..=1, require_equals = true, default_value_t = false, hide_default_value = true, value_name = "BOOL", default_missing_value = "true", value_parser = values::boolean)]
    pub quiet: bool,
}

/// How the registry is reached; the same for all commands that reach one.
#[derive(Debug, Clone, ClapArgs)]
pub struct Access {
    /// Login at the registry (of DESTINATION, where there are two): user[:password]; without it, docker's and podman's
    /// configuration and login helpers are asked
    #[arg(short, long, help_heading = REGISTRY)]
    pub user: Option<String>,
    /// Talk plain HTTP to the registry
    #[arg(long, help_heading = REGISTRY, num_args = 0..=1, require_equals = true, default_value_t = false, hide_default_value = true, value_name = "BOOL", default_missing_value = "true", value_parser = values::boolean)]
    pub plain_http: bool,
    /// Do not check the registry's certificate
    #[arg(short = 'k', long, help_heading = REGISTRY, num_args = 0..=1, require_equals = true, default_value_t = false, hide_default_value = true, value_name = "BOOL", default_missing_value = "true", value_parser = values::boolean)]
    pub skip_verify: bool,
    /// Directories with a directory for each registry, in it hosts.toml or certificates, as containerd and Docker have them
    #[arg(long, help_heading = REGISTRY, value_delimiter = ',', value_name = "DIR", default_values = crate::registry::DEFAULT_DIRECTORIES)]
    pub hosts_dir: Vec<PathBuf>,
    /// Certificate authority that the registry's certificate is checked with
    #[arg(long, help_heading = REGISTRY, value_name = "FILE")]
    pub tlscacert: Option<PathBuf>,
    /// Our own certificate
    #[arg(long, help_heading = REGISTRY, value_name = "FILE")]
    pub tlscert: Option<PathBuf>,
    /// The key of our own certificate, where --tlscert has it not
    #[arg(long, help_heading = REGISTRY, value_name = "FILE")]
    pub tlskey: Option<PathBuf>,
    /// Accepted for the Go CLI's sake
    #[arg(long, hide = true)]
    pub refresh: Option<String>,
    /// Accepted for the Go CLI's sake; see --debug
    #[arg(long, hide = true, num_args = 0..=1, require_equals = true, default_value_t = false, hide_default_value = true, value_name = "BOOL", default_missing_value = "true", value_parser = values::boolean)]
    pub http_dump: bool,
    /// Accepted for the Go CLI's sake; see --debug
    #[arg(long, hide = true, num_args = 0..=1, require_equals = true, default_value_t = false, hide_default_value = true, value_name = "BOOL", default_missing_value = "true", value_parser = values::boolean)]
    pub http_trace: bool,
}

/// `soci create`.
#[derive(Debug, ClapArgs)]
pub struct Create {
    #[command(flatten)]
    pub indexing: Indexing,
    /// Read the image from its registry and push the index there, without containerd
    #[arg(long, num_args = 0..=1, require_equals = true, default_value_t = false, hide_default_value = true, value_name = "BOOL", default_missing_value = "true", value_parser = values::boolean)]
    pub registry: bool,
    #[command(flatten)]
    pub access: Access,
    /// Name of the image
    #[arg(value_name = "IMAGE")]
    pub operands: Vec<String>,
}

/// `soci convert`.
#[derive(Debug, ClapArgs)]
pub struct Convert {
    #[command(flatten)]
    pub indexing: Indexing,
    /// Work on OCI layouts, without containerd: SOURCE and DESTINATION are paths
    #[arg(long, num_args = 0..=1, require_equals = true, default_value_t = false, hide_default_value = true, value_name = "BOOL", default_missing_value = "true", value_parser = values::boolean)]
    pub standalone: bool,
    /// What to write with --standalone: oci-archive (a tar file) or oci-dir (a directory)
    #[arg(long, default_value = "oci-archive", value_parser = Format::parse)]
    pub format: Format,
    /// From registry to registry, without containerd and without disk: SOURCE and DESTINATION are references
    #[arg(long, conflicts_with = "standalone", num_args = 0..=1, require_equals = true, default_value_t = false, hide_default_value = true, value_name = "BOOL", default_missing_value = "true", value_parser = values::boolean)]
    pub registry: bool,
    #[command(flatten)]
    pub access: Access,
    /// SOURCE and DESTINATION
    #[arg(value_name = "SOURCE DESTINATION")]
    pub operands: Vec<OsString>,
}

/// `soci push`.
#[derive(Debug, ClapArgs)]
pub struct Push {
    #[command(flatten)]
    pub platforms: Platforms,
    #[command(flatten)]
    pub access: Access,
    /// Accepted for the Go CLI's sake
    #[arg(long, hide = true, env = "CONTAINERD_SNAPSHOTTER")]
    pub snapshotter: Option<String>,
    /// When the image has an index already: warn (and push), skip, or allow (do not look)
    #[arg(long, default_value = "warn")]
    pub existing_index: String,
    /// Blobs at a time
    #[arg(long, default_value = "3", value_parser = values::uint64)]
    pub max_concurrent_uploads: u64,
    /// Print one JSON document on stdout instead of lines
    #[arg(long, num_args = 0..=1, require_equals = true, default_value_t = false, hide_default_value = true, value_name = "BOOL", default_missing_value = "true", value_parser = values::boolean)]
    pub json: bool,
    /// Print only the digests of the indexes
    #[arg(short, long, num_args = 0..=1, require_equals = true, default_value_t = false, hide_default_value = true, value_name = "BOOL", default_missing_value = "true", value_parser = values::boolean)]
    pub quiet: bool,
    /// Name of the image
    #[arg(value_name = "IMAGE")]
    pub operands: Vec<String>,
}

#[derive(Debug, ClapArgs)]
pub struct Platforms {
    /// Every platform of the image
    #[arg(long, num_args = 0..=1, require_equals = true, default_value_t = false, hide_default_value = true, value_name = "BOOL", default_missing_value = "true", value_parser = values::boolean)]
    pub all_platforms: bool,
    /// os/architecture[/variant] (may be repeated)
    #[arg(short, long, value_delimiter = ',')]
    pub platform: Vec<String>,
}

/// What `convert --standalone` writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Archive,
    Directory,
}

impl Format {
    fn parse(text: &str) -> Result<Format, BadValue> {
        match text {
            "oci-archive" => Ok(Format::Archive),
            "oci-dir" => Ok(Format::Directory),
            _ => Err(BadValue::Format(text.to_owned())),
        }
    }

    /// The flag's value.
    pub fn name(self) -> &'static str {
        match self {
            Format::Archive => "oci-archive",
            Format::Directory => "oci-dir",
        }
    }
}
