//! zTOCs of many layers at a time: one thread for each CPU takes the next layer, and results are given out in order.
//!
//! Layers stream through the builder. Only zTOCs are held, and each goes to the staging area when it is complete. A layer that
//! cannot be indexed is a result; only what makes the whole image wrong (a blob that is missing or has another size, an I/O
//! error, Ctrl-C) ends the run.

use super::{ConvertError, prefetch};
use crate::{
    cli::{
        interrupt,
        layout::{
            LayoutError, OciLayout,
            write::{Staging, digest_of},
        },
        output::{Console, chain},
    },
    oci::{BUILD_TOOL, Descriptor, Digest},
    ztoc::{self, BuildOptions, Compression, DiffId, Limits, Ztoc},
};
use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
        mpsc,
    },
    thread,
};

/// A layer to index.
pub struct Job {
    pub layer: Descriptor,
    pub compression: Compression,
}

/// What is the same for all layers.
pub struct Options<'a> {
    pub span_size: u64,
    /// Paths whose spans are wanted.
    pub prefetch: &'a [String],
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
    incoming: mpsc::Receiver<(usize, Result<JobResult, ConvertError>)>,
    arrived: Vec<Option<JobResult>>,
}

impl Results {
    /// Waits for the result of one job. `Ok(Err(why))` is a layer that cannot be indexed.
    pub fn get(&mut self, job: usize) -> Result<JobResult, ConvertError> {
        loop {
            if let Some(result) = &self.arrived[job] {
                return Ok(result.clone());
            }
            // Workers end early only when the process should stop, or after sending why.
            let Ok((at, result)) = self.incoming.recv() else {
                interrupt::check()?;
                return Err(ConvertError::Thread(io::Error::other("a worker ended early")));
            };
            self.arrived[at] = Some(result?);
        }
    }
}

/// Builds the zTOCs of `jobs`; `consume` runs on this thread and takes the results.
pub fn run(
    jobs: &[Job],
    options: &Options<'_>,
    layout: &OciLayout,
    staging: &Staging,
    console: &Console,
    consume: impl FnOnce(&mut Results) -> Result<(), ConvertError>,
) -> Result<(), ConvertError> {
    let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    let (send, incoming) = mpsc::channel();
    thread::scope(|scope| {
        let workers = thread::available_parallelism().map_or(2, usize::from).min(jobs.len());
        for number in 0..workers {
            let (send, next, stop) = (send.clone(), &next, &stop);
            let work = move || {
                while !stop.load(Relaxed) {
                    let at = next.fetch_add(1, Relaxed);
                    let Some(job) = jobs.get(at) else { break };
                    let result = index(job, options, layout, staging, console, stop);
                    if send.send((at, result)).is_err() {
                        break;
                    }
                }
            };
            let worker = thread::Builder::new().name(format!("layer-{number}"));
            if let Err(e) = worker.spawn_scoped(scope, work) {
                stop.store(true, Relaxed);
                return Err(ConvertError::Thread(e));
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
    layout: &OciLayout,
    staging: &Staging,
    console: &Console,
    stop: &AtomicBool,
) -> Result<JobResult, ConvertError> {
    let layer = &job.layer;
    let blob = layout.blob_of(layer).map_err(ConvertError::Layer)?;
    let reader = Stoppable { reader: blob.reader(), stop };
    let reader = console.progress(layer.digest.hex()[..12].to_owned(), layer.size, reader);
    let build = BuildOptions { span_size: options.span_size, build_tool: BUILD_TOOL.to_owned(), diff_id: DiffId::Skip };
    let built = match ztoc::build(reader, job.compression, &build) {
        Ok(built) => built,
        Err(e) => {
            interrupt::check()?;
            if let ztoc::BuildError::Io(source) = e {
                return Err(ConvertError::Layer(LayoutError::Read { what: layer.digest.to_string(), source }));
            }
            let why = chain(&e);
            let digest = digest_of(&blob);
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
    let ztoc = staging.put(&built.bytes)?;
    let needs_xattrs = built.has_xattrs || built.has_opaque;
    Ok(Ok(Arc::new(Built { ztoc, size: built.bytes.len() as u64, needs_xattrs, prefetch, warnings: built.warnings })))
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
