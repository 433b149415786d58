//! The store: what survives, what is refused, what is shared.

use super::error::{SnapshotError, StoreError};
use super::model::{BootId, Info, Kind, Labels, Timestamp, Usage, label};
use super::store::{Change, LabelUpdate, Store};
use crate::layout::SnapshotId;
use std::path::Path;
use std::sync::Arc;

const AT: Timestamp = Timestamp { seconds: 1, nanos: 2 };

/// The store on a node that no Go snapshotter was on.
fn open(path: &Path, floor: u32) -> Result<Store, StoreError> {
    Store::open(path, floor, None, || Ok(None), || Ok(()))
}

fn open_in(path: &Path, boot: u128) -> Store {
    Store::open(path, 1, Some(BootId(boot)), || Ok(None), || Ok(())).unwrap()
}

fn active(store: &Store, name: &str, parent: Option<&str>) -> Info {
    let (id, labels) = (store.allocate().unwrap(), Labels::from([("l".into(), name.into())]));
    let (parent, usage) = (parent.map(Into::into), Usage::default());
    Info { id, name: name.into(), parent, kind: Kind::Active, created: AT, updated: AT, labels, usage }
}

async fn committed(store: &Store, name: &str, parent: Option<&str>) -> Info {
    let key = format!("{name}-key");
    store.insert(active(store, &key, parent), Change::Soon).await.unwrap();
    store.commit(&key, name, Labels::new(), Usage { size: 1, inodes: 2 }, AT).await.unwrap();
    store.get(name).unwrap()
}

fn names(store: &Store) -> Vec<String> {
    store.page(None, usize::MAX, &|_| true).unwrap().into_iter().map(|info| info.name).collect()
}

#[tokio::test]
async fn records_survive_a_restart_and_numbers_do_not_come_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metadata.redb");
    let store = open(&path, 1).unwrap();
    let base = committed(&store, "base", None).await;
    let top = committed(&store, "top", Some("base")).await;
    assert_eq!((base.id, top.id), (SnapshotId(1), SnapshotId(2)));
    store.remove("top", Change::Durable).await.unwrap();
    drop(store);
    let store = open(&path, 1).unwrap();
    assert_eq!(names(&store), ["base"]);
    assert_eq!(store.get("base").unwrap(), base);
    assert_eq!(store.allocate().unwrap(), SnapshotId(3));
    drop(store);
    let store = open(&path, 9).unwrap();
    assert_eq!(store.allocate().unwrap(), SnapshotId(9), "a directory has the number 8");
    drop(store);
    let store = open(&path, 1).unwrap();
    assert_eq!(store.allocate().unwrap(), SnapshotId(9), "even after that directory is gone");
}

#[tokio::test]
async fn each_precondition_has_its_error_and_leaves_no_trace() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir.path().join("db"), 1).unwrap();
    committed(&store, "base", None).await;
    store.insert(active(&store, "a", Some("base")), Change::Soon).await.unwrap();
    let before = names(&store);
    let insert = |name: &str, parent: Option<&str>| store.insert(active(&store, name, parent), Change::Soon);
    assert!(matches!(insert("a", None).await, Err(SnapshotError::AlreadyExists(_))));
    assert!(matches!(insert("b", Some("none")).await, Err(SnapshotError::ParentNotFound(_))));
    assert!(matches!(insert("b", Some("a")).await, Err(SnapshotError::ParentNotCommitted(_))));
    let commit = |key: &'static str, name: &'static str| store.commit(key, name, Labels::new(), Usage::default(), AT);
    assert!(matches!(commit("a", "base").await, Err(SnapshotError::AlreadyExists(_))));
    assert!(matches!(commit("none", "n").await, Err(SnapshotError::NotFound(_))));
    assert!(matches!(commit("base", "n").await, Err(SnapshotError::NotActive(_))));
    assert!(matches!(store.remove("base", Change::Durable).await, Err(SnapshotError::HasChildren(_))));
    assert!(matches!(store.remove("none", Change::Durable).await, Err(SnapshotError::NotFound(_))));
    let update = LabelUpdate::Replace(Labels::new());
    assert!(matches!(store.update("none", update, AT).await, Err(SnapshotError::NotFound(_))));
    assert_eq!(names(&store), before);
    store.remove("a", Change::Durable).await.unwrap();
    store.remove("base", Change::Durable).await.unwrap();
    assert_eq!(store.ids().unwrap().len(), 0);
}

