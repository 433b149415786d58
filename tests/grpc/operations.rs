//! Labels, lists, usage, cleanup, restarts, limits.

use super::lab::*;
use soci::bolt;
use soci::grpc::proto::snapshots::*;
use soci::snapshot::label;
use std::collections::BTreeMap;
use std::path::Path;
use tonic::Code;

async fn update(lab: &Lab, name: &str, given: &[(&str, &str)], mask: &[&str]) -> Outcome<BTreeMap<String, String>> {
    let info = Some(Info { name: name.into(), labels: labels(given), ..Default::default() });
    let paths = mask.iter().map(|path| path.to_string()).collect();
    let update_mask = Some(prost_types::FieldMask { paths });
    let message = UpdateSnapshotRequest { info, update_mask, ..Default::default() };
    let response = lab.client.clone().update(request(message)).await.map_err(|status| status.code())?;
    Ok(response.into_inner().info.unwrap().labels)
}

#[tokio::test]
async fn only_labels_can_be_updated() {
    let lab = lab().await;
    lab.prepare_labelled("a", "", labels(&[("x", "1"), ("y", "2")])).await.unwrap();
    let before = lab.stat("a").await.unwrap();
    assert_eq!(
        update(&lab, "a", &[("x", "9"), ("y", "9")], &["labels.x"]).await,
        Ok(labels(&[("x", "9"), ("y", "2")]))
    );
    assert_eq!(update(&lab, "a", &[], &["labels.x"]).await, Ok(labels(&[("x", ""), ("y", "2")])));
    assert_eq!(update(&lab, "a", &[("z", "3")], &["labels"]).await, Ok(labels(&[("z", "3")])));
    let dotted = "labels.containerd.io/gc.root";
    assert_eq!(
        update(&lab, "a", &[("containerd.io/gc.root", "now")], &[dotted]).await,
        Ok(labels(&[("containerd.io/gc.root", "now"), ("z", "3")]))
    );
    assert_eq!(update(&lab, "a", &[("w", "4")], &[]).await, Ok(labels(&[("w", "4")])));
    for wrong in ["parent", "kind", "labels.", "name"] {
        assert_eq!(update(&lab, "a", &[], &["labels.x", wrong]).await, Err(Code::InvalidArgument), "{wrong}");
    }
    assert_eq!(update(&lab, "nobody", &[], &[]).await, Err(Code::NotFound));
    let after = lab.stat("a").await.unwrap();
    assert_eq!((after.created_at, after.labels), (before.created_at, labels(&[("w", "4")])));
    let time = |at: Option<prost_types::Timestamp>| at.map(|at| (at.seconds, at.nanos));
    assert!(time(after.updated_at) > time(before.updated_at));
}

#[tokio::test]
async fn an_empty_database_lists_nothing() {
    assert_eq!(lab().await.pages(&[]).await, Ok(vec![]));
}

#[tokio::test]
async fn lists_come_in_byte_order_and_in_messages_of_at_most_a_hundred() {
    let lab = lab().await;
    let prepares = (0..230).map(|i| lab.prepare_labelled(Box::leak(format!("k{i}").into()), "", BTreeMap::new()));
    futures::future::try_join_all(prepares).await.unwrap();
    let pages = lab.pages(&[]).await.unwrap();
    assert_eq!(pages.iter().map(Vec::len).collect::<Vec<_>>(), [100, 100, 30]);
    let names = lab.names(&[]).await;
    let mut sorted = names.clone();
    sorted.sort();
    assert_eq!((names.len(), &names), (230, &sorted));
    assert_eq!(lab.names(&["name~=^k22.$"]).await.len(), 10);
}

#[tokio::test]
async fn lists_can_be_filtered_as_containerd_does() {
    let lab = lab().await;
    lab.committed("base", "", "f").await;
    lab.prepare_labelled("a", "base", labels(&[("k", "v")])).await.unwrap();
    lab.view("v", "base").await.unwrap();
    assert_eq!(lab.names(&["kind==committed"]).await, ["base"]);
    assert_eq!(lab.names(&["parent==base"]).await, ["a", "v"]);
    assert_eq!(lab.names(&["parent==base,labels.k==v", "kind==committed"]).await, ["a", "base"]);
    assert_eq!(lab.names(&["kind==nothing"]).await, Vec::<String>::new());
    assert_eq!(lab.pages(&["kind=="]).await, Err(Code::InvalidArgument));
}

#[tokio::test]
async fn usage_is_measured_while_active_and_remembered_after() {
    let lab = lab().await;
    let mount = lab.prepare("a", "").await.unwrap();
    let empty = lab.usage("a").await.unwrap();
    assert_eq!(empty.1, 1);
    std::fs::write(Path::new(&mount.source).join("f"), vec![1; 100_000]).unwrap();
    std::fs::hard_link(Path::new(&mount.source).join("f"), Path::new(&mount.source).join("g")).unwrap();
    let full = lab.usage("a").await.unwrap();
    assert_eq!(full.1, 2, "a hard link is no second file");
    assert!((100_000..200_000).contains(&full.0), "{full:?}");
    lab.commit("c", "a").await.unwrap();
    std::fs::remove_file(Path::new(&mount.source).join("f")).unwrap();
    std::fs::remove_file(Path::new(&mount.source).join("g")).unwrap();
    assert_eq!(lab.usage("c").await, Ok(full));
    lab.view("v", "c").await.unwrap();
    assert_eq!(lab.usage("v").await, Ok((0, 0)));
}

