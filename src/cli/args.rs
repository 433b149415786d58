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
    /// Turn an image into one that carries its SOCI index (v2)
    Convert(Box<Convert>),
    /// Look into SOCI indexes
    Index {
        #[command(subcommand)]
        command: Option<IndexCommand>,
    },
    /// Look into zTOCs
    Ztoc {
        #[command(subcommand)]
        command: Option<ZtocCommand>,
    },
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
    /// Print a SOCI index as indented JSON
    Info(Info),
}

#[derive(Debug, Subcommand)]
pub enum ZtocCommand {
    /// Print what is in a zTOC, as JSON
    Info(Info),
    /// Print or save one file of a layer, found through the layer's zTOC
    GetFile(GetFile),
}

/// `soci convert`.
#[derive(Debug, ClapArgs)]
pub struct Convert {
    #[command(flatten)]
    pub platforms: Platforms,
    /// Work on OCI layouts, without containerd: SOURCE and DESTINATION are paths
    #[arg(long, num_args = 0..=1, require_equals = true, default_value_t = false, hide_default_value = true, value_name = "BOOL", default_missing_value = "true", value_parser = values::boolean)]
    pub standalone: bool,
    /// What to write with --standalone: oci-archive (a tar file) or oci-dir (a directory)
    #[arg(long, default_value = "oci-archive", value_parser = Format::parse)]
    pub format: Format,
    /// Uncompressed bytes that are fetched and verified together
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
    /// Print one JSON document on stdout instead of a line for each layer
    #[arg(long, num_args = 0..=1, require_equals = true, default_value_t = false, hide_default_value = true, value_name = "BOOL", default_missing_value = "true", value_parser = values::boolean)]
    pub json: bool,
    /// SOURCE and DESTINATION
    #[arg(value_name = "SOURCE DESTINATION")]
    pub operands: Vec<OsString>,
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
        None | Some(Command::Index { command: None } | Command::Ztoc { command: None }) => {
            Err(NotACommand::Print(help_for(&arguments)))
        }
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
mod tests {
    use super::*;

    fn read(line: &str) -> Result<Args, NotACommand> {
        parse(line.split_whitespace().map(Into::into))
    }

    fn convert(line: &str) -> (Global, Convert) {
        match read(line) {
            Ok(Args { global, command: Some(Command::Convert(convert)), .. }) => (global, *convert),
            other => panic!("{line}: {other:?}"),
        }
    }

    fn usage(line: &str) -> String {
        match read(line) {
            Err(NotACommand::Usage { message, .. }) => message,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn clap_accepts_the_definitions() {
        Args::command().debug_assert();
    }

    #[test]
    fn a_flag_name_takes_a_value_everywhere_or_nowhere() {
        fn walk(command: &clap::Command, known: &HashMap<String, Flag>) {
            for arg in command.get_arguments().filter(|a| a.get_long().is_some()) {
                let flag = &known[arg.get_long().unwrap()];
                assert_eq!(flag.takes_value, arg.get_action().takes_values() && !arg.is_require_equals_set(), "{arg}");
                if let Some(short) = arg.get_short() {
                    assert_eq!(known[&short.to_string()].long, arg.get_long().unwrap(), "{arg}");
                }
            }
            command.get_subcommands().for_each(|sub| walk(sub, known));
        }
        let mut tree = Args::command();
        tree.build();
        let mut known = HashMap::new();
        flags(&tree, &mut known);
        walk(&tree, &known);
    }

    #[test]
    fn global_flags_stand_before_or_after_the_command_with_one_dash_or_two() {
        for line in [
            "--address /a --namespace n --content-store soci --root /r --timeout 30s convert in out",
            "convert in --address=/a out -namespace n -content-store=soci --root /r -timeout 30s",
            "-a /a convert -n n in --content-store soci -root=/r out --timeout=30s",
        ] {
            let (global, convert) = convert(line);
            assert_eq!((global.address.as_str(), global.namespace.as_str()), ("/a", "n"), "{line}");
            assert_eq!((global.content_store.as_str(), global.timeout), ("soci", Duration::from_secs(30)), "{line}");
            assert_eq!((global.root, convert.operands.len()), (PathBuf::from("/r"), 2), "{line}");
        }
    }

    #[test]
    fn values_may_begin_with_a_dash_and_bools_may_be_given_one() {
        let (_, c) = convert(
            "convert --span-size -1 --min-layer-size 0x_10 -force=false --standalone=true --prefetch-file -force a b",
        );
        assert_eq!((c.span_size, c.min_layer_size, c.force, c.standalone), (-1, 16, false, true));
        assert_eq!(c.prefetch_file, ["-force"]);
        let (_, c) = convert("convert -f -p linux/amd64 --platform linux/arm64,linux/386 -- -a b");
        assert_eq!(c.platforms.platform, ["linux/amd64", "linux/arm64", "linux/386"]);
        assert_eq!((c.force, c.operands), (true, vec!["-a".into(), "b".into()]));
        assert_eq!(convert("convert --span-size 1 --span-size 2 a b").1.span_size, 2);
    }

    #[test]
    fn wrong_flags_are_named_as_the_go_tools_name_them() {
        assert!(
            usage("convert --span-size 99999999999999999999 a b")
                .starts_with("invalid value \"99999999999999999999\" for flag -span-size")
        );
        assert!(usage("convert --min-layer-size x a b").starts_with("invalid value \"x\" for flag -min-layer-size"));
        assert!(
            usage("convert --format zip a b")
                .contains("unsupported output format \"zip\": must be \"oci-archive\" or \"oci-dir\"")
        );
        assert_eq!(usage("convert --bogus"), "flag provided but not defined: -bogus");
        assert_eq!(usage("ztoc info --force"), "flag provided but not defined: -force");
        assert_eq!(usage("convert --span-size"), "flag needs an argument: -span-size");
        assert!(usage("convert --force=maybe").starts_with("invalid value \"maybe\" for flag -force"));
    }

    #[test]
    fn commands_of_later_issues_do_not_exist() {
        for name in ["create", "push", "rebuild-db", "prefetch", "bogus", "image"] {
            assert_eq!(read(name).err(), Some(NotACommand::UnknownCommand(name.into())));
        }
        assert_eq!(read("index list").err(), Some(NotACommand::UnknownCommand("list".into())));
        assert_eq!(read("help bogus").err(), Some(NotACommand::UnknownCommand("bogus".into())));
    }

    #[test]
    fn help_and_version_are_printed() {
        for (line, part) in [
            ("", "convert"),
            ("-h", "convert"),
            ("help convert", "--span-size"),
            ("h ztoc", "get-file"),
            ("convert --help", "--span-size"),
            ("ztoc", "get-file"),
            ("index info -h", "--layout"),
            ("--version", "soci version "),
            ("-v", "soci version "),
        ] {
            match read(line) {
                Err(NotACommand::Print(text)) => assert!(text.contains(part), "{line}: {text}"),
                other => panic!("{line}: {other:?}"),
            }
        }
    }
}
