//! The labels of a Prepare, read once.

use crate::oci::{Chain, Digest, Reference};
use crate::snapshot::{Extent, Extraction, Info, Labels, NotLazyReason, SnapshotError, Target, Wanted, label};
use std::str::FromStr;
use tonic::metadata::MetadataMap;

/// Metadata key with containerd's namespace.
pub const NAMESPACE: &str = "containerd-namespace";
/// containerd's bound on namespaces.
const MAX_NAMESPACE: usize = 76;

/// The namespace of a request, if it has one that containerd could have sent.
pub fn namespace(metadata: &MetadataMap) -> Option<&str> {
    valid(metadata.get(NAMESPACE)?.to_str().ok()?)
}

/// The namespace a snapshot key begins with: containerd's keys are `<namespace>/<number>/<client's key>`. containerd 1.6 sends no
/// namespace with what clients ask its snapshot service for (ctr-remote, nerdctl), only with what its own CRI plugin asks.
pub fn namespace_of_key(key: &str) -> Option<&str> {
    let (name, rest) = key.split_once('/')?;
    let (number, _) = rest.split_once('/')?;
    (!number.is_empty() && number.bytes().all(|b| b.is_ascii_digit())).then_some(())?;
    valid(name)
}

fn valid(name: &str) -> Option<&str> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    ((1..=MAX_NAMESPACE).contains(&name.len()) && name.chars().all(allowed)).then_some(name)
}

/// What a Prepare with these labels on top of the snapshot `parent` asks for; `None` where it is not about unpacking a layer.
pub fn extraction(
    labels: &Labels,
    parent: Option<&str>,
    namespace: Option<&str>,
) -> Result<Option<Extraction>, SnapshotError> {
    let Some(chain_id) = labels.get(label::TARGET) else { return Ok(None) };
    let namespace = namespace.ok_or(SnapshotError::NoNamespace)?.to_owned();
    let size = labels.get(label::SIZE).and_then(|size| size.parse().ok());
    let chain = Chain::of_names(parent, chain_id);
    let target = target(labels, &namespace, size).map(|target| Target { chain, ..target });
    Ok(Some(Extraction { chain_id: chain_id.clone(), namespace, size, target }))
}

/// The layer that a committed lazy snapshot shows, by the labels that it got when it was prepared, here or by the Go snapshotter.
pub fn committed(labels: &Labels) -> Result<Target, NotLazyReason> {
    let namespace = labels.get(label::NAMESPACE).ok_or(NotLazyReason::LabelMissing(label::NAMESPACE))?;
    let namespace = valid(namespace).ok_or_else(|| invalid(label::NAMESPACE, "it is not the name of a namespace"))?;
    target(labels, namespace, labels.get(label::SIZE).and_then(|size| size.parse().ok()))
}

/// The layer that is in an unpacked snapshot, by its labels and its name: those of containerd's end with the chain ID.
pub fn unpacked(info: &Info) -> Option<Wanted> {
    let namespace = info.labels.get(label::NAMESPACE).map(String::as_str).or_else(|| namespace_of_key(&info.name))?;
    let target = target(&info.labels, valid(namespace)?, None).ok()?;
    let chain_id = info.name.splitn(3, '/').nth(2).unwrap_or(&info.name);
    chain_id.parse::<Digest>().ok()?;
    Some(Wanted { target, chain_id: chain_id.to_owned(), extent: Extent::Layer })
}

fn target(labels: &Labels, namespace: &str, size: Option<u64>) -> Result<Target, NotLazyReason> {
    let reference: Reference = required(labels, label::IMAGE_REF)?;
    let manifest: Digest = required(labels, label::MANIFEST_DIGEST)?;
    let layer: Digest = required(labels, label::LAYER_DIGEST)?;
    let index = labels.get(label::INDEX_DIGEST).filter(|index| !index.is_empty()).cloned();
    let layers = layers(labels, layer, size)?;
    Ok(Target { namespace: namespace.to_owned(), reference, manifest, layer, chain: None, size, index, layers })
}

fn invalid(label: &'static str, why: impl ToString) -> NotLazyReason {
    NotLazyReason::LabelInvalid { label, why: why.to_string() }
}

fn required<T: FromStr<Err: ToString>>(labels: &Labels, label: &'static str) -> Result<T, NotLazyReason> {
    let text = labels.get(label).ok_or(NotLazyReason::LabelMissing(label))?;
    text.parse().map_err(|error: T::Err| invalid(label, error))
}

fn listed<T: FromStr<Err: ToString>>(text: &str, label: &'static str) -> Result<Vec<T>, NotLazyReason> {
    text.split(',').map(|item| item.trim().parse().map_err(|error: T::Err| invalid(label, error))).collect()
}

