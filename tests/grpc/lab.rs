//! A snapshotter on a temporary root behind a real socket, and a client of it.

pub use crate::support::needs_root;
use futures::future::BoxFuture;
use hyper_util::rt::TokioIo;
use soci::config::Config;
use soci::grpc::proto::snapshots::snapshots_client::SnapshotsClient;
use soci::grpc::proto::snapshots::*;
use soci::grpc::proto::types::Mount;
use soci::grpc::{Limits, serve};
use soci::layout::{Layout, SnapshotId};
use soci::oci::{Digest, IdMaps};
use soci::snapshot::{
    InProcessDisk, LazyLayers, NeverEager, NotLazyReason, Options, Pull, Snapshotter, Target, Usage, label,
};
use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use tokio::sync::{Notify, Semaphore};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request};

/// Makes every layer readable as a directory with one file, unless told otherwise.
pub struct FakeLazy {
    layout: Layout,
    pub reason: Mutex<Option<NotLazyReason>>,
    pub unavailable: Mutex<HashSet<SnapshotId>>,
    pub removed: Mutex<Vec<SnapshotId>>,
    pub targets: Mutex<Vec<Target>>,
    pub not_lazy: Mutex<Vec<NotLazyReason>>,
    /// A permit for each prepare that may go on.
    pub gate: Semaphore,
    /// Told whenever a prepare has come to the gate.
    pub arrived: Notify,
}

/// The file in every lazy layer.
pub const LAZY_FILE: &str = "lazy-file";

impl LazyLayers for FakeLazy {
    fn prepare<'a>(
        &'a self,
        id: SnapshotId,
        target: &'a Target,
        _parents: &'a [SnapshotId],
    ) -> BoxFuture<'a, Result<(), NotLazyReason>> {
        Box::pin(async move {
            self.targets.lock().unwrap().push(target.clone());
            self.arrived.notify_one();
            self.gate.acquire().await.unwrap().forget();
            if let Some(reason) = self.reason.lock().unwrap().clone() {
                return Err(reason);
            }
            let path = self.layout.lazy().join(id.to_string());
            std::fs::create_dir_all(&path).unwrap();
            std::fs::write(path.join(LAZY_FILE), target.layer.to_string()).unwrap();
            Ok(())
        })
    }

    fn map<'a>(&'a self, _: SnapshotId, id: SnapshotId, maps: &'a IdMaps) -> BoxFuture<'a, Result<(), String>> {
        Box::pin(async move {
            let path = self.layout.lazy().join(id.to_string());
            std::fs::create_dir_all(&path).unwrap();
            std::fs::write(path.join(LAZY_FILE), maps.to_string()).unwrap();
            Ok(())
        })
    }

    fn available(&self, id: SnapshotId) -> BoxFuture<'_, bool> {
        let available = !self.unavailable.lock().unwrap().contains(&id);
        Box::pin(async move { available })
    }

    fn remove(&self, id: SnapshotId) {
        self.removed.lock().unwrap().push(id);
    }

    fn usage(&self, _: SnapshotId) -> Usage {
        Usage { size: 77, inodes: 7 }
    }

    fn not_lazy(&self, _: SnapshotId, reason: &NotLazyReason) {
        self.not_lazy.lock().unwrap().push(reason.clone());
    }
}

pub struct Lab {
    pub root: Arc<tempfile::TempDir>,
    pub layout: Layout,
    pub lazy: Arc<FakeLazy>,
    pub snapshotter: Snapshotter,
    pub client: SnapshotsClient<Channel>,
    server: tokio::task::JoinHandle<()>,
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.server.abort();
    }
}

pub async fn lab() -> Lab {
    lab_with(Pull::from(&Config::default())).await
}

pub async fn lab_with(pull: Pull) -> Lab {
    lab_on(Arc::new(tempfile::tempdir().unwrap()), |options| options.pull = pull).await
}

