//! `soci ztoc`: lists zTOCs, shows what is in one, and gets a file of a layer with it.
//!
//! Where we deviate from the Go CLI: a file goes to stdout as it is (no newline is added), and `--output` makes a file with
//! ordinary permissions and reports what it could not write.

use super::{
    args::{GetFile, Global, Info, ZtocList},
    artifacts::{ArtifactsError, Kind, Row},
    blobs::BlobError,
    containerd::{self, Session, SessionError},
    index::{self, IndexError},
    interrupt::{self, Stopped},
    layout::{Blob, LayoutError},
    output::indent,
    store::{self, Artifact, StoreError},
    table::{head, table},
};
use crate::{
    inflate::{self, InflateError},
    oci::{Digest, to_canonical_json},
    ztoc::{Compression, FileRef, Limits, Ztoc, ZtocError},
};
use serde::Serialize;
use std::{
    collections::HashSet,
    fs::Permissions,
    io::{self, Write},
    os::unix::{ffi::OsStrExt, fs::PermissionsExt},
    path::{Path, PathBuf},
};

/// Links that are followed to a file; the kernel's own limit.
const MAX_LINKS: usize = 40;

/// Largest span that is held in memory: 256 times the usual one.
const MAX_SPAN: u64 = 1 << 30;

/// Why there was nothing to print.
#[derive(Debug, thiserror::Error)]
pub enum ZtocCommandError {
    #[error("please provide both a ztoc digest and a filename to extract")]
    Operands,
    #[error(
        "the provided digest belongs to a SOCI index. Use `soci index info` to get the detailed information about it"
    )]
    Index,
    #[error("file {0} does not exist in metadata")]
    NoSuchFile(String),
    #[error("file {0} is a link that leads nowhere: too many links, or links in a circle")]
    Links(String),
    #[error("file {0} is not a regular file")]
    NotAFile(String),
    #[error(
        "cannot tell which layer the ztoc {0} describes: neither artifacts.db nor a SOCI index beside it lists it; run `soci rebuild-db`, \
         or pass --layout PATH"
    )]
    NoLayer(Digest),
    #[error(
        "the layer {0} of this ztoc is not in containerd: pull the image, or pass --layout PATH of a layout that has it"
    )]
    LayerNotInContainerd(Digest),
    #[error("invalid checksum digest format: {0:?} is not a digest (sha256: and 64 hexadecimal digits)")]
    InvalidDigest(String),
    #[error(
        "failed to get ztoc from artifacts store (try running \"soci rebuild-db\" first): {0} is not in artifacts.db"
    )]
    NotRecorded(Digest),
    #[error("the specified ztoc doesn't exist or is not associated with the specified image")]
    NotOfImage,
    #[error(transparent)]
    Listing(#[from] IndexError),
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error(transparent)]
    Artifacts(#[from] ArtifactsError),
    #[error(transparent)]
    Blob(#[from] BlobError),
    #[error("the layer {layer} of this ztoc is not in {}; pass --layout PATH of a layout that has it", path.display())]
    LayerNotFound { layer: Digest, path: PathBuf },
    #[error("the layer has {actual} bytes, but its ztoc was made for one of {expected}")]
    LayerSize { expected: u64, actual: u64 },
    #[error("span digests do not match: span {span} of the layer is damaged")]
    SpanDigest { span: usize },
    #[error("failed to extract span {span}")]
    Span { span: usize, source: InflateError },
    #[error("span {span} is too large to read")]
    SpanSize { span: usize },
    #[error("failed to read the layer")]
    Read(#[source] io::Error),
    #[error("failed to write {}", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("{0} is not a ztoc")]
    NotAZtoc(Digest, #[source] ZtocError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("failed to write to stdout")]
    Output(#[source] io::Error),
    #[error(transparent)]
    Stopped(#[from] Stopped),
}

impl From<LayoutError> for ZtocCommandError {
    fn from(e: LayoutError) -> ZtocCommandError {
        ZtocCommandError::Store(e.into())
    }
}

fn parse(digest: Digest, bytes: &[u8]) -> Result<Ztoc<'_>, ZtocCommandError> {
    Ztoc::parse(bytes, &Limits::default()).map_err(|e| match store::soci_index(bytes) {
        Some(_) => ZtocCommandError::Index,
        None => ZtocCommandError::NotAZtoc(digest, e),
    })
}

/// `soci ztoc info`.
pub fn info(args: &Info, global: &Global) -> Result<(), ZtocCommandError> {
    #[derive(Serialize)]
    struct Summary<'a> {
        version: &'a str,
        build_tool: &'a str,
        size: usize,
        span_size: u64,
        num_spans: usize,
        num_files: usize,
        num_multi_span_files: usize,
        files: Option<Vec<Entry<'a>>>,
    }
    #[derive(Serialize)]
    struct Entry<'a> {
        filename: std::borrow::Cow<'a, str>,
        offset: u64,
        size: u64,
        r#type: &'static str,
        start_span: usize,
        end_span: usize,
    }
    let operand = args.operands.first().map(AsRef::as_ref).unwrap_or_default();
    let artifact = store::find(operand, args.layout.as_deref(), global)?;
    let ztoc = parse(artifact.digest, &artifact.bytes)?;
    let spans = ztoc.spans();
    let files: Vec<Entry<'_>> = ztoc
        .files()
        .map(|file| Entry {
            filename: String::from_utf8_lossy(file.name),
            offset: file.offset,
            size: file.size,
            r#type: file.kind.as_str(),
            start_span: spans.span_at(file.offset),
            // From the exclusive end, as the Go CLI: a file that ends with its span shows the next one.
            end_span: spans.span_at(file.offset.saturating_add(file.size)),
        })
        .collect();
    let summary = Summary {
        version: &ztoc.version(),
        build_tool: &ztoc.build_tool(),
        size: artifact.bytes.len(),
        span_size: spans.span_size,
        num_spans: spans.spans.len(),
        num_files: files.len(),
        num_multi_span_files: files.iter().filter(|f| f.start_span != f.end_span).count(),
        files: (!files.is_empty()).then_some(files),
    };
    let mut text = indent(&to_canonical_json(&summary));
    text.push(b'\n');
    let mut out = io::stdout().lock();
    out.write_all(&text).and_then(|()| out.flush()).map_err(ZtocCommandError::Output)
}

/// `soci ztoc get-file`.
pub fn get_file(args: &GetFile, global: &Global) -> Result<(), ZtocCommandError> {
    let [operand, name] = args.operands.as_slice() else { return Err(ZtocCommandError::Operands) };
    let artifact = store::find(operand, args.layout.as_deref(), global)?;
    let ztoc = parse(artifact.digest, &artifact.bytes)?;
    let file = resolve(&ztoc, name.as_bytes())?;
    let layer = layer(&artifact, global)?;
    let expected = ztoc.spans().compressed_size;
    if layer.len() != expected {
        return Err(ZtocCommandError::LayerSize { expected, actual: layer.len() });
    }
    match &args.output {
        None => {
            let mut out = io::stdout().lock();
            extract(&ztoc, &artifact.bytes, &file, &layer, &mut |bytes| {
                out.write_all(bytes).map_err(ZtocCommandError::Output)
            })?;
            out.flush().map_err(ZtocCommandError::Output)
        }
        Some(path) => save(path, &ztoc, &artifact.bytes, &file, &layer),
    }
}

/// Writes to a temporary file that becomes `path` when it is complete; what is not a regular file is written to directly.
fn save(path: &Path, ztoc: &Ztoc<'_>, bytes: &[u8], file: &FileRef<'_>, layer: &Layer) -> Result<(), ZtocCommandError> {
    let failed = |source| ZtocCommandError::Write { path: path.to_owned(), source };
    if path.symlink_metadata().is_ok_and(|m| !m.is_file()) {
        let mut out = std::fs::File::create(path).map_err(failed)?;
        return extract(ztoc, bytes, file, layer, &mut |bytes| out.write_all(bytes).map_err(failed));
    }
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut temporary = tempfile::Builder::new()
        .prefix(".soci-")
        .permissions(Permissions::from_mode(0o666))
        .tempfile_in(parent)
        .map_err(failed)?;
    extract(ztoc, bytes, file, layer, &mut |bytes| temporary.write_all(bytes).map_err(failed))?;
    temporary.persist(path).map(drop).map_err(|e| failed(e.error))
}

/// The regular file that a name means, through links whose targets are names of the same zTOC.
fn resolve<'a>(ztoc: &Ztoc<'a>, name: &[u8]) -> Result<FileRef<'a>, ZtocCommandError> {
    let text = || String::from_utf8_lossy(name).into_owned();
    let (mut wanted, mut seen) = (name.to_vec(), HashSet::new());
    while seen.len() < MAX_LINKS && seen.insert(wanted.clone()) {
        let found = ztoc.files().find(|file| file.name == wanted);
        let file = found.ok_or_else(|| ZtocCommandError::NoSuchFile(String::from_utf8_lossy(&wanted).into_owned()))?;
        if file.link.is_empty() {
            return match file.kind.has_content() {
                true => Ok(file),
                false => Err(ZtocCommandError::NotAFile(text())),
            };
        }
        wanted = file.link.to_vec();
    }
    Err(ZtocCommandError::Links(text()))
}

