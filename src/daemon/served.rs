//! A layer as one snapshot shows it: what was found out about it counts for the images that it contradicts.
//!
//! A wrong index ends the reads of all snapshots of the layer, which [`Layer`] sees to. Where only an image's configuration names another diff
//! ID, other images with the same layer are right: its own snapshot alone is closed.

use crate::{
    fs::{LayerData, ReadError},
    layers::{Layer, Verdict},
    oci::{Chain, Digest},
};
use bytes::Bytes;
use futures::future::BoxFuture;
use std::{
    ops::Range,
    sync::{Arc, OnceLock},
};

pub struct Served {
    pub layer: Arc<Layer>,
    /// What the snapshot's image says of it.
    chain: Option<Chain>,
    /// What is wrong; known once the layer has a verdict.
    trouble: OnceLock<Option<String>>,
}

impl Served {
    pub fn new(layer: Arc<Layer>, chain: Option<Chain>) -> Arc<Served> {
        Arc::new(Served { layer, chain, trouble: OnceLock::new() })
    }

    /// Why nothing of it may be read.
    pub fn trouble(&self) -> Option<&str> {
        let verdict = self.layer.verdict()?;
        self.trouble.get_or_init(|| trouble(verdict, self.chain.as_ref())).as_deref()
    }
}

/// What is wrong with showing a layer that turned out like that to an image that says so of it. Pure.
pub fn trouble(verdict: &Verdict, chain: Option<&Chain>) -> Option<String> {
    match (verdict, chain) {
        (Verdict::Contradicts { reason }, _) => Some(reason.clone()),
        (Verdict::Genuine { diff_id }, Some(chain)) if !chain.holds(diff_id) => {
            Some(format!("the image's configuration gives the layer another diff ID than {diff_id}, which it has"))
        }
        (Verdict::Genuine { .. }, _) => None,
    }
}

impl LayerData for Served {
    fn try_read(&self, range: Range<u64>) -> Option<Bytes> {
        match self.trouble() {
            Some(_) => None,
            None => self.layer.try_read(range),
        }
    }

    fn read(&self, range: Range<u64>) -> BoxFuture<'_, Result<Bytes, ReadError>> {
        match self.trouble() {
            Some(reason) => {
                let error = ReadError::Condemned { reason: reason.to_owned() };
                Box::pin(async move { Err(error) })
            }
            None => self.layer.read(range),
        }
    }

    fn in_use(&self, file: Range<u64>, touched: u64) {
        self.layer.in_use(file, touched);
    }
    fn fetched(&self) -> u64 {
        self.layer.fetched()
    }
    fn compressed_size(&self) -> u64 {
        self.layer.compressed_size()
    }
    fn digest(&self) -> Digest {
        self.layer.digest()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_that_names_another_diff_id_is_closed_and_the_others_with_that_layer_are_not() {
        let (diff_id, other) = (Digest::of(b"content"), Digest::of(b"other"));
        let says = |id: Digest| Chain::of_names(None, &id.to_string());
        let genuine = Verdict::Genuine { diff_id };
        assert_eq!(trouble(&genuine, says(diff_id).as_ref()), None);
        assert_eq!(trouble(&genuine, None), None);
        assert!(trouble(&genuine, says(other).as_ref()).unwrap().contains(&diff_id.to_string()));
        let wrong = Verdict::Contradicts { reason: "it lies".into() };
        assert_eq!(trouble(&wrong, says(diff_id).as_ref()).as_deref(), Some("it lies"));
    }
}
