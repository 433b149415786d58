//! Who refers to a manifest: the referrers API, its pages, and the tag that stands in for it on older registries.

use super::{
    RegistryError,
    client::{Ask, Places, Site},
    endpoint::Endpoint,
    error::Failure,
    transport::{Kind, text},
    url::same_origin,
};
use crate::oci::{Descriptor, Digest, media_type};
use http::header;

/// Pages followed. With the usual 100 and more entries per page nobody has as many referrers.
const MAX_PAGES: usize = 32;
/// Referrers looked at; the first is the one that counts.
const MAX_REFERRERS: usize = 4096;

/// An image index, read leniently: a descriptor that we cannot read (another digest algorithm) hides only itself.
#[derive(serde::Deserialize)]
struct Listing {
    #[serde(default)]
    manifests: Option<Vec<serde_json::Value>>,
}

/// The referrers of `manifest` with `artifact_type`, as one host knows them.
pub(super) async fn of_host(
    site: &Site,
    endpoint: &Endpoint,
    places: Places,
    manifest: Digest,
    artifact_type: &str,
) -> Result<Vec<Descriptor>, Failure> {
    let listed = match api(site, endpoint, places, manifest, artifact_type).await? {
        Some(listed) => listed,
        None => fallback(site, endpoint, places, manifest).await?,
    };
    // Whether or not the registry says that it filtered: filtering again costs nothing.
    Ok(listed.into_iter().filter(|d| d.artifact_type == artifact_type).collect())
}

/// None if the host does not know the API.
async fn api(
    site: &Site,
    endpoint: &Endpoint,
    places: Places,
    manifest: Digest,
    artifact_type: &str,
) -> Result<Option<Vec<Descriptor>>, Failure> {
    let query =
        ::url::form_urlencoded::Serializer::new(String::new()).append_pair("artifactType", artifact_type).finish();
    let mut path = format!("referrers/{manifest}?{query}");
    let first = site.url(endpoint, &path)?;
    let prefix = site.url(endpoint, "")?;
    let mut out = Vec::new();
    for _ in 0..MAX_PAGES {
        let body = match site.open(endpoint, &an_index(&path, places)).await {
            Ok(body) => body,
            // A name that is not known has no fallback tag either; everything else here is how registries say "what API?".
            Err(failure) => {
                return match failure.error {
                    RegistryError::NotFound { .. } | RegistryError::Refused { status: 400 | 405 | 406 | 501, .. } => {
                        Ok(None)
                    }
                    _ => Err(failure),
                };
            }
        };
        let headers = body.response().headers();
        let content_type = text(headers, header::CONTENT_TYPE).unwrap_or_default();
        if content_type.split(';').next().unwrap_or_default().trim() != media_type::OCI_INDEX {
            return Ok(None);
        }
        let link = text(headers, header::LINK).and_then(next_page).map(str::to_owned);
        let here = body.response().url().clone();
        let request = body.request().clone();
        let bytes = body.read(site.client.settings.manifest_max).await?;
        out.extend(
            descriptors(&bytes).ok_or_else(|| Failure::malformed(&request, "the list of referrers is not an index"))?,
        );
        let Some(next) = link.and_then(|link| here.join(&link).ok()) else { break };
        let below = next.path().strip_prefix(prefix.path());
        let Some(below) = below.filter(|_| same_origin(&first, &next)) else { break };
        if out.len() >= MAX_REFERRERS {
            break;
        }
        path = match next.query() {
            Some(query) => format!("{below}?{query}"),
            None => below.to_owned(),
        };
    }
    Ok(Some(out))
}

fn an_index(path: &str, places: Places) -> Ask<'_> {
    Ask { kind: Kind::Referrers, path, accept: Some(media_type::OCI_INDEX), range: None, blob: None, places }
}

/// The tag that stands in for the referrers of a manifest.
pub(super) fn fallback_tag(manifest: Digest) -> String {
    format!("sha256-{}", manifest.hex())
}

/// The index under the tag `sha256-<hex>`. That there is none means that nobody refers to the manifest.
async fn fallback(
    site: &Site,
    endpoint: &Endpoint,
    places: Places,
    manifest: Digest,
) -> Result<Vec<Descriptor>, Failure> {
    let path = format!("manifests/{}", fallback_tag(manifest));
    let body = site.open(endpoint, &an_index(&path, places)).await?;
    let request = body.request().clone();
    let bytes = body.read(site.client.settings.manifest_max).await?;
    descriptors(&bytes).ok_or_else(|| Failure::malformed(&request, "the fallback tag is not an index"))
}

fn descriptors(bytes: &[u8]) -> Option<Vec<Descriptor>> {
    let listing: Listing = serde_json::from_slice(bytes).ok()?;
    let entries = listing.manifests.unwrap_or_default();
    Some(entries.into_iter().filter_map(|entry| serde_json::from_value(entry).ok()).take(MAX_REFERRERS).collect())
}

/// The target of `<…>; rel="next"`.
fn next_page(link: &str) -> Option<&str> {
    link.split(',').find_map(|entry| {
        let (target, params) = entry.trim().strip_prefix('<')?.split_once('>')?;
        let is_next = params.split(';').any(|p| {
            p.trim().split_once('=').is_some_and(|(k, v)| k.trim() == "rel" && v.trim().trim_matches('"') == "next")
        });
        is_next.then_some(target)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_page_is_found_among_links() {
        assert_eq!(next_page(r#"</v2/a?n=1>; rel="next""#), Some("/v2/a?n=1"));
        assert_eq!(next_page("<x>; rel=prev, <y>; title=z; rel=next"), Some("y"));
        assert_eq!(next_page("</v2/a>; rel=prev"), None);
        assert_eq!(next_page("garbage"), None);
    }

    #[test]
    fn a_descriptor_of_another_algorithm_hides_only_itself() {
        let digest = Digest::of(b"x");
        let text = format!(
            r#"{{"manifests":[{{"digest":"sha512:00","size":1}},{{"mediaType":"m","digest":"{digest}","size":1,"artifactType":"a"}}]}}"#
        );
        assert_eq!(descriptors(text.as_bytes()).unwrap().len(), 1);
        assert_eq!(descriptors(br#"{"manifests":null}"#).unwrap().len(), 0);
        assert!(descriptors(b"7").is_none());
    }
}
