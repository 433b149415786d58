//! Reading a command line: the habits of the Go tools in front of clap's, and their words for what is wrong.

use super::{Args, Command, REVISION, VERSION};
use clap::{CommandFactory, Parser, error::ContextKind, error::ErrorKind};
use std::{
    collections::HashMap,
    error::Error as _,
    ffi::{OsStr, OsString},
    os::unix::ffi::OsStrExt,
};

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
