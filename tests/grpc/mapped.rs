//! Containers in a user namespace (runtime.md 3.7): their mounts are of layers with other owners, which nobody else gets to see.

use super::lab::*;
use soci::grpc::proto::snapshots::{Info, UpdateSnapshotRequest};
use soci::snapshot::label;
use std::collections::BTreeMap;
use tonic::Code;

const UIDS: &str = "0:12345:1000,1000:22222:1";
const GIDS: &str = "0:12345:1001";

fn in_namespace() -> BTreeMap<String, String> {
    labels(&[(label::UID_MAPPING, UIDS), (label::GID_MAPPING, GIDS)])
}

async fn with_two_lazy_layers() -> Lab {
    let lab = lab().await;
    assert_eq!(lab.prepare_layer("one", "").await, Err(Code::AlreadyExists));
    assert_eq!(lab.prepare_layer("two", "one").await, Err(Code::AlreadyExists));
    lab
}

#[tokio::test]
async fn privileged_a_container_in_a_user_namespace_stands_on_mapped_layers() {
    needs_root();
    let lab = with_two_lazy_layers().await;
    let mount = lab.prepare_labelled("container", "two", in_namespace()).await.unwrap();
    assert_eq!(mount.options[2], format!("lowerdir={}:{}", lab.fs(3), lab.fs(4)), "{mount:?}");
    assert_eq!(std::fs::read_to_string(format!("{}/{LAZY_FILE}", lab.fs(3))).unwrap(), format!("{UIDS};{GIDS}"));
    assert_eq!(lab.mounts("container").await.unwrap(), mount);
    // containerd would remove what it does not know.
    assert_eq!(lab.names(&[]).await, ["container", "one", "two"]);
    assert_eq!(lab.stat("container").await.unwrap().labels, in_namespace());

    // The next container shares them; one with other mappings, or none, does not.
    let second = lab.prepare_labelled("second", "two", in_namespace()).await.unwrap();
    assert_eq!(second.options[2], mount.options[2]);
    let other = labels(&[(label::UID_MAPPING, "0:1:1"), (label::GID_MAPPING, "0:1:1")]);
    assert_ne!(lab.prepare_labelled("other", "two", other).await.unwrap().options[2], mount.options[2]);
    let plain = lab.prepare("plain", "two").await.unwrap();
    assert_eq!(plain.options[2], format!("lowerdir={}:{}", lab.fs(2), lab.fs(1)));

    // They are there after a restart.
    let lab = lab.restart().await;
    assert_eq!(lab.mounts("container").await.unwrap(), mount);
}

#[tokio::test]
async fn privileged_mapped_layers_go_with_the_last_container_that_uses_them() {
    needs_root();
    let lab = with_two_lazy_layers().await;
    for key in ["a", "b"] {
        lab.prepare_labelled(key, "two", in_namespace()).await.unwrap();
    }
    lab.remove("a").await.unwrap();
    lab.cleanup().await.unwrap();
    assert_eq!(lab.directories(), ["1", "2", "3", "4", "6"]);
    lab.mounts("b").await.unwrap();
    lab.remove("b").await.unwrap();
    lab.cleanup().await.unwrap();
    assert_eq!(lab.directories(), ["1", "2"]);
    lab.remove("two").await.unwrap();
    // And the next one makes them anew.
    lab.prepare_labelled("c", "one", in_namespace()).await.unwrap();
    lab.mounts("c").await.unwrap();
}

#[tokio::test]
async fn mappings_that_are_none_are_refused_and_leave_nothing() {
    let lab = with_two_lazy_layers().await;
    for (uids, gids) in [("", GIDS), (UIDS, "0:1"), ("0:5:0", GIDS), ("0:5:10,3:50:1", GIDS), (UIDS, "0:4294967295:1")]
    {
        let labels = labels(&[(label::UID_MAPPING, uids), (label::GID_MAPPING, gids)]);
        assert_eq!(lab.prepare_labelled("c", "two", labels).await, Err(Code::InvalidArgument), "{uids} {gids}");
    }
    // A namespace without a root has nobody to own the container's own directory.
    let rootless = labels(&[(label::UID_MAPPING, "5:5:1"), (label::GID_MAPPING, "5:5:1")]);
    assert_eq!(lab.prepare_labelled("c", "", rootless).await, Err(Code::Unknown));
    // One label alone asks for nothing.
    let half = labels(&[(label::UID_MAPPING, UIDS)]);
    assert_eq!(
        lab.prepare_labelled("half", "two", half).await.unwrap().options[2],
        format!("lowerdir={}:{}", lab.fs(2), lab.fs(1))
    );
    lab.remove("half").await.unwrap();
    lab.cleanup().await.unwrap();
    assert_eq!(lab.directories(), ["1", "2"]);
    assert_eq!(lab.prepare(".mapped/1/0:0:1;0:0:1", "two").await, Err(Code::InvalidArgument), "names of ours");
}

#[tokio::test]
async fn privileged_an_update_of_labels_does_not_take_a_containers_layers_away() {
    needs_root();
    let lab = with_two_lazy_layers().await;
    let mount = lab.prepare_labelled("container", "two", in_namespace()).await.unwrap();
    let info = Info { name: "container".into(), labels: labels(&[("mine", "1")]), ..Info::default() };
    let message = UpdateSnapshotRequest { info: Some(info), ..UpdateSnapshotRequest::default() };
    lab.client.clone().update(request(message)).await.unwrap();
    let now = lab.stat("container").await.unwrap().labels;
    assert_eq!(now.get("mine").map(String::as_str), Some("1"));
    lab.cleanup().await.unwrap();
    assert_eq!(lab.mounts("container").await.unwrap(), mount);
    assert_eq!(lab.directories(), ["1", "2", "3", "4", "5"]);
}
