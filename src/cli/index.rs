//! `soci index info`: a SOCI index as indented JSON, its bytes otherwise as they are.

use super::{
    args::{Global, Info},
    output::indent,
    store::{self, StoreError},
};
use crate::oci::Digest;
use serde::Deserialize;
use std::io::{self, Write};

/// Why there was nothing to print.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    #[error(
        "the provided digest is of ztoc not SOCI index. Use \"soci ztoc info\" command to get detailed info of ztoc"
    )]
    Ztoc,
    #[error("{digest} is not a SOCI index but {what}")]
    NotAnIndex { digest: Digest, what: &'static str },
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("failed to write to stdout")]
    Output(#[source] io::Error),
}

/// Runs the command.
pub fn info(args: &Info, global: &Global) -> Result<(), IndexError> {
    let operand = args.operands.first().map(AsRef::as_ref).unwrap_or_default();
    let artifact = store::find(operand, args.layout.as_deref(), global)?;
    if store::soci_index(&artifact.bytes).is_none() {
        match what(&artifact.bytes) {
            None => return Err(IndexError::Ztoc),
            // The Go CLI prints these too, and there is no other command for them here.
            Some("a prefetch artifact") => {}
            Some(what) => return Err(IndexError::NotAnIndex { digest: artifact.digest, what }),
        }
    }
    let mut text = indent(&artifact.bytes);
    text.push(b'\n');
    let mut out = io::stdout().lock();
    out.write_all(&text).and_then(|()| out.flush()).map_err(IndexError::Output)
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
