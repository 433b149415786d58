//! One layer on its way: compressed bytes in, a tar into a pipe, the digests of both.
//!
//! ```text
//!   download ──Bytes──▶ [ sha256 of the layer ▶ inflate ] ──buffers──▶ [ sha256 of the tar ▶ pipe ] ──▶ unpacker (a process)
//!                            a thread, and helpers                           a thread
//! ```
//! So a single layer keeps three cores busy, and each stage waits for the slowest. Inflating would be that; where decoding can begin in the
//! middle of the layer, others help ([`super::front`]). With a program of the operator's (`decompress_streams`) the first thread feeds it, and
//! a third one reads what it says.
//!
//! The threads are their own and not the runtime's: they wait for the network as long as that takes, and would keep everybody else
//! from the few that the runtime lends for disk work.
//!
//! Memory per layer: [`BUFFERS`] of [`BUFFER`], the queue in front, and what is held for helpers ([`super::parts`]).

use super::{
    front::{Front, Inflated},
    parts::Crew,
    programs::Program,
    shelf::{Draft, Inflating},
};
use crate::{
    inflate::StreamError,
    oci::{Digest, Hasher},
};
use bytes::Bytes;
use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::OwnedFd,
    process::{Child, Command, Stdio},
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    thread,
};
use tokio::sync::{mpsc, oneshot};

/// Pieces between the download and the first thread. A piece is what a socket gave at a time, mostly 8 to 64 KiB, and 400 at most.
const QUEUE: usize = 16;
/// Large enough that handing one over costs nothing, small enough to stay in a core's cache until it is hashed and written.
pub const BUFFER: usize = 256 << 10;
/// Enough that a stage that pauses (a page fault, a full pipe) does not stop the one before it.
const BUFFERS: usize = 8;
/// Of a program's error output, what is shown.
const PROGRAM_WORDS: u64 = 512;

/// What went through.
#[derive(Debug)]
pub struct Passed {
    /// sha256 of the compressed bytes.
    pub compressed: Digest,
    /// sha256 of the tar.
    pub uncompressed: Digest,
    /// Bytes of the tar.
    pub bytes: u64,
    /// How many parts helpers have inflated. If they were wrong, doing it alone may help.
    pub parts: u32,
    /// Where inflating could begin another time.
    pub draft: Option<Draft>,
}