/// The bytes of a layer, wherever they are.
enum Layer {
    Blob(Blob),
    Containerd { session: Box<Session>, digest: Digest, size: u64 },
}

impl Layer {
    fn len(&self) -> u64 {
        match self {
            Layer::Blob(blob) => blob.len(),
            Layer::Containerd { size, .. } => *size,
        }
    }

    fn read_at(&self, out: &mut [u8], offset: u64) -> Result<(), ZtocCommandError> {
        match self {
            Layer::Blob(blob) => blob.read_at(out, offset).map_err(ZtocCommandError::Read),
            Layer::Containerd { session, digest, .. } => {
                let range = offset..offset + out.len() as u64;
                let read = session.remote.wait(session.containerd.read_range(*digest, range))?;
                let bytes = read.map_err(BlobError::from)?.ok_or(ZtocCommandError::LayerNotInContainerd(*digest))?;
                if bytes.len() != out.len() {
                    return Err(ZtocCommandError::Read(io::ErrorKind::UnexpectedEof.into()));
                }
                out.copy_from_slice(&bytes);
                Ok(())
            }
        }
    }
}

/// The layer of a zTOC: beside it if it is in a layout, else in containerd, where the layers of images are whatever store is used.
fn layer(artifact: &Artifact, global: &Global) -> Result<Layer, ZtocCommandError> {
    let ztoc = artifact.digest;
    let mut absent = None;
    if let Some(store) = &artifact.store
        && let Some(layer) = store::layer_of(store, ztoc)?
    {
        match store.blob(layer) {
            Err(LayoutError::Missing { .. }) => absent = Some((layer, store.path().to_owned())),
            other => return Ok(Layer::Blob(other?)),
        }
        // An index of a layout says where its layers are; only our own store goes without them.
        if store.path() != crate::layout::Layout::new(&global.root).content() {
            return Err(ZtocCommandError::LayerNotFound { layer, path: store.path().to_owned() });
        }
    }
    let recorded = containerd::artifacts(global)?.rows()?.get(ztoc);
    let recorded = recorded.filter(|row| row.kind == Kind::Ztoc).and_then(|row| row.describes);
    let digest = absent.as_ref().map(|(layer, _)| *layer).or(recorded).ok_or(ZtocCommandError::NoLayer(ztoc))?;
    let session = match Session::open(global) {
        Ok(session) => session,
        Err(error) => {
            return Err(match absent {
                Some((layer, path)) => ZtocCommandError::LayerNotFound { layer, path },
                None => error.into(),
            });
        }
    };
    let info = session.remote.wait(session.containerd.info(digest))?.map_err(BlobError::from)?;
    match (info, absent) {
        (Some(info), _) => Ok(Layer::Containerd { session: Box::new(session), digest, size: info.size }),
        (None, Some((layer, path))) => Err(ZtocCommandError::LayerNotFound { layer, path }),
        (None, None) => Err(ZtocCommandError::LayerNotInContainerd(digest)),
    }
}

