//! Decisions about snapshots, as pure functions.

use super::eager::Extent;
use super::lazy::{Extraction, NotLazyReason, Target};
use super::model::{Kind, Labels, label};
use crate::config::{Config, Limit, MinLayerSize};
use crate::layout::SnapshotId;

/// How layers are to be pulled, from the configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pull {
    pub min_layer_size: MinLayerSize,
    /// Layers made lazy at the same time.
    pub max_concurrency: Limit,
    /// Eager pulls are the first choice.
    pub parallel: bool,
    /// Eager pulls are the second choice.
    pub parallel_fallback: bool,
}

impl From<&Config> for Pull {
    fn from(config: &Config) -> Pull {
        let parallel = &config.pull_modes.parallel_pull_unpack;
        Pull {
            min_layer_size: config.snapshotter.min_layer_size,
            max_concurrency: config.max_concurrency,
            parallel: parallel.enable,
            parallel_fallback: parallel.parallel_pull_as_fallback,
        }
    }
}

/// The first thing to try for a layer.
#[derive(Debug, PartialEq, Eq)]
pub enum Plan<'a> {
    Lazy(&'a Target),
    /// containerd downloads and unpacks the layer.
    Defer(NotLazyReason),
}

/// What to do with a layer (`runtime.md` 3.2, step 3).
pub fn plan<'a>(extraction: &'a Extraction, pull: &Pull) -> Plan<'a> {
    if pull.parallel {
        return Plan::Defer(NotLazyReason::ParallelPull);
    }
    if let (MinLayerSize::Bytes(min), Some(size)) = (pull.min_layer_size, extraction.size)
        && size < min
    {
        return Plan::Defer(NotLazyReason::TooSmall { size, min });
    }
    match &extraction.target {
        Ok(target) => Plan::Lazy(target),
        Err(reason) => Plan::Defer(reason.clone()),
    }
}

/// What to do with a layer that is not lazy, for `reason`: pull it here, so much of its image with it, or leave it to containerd.
///
/// ```text
/// enable                              image
/// no index                            image, with parallel_pull_as_fallback; else containerd
/// no zTOC, too small, lazy failed     layer (as the Go snapshotter, whatever the configuration)
/// labels do not name it, name taken   containerd
/// ```
pub fn eager(reason: &NotLazyReason, pull: &Pull) -> Option<Extent> {
    match reason {
        NotLazyReason::ParallelPull => Some(Extent::Image),
        NotLazyReason::NoIndex { .. } => pull.parallel_fallback.then_some(Extent::Image),
        NotLazyReason::NoZtoc(_)
        | NotLazyReason::TooSmall { .. }
        | NotLazyReason::Unresolved { .. }
        | NotLazyReason::Timeout(_)
        | NotLazyReason::IndexWrong { .. }
        | NotLazyReason::Unserved { .. } => Some(Extent::Layer),
        NotLazyReason::LabelMissing(_) | NotLazyReason::LabelInvalid { .. } | NotLazyReason::NameTaken(_) => None,
    }
}

/// The labels under which a layer is committed that was pulled here.
pub fn pulled_labels(mut labels: Labels, extent: Extent) -> Labels {
    if extent == Extent::Layer {
        labels.insert(label::HAS_INDEX.into(), "true".into());
    }
    labels
}

/// The labels of the active snapshot of a layer extraction.
pub fn extraction_labels(mut labels: Labels, extraction: &Extraction) -> Labels {
    labels.insert(label::NAMESPACE.into(), extraction.namespace.clone());
    labels
}

/// The labels under which a lazy layer is committed.
pub fn lazy_labels(mut labels: Labels) -> Labels {
    labels.insert(label::REMOTE.into(), label::REMOTE_VALUE.into());
    labels.insert(label::HAS_INDEX.into(), "true".into());
    labels
}

/// The type of a mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MountKind {
    Bind,
    Overlay,
}

impl MountKind {
    /// For mount(2).
    pub fn name(self) -> &'static str {
        match self {
            MountKind::Bind => "bind",
            MountKind::Overlay => "overlay",
        }
    }
}

/// One mount, as containerd is to make it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    pub kind: MountKind,
    pub source: String,
    pub options: Vec<String>,
}

