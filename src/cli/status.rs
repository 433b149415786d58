//! `soci status`: what the snapshotter of this node does, image by image.

use super::{
    args,
    daemon::{self, AskError},
    output::{self, indent},
};
use crate::telemetry::status::{Image, Layer, Mode, State, Status};
use std::{
    fmt::Write as _,
    io::{self, Write},
};

/// Why nothing was printed.
#[derive(Debug, thiserror::Error)]
pub enum StatusError {
    #[error(transparent)]
    Ask(#[from] AskError),
    #[error("cannot print")]
    Print(#[from] io::Error),
}

/// Prints it. An answer is a success, whatever it says: `soci doctor` is the one that judges.
pub fn run(args: &args::Status) -> Result<(), StatusError> {
    let status = daemon::ask(&args.daemon.daemon)?;
    let text = match args.json {
        true => json(&status)?,
        false => text(&status),
    };
    io::stdout().lock().write_all(text.as_bytes())?;
    Ok(())
}

/// A document as all commands print it.
pub fn json(value: &impl serde::Serialize) -> io::Result<String> {
    let mut text = String::from_utf8_lossy(&indent(&serde_json::to_vec(value)?)).into_owned();
    text.push('\n');
    Ok(text)
}

fn text(status: &Status) -> String {
    let mut out = String::new();
    let state = match status.state {
        State::Starting => "starting",
        State::Serving => "serving",
        State::Degraded => "serving what is mounted, and taking nothing new",
        State::Unknown => "in a state that this soci does not know",
    };
    // Writing to a String cannot fail.
    let _ = writeln!(out, "soci-snapshotter {}, pid {}, {state}, since {}", status.version, status.pid, status.started);
    let _ = writeln!(out, "  socket {}, root {}, configuration {}", status.address, status.root, status.config);
    if let Some(trouble) = &status.trouble {
        let _ = writeln!(out, "  WHY ({}): {}", trouble.reason, trouble.error);
    }
    if !status.connection_kept {
        out.push_str("  WARNING: soci-mount does not keep the FUSE connection: do not restart the daemon (systemctl restart soci-mount)\n");
    }
    if status.background_queue > 0 {
        let _ = writeln!(out, "  {} spans still to be fetched in the background", status.background_queue);
    }
    if status.images.is_empty() {
        out.push_str("\nNo image has been prepared yet.\n");
    }
    for image in &status.images {
        describe(image, &mut out);
    }
    if !status.messages.is_empty() {
        out.push_str("\nLast warnings and errors (journalctl -u soci-snapshotter -x explains them):\n");
    }
    for said in &status.messages {
        let times = if said.times > 1 { format!(" ({} times)", said.times) } else { String::new() };
        let _ = writeln!(out, "  {} {}{times}: {}", said.at, said.level, said.text);
    }
    out
}

fn describe(image: &Image, out: &mut String) {
    let name = if image.image.is_empty() { "(an image that its client did not name)" } else { &image.image };
    let _ = writeln!(out, "\n{name}\n  namespace {}, manifest {}", image.namespace, image.manifest);
    let lazy: Vec<_> = image.layers.iter().filter_map(|layer| layer.lazy.as_ref()).collect();
    let (fetched, size) = lazy.iter().fold((0, 0), |(f, s), lazy| (f + lazy.fetched, s + lazy.size));
    let of = |mode: Mode| image.layers.iter().filter(|layer| layer.mode == mode).count();
    let _ = writeln!(
        out,
        "  {} layers: {} lazy ({} of {} here), {} pulled by the snapshotter, {} by containerd",
        image.layers.len(),
        of(Mode::Lazy),
        output::bytes(fetched),
        output::bytes(size),
        of(Mode::Pulled),
        of(Mode::Containerd),
    );
    for layer in &image.layers {
        let _ = writeln!(out, "  {}", line(layer));
    }
}

/// One layer on one line.
pub fn line(layer: &Layer) -> String {
    let digest: String = layer.layer.chars().take("sha256:".len() + 12).collect();
    let mut text = format!("{digest:19}  {:10}", layer.mode.name());
    if let Some(lazy) = &layer.lazy {
        let _ = write!(text, "  {:3}% of {:>10}", lazy.fetched_percent, output::bytes(lazy.size));
        if let Some(why) = &lazy.condemned {
            let _ = write!(text, "  INDEX IS WRONG, its files cannot be read: {why}");
        }
        if lazy.read_errors > 0 {
            let last = lazy.last_error.as_deref().unwrap_or("unknown");
            let _ = write!(text, "  {} READ ERRORS, the last: {last}", lazy.read_errors);
        }
    }
    let _ = write!(text, "  {}: {}", layer.reason, layer.why);
    text
}
