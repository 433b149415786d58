//! zTOCs of many layers at a time: one thread for each CPU takes the next layer, and results are given out in order.
//!
//! Layers stream through the builder. Only zTOCs are held, and each goes to the staging area when it is complete. A layer that
//! cannot be indexed is a result; only what makes the whole image wrong (a blob that is missing or has another size, an I/O
//! error, Ctrl-C) ends the run.

use super::{IndexingError, prefetch};
use crate::{
    cli::{
        blobs::{BlobError, Blobs, New, Sink, digest_of},
        interrupt,
        output::{Console, chain},
    },
    oci::{BUILD_TOOL, Descriptor, Digest},
    ztoc::{self, BuildOptions, Compression, DiffId, Limits, Ztoc},
};
use std::{
    io,
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
        mpsc,
    },
    thread,
};

/// Name of the marker that makes a directory opaque.
const OPAQUE_MARKER: &[u8] = b".wh..wh..opq";

/// A layer to index.
pub struct Job {
    pub layer: Descriptor,
    pub compression: Compression,
}

/// What is the same for all layers.
pub struct Options<'a> {
    /// What the image is called.
    pub image: &'a str,
    pub span_size: u64,
    /// Paths whose spans are wanted.
    pub prefetch: &'a [String],
    /// Whether zTOCs that are there already may be used.
    pub reuse: super::Reuse,
    /// Layers at a time, and the memory they may take together.
    pub workers: usize,
    pub memory: &'a Budget,
}

/// The zTOC of a layer, as far as it is still needed.
#[derive(Debug)]
pub struct Built {
    pub ztoc: Digest,
    pub size: u64,
    pub needs_xattrs: bool,
    /// For each path of [`Options::prefetch`], its spans in this layer.
    pub prefetch: Vec<Option<prefetch::Range>>,
    /// What the builder had to say; the zTOC is good nevertheless.
    pub warnings: Vec<String>,
    /// It was there before.
    pub known: bool,
}

/// What became of a layer.
#[derive(Debug, Clone)]
pub enum Outcome {
    Indexed {
        built: Arc<Built>,
        reused: bool,
    },
    TooSmall,
    Unsupported(String),
    NotIndexable(String),
    NotALayer,
    /// Its vendor keeps it.
    Foreign,
    /// A prefetch artifact among the layers.
    Prefetch,
}

impl Outcome {
    /// The zTOC, if there is one.
    pub fn built(&self) -> Option<&Built> {
        match self {
            Outcome::Indexed { built, .. } => Some(built),
            _ => None,
        }
    }

    /// Tells the user, in the words of the Go CLI where it has some.
    pub fn print(&self, layer: &Descriptor, min_layer_size: u64, console: &Console) -> io::Result<()> {
        let Descriptor { digest, media_type, size, .. } = layer;
        match self {
            Outcome::Indexed { built, reused } => {
                for warning in built.warnings.iter().filter(|_| !reused) {
                    console.warn(format!("layer {digest}: {warning}"));
                }
                let suffix = if *reused { " (already exists)" } else { "" };
                console.line(&format!("layer {digest} -> ztoc {}{suffix}", built.ztoc))
            }
            Outcome::TooSmall => console.line(&format!(
                "ztoc skipped - layer {digest} ({media_type}) size {size} is less than min-layer-size {min_layer_size}"
            )),
            Outcome::Unsupported(name) => console.line(&format!(
                "ztoc skipped - layer {digest} ({media_type}) is compressed in an unsupported format. \
                 expect: [tar, gzip, unknown] but got {name:?}"
            )),
            Outcome::NotIndexable(why) => {
                console.warn(format!("layer {digest} is left without a ztoc: {why}"));
                Ok(())
            }
            Outcome::NotALayer => {
                console
                    .warn(format!("layer {digest} is left without a ztoc: {media_type:?} is not a layer media type"));
                Ok(())
            }
            Outcome::Foreign => {
                console.warn(format!("layer {digest} ({media_type}) is not in the layout and is left to its vendor"));
                Ok(())
            }
            Outcome::Prefetch => Ok(()),
        }
    }
}

