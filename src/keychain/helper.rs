//! Login helpers: programs named `docker-credential-<name>` that are asked `get` with a server on standard input and
//! answer with JSON.

use super::{
    Credential, Secret,
    program::{self, Program, ProgramError},
};
use std::path::Path;

#[derive(serde::Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    #[serde(default)]
    username: String,
    #[serde(default)]
    secret: String,
}

/// What helper `name` knows about `server`.
pub(super) async fn get(name: &str, server: &str) -> Result<Option<Credential>, ProgramError> {
    if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.')) {
        return Err(ProgramError::Name);
    }
    let path = format!("docker-credential-{name}");
    let asked = Program {
        path: Path::new(&path),
        args: &["get".to_owned()],
        env: &[],
        input: server.as_bytes(),
        limit: program::TIMEOUT,
    };
    let output = program::run(&asked).await?;
    // The one failure that has a defined text: nothing is known about this server.
    if !output.status.success()
        && String::from_utf8_lossy(&output.text).trim() == "credentials not found in native keychain"
    {
        return Ok(None);
    }
    let answer: Answer = serde_json::from_slice(output.success()?).map_err(|_| ProgramError::Answer)?;
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
        assert!(matches!(get("../../bin/sh", "h").await, Err(ProgramError::Name)));
        assert!(matches!(get("", "h").await, Err(ProgramError::Name)));
        assert!(matches!(get("no-such-helper-exists", "h").await, Err(ProgramError::Run(_))));
    }
}
