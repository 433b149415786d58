//! What the command line may say. The definitions are clap's; the habits (`-longname`, `--flag=false`, values that begin with a
//! dash, flags before or after the command) are those of the Go tools, brought about by [`normalise`].

use super::values::{self, BadValue};
use crate::layout;
use clap::{Args as ClapArgs, CommandFactory, Parser, Subcommand, error::ContextKind, error::ErrorKind};
use std::{
    collections::HashMap,
    error::Error as _,
    ffi::{OsStr, OsString},
    os::unix::ffi::OsStrExt,
    path::PathBuf,
    time::Duration,
};

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
    /// Login: user[:password]; without it, docker's configuration and its login helpers are asked
    #[arg(short, long, help_heading = REGISTRY)]
    pub user: Option<String>,
    /// Talk plain HTTP to the registry
    #[arg(long, help_heading = REGISTRY, num_args = 0..=1, require_equals = true, default_value_t = false, hide_default_value = true, value_name = "BOOL", default_missing_value = "true", value_parser = values::boolean)]
    pub plain_http: bool,
    /// Do not check the registry's certificate
    #[arg(short = 'k', long, help_heading = REGISTRY, num_args = 0..=1, require_equals = true, default_value_t = false, hide_default_value = true, value_name = "BOOL", default_missing_value = "true", value_parser = values::boolean)]
    pub skip_verify: bool,
    /// Directories with hosts.toml files, as containerd has them
    #[arg(long, help_heading = REGISTRY, value_delimiter = ',', value_name = "DIR")]
    pub hosts_dir: Vec<PathBuf>,
    /// Certificate authority that the registry's certificate is checked with
    #[arg(long, help_heading = REGISTRY, value_name = "FILE")]
    pub tlscacert: Option<PathBuf>,
    /// Our own certificate
    #[arg(long, help_heading = REGISTRY, value_name = "FILE")]
    pub tlscert: Option<PathBuf>,
    /// The key of our own certificate
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

#[derive(Debug, ClapArgs)]
pub struct Platforms {
    /// Every platform of the image
    #[arg(long, num_args = 0..=1, require_equals = true, default_value_t = false, hide_default_value = true, value_name = "BOOL", default_missing_value = "true", value_parser = values::boolean)]
    pub all_platforms: bool,
    /// os/architecture[/variant] (may be repeated)
    #[arg(short, long, value_delimiter = ',')]
    pub platform: Vec<String>,
}

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

/// What to do instead of running a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NotACommand {
    /// Help was asked for, or a group was named without a command: print this, exit 0.
    Print(String),
    /// Exit 3.
    UnknownCommand(String),
    /// Exit 1, with the help of the command.
    Usage { message: String, help: String },
}

/// Reads a command line (without the program's name).
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Args, NotACommand> {
    let mut tree = Args::command();
    tree.build();
    let arguments = normalise(&tree, arguments)
        .map_err(|(message, before)| NotACommand::Usage { message, help: help_for(&before) })?;
    let words: Vec<OsString> = std::iter::once("soci".into()).chain(arguments.iter().cloned()).collect();
    let args = Args::try_parse_from(words).map_err(|e| explain(&e, &arguments))?;
    if args.version {
        return Err(NotACommand::Print(format!("soci version {VERSION} {REVISION}\n")));
    }
    match &args.command {
        Some(Command::Help { topic }) => match find(&tree, topic) {
            Ok(command) => Err(NotACommand::Print(render(command))),
            Err(unknown) => Err(NotACommand::UnknownCommand(unknown)),
        },
        None
        | Some(
            Command::Index { command: None } | Command::Ztoc { command: None } | Command::Prefetch { command: None },
        ) => Err(NotACommand::Print(help_for(&arguments))),
        Some(_) if args.global.help => Err(NotACommand::Print(help_for(&arguments))),
        Some(_) => Ok(args),
    }
}

#[derive(Clone)]
struct Flag {
    long: String,
    takes_value: bool,
}