/// Where the tar comes from.
pub enum Through<'a> {
    Inflate(Inflating, &'a Crew),
    Program(&'a Program),
}

/// Why a layer did not go through.
#[derive(Debug, thiserror::Error)]
pub enum PipelineError {
    #[error("the layer cannot be decompressed")]
    Stream(#[source] StreamError),
    #[error("cannot run {program}")]
    Start { program: String, source: io::Error },
    #[error("{program} failed: {what}")]
    Program { program: String, what: String },
    #[error("the layer becomes more than {limit} bytes")]
    TooLarge { limit: u64 },
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
    /// A thread ended without a word.
    #[error("the work ended early")]
    Aborted,
}

/// A pipeline at work. Dropping `input` ends the stream; dropping all of it abandons the layer.
pub struct Pipeline {
    pub input: mpsc::Sender<Bytes>,
    pub result: oneshot::Receiver<Result<Passed, PipelineError>>,
}

/// A part of the tar: buffer and how much of it counts.
type Part = (Vec<u8>, usize);

/// Starts the threads. The tar goes to `pipe`, and is at most `limit` bytes.
pub fn start(pipe: OwnedFd, through: Through<'_>, limit: u64) -> Result<Pipeline, PipelineError> {
    let (input, compressed) = mpsc::channel(QUEUE);
    let (answer, result) = oneshot::channel();
    let (parts, filled) = sync_channel(BUFFERS);
    let (give_back, empty) = sync_channel(BUFFERS);
    for _ in 0..BUFFERS {
        // There is room for all of them.
        let _ = give_back.try_send(vec![0; BUFFER]);
    }
    let out = Out { parts, empty, bytes: 0, limit };
    let spawn = |name: &str, work: Box<dyn FnOnce() + Send>| {
        thread::Builder::new().name(name.into()).spawn(work).map_err(PipelineError::Thread)
    };
    let tail = spawn_tail(filled, give_back, pipe)?;
    let first: Box<dyn FnOnce() -> Result<Inflated, PipelineError> + Send> = match through {
        Through::Inflate(inflating, crew) => {
            let front = Front::new(compressed, out, crew.clone(), inflating)?;
            Box::new(move || front.run())
        }
        Through::Program(program) => {
            let program = program.clone();
            Box::new(move || run(&program, compressed, out))
        }
    };
    spawn(
        "layer-inflate",
        Box::new(move || {
            let first = first();
            // Its `out` is gone, so the tail ends too.
            let tail = tail.join().map_err(|_| PipelineError::Aborted);
            let passed = first.and_then(|first| {
                let (uncompressed, bytes) = tail?;
                let Inflated { compressed, parts, draft } = first;
                Ok(Passed { compressed, uncompressed, bytes, parts, draft })
            });
            // Who abandoned the layer does not listen.
            let _ = answer.send(passed);
        }),
    )?;
    Ok(Pipeline { input, result })
}

/// Hashes and writes. Ends when nothing more comes, and closes the pipe.
fn spawn_tail(
    filled: Receiver<Part>,
    give_back: SyncSender<Vec<u8>>,
    pipe: OwnedFd,
) -> Result<thread::JoinHandle<(Digest, u64)>, PipelineError> {
    let work = move || {
        let mut hasher = Hasher::new();
        let (mut pipe, mut bytes) = (Some(File::from(pipe)), 0);
        while let Ok((buffer, length)) = filled.recv() {
            // Written first: the unpacker works while this thread hashes.
            if let Some(open) = &mut pipe
                && open.write_all(&buffer[..length]).is_err()
            {
                // The unpacker has stopped reading: it has failed, and says so itself, or has seen the end of the archive.
                pipe = None;
            }
            hasher.update(&buffer[..length]);
            bytes += length as u64;
            // Nobody may need it any more.
            let _ = give_back.try_send(buffer);
        }
        drop(pipe);
        (hasher.finish(), bytes)
    };
    thread::Builder::new().name("layer-write".into()).spawn(work).map_err(PipelineError::Thread)
}

/// Where the tar goes.
pub struct Out {
    parts: SyncSender<Part>,
    empty: Receiver<Vec<u8>>,
    pub bytes: u64,
    limit: u64,
}

impl Out {
    pub fn buffer(&self) -> Result<Vec<u8>, PipelineError> {
        self.empty.recv().map_err(|_| PipelineError::Aborted)
    }

    pub fn send(&mut self, buffer: Vec<u8>, length: usize) -> Result<(), PipelineError> {
        self.bytes += length as u64;
        if self.bytes > self.limit {
            return Err(PipelineError::TooLarge { limit: self.limit });
        }
        self.parts.send((buffer, length)).map_err(|_| PipelineError::Aborted)
    }
}

/// A program that ends with us.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn run(program: &Program, mut compressed: mpsc::Receiver<Bytes>, mut out: Out) -> Result<Inflated, PipelineError> {
    let name = program.path.display().to_string();
    let failed = |source| PipelineError::Start { program: name.clone(), source };
    let mut child = Command::new(&program.path)
        .args(&program.args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let (mut stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let mut child = Running(child);
    let reader = thread::Builder::new().name("layer-read".into()).spawn(move || {
        let Some(mut stdout) = stdout else { return Err(PipelineError::Aborted) };
        loop {
            let (mut buffer, mut filled) = (out.buffer()?, 0);
            while filled < buffer.len() {
                match stdout.read(&mut buffer[filled..]) {
                    Ok(0) => break,
                    Ok(n) => filled += n,
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    // What it ended with is asked below.
                    Err(_) => break,
                }
            }
            let last = filled < buffer.len();
            if filled > 0 {
                out.send(buffer, filled)?;
            }
            if last {
                return Ok(());
            }
        }
    });
    let reader = reader.map_err(PipelineError::Thread)?;
    let words = thread::Builder::new().name("layer-words".into()).spawn(move || {
        let mut text = Vec::new();
        if let Some(mut stderr) = stderr {
            let _ = stderr.by_ref().take(PROGRAM_WORDS).read_to_end(&mut text);
            // The rest is taken, or the program would stop for it.
            let _ = io::copy(&mut stderr, &mut io::sink());
        }
        String::from_utf8_lossy(&text).trim().to_owned()
    });
    let words = words.map_err(PipelineError::Thread)?;
    let mut hasher = Hasher::new();
    while let Some(bytes) = compressed.blocking_recv() {
        hasher.update(&bytes);
        if let Some(open) = &mut stdin
            && open.write_all(&bytes).is_err()
        {
            stdin = None;
        }
    }
    drop(stdin);
    let read = reader.join().map_err(|_| PipelineError::Aborted)?;
    if read.is_err() {
        // It writes to nobody.
        let _ = child.0.kill();
    }
    let status = child.0.wait().map_err(failed)?;
    let words = words.join().unwrap_or_default();
    read?;
    match status.success() {
        true => Ok(Inflated { compressed: hasher.finish(), parts: 0, draft: None }),
        false => Err(PipelineError::Program { program: name, what: format!("{status}: {words}") }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pull::Shelf;
    use std::path::PathBuf;

    async fn pass(bytes: &[u8], program: Option<Program>, limit: u64) -> (Result<Passed, PipelineError>, Vec<u8>) {
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let crew = Crew::new(2);
        let through = match &program {
            Some(program) => Through::Program(program),
            None => Through::Inflate(Inflating::Alone, &crew),
        };
        let pipeline = start(write, through, limit).unwrap();
        let reader = thread::spawn(move || {
            let mut out = Vec::new();
            File::from(read).read_to_end(&mut out).unwrap();
            out
        });
        for piece in bytes.chunks(10_000) {
            if pipeline.input.send(Bytes::copy_from_slice(piece)).await.is_err() {
                break;
            }
        }
        drop(pipeline.input);
        (pipeline.result.await.unwrap(), reader.join().unwrap())
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
        out.write_all(bytes).unwrap();
        out.finish().unwrap()
    }

    fn tar() -> Vec<u8> {
        (0..3_000_000u32).map(|i| (i / 7) as u8).collect()
    }

    fn program(args: &[&str]) -> Program {
        Program { path: PathBuf::from("/bin/sh"), args: args.iter().map(|a| a.to_string()).collect() }
    }

    #[tokio::test]
    async fn both_digests_are_of_what_went_through() {
        let (tar, layer) = (tar(), gzip(&tar()));
        for program in [None, Some(program(&["-c", "exec gzip -dc"]))] {
            let (passed, out) = pass(&layer, program, u64::MAX).await;
            let passed = passed.unwrap();
            assert!(out == tar);
            assert_eq!((passed.compressed, passed.uncompressed), (Digest::of(&layer), Digest::of(&tar)));
            assert_eq!(passed.bytes, tar.len() as u64);
        }
    }

    /// Half of it is noise, so that a few megabytes are several parts.
    fn large() -> Vec<u8> {
        let mut state = 88_172_645_463_325_252u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            b"0123456789abcdef"[(state >> 60) as usize]
        };
        (0..9 << 20).map(|_| next()).collect()
    }

    async fn helped(bytes: &[u8], inflating: Inflating) -> (Passed, Vec<u8>) {
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let pipeline = start(write, Through::Inflate(inflating, &Crew::new(5)), u64::MAX).unwrap();
        let reader = thread::spawn(move || {
            let mut out = Vec::new();
            File::from(read).read_to_end(&mut out).unwrap();
            out
        });
        for piece in bytes.chunks(200_000) {
            pipeline.input.send(Bytes::copy_from_slice(piece)).await.unwrap();
        }
        drop(pipeline.input);
        (pipeline.result.await.unwrap().unwrap(), reader.join().unwrap())
    }

    fn nothing_known() -> Inflating {
        Inflating::Helped { known: None, draft: None }
    }

    /// `tar` as one gzip member that is flushed in this way now and then.
    fn flushed(tar: &[u8], how: flate2::FlushCompress) -> Vec<u8> {
        let mut compress = flate2::Compress::new(flate2::Compression::new(1), false);
        let mut out = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255];
        let mut pieces = tar.chunks(100_000).peekable();
        while let Some(piece) = pieces.next() {
            out.reserve(2 * piece.len() + 100);
            let flush = if pieces.peek().is_some() { how } else { flate2::FlushCompress::Finish };
            let before = compress.total_in();
            compress.compress_vec(piece, &mut out, flush).unwrap();
            assert_eq!(compress.total_in() - before, piece.len() as u64);
        }
        out.extend_from_slice(&crc32fast::hash(tar).to_le_bytes());
        out.extend_from_slice(&(tar.len() as u32).to_le_bytes());
        out
    }

    #[tokio::test]
    async fn layers_of_many_members_or_frames_are_inflated_in_parts_and_come_out_the_same() {
        let tar = large();
        let members: Vec<u8> = tar.chunks(65_000).flat_map(gzip).collect();
        let frames: Vec<u8> = tar.chunks(300_000).flat_map(|piece| zstd::encode_all(piece, 1).unwrap()).collect();
        let independent = flushed(&tar, flate2::FlushCompress::Full);
        for (name, layer) in [("members", &members), ("frames", &frames), ("pigz -i", &independent)] {
            let (passed, out) = helped(layer, nothing_known()).await;
            assert!(out == tar, "{name}");
            assert!(passed.parts >= 3, "{name}: {}", passed.parts);
            assert_eq!(passed.compressed, Digest::of(layer), "{name}");
            assert_eq!((passed.uncompressed, passed.bytes), (Digest::of(&tar), tar.len() as u64), "{name}");
            let (passed, out) = helped(layer, Inflating::Alone).await;
            assert!(out == tar && passed.parts == 0, "{name}");
        }
        // What looks like it and is not.
        let dependent = flushed(&tar, flate2::FlushCompress::Sync);
        let (_, out) = helped(&dependent, nothing_known()).await;
        assert!(out == tar);
        let lure = [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255].repeat(600_000);
        for layer in [gzip_stored(&lure), zstd::encode_all(&lure[..], 1).unwrap()] {
            assert!(helped(&layer, nothing_known()).await.1 == lure);
        }
    }

    /// One gzip member of stored blocks.
    fn gzip_stored(bytes: &[u8]) -> Vec<u8> {
        let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::none());
        out.write_all(bytes).unwrap();
        out.finish().unwrap()
    }

    #[tokio::test]
    async fn what_a_first_pass_writes_down_lets_the_second_go_in_parts_and_lies_change_nothing() {
        let tar = large();
        let layer = gzip(&tar);
        let directory = tempfile::tempdir().unwrap();
        let shelf = Shelf::open(directory.path().to_owned(), Box::new(|_| None));
        let (one, size) = (Digest::of(b"one"), 100 << 20);
        let (passed, out) = helped(&layer, shelf.inflating(&one, size)).await;
        assert!(out == tar && passed.parts == 0);
        shelf.keep(passed.draft.unwrap());
        let (passed, out) = helped(&layer, shelf.inflating(&one, size)).await;
        assert!(out == tar);
        assert!(passed.parts > 0 && passed.draft.is_none());
        // Damage of every kind to what was written down; the first record begins at 12, the second at 12 + 17 + 32768.
        let path = directory.path().join(one.hex());
        let good = std::fs::read(&path).unwrap();
        let second = 12 + 17 + 32_768;
        for (at, what) in
            [(second, 1), (second + 1, 7), (second + 16, 1), (second + 17 + 32_767, 1), (second + 17, 0x55), (12, 3)]
        {
            let mut bad = good.clone();
            bad[at] ^= what;
            std::fs::write(&path, &bad).unwrap();
            let (passed, out) = helped(&layer, shelf.inflating(&one, size)).await;
            assert!(out == tar, "{at}: {} parts", passed.parts);
        }
        // Of another layer altogether.
        std::fs::write(&path, &good).unwrap();
        let other = gzip(&tar[1..]);
        let (passed, out) = helped(&other, shelf.inflating(&one, size)).await;
        assert!(out == tar[1..]);
        assert!(passed.parts <= 1, "behind its header every layer is the same");
    }

    #[tokio::test]
    async fn what_grows_too_large_is_cut_off() {
        let (passed, _) = pass(&gzip(&tar()), None, 1_000_000).await;
        assert!(matches!(passed, Err(PipelineError::TooLarge { .. })), "{passed:?}");
    }

    #[tokio::test]
    async fn a_program_that_fails_is_quoted() {
        let failing = program(&["-c", "cat > /dev/null; echo no such thing >&2; exit 3"]);
        let (passed, _) = pass(&gzip(&tar()), Some(failing), u64::MAX).await;
        let text = passed.unwrap_err().to_string();
        assert!(text.contains("no such thing") && text.contains('3'), "{text}");
    }

    #[tokio::test]
    async fn an_unpacker_that_goes_away_stops_nobody() {
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let pipeline = start(write, Through::Inflate(Inflating::Alone, &Crew::new(2)), u64::MAX).unwrap();
        drop(read);
        pipeline.input.send(gzip(&tar()).into()).await.unwrap();
        drop(pipeline.input);
        assert_eq!(pipeline.result.await.unwrap().unwrap().uncompressed, Digest::of(&tar()));
    }
}
