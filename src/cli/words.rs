//! Completions and man pages, both from the definitions of the command line.

use super::args::{self, Args, Completions, Man};
use clap::CommandFactory;
use std::{
    io::{self, Write},
    path::{Path, PathBuf},
};

/// Why they were not written.
#[derive(Debug, thiserror::Error)]
pub enum WordsError {
    #[error("failed to write {}", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("failed to write to stdout")]
    Output(#[source] io::Error),
}

/// `soci completions`.
pub fn completions(args: &Completions) -> Result<(), WordsError> {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut Args::command(), "soci", &mut text);
    let mut out = io::stdout().lock();
    out.write_all(&text).and_then(|()| out.flush()).map_err(WordsError::Output)
}

/// `soci man`: one page for the tool, one for each command, and the pages that explain a task.
pub fn man(args: &Man) -> Result<(), WordsError> {
    let directory = &args.directory;
    std::fs::create_dir_all(directory).map_err(|source| WordsError::Write { path: directory.clone(), source })?;
    let mut tree = Args::command().version(args::VERSION);
    tree.build();
    pages(&tree, "soci", directory)?;
    for (name, text) in
        [("soci-ci.7", include_str!("man/soci-ci.7")), ("soci-check.7", include_str!("man/soci-check.7"))]
    {
        write(&directory.join(name), text.as_bytes())?;
    }
    Ok(())
}

fn pages(command: &clap::Command, name: &str, directory: &Path) -> Result<(), WordsError> {
    let page = clap_mangen::Man::new(command.clone()).title(name.to_owned());
    let mut text = Vec::new();
    page.render(&mut text).map_err(WordsError::Output)?;
    if name == "soci" {
        text.extend_from_slice(include_bytes!("man/soci.tail"));
    }
    write(&directory.join(format!("{name}.1")), &text)?;
    let subs = command.get_subcommands().filter(|sub| !sub.is_hide_set() && sub.get_name() != "help");
    for sub in subs {
        pages(sub, &format!("{name}-{}", sub.get_name()), directory)?;
    }
    Ok(())
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), WordsError> {
    std::fs::write(path, bytes).map_err(|source| WordsError::Write { path: path.to_owned(), source })
}
