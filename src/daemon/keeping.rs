//! What has to outlive this daemon, and goes back and forth between it and its keepers (`holder`): the FUSE descriptor, the journal of
//! requests, the logins that kubelet sent. Nothing here stops the daemon from starting: a keeper that is not there is said, and asked again.
//! So is a custodian.

use super::condition::Condition;
use crate::{
    custodian, fs as lazyfs,
    holder::{self, Held, How},
    keychain::CriLogins,
    layout::Layout,
    snapshot::{self, Door},
    telemetry::catalog::say,
};
use std::{os::fd::OwnedFd, sync::Arc, time::Duration};

/// How often the holder is asked whether it still has the descriptor: as long as nobody but us has it, our end would be that of the mount.
const HOLDER_CHECK: Duration = Duration::from_secs(1);

/// How often in a row it may be missing before an operator is told: who restarts it needs a moment.
const HOLDER_PATIENCE: u32 = 3;

/// How often it is looked whether the custodian is there, and how often in a row it may be missing before that is said: as with the holder.
const CUSTODIAN_CHECK: Duration = Duration::from_secs(1);
/// See [`CUSTODIAN_CHECK`].
const CUSTODIAN_PATIENCE: u32 = 3;
/// A custodian that has not answered its first greeting by then is said to be missing. Requests wait for it longer: systemd may have to start it.
const CUSTODIAN_SLOW: Duration = Duration::from_secs(10);

/// Where requests are read into, on a kernel that cannot repeat them.
pub(super) fn journal(file: Option<&OwnedFd>, init: &holder::InitParams) -> Option<lazyfs::Journal> {
    let error = match file.map(lazyfs::Journal::open) {
        Some(Ok(journal)) => return Some(journal),
        Some(Err(error)) => snapshot::chain(&error),
        None if init.can_resend() => return None,
        None => "soci-mount did not send one".to_owned(),
    };
    // Everything else works. What it holds is left as it is.
    say!(NoJournal, error, "a crash of this daemon may leave reads waiting for ever: they cannot be written down");
    None
}

/// The logins that kubelet sent to an earlier daemon. Without them layers that need one wait for the next pull of their image.
pub(super) fn inherit_logins(layout: &Layout, logins: &CriLogins) {
    let kept = match holder::kept_logins(layout) {
        Ok(kept) => kept,
        Err(error) => return tracing::info!(%error, "soci-mount gives no registry logins back"),
    };
    let text = kept.as_ref().and_then(|kept| kept.strip_prefix(holder::LOGINS_MAGIC));
    match text.map(|text| logins.restore(text)) {
        Some(Some(count)) => {
            tracing::info!(count, "registry logins that kubelet sent to an earlier daemon are known again")
        }
        Some(None) => tracing::info!("the registry logins of an earlier daemon cannot be understood"),
        None => {}
    }
}

/// Hands them on, whenever they change.
pub(super) async fn keep_logins(layout: Layout, logins: Arc<CriLogins>) {
    loop {
        logins.changed().await;
        let (layout, sealed) = (layout.clone(), logins.sealed(holder::LOGINS_MAGIC));
        let kept = tokio::task::spawn_blocking(move || holder::keep_logins(&layout, &sealed)).await;
        if let Ok(Err(error)) = kept {
            tracing::info!(%error, "soci-mount does not keep registry logins for the next daemon");
            tokio::time::sleep(HOLDER_CHECK).await;
            logins.touch();
        }
    }
}

/// Sees to it that the descriptor outlives us.
pub(super) async fn keep_held(
    layout: Layout,
    held: Held,
    how: How,
    condition: Arc<Condition>,
    logins: Option<Arc<CriLogins>>,
) {
    let held = Arc::new(held);
    let mut failed = 0;
    loop {
        tokio::time::sleep(HOLDER_CHECK).await;
        let (layout, held) = (layout.clone(), held.clone());
        let kept = tokio::task::spawn_blocking(move || holder::ensure_kept(&layout, &held, how)).await;
        condition.connection_kept(matches!(kept, Ok(Ok(_))));
        failed = match kept {
            Ok(Ok(_)) => 0,
            Ok(Err(_)) | Err(_) => failed + 1,
        };
        match kept {
            Ok(Ok(holder::Keeping::HandedIn)) => {
                say!(HolderReplaced, "gave the FUSE descriptor to a new soci-mount");
                if let Some(logins) = &logins {
                    logins.touch();
                }
            }
            Ok(Err(error)) if failed == HOLDER_PATIENCE => {
                say!(HolderGone, %error, "soci-mount does not answer: if this daemon ends now, running containers lose their lazily loaded layers");
            }
            _ => {}
        }
    }
}

/// Looks for a custodian as long as there is none, and says so. Whenever there is another one, what the one before could not remove is removed.
pub(super) async fn keep_custodian(custodian: Arc<custodian::Client>, door: Door) {
    let (mut failed, mut said, mut connection) = (0, false, 0);
    loop {
        let greeted = tokio::time::timeout(CUSTODIAN_SLOW, custodian.greeted()).await;
        let error = match greeted {
            Ok(Ok(number)) => {
                failed = 0;
                if std::mem::take(&mut said) {
                    say!(CustodianBack, "there is a custodian again");
                }
                if std::mem::replace(&mut connection, number) != number
                    && let Ok(snapshotter) = door.enter()
                {
                    // Its failures are logged where they happen.
                    let _ = snapshotter.cleanup().await;
                }
                None
            }
            Ok(Err(error)) => {
                failed += 1;
                (failed >= CUSTODIAN_PATIENCE).then(|| error.to_string())
            }
            Err(_) => Some(format!("no answer for {} s", CUSTODIAN_SLOW.as_secs())),
        };
        if let Some(error) = error
            && !std::mem::replace(&mut said, true)
        {
            say!(
                CustodianGone,
                error,
                "the custodian is not there: what was removed keeps its space, and nothing is unpacked here"
            );
        }
        tokio::time::sleep(CUSTODIAN_CHECK).await;
    }
}
