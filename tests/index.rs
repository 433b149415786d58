//! Which SOCI index an image gets, and how it and its zTOCs come here.

use crate::{
    fault_registry::{Contents, FaultRegistry, Reply, noise},
    registry::settings,
};
use soci::{
    index::{ContentStore, DiscoverySettings, ImageTarget, Indexes, NoIndex},
    layout::Layout,
    oci::{Descriptor, Digest, Index, Manifest, annotation, media_type},
    registry::{HostSettings, Registry},
};
use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

/// A registry with one image, and us.
struct Scene {
    server: FaultRegistry,
    layout: Layout,
    indexes: Indexes,
    image: ImageTarget,
    _root: tempfile::TempDir,
}

/// What the registry holds, for tests that take some of it away.
struct Published {
    contents: Arc<Mutex<Contents>>,
    manifest: Digest,
    index: Vec<u8>,
    ztocs: Vec<Vec<u8>>,
    layers: Vec<Digest>,
    prefetch: Vec<u8>,
}

fn ztoc_of(layer: Digest, bytes: &[u8]) -> Descriptor {
    let mut blob = Descriptor::of(media_type::ZTOC, bytes);
    blob.annotations.insert(annotation::LAYER_DIGEST.into(), layer.to_string());
    blob
}

fn manifest_of(config: &str, layers: Vec<Descriptor>) -> Manifest {
    Manifest {
        schema_version: 2,
        media_type: media_type::OCI_MANIFEST.into(),
        artifact_type: String::new(),
        config: Descriptor::of(config, b"{}"),
        layers,
        subject: None,
        annotations: Default::default(),
    }
}

/// An image of two layers with an index, annotated with it or not.
fn publish(version: &str, annotate: bool) -> Published {
    let mut contents = Contents::default();
    let layers = vec![Digest::of(b"layer 1"), Digest::of(b"layer 2")];
    let ztocs = vec![noise(1000), noise(3 << 20)];
    let prefetch = br#"{"version":"1.0","prefetch_spans":[{"start_span":0,"end_span":3}]}"#.to_vec();
    let mut advice = ztoc_of(layers[0], &prefetch);
    advice.media_type = media_type::SOCI_PREFETCH.into();
    let blobs = layers.iter().zip(&ztocs).map(|(layer, ztoc)| ztoc_of(*layer, ztoc)).chain([advice]).collect();
    for blob in ztocs.iter().chain([&prefetch]) {
        contents.blob(blob);
    }
    // Not canonical: what is kept are the bytes that came.
    let mut index = manifest_of(version, blobs).to_canonical_json();
    index.push(b'\n');
    let digest = contents.manifest(media_type::OCI_MANIFEST, &index);
    let mut image = manifest_of(media_type::OCI_CONFIG, vec![]);
    if annotate {
        image.annotations.insert(annotation::INDEX_DIGEST.into(), digest.to_string());
    }
    let manifest = contents.manifest(media_type::OCI_MANIFEST, &image.to_canonical_json());
    Published { contents: Arc::new(Mutex::new(contents)), manifest, index, ztocs, layers, prefetch }
}

impl Published {
    fn digest(&self) -> Digest {
        Digest::of(&self.index)
    }

    /// Adds the index to the image's referrers.
    fn refer(&self) {
        let mut entry = Descriptor::of(media_type::OCI_MANIFEST, &self.index);
        entry.artifact_type = media_type::SOCI_INDEX_V1.into();
        let list = Index {
            schema_version: 2,
            media_type: media_type::OCI_INDEX.into(),
            artifact_type: String::new(),
            manifests: vec![entry],
            subject: None,
            annotations: Default::default(),
        };
        let tag = format!("sha256-{}", self.manifest.hex());
        self.contents.lock().unwrap().tag(&tag, media_type::OCI_INDEX, &list.to_canonical_json());
    }

    fn scene(&self, discovery: DiscoverySettings) -> Scene {
        let contents = self.contents.clone();
        self.scene_with(discovery, FaultRegistry::start(move |r| contents.lock().unwrap().answer(r)))
    }

    fn scene_with(&self, discovery: DiscoverySettings, server: FaultRegistry) -> Scene {
        let root = tempfile::tempdir().unwrap();
        let layout = Layout::new(root.path());
        let registry = Registry::new(settings(), HostSettings::default(), Default::default()).unwrap();
        let indexes = Indexes::new(registry, ContentStore::soci(&layout).unwrap(), discovery);
        let reference = format!("{}/a/b:latest", server.host()).parse().unwrap();
        let image = ImageTarget { reference, manifest: self.manifest, explicit: None };
        Scene { server, layout, indexes, image, _root: root }
    }
}

const V1: DiscoverySettings =
    DiscoverySettings { v1: true, v2: false, prefetch: false, ztoc_max: 512 << 20, ztocs_max: 4 << 30 };
