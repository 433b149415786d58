//! Undoing what was done to the machine, in reverse order, exactly once: on drop, or all of it when the process is told to stop.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

type Action = Box<dyn FnOnce() + Send>;

static NEXT: AtomicU64 = AtomicU64::new(0);
/// Keyed by the order of registration. Never held while an action runs: actions wait for processes.
static PENDING: Mutex<BTreeMap<u64, Action>> = Mutex::new(BTreeMap::new());

/// Runs its action when dropped, unless a signal has run it already.
#[must_use]
pub struct Undo(u64);

impl Undo {
    pub fn with(action: impl FnOnce() + Send + 'static) -> Undo {
        let key = NEXT.fetch_add(1, Ordering::Relaxed);
        pending().insert(key, Box::new(action));
        Undo(key)
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        let action = pending().remove(&self.0);
        if let Some(action) = action {
            action();
        }
    }
}

fn pending() -> std::sync::MutexGuard<'static, BTreeMap<u64, Action>> {
    PENDING.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// From now on SIGINT, SIGTERM and SIGHUP undo everything and end the process with 130.
pub fn on_signals() {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (ready, wait) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        runtime.block_on(async {
            let mut interrupt = signal(SignalKind::interrupt()).unwrap();
            let mut terminate = signal(SignalKind::terminate()).unwrap();
            let mut hangup = signal(SignalKind::hangup()).unwrap();
            ready.send(()).unwrap();
            tokio::select! { _ = interrupt.recv() => (), _ = terminate.recv() => (), _ = hangup.recv() => () }
        });
        eprintln!("\ninterrupted: cleaning up");
        loop {
            let last = pending().pop_last();
            match last {
                Some((_, action)) => action(),
                None => std::process::exit(130),
            }
        }
    });
    wait.recv().unwrap();
}