type JobResult = Result<Arc<Built>, String>;

/// Results by job, in whatever order they are asked for.
pub struct Results {
    incoming: mpsc::Receiver<(usize, Result<JobResult, IndexingError>)>,
    arrived: Vec<Option<JobResult>>,
}

impl Results {
    /// Waits for the result of one job. `Ok(Err(why))` is a layer that cannot be indexed.
    pub fn get(&mut self, job: usize) -> Result<JobResult, IndexingError> {
        loop {
            if let Some(result) = &self.arrived[job] {
                return Ok(result.clone());
            }
            // Workers end early only when the process should stop, or after sending why.
            let Ok((at, result)) = self.incoming.recv() else {
                interrupt::check()?;
                return Err(IndexingError::Thread(io::Error::other("a worker ended early")));
            };
            self.arrived[at] = Some(result?);
        }
    }
}

/// Builds the zTOCs of `jobs`; `consume` runs on this thread and takes the results.
pub fn run(
    jobs: &[Job],
    options: &Options<'_>,
    blobs: &dyn Blobs,
    sink: &dyn Sink,
    console: &Console,
    consume: impl FnOnce(&mut Results) -> Result<(), IndexingError>,
) -> Result<(), IndexingError> {
    let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    let (send, incoming) = mpsc::channel();
    thread::scope(|scope| {
        for number in 0..options.workers.min(jobs.len()) {
            let (send, next, stop) = (send.clone(), &next, &stop);
            let work = move || {
                while !stop.load(Relaxed) {
                    let at = next.fetch_add(1, Relaxed);
                    let Some(job) = jobs.get(at) else { break };
                    let result = index(job, options, blobs, sink, console, stop);
                    if send.send((at, result)).is_err() {
                        break;
                    }
                }
            };
            let worker = thread::Builder::new().name(format!("layer-{number}"));
            if let Err(e) = worker.spawn_scoped(scope, work) {
                stop.store(true, Relaxed);
                return Err(IndexingError::Thread(e));
            }
        }
        drop(send);
        let result = consume(&mut Results { incoming, arrived: jobs.iter().map(|_| None).collect() });
        // After a failure, layers that are being read are given up.
        stop.store(true, Relaxed);
        result
    })
}

fn index(
    job: &Job,
    options: &Options<'_>,
    blobs: &dyn Blobs,
    sink: &dyn Sink,
    console: &Console,
    stop: &AtomicBool,
) -> Result<JobResult, IndexingError> {
    let layer = &job.layer;
    let failed = |source: BlobError| super::failed(options.image, layer, source);
    if options.reuse == super::Reuse::Allowed
        && let Some(bytes) = sink.known_ztoc(layer, options.span_size).map_err(failed)?
        && let Some(built) = reuse(&bytes, job, options)
    {
        // Once more, so that it stays until something refers to it.
        sink.put(New::Blob(&bytes)).map_err(failed)?;
        return Ok(Ok(Arc::new(built)));
    }
    let _share = options.memory.take(need(layer, options.span_size), stop)?;
    let reader = Stoppable { reader: blobs.open(layer).map_err(failed)?, stop };
    let reader = console.progress(layer.digest.hex()[..12].to_owned(), layer.size, reader);
    let build = BuildOptions { span_size: options.span_size, build_tool: BUILD_TOOL.to_owned(), diff_id: DiffId::Skip };
    let built = match ztoc::build(reader, job.compression, &build) {
        Ok(built) => built,
        Err(e) => {
            interrupt::check()?;
            if let ztoc::BuildError::Io(source) = e {
                return Err(failed(BlobError::Read { what: format!("layer {}", layer.digest), source }));
            }
            let why = chain(&e);
            let digest = digest_of(blobs, layer);
            interrupt::check()?;
            return Ok(Err(match digest {
                Ok(actual) if actual != layer.digest => {
                    format!("{why} (the blob is damaged: its bytes have the digest {actual})")
                }
                _ => why,
            }));
        }
    };
    if built.layer_digest != layer.digest {
        return Ok(Err(format!("the blob is damaged: its bytes have the digest {}", built.layer_digest)));
    }
    let prefetch = match options.prefetch {
        [] => Vec::new(),
        paths => match Ztoc::parse(&built.bytes, &Limits::default()) {
            Ok(ztoc) => prefetch::find(paths, &ztoc),
            Err(e) => return Ok(Err(chain(&e))),
        },
    };
    let (ztoc, size) = sink.put(New::Blob(&built.bytes)).map_err(failed)?;
    let needs_xattrs = built.has_xattrs || built.has_opaque;
    Ok(Ok(Arc::new(Built { ztoc, size, needs_xattrs, prefetch, warnings: built.warnings, known: false })))
}

