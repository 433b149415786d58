//! The daemon's command line, as a value.
//!
//! Flag beats environment beats default. Long flags may have one dash (`-config x`), as Go programs allow.
//! Pure: the environment is an argument, and nothing is printed.

use crate::layout;
use clap::error::ErrorKind;
use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

/// The program's name in messages.
pub const PROGRAM: &str = "soci-snapshotter-grpc";

/// What the daemon was asked to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Invocation {
    Run(Options),
    /// Print the documented defaults.
    ConfigDefault,
    /// Print the effective settings.
    ConfigDump(Options),
    /// Say what is wrong with the settings.
    ConfigCheck {
        options: Options,
        strictness: Strictness,
    },
    /// Print this and exit 0: help or version.
    Print(String),
}

/// Whether warnings are errors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strictness {
    Lenient,
    Strict,
}

/// Global flags.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// `--address`: a path, `unix://PATH` or `fd://`.
    pub address: String,
    pub config: PathBuf,
    pub log_level: LogLevel,
    pub root: PathBuf,
}

/// `--log-level`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum LogLevel {
    Panic,
    Fatal,
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

impl LogLevel {
    fn parse(word: &str) -> Option<LogLevel> {
        Some(match word.to_ascii_lowercase().as_str() {
            "panic" => LogLevel::Panic,
            "fatal" => LogLevel::Fatal,
            "error" => LogLevel::Error,
            "warn" | "warning" => LogLevel::Warn,
            "info" => LogLevel::Info,
            "debug" => LogLevel::Debug,
            "trace" => LogLevel::Trace,
            _ => return None,
        })
    }
}

/// Why the command line cannot be obeyed: print it to standard error and exit 1.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ArgsError {
    #[error("Incorrect Usage: {message}\n\n{help}")]
    Usage { message: String, help: String },
    #[error("{PROGRAM}: failed to prepare logger: not a valid log level: {0:?}")]
    LogLevel(String),
    #[error("{PROGRAM}: --{flag} is not UTF-8")]
    NotUtf8 { flag: &'static str },
}

struct Flag {
    name: &'static str,
    env: &'static str,
    default: &'static str,
    help: &'static str,
}

const ADDRESS: Flag = Flag {
    name: "address",
    env: "SOCI_SNAPSHOTTER_ADDRESS",
    default: layout::DEFAULT_ADDRESS,
    help: "where to listen: a path, unix://PATH, or fd:// for systemd's socket",
};
const CONFIG: Flag = Flag {
    name: "config",
    env: "SOCI_SNAPSHOTTER_CONFIG",
    default: layout::DEFAULT_CONFIG,
    help: "path of the configuration file",
};
const LOG_LEVEL: Flag = Flag {
    name: "log-level",
    env: "SOCI_SNAPSHOTTER_LOG_LEVEL",
    default: "info",
    help: "trace, debug, info, warn, error, fatal or panic",
};
const ROOT: Flag = Flag {
    name: "root",
    env: "SOCI_SNAPSHOTTER_ROOT",
    default: layout::DEFAULT_ROOT,
    help: "directory that holds all state",
};
const FLAGS: [&Flag; 4] = [&ADDRESS, &CONFIG, &LOG_LEVEL, &ROOT];

fn command() -> Command {
    let flags = FLAGS.map(|flag| {
        Arg::new(flag.name)
            .long(flag.name)
            .value_name("value")
            .global(true)
            .value_parser(value_parser!(OsString))
            .help(format!("{} [env: {}] [default: {}]", flag.help, flag.env, flag.default))
    });
    let strict = Arg::new("strict").long("strict").action(ArgAction::SetTrue).help("treat warnings as errors");
    let config = Command::new("config")
        .about("work with the configuration")
        .subcommand_required(true)
        .subcommand(Command::new("default").about("print the defaults, documented"))
        .subcommand(Command::new("dump").about("print the effective settings"))
        .subcommand(Command::new("check").about("say what is wrong with the configuration file").arg(strict));
    Command::new(PROGRAM)
        .about("containerd snapshotter that starts containers before their images have arrived")
        .disable_version_flag(true)
        .args(flags)
        .arg(Arg::new("version").long("version").short('v').action(ArgAction::SetTrue).help("print the version"))
        .subcommand(config)
}

/// What `--version` prints: version and revision, as `build.rs` found them.
pub fn version() -> (&'static str, &'static str) {
    (env!("SOCI_VERSION"), env!("SOCI_REVISION"))
}

