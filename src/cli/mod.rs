//! The `soci` command line tool.
//!
//! What each command does is in its own module; here is what they share: reading the command line, running one command until
//! it is done or should stop, and telling how it ended. Exit codes and the words of errors are those of the Go CLI where
//! scripts can depend on them (`cli.md` 1): 0 for success and help, 1 for errors, 3 for a command that does not exist; a
//! process that was interrupted dies of the signal.
#![forbid(unsafe_code)]

mod access;
mod args;
mod artifacts;
mod blobs;
mod containerd;
mod convert;
mod create;
mod daemon;
mod doctor;
mod enable;
mod explain;
mod image;
mod index;
mod indexing;
mod interrupt;
mod layout;
mod node;
mod output;
mod parallel;
mod prefetch;
mod push;
mod rebuild;
mod recording;
mod registry;
mod remote;
mod status;
mod store;
mod table;
mod values;
mod words;
mod ztoc;

use args::{Args, Command, IndexCommand, NotACommand, PrefetchCommand, ZtocCommand};
use interrupt::Stopped;
use std::{
    error::Error,
    io::{self, Write},
    process::ExitCode,
};

/// An unknown command, as the Go tools have it.
const NO_SUCH_COMMAND: u8 = 3;

/// Any command's failure.
#[derive(Debug, thiserror::Error)]
enum CommandError {
    #[error(transparent)]
    Create(#[from] create::CreateError),
    #[error(transparent)]
    Push(#[from] push::PushError),
    #[error(transparent)]
    Index(#[from] index::IndexError),
    #[error(transparent)]
    Ztoc(#[from] ztoc::ZtocCommandError),
    #[error(transparent)]
    Prefetch(#[from] prefetch::PrefetchError),
    #[error(transparent)]
    Rebuild(#[from] rebuild::RebuildError),
    #[error(transparent)]
    Words(#[from] words::WordsError),
    #[error(transparent)]
    Status(#[from] status::StatusError),
    #[error(transparent)]
    Explain(#[from] explain::ExplainError),
    #[error(transparent)]
    Doctor(#[from] doctor::DoctorError),
    #[error(transparent)]
    Enable(#[from] enable::EnableError),
    #[error("cannot watch for signals")]
    Signals(#[source] io::Error),
}

/// Runs `soci`.
pub fn main() -> ExitCode {
    crate::sys::process::tame_allocator();
    match args::parse(std::env::args_os().skip(1)) {
        Ok(args) => finish(run(&args)),
        Err(NotACommand::Print(text)) => {
            let printed = io::stdout().lock().write_all(text.as_bytes());
            if printed.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(NotACommand::UnknownCommand(name)) => {
            say(&format!("No help topic for '{name}'"));
            ExitCode::from(NO_SUCH_COMMAND)
        }
        Err(NotACommand::Usage { message, help }) => {
            say(&format!("Incorrect Usage: {message}\n\n{help}\nsoci: {message}"));
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<(), CommandError> {
    let timeout = args.global.timeout;
    interrupt::watch((!timeout.is_zero()).then_some(timeout)).map_err(CommandError::Signals)?;
    let global = &args.global;
    match &args.command {
        Some(Command::Create(create)) => create::run(create, global)?,
        Some(Command::Convert(convert)) => convert::run(convert, global)?,
        Some(Command::Push(push)) => push::run(push, global)?,
        Some(Command::Index { command: Some(command) }) => match command {
            IndexCommand::List(list) => index::list(list, global)?,
            IndexCommand::Info(info) => index::info(info, global)?,
            IndexCommand::Remove(remove) => index::remove(remove, global)?,
        },
        Some(Command::Ztoc { command: Some(command) }) => match command {
            ZtocCommand::List(list) => ztoc::list(list, global)?,
            ZtocCommand::Info(info) => ztoc::info(info, global)?,
            ZtocCommand::GetFile(get_file) => ztoc::get_file(get_file, global)?,
        },
        Some(Command::Prefetch { command: Some(command) }) => match command {
            PrefetchCommand::List(list) => prefetch::list(list, global)?,
            PrefetchCommand::Info(info) => prefetch::info(info, global)?,
        },
        Some(Command::RebuildDb(_)) => rebuild::run(global)?,
        Some(Command::Completions(completions)) => words::completions(completions)?,
        Some(Command::Man(man)) => words::man(man)?,
        Some(Command::Status(own)) => status::run(own)?,
        Some(Command::Explain(own)) => explain::run(own)?,
        Some(Command::Doctor(own)) => doctor::run(own, &args.global)?,
        Some(Command::Enable(own)) => enable::run(own, false, &args.global)?,
        Some(Command::Disable(own)) => enable::run(own, true, &args.global)?,
        // `args::parse` answers these itself.
        None
        | Some(
            Command::Help { .. }
            | Command::Index { command: None }
            | Command::Ztoc { command: None }
            | Command::Prefetch { command: None },
        ) => {}
    }
    Ok(())
}

fn finish(result: Result<(), CommandError>) -> ExitCode {
    let Err(error) = result else { return ExitCode::SUCCESS };
    // Whoever read our output has gone: nothing is wrong, and nobody is listening.
    if is_broken_pipe(&error) {
        return ExitCode::FAILURE;
    }
    match interrupt::stopped() {
        Some(Stopped::Signal(signal)) => interrupt::die_of(signal),
        // Whatever failed first, the time was up.
        Some(stopped @ Stopped::Timeout) => say(&format!("soci: {stopped}")),
        None => say(&format!("soci: {}", output::chain(&error))),
    }
    ExitCode::FAILURE
}

fn is_broken_pipe(error: &CommandError) -> bool {
    let mut cause: Option<&(dyn Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if error.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe) {
            return true;
        }
        cause = error.source();
    }
    false
}

fn say(text: &str) {
    // Nobody is left to tell when stderr cannot be written.
    let _ = writeln!(io::stderr().lock(), "{text}");
}