/// What a zTOC from before says about its layer; `None` if it is not that layer's.
fn reuse(bytes: &[u8], job: &Job, options: &Options<'_>) -> Option<Built> {
    let ztoc = Ztoc::parse(bytes, &Limits::default()).ok()?;
    let spans = ztoc.spans();
    if spans.compressed_size != job.layer.size || spans.compression != job.compression {
        return None;
    }
    Some(Built {
        ztoc: Digest::of(bytes),
        size: bytes.len() as u64,
        needs_xattrs: ztoc.files().any(|file| file.xattrs().next().is_some() || file.name.ends_with(OPAQUE_MARKER)),
        prefetch: prefetch::find(options.prefetch, &ztoc),
        warnings: Vec::new(),
        known: true,
    })
}

/// What building the zTOC of a layer takes: the buffers of the builder and of what feeds it, and the zTOC, mostly 32 KiB for each
/// span. How much a layer inflates to is not known before; layers of real images inflate to three or four times their size.
fn need(layer: &Descriptor, span_size: u64) -> u64 {
    const BUFFERS: u64 = 24 << 20;
    const WINDOW: u64 = 33 << 10;
    let spans = layer.size.saturating_mul(4) / span_size.max(64 << 10);
    BUFFERS.saturating_add(spans.saturating_mul(2 * WINDOW))
}

/// Memory that layers share.
#[derive(Debug)]
pub struct Budget {
    total: u64,
    left: Mutex<u64>,
    freed: Condvar,
}

impl Budget {
    /// As much as that.
    pub fn new(total: u64) -> Budget {
        Budget { total, left: Mutex::new(total), freed: Condvar::new() }
    }

    /// Waits until there is enough. Who needs more than there is at all waits for all of it, and is then alone.
    fn take(&self, need: u64, stop: &AtomicBool) -> Result<Share<'_>, IndexingError> {
        let need = need.min(self.total);
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        while *left < need {
            interrupt::check()?;
            if stop.load(Relaxed) {
                return Err(IndexingError::Thread(io::Error::other("another layer failed")));
            }
            let wait = self.freed.wait_timeout(left, std::time::Duration::from_millis(50));
            left = wait.unwrap_or_else(PoisonError::into_inner).0;
        }
        *left -= need;
        Ok(Share { budget: self, taken: need })
    }
}

struct Share<'a> {
    budget: &'a Budget,
    taken: u64,
}

impl Drop for Share<'_> {
    fn drop(&mut self) {
        *self.budget.left.lock().unwrap_or_else(PoisonError::into_inner) += self.taken;
        self.budget.freed.notify_all();
    }
}

/// Fails when another layer has failed the image.
struct Stoppable<'a, R> {
    reader: R,
    stop: &'a AtomicBool,
}

impl<R: io::Read> io::Read for Stoppable<'_, R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.stop.load(Relaxed) {
            return Err(io::Error::other("another layer failed"));
        }
        self.reader.read(out)
    }
}
