//! Chain ids: what containerd calls an unpacked layer on top of others.

use super::Digest;
use serde::{Deserialize, Serialize};

/// What an image says of one of its layers: the chain id below it, and the one with it. Both come from the image's configuration, so they say
/// which diff ID the layer must have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chain {
    /// None at the bottom.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    below: Option<Digest>,
    id: Digest,
}

impl Chain {
    /// From the names that snapshots have: `sha256:<hex>`, with or without containerd's `<namespace>/<number>/` before it. None if one of
    /// them is something else.
    pub fn of_names(below: Option<&str>, id: &str) -> Option<Chain> {
        let digest = |name: &str| name.rsplit('/').next()?.parse().ok();
        let below = match below {
            Some(name) => Some(digest(name)?),
            None => None,
        };
        Some(Chain { below, id: digest(id)? })
    }

    /// Whether the layer with that diff ID is the one the image means.
    pub fn holds(&self, diff_id: &Digest) -> bool {
        let id = match self.below {
            None => *diff_id,
            Some(below) => Digest::of(format!("{below} {diff_id}").as_bytes()),
        };
        id == self.id
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_are_what_the_image_specification_says() {
        let (first, second) = (Digest::of(b"first"), Digest::of(b"second"));
        let both = Digest::of(format!("{first} {second}").as_bytes());
        let bottom = Chain::of_names(None, &first.to_string()).unwrap();
        assert!(bottom.holds(&first) && !bottom.holds(&second));
        let above = Chain::of_names(Some(&format!("k8s.io/12/{first}")), &both.to_string()).unwrap();
        assert!(above.holds(&second) && !above.holds(&first));
        assert_eq!(Chain::of_names(Some("some key"), &both.to_string()), None);
        assert_eq!(Chain::of_names(None, "chain-1"), None);
    }
}