#[tokio::test]
async fn chains_are_nearest_first() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir.path().join("db"), 1).unwrap();
    let mut parent = None;
    for name in ["one", "two", "three"] {
        committed(&store, name, parent).await;
        parent = Some(name);
    }
    let ids = |name| store.chain(Some(name)).unwrap().into_iter().map(|link| link.id.0).collect::<Vec<_>>();
    assert_eq!(ids("three"), [3, 2, 1]);
    assert_eq!(store.chain(None).unwrap(), []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_many_commits_under_one_name_exactly_one_wins() {
    let dir = tempfile::tempdir().unwrap();
    let store = Arc::new(open(&dir.path().join("db"), 1).unwrap());
    let mut tasks = Vec::new();
    for i in 0..40 {
        let store = store.clone();
        tasks.push(tokio::spawn(async move {
            let key = format!("k{i}");
            store.insert(active(&store, &key, None), Change::Soon).await.unwrap();
            store.commit(&key, "chain", Labels::new(), Usage::default(), AT).await
        }));
    }
    let mut won = 0;
    for task in tasks {
        match task.await.unwrap() {
            Ok(()) => won += 1,
            Err(SnapshotError::AlreadyExists(name)) => assert_eq!(name, "chain"),
            Err(other) => panic!("{other}"),
        }
    }
    assert_eq!((won, names(&store).len()), (1, 40));
}

#[tokio::test]
async fn changes_that_share_a_transaction_fail_and_succeed_one_by_one() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir.path().join("db"), 1).unwrap();
    let insert = |i: usize| store.insert(active(&store, &format!("k{}", i / 2), None), Change::Durable);
    let results = futures::future::join_all((0..100).map(insert)).await;
    assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 50);
    assert_eq!(names(&store).len(), 50);
}

#[tokio::test]
async fn what_was_answered_is_there_after_a_crash() {
    let dir = tempfile::tempdir().unwrap();
    let (path, crashed) = (dir.path().join("db"), dir.path().join("crashed"));
    let store = open(&path, 1).unwrap();
    committed(&store, "base", None).await;
    store.insert(active(&store, "durable", Some("base")), Change::Durable).await.unwrap();
    store.insert(active(&store, "soon", Some("base")), Change::Soon).await.unwrap();
    // The file as a killed process leaves it: open, nothing flushed on the way out.
    std::fs::copy(&path, &crashed).unwrap();
    let after = open(&crashed, 4).unwrap();
    assert_eq!(names(&after), ["base", "durable"]);
    assert_eq!(after.allocate().unwrap(), SnapshotId(4));
    assert!(matches!(after.remove("base", Change::Durable).await, Err(SnapshotError::HasChildren(_))));
}

#[tokio::test]
async fn a_database_in_use_is_said_to_be_in_use() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("db");
    let _first = open(&path, 1).unwrap();
    assert!(matches!(open(&path, 1), Err(StoreError::InUse { .. })));
}

fn refused(path: &Path) -> StoreError {
    let before = std::fs::read(path).unwrap();
    let error = open(path, 1).err().expect("refused");
    assert!(std::fs::read(path).unwrap() == before, "left as it is");
    error
}

#[tokio::test]
async fn a_newer_schema_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("db");
    drop(open(&path, 1).unwrap());
    let db = redb::Database::open(&path).unwrap();
    let txn = db.begin_write().unwrap();
    txn.open_table(redb::TableDefinition::<&str, u64>::new("facts")).unwrap().insert("schema", 2).unwrap();
    txn.commit().unwrap();
    drop(db);
    let error = open(&path, 1).err().expect("refused");
    assert!(matches!(error, StoreError::Newer { found: 2, known: 1, .. }), "{error}");
    assert!(error.to_string().contains("written by a newer version"), "{error}");
}

#[tokio::test]
async fn a_damaged_database_is_reported_and_never_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("db");
    let store = open(&path, 1).unwrap();
    for i in 0..50 {
        committed(&store, &format!("snapshot-{i}"), None).await;
    }
    drop(store);
    let good = std::fs::read(&path).unwrap();
    let mut smashed = good.clone();
    smashed[..4096].fill(0xaa);
    let mut blank = good.clone();
    blank[4096..].fill(0);
    for bytes in [Vec::new(), b"not a database".to_vec(), vec![0; 65536], smashed, good[..100].to_vec()] {
        std::fs::write(&path, bytes).unwrap();
        let error = refused(&path);
        assert!(matches!(error, StoreError::Damaged { .. } | StoreError::Database(_)), "{error:?}");
    }
    std::fs::write(&path, &blank).unwrap();
    assert!(open(&path, 1).is_err(), "pages of zeros");
    std::fs::write(&path, &good).unwrap();
    assert_eq!(names(&open(&path, 1).unwrap()).len(), 50);
}