/// The layer itself and then the others that the labels list, each once.
fn layers(labels: &Labels, layer: Digest, size: Option<u64>) -> Result<Vec<(Digest, Option<u64>)>, NotLazyReason> {
    let mut out = vec![(layer, size)];
    let Some(digests) = labels.get(label::IMAGE_LAYERS).filter(|list| !list.is_empty()) else { return Ok(out) };
    let digests: Vec<Digest> = listed(digests, label::IMAGE_LAYERS)?;
    let sizes: Vec<Option<u64>> = match labels.get(label::IMAGE_LAYERS_SIZE) {
        None => vec![None; digests.len()],
        Some(sizes) => {
            let sizes: Vec<u64> = listed(sizes, label::IMAGE_LAYERS_SIZE)?;
            if sizes.len() != digests.len() {
                let why = format!("{} sizes for {} layers", sizes.len(), digests.len());
                return Err(invalid(label::IMAGE_LAYERS_SIZE, why));
            }
            sizes.into_iter().map(Some).collect()
        }
    };
    for (digest, size) in digests.into_iter().zip(sizes) {
        match out.iter_mut().find(|(known, _)| *known == digest) {
            Some((_, known)) => *known = known.or(size),
            None => out.push((digest, size)),
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(name: &str) -> Digest {
        Digest::of(name.as_bytes())
    }

    fn labels(extra: &[(&str, &str)]) -> Labels {
        let (manifest, layer) = (digest("m").to_string(), digest("a").to_string());
        let given = [
            (label::TARGET, "chain"),
            (label::IMAGE_REF, "docker.io/library/redis:7"),
            (label::MANIFEST_DIGEST, &manifest),
            (label::LAYER_DIGEST, &layer),
        ];
        given.iter().chain(extra).map(|(k, v)| (k.to_string(), v.to_string())).collect()
    }

    fn read(labels: &Labels) -> Result<Target, NotLazyReason> {
        extraction(labels, None, Some("ns")).unwrap().unwrap().target
    }

    #[test]
    fn without_a_target_it_is_not_about_a_layer_and_with_one_it_needs_a_namespace() {
        assert!(extraction(&Labels::new(), None, None).unwrap().is_none());
        assert!(matches!(extraction(&labels(&[]), None, None), Err(SnapshotError::NoNamespace)));
    }

    #[test]
    fn a_layer_is_followed_by_its_neighbours_each_once() {
        let list = ["b", "a", "c", "b"].map(|name| digest(name).to_string()).join(",");
        let target = read(&labels(&[(label::IMAGE_LAYERS, &list), (label::SIZE, "5")])).unwrap();
        assert_eq!(target.layers, [(digest("a"), Some(5)), (digest("b"), None), (digest("c"), None)]);
        assert_eq!((target.size, target.index, target.namespace.as_str()), (Some(5), None, "ns"));
    }

    #[test]
    fn sizes_are_applied_and_must_be_as_many_as_layers() {
        let list = ["a", "b"].map(|name| digest(name).to_string()).join(",");
        let with = |sizes: &str| read(&labels(&[(label::IMAGE_LAYERS, &list), (label::IMAGE_LAYERS_SIZE, sizes)]));
        assert_eq!(with("7,8").unwrap().layers, [(digest("a"), Some(7)), (digest("b"), Some(8))]);
        assert!(matches!(with("7"), Err(NotLazyReason::LabelInvalid { label: label::IMAGE_LAYERS_SIZE, .. })));
        assert!(matches!(with("7,x"), Err(NotLazyReason::LabelInvalid { .. })));
    }

    #[test]
    fn each_label_that_is_missing_or_wrong_is_named() {
        for label in [label::IMAGE_REF, label::MANIFEST_DIGEST, label::LAYER_DIGEST] {
            let mut without = labels(&[]);
            without.remove(label);
            assert_eq!(read(&without), Err(NotLazyReason::LabelMissing(label)));
            let wrong = labels(&[(label, "%%%")]);
            assert!(matches!(read(&wrong), Err(NotLazyReason::LabelInvalid { label: l, .. }) if l == label));
        }
    }

    #[test]
    fn an_explicit_index_may_be_empty_and_is_not_judged_here() {
        assert_eq!(read(&labels(&[(label::INDEX_DIGEST, "")])).unwrap().index, None);
        assert_eq!(read(&labels(&[(label::INDEX_DIGEST, "nonsense")])).unwrap().index.as_deref(), Some("nonsense"));
    }

    #[test]
    fn namespaces_are_those_that_containerd_allows() {
        let with = |value: &'static str| {
            let mut map = MetadataMap::new();
            map.insert(NAMESPACE, value.parse().unwrap());
            namespace(&map).map(str::to_owned)
        };
        assert_eq!(with("k8s.io").as_deref(), Some("k8s.io"));
        assert_eq!(with(""), None);
        assert_eq!(with("a b"), None);
        assert_eq!(namespace(&MetadataMap::new()), None);
    }
}
