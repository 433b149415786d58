//! All layers of the node, by digest: each is opened once however many snapshots use it, and goes with the last of them.
//!
//! Lock order: a layer's `Slot` before `users` or `slots`; both of these for moments only.

use super::{
    Layer, OpenError, Shared, User, Wanted,
    files::{self, LayerFiles},
    layer, toc,
    verdict::{self, Condemned, Verdict},
};
use crate::telemetry::catalog::say;
use crate::{
    layout::Layout,
    oci::Digest,
    ztoc::{Limits, Ztoc},
};
use std::{
    collections::{HashMap, HashSet},
    fs, io,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
};
use tokio::sync::{OwnedMutexGuard, oneshot};

/// Held by whoever opens or removes the layer. Empty when it is not open.
type Slot = Weak<Layer>;

/// All layers of the node.
pub struct LayerStore {
    layout: Layout,
    shared: Arc<Shared>,
    limits: Limits,
    slots: Mutex<HashMap<Digest, Arc<tokio::sync::Mutex<Slot>>>>,
    /// Written only by who holds the layer's slot.
    users: Mutex<HashMap<Digest, HashSet<User>>>,
    numbers: AtomicU64,
    condemned: Arc<Condemned>,
}

impl LayerStore {
    /// The store below `layout`.
    pub fn new(layout: Layout, shared: Arc<Shared>, limits: Limits) -> LayerStore {
        let condemned = Arc::new(Condemned::open(layout.condemned()));
        LayerStore {
            condemned,
            layout,
            shared,
            limits,
            slots: Mutex::default(),
            users: Mutex::default(),
            numbers: AtomicU64::new(1),
        }
    }

    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Why `layer` must not be read by way of `ztoc`, if that was found out before.
    pub fn condemned(&self, layer: &Digest, ztoc: &Digest) -> Option<String> {
        self.condemned.why(layer, ztoc)
    }

    /// A user that is no snapshot yet. It must be released like any other.
    pub fn claim(&self) -> User {
        User::Claim(self.numbers.fetch_add(1, Ordering::Relaxed))
    }

    fn slot(&self, layer: &Digest) -> Arc<tokio::sync::Mutex<Slot>> {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        slots.entry(*layer).or_default().clone()
    }

    fn users(&self) -> MutexGuard<'_, HashMap<Digest, HashSet<User>>> {
        self.users.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the slot back, and forgets it when nobody uses or wants the layer.
    fn give_back(&self, layer: &Digest, slot: OwnedMutexGuard<Slot>) {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        // Ours and the table's: whoever wants it next has to come through the table.
        let alone = Arc::strong_count(OwnedMutexGuard::mutex(&slot)) <= 2;
        if alone && !self.users().contains_key(layer) {
            slots.remove(layer);
        }
        drop(slot);
    }

    /// Opens a layer for `user`, or finds it open. Never waits for the network.
    ///
    /// A caller that stops waiting is no user, whatever came of it.
    pub async fn open(self: &Arc<Self>, wanted: Wanted, user: impl Into<User>) -> Result<Arc<Layer>, OpenError> {
        let (store, user, digest) = (self.clone(), user.into(), wanted.layer);
        let (answer, opened) = oneshot::channel();
        // In a task of its own: what has begun to write must end before somebody else begins.
        self.shared.runtime.spawn(async move {
            let result = store.open_now(wanted, user).await;
            if let Err(Ok(unheard)) = answer.send(result) {
                drop(unheard);
                let _ = store.release(digest, user).await;
            }
        });
        opened.await.unwrap_or(Err(OpenError::Stopping))
    }

    async fn open_now(self: &Arc<Self>, wanted: Wanted, user: User) -> Result<Arc<Layer>, OpenError> {
        let digest = wanted.layer;
        let mut slot = self.slot(&digest).lock_owned().await;
        if let Some(layer) = slot.upgrade() {
            layer.add_source(wanted.source);
            layer.claim(wanted.chain);
            self.users().entry(digest).or_default().insert(user);
            return Ok(layer);
        }
        let store = self.clone();
        let opening = self.shared.runtime.spawn_blocking(move || {
            let opened = store.open_blocking(&wanted);
            if let Ok(layer) = &opened {
                *slot = Arc::downgrade(layer);
                store.users().entry(digest).or_default().insert(user);
            }
            store.give_back(&digest, slot);
            opened
        });
        opening.await.unwrap_or(Err(OpenError::Stopping))
    }

