//! How the daemon is, and the socket where `soci status` asks.
//!
//! The socket is beside containerd's ([`crate::layout::status_socket`]), for root only, and answers one GET per connection with
//! [`Status`] as JSON. It needs neither disk nor network nor containerd's socket, so it also answers while the daemon starts, is full of work, or
//! takes nothing new. Without it the daemon runs on: it only tells.
//!
//! **A daemon that cannot start properly still serves.** With a broken configuration, an unreadable snapshot database or a full disk, and lazily
//! loaded layers on the node, it shows those again and serves their reads; [`Condition::trouble`] closes the [`Door`] to new snapshots with the
//! reason and tells journal and status. Trouble that can heal is looked at again every [`AGAIN`].

use super::observe::{Observers, rfc3339};
use crate::{
    config,
    layers::Scheduler,
    layout,
    snapshot::{Door, Snapshotter, StoreError, chain},
    telemetry::{
        catalog::say,
        http, logs,
        status::{State, Status, Trouble},
    },
};
use std::{
    collections::BTreeMap,
    future::Future,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

/// Between two looks at trouble that may have gone.
pub const AGAIN: Duration = Duration::from_secs(5);
/// Less room than this on the root's filesystem is none: a snapshot takes some directories and a transaction of the database.
const ROOM: u64 = 1 << 20;

/// What keeps the daemon from taking anything new.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cause {
    /// The configuration file cannot be used.
    Config,
    /// The snapshot database cannot be read.
    Records,
    /// There is no room below the root directory.
    Disk,
}

impl Cause {
    fn word(self) -> &'static str {
        match self {
            Cause::Config => "config",
            Cause::Records => "records",
            Cause::Disk => "disk",
        }
    }
}

/// What changes while the daemon lives.
pub struct Condition {
    started: SystemTime,
    /// Held while the door is told, so that door and state agree.
    state: Mutex<Now>,
    door: Door,
    connection_kept: AtomicBool,
}

#[derive(Default)]
struct Now {
    answers: bool,
    troubles: BTreeMap<Cause, String>,
}

impl Condition {
    /// Of a daemon that has just begun, with the door that containerd is to find.
    pub fn starting(door: Door) -> Arc<Condition> {
        Arc::new(Condition {
            started: SystemTime::now(),
            state: Mutex::default(),
            door,
            connection_kept: AtomicBool::new(true),
        })
    }

    /// The daemon answers containerd now.
    pub fn answers(&self) {
        self.lock().answers = true;
    }

    /// Why nothing new is taken.
    pub fn refusal(&self) -> Option<String> {
        self.lock().refusal()
    }

    fn lock(&self) -> MutexGuard<'_, Now> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nothing new is taken until this is over.
    pub fn trouble(&self, cause: Cause, error: String) {
        let mut now = self.lock();
        if now.troubles.insert(cause, error.clone()).is_none() {
            say!(Degraded, error, reason = cause.word(), "what is mounted is served, and nothing new is taken");
        }
        self.door.refuse(now.refusal());
    }

    /// That is over.
    pub fn over(&self, cause: Cause) {
        let mut now = self.lock();
        if now.troubles.remove(&cause).is_some() && now.troubles.is_empty() {
            say!(DegradedOver, reason = cause.word(), "new images and containers are taken again");
        }
        self.door.refuse(now.refusal());
    }

    /// Looks whether there is room at `root`, now and again and again: a disk that was full at the start may be so for a while.
    pub fn watch_room(self: &Arc<Self>, root: PathBuf) {
        let look = |root: &Path| {
            let free = rustix::fs::statvfs(root).map(|stat| stat.f_bavail.saturating_mul(stat.f_frsize));
            // What cannot be asked is not known to be full.
            free.is_ok_and(|free| free < ROOM)
        };
        if !look(&root) {
            return;
        }
        let error = format!(
            "there is no room at {}: make some, by removing images that nobody uses, for example",
            root.display()
        );
        self.trouble(Cause::Disk, error);
        let me = self.clone();
        tokio::spawn(async move {
            while look(&root) {
                tokio::time::sleep(AGAIN).await;
            }
            me.over(Cause::Disk);
        });
    }

    /// Tries to open the records until that works. Meanwhile what is mounted is served.
    pub fn open_later<F>(self: &Arc<Self>, error: &StoreError, open: impl Fn() -> F + Send + Sync + 'static)
    where
        F: Future<Output = Result<Snapshotter, StoreError>> + Send,
    {
        self.trouble(Cause::Records, chain(error));
        let me = self.clone();
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(AGAIN).await;
                match open().await {
                    Ok(snapshotter) => {
                        me.door.open(snapshotter);
                        return me.over(Cause::Records);
                    }
                    Err(error) => me.trouble(Cause::Records, chain(&error)),
                }
            }
        });
    }

    /// Whether soci-mount has the FUSE descriptor besides us.
    pub fn connection_kept(&self, kept: bool) {
        self.connection_kept.store(kept, Ordering::Relaxed);
    }
}

impl Now {
    /// All that is wrong, in the words for a client.
    fn refusal(&self) -> Option<String> {
        let all: Vec<&str> = self.troubles.values().map(String::as_str).collect();
        (!all.is_empty()).then(|| all.join("; "))
    }

    fn state(&self) -> (State, Option<Trouble>) {
        let reason = self.troubles.keys().map(|cause| cause.word()).collect::<Vec<_>>().join(",");
        let trouble = self.refusal().map(|error| Trouble { reason, error });
        let state = match (self.answers, &trouble) {
            (false, _) => State::Starting,
            (true, None) => State::Serving,
            (true, Some(_)) => State::Degraded,
        };
        (state, trouble)
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
        let (state, trouble) = self.condition.lock().state();
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
        let bound = http::Endpoint::Unix(path.clone()).bind().await;
        // Connecting takes the right to write; who may look at file names and errors of all images is root.
        let bound = bound.and_then(|bound| {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
            Ok(bound)
        });
        match bound {
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
