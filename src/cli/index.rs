//! `soci index`: lists, shows and removes SOCI indexes.
//!
//! Where we deviate from the Go CLI: `remove` also takes the label off the image record that kept the index, so that containerd does
//! not wait for a blob that is gone.

use super::{
    args::{Global, IndexList, IndexRemove, Info},
    artifacts::{ArtifactsError, Kind, Row},
    blobs::BlobError,
    containerd::{REFERS, Session, SessionError, Store},
    create,
    indexing::{IndexingError, source},
    interrupt::Stopped,
    output::indent,
    store::{self, StoreError},
    table::{ago, head, table},
    values::{self, BadPlatform},
};
use crate::{
    grpc::containerd::{ContainerdError, Image},
    oci::{Digest, Platform, media_type},
};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    io::{self, Write},
};

/// Why there was nothing to print or to remove.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    #[error(
        "the provided digest is of ztoc not SOCI index. Use \"soci ztoc info\" command to get detailed info of ztoc"
    )]
    Ztoc,
    #[error("{digest} is not a SOCI index but {what}")]
    NotAnIndex { digest: Digest, what: &'static str },
    #[error("please provide either index digests or image ref, but not both")]
    Both,
    #[error("invalid checksum digest format: {0:?} is not a digest (sha256: and 64 hexadecimal digits)")]
    InvalidDigest(String),
    #[error("the index of the digest {0} doesn't exist (`soci index list` shows those there are)")]
    Unknown(Digest),
    #[error("the digest {0} does not correspond to an index")]
    NotRecordedAsIndex(Digest),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error(transparent)]
    Artifacts(#[from] ArtifactsError),
    #[error(transparent)]
    Containerd(#[from] ContainerdError),
    #[error(transparent)]
    Blob(#[from] BlobError),
    #[error(transparent)]
    Image(#[from] IndexingError),
    #[error(transparent)]
    Platform(#[from] BadPlatform),
    #[error("failed to write to stdout")]
    Output(#[source] io::Error),
    #[error(transparent)]
    Stopped(#[from] Stopped),
}

/// `soci index info`.
pub fn info(args: &Info, global: &Global) -> Result<(), IndexError> {
    let operand = args.operands.first().map(AsRef::as_ref).unwrap_or_default();
    let artifact = store::find(operand, args.layout.as_deref(), global)?;
    if store::soci_index(&artifact.bytes).is_none() {
        match what(&artifact.bytes) {
            None => return Err(IndexError::Ztoc),
            // The Go CLI prints these too.
            Some("a prefetch artifact") => {}
            Some(what) => return Err(IndexError::NotAnIndex { digest: artifact.digest, what }),
        }
    }
    let mut text = indent(&artifact.bytes);
    text.push(b'\n');
    print(&text)
}

fn print(text: &[u8]) -> Result<(), IndexError> {
    let mut out = io::stdout().lock();
    out.write_all(text).and_then(|()| out.flush()).map_err(IndexError::Output)
}

/// What a blob is, if it is not a zTOC.
fn what(bytes: &[u8]) -> Option<&'static str> {
    #[derive(Deserialize)]
    struct Shape {
        prefetch_spans: Option<serde::de::IgnoredAny>,
        manifests: Option<serde::de::IgnoredAny>,
        layers: Option<serde::de::IgnoredAny>,
        rootfs: Option<serde::de::IgnoredAny>,
    }
    if crate::ztoc::Ztoc::parse(bytes, &Default::default()).is_ok() {
        return None;
    }
    Some(match serde_json::from_slice::<Shape>(bytes) {
        Err(_) => "something else",
        Ok(Shape { prefetch_spans: Some(_), .. }) => "a prefetch artifact",
        Ok(Shape { manifests: Some(_), .. }) => "an image index",
        Ok(Shape { layers: Some(_), .. }) => "an image manifest",
        Ok(Shape { rootfs: Some(_), .. }) => "an image configuration",
        Ok(_) => "a JSON document",
    })
}

/// Digests of the manifests of an image: of the platforms named, else of all that are there.
pub fn manifests_of(session: &Session, image: &Image, platforms: &[Platform]) -> Result<BTreeSet<Digest>, IndexError> {
    let image = source::of_target(session, &image.target)?;
    if !platforms.is_empty() {
        return Ok(create::manifests(&image, platforms)?.into_iter().map(|(_, digest)| digest).collect());
    }
    let entries = image.base.manifests.iter().zip(&image.kinds);
    let present = entries.filter(|(_, kind)| matches!(kind, source::Kind::Image(_)));
    Ok(present.map(|(entry, _)| entry.digest).collect())
}

/// `soci index list`.
pub fn list(args: &IndexList, global: &Global) -> Result<(), IndexError> {
    let platforms = args.platform.iter().map(|p| values::platform(p.trim())).collect::<Result<Vec<_>, _>>()?;
    let session = Session::open(global)?;
    let images = session.remote.wait(session.containerd.all_images())??;
    let manifests = match args.r#ref.as_deref().filter(|name| !name.is_empty()) {
        Some(name) => Some(manifests_of(&session, &session.image(name)?, &platforms)?),
        None => None,
    };
    let wanted = |row: &Row| match &manifests {
        Some(manifests) => row.describes.is_some_and(|digest| manifests.contains(&digest)),
        None => {
            let of = values::platform(&row.platform);
            platforms.is_empty() || of.is_ok_and(|of| platforms.iter().any(|p| p.matches(&of)))
        }
    };
    let rows = session.artifacts.rows()?;
    let mut found: Vec<(Digest, Row)> = rows.of_kind(Kind::Index).filter(|(_, row)| wanted(row)).collect();
    found.sort_by_key(|(_, row)| std::cmp::Reverse(row.created_at));
    if args.json {
        return print(&json(&found, &images));
    }
    if args.quiet {
        return print(found.iter().map(|(digest, _)| format!("{digest}\n")).collect::<String>().as_bytes());
    }
    let now = jiff::Timestamp::now();
    let names = ["DIGEST", "SIZE", "IMAGE REF", "PLATFORM", "MEDIA TYPE", "MANIFEST VERSION", "CREATED"];
    let mut lines = vec![head(names)];
    for (digest, row) in &found {
        let mut names: Vec<&str> = names_of(row, &images);
        if names.is_empty() {
            names.push("");
        }
        for name in names {
            lines.push(vec![
                digest.to_string(),
                row.size.to_string(),
                name.to_owned(),
                row.platform.clone(),
                row.media_type.clone(),
                version(row).to_owned(),
                ago(row.created_at, now),
            ]);
        }
    }
    print(table(&lines).as_bytes())
}

/// The images that an index was made for, as far as they still are what they were.
fn names_of<'a>(row: &Row, images: &'a [Image]) -> Vec<&'a str> {
    let is_its = |image: &&Image| Some(image.target.digest) == row.image;
    images.iter().filter(is_its).map(|image| image.name.as_str()).collect()
}

fn version(row: &Row) -> &'static str {
    match row.artifact_type.as_str() {
        media_type::SOCI_INDEX_V1 => "v1",
        media_type::SOCI_INDEX_V2 => "v2",
        _ => "",
    }
}

fn json(found: &[(Digest, Row)], images: &[Image]) -> Vec<u8> {
    #[derive(Serialize)]
    struct Entry<'a> {
        digest: Digest,
        size: u64,
        images: Vec<&'a str>,
        platform: &'a str,
        media_type: &'a str,
        version: &'static str,
        manifest: Option<Digest>,
        image_digest: Option<Digest>,
        created_at: Option<String>,
    }
    let entries: Vec<Entry<'_>> = found
        .iter()
        .map(|(digest, row)| Entry {
            digest: *digest,
            size: row.size,
            images: names_of(row, images),
            platform: &row.platform,
            media_type: &row.media_type,
            version: version(row),
            manifest: row.describes,
            image_digest: row.image,
            created_at: row.created_at.map(|at| at.to_string()),
        })
        .collect();
    let mut bytes = serde_json::to_vec_pretty(&entries).unwrap_or_default();
    bytes.push(b'\n');
    bytes
}