pub async fn lab_on(root: Arc<tempfile::TempDir>, change: impl FnOnce(&mut Options)) -> Lab {
    let layout = Layout::new(root.path().join("root"));
    let mut options = Options::new(layout.clone(), Pull::from(&Config::default()));
    change(&mut options);
    let lazy = Arc::new(FakeLazy {
        layout: layout.clone(),
        reason: Mutex::default(),
        unavailable: Mutex::default(),
        removed: Mutex::default(),
        targets: Mutex::default(),
        not_lazy: Mutex::default(),
        gate: Semaphore::new(1000),
        arrived: Notify::new(),
    });
    let disk = Arc::new(InProcessDisk::new(layout.clone()));
    let snapshotter = Snapshotter::open(options, lazy.clone(), Arc::new(NeverEager), disk).await.unwrap();
    let socket = root.path().join("s.sock");
    let _ = std::fs::remove_file(&socket);
    let listener = tokio::net::UnixListener::bind(&socket).unwrap();
    let served = serve(listener, snapshotter.clone(), None, Limits::default(), std::future::pending());
    let server = tokio::spawn(async move { served.await.unwrap() });
    let client = SnapshotsClient::new(channel(&socket));
    Lab { root, layout, lazy, snapshotter, client, server }
}

pub fn channel(socket: &Path) -> Channel {
    let socket: PathBuf = socket.into();
    let connector = tower::service_fn(move |_: http::Uri| {
        let socket = socket.clone();
        async move { std::io::Result::Ok(TokioIo::new(tokio::net::UnixStream::connect(socket).await?)) }
    });
    Endpoint::from_static("http://lab").connect_with_connector_lazy(connector)
}

/// A request in the namespace `default`.
pub fn request<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("containerd-namespace", "default".parse().unwrap());
    request
}

pub type Outcome<T> = Result<T, Code>;

pub fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
}

/// The labels with which containerd prepares the layer of chain `chain`.
pub fn layer_labels(chain: &str) -> BTreeMap<String, String> {
    let digest = |name: &str| Digest::of(name.as_bytes()).to_string();
    labels(&[
        (label::TARGET, chain),
        (label::IMAGE_REF, "docker.io/library/redis:7"),
        (label::MANIFEST_DIGEST, &digest("manifest")),
        (label::LAYER_DIGEST, &digest(chain)),
    ])
}

