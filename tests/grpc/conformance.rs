//! What containerd's own conformance suite asks of every snapshotter (U-SN1, U-SN7 to U-SN10).

use super::lab::*;
use soci::grpc::proto::snapshots::Kind;
use tonic::Code;

#[tokio::test]
async fn a_first_snapshot_is_one_writable_bind_mount() {
    let lab = lab().await;
    let mount = lab.prepare("a", "").await.unwrap();
    assert_eq!((mount.r#type.as_str(), mount.source.as_str()), ("bind", lab.fs(1).as_str()));
    assert_eq!((mount.options, mount.target.as_str()), (vec!["rw".to_string(), "rbind".into()], ""));
    assert_eq!(lab.mounts("a").await.unwrap().source, lab.fs(1));
}

#[tokio::test]
async fn a_snapshot_on_a_parent_is_an_overlay_with_work_upper_and_lower_in_this_order() {
    let lab = lab().await;
    lab.committed("one", "", "f1").await;
    lab.committed("two", "one", "f2").await;
    let mount = lab.prepare("a", "two").await.unwrap();
    assert_eq!((mount.r#type.as_str(), mount.source.as_str()), ("overlay", "overlay"));
    let work = lab.fs(3).replace("/fs", "/work");
    let expected =
        [format!("workdir={work}"), format!("upperdir={}", lab.fs(3)), format!("lowerdir={}:{}", lab.fs(2), lab.fs(1))];
    assert_eq!(mount.options, expected);
    assert_eq!(lab.mounts("a").await.unwrap().options, expected);
}

#[tokio::test]
async fn views_are_read_only() {
    let lab = lab().await;
    lab.committed("one", "", "f1").await;
    lab.committed("two", "one", "f2").await;
    let mount = lab.view("v0", "").await.unwrap();
    assert_eq!((mount.source, mount.options), (lab.fs(3), vec!["ro".to_string(), "rbind".into()]));
    let mount = lab.view("v1", "one").await.unwrap();
    assert_eq!((mount.r#type.as_str(), mount.source), ("bind", lab.fs(1)));
    assert_eq!(mount.options, ["ro", "rbind"]);
    let mount = lab.view("v2", "two").await.unwrap();
    assert_eq!(mount.r#type, "overlay");
    assert_eq!(mount.options, [format!("lowerdir={}:{}", lab.fs(2), lab.fs(1))]);
    assert!(!lab.layout.snapshots().join("5/work").exists());
    assert_eq!(lab.commit("n", "v1").await, Err(Code::FailedPrecondition));
}

#[tokio::test]
async fn committed_files_stay_where_they_were() {
    let lab = lab().await;
    lab.committed("one", "", "f1").await;
    assert_eq!(std::fs::read_to_string(format!("{}/f1", lab.fs(1))).unwrap(), "f1");
}

#[tokio::test]
async fn privileged_layers_show_files_changes_and_removals_of_those_below() {
    needs_root();
    let lab = lab().await;
    let mount = lab.prepare("k1", "").await.unwrap();
    {
        let m = Mounted::new(&mount);
        std::fs::create_dir(m.path("dir")).unwrap();
        for name in ["kept", "changed", "removed", "dir/inner"] {
            std::fs::write(m.path(name), "v1").unwrap();
        }
    }
    lab.commit("c1", "k1").await.unwrap();
    let mount = lab.prepare("k2", "c1").await.unwrap();
    {
        let m = Mounted::new(&mount);
        std::fs::write(m.path("changed"), "v2").unwrap();
        std::fs::remove_file(m.path("removed")).unwrap();
        std::fs::remove_dir_all(m.path("dir")).unwrap();
        std::fs::create_dir(m.path("dir")).unwrap();
        std::fs::write(m.path("dir/other"), "v2").unwrap();
        std::fs::rename(m.path("kept"), m.path("moved")).unwrap();
    }
    lab.commit("c2", "k2").await.unwrap();
    for mount in [lab.view("v", "c2").await.unwrap(), lab.prepare("k3", "c2").await.unwrap()] {
        let m = Mounted::new(&mount);
        let found = ["changed", "removed", "dir/inner", "dir/other", "kept", "moved"].map(|name| m.read(name));
        let v = |text: &str| Some(text.to_string());
        assert_eq!(found, [v("v2"), None, None, v("v2"), None, v("v1")]);
        let writable = std::fs::write(m.path("new"), "x").is_ok();
        assert_eq!(writable, mount.options.len() == 3, "a view is read-only");
    }
    let m = Mounted::new(&lab.view("old", "c1").await.unwrap());
    assert_eq!(m.read("changed").as_deref(), Some("v1"), "a committed layer never changes");
    assert!(std::fs::write(m.path("changed"), "x").is_err());
}

#[tokio::test]
async fn privileged_an_upper_directory_belongs_to_the_owner_of_the_one_below() {
    needs_root();
    use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
    let lab = lab().await;
    let mount = lab.prepare("k", "").await.unwrap();
    chown(&mount.source, Some(12), Some(34)).unwrap();
    lab.commit("c", "k").await.unwrap();
    let without_labels = labels(&[(soci::snapshot::label::TARGET, "chain")]);
    let deferred = lab.prepare_labelled("deferred", "c", without_labels).await.unwrap();
    for mount in [lab.prepare("a", "c").await.unwrap(), deferred] {
        let metadata = std::fs::metadata(upper(&mount)).unwrap();
        assert_eq!((metadata.uid(), metadata.gid()), (12, 34));
        assert_eq!(metadata.permissions().mode() & 0o7777, 0o755);
    }
}

#[tokio::test]
async fn each_wrong_request_has_containerds_error() {
    let lab = lab().await;
    lab.committed("base", "", "f").await;
    lab.prepare("active", "base").await.unwrap();
    lab.view("view", "base").await.unwrap();
    let before = lab.names(&[]).await;

    assert_eq!(lab.prepare("active", "base").await, Err(Code::AlreadyExists));
    assert_eq!(lab.prepare("base", "").await, Err(Code::AlreadyExists));
    assert_eq!(lab.view("active", "base").await, Err(Code::AlreadyExists));
    assert_eq!(lab.prepare("x", "nobody").await, Err(Code::NotFound));
    assert_eq!(lab.prepare("x", "active").await, Err(Code::InvalidArgument));
    assert_eq!(lab.view("x", "view").await, Err(Code::InvalidArgument));
    assert_eq!(lab.prepare("", "base").await, Err(Code::InvalidArgument));
    assert_eq!(lab.prepare(&"x".repeat(40_000), "base").await, Err(Code::InvalidArgument));

    assert_eq!(lab.mounts("nobody").await, Err(Code::NotFound));
    assert_eq!(lab.mounts("base").await, Err(Code::FailedPrecondition));
    assert_eq!(lab.stat("nobody").await, Err(Code::NotFound));
    assert_eq!(lab.usage("nobody").await, Err(Code::NotFound));

    assert_eq!(lab.commit("base", "active").await, Err(Code::AlreadyExists));
    assert_eq!(lab.commit("x", "nobody").await, Err(Code::NotFound));
    assert_eq!(lab.commit("x", "view").await, Err(Code::FailedPrecondition));
    assert_eq!(lab.commit("x", "base").await, Err(Code::FailedPrecondition));
    assert_eq!(lab.commit("", "active").await, Err(Code::InvalidArgument));

    assert_eq!(lab.remove("nobody").await, Err(Code::NotFound));
    assert_eq!(lab.remove("base").await, Err(Code::FailedPrecondition));

    assert_eq!(lab.names(&[]).await, before, "and changes nothing");
}

#[tokio::test]
async fn a_snapshot_can_be_removed_when_its_children_are_gone_and_its_name_used_again() {
    let lab = lab().await;
    lab.committed("base", "", "f").await;
    lab.prepare("a", "base").await.unwrap();
    assert_eq!(lab.remove("base").await, Err(Code::FailedPrecondition));
    lab.remove("a").await.unwrap();
    lab.remove("base").await.unwrap();
    assert_eq!(lab.names(&[]).await, Vec::<String>::new());
    lab.committed("base", "", "f").await;
    assert_eq!(lab.directories(), ["1", "2", "3"], "directories go with the cleanup, and numbers never come again");
    lab.cleanup().await.unwrap();
    assert_eq!(lab.directories(), ["3"]);
}

#[tokio::test]
async fn commit_consumes_the_active_snapshot_and_replaces_its_labels() {
    let lab = lab().await;
    lab.prepare_labelled("a", "", labels(&[("x", "1")])).await.unwrap();
    let active = lab.stat("a").await.unwrap();
    assert_eq!((active.kind(), active.parent.as_str()), (Kind::Active, ""));
    assert_eq!(active.labels, labels(&[("x", "1")]));
    lab.commit("c", "a").await.unwrap();
    assert_eq!(lab.stat("a").await, Err(Code::NotFound));
    let committed = lab.stat("c").await.unwrap();
    assert_eq!((committed.kind(), committed.labels.len()), (Kind::Committed, 0));
    assert!(committed.created_at.is_some() && committed.created_at == committed.updated_at);
    assert_eq!(lab.commit("d", "a").await, Err(Code::NotFound));
    lab.view("v", "c").await.unwrap();
    let view = lab.stat("v").await.unwrap();
    assert_eq!((view.kind(), view.parent.as_str()), (Kind::View, "c"));
}

#[tokio::test]
async fn a_hundred_and_twenty_eight_layers_are_one_chain() {
    let lab = lab().await;
    let mut parent = String::new();
    for i in 1..=128 {
        let name = format!("c{i}");
        lab.committed(&name, &parent, "f").await;
        parent = name;
    }
    let mount = lab.prepare("top", &parent).await.unwrap();
    let lower: Vec<&str> = mount.options[2].strip_prefix("lowerdir=").unwrap().split(':').collect();
    assert_eq!((lower.len(), lower[0], lower[127]), (128, lab.fs(128).as_str(), lab.fs(1).as_str()));
}
