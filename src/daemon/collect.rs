//! Indexes and zTOCs of images that are gone go from the content store: at the start, and a moment after layers were let go.
//!
//! What is in use: the index by which a layer that is shown became lazy, and every blob that it names. So nothing is removed while that is not known (a layer
//! could not be restored), nor while a Prepare is between finding its index and showing its layer ([`super::lazy::State::looking`]). What the
//! soci tool has made on this node stays.

use super::lazy::LazyMounts;
use std::{sync::Arc, time::Duration};

/// Layers of an image are let go one after another, and two images may be.
const CALM: Duration = Duration::from_secs(1);
/// When it was not the moment: at first, and at most.
const AGAIN: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// Removes what nobody uses, if that can be known now. Whether it could.
pub async fn collect(lazy: &Arc<LazyMounts>) -> bool {
    // Not waited for: who waits to be alone keeps others out, and a search may take its time.
    let Ok(_alone) = lazy.state.looking.try_write() else { return false };
    let me = lazy.clone();
    let collected = tokio::task::spawn_blocking(move || match me.all_shown() {
        true => me.indexes.collect(&me.in_use()),
        false => None,
    });
    match collected.await {
        Ok(Some(Ok(removed))) => {
            if removed > 0 {
                lazy.artifacts.forget().await;
                tracing::info!(removed, "indexes and zTOCs of images that are gone were removed");
            }
            true
        }
        Ok(Some(Err(error))) => {
            tracing::info!(%error, "indexes and zTOCs of images that are gone could not be removed");
            true
        }
        Ok(None) | Err(_) => false,
    }
}

/// Collects after layers were let go, as long as the daemon lives.
pub async fn run(lazy: Arc<LazyMounts>) {
    loop {
        lazy.state.let_go.notified().await;
        tokio::time::sleep(CALM).await;
        let mut pause = AGAIN.0;
        while !collect(&lazy).await {
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(AGAIN.1);
        }
    }
}