/// `soci ztoc list`.
pub fn list(args: &ZtocList, global: &Global) -> Result<(), ZtocCommandError> {
    let digest = |text: &String| text.parse::<Digest>().map_err(|_| ZtocCommandError::InvalidDigest(text.clone()));
    let only = args.ztoc_digest.as_ref().filter(|text| !text.is_empty()).map(digest).transpose()?;
    let mut found: Vec<(Digest, Row)> = match args.image_ref.as_deref().filter(|name| !name.is_empty()) {
        None => containerd::artifacts(global)?.rows()?.of_kind(Kind::Ztoc).collect(),
        Some(name) => of_image(&Session::open(global)?, name)?,
    };
    found.retain(|(digest, _)| only.is_none_or(|only| only == *digest));
    if found.is_empty() && only.is_some() && args.image_ref.is_some() {
        return Err(ZtocCommandError::NotOfImage);
    }
    let layer = |row: &Row| row.describes.map(|d| d.to_string()).unwrap_or_default();
    let text = if args.json {
        #[derive(Serialize)]
        struct Entry {
            digest: Digest,
            size: u64,
            layer_digest: String,
            span_size: u64,
        }
        let entry = |(digest, row): &(Digest, Row)| Entry {
            digest: *digest,
            size: row.size,
            layer_digest: layer(row),
            span_size: row.span_size,
        };
        serde_json::to_string_pretty(&found.iter().map(entry).collect::<Vec<_>>()).unwrap_or_default() + "\n"
    } else if args.quiet {
        found.iter().map(|(digest, _)| format!("{digest}\n")).collect()
    } else {
        let mut lines = vec![head(["DIGEST", "SIZE", "LAYER DIGEST"])];
        lines.extend(found.iter().map(|(d, row)| vec![d.to_string(), row.size.to_string(), layer(row)]));
        table(&lines)
    };
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(ZtocCommandError::Output)
}