const BOTH: DiscoverySettings = DiscoverySettings { v2: true, ..V1 };
const V2: DiscoverySettings = DiscoverySettings { v1: false, ..BOTH };
const NEITHER: DiscoverySettings = DiscoverySettings { v1: false, ..V1 };

#[tokio::test]
async fn an_annotated_image_gets_its_index_and_all_ztocs_as_they_were_fetched() {
    let published = publish(media_type::SOCI_INDEX_V2, true);
    let scene = published.scene(V2);
    let index = scene.indexes.get(&scene.image).await.unwrap();
    assert_eq!(index.digest, published.digest());
    for (layer, ztoc) in published.layers.iter().zip(&published.ztocs) {
        let described = index.layers[layer];
        assert_eq!((described.digest, described.size), (Digest::of(ztoc), ztoc.len() as u64));
        assert_eq!(&std::fs::read(scene.indexes.ztoc_path(&described.digest)).unwrap(), ztoc);
    }
    assert_eq!(std::fs::read(scene.layout.content_blob(&index.digest)).unwrap(), published.index);
    assert_eq!(scene.server.count(&Digest::of(&published.prefetch).to_string()), 0, "advice is not asked for");
    let large = Digest::of(&published.ztocs[1]).to_string();
    assert!(scene.server.count(&large) > 1, "a large zTOC comes in several ranges");
    assert_eq!(std::fs::read_dir(scene.layout.content().join("ingest")).unwrap().count(), 0);
}

#[tokio::test]
async fn all_who_ask_at_once_share_one_search_and_later_ones_need_no_registry() {
    let published = publish(media_type::SOCI_INDEX_V2, true);
    let scene = published.scene(V2);
    let leaves = tokio::time::timeout(Duration::from_micros(1), scene.indexes.get(&scene.image)).await;
    assert!(leaves.is_err());
    let many = futures::future::join_all((0..20).map(|_| scene.indexes.get(&scene.image))).await;
    assert!(many.iter().all(Result::is_ok));
    assert_eq!(scene.server.count(&published.digest().to_string()), 1);
    // A new daemon on the same root.
    let registry = Registry::new(settings(), HostSettings::default(), Default::default()).unwrap();
    let again = Indexes::new(registry, ContentStore::soci(&scene.layout).unwrap(), V2);
    let before = scene.server.requests().len();
    again.get(&scene.image).await.unwrap();
    assert_eq!(scene.server.requests().len(), before);
}

#[tokio::test]
async fn a_named_index_is_used_whatever_is_enabled() {
    let published = publish(media_type::SOCI_INDEX_V1, false);
    let scene = published.scene(NEITHER);
    assert_eq!(scene.indexes.get(&scene.image).await, Err(NoIndex::Disabled));
    let named = |text: &str| ImageTarget { explicit: Some(text.into()), ..scene.image.clone() };
    assert_eq!(scene.indexes.get(&named("")).await, Err(NoIndex::Disabled), "an empty label names none");
    assert!(matches!(scene.indexes.get(&named("sha256:1")).await, Err(NoIndex::InvalidExplicit(_))));
    let index = scene.indexes.get(&named(&published.digest().to_string())).await.unwrap();
    assert_eq!(index.layers.len(), 2);
}

#[tokio::test]
async fn an_image_without_annotation_is_looked_up_among_referrers_only_if_that_is_enabled() {
    let published = publish(media_type::SOCI_INDEX_V1, false);
    published.refer();
    let scene = published.scene(V2);
    assert_eq!(scene.indexes.get(&scene.image).await, Err(NoIndex::NotFound));
    for settings in [V1, BOTH] {
        let scene = published.scene(settings);
        assert_eq!(scene.indexes.get(&scene.image).await.unwrap().digest, published.digest());
        assert_eq!(scene.server.count(&format!("/manifests/{}", published.manifest)), usize::from(settings.v2));
    }
}

#[tokio::test]
async fn an_index_that_is_named_but_missing_is_not_replaced_by_another() {
    let published = publish(media_type::SOCI_INDEX_V2, false);
    published.refer();
    let mut image = manifest_of(media_type::OCI_CONFIG, vec![]);
    image.annotations.insert(annotation::INDEX_DIGEST.into(), Digest::of(b"gone").to_string());
    let manifest = published.contents.lock().unwrap().manifest(media_type::OCI_MANIFEST, &image.to_canonical_json());
    let scene = published.scene(BOTH);
    let dangling = ImageTarget { manifest, ..scene.image.clone() };
    assert!(matches!(scene.indexes.get(&dangling).await, Err(NoIndex::Index { .. })));
    let unknown = ImageTarget { manifest: Digest::of(b"no image"), ..scene.image.clone() };
    assert!(matches!(scene.indexes.get(&unknown).await, Err(NoIndex::Discovery(_))));
    assert_eq!(scene.server.count("/referrers/"), 0);
}

