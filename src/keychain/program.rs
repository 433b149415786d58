//! Other people's programs that know logins: docker's credential helpers, kubelet's credential providers, kubeconfig's exec plugins.
//!
//! Each has a limited time, its output is bounded, its error output is not shown (it may hold anything), and few run at a time. What
//! takes too long is killed with everything it has started.

use std::{ffi::OsString, io, path::Path, process::Stdio, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    process::Command,
    sync::Semaphore,
};

/// Long enough for a program that asks a metadata service or a cloud's API.
pub(super) const TIMEOUT: Duration = Duration::from_secs(10);
/// Largest answer read. An ECR login is 2 kB.
const MAX_OUTPUT: u64 = 64 << 10;
/// At a time; a burst of pulls must not become a burst of processes.
static RUNNING: Semaphore = Semaphore::const_new(4);

/// Why a program gave no answer. Holds nothing the program said.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    #[error("its name is not that of a program")]
    Name,
    #[error("it cannot be run")]
    Run(#[source] io::Error),
    #[error("it took longer than {} s", .0.as_secs())]
    Timeout(Duration),
    #[error("it ended with {0}")]
    Status(std::process::ExitStatus),
    #[error("its answer is longer than {MAX_OUTPUT} bytes")]
    TooLong,
    #[error("its answer cannot be understood")]
    Answer,
}

/// What to run. Without a slash in its name it is looked for in `PATH`.
pub(super) struct Program<'a> {
    pub path: &'a Path,
    pub args: &'a [String],
    pub env: &'a [(String, String)],
    pub input: &'a [u8],
    pub limit: Duration,
}

/// What a program said before it ended. Its bytes are wiped when it is dropped.
pub(super) struct Output {
    pub status: std::process::ExitStatus,
    pub text: zeroize::Zeroizing<Vec<u8>>,
}

impl Output {
    /// What it said, if it ended well.
    pub fn success(&self) -> Result<&[u8], ProgramError> {
        if self.status.success() { Ok(&self.text) } else { Err(ProgramError::Status(self.status)) }
    }
}

/// Runs the program to its end. Dropping the future kills it.
pub(super) async fn run(program: &Program<'_>) -> Result<Output, ProgramError> {
    // The semaphore is never closed.
    let _permit = RUNNING.acquire().await;
    let limit = program.limit;
    tokio::time::timeout(limit, to_its_end(program)).await.map_err(|_| ProgramError::Timeout(limit))?
}

async fn to_its_end(program: &Program<'_>) -> Result<Output, ProgramError> {
    let mut child = Command::new(program.path)
        .args(program.args)
        .envs(program.env.iter().map(|(name, value)| (OsString::from(name), OsString::from(value))))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .process_group(0)
        .spawn()
        .map_err(ProgramError::Run)?;
    let group = Group(child.id());
    let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
    let mut text = zeroize::Zeroizing::new(Vec::new());
    let ask = async {
        if let Some(mut stdin) = stdin {
            // A program that does not read its input may still answer.
            let _ = stdin.write_all(program.input).await;
        }
    };
    let read = async {
        match stdout {
            Some(stdout) => stdout.take(MAX_OUTPUT + 1).read_to_end(&mut text).await,
            None => Ok(0),
        }
    };
    let ((), read) = tokio::join!(ask, read);
    read.map_err(ProgramError::Run)?;
    if text.len() as u64 > MAX_OUTPUT {
        return Err(ProgramError::TooLong);
    }
    let status = child.wait().await.map_err(ProgramError::Run)?;
    group.has_ended();
    Ok(Output { status, text })
}

/// The processes of a program; killed unless it has ended by itself.
struct Group(Option<u32>);

impl Group {
    fn has_ended(mut self) {
        self.0 = None;
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(leader) = self.0.and_then(|id| i32::try_from(id).ok()) {
            // It has not been waited for, so the number is still its own. Nothing is left to kill if this fails.
            let _ = nix::sys::signal::killpg(nix::unistd::Pid::from_raw(leader), nix::sys::signal::Signal::SIGKILL);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    fn shell(script: &str) -> Vec<String> {
        vec!["-c".into(), script.into()]
    }

    async fn run_shell(script: &str, limit: Duration) -> Result<Output, ProgramError> {
        let env = [("SOCI_UNIT".to_owned(), "yes".to_owned())];
        let args = shell(script);
        run(&Program { path: Path::new("sh"), args: &args, env: &env, input: b"in", limit }).await
    }

    #[tokio::test]
    async fn a_program_gets_its_input_and_environment_and_is_read_to_a_bound() {
        let output = run_shell("read x; echo $x $SOCI_UNIT", TIMEOUT).await.unwrap();
        assert_eq!(output.success().unwrap(), b"in yes\n");
        assert!(matches!(run_shell("exit 3", TIMEOUT).await.unwrap().success(), Err(ProgramError::Status(_))));
        assert!(matches!(run_shell("yes", TIMEOUT).await, Err(ProgramError::TooLong)));
    }

    #[tokio::test]
    async fn what_takes_too_long_is_killed_with_its_children() {
        let dir = tempfile::tempdir().unwrap();
        let pid = dir.path().join("pid");
        let script = format!("sleep 77 & echo $! > {}; wait", pid.display());
        let started = Instant::now();
        let error = run_shell(&script, Duration::from_millis(700)).await;
        assert!(matches!(error, Err(ProgramError::Timeout(_))) && started.elapsed() < Duration::from_secs(20));
        let pid = std::fs::read_to_string(pid).unwrap().trim().to_owned();
        let is_there = || {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            !stat.is_empty() && !stat.contains(") Z ")
        };
        let deadline = Instant::now() + Duration::from_secs(10);
        while is_there() {
            assert!(Instant::now() < deadline, "the child of the program runs on");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}
