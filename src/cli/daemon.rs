//! Asking the daemon how it is, on its status socket.

use crate::{
    layout,
    telemetry::status::{self, Status},
};
use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

/// For the whole answer, which the daemon has in memory.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    #[error(
        "the snapshotter does not answer at {}: is it running? (systemctl status soci-snapshotter; another socket can be named with --daemon)",
        path.display()
    )]
    Unreachable { path: PathBuf, source: io::Error },
    #[error("{} gave no answer that can be understood: {what}", path.display())]
    Nonsense { path: PathBuf, what: String },
}

/// The status of the daemon that serves containerd on the socket `address`.
pub fn ask(address: &Path) -> Result<Status, AskError> {
    let path = layout::status_socket(address);
    let failed = |source| AskError::Unreachable { path: path.clone(), source };
    let nonsense = |what: String| AskError::Nonsense { path: path.clone(), what };
    let mut stream = UnixStream::connect(&path).map_err(failed)?;
    stream.set_read_timeout(Some(PATIENCE)).map_err(failed)?;
    stream.set_write_timeout(Some(PATIENCE)).map_err(failed)?;
    write!(stream, "GET {} HTTP/1.1\r\nHost: soci\r\n\r\n", status::PATH).map_err(failed)?;
    let mut answer = Vec::new();
    stream.take(status::MAX_SIZE + 1).read_to_end(&mut answer).map_err(failed)?;
    if answer.len() as u64 > status::MAX_SIZE {
        return Err(nonsense(format!("more than {} bytes", status::MAX_SIZE)));
    }
    let text = String::from_utf8(answer).map_err(|e| nonsense(e.to_string()))?;
    let (head, body) = text.split_once("\r\n\r\n").ok_or_else(|| nonsense("no HTTP".to_owned()))?;
    match head.split(' ').nth(1) {
        Some("200") => serde_json::from_str(body).map_err(|e| nonsense(e.to_string())),
        other => Err(nonsense(format!("HTTP status {}", other.unwrap_or_default()))),
    }
}
