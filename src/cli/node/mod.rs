//! The containerd of this node: which program and which configuration it runs with, and what that configuration comes to.
//!
//! What the configuration comes to is asked of containerd itself (`containerd config dump`): imports, defaults and migrations between versions are
//! its business. [`settings`] knows what must be in it for lazy loading, and is pure.

pub mod settings;

use rustix::net::sockopt::socket_peercred;
use settings::{Dump, SettingsError};
use std::{
    ffi::OsString,
    fs,
    io::{self, Read},
    os::unix::{ffi::OsStringExt, net::UnixStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::SystemTime,
};

/// Where containerd looks if nobody tells it.
pub const DEFAULT_CONFIG: &str = "/etc/containerd/config.toml";
/// Most that is read of what a program prints: `config dump` is ten kilobytes.
const MAX_OUTPUT: u64 = 4 << 20;

/// Why containerd could not be looked at.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    #[error("containerd does not answer at {}: is it running? (systemctl status containerd; --address names another socket)", path.display())]
    Unreachable { path: PathBuf, source: io::Error },
    #[error("cannot find the program containerd: it does not run at {} and is not in PATH; name it with --containerd", address.display())]
    NoProgram { address: PathBuf },
    #[error("cannot run {}", program.display())]
    Run { program: PathBuf, source: io::Error },
    #[error("{} refuses its configuration {}: {said}", program.display(), config.display())]
    Refused { program: PathBuf, config: PathBuf, said: String },
    #[error("cannot tell the version of {}: it says {said:?}", program.display())]
    Version { program: PathBuf, said: String },
    #[error(transparent)]
    Settings(#[from] SettingsError),
}

/// A containerd, running or installed.
#[derive(Debug, Clone)]
pub struct Node {
    /// To be run for its opinion; of a running one, the very program that runs.
    pub program: PathBuf,
    pub config: PathBuf,
    /// As it calls itself: `1.6.20`, `v2.2.1`.
    pub version: String,
    pub major: u32,
    pub running: Option<Running>,
}

/// What a running one adds.
#[derive(Debug, Clone)]
pub struct Running {
    pub pid: u32,
    pub started: SystemTime,
}

impl Node {
    /// The containerd that listens at `address`, or else the one that is installed. `program` and `config` win over what is found.
    pub fn find(address: &Path, program: Option<&Path>, config: Option<&Path>) -> Result<Node, NodeError> {
        let running = running(address).ok();
        let found = running.as_ref().map(|(_, program, _)| program.clone()).or_else(|| in_path("containerd"));
        let program = program.map(Path::to_owned).or(found);
        let program = program.ok_or_else(|| NodeError::NoProgram { address: address.to_owned() })?;
        let of_running = running.as_ref().and_then(|(_, _, config)| config.clone());
        let config = config.map(Path::to_owned).or(of_running).unwrap_or_else(|| DEFAULT_CONFIG.into());
        let said = output(&program, &["--version".as_ref()])?;
        let unknown = || NodeError::Version { program: program.clone(), said: said.chars().take(200).collect() };
        let version = version(&said).ok_or_else(unknown)?.to_owned();
        let major =
            version.trim_start_matches('v').split('.').next().and_then(|n| n.parse().ok()).ok_or_else(unknown)?;
        Ok(Node { program, config, version, major, running: running.map(|(running, ..)| running) })
    }

    /// What the configuration in `config` comes to. An absent file is containerd's defaults.
    pub fn dump(&self, config: &Path) -> Result<Dump, NodeError> {
        let empty;
        let config = if config.exists() {
            config
        } else {
            // 1.x takes no file that is named and absent.
            let run = |source| NodeError::Run { program: self.program.clone(), source };
            empty = tempfile::NamedTempFile::new().map_err(run)?;
            fs::write(empty.path(), format!("version = {}\n", if self.major >= 2 { 3 } else { 2 })).map_err(run)?;
            empty.path()
        };
        let said = output(&self.program, &["-c".as_ref(), config.as_os_str(), "config".as_ref(), "dump".as_ref()]);
        let said = said.map_err(|error| match error {
            NodeError::Refused { program, said, .. } => NodeError::Refused { program, said, config: config.to_owned() },
            other => other,
        })?;
        Ok(Dump::parse(&said)?)
    }
}

/// Who listens there: the process at the other end of the socket.
fn running(address: &Path) -> Result<(Running, PathBuf, Option<PathBuf>), NodeError> {
    let failed = |source| NodeError::Unreachable { path: address.to_owned(), source };
    let stream = UnixStream::connect(address).map_err(failed)?;
    let peer = socket_peercred(&stream).map_err(|e| failed(e.into()))?;
    let pid = u32::try_from(peer.pid.as_raw_nonzero().get()).map_err(|e| failed(io::Error::other(e)))?;
    let proc = PathBuf::from(format!("/proc/{pid}"));
    let started = fs::metadata(&proc).and_then(|m| m.modified()).map_err(failed)?;
    let arguments = fs::read(proc.join("cmdline")).map_err(failed)?;
    let arguments: Vec<OsString> = arguments.split(|b| *b == 0).map(|a| OsString::from_vec(a.to_vec())).collect();
    Ok((Running { pid, started }, proc.join("exe"), config_argument(&arguments)))
}

/// Whether somebody accepts connections at the socket.
pub fn answers(address: &Path) -> io::Result<()> {
    UnixStream::connect(address).map(drop)
}

/// The value of `-c`, `--config`, `-c=` or `--config=`.
fn config_argument(arguments: &[OsString]) -> Option<PathBuf> {
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        let text = argument.to_str()?;
        if matches!(text, "-c" | "--config" | "-config") {
            return arguments.next().map(PathBuf::from);
        }
        for prefix in ["-c=", "--config=", "-config="] {
            if let Some(path) = text.strip_prefix(prefix) {
                return Some(PathBuf::from(path));
            }
        }
    }
    None
}

