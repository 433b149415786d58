//! How the daemon is, and the socket where `soci status` asks.
//!
//! The socket is beside containerd's ([`crate::layout::status_socket`]), for root only, and answers one GET per connection with
//! [`Status`] as JSON. It needs neither disk nor network nor containerd's socket, so it also answers while the daemon starts, is full of work, or
//! takes nothing new. Without it the daemon runs on: it only tells.

use super::observe::{Observers, rfc3339};
use crate::{
    config,
    layers::Scheduler,
    layout,
    telemetry::{
        catalog::say,
        http, logs,
        status::{State, Status, Trouble},
    },
};
use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::SystemTime,
};

/// What changes while the daemon lives.
pub struct Condition {
    started: SystemTime,
    /// Leaf lock.
    state: Mutex<(State, Option<Trouble>)>,
    connection_kept: AtomicBool,
}

impl Condition {
    pub fn starting() -> Arc<Condition> {
        Arc::new(Condition {
            started: SystemTime::now(),
            state: Mutex::new((State::Starting, None)),
            connection_kept: AtomicBool::new(true),
        })
    }

    /// The daemon answers containerd now.
    pub fn serving(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.0 = if state.1.is_some() { State::Degraded } else { State::Serving };
    }

    /// Whether soci-mount has the FUSE descriptor besides us.
    pub fn connection_kept(&self, kept: bool) {
        self.connection_kept.store(kept, Ordering::Relaxed);
    }
}

/// What does not.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Where containerd finds us.
    pub address: String,
    pub root: PathBuf,
    pub config: PathBuf,
}

/// Everything the document is made of.
pub struct Reporter {
    pub identity: Identity,
    pub condition: Arc<Condition>,
    pub observers: Arc<Observers>,
    pub scheduler: Scheduler,
}

impl Reporter {
    fn status(&self) -> Status {
        let (version, revision) = config::args::version();
        let (state, trouble) = self.condition.state.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Status {
            version: version.to_owned(),
            revision: revision.to_owned(),
            pid: std::process::id(),
            started: rfc3339(self.condition.started),
            state,
            trouble,
            address: self.identity.address.clone(),
            root: self.identity.root.display().to_string(),
            config: self.identity.config.display().to_string(),
            connection_kept: self.condition.connection_kept.load(Ordering::Relaxed),
            background_queue: self.scheduler.queue_length() as u64,
            images: self.observers.images(),
            messages: logs::recent(),
        }
    }

    /// Answers on the socket that belongs to the one containerd uses, as long as the daemon lives.
    pub async fn serve(self, containerds: &Path) {
        let path = layout::status_socket(containerds);
        match http::Endpoint::Unix(path.clone()).bind().await {
            Ok(listener) => {
                let reporter = Arc::new(self);
                // Strings, numbers and lists of them always serialise.
                let document = move || serde_json::to_string(&reporter.status()).unwrap_or_default();
                tokio::spawn(http::serve(listener, http::Content::Status(Arc::new(document))));
            }
            Err(error) => say!(StatusUnavailable, %error, path = %path.display(), "cannot listen for soci status"),
        }
    }
}