#[tokio::test]
async fn a_failure_is_believed_for_a_second_and_an_index_pushed_later_is_seen() {
    let published = publish(media_type::SOCI_INDEX_V1, false);
    let scene = published.scene(V1);
    for _ in 0..10 {
        assert_eq!(scene.indexes.get(&scene.image).await, Err(NoIndex::NotFound));
    }
    assert_eq!(scene.server.count("/referrers/"), 1);
    published.refer();
    tokio::time::sleep(Duration::from_millis(1050)).await;
    assert_eq!(scene.indexes.get(&scene.image).await.unwrap().digest, published.digest());
}

#[tokio::test]
async fn ztocs_that_break_off_are_taken_up_and_wrong_ones_fetched_once_more() {
    let published = publish(media_type::SOCI_INDEX_V2, true);
    let contents = published.contents.clone();
    let (broken, corrupted) = (AtomicBool::new(false), AtomicBool::new(false));
    let corrupt_path = Digest::of(&published.ztocs[0]).to_string();
    let server = FaultRegistry::start(move |r| {
        let reply = contents.lock().unwrap().answer(r);
        match r.range() {
            Some((0, 1000)) if r.path.contains(&corrupt_path) && !corrupted.swap(true, Ordering::SeqCst) => {
                Reply::blob(r, &[0; 1000])
            }
            Some((start, _)) if start > 0 && !broken.swap(true, Ordering::SeqCst) => reply.reset_after(300_000),
            _ => reply,
        }
    });
    let scene = published.scene_with(V2, server);
    let index = scene.indexes.get(&scene.image).await.unwrap();
    for (layer, ztoc) in published.layers.iter().zip(&published.ztocs) {
        assert_eq!(&std::fs::read(scene.indexes.ztoc_path(&index.layers[layer].digest)).unwrap(), ztoc);
    }
}

#[tokio::test]
async fn a_registry_without_ranges_gives_ztocs_too() {
    let published = publish(media_type::SOCI_INDEX_V2, true);
    let contents = published.contents.clone();
    let server = FaultRegistry::start(move |r| {
        let mut whole = r.clone();
        whole.headers.remove("range");
        contents.lock().unwrap().answer(&whole)
    });
    let scene = published.scene_with(V2, server);
    scene.indexes.get(&scene.image).await.unwrap();
}

#[tokio::test]
async fn one_ztoc_that_cannot_be_had_fails_the_index() {
    let published = publish(media_type::SOCI_INDEX_V2, true);
    let contents = published.contents.clone();
    let missing = Digest::of(&published.ztocs[0]);
    let server = FaultRegistry::start(move |r| match r.path.contains(&missing.to_string()) {
        true => Reply::new(404),
        false => contents.lock().unwrap().answer(r),
    });
    let scene = published.scene_with(V2, server);
    match scene.indexes.get(&scene.image).await {
        Err(NoIndex::Blob { blob, .. }) => assert_eq!(blob, missing),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_torn_ztoc_on_disk_is_fetched_again() {
    let published = publish(media_type::SOCI_INDEX_V2, true);
    let scene = published.scene(V2);
    let path = scene.indexes.ztoc_path(&Digest::of(&published.ztocs[0]));
    std::fs::write(&path, [0; 1000]).unwrap();
    scene.indexes.get(&scene.image).await.unwrap();
    assert_eq!(std::fs::read(path).unwrap(), published.ztocs[0]);
}

#[tokio::test]
async fn advice_is_fetched_when_it_is_wanted_and_may_be_missing() {
    let published = publish(media_type::SOCI_INDEX_V2, true);
    let settings = DiscoverySettings { prefetch: true, ..V2 };
    let scene = published.scene(settings);
    let index = scene.indexes.get(&scene.image).await.unwrap();
    let advice = scene.indexes.prefetch(&index, &published.layers[0]).await.unwrap();
    assert_eq!(advice.ranges(2).collect::<Vec<_>>(), [0..=2]);
    assert!(scene.indexes.prefetch(&index, &published.layers[1]).await.is_none());
    let contents = published.contents.clone();
    let missing = Digest::of(&published.prefetch).to_string();
    let server = FaultRegistry::start(move |r| match r.path.contains(&missing) {
        true => Reply::new(404),
        false => contents.lock().unwrap().answer(r),
    });
    let scene = published.scene_with(settings, server);
    let index = scene.indexes.get(&scene.image).await.unwrap();
    assert!(index.prefetch.is_empty() && index.layers.len() == 2);
}

#[tokio::test]
async fn what_is_no_index_is_not_kept() {
    let published = publish(media_type::OCI_CONFIG, true);
    let scene = published.scene(V2);
    assert!(matches!(scene.indexes.get(&scene.image).await, Err(NoIndex::Invalid { .. })));
    assert!(!scene.layout.content_blob(&published.digest()).exists());
}
