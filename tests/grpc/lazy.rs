//! Layers that containerd need not unpack, and those that it must (U-SN2 to U-SN6, I-PM1, I-PM6).

use super::lab::*;
use soci::config::{Config, MinLayerSize};
use soci::grpc::proto::snapshots::{Kind, PrepareSnapshotRequest};
use soci::layout::SnapshotId;
use soci::oci::Digest;
use soci::snapshot::{NotLazyReason, Pull, label};
use std::cell::RefCell;
use std::io::Write;
use std::sync::{Arc, Mutex, Once};
use tonic::Code;
use tracing_subscriber::{filter::dynamic_filter_fn, prelude::*};

/// Log lines of this test, as JSON objects.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

thread_local! {
    /// Who collects what this thread logs.
    static COLLECTS: RefCell<Option<Log>> = const { RefCell::new(None) };
}

/// While it lives, what its thread logs is collected.
struct Collecting;

impl Drop for Collecting {
    fn drop(&mut self) {
        COLLECTS.set(None);
    }
}

/// Goes to the log of the thread that writes.
struct Collector;

impl Write for Collector {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        COLLECTS.with_borrow(|log| log.iter().for_each(|log| log.0.lock().unwrap().extend_from_slice(bytes)));
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Log {
    /// Collects what this thread logs; tests here run on one thread. One subscriber for all threads: beside one of a single thread, what
    /// another thread logs first is off for both.
    fn start() -> (Log, Collecting) {
        static SUBSCRIBE: Once = Once::new();
        SUBSCRIBE.call_once(|| {
            let collected = dynamic_filter_fn(|_, _| COLLECTS.with_borrow(Option::is_some));
            let layer = tracing_subscriber::fmt::layer().json().flatten_event(true).with_writer(|| Collector);
            let all = tracing_subscriber::registry().with(layer.with_filter(collected));
            tracing::subscriber::set_global_default(all).unwrap();
            tracing::callsite::rebuild_interest_cache();
        });
        let log = Log::default();
        COLLECTS.set(Some(log.clone()));
        (log, Collecting)
    }

    /// Level, message and value of each line with the field `key`.
    fn with(&self, key: &str) -> Vec<(String, String, serde_json::Value)> {
        let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        let found = lines.filter(|line| line.get(key).is_some());
        found
            .map(|line| {
                (line["level"].as_str().unwrap().into(), line["message"].as_str().unwrap().into(), line[key].clone())
            })
            .collect()
    }
}

fn line(level: &str, message: &str, value: &str) -> (String, String, serde_json::Value) {
    (level.into(), message.into(), value.into())
}

#[tokio::test]
async fn a_lazy_layer_is_committed_under_its_chain_id_with_its_labels() {
    let (log, _guard) = Log::start();
    let lab = lab().await;
    assert_eq!(lab.prepare_layer("chain", "").await, Err(Code::AlreadyExists));
    let info = lab.stat("chain").await.unwrap();
    assert_eq!((info.kind(), info.parent.as_str()), (Kind::Committed, ""));
    let mut expected = layer_labels("chain");
    expected.insert(label::REMOTE.into(), "remote snapshot".into());
    expected.insert(label::NAMESPACE.into(), "default".into());
    expected.insert(label::HAS_INDEX.into(), "true".into());
    assert_eq!(info.labels, expected);
    // How containerd looks for it afterwards.
    let filter = r#"labels."containerd.io/snapshot.ref"=="chain",parent=="""#;
    assert_eq!(lab.names(&[filter]).await, ["chain"]);
    assert_eq!(lab.names(&[]).await, ["chain"], "no active snapshot is left");
    let prepared = line("INFO", "remote snapshot successfully prepared.", "true");
    assert_eq!(log.with("remote-snapshot-prepared"), [prepared]);
    assert_eq!(lab.usage("chain").await, Ok((77, 7)), "what the layer store holds");
    let target = lab.lazy.targets.lock().unwrap()[0].clone();
    assert_eq!((target.layer, target.namespace.as_str()), (Digest::of(b"chain"), "default"));
}

#[tokio::test]
async fn privileged_a_container_on_a_lazy_layer_reads_it_through_the_usual_mounts() {
    let lab = lab().await;
    assert_eq!(lab.prepare_layer("one", "").await, Err(Code::AlreadyExists));
    assert_eq!(lab.prepare_layer("two", "one").await, Err(Code::AlreadyExists));
    let mount = lab.prepare("container", "two").await.unwrap();
    assert_eq!((mount.r#type.as_str(), mount.source.as_str()), ("overlay", "overlay"));
    assert!(mount.options[0].starts_with("workdir=") && mount.options[1].starts_with("upperdir="));
    assert_eq!(mount.options[2], format!("lowerdir={}:{}", lab.fs(2), lab.fs(1)));
    assert_eq!(std::fs::read_link(lab.fs(2)).unwrap(), std::path::Path::new("../../lazy/2"));
    needs_root();
    {
        let m = Mounted::new(&mount);
        assert_eq!(m.read(LAZY_FILE), Some(Digest::of(b"two").to_string()));
        std::fs::write(m.path("written"), "w").unwrap();
    }
    lab.commit("image", "container").await.unwrap();
    let m = Mounted::new(&lab.prepare("next", "image").await.unwrap());
    assert_eq!(m.read("written").as_deref(), Some("w"));
    let view = Mounted::new(&lab.view("view", "one").await.unwrap());
    assert_eq!(view.read(LAZY_FILE), Some(Digest::of(b"one").to_string()));
}

#[tokio::test]
async fn nothing_can_be_built_on_a_layer_that_cannot_be_read() {
    let lab = lab().await;
    for (chain, parent) in [("one", ""), ("two", "one"), ("three", "two")] {
        assert_eq!(lab.prepare_layer(chain, parent).await, Err(Code::AlreadyExists));
    }
    lab.prepare("top-key", "three").await.unwrap();
    lab.commit("top", "top-key").await.unwrap();
    lab.prepare("container", "top").await.unwrap();
    let before = lab.names(&[]).await;
    for id in 1..=3 {
        *lab.lazy.unavailable.lock().unwrap() = [SnapshotId(id)].into();
        for parent in ["three", "top"] {
            assert_eq!(lab.prepare("x", parent).await, Err(Code::Unavailable), "{id} {parent}");
            assert_eq!(lab.view("x", parent).await, Err(Code::Unavailable), "{id} {parent}");
        }
        assert_eq!(lab.mounts("container").await, Err(Code::Unavailable));
    }
    assert_eq!(lab.names(&[]).await, before);
    lab.lazy.unavailable.lock().unwrap().clear();
    lab.prepare("x", "top").await.unwrap();
}

#[tokio::test]
async fn a_layer_of_an_image_without_index_is_left_to_containerd() {
    let (log, _guard) = Log::start();
    let lab = lab().await;
    let reason = NotLazyReason::NoIndex { image: "docker.io/library/redis:7".into(), why: "no referrers".into() };
    *lab.lazy.reason.lock().unwrap() = Some(reason.clone());
    let mount = lab.prepare_layer("chain", "").await.unwrap();
    assert_eq!((mount.r#type.as_str(), mount.source.as_str()), ("bind", lab.fs(1).as_str()));
    assert_eq!(mount.options, ["rw", "rbind"]);
    assert!(std::fs::symlink_metadata(lab.fs(1)).unwrap().is_dir());
    let active = lab.stat("default/1/extract chain").await.unwrap();
    assert_eq!(active.labels.get(label::NAMESPACE).map(String::as_str), Some("default"));
    assert!(!active.labels.contains_key(label::REMOTE));
    let failed = line("WARN", "failed to prepare remote snapshot", "false");
    assert_eq!(log.with("remote-snapshot-prepared"), [failed]);
    let deferred = line("WARN", "no valid SOCI index found; deferring to container runtime", "true");
    assert_eq!(log.with("defer-snapshot-runtime"), [deferred]);
    let why = r#"unable to fetch SOCI artifacts for image "docker.io/library/redis:7": no referrers"#;
    assert_eq!(log.with("error")[0].2, why);
    assert_eq!(*lab.lazy.not_lazy.lock().unwrap(), [reason]);
    // containerd goes on as with any snapshotter.
    std::fs::write(format!("{}/f", lab.fs(1)), "f").unwrap();
    lab.commit("default/2/chain", "default/1/extract chain").await.unwrap();
    assert_eq!(lab.mounts("default/2/chain").await, Err(Code::FailedPrecondition));
}

#[tokio::test]
async fn each_other_reason_is_said_once_and_deferred_too() {
    let layer = Digest::of(b"chain");
    let image = || "docker.io/library/redis:7".to_string();
    let min_layer_size = MinLayerSize::Bytes(100);
    let default = Pull::from(&Config::default());
    let small = Pull { min_layer_size, ..default };
    let parallel = Pull { parallel: true, ..default };
    let cases = [
        (default, Some(NotLazyReason::NoZtoc(layer)), "no ztoc for layer", 1),
        (default, Some(NotLazyReason::Timeout(layer)), "timeout waiting for layer", 1),
        (
            default,
            Some(NotLazyReason::Unresolved { layer, image: image(), why: "403".into() }),
            "failed to resolve layer",
            1,
        ),
        // Nobody pulls in this lab; tests/pull does.
        (small, None, "the pull was given up", 0),
        (parallel, None, "the pull was given up", 0),
    ];
    for (pull, reason, why, tried) in cases {
        let (log, _guard) = Log::start();
        let lab = lab_with(pull).await;
        *lab.lazy.reason.lock().unwrap() = reason;
        let mut labels = layer_labels("chain");
        labels.insert(label::SIZE.into(), "99".into());
        lab.prepare_labelled("key", "", labels).await.unwrap();
        assert_eq!(log.with("remote-snapshot-prepared").len(), tried, "{why}");
        let deferred = line("WARN", "failed to prepare local snapshot; deferring to container runtime", "true");
        assert_eq!(log.with("defer-snapshot-runtime"), [deferred]);
        let errors = log.with("error");
        assert!(errors.iter().any(|error| error.2.as_str().unwrap().contains(why)), "{errors:?}");
        assert_eq!(lab.lazy.targets.lock().unwrap().len(), tried);
    }
}

#[tokio::test]
async fn a_layer_without_image_labels_is_deferred_and_counted() {
    let lab = lab().await;
    lab.prepare_labelled("key", "", labels(&[(label::TARGET, "chain")])).await.unwrap();
    let reasons = lab.lazy.not_lazy.lock().unwrap().clone();
    assert_eq!(reasons, [NotLazyReason::LabelMissing(label::IMAGE_REF)]);
    assert!(reasons[0].is_failure());
    assert_eq!(lab.lazy.targets.lock().unwrap().len(), 0);
}

#[tokio::test]
async fn a_layer_that_is_there_is_not_prepared_again() {
    let (log, _guard) = Log::start();
    let lab = lab().await;
    for key in ["default/1/k", "k8s.io/2/k", "default/1/k"] {
        assert_eq!(lab.prepare_labelled(key, "", layer_labels("chain")).await, Err(Code::AlreadyExists));
    }
    assert_eq!(lab.lazy.targets.lock().unwrap().len(), 1);
    assert_eq!(lab.directories(), ["1"]);
    assert_eq!(log.with("remote-snapshot-prepared").len(), 3, "one line for each layer Prepare");
}

#[tokio::test]
async fn of_two_prepares_of_one_layer_at_once_both_succeed_and_one_leaves_nothing() {
    let lab = lab().await;
    lab.lazy.gate.forget_permits(1000);
    let first = lab.prepare_labelled("default/1/k", "", layer_labels("chain"));
    let second = lab.prepare_labelled("k8s.io/1/k", "", layer_labels("chain"));
    let release = async {
        while lab.lazy.targets.lock().unwrap().len() < 2 {
            lab.lazy.arrived.notified().await;
        }
        assert_eq!(lab.directories(), ["1", "2"]);
        lab.lazy.gate.add_permits(2);
    };
    let (first, second, ()) = tokio::join!(first, second, release);
    assert_eq!((first, second), (Err(Code::AlreadyExists), Err(Code::AlreadyExists)));
    assert_eq!(lab.names(&[]).await, ["chain"]);
    lab.cleanup().await.unwrap();
    assert_eq!(lab.directories().len(), 1);
    assert_eq!(lab.lazy.removed.lock().unwrap().len(), 1);
    lab.prepare("container", "chain").await.unwrap();
}

#[tokio::test]
async fn a_layer_whose_chain_id_names_something_else_is_deferred() {
    let lab = lab().await;
    lab.committed("chain", "", "f").await;
    assert_eq!(lab.prepare_layer("chain", "").await.unwrap().source, lab.fs(2));
    assert_eq!(*lab.lazy.not_lazy.lock().unwrap(), [NotLazyReason::NameTaken("chain".into())]);
    assert_eq!(lab.lazy.targets.lock().unwrap().len(), 0);
}

#[tokio::test]
async fn a_client_that_goes_away_leaves_the_layer_prepared() {
    let lab = lab().await;
    lab.lazy.gate.forget_permits(1000);
    let key = "default/1/k".to_string();
    let message = PrepareSnapshotRequest { key, labels: layer_labels("chain"), ..Default::default() };
    let mut client = lab.client.clone();
    let call = tokio::spawn(async move { client.prepare(request(message)).await.map(drop) });
    lab.lazy.arrived.notified().await;
    call.abort();
    assert!(call.await.unwrap_err().is_cancelled());
    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    lab.lazy.gate.add_permits(1);
    while lab.stat("chain").await.is_err() {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    assert_eq!(lab.names(&[]).await, ["chain"]);
}

#[tokio::test]
async fn a_deferred_layer_above_one_that_cannot_be_read_is_taken_back() {
    let lab = lab().await;
    assert_eq!(lab.prepare_layer("one", "").await, Err(Code::AlreadyExists));
    *lab.lazy.unavailable.lock().unwrap() = [SnapshotId(1)].into();
    *lab.lazy.reason.lock().unwrap() = Some(NotLazyReason::NoZtoc(Digest::of(b"two")));
    assert_eq!(lab.prepare_layer("two", "one").await, Err(Code::Unavailable));
    assert_eq!(lab.names(&[]).await, ["one"]);
    lab.cleanup().await.unwrap();
    assert_eq!(lab.directories(), ["1"]);
}
