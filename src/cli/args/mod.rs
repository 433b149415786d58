//! What the command line may say. The definitions are clap's; the habits (`-longname`, `--flag=false`, values that begin with a
//! dash, flags before or after the command) are those of the Go tools, brought about by [`reading`].

mod artifacts;
mod images;
mod node;
mod reading;

use super::values;
use clap::{Args as ClapArgs, Parser, Subcommand};
use std::{path::PathBuf, time::Duration};

pub use artifacts::{
    Completions, GetFile, IndexList, IndexRemove, Info, Man, PrefetchInfo, PrefetchList, RebuildDb, ZtocList,
};
pub use images::{Access, Convert, Create, Format, Indexing, Platforms, Push};
pub use node::{Doctor, Enable, Explain, Status, Target};
pub use reading::{NotACommand, parse};

/// What the release is called; part of `soci --version`, which nerdctl reads. `build.rs` finds both.
pub const VERSION: &str = env!("SOCI_VERSION");
const REVISION: &str = env!("SOCI_REVISION");

const GLOBAL: &str = "Global options";
const REGISTRY: &str = "Registry options";

/// Index container images for lazy loading.
#[derive(Debug, Parser)]
#[command(name = "soci", disable_help_subcommand = true, disable_help_flag = true, disable_version_flag = true)]
#[command(args_override_self = true, max_term_width = 100, version = "")]
pub struct Args {
    #[command(flatten)]
    pub global: Global,
    /// Print the version
    #[arg(short = 'v', long)]
    pub version: bool,
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// Flags that every command takes, before or after its name.
#[derive(Debug, Clone, ClapArgs)]
pub struct Global {
    /// Socket of containerd
    #[arg(short, long, global = true, help_heading = GLOBAL, env = "CONTAINERD_ADDRESS", default_value = "/run/containerd/containerd.sock")]
    pub address: String,
    /// Namespace to use in containerd
    #[arg(short, long, global = true, help_heading = GLOBAL, env = "CONTAINERD_NAMESPACE", default_value = "default")]
    pub namespace: String,
    /// Give up after this time, for example 30s or 5m; 0 is never
    #[arg(long, global = true, help_heading = GLOBAL, default_value = "0", value_parser = values::duration)]
    pub timeout: Duration,
    /// Print HTTP requests while pushing
    #[arg(long, global = true, help_heading = GLOBAL, num_args = 0..=1, require_equals = true, default_value_t = false, hide_default_value = true, value_name = "BOOL", default_missing_value = "true", value_parser = values::boolean)]
    pub debug: bool,
    /// Where blobs are kept: containerd or soci
    #[arg(long, global = true, help_heading = GLOBAL, default_value = "containerd")]
    pub content_store: String,
    /// Root directory of the snapshotter; the soci content store is in content/ below it
    #[arg(long, global = true, help_heading = GLOBAL, default_value = "/var/lib/soci-snapshotter-grpc/")]
    pub root: PathBuf,
    /// Print help
    #[arg(short, long, global = true, help_heading = GLOBAL)]
    pub help: bool,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a SOCI index (v1) for an image; `soci push` uploads it
    Create(Box<Create>),
    /// Turn an image into one that carries its SOCI index (v2)
    Convert(Box<Convert>),
    /// Upload the SOCI index (v1) of an image to the image's registry
    Push(Box<Push>),
    /// List, look into and remove SOCI indexes
    Index {
        #[command(subcommand)]
        command: Option<IndexCommand>,
    },
    /// List and look into zTOCs
    Ztoc {
        #[command(subcommand)]
        command: Option<ZtocCommand>,
    },
    /// List and look into prefetch artifacts
    Prefetch {
        #[command(subcommand)]
        command: Option<PrefetchCommand>,
    },
    /// Make artifacts.db agree with what is in the content store
    RebuildDb(RebuildDb),
    /// Print what a shell needs to complete soci's commands and flags
    Completions(Completions),
    /// Write soci's man pages
    #[command(hide = true)]
    Man(Man),
    /// Show what the snapshotter of this node does: images, layers, how much is here, errors
    Status(Status),
    /// Show what was decided for each layer of an image, and why
    Explain(Explain),
    /// Look for what keeps this node from loading images lazily, and say how to put it right
    Doctor(Doctor),
    /// Make containerd, or Kubernetes on top of it, use the snapshotter
    Enable(Enable),
    /// Take back what enable did
    Disable(Enable),
    /// Print help of a command
    #[command(visible_alias = "h")]
    Help { topic: Vec<String> },
}

#[derive(Debug, Subcommand)]
pub enum IndexCommand {
    /// List SOCI indexes, newest first
    #[command(visible_alias = "ls")]
    List(IndexList),
    /// Print a SOCI index as indented JSON
    Info(Info),
    /// Remove SOCI indexes
    #[command(visible_alias = "rm")]
    Remove(IndexRemove),
}

#[derive(Debug, Subcommand)]
pub enum ZtocCommand {
    /// List zTOCs
    #[command(visible_alias = "ls")]
    List(ZtocList),
    /// Print what is in a zTOC, as JSON
    Info(Info),
    /// Print or save one file of a layer, found through the layer's zTOC
    GetFile(GetFile),
}

#[derive(Debug, Subcommand)]
pub enum PrefetchCommand {
    /// List prefetch artifacts
    #[command(visible_alias = "ls")]
    List(PrefetchList),
    /// Print which spans a prefetch artifact names
    Info(PrefetchInfo),
}