    fn open_blocking(&self, wanted: &Wanted) -> Result<Arc<Layer>, OpenError> {
        let directory = self.layout.layer(&wanted.layer);
        let files = match existing(wanted, &directory).map_err(failed(&directory))? {
            Some(files) => files,
            None => self.create(wanted, &directory)?,
        };
        let ztoc = Ztoc::parse(files.ztoc(), &self.limits).map_err(OpenError::Ztoc)?;
        let table = ztoc.spans().clone();
        let toc_path = files::toc_path(&directory);
        let toc = match toc::Toc::open(&toc_path, &wanted.layer) {
            Ok(toc) => toc,
            Err(newer @ toc::OpenError::Newer(_)) => return Err(OpenError::TocFile(newer)),
            Err(_) => {
                self.build_toc(&ztoc, wanted.layer, &directory)?;
                toc::Toc::open(&toc_path, &wanted.layer).map_err(OpenError::TocFile)?
            }
        };
        drop(ztoc);
        files.settle();
        let present = files.present(table.spans.len()).map_err(failed(&directory))?;
        let ztoc = files.ztoc_digest();
        let verdict = match self.condemned.why(&wanted.layer, &ztoc) {
            Some(reason) => Some(Verdict::Contradicts { reason }),
            None => verdict::proven(&directory, &ztoc).map(|diff_id| Verdict::Genuine { diff_id }),
        };
        // Upper layers hold what the image is for.
        let ranking = layer::Ranking::Later { interest: if wanted.depth == 0 { 1.0 } else { 3.0 } };
        let parts = layer::Parts {
            number: self.numbers.fetch_add(1, Ordering::Relaxed),
            digest: wanted.layer,
            table,
            toc: Arc::new(toc),
            files,
            ranking,
            present,
            source: wanted.source.clone(),
            verdict,
            chain: wanted.chain,
            condemned: self.condemned.clone(),
            limits: self.limits,
        };
        let layer = Layer::new(parts, self.shared.clone());
        if layer.is_complete() {
            // An earlier process did not get that far.
            layer.completed();
        }
        Ok(layer)
    }

