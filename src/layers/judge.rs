//! When all of a layer is here: is it what its index says? Looked into once, after everything that somebody waits for.
//!
//! ```text
//! complete ─▶ one layer at a time ─▶ the link is quiet ─▶ `examine`, at the lowest priority, half of the time
//!    ┌──────────────────────────────────────────────────────┤
//!    ├─ bytes that are not the layer's: damaged on disk? ──▶ fetched again, and then once more from the top
//!    ├─ genuine ──▶ remembered beside the layer
//!    └─ the index is wrong ──▶ remembered for good; reads of the layer end from now on
//! ```

use super::{
    examine::{Examined, Subject},
    layer::Layer,
    verdict::{self, Verdict},
};
use crate::{
    fs::ReadError,
    oci::{Chain, Digest},
    telemetry::catalog::say,
    ztoc::Ztoc,
};
use std::{
    cell::Cell,
    io,
    sync::{PoisonError, atomic::Ordering},
    time::{Duration, Instant},
};
use tokio::sync::oneshot;

/// How often it is looked whether the link is quiet.
const LOOK: Duration = Duration::from_millis(250);
/// It is not waited for longer: on a node that is never quiet a wrong index is to be found, too. The processor's scheduler takes care of readers.
const PATIENCE: Duration = Duration::from_secs(60);
/// It works half of the time. A priority counts only among the daemon's own threads: containers have cgroups of their own, and a small node has
/// one core for all of them. A piece takes some milliseconds, so longer than this was spent waiting for the disk.
const MOST_AT_ONCE: Duration = Duration::from_millis(50);
/// And between two pieces it stays away for so long while readers wait or something is on its way.
const AWAY: Duration = Duration::from_millis(20);
/// Before an index is accused of bytes on disk that are not the layer's.
const DOUBTS: u32 = 2;
/// Images that may claim a diff ID of one layer; the newest are enough.
const MAX_CLAIMS: usize = 16;

impl Layer {
    /// What was found out about the layer, once it was.
    pub fn verdict(&self) -> Option<&Verdict> {
        self.verdict.get()
    }

    /// An image says that the layer has the diff ID that `chain` follows from.
    pub(super) fn claim(&self, chain: Option<Chain>) {
        let Some(chain) = chain else { return };
        let mut claims = self.claims.lock().unwrap_or_else(PoisonError::into_inner);
        if !claims.contains(&chain) {
            claims.insert(0, chain);
            claims.truncate(MAX_CLAIMS);
        }
    }

    /// Why nothing of the layer may be read any more.
    pub(super) fn refusal(&self) -> Option<ReadError> {
        match self.verdict.get()? {
            Verdict::Contradicts { reason } => Some(ReadError::Condemned { reason: reason.clone() }),
            Verdict::Genuine { .. } => None,
        }
    }

    /// All spans are here.
    pub(super) fn completed(&self) {
        let (Some(layer), None) = (self.arc(), self.verdict()) else { return };
        let (shared, took) = (self.shared().clone(), self.opened.elapsed());
        self.shared().runtime.spawn(async move {
            let _one = shared.completing.acquire().await;
            let begun = Instant::now();
            loop {
                tokio::time::sleep(LOOK).await;
                if layer.verdict().is_some() || layer.is_removed() {
                    return;
                }
                if shared.scheduler.is_quiet() || begun.elapsed() > PATIENCE {
                    break;
                }
            }
            let (done, ended) = oneshot::channel::<()>();
            // A thread of its own: those of the pool cannot have their priority back.
            let examining = std::thread::Builder::new().name("examine".into()).spawn(move || {
                let _ = rustix::process::setpriority_process(Some(rustix::thread::gettid()), 19);
                layer.judge(took);
                drop((layer, done));
            });
            if examining.is_ok() {
                let _ = ended.await;
            }
        });
    }

    fn judge(&self, took: Duration) {
        let is_whole = {
            let map = self.map();
            self.judging.store(map.missing() == 0, Ordering::SeqCst);
            map.missing() == 0
        };
        let examined = is_whole.then(|| self.examine());
        let known = match examined {
            // Completed again when what is missing has come.
            None | Some(Ok(Examined::GivenUp)) => false,
            Some(Ok(Examined::Layer(verdict))) => self.is_known(verdict),
            Some(Ok(Examined::OtherBytes(found))) => self.other_bytes(found),
            Some(Err(error)) => {
                say!(LayerUnreadable, layer = %self.digest(), %error, "cannot read the completed layer back");
                true
            }
        };
        self.judging.store(false, Ordering::SeqCst);
        if known {
            self.shared().observer.layer_complete(self, took);
        }
    }

    fn examine(&self) -> io::Result<Examined> {
        let begun = Instant::now();
        let limits = &self.limits;
        let ztoc = Ztoc::parse(self.files.ztoc(), limits).map_err(io::Error::other)?;
        let claims = self.claims.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let since = Cell::new(Instant::now());
        let goes_on = || {
            std::thread::sleep(since.get().elapsed().min(MOST_AT_ONCE));
            if !self.shared().scheduler.is_quiet() {
                std::thread::sleep(AWAY);
            }
            since.set(Instant::now());
            !self.is_removed()
        };
        let subject = Subject {
            layer: self.digest(),
            files: &self.files,
            ztoc: &ztoc,
            table: &self.table,
            claims: &claims,
            goes_on: &goes_on,
        };
        let examined = subject.examine();
        drop(ztoc);
        self.files.settle();
        tracing::debug!(layer = %self.digest(), took = ?begun.elapsed(), ?examined, "complete layer examined");
        examined
    }

    /// The bytes on disk are not the layer. Whether that is the last word.
    fn other_bytes(&self, found: Option<Digest>) -> bool {
        if self.discard_damaged() > 0 {
            return false;
        }
        // The gzip header has no digest, it comes with the first span; and what was damaged may have been mended meanwhile, by a reader. So the
        // beginning is asked for again, and all of it looked at again, before anybody is accused.
        if self.doubts.fetch_add(1, Ordering::Relaxed) < DOUBTS {
            tracing::info!(layer = %self.digest(), "the layer's first bytes may be damaged, fetching them again");
            self.discard(0);
            return false;
        }
        let found = found.map_or("too short".to_owned(), |digest| digest.to_string());
        let reason = format!("every span matches its zTOC, but together they are {found}");
        self.is_known(Verdict::Contradicts { reason })
    }

    /// Checks all spans on disk; returns how many were damaged.
    fn discard_damaged(&self) -> usize {
        let mut damaged = 0;
        for (span, entry) in self.table.spans.iter().enumerate() {
            match self.files.is_intact(entry) {
                Ok(true) => self.set_checked(span, true),
                Ok(false) | Err(_) => {
                    say!(SpanDamaged, layer = %self.digest(), span, "span on disk is damaged, fetching it again");
                    self.discard(span);
                    damaged += 1;
                }
            }
        }
        damaged
    }

    fn is_known(&self, verdict: Verdict) -> bool {
        let ztoc = self.files.ztoc_digest();
        let remembered = match &verdict {
            Verdict::Genuine { diff_id } => verdict::prove(self.files.directory(), ztoc, *diff_id),
            Verdict::Contradicts { reason } => self.condemned.add(self.digest(), ztoc, reason),
        };
        if let Err(error) = remembered {
            tracing::info!(layer = %self.digest(), %error, "what was found out about the layer cannot be written down; the next daemon looks again");
        }
        // One examination at a time; nobody else sets it.
        let _ = self.verdict.set(verdict);
        if self.refusal().is_some() {
            self.forget_inflated();
        }
        self.shared().observer.layer_examined(self);
        true
    }
}