impl Lab {
    /// Closes everything and opens it again on the same root.
    pub async fn restart(self) -> Lab {
        let root = self.root.clone();
        let released = Arc::downgrade(&self.lazy);
        drop(self);
        // The server task still holds the records for a moment.
        while released.strong_count() > 0 {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        lab_on(root, |_| {}).await
    }

    pub async fn prepare(&self, key: &str, parent: &str) -> Outcome<Mount> {
        self.prepare_labelled(key, parent, BTreeMap::new()).await
    }

    pub async fn prepare_labelled(&self, key: &str, parent: &str, labels: BTreeMap<String, String>) -> Outcome<Mount> {
        let (key, parent) = (key.into(), parent.into());
        let message = PrepareSnapshotRequest { snapshotter: "soci".into(), key, parent, labels };
        let response = self.client.clone().prepare(request(message)).await.map_err(|status| status.code())?;
        let mut mounts = response.into_inner().mounts;
        assert_eq!(mounts.len(), 1);
        Ok(mounts.remove(0))
    }

    pub async fn prepare_layer(&self, chain: &str, parent: &str) -> Outcome<Mount> {
        self.prepare_labelled(&format!("default/1/extract {chain}"), parent, layer_labels(chain)).await
    }

    pub async fn view(&self, key: &str, parent: &str) -> Outcome<Mount> {
        let (key, parent) = (key.into(), parent.into());
        let message = ViewSnapshotRequest { key, parent, ..Default::default() };
        let response = self.client.clone().view(request(message)).await.map_err(|status| status.code())?;
        Ok(response.into_inner().mounts.remove(0))
    }

    pub async fn mounts(&self, key: &str) -> Outcome<Mount> {
        let message = MountsRequest { key: key.into(), ..Default::default() };
        let response = self.client.clone().mounts(request(message)).await.map_err(|status| status.code())?;
        Ok(response.into_inner().mounts.remove(0))
    }

    pub async fn commit(&self, name: &str, key: &str) -> Outcome<()> {
        let (name, key) = (name.into(), key.into());
        let message = CommitSnapshotRequest { name, key, ..Default::default() };
        self.client.clone().commit(request(message)).await.map(drop).map_err(|status| status.code())
    }

    pub async fn remove(&self, key: &str) -> Outcome<()> {
        let message = RemoveSnapshotRequest { key: key.into(), ..Default::default() };
        self.client.clone().remove(request(message)).await.map(drop).map_err(|status| status.code())
    }

    pub async fn cleanup(&self) -> Outcome<()> {
        self.client.clone().cleanup(request(CleanupRequest::default())).await.map(drop).map_err(|status| status.code())
    }

    pub async fn stat(&self, key: &str) -> Outcome<Info> {
        let message = StatSnapshotRequest { key: key.into(), ..Default::default() };
        let response = self.client.clone().stat(request(message)).await.map_err(|status| status.code())?;
        Ok(response.into_inner().info.unwrap())
    }

    pub async fn usage(&self, key: &str) -> Outcome<(i64, i64)> {
        let message = UsageRequest { key: key.into(), ..Default::default() };
        let response = self.client.clone().usage(request(message)).await.map_err(|status| status.code())?;
        let usage = response.into_inner();
        Ok((usage.size, usage.inodes))
    }

    /// The messages of a List.
    pub async fn pages(&self, filters: &[&str]) -> Outcome<Vec<Vec<Info>>> {
        let filters = filters.iter().map(|filter| filter.to_string()).collect();
        let message = ListSnapshotsRequest { filters, ..Default::default() };
        let response = self.client.clone().list(request(message)).await.map_err(|status| status.code())?;
        let mut stream = response.into_inner();
        let mut pages = Vec::new();
        while let Some(page) = stream.message().await.map_err(|status| status.code())? {
            pages.push(page.info);
        }
        Ok(pages)
    }

    pub async fn names(&self, filters: &[&str]) -> Vec<String> {
        self.pages(filters).await.unwrap().concat().into_iter().map(|info| info.name).collect()
    }

    /// A committed snapshot with one file named and filled `file`.
    pub async fn committed(&self, name: &str, parent: &str, file: &str) {
        let key = format!("{name}-key");
        let mounts = self.prepare(&key, parent).await.unwrap();
        std::fs::write(upper(&mounts).join(file), file).unwrap();
        self.commit(name, &key).await.unwrap();
    }

    /// Numbers of the snapshot directories.
    pub fn directories(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.layout.snapshots()).unwrap();
        let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    pub fn fs(&self, id: u32) -> String {
        self.layout.snapshot_fs(SnapshotId(id)).to_str().unwrap().to_owned()
    }
}

/// The directory that is written to.
pub fn upper(mount: &Mount) -> PathBuf {
    match mount.r#type.as_str() {
        "bind" => mount.source.clone().into(),
        _ => mount.options.iter().find_map(|o| o.strip_prefix("upperdir=")).unwrap().into(),
    }
}

/// A mount made as containerd makes it, gone when dropped.
pub struct Mounted(tempfile::TempDir);

impl Mounted {
    pub fn new(mount: &Mount) -> Mounted {
        use nix::mount::{MsFlags, mount as mount2};
        let target = tempfile::tempdir().unwrap();
        let data: Vec<&str> =
            mount.options.iter().map(String::as_str).filter(|o| !matches!(*o, "rbind" | "ro" | "rw")).collect();
        let bind = mount.options.iter().any(|o| o == "rbind");
        let flags = if bind { MsFlags::MS_BIND | MsFlags::MS_REC } else { MsFlags::empty() };
        let kind = (!bind).then_some(mount.r#type.as_str());
        mount2(Some(mount.source.as_str()), target.path(), kind, flags, Some(data.join(",").as_str())).unwrap();
        if mount.options.iter().any(|o| o == "ro") {
            let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
            mount2(None::<&str>, target.path(), None::<&str>, flags, None::<&str>).unwrap();
        }
        Mounted(target)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn read(&self, name: &str) -> Option<String> {
        std::fs::read_to_string(self.path(name)).ok()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(self.0.path(), nix::mount::MntFlags::MNT_DETACH);
    }
}
