//! Flags of the commands that look into what was made, and of those that write texts about the tool.

use super::values;
use clap::Args as ClapArgs;
use std::{ffi::OsString, path::PathBuf};

/// `soci index list`.
#[derive(Debug, ClapArgs)]
pub struct IndexList {
    /// Only indexes of this image
    #[arg(long, value_name = "IMAGE")]
    pub r#ref: Option<String>,
    /// Print digests only
    #[arg(short, long, num_args = 0..=1, require_equals = true, default_value_t = false, hide_default_value = true, value_name = "BOOL", default_missing_value = "true", value_parser = values::boolean)]
    pub quiet: bool,
    /// Only indexes for os/architecture[/variant] (may be repeated)
    #[arg(short, long, value_delimiter = ',')]
    pub platform: Vec<String>,
    /// Print a JSON array
    #[arg(long, num_args = 0..=1, require_equals = true, default_value_t = false, hide_default_value = true, value_name = "BOOL", default_missing_value = "true", value_parser = values::boolean)]
    pub json: bool,
    #[arg(hide = true)]
    pub operands: Vec<OsString>,
}

/// `soci index remove`.
#[derive(Debug, ClapArgs)]
pub struct IndexRemove {
    /// Remove all indexes of this image
    #[arg(long, value_name = "IMAGE")]
    pub r#ref: Option<String>,
    /// Digests of indexes
    #[arg(value_name = "DIGEST")]
    pub operands: Vec<String>,
}

/// `soci ztoc list`.
#[derive(Debug, ClapArgs)]
pub struct ZtocList {
    /// Only this zTOC
    #[arg(long, value_name = "DIGEST")]
    pub ztoc_digest: Option<String>,
    /// Only zTOCs of this image
    #[arg(long, value_name = "IMAGE")]
    pub image_ref: Option<String>,
    /// Print digests only
    #[arg(short, long, num_args = 0..=1, require_equals = true, default_value_t = false, hide_default_value = true, value_name = "BOOL", default_missing_value = "true", value_parser = values::boolean)]
    pub quiet: bool,
    /// Print a JSON array
    #[arg(long, num_args = 0..=1, require_equals = true, default_value_t = false, hide_default_value = true, value_name = "BOOL", default_missing_value = "true", value_parser = values::boolean)]
    pub json: bool,
    #[arg(hide = true)]
    pub operands: Vec<OsString>,
}

/// `soci prefetch list`.
#[derive(Debug, ClapArgs)]
pub struct PrefetchList {
    /// Print a JSON array
    #[arg(long, num_args = 0..=1, require_equals = true, default_value_t = false, hide_default_value = true, value_name = "BOOL", default_missing_value = "true", value_parser = values::boolean)]
    pub json: bool,
    #[arg(hide = true)]
    pub operands: Vec<OsString>,
}

/// `soci prefetch info`.
#[derive(Debug, ClapArgs)]
pub struct PrefetchInfo {
    /// Print the artifact itself, too
    #[arg(long, num_args = 0..=1, require_equals = true, default_value_t = false, hide_default_value = true, value_name = "BOOL", default_missing_value = "true", value_parser = values::boolean)]
    pub json: bool,
    /// Digest of the artifact
    #[arg(value_name = "DIGEST")]
    pub operands: Vec<String>,
}

/// `soci rebuild-db`.
#[derive(Debug, ClapArgs)]
pub struct RebuildDb {
    #[arg(hide = true)]
    pub operands: Vec<OsString>,
}

/// `soci completions`.
#[derive(Debug, ClapArgs)]
pub struct Completions {
    /// For which shell: bash, elvish, fish, powershell or zsh
    pub shell: clap_complete::Shell,
}

/// `soci man`.
#[derive(Debug, ClapArgs)]
pub struct Man {
    /// The directory to write them to
    #[arg(value_name = "DIR")]
    pub directory: PathBuf,
}

/// `soci index info` and `soci ztoc info`.
#[derive(Debug, ClapArgs)]
pub struct Info {
    /// Look for blobs in this OCI layout (a directory or a tar file) instead of a content store
    #[arg(long, value_name = "PATH")]
    pub layout: Option<PathBuf>,
    /// A digest, or the path of a file
    #[arg(value_name = "DIGEST|FILE")]
    pub operands: Vec<OsString>,
}

/// `soci ztoc get-file`.
#[derive(Debug, ClapArgs)]
pub struct GetFile {
    /// Look for the zTOC and the layer in this OCI layout (a directory or a tar file) instead of a content store
    #[arg(long, value_name = "PATH")]
    pub layout: Option<PathBuf>,
    /// Write here instead of to stdout
    #[arg(short, long, value_name = "PATH")]
    pub output: Option<PathBuf>,
    /// Digest (or path) of a zTOC, and the name of a file in it
    #[arg(value_name = "DIGEST|FILE NAME")]
    pub operands: Vec<OsString>,
}