/// Every flag of every command. A name means the same in all of them, which a test asserts.
fn flags(tree: &clap::Command, into: &mut HashMap<String, Flag>) {
    for arg in tree.get_arguments() {
        let Some(long) = arg.get_long() else { continue };
        let takes_value = arg.get_action().takes_values() && !arg.is_require_equals_set();
        let flag = Flag { long: long.to_owned(), takes_value };
        into.insert(long.to_owned(), flag.clone());
        if let Some(short) = arg.get_short() {
            into.insert(short.to_string(), flag);
        }
    }
    for sub in tree.get_subcommands() {
        flags(sub, into);
    }
}

/// Writes every flag as `--long` or `--long=value`, so that a value may begin with a dash and `-long` is `--long`.
fn normalise(
    tree: &clap::Command,
    arguments: impl IntoIterator<Item = OsString>,
) -> Result<Vec<OsString>, (String, Vec<OsString>)> {
    let mut known = HashMap::new();
    flags(tree, &mut known);
    let mut out: Vec<OsString> = Vec::new();
    let mut arguments = arguments.into_iter();
    while let Some(argument) = arguments.next() {
        let bytes = argument.as_bytes();
        if bytes == b"--" {
            out.push(argument);
            out.extend(arguments);
            break;
        }
        let Some(stripped) = bytes.strip_prefix(b"-").filter(|rest| !rest.is_empty()) else {
            out.push(argument);
            continue;
        };
        let body = stripped.strip_prefix(b"-").unwrap_or(stripped);
        let (name, value) = match body.iter().position(|b| *b == b'=') {
            Some(at) => (&body[..at], Some(&body[at + 1..])),
            None => (body, None),
        };
        let name = String::from_utf8_lossy(name).into_owned();
        let Some(flag) = known.get(&name) else {
            return Err((format!("flag provided but not defined: -{name}"), out));
        };
        let mut word = OsString::from(format!("--{}", flag.long));
        let next;
        let value = match value {
            None if flag.takes_value => {
                next = arguments.next().ok_or((format!("flag needs an argument: -{name}"), out.clone()))?;
                Some(next.as_bytes())
            }
            other => other,
        };
        if let Some(value) = value {
            word.push("=");
            word.push(OsStr::from_bytes(value));
        }
        out.push(word);
    }
    Ok(out)
}

/// Says what clap found in the words of the Go tools.
fn explain(error: &clap::Error, arguments: &[OsString]) -> NotACommand {
    let text = |kind| error.get(kind).map(ToString::to_string).unwrap_or_default();
    // clap names arguments as `--span-size <SPAN_SIZE>`.
    let name = |kind| text(kind).trim_start_matches('-').split([' ', '=', '[']).next().unwrap_or_default().to_owned();
    let message = match error.kind() {
        ErrorKind::InvalidSubcommand => return NotACommand::UnknownCommand(text(ContextKind::InvalidSubcommand)),
        ErrorKind::UnknownArgument => format!("flag provided but not defined: -{}", name(ContextKind::InvalidArg)),
        ErrorKind::ValueValidation | ErrorKind::InvalidValue => {
            let why = error.source().map(|s| format!(": {s}")).unwrap_or_default();
            let (value, flag) = (text(ContextKind::InvalidValue), name(ContextKind::InvalidArg));
            format!("invalid value {value:?} for flag -{flag}{why}")
        }
        ErrorKind::InvalidUtf8 => "an argument is not UTF-8".to_owned(),
        _ => {
            let rendered = error.to_string();
            rendered.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned()
        }
    };
    NotACommand::Usage { message, help: help_for(arguments) }
}

/// Help of the command that `arguments` name, as far as they name one.
fn help_for(arguments: &[OsString]) -> String {
    let mut tree = Args::command();
    tree.build();
    let mut command = &tree;
    for word in arguments.iter().filter_map(|a| a.to_str()).filter(|a| !a.starts_with('-')) {
        match command.find_subcommand(word) {
            Some(sub) => command = sub,
            None => break,
        }
    }
    render(command)
}

fn find<'a>(tree: &'a clap::Command, topic: &[String]) -> Result<&'a clap::Command, String> {
    let mut command = tree;
    for word in topic {
        command = command.find_subcommand(word).ok_or_else(|| word.clone())?;
    }
    Ok(command)
}

fn render(command: &clap::Command) -> String {
    let help = command.clone().render_help().to_string();
    help.trim_end().to_owned() + "\n"
}

#[cfg(test)]
mod tests;