/// The zTOCs of an image's indexes, in the order of each index; indexes that are not there any more are passed over.
fn of_image(session: &Session, name: &str) -> Result<Vec<(Digest, Row)>, ZtocCommandError> {
    let manifests = index::manifests_of(session, &session.image(name)?, &[])?;
    let rows = session.artifacts.rows()?;
    let is_its = |row: &Row| row.describes.is_some_and(|digest| manifests.contains(&digest));
    let mut indexes: Vec<(Digest, Row)> = rows.of_kind(Kind::Index).filter(|(_, row)| is_its(row)).collect();
    indexes.sort_by_key(|(_, row)| std::cmp::Reverse(row.created_at));
    let (mut found, mut seen) = (Vec::new(), HashSet::new());
    for (digest, _) in indexes {
        let Some(bytes) = session.artifact(digest)? else { continue };
        let Some(manifest) = store::soci_index(&bytes) else { continue };
        for blob in manifest.layers.iter().filter(|blob| blob.media_type == crate::oci::media_type::ZTOC) {
            if seen.insert(blob.digest) {
                let row = rows.get(blob.digest).ok_or(ZtocCommandError::NotRecorded(blob.digest))?;
                found.push((blob.digest, row));
            }
        }
    }
    Ok(found)
}

/// Gives the content of `file` to `write`, span by span, each verified before a byte of it is used.
fn extract(
    ztoc: &Ztoc<'_>,
    bytes: &[u8],
    file: &FileRef<'_>,
    layer: &Layer,
    write: &mut dyn FnMut(&[u8]) -> Result<(), ZtocCommandError>,
) -> Result<(), ZtocCommandError> {
    let table = ztoc.spans();
    let content = file.content();
    for number in table.spans_of(content.clone()) {
        interrupt::check()?;
        let span = &table.spans[number];
        let length = |range: &std::ops::Range<u64>| {
            let length = range.end.checked_sub(range.start).filter(|length| *length <= MAX_SPAN);
            length.and_then(|n| usize::try_from(n).ok()).ok_or(ZtocCommandError::SpanSize { span: number })
        };
        let mut compressed = vec![0; length(&span.compressed)?];
        layer.read_at(&mut compressed, span.compressed.start)?;
        if Digest::of(&compressed) != span.digest {
            return Err(ZtocCommandError::SpanDigest { span: number });
        }
        let wanted = content.start.max(span.uncompressed.start)..content.end.min(span.uncompressed.end);
        let skip = wanted.start.saturating_sub(span.uncompressed.start);
        let size = length(&wanted)?;
        match table.compression {
            Compression::Uncompressed => {
                let skip = length(&(0..skip))?;
                write(&compressed[skip..skip + size])?;
            }
            Compression::Gzip => {
                let mut out = vec![0; size];
                inflate::inflate_span(span.bits, &bytes[span.window.clone()], &compressed, skip, &mut out)
                    .map_err(|source| ZtocCommandError::Span { span: number, source })?;
                write(&out)?;
            }
        }
    }
    Ok(())
}