#[tokio::test]
async fn cleanup_removes_what_has_no_record_and_nothing_that_was_never_ours() {
    let root = std::sync::Arc::new(tempfile::tempdir().unwrap());
    let snapshots = root.path().join("root/snapshotter/snapshots");
    for name in ["1/fs", "7/fs", "7_9/fs", "new-123"] {
        std::fs::create_dir_all(snapshots.join(name)).unwrap();
    }
    // The Go snapshotter's database, which names none of these directories.
    let database = bolt::empty();
    let commit = database.commit(&bolt::Bucket::default());
    let mut bytes = vec![0; bolt::METAS];
    for (page, data) in commit.pages.iter().chain([&commit.meta]) {
        let at = usize::try_from(database.offset(*page)).unwrap();
        bytes.resize(bytes.len().max(at + data.len()), 0);
        bytes[at..at + data.len()].copy_from_slice(data);
    }
    std::fs::write(root.path().join("root/snapshotter/metadata.db"), &bytes).unwrap();
    let lab = lab_on(root, |_| {}).await;
    lab.prepare("a", "").await.unwrap();
    lab.prepare("b", "").await.unwrap();
    lab.remove("a").await.unwrap();
    assert_eq!(lab.directories(), ["1", "7", "7_9", "8", "9", "new-123"]);
    lab.cleanup().await.unwrap();
    assert_eq!(lab.directories(), ["1", "7", "7_9", "9", "new-123"]);
    assert_eq!(lab.lazy.removed.lock().unwrap().iter().map(|id| id.0).collect::<Vec<_>>(), [8]);
    assert_eq!(std::fs::read(lab.layout.snapshotter().join("metadata.db")).unwrap(), bytes);
}

#[tokio::test]
async fn without_a_cleanup_directories_go_a_little_later() {
    let root = std::sync::Arc::new(tempfile::tempdir().unwrap());
    let lab = lab_on(root, |options| options.sweep_after = std::time::Duration::from_millis(50)).await;
    lab.prepare("a", "").await.unwrap();
    lab.remove("a").await.unwrap();
    for _ in 0..500 {
        if lab.directories().is_empty() {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    panic!("{:?}", lab.directories());
}

#[tokio::test]
async fn everything_is_there_after_a_restart() {
    let lab = lab().await;
    lab.committed("base", "", "f").await;
    let mount = lab.prepare("a", "base").await.unwrap();
    assert_eq!(lab.prepare_layer("chain", "").await, Err(Code::AlreadyExists));
    let before = lab.pages(&[]).await.unwrap();
    // As a power failure may leave it: the record is there, the link is not, and a directory has no record.
    let link = lab.layout.snapshot_fs(soci::layout::SnapshotId(3));
    std::fs::remove_file(&link).unwrap();
    std::fs::create_dir(&link).unwrap();
    std::fs::create_dir_all(lab.layout.snapshots().join("40/fs")).unwrap();

    let lab = lab.restart().await;
    assert_eq!(lab.pages(&[]).await.unwrap(), before);
    assert_eq!(lab.mounts("a").await.unwrap(), mount);
    assert!(std::fs::read_link(&link).is_ok());
    let lazy: Vec<_> = lab.snapshotter.lazy_layers().unwrap().into_iter().map(|info| info.id).collect();
    assert_eq!(lazy, [soci::layout::SnapshotId(3)]);
    lab.prepare("b", "base").await.unwrap();
    lab.cleanup().await.unwrap();
    assert_eq!(lab.directories(), ["1", "2", "3", "41"]);
}

#[tokio::test]
async fn a_view_of_one_layer_stays_a_view_when_labels_ask_for_more() {
    let lab = lab().await;
    lab.committed("base", "", "f").await;
    let mapped = labels(&[(label::UID_MAPPING, "0:1000:1"), (label::GID_MAPPING, "0:1000:1")]);
    // A copy of the layer with other owners is the custodian's work, and there is none here.
    assert_eq!(lab.prepare_labelled("m", "base", mapped).await, Err(Code::Unknown));
    assert_eq!(lab.names(&["kind==active"]).await, Vec::<String>::new());
    let half = labels(&[(label::UID_MAPPING, "0:1000:1")]);
    lab.prepare_labelled("h", "base", half).await.unwrap();
}

#[tokio::test]
async fn a_request_larger_than_grpc_allows_is_refused() {
    let lab = lab().await;
    let huge = labels(&[("x", &"y".repeat(5 << 20))]);
    assert!(lab.prepare_labelled("a", "", huge).await.is_err());
    assert_eq!(lab.names(&[]).await, Vec::<String>::new());
    lab.prepare("a", "").await.unwrap();
}

#[tokio::test]
async fn a_request_from_outside_any_namespace_is_fine_unless_it_unpacks_a_layer() {
    let lab = lab().await;
    let message = |key: &str, labels| PrepareSnapshotRequest { key: key.into(), labels, ..Default::default() };
    let plain = lab.client.clone().prepare(message("a", BTreeMap::new())).await;
    assert!(plain.is_ok());
    let layer = lab.client.clone().prepare(message("b", layer_labels("chain"))).await.unwrap_err();
    assert_eq!((layer.code(), layer.message()), (Code::Unknown, "context has no namespace attached"));
    assert_eq!(lab.names(&[]).await, ["a"]);
}