/// Reads the command line `args`, whose first element is the program's name, and the variables that `env` knows.
pub fn parse(
    args: impl IntoIterator<Item = OsString>,
    env: &dyn Fn(&str) -> Option<OsString>,
) -> Result<Invocation, ArgsError> {
    let mut command = command();
    let matches = match command.try_get_matches_from_mut(two_dashes(args)) {
        Ok(matches) => matches,
        Err(e) if matches!(e.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => {
            return Ok(Invocation::Print(e.to_string()));
        }
        Err(e) => {
            let text = e.to_string();
            let first = text.lines().next().unwrap_or_default();
            let message = first.strip_prefix("error: ").unwrap_or(first).to_owned();
            return Err(ArgsError::Usage { message, help: command.render_help().to_string() });
        }
    };
    if matches.get_flag("version") {
        let (version, revision) = version();
        return Ok(Invocation::Print(format!("{PROGRAM} version {version} {revision}\n")));
    }
    let Some(("config", config)) = matches.subcommand() else {
        return Ok(Invocation::Run(options(&[&matches], env)?));
    };
    let Some((name, sub)) = config.subcommand() else {
        return Err(ArgsError::Usage {
            message: "config needs a subcommand".into(),
            help: command.render_help().to_string(),
        });
    };
    let options = options(&[sub, config, &matches], env)?;
    Ok(match name {
        "default" => Invocation::ConfigDefault,
        "dump" => Invocation::ConfigDump(options),
        _ => {
            let strictness = if sub.get_flag("strict") { Strictness::Strict } else { Strictness::Lenient };
            Invocation::ConfigCheck { options, strictness }
        }
    })
}

/// `-config` as `--config`. What follows a flag without `=` is its value and stays as it is.
fn two_dashes(args: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    const SWITCHES: [&str; 3] = ["version", "help", "strict"];
    let mut out: Vec<OsString> = Vec::new();
    let mut value_follows = false;
    for (i, arg) in args.into_iter().enumerate() {
        if i == 0 || value_follows {
            value_follows = false;
            out.push(arg);
            continue;
        }
        let text = arg.to_str().unwrap_or("");
        let name = text.trim_start_matches('-').split('=').next().unwrap_or("");
        let known = FLAGS.iter().any(|flag| flag.name == name);
        let dashes = text.len() - text.trim_start_matches('-').len();
        value_follows = known && (1..=2).contains(&dashes) && !text.contains('=');
        if dashes == 1 && (known || SWITCHES.contains(&name)) {
            out.push(OsString::from(format!("-{text}")));
        } else {
            out.push(arg);
        }
    }
    out
}

fn options(matches: &[&ArgMatches], env: &dyn Fn(&str) -> Option<OsString>) -> Result<Options, ArgsError> {
    let value = |flag: &Flag| -> OsString {
        let given = matches.iter().find_map(|matches| matches.get_one::<OsString>(flag.name));
        let from_env = || env(flag.env).filter(|value| !value.is_empty());
        given.cloned().or_else(from_env).unwrap_or_else(|| OsStr::new(flag.default).to_owned())
    };
    let text = |flag: &Flag| value(flag).into_string().map_err(|_| ArgsError::NotUtf8 { flag: flag.name });
    let level = text(&LOG_LEVEL)?;
    Ok(Options {
        address: text(&ADDRESS)?,
        config: value(&CONFIG).into(),
        log_level: LogLevel::parse(&level).ok_or(ArgsError::LogLevel(level))?,
        root: value(&ROOT).into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(args: &str, env: &[(&str, &str)]) -> Result<Invocation, ArgsError> {
        let args = std::iter::once(PROGRAM).chain(args.split_whitespace()).map(OsString::from);
        parse(args, &|name| env.iter().find(|(key, _)| *key == name).map(|(_, value)| OsString::from(value)))
    }

    fn options(args: &str, env: &[(&str, &str)]) -> Options {
        match run(args, env) {
            Ok(Invocation::Run(options)) => options,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn without_flags_the_documented_defaults_hold() {
        let options = options("", &[]);
        assert_eq!(options.address, "/run/soci-snapshotter-grpc/soci-snapshotter-grpc.sock");
        assert_eq!(options.config, PathBuf::from("/etc/soci-snapshotter-grpc/config.toml"));
        assert_eq!(options.log_level, LogLevel::Info);
        assert_eq!(options.root, PathBuf::from("/var/lib/soci-snapshotter-grpc/"));
    }

    #[test]
    fn flags_beat_the_environment_and_the_environment_beats_defaults() {
        let env = [("SOCI_SNAPSHOTTER_CONFIG", "/e"), ("SOCI_SNAPSHOTTER_LOG_LEVEL", "Warning")];
        assert_eq!(options("", &env).config, PathBuf::from("/e"));
        assert_eq!(options("", &env).log_level, LogLevel::Warn);
        assert_eq!(options("--config /f", &env).config, PathBuf::from("/f"));
    }

    #[test]
    fn long_flags_work_with_one_dash_and_with_an_equals_sign() {
        for args in ["-config /f -log-level TRACE", "--config=/f --log-level=trace", "-config=/f -log-level trace"] {
            let options = options(args, &[]);
            assert_eq!((options.config, options.log_level), (PathBuf::from("/f"), LogLevel::Trace), "{args}");
        }
        assert_eq!(options("-address fd://", &[]).address, "fd://");
    }

    #[test]
    fn config_subcommands_take_flags_before_and_after() {
        for args in ["-config /f config dump", "config dump --config /f", "config --config /f dump"] {
            match run(args, &[]) {
                Ok(Invocation::ConfigDump(options)) => assert_eq!(options.config, PathBuf::from("/f"), "{args}"),
                other => panic!("{args}: {other:?}"),
            }
        }
        assert_eq!(run("config default", &[]), Ok(Invocation::ConfigDefault));
        let strict = run("config check --strict", &[]);
        assert!(matches!(strict, Ok(Invocation::ConfigCheck { strictness: Strictness::Strict, .. })), "{strict:?}");
    }

    #[test]
    fn version_and_help_are_printed() {
        for flag in ["-v", "--version", "-version"] {
            let Ok(Invocation::Print(text)) = run(flag, &[]) else { panic!("{flag}") };
            assert!(text.starts_with("soci-snapshotter-grpc version "), "{text}");
        }
        let Ok(Invocation::Print(help)) = run("-h", &[]) else { panic!() };
        assert!(help.contains("--log-level") && help.contains("SOCI_SNAPSHOTTER_ROOT"), "{help}");
    }

    #[test]
    fn what_cannot_be_obeyed_says_why() {
        let error = run("--nonsense", &[]).unwrap_err().to_string();
        assert!(error.starts_with("Incorrect Usage: ") && error.contains("--nonsense"), "{error}");
        let error = run("--log-level loud", &[]).unwrap_err().to_string();
        assert!(error.starts_with("soci-snapshotter-grpc: failed to prepare logger: "), "{error}");
    }
}