    fn create(&self, wanted: &Wanted, directory: &Path) -> Result<LayerFiles, OpenError> {
        fs::create_dir_all(directory).map_err(failed(directory))?;
        let path = &wanted.ztoc_path;
        let damaged = || OpenError::ZtocDamaged { path: path.clone(), ztoc: wanted.ztoc };
        let bytes = files::map(path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::InvalidData => damaged(),
            _ => failed(path)(error),
        })?;
        if Digest::of(&bytes) != wanted.ztoc {
            return Err(damaged());
        }
        let ztoc = Ztoc::parse(&bytes, &self.limits).map_err(OpenError::Ztoc)?;
        let table = ztoc.spans();
        self.build_toc(&ztoc, wanted.layer, directory)?;
        files::create(directory, path, &wanted.ztoc, table.compressed_size, table.spans.len())
            .and_then(|()| LayerFiles::open(directory))
            .map_err(failed(directory))
    }

    fn build_toc(&self, ztoc: &Ztoc<'_>, layer: Digest, directory: &Path) -> Result<(), OpenError> {
        let started = std::time::Instant::now();
        let bytes = toc::build(&layer, ztoc).map_err(OpenError::Toc)?;
        let path = files::toc_path(directory);
        let temporary = path.with_extension("new");
        fs::write(&temporary, bytes).and_then(|()| fs::rename(&temporary, &path)).map_err(failed(&path))?;
        self.shared.observer.toc_built(&layer, started.elapsed());
        Ok(())
    }

    /// Whether `user` is one of the layer's, and no snapshot is: only then is a claim what keeps it.
    pub fn is_kept_by(&self, layer: &Digest, user: User) -> bool {
        let users = self.users();
        let set = users.get(layer);
        set.is_some_and(|set| set.contains(&user) && !set.iter().any(|user| matches!(user, User::Snapshot(_))))
    }

    /// `user` does not need `layer` any more. With the last user the layer goes from disk, and what still waits for it fails. Claims end
    /// with the last snapshot: what they expected has come and gone.
    pub async fn release(self: &Arc<Self>, layer: Digest, user: impl Into<User>) -> io::Result<()> {
        let user = user.into();
        let mut slot = self.slot(&layer).lock_owned().await;
        let is_used = {
            let mut users = self.users();
            let left = users.get_mut(&layer).map(|set| {
                let was_snapshot = set.remove(&user) && matches!(user, User::Snapshot(_));
                if was_snapshot && !set.iter().any(|user| matches!(user, User::Snapshot(_))) {
                    set.clear();
                }
                set.len()
            });
            if left == Some(0) {
                users.remove(&layer);
            }
            users.contains_key(&layer)
        };
        if is_used {
            return Ok(());
        }
        if let Some(open) = slot.upgrade() {
            open.retire();
        }
        *slot = Weak::new();
        let store = self.clone();
        let removing = self.shared.runtime.spawn_blocking(move || {
            let removed = remove(&store.layout.layer(&layer));
            store.give_back(&layer, slot);
            removed
        });
        // Without a runtime the next start sweeps.
        removing.await.unwrap_or(Ok(()))
    }

    /// Removes the directories of layers that nobody uses: what a crash between two steps may have left. Blocks on disk.
    pub fn sweep(&self) -> io::Result<usize> {
        let entries = match fs::read_dir(self.layout.layers()) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
            Err(error) => return Err(error),
        };
        let (mut removed, mut trouble) = (0, None);
        for entry in entries {
            let entry = entry?;
            let layer = entry.file_name().to_str().and_then(|name| Digest::from_hex(name).ok());
            let result = match layer {
                None => remove(&entry.path()),
                Some(layer) => {
                    // A slot that is taken belongs to somebody who opens or removes the layer.
                    let Ok(slot) = self.slot(&layer).try_lock_owned() else { continue };
                    let is_used = self.users().contains_key(&layer);
                    let result = if is_used { Ok(()) } else { remove(&entry.path()) };
                    self.give_back(&layer, slot);
                    if is_used {
                        continue;
                    }
                    result
                }
            };
            match result {
                Ok(()) => removed += 1,
                Err(error) => trouble = Some(error),
            }
        }
        trouble.map_or(Ok(removed), Err)
    }
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> OpenError {
    let path = path.to_owned();
    move |source| OpenError::Io { path, source }
}

/// The files of a layer that was opened before, if they are whole or can be made so. The first zTOC of a layer serves it for as long
/// as the layer is here: every one describes the same bytes.
fn existing(wanted: &Wanted, directory: &Path) -> io::Result<Option<LayerFiles>> {
    let Some(recorded) = files::ztoc_of(directory)? else { return Ok(None) };
    let open = || match LayerFiles::open(directory) {
        Ok(files) if Digest::of(files.ztoc()) == recorded => Ok(Some(files)),
        Ok(_) => Ok(None),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidData) => Ok(None),
        Err(error) => Err(error),
    };
    if let Some(files) = open()? {
        return Ok(Some(files));
    }
    say!(LayerDirectoryDamaged, layer = %wanted.layer, "the layer's directory is damaged, making it again");
    // With another zTOC the spans would be others.
    match wanted.ztoc == recorded && files::place_ztoc(directory, &wanted.ztoc_path).is_ok() {
        true => open(),
        false => Ok(None),
    }
}

/// Removes a directory or a file, which is gone at once under its name.
fn remove(path: &Path) -> io::Result<()> {
    let gone = path.with_extension("gone");
    let result = match fs::rename(path, &gone) {
        // Left by a crash in the middle of this.
        Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {
            fs::remove_dir_all(&gone).and_then(|()| fs::rename(path, &gone))
        }
        result => result,
    };
    let removed = result.and_then(|()| match fs::symlink_metadata(&gone)?.is_dir() {
        true => fs::remove_dir_all(&gone),
        false => fs::remove_file(&gone),
    });
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}