#[tokio::test]
async fn what_is_committed_is_marked_with_its_boot_until_it_is_written_or_removed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("db");
    let store = open_in(&path, 7);
    for name in ["a", "b", "c"] {
        committed(&store, name, None).await;
    }
    let lazy = active(&store, "lazy-key", None);
    store.insert(lazy, Change::Soon).await.unwrap();
    let labels = Labels::from([(label::REMOTE.into(), label::REMOTE_VALUE.into())]);
    store.commit("lazy-key", "lazy", labels, Usage::default(), AT).await.unwrap();
    store.insert(active(&store, "container", Some("a")), Change::Durable).await.unwrap();
    let in_7 = |ids: &[u32]| ids.iter().map(|id| (SnapshotId(*id), BootId(7))).collect::<Vec<_>>();
    assert_eq!(store.unwritten().unwrap(), in_7(&[1, 2, 3]));
    store.written(vec![SnapshotId(1)]).await.unwrap();
    store.remove("b", Change::Durable).await.unwrap();
    drop(store);
    let store = open_in(&path, 8);
    assert_eq!(store.unwritten().unwrap(), in_7(&[3]));
    committed(&store, "d", None).await;
    assert_eq!(store.unwritten().unwrap()[1].1, BootId(8));
}

#[tokio::test]
async fn databases_of_before_there_were_marks_have_none_and_get_them() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("db");
    let store = open(&path, 1).unwrap();
    committed(&store, "old", None).await;
    drop(store);
    let db = redb::Database::open(&path).unwrap();
    let txn = db.begin_write().unwrap();
    assert!(txn.delete_table(redb::TableDefinition::<u32, u128>::new("unwritten")).unwrap());
    txn.commit().unwrap();
    drop(db);
    let store = open_in(&path, 1);
    assert_eq!(store.unwritten().unwrap(), []);
    let new = committed(&store, "new", Some("old")).await;
    assert_eq!(store.unwritten().unwrap(), [(new.id, BootId(1))]);
}

#[tokio::test]
async fn a_snapshot_gets_another_number_with_all_that_stands_on_it_and_loses_its_copies() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("db");
    let store = open_in(&path, 1);
    for (name, parent) in [("one", None), ("two", Some("one")), ("three", Some("two"))] {
        committed(&store, name, parent).await;
    }
    store.insert(active(&store, "container", Some("two")), Change::Durable).await.unwrap();
    for name in [".mapped/2/0:1:1", ".mapped/22/0:1:1"] {
        store.insert(Info { kind: Kind::Committed, ..active(&store, name, None) }, Change::Durable).await.unwrap();
    }
    let before = store.get("two").unwrap();
    drop(store);
    let store = open_in(&path, 2);
    let to = store.allocate().unwrap();
    let usage = Usage { size: 70, inodes: 7 };
    store.renumber("two", to, usage).await.unwrap();
    assert_eq!(store.get("two").unwrap(), Info { id: to, usage, ..before });
    assert_eq!(names(&store), [".mapped/22/0:1:1", "container", "one", "three", "two"]);
    let ids = |name| store.chain(Some(name)).unwrap().into_iter().map(|link| link.id.0).collect::<Vec<_>>();
    assert_eq!(ids("three"), [3, to.0, 1]);
    assert!(store.unwritten().unwrap().contains(&(to, BootId(2))));
    assert!(!store.ids().unwrap().contains(&2));
    assert!(matches!(store.renumber("none", to, usage).await, Err(SnapshotError::NotFound(_))));
    // Nobody who stands on something can be forgotten by it, before and after.
    drop(store);
    let store = open_in(&path, 2);
    assert_eq!(store.allocate().unwrap(), SnapshotId(to.0 + 1));
    for (name, has_children) in
        [("two", true), ("one", true), ("three", false), ("container", false), ("two", false), ("one", false)]
    {
        let removed = store.remove(name, Change::Durable).await;
        assert_eq!(matches!(removed, Err(SnapshotError::HasChildren(_))), has_children, "{name}: {removed:?}");
    }
}

#[test]
fn boots_are_named_as_the_kernel_and_systemd_name_them() {
    let boot = BootId(0x0123_4567_89ab_cdef_0123_4567_89ab_cdef);
    assert_eq!(BootId::parse("01234567-89ab-cdef-0123-456789abcdef\n"), Some(boot));
    assert_eq!(BootId::parse("0123456789abcdef0123456789ABCDEF"), Some(boot));
    for text in [
        "",
        "0123456789abcdef0123456789abcde",
        "0123456789abcdef0123456789abcdef0",
        "+123456789abcdef0123456789abcdef",
        "%b",
    ] {
        assert_eq!(BootId::parse(text), None, "{text}");
    }
}