/// `soci index remove`.
pub fn remove(args: &IndexRemove, global: &Global) -> Result<(), IndexError> {
    let digests = args.operands.iter().filter(|text| !text.is_empty());
    let image = args.r#ref.as_deref().filter(|name| !name.is_empty());
    if image.is_some() && !args.operands.is_empty() {
        return Err(IndexError::Both);
    }
    if image.is_none() && args.operands.is_empty() {
        return Ok(());
    }
    let session = Session::open(global)?;
    match image {
        Some(name) => {
            let target = session.image(name)?.target.digest;
            let rows = session.artifacts.rows()?;
            let its: Vec<Digest> = rows
                .of_kind(Kind::Index)
                .filter(|(_, row)| row.image == Some(target))
                .map(|(digest, _)| digest)
                .collect();
            its.into_iter().try_for_each(|digest| remove_one(&session, digest))
        }
        None => {
            for text in digests {
                let digest = text.parse().map_err(|_| IndexError::InvalidDigest(text.clone()))?;
                remove_one(&session, digest)?;
            }
            Ok(())
        }
    }
}

fn remove_one(session: &Session, digest: Digest) -> Result<(), IndexError> {
    session.artifacts.change(|rows| match rows.get(digest) {
        None => Err(IndexError::Unknown(digest)),
        Some(row) if row.kind != Kind::Index => Err(IndexError::NotRecordedAsIndex(digest)),
        Some(_) => {
            rows.remove(digest);
            Ok(())
        }
    })??;
    if let Store::Containerd = session.store {
        let text = digest.to_string();
        for image in session.remote.wait(session.containerd.all_images())?? {
            let keeps = |(key, value): &(&String, &String)| key.starts_with(REFERS) && **value == text;
            let labels: BTreeMap<String, String> =
                image.labels.iter().filter(keeps).map(|(key, _)| (key.clone(), String::new())).collect();
            if !labels.is_empty() {
                session.remote.wait(session.containerd.label_image(&image, &labels))??;
            }
        }
        session.remote.wait(session.containerd.delete(digest))??;
    }
    Ok(())
}