/// The word of `containerd --version` that begins with a number: `containerd github.com/containerd/containerd v1.7.2 abc`.
fn version(said: &str) -> Option<&str> {
    let is_version = |word: &&str| {
        let digits = word.trim_start_matches('v');
        digits.starts_with(|c: char| c.is_ascii_digit()) && digits.contains('.')
    };
    said.split_whitespace().find(is_version)
}

fn in_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).map(|directory| directory.join(name)).find(|program| program.is_file())
}

fn output(program: &Path, arguments: &[&std::ffi::OsStr]) -> Result<String, NodeError> {
    let failed = |source| NodeError::Run { program: program.to_owned(), source };
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(failed)?;
    let mut complaints = child.stderr.take();
    // Read beside stdout: a program that fills the pipe of one while we read the other would wait for us for ever.
    let reader = std::thread::spawn(move || {
        let mut text = Vec::new();
        if let Some(pipe) = complaints.as_mut() {
            let _ = pipe.take(MAX_OUTPUT).read_to_end(&mut text);
        }
        text
    });
    let mut said = Vec::new();
    if let Some(pipe) = child.stdout.as_mut() {
        pipe.take(MAX_OUTPUT).read_to_end(&mut said).map_err(failed)?;
    }
    let status = child.wait().map_err(failed)?;
    let complaints = reader.join().unwrap_or_default();
    if !status.success() {
        let said = String::from_utf8_lossy(&complaints).trim().chars().take(2000).collect();
        return Err(NodeError::Refused { program: program.to_owned(), config: PathBuf::new(), said });
    }
    Ok(String::from_utf8_lossy(&said).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_found_in_what_distributions_make_containerd_say() {
        for (said, wanted) in [
            ("containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+deb12u3", "1.6.20~ds1"),
            ("containerd github.com/containerd/containerd/v2 v2.2.1 ", "v2.2.1"),
            ("containerd github.com/containerd/containerd v1.7.27 05044ec0a9a75232cad458027ca83437aae3f4da", "v1.7.27"),
        ] {
            assert_eq!(version(said), Some(wanted));
        }
        assert_eq!(version("k3s"), None);
    }

    #[test]
    fn the_configuration_is_the_one_on_the_command_line() {
        let of = |words: &[&str]| config_argument(&words.iter().map(OsString::from).collect::<Vec<_>>());
        assert_eq!(of(&["containerd", "-c", "/a"]), Some("/a".into()));
        assert_eq!(of(&["containerd", "--log-level", "info", "--config=/b"]), Some("/b".into()));
        assert_eq!(of(&["containerd"]), None);
    }
}
