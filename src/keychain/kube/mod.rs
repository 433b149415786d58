//! Logins from the cluster: secrets of the type `kubernetes.io/dockerconfigjson` in all namespaces that a kubeconfig may read.
//!
//! ```text
//! connect (kubeconfig read anew) ── list, in pages ── watch ── ended: watch on ── lost: wait, connect ── too old: list again
//! ```
//! Held in memory only, and bounded. A lookup waits for the first list, but not long. While the cluster cannot be reached, what is
//! known stays in use; that it cannot is said once, and again when it is over.

mod api;
mod config;

use super::{Credential, Lookup, Query, Source, docker::Logins};
use crate::telemetry::catalog::say;
use api::{Api, ApiError, Event, Name};
use config::KubeconfigError;
use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{sync::watch, task::JoinHandle};

/// Secrets held. A cluster with more has one per namespace and registry, all alike.
const MAX_SECRETS: usize = 10_000;
/// Logins given for one registry: each that is refused costs two requests.
const MAX_LOGINS: usize = 8;
/// How long a lookup waits for the first list: containerd waits for the lookup.
const PATIENCE: Duration = Duration::from_secs(3);
/// Between attempts to reach the cluster.
const FIRST_WAIT: Duration = Duration::from_secs(1);
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// The logins of a cluster.
pub struct KubeSecrets {
    state: Arc<State>,
    listed: watch::Receiver<bool>,
    task: JoinHandle<()>,
}

#[derive(Default)]
struct State {
    secrets: Mutex<BTreeMap<Name, Arc<Logins>>>,
}

impl State {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Name, Arc<Logins>>> {
        self.secrets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn apply(&self, event: Event) {
        let mut secrets = self.lock();
        match event {
            Event::Removed(name) => {
                secrets.remove(&name);
            }
            Event::Set(name, logins) => {
                if secrets.len() < MAX_SECRETS || secrets.contains_key(&name) {
                    secrets.insert(name, Arc::new(logins));
                }
            }
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum Trouble {
    #[error(transparent)]
    Config(#[from] KubeconfigError),
    #[error(transparent)]
    Api(#[from] ApiError),
}

impl KubeSecrets {
    /// Watches the cluster of the kubeconfig at `path` (empty: `$KUBECONFIG`, else `~/.kube/config`) until it is dropped; it need not be
    /// there yet. Call within a tokio runtime.
    pub fn start(path: &str) -> KubeSecrets {
        let state = Arc::new(State::default());
        let (told, listed) = watch::channel(false);
        let task = tokio::spawn(keep(config::files(path), state.clone(), told));
        KubeSecrets { state, listed, task }
    }
}

impl Drop for KubeSecrets {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn keep(files: Vec<PathBuf>, state: Arc<State>, told: watch::Sender<bool>) {
    let mut wait = FIRST_WAIT;
    let mut said = false;
    loop {
        let mut worked = false;
        let ended = follow(&files, &state, || {
            worked = true;
            told.send_replace(true);
        });
        let Err(error) = ended.await;
        if worked {
            (wait, said) = (FIRST_WAIT, false);
        }
        if !said {
            said = true;
            say!(SecretsUnavailable, error = %super::chain(&error), "the cluster's registry logins cannot be read");
        }
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(LONGEST_WAIT);
    }
}

/// Lists and watches until that fails.
async fn follow(
    files: &[PathBuf],
    state: &State,
    mut listed: impl FnMut(),
) -> Result<std::convert::Infallible, Trouble> {
    loop {
        let api = Api::new(config::load(files).await?)?;
        let list = api.list(MAX_SECRETS).await?;
        let count = list.secrets.len();
        *state.lock() = list.secrets.into_iter().map(|(name, logins)| (name, Arc::new(logins))).collect();
        tracing::info!(secrets = count.to_string(), "registry logins of the cluster are known");
        listed();
        let mut version = list.version;
        loop {
            match api.watch(&mut version, |event| state.apply(event)).await {
                // The server ends every watch in the end. One that ends at once must not make us ask in a circle.
                Ok(()) => tokio::time::sleep(FIRST_WAIT).await,
                Err(ApiError::Gone) => break,
                Err(error) => return Err(error.into()),
            }
        }
        tokio::time::sleep(FIRST_WAIT).await;
    }
}

impl Source for KubeSecrets {
    fn name(&self) -> &str {
        "secrets of the cluster (kubeconfig)"
    }

    fn lookup<'a>(&'a self, query: &'a Query<'a>) -> Lookup<'a> {
        Box::pin(async move {
            let mut listed = self.listed.clone();
            // Late or never is the same: what is known is what there is.
            let _ = tokio::time::timeout(PATIENCE, listed.wait_for(|listed| *listed)).await;
            let secrets: Vec<_> = self.state.lock().values().cloned().collect();
            let mut out: Vec<Credential> = Vec::new();
            for credential in secrets.iter().flat_map(|logins| logins.stored(query)) {
                if out.len() < MAX_LOGINS && !out.contains(&credential) {
                    out.push(credential);
                }
            }
            Ok(out)
        })
    }
}
