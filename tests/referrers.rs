//! Who refers to a manifest, as registries of different ages tell it.

use crate::{
    fault_registry::{Contents, FaultRegistry, Reply},
    registry::settings,
};
use soci::{
    oci::{Descriptor, Digest, Index, media_type},
    registry::{HostSettings, Mirror, Registry, Repository},
};
use std::collections::HashMap;

fn subject() -> Digest {
    Digest::of(b"an image")
}

fn entry(name: &str, artifact_type: &str) -> Descriptor {
    let mut entry = Descriptor::of(media_type::OCI_MANIFEST, name.as_bytes());
    entry.artifact_type = artifact_type.into();
    entry
}

fn list(entries: &[Descriptor]) -> Vec<u8> {
    let index = Index {
        schema_version: 2,
        media_type: media_type::OCI_INDEX.into(),
        artifact_type: String::new(),
        manifests: entries.to_vec(),
        subject: None,
        annotations: Default::default(),
    };
    index.to_canonical_json()
}

fn repository(server: &FaultRegistry, mirror: Option<&FaultRegistry>) -> Repository {
    let mirrors = mirror.map(|m| vec![Mirror { host: m.host(), ..Mirror::default() }]).unwrap_or_default();
    let hosts = HostSettings { mirrors: HashMap::from([(server.host(), mirrors)]), ..HostSettings::default() };
    let registry = Registry::new(settings(), hosts, Default::default()).unwrap();
    registry.repository(&format!("{}/a/b", server.host()).parse().unwrap()).unwrap()
}

async fn found(server: &FaultRegistry) -> Vec<Descriptor> {
    repository(server, None).referrers(subject(), media_type::SOCI_INDEX_V1).await.unwrap()
}

#[tokio::test]
async fn the_api_is_read_through_all_pages_and_filtered_here_too() {
    let (ours, other) = (entry("a", media_type::SOCI_INDEX_V1), entry("b", "text/plain"));
    let second = entry("c", media_type::SOCI_INDEX_V1);
    let (one, two) = (list(&[other, ours.clone()]), list(std::slice::from_ref(&second)));
    let server = FaultRegistry::start(move |r| match r.path.contains("page=2") {
        false => Reply::manifest(media_type::OCI_INDEX, &one)
            .header("Link", format!("</v2/a/b/referrers/{}?page=2>; rel=\"next\"", subject())),
        true => Reply::manifest(media_type::OCI_INDEX, &two),
    });
    assert_eq!(found(&server).await, [ours, second]);
    let first = &server.requests()[0].path;
    let expected = "?artifactType=application%2Fvnd.amazon.soci.index.v1%2Bjson";
    assert_eq!(first, &format!("/v2/a/b/referrers/{}{expected}", subject()));
}

#[tokio::test]
async fn pages_elsewhere_or_without_end_are_not_followed() {
    let stranger = FaultRegistry::start(|_| Reply::new(500));
    let one = list(&[entry("a", media_type::SOCI_INDEX_V1)]);
    for next in [stranger.url("/v2/a/b/referrers/x"), format!("/v2/a/b/referrers/{}?again", subject())] {
        let one = one.clone();
        let server = FaultRegistry::start(move |_| {
            Reply::manifest(media_type::OCI_INDEX, &one).header("Link", format!("<{next}>; rel=\"next\""))
        });
        assert!(!found(&server).await.is_empty());
        assert!(server.requests().len() <= 32);
    }
    assert!(stranger.requests().is_empty());
}

#[tokio::test]
async fn older_registries_are_asked_by_tag() {
    let ours = entry("a", media_type::SOCI_INDEX_V1);
    let mut contents = Contents::default();
    let tag = format!("sha256-{}", subject().hex());
    contents.tag(&tag, media_type::OCI_INDEX, &list(&[entry("b", "text/plain"), ours.clone()]));
    let no_api: [fn() -> Reply; 4] = [
        || Reply::new(404),
        || Reply::new(400),
        || Reply::new(405),
        || Reply::new(200).header("Content-Type", "text/html").body("<html>"),
    ];
    for reply in no_api {
        let contents = contents.clone();
        let server =
            FaultRegistry::start(move |r| if r.path.contains("/referrers/") { reply() } else { contents.answer(r) });
        assert_eq!(found(&server).await, std::slice::from_ref(&ours));
    }
}

#[tokio::test]
async fn no_referrers_is_an_answer_and_trouble_is_not() {
    let nobody = FaultRegistry::start(|_| Reply::new(404));
    assert_eq!(found(&nobody).await, []);
    let empty = FaultRegistry::start(|_| Reply::manifest(media_type::OCI_INDEX, &list(&[])));
    assert_eq!(found(&empty).await, []);
    for trouble in [Reply::new(503), Reply::new(403), Reply::manifest(media_type::OCI_INDEX, b"nonsense")] {
        let server = FaultRegistry::start(move |_| trouble.clone());
        let result = repository(&server, None).referrers(subject(), media_type::SOCI_INDEX_V1).await;
        assert!(result.is_err());
    }
}

#[tokio::test]
async fn a_mirror_that_knows_of_none_does_not_speak_for_the_registry() {
    let ours = entry("a", media_type::SOCI_INDEX_V1);
    let one = list(std::slice::from_ref(&ours));
    let server = FaultRegistry::start(move |_| Reply::manifest(media_type::OCI_INDEX, &one));
    let mirror = FaultRegistry::start(|_| Reply::manifest(media_type::OCI_INDEX, &list(&[])));
    let repository = repository(&server, Some(&mirror));
    assert_eq!(repository.referrers(subject(), media_type::SOCI_INDEX_V1).await.unwrap(), [ours]);
}
