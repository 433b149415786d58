//! Login helpers: programs named `docker-credential-<name>` that are asked `get` with a server on standard input and
//! answer with JSON.
//!
//! They are other people's programs: each has ten seconds, its output is bounded, its error output is not shown (it may
//! hold anything), and few run at a time.

use super::{Credential, Secret};
use std::{io, process::Stdio, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    process::Command,
    sync::Semaphore,
};

/// Long enough for a helper that asks a metadata service or a cloud's API.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Largest answer read. An ECR login is 2 kB.
const MAX_OUTPUT: u64 = 64 << 10;
/// At a time; a burst of pulls must not become a burst of processes.
static RUNNING: Semaphore = Semaphore::const_new(4);

/// Why a helper gave no answer. Holds nothing the helper said.
#[derive(Debug, thiserror::Error)]
pub enum HelperError {
    #[error("its name is not that of a program")]
    Name,
    #[error("it cannot be run")]
    Run(#[source] io::Error),
    #[error("it took longer than {} s", .0.as_secs())]
    Timeout(Duration),
    #[error("it ended with {0}")]
    Status(std::process::ExitStatus),
    #[error("its answer cannot be understood")]
    Answer,
}

#[derive(serde::Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    #[serde(default)]
    username: String,
    #[serde(default)]
    secret: String,
}

/// What helper `name` knows about `server`.
pub(super) async fn get(name: &str, server: &str) -> Result<Option<Credential>, HelperError> {
    get_within(name, server, TIMEOUT).await
}

async fn get_within(name: &str, server: &str, limit: Duration) -> Result<Option<Credential>, HelperError> {
    if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.')) {
        return Err(HelperError::Name);
    }
    // The semaphore is never closed.
    let _permit = RUNNING.acquire().await;
    // Dropping the future kills the helper.
    tokio::time::timeout(limit, run(name, server)).await.map_err(|_| HelperError::Timeout(limit))?
}

async fn run(name: &str, server: &str) -> Result<Option<Credential>, HelperError> {
    let mut child = Command::new(format!("docker-credential-{name}"))
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .map_err(HelperError::Run)?;
    let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
    let mut output = Vec::new();
    let ask = async {
        if let Some(mut stdin) = stdin {
            // A helper that does not read its input may still answer.
            let _ = stdin.write_all(server.as_bytes()).await;
        }
    };
    let read = async {
        match stdout {
            Some(stdout) => stdout.take(MAX_OUTPUT + 1).read_to_end(&mut output).await,
            None => Ok(0),
        }
    };
    let ((), read) = tokio::join!(ask, read);
    read.map_err(HelperError::Run)?;
    if output.len() as u64 > MAX_OUTPUT {
        return Err(HelperError::Answer);
    }
    let status = child.wait().await.map_err(HelperError::Run)?;
    if !status.success() {
        // The one failure that has a defined text: nothing is known about this server.
        let text = String::from_utf8_lossy(&output);
        return if text.trim() == "credentials not found in native keychain" {
            Ok(None)
        } else {
            Err(HelperError::Status(status))
        };
    }
    let answer: Answer = serde_json::from_slice(&output).map_err(|_| HelperError::Answer)?;
    Ok(match answer {
        Answer { secret, .. } if secret.is_empty() => None,
        Answer { username, secret } if username == "<token>" => Some(Credential::Identity(Secret::new(secret))),
        Answer { username, secret } => Some(Credential::Password { user: username, password: Secret::new(secret) }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_helper_that_is_not_there_or_is_a_path_is_an_error() {
        assert!(matches!(get("../../bin/sh", "h").await, Err(HelperError::Name)));
        assert!(matches!(get("", "h").await, Err(HelperError::Name)));
        assert!(matches!(get("no-such-helper-exists", "h").await, Err(HelperError::Run(_))));
    }
}