/// The one mount that shows a snapshot (`runtime.md` 3.4). `parents` nearest first; `snapshots` is their directory.
///
/// Nothing is ever added to these options: containerd and its users know their shape and order.
pub fn mount(snapshots: &str, id: SnapshotId, kind: Kind, parents: &[SnapshotId]) -> Mount {
    let fs = |id: SnapshotId| format!("{snapshots}/{id}/fs");
    let bind = |source: SnapshotId, access: &str| Mount {
        kind: MountKind::Bind,
        source: fs(source),
        options: vec![access.into(), "rbind".into()],
    };
    let writable = kind == Kind::Active;
    let mut options = match (parents, writable) {
        ([], true) => return bind(id, "rw"),
        ([], false) => return bind(id, "ro"),
        ([parent], false) => return bind(*parent, "ro"),
        (_, true) => vec![format!("workdir={snapshots}/{id}/work"), format!("upperdir={}", fs(id))],
        (_, false) => Vec::new(),
    };
    let lower: Vec<String> = parents.iter().map(|parent| fs(*parent)).collect();
    options.push(format!("lowerdir={}", lower.join(":")));
    Mount { kind: MountKind::Overlay, source: "overlay".into(), options }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::Digest;

    fn options(kind: Kind, parents: &[u32]) -> (MountKind, String, Vec<String>) {
        let parents: Vec<SnapshotId> = parents.iter().map(|id| SnapshotId(*id)).collect();
        let mount = mount("/s", SnapshotId(9), kind, &parents);
        (mount.kind, mount.source, mount.options)
    }

    #[test]
    fn mounts_have_the_shapes_that_containerd_knows() {
        let text = |options: &[&str]| options.iter().map(|o| o.to_string()).collect::<Vec<_>>();
        let (bind, overlay) = (MountKind::Bind, MountKind::Overlay);
        assert_eq!(options(Kind::Active, &[]), (bind, "/s/9/fs".into(), text(&["rw", "rbind"])));
        assert_eq!(options(Kind::View, &[]), (bind, "/s/9/fs".into(), text(&["ro", "rbind"])));
        assert_eq!(options(Kind::View, &[4]), (bind, "/s/4/fs".into(), text(&["ro", "rbind"])));
        let lower = "lowerdir=/s/4/fs:/s/3/fs";
        assert_eq!(options(Kind::View, &[4, 3]), (overlay, "overlay".into(), text(&[lower])));
        let active = text(&["workdir=/s/9/work", "upperdir=/s/9/fs", lower]);
        assert_eq!(options(Kind::Active, &[4, 3]), (overlay, "overlay".into(), active));
    }

    #[test]
    fn a_layer_is_lazy_unless_something_says_otherwise() {
        let digest = Digest::of(b"layer");
        let target = Target {
            namespace: "n".into(),
            reference: "h/r:t".parse().unwrap(),
            manifest: digest,
            layer: digest,
            chain: None,
            size: Some(10),
            index: None,
            layers: vec![(digest, Some(10))],
        };
        let mut extraction =
            Extraction { chain_id: "c".into(), namespace: "n".into(), size: Some(10), target: Ok(target.clone()) };
        let pull = Pull { parallel_fallback: true, ..Pull::from(&Config::default()) };
        assert_eq!(plan(&extraction, &pull), Plan::Lazy(&target));
        assert_eq!(plan(&extraction, &Pull { min_layer_size: MinLayerSize::Bytes(10), ..pull }), Plan::Lazy(&target));
        let small = Pull { min_layer_size: MinLayerSize::Bytes(11), ..pull };
        assert_eq!(plan(&extraction, &small), Plan::Defer(NotLazyReason::TooSmall { size: 10, min: 11 }));
        assert_eq!(plan(&extraction, &Pull { parallel: true, ..small }), Plan::Defer(NotLazyReason::ParallelPull));
        extraction.size = None;
        assert_eq!(plan(&extraction, &small), Plan::Lazy(&target));
        extraction.target = Err(NotLazyReason::LabelMissing(label::IMAGE_REF));
        assert_eq!(plan(&extraction, &pull), Plan::Defer(NotLazyReason::LabelMissing(label::IMAGE_REF)));
    }

    #[test]
    fn what_is_not_lazy_is_pulled_here_or_left_to_containerd() {
        let digest = Digest::of(b"layer");
        let why = || "why".to_owned();
        let off = Pull { parallel: false, parallel_fallback: false, ..Pull::from(&Config::default()) };
        let fallback = Pull { parallel_fallback: true, ..off };
        let no_index = NotLazyReason::NoIndex { image: why(), why: why() };
        assert_eq!(eager(&no_index, &off), None);
        assert_eq!(eager(&no_index, &fallback), Some(Extent::Image));
        assert_eq!(eager(&NotLazyReason::ParallelPull, &off), Some(Extent::Image));
        for reason in [
            NotLazyReason::NoZtoc(digest),
            NotLazyReason::TooSmall { size: 1, min: 2 },
            NotLazyReason::Timeout(digest),
            NotLazyReason::Unresolved { layer: digest, image: why(), why: why() },
            NotLazyReason::Unserved { layer: digest, why: why() },
            NotLazyReason::IndexWrong { layer: digest, why: why() },
        ] {
            assert_eq!(eager(&reason, &off), Some(Extent::Layer), "{reason}");
        }
        for reason in [NotLazyReason::LabelMissing("l"), NotLazyReason::NameTaken(why())] {
            assert_eq!(eager(&reason, &fallback), None, "{reason}");
        }
    }
}
