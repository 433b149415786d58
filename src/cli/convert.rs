//! `soci convert`: an image in, the same image with its SOCI indexes out: in containerd, between registries, or over OCI layouts.

use super::{
    args::{self, Format, Global},
    blobs::{New, Sink},
    containerd::{Purpose, Session},
    create::{self, CreateError},
    indexing::{self, IndexingError, PerPlatform, Places, Plan, Version, report, rewrite, source},
    layout::{
        OciLayout,
        write::{Destination, Staging},
    },
    output::{Console, Lines},
    recording::{self, Record},
};
use crate::oci::Reference;
use std::{
    io::{self, Write},
    path::Path,
};

/// Runs the command.
pub fn run(args: &args::Convert, global: &Global) -> Result<(), CreateError> {
    let source = args.operands.first().filter(|o| !o.is_empty()).ok_or(CreateError::NoSource)?;
    let destination = args.operands.get(1).filter(|o| !o.is_empty()).ok_or(CreateError::NoDestination)?;
    let plan = Plan::new(&args.indexing)?;
    if args.standalone {
        return standalone(&plan, Path::new(source), Path::new(destination), args);
    }
    let (source, destination) = (source.to_string_lossy(), destination.to_string_lossy());
    let reference = tagged(&destination, args.registry)?;
    let console = Console::new(Lines::of(args.indexing.json, args.indexing.quiet));
    if args.registry {
        return Ok(super::registry::convert(args, &plan, &source, &reference, global, &console)?);
    }
    in_containerd(&plan, &source, &destination, args, global, &console)
}

/// The destination must be a name that an image can be pushed and pulled by. containerd's names are what they are; in a registry, one
/// without a host is on Docker Hub.
fn tagged(text: &str, in_registry: bool) -> Result<Reference, CreateError> {
    let bad = |why: &str| CreateError::Destination(why.to_owned());
    let reference = if in_registry { Reference::short(text) } else { text.parse() };
    let reference = reference.map_err(|e| CreateError::Destination(format!("could not parse reference: {e}")))?;
    match (&reference.tag, reference.digest) {
        (_, Some(_)) => Err(bad("reference must not contain a digest")),
        (None, None) => Err(bad("reference must be tagged")),
        (Some(_), None) => Ok(reference),
    }
}

/// The images of the wanted platforms.
pub fn select<'a>(plan: &Plan, image: &'a source::Image) -> Result<Vec<PerPlatform<'a>>, IndexingError> {
    let platforms = plan.platforms(image, &image.default).into_iter();
    let found = platforms.map(|platform| {
        let (place, manifest) = image.find(&platform)?;
        Ok(PerPlatform::new(platform, place, manifest))
    });
    found.collect()
}

/// Builds everything that is new about the image, and keeps it.
pub fn index(plan: &Plan, places: Places<'_>, indexed: &mut [PerPlatform<'_>]) -> Result<(), IndexingError> {
    indexing::build_layers(plan, places, indexed)?;
    for platform in indexed.iter_mut() {
        indexing::add_index(plan, places, platform, Version::V2, None)?;
    }
    if indexed.iter().all(|platform| platform.index.is_none()) {
        return Err(IndexingError::EmptyIndex(indexing::why_empty(plan, indexed)));
    }
    for platform in indexed.iter().filter(|platform| platform.index.is_none()) {
        places.console.warn(format!("no layer of {} was indexed; it stays without a SOCI index", platform.platform));
    }
    Ok(())
}

fn in_containerd(
    plan: &Plan,
    source: &str,
    destination: &str,
    args: &args::Convert,
    global: &Global,
    console: &Console,
) -> Result<(), CreateError> {
    let session = Session::open(global)?;
    let record = session.image(source)?;
    let image = source::of_target(&session, &record.target)?;
    let mut indexed = select(plan, &image)?;
    let keeper = session.keeper(Purpose::Image)?;
    let places = Places { image: source, blobs: &session, sink: &keeper, console, workers: indexing::processors() };
    index(plan, places, &mut indexed)?;
    let result = rewrite::rewrite(&image, &indexed, &keeper)?;
    session.remote.wait(keeper.containerd().set_image(destination, &result.target))??;
    let records: Vec<Record<'_>> = indexed
        .iter()
        .map(|platform| Record {
            platform,
            version: Version::V2,
            span_size: plan.span_size,
            image: result.target.digest,
            manifest: result.entries[platform.place],
            original: image.base.manifests[platform.place].digest,
        })
        .collect();
    recording::record(&session.artifacts, &records)?;
    keeper.done();
    let output = report::Output::Image { reference: destination.to_owned() };
    if args.indexing.quiet && !args.indexing.json {
        return writeln!(io::stdout().lock(), "{}", result.target.digest).map_err(CreateError::Output);
    }
    create::print(&args.indexing, &[], || report::converted(&result, &indexed, &image, output, console))
        .map_err(CreateError::Output)
}

fn standalone(plan: &Plan, source: &Path, destination: &Path, args: &args::Convert) -> Result<(), CreateError> {
    let (format, json) = (args.format, args.indexing.json);
    let layout = OciLayout::open(source)?;
    let target = Destination::check(destination, format)?;
    let lines = match Lines::of(json, args.indexing.quiet) {
        Lines::Stdout if target.is_stdout() => Lines::Stderr,
        lines => lines,
    };
    let stdout_taken = target.is_stdout();
    let console = Console::new(lines);
    let image = source::of_layout(&layout)?;
    let staging = Staging::new(target)?;
    if let Some(list) = &image.made_up {
        Sink::put(&staging, New::MadeUp(list))?;
    }
    let mut indexed = select(plan, &image)?;
    let name = source.display().to_string();
    let places =
        Places { image: &name, blobs: &layout, sink: &staging, console: &console, workers: indexing::processors() };
    index(plan, places, &mut indexed)?;
    let result = rewrite::rewrite(&image, &indexed, &staging)?;
    let reachable = rewrite::reachable(&result.target, &layout, &staging, &console)?;
    let report =
        (json || args.indexing.quiet).then(|| said(&result, &indexed, &image, destination, format, json, &console));
    staging.publish(&layout, &reachable, &rewrite::layout_index(&result.target))?;
    if let Some(report) = report {
        let write = |out: &mut dyn Write| out.write_all(&report).and_then(|()| out.flush());
        let written = if stdout_taken { write(&mut io::stderr().lock()) } else { write(&mut io::stdout().lock()) };
        written.map_err(CreateError::Output)?;
    }
    Ok(())
}

/// What `--json` or `--quiet` print.
fn said(
    result: &rewrite::Rewritten,
    indexed: &[PerPlatform<'_>],
    image: &source::Image,
    destination: &Path,
    format: Format,
    json: bool,
    console: &Console,
) -> Vec<u8> {
    if !json {
        return format!("{}\n", result.target.digest).into_bytes();
    }
    let output = report::Output::Layout { path: destination.display().to_string(), format: format.name() };
    report::converted(result, indexed, image, output, console)
}
