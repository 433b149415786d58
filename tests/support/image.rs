//! Small images made in a moment: layers with every kind of entry a tar can hold, and whatever else a test needs to see survive.
//!
//! [`Layer`] collects entries, [`Image::write`] makes an OCI layout of layers. Everything is deterministic.

use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::json;
use soci::oci::{Descriptor, Digest, Hasher, media_type};
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

/// The time of everything that does not say otherwise: 2024-01-02 03:04:05 UTC.
pub const MTIME: i64 = 1_704_164_645;

/// What image builders use. (Level 1 of zlib-ng and its kin writes one deflate block for everything: a layer of a single span.)
const LEVEL: Compression = Compression::new(6);

#[derive(Clone, Debug, PartialEq)]
pub enum Kind {
    File(Vec<u8>),
    Directory,
    Symlink(Vec<u8>),
    /// To a path within the image.
    Hardlink(Vec<u8>),
    Char(u32, u32),
    Block(u32, u32),
    Fifo,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// Without a leading slash.
    pub path: Vec<u8>,
    pub kind: Kind,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Seconds and nanoseconds.
    pub mtime: (i64, u32),
    pub xattrs: Vec<(String, Vec<u8>)>,
}

impl Entry {
    pub fn mode(&mut self, mode: u32) -> &mut Entry {
        self.mode = mode;
        self
    }
    pub fn owner(&mut self, uid: u32, gid: u32) -> &mut Entry {
        (self.uid, self.gid) = (uid, gid);
        self
    }
    pub fn mtime(&mut self, seconds: i64, nanoseconds: u32) -> &mut Entry {
        self.mtime = (seconds, nanoseconds);
        self
    }
    pub fn xattr(&mut self, name: &str, value: &[u8]) -> &mut Entry {
        self.xattrs.push((name.into(), value.into()));
        self
    }
}

/// How a layer is stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Form {
    #[default]
    Gzip,
    /// A new gzip member after each so many bytes of tar, as pigz -i or stargz make them.
    GzipMembers(usize),
    Zstd,
    Tar,
}

#[derive(Clone, Default)]
pub struct Layer {
    pub entries: Vec<Entry>,
    pub form: Form,
}

impl Layer {
    pub fn new() -> Layer {
        Layer::default()
    }

    pub fn add(&mut self, path: impl AsRef<[u8]>, kind: Kind) -> &mut Entry {
        let mode = match kind {
            Kind::Directory => 0o755,
            Kind::Symlink(_) => 0o777,
            _ => 0o644,
        };
        let path = path.as_ref().to_vec();
        self.entries.push(Entry { path, kind, mode, uid: 0, gid: 0, mtime: (MTIME, 0), xattrs: Vec::new() });
        self.entries.last_mut().expect("just pushed")
    }

    pub fn file(&mut self, path: impl AsRef<[u8]>, content: impl AsRef<[u8]>) -> &mut Entry {
        self.add(path, Kind::File(content.as_ref().to_vec()))
    }
    pub fn dir(&mut self, path: impl AsRef<[u8]>) -> &mut Entry {
        self.add(path, Kind::Directory)
    }
    pub fn symlink(&mut self, path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> &mut Entry {
        self.add(path, Kind::Symlink(target.as_ref().to_vec()))
    }
    pub fn hardlink(&mut self, path: impl AsRef<[u8]>, to: impl AsRef<[u8]>) -> &mut Entry {
        self.add(path, Kind::Hardlink(to.as_ref().to_vec()))
    }
    /// Removes `path` of the layers below.
    pub fn whiteout(&mut self, path: &str) -> &mut Entry {
        let (dir, name) = path.rsplit_once('/').map_or(("", path), |(d, n)| (d, n));
        self.file(join(dir, &format!(".wh.{name}")), "")
    }
    /// Removes the content of the directory `path` of the layers below.
    pub fn opaque(&mut self, path: &str) -> &mut Entry {
        self.file(join(path, ".wh..wh..opq"), "")
    }
    pub fn form(mut self, form: Form) -> Layer {
        self.form = form;
        self
    }

    /// Writes the layer; the digests of what was written and of the tar in it, and the size of what was written.
    pub fn write(&self, out: impl Write) -> io::Result<(Digest, Digest, u64)> {
        let mut out = Hashed::new(out);
        let diff_id = match self.form {
            Form::Tar => self.tar(&mut out)?,
            Form::Gzip => {
                let mut gzip = GzEncoder::new(&mut out, LEVEL);
                let diff_id = self.tar(&mut gzip)?;
                gzip.finish()?;
                diff_id
            }
            Form::Zstd => {
                let mut zstd = zstd::stream::write::Encoder::new(&mut out, 3)?;
                let diff_id = self.tar(&mut zstd)?;
                zstd.finish()?;
                diff_id
            }
            Form::GzipMembers(size) => {
                let mut tar = Vec::new();
                let diff_id = self.tar(&mut tar)?;
                for member in tar.chunks(size) {
                    let mut gzip = GzEncoder::new(&mut out, LEVEL);
                    gzip.write_all(member)?;
                    gzip.finish()?;
                }
                diff_id
            }
        };
        let (digest, size) = out.finish()?;
        Ok((digest, diff_id, size))
    }

    fn tar(&self, out: impl Write) -> io::Result<Digest> {
        let mut out = BufWriter::with_capacity(1 << 16, Hashed::new(out));
        for entry in &self.entries {
            write_entry(&mut out, entry)?;
        }
        out.write_all(&[0; 1024])?;
        out.into_inner()?.finish().map(|(digest, _)| digest)
    }
}

#[derive(Clone, Default)]
pub struct Image {
    pub layers: Vec<Layer>,
    pub command: Vec<String>,
}

impl Image {
    pub fn new(layers: Vec<Layer>) -> Image {
        Image { layers, command: vec!["/bin/sh".into()] }
    }

    pub fn command(mut self, command: &[&str]) -> Image {
        self.command = command.iter().map(|c| c.to_string()).collect();
        self
    }

    /// Writes an OCI layout with this one image, tagged `latest`; the digest of its manifest.
    pub fn write(&self, layout: &Path) -> Digest {
        let blobs = layout.join("blobs/sha256");
        fs::create_dir_all(&blobs).unwrap();
        let put = |media_type: &str, bytes: &[u8]| {
            let descriptor = Descriptor::of(media_type, bytes);
            fs::write(blobs.join(descriptor.digest.hex()), bytes).unwrap();
            descriptor
        };
        let mut layers = Vec::new();
        let mut diff_ids = Vec::new();
        for layer in &self.layers {
            let part = blobs.join("part");
            let (digest, diff_id, size) = layer.write(File::create(&part).unwrap()).unwrap();
            fs::rename(&part, blobs.join(digest.hex())).unwrap();
            let suffix = match layer.form {
                Form::Tar => "",
                Form::Zstd => "+zstd",
                Form::Gzip | Form::GzipMembers(_) => "+gzip",
            };
            layers.push(Descriptor::new(&format!("application/vnd.oci.image.layer.v1.tar{suffix}"), digest, size));
            diff_ids.push(diff_id.to_string());
        }
        let architecture = soci::oci::Platform::host().architecture;
        let config = json!({
            "architecture": architecture, "os": "linux", "created": "2024-01-02T03:04:05Z",
            "config": {"Env": ["PATH=/bin"], "Cmd": self.command},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let config = put(media_type::OCI_CONFIG, config.to_string().as_bytes());
        let manifest = json!({
            "schemaVersion": 2, "mediaType": media_type::OCI_MANIFEST, "config": config, "layers": layers,
        });
        let mut manifest = put(media_type::OCI_MANIFEST, manifest.to_string().as_bytes());
        manifest.annotations.insert("org.opencontainers.image.ref.name".into(), "latest".into());
        let digest = manifest.digest;
        let index = json!({"schemaVersion": 2, "mediaType": media_type::OCI_INDEX, "manifests": [manifest]});
        fs::write(layout.join("index.json"), index.to_string()).unwrap();
        fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        digest
    }
}

/// A layer that can run: busybox, its usual names, and the directories a container wants.
pub fn busybox() -> Layer {
    let mut layer = Layer::new();
    for dir in ["bin", "dev", "etc", "proc", "root", "sys", "usr", "var"] {
        layer.dir(dir);
    }
    layer.dir("tmp").mode(0o1777);
    let program = fs::read("/bin/busybox").expect("busybox-static");
    layer.file("bin/busybox", program).mode(0o755);
    for name in "sh cat cp date dd echo env find grep head id ls md5sum mkdir mount mv od rm sha256sum sleep stat sync tail tar test touch true wc xargs"
        .split(' ')
    {
        layer.symlink(format!("bin/{name}"), "busybox");
    }
    layer.file("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n");
    layer.file("etc/group", "root:x:0:\nnogroup:x:65534:\n");
    layer
}

/// An image for CRI's sandboxes.
pub fn pause() -> Image {
    Image::new(vec![busybox()]).command(&["/bin/sleep", "1000000"])
}

/// Incompressible bytes, the same for the same seed.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut out = Vec::with_capacity(length + 8);
    while out.len() < length {
        // xorshift64*
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        out.extend_from_slice(&state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
    }
    out.truncate(length);
    out
}

/// Text that compresses to about a quarter.
pub fn prose(seed: u64, length: usize) -> Vec<u8> {
    const WORDS: [&str; 16] = [
        "span", "layer", "index", "of", "the", "a", "reads", "window", "before", "and", "mount", "never", "arrives",
        "byte", "waits", "queue",
    ];
    let mut out = Vec::with_capacity(length + 16);
    for byte in noise(seed, length / 3 + 16) {
        if out.len() >= length {
            break;
        }
        out.extend_from_slice(WORDS[usize::from(byte & 15)].as_bytes());
        out.push(if byte >> 4 == 0 { b'\n' } else { b' ' });
    }
    out.resize(length, b'.');
    out
}

/// A layer of about `megabytes` that compresses by half: 1 MB files below `dir`, alternately noise and prose.
pub fn bulk(dir: &str, seed: u64, megabytes: usize) -> Layer {
    let mut layer = Layer::new();
    layer.dir(dir);
    for i in 0..megabytes {
        let seed = seed.wrapping_mul(1_000_003).wrapping_add(i as u64);
        let content = if i % 2 == 0 { noise(seed, 1 << 20) } else { prose(seed, 1 << 20) };
        layer.file(format!("{dir}/{i:04}"), content);
    }
    layer
}

/// This machine's Python: the program, the libraries it is linked with, and the sources of its modules, not compiled.
pub fn python() -> Layer {
    let ask = |question: &str| {
        let answer = super::command::output(std::process::Command::new("/usr/bin/python3").args(["-c", question]));
        answer.trim().to_owned()
    };
    let program = ask("import os, sys; print(os.path.realpath(sys.executable))");
    let library = ask("import os; print(os.path.dirname(os.__file__))");
    let mut layer = Layer::new();
    for dir in ["lib", "lib64", "usr", "usr/bin", "usr/lib"] {
        layer.dir(dir);
    }
    layer.file(&program[1..], fs::read(&program).unwrap()).mode(0o755);
    layer.symlink("usr/bin/python3", program.as_bytes());
    let linked = super::command::output(std::process::Command::new("ldd").arg(&program));
    for path in linked.split_whitespace().filter(|word| word.starts_with('/')) {
        layer.file(&path[1..], fs::read(path).unwrap()).mode(0o755);
    }
    const WITHOUT: [&str; 8] =
        ["__pycache__", "test", "tests", "idlelib", "tkinter", "ensurepip", "lib2to3", "dist-packages"];
    let mut todo = vec![PathBuf::from(&library)];
    while let Some(directory) = todo.pop() {
        layer.dir(directory.strip_prefix("/").unwrap().as_os_str().as_encoded_bytes());
        let mut entries: Vec<PathBuf> = fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().path()).collect();
        entries.sort();
        for path in entries {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_dir() && !path.is_symlink() && !WITHOUT.contains(&&*name) && !name.starts_with("config-") {
                todo.push(path);
            } else if path.is_file() && (name.ends_with(".py") || name.ends_with(".so")) {
                let content = fs::read(&path).unwrap();
                layer.file(path.strip_prefix("/").unwrap().as_os_str().as_encoded_bytes(), content);
            }
        }
    }
    layer
}

/// `count` empty files, a thousand to a directory: for measuring what a mount costs per file.
pub fn crowd(count: usize) -> Layer {
    let mut layer = Layer::new();
    for i in 0..count {
        if i % 1000 == 0 {
            layer.dir(format!("crowd/{:04}", i / 1000));
        }
        layer.file(format!("crowd/{:04}/{:03}", i / 1000, i % 1000), "");
    }
    layer
}

/// Four layers with everything a tar can say and everything one layer can do to another. `megabytes` of bulk are in the second.
pub fn everything(megabytes: usize) -> Image {
    let mut kinds = bulk("bulk", 7, megabytes);
    kinds.dir("kinds").mtime(MTIME - 86_400, 123_456_789);
    kinds.file("kinds/empty", "");
    kinds.file("kinds/setuid", "#!/bin/sh\n").mode(0o4755);
    kinds.file("kinds/setgid", "#!/bin/sh\n").mode(0o2755).owner(0, 42);
    kinds.dir("kinds/sticky").mode(0o1777);
    kinds.dir("kinds/private").mode(0o700).owner(1000, 1000);
    kinds.file("kinds/private/secret", "hidden\n").mode(0o600).owner(1000, 1000);
    kinds.file("kinds/big-owner", "").owner(3_000_000, 4_000_000);
    // containerd takes times before the epoch for the epoch, so an oracle says nothing about them.
    kinds.file("kinds/old", "as old as can be").mtime(0, 0);
    kinds.file("kinds/exact", prose(3, 100_000)).mtime(MTIME, 987_654_321);
    kinds.symlink("kinds/relative", "empty");
    kinds.symlink("kinds/absolute", "/etc/passwd");
    kinds.symlink("kinds/dangling", "../nowhere");
    kinds.symlink("kinds/long-target", vec![b'x'; 300]);
    // As tar writes them, with the attributes of the file: containerd applies those of the last entry to the inode.
    kinds.hardlink("kinds/exact-too", "kinds/exact").mtime(MTIME, 987_654_321);
    kinds.hardlink("kinds/exact-three", "kinds/exact").mtime(MTIME, 987_654_321);
    kinds.add("kinds/null", Kind::Char(1, 3)).mode(0o666);
    kinds.add("kinds/disk", Kind::Block(7, 200)).mode(0o660).owner(0, 6);
    kinds.add("kinds/fifo", Kind::Fifo);
    kinds.file(b"kinds/latin-\xe9\xff", "a name that is not UTF-8");
    kinds.file("kinds/ein Name mit Umläuten und ☃", "UTF-8");
    kinds.file(format!("kinds/{}/{}", "d".repeat(120), "f".repeat(200)), "a long name in a directory nobody lists");
    kinds.file("kinds/attributes", "x").xattr("user.note", b"kept").xattr("user.binary", &[0, 1, 2, 255]);
    // VFS_CAP_REVISION_2, cap_net_bind_service permitted and effective
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    kinds.file("kinds/capable", "#!/bin/sh\n").mode(0o755).xattr("security.capability", &capability);
    kinds.dir("kinds/attributed").xattr("user.on-a-directory", b"too");

    let mut below = Layer::new();
    below.dir("stack").mode(0o750).owner(5, 6).mtime(MTIME - 5000, 0);
    for name in ["gone", "replaced", "kept"] {
        below.file(format!("stack/{name}"), format!("{name}, from below\n"));
    }
    below.dir("stack/opaque").mode(0o711);
    below.file("stack/opaque/invisible", "from below");
    below.dir("stack/gone-directory");
    below.file("stack/gone-directory/file", "from below");
    below.dir("stack/becomes-file");
    below.file("stack/becomes-directory", "from below");
    below.dir("implied").mode(0o1777).owner(7, 8).mtime(MTIME - 9000, 500);
    below.dir("implied/deeper").mode(0o2770).owner(9, 10);

    let mut above = Layer::new();
    above.dir("stack").mode(0o705).owner(11, 12).mtime(MTIME + 5000, 0);
    above.whiteout("stack/gone");
    above.whiteout("stack/gone-directory");
    above.file("stack/replaced", "from above\n");
    above.dir("stack/opaque").mode(0o755);
    above.opaque("stack/opaque");
    above.file("stack/opaque/visible", "from above");
    above.file("stack/becomes-file", "a file now");
    above.dir("stack/becomes-directory");
    above.file("stack/becomes-directory/inside", "from above");
    // Directories that this layer implies: two that are below, one that is nowhere.
    above.file("implied/deeper/file", "its parents are listed in another layer");
    above.file("nowhere/listed/file", "its parents are listed nowhere");
    above.hardlink("implied/deeper/link", "implied/deeper/file");

    Image::new(vec![busybox(), kinds, below, above])
}

fn join(dir: &str, name: &str) -> String {
    if dir.is_empty() { name.to_string() } else { format!("{dir}/{name}") }
}

struct Hashed<W> {
    inner: W,
    hasher: Hasher,
    size: u64,
}

impl<W: Write> Hashed<W> {
    fn new(inner: W) -> Hashed<W> {
        Hashed { inner, hasher: Hasher::new(), size: 0 }
    }
    fn finish(mut self) -> io::Result<(Digest, u64)> {
        self.inner.flush()?;
        Ok((self.hasher.finish(), self.size))
    }
}

impl<W: Write> Write for Hashed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        self.size += written as u64;
        Ok(written)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// ustar, with a PAX header before it for whatever ustar cannot say. Names that are not UTF-8 go as they are: PAX could not hold them.
fn write_entry(out: &mut impl Write, entry: &Entry) -> io::Result<()> {
    let (flag, link, content, device): (u8, &[u8], &[u8], (u32, u32)) = match &entry.kind {
        Kind::File(content) => (b'0', b"", content, (0, 0)),
        Kind::Hardlink(to) => (b'1', to, b"", (0, 0)),
        Kind::Symlink(to) => (b'2', to, b"", (0, 0)),
        Kind::Char(major, minor) => (b'3', b"", b"", (*major, *minor)),
        Kind::Block(major, minor) => (b'4', b"", b"", (*major, *minor)),
        Kind::Directory => (b'5', b"", b"", (0, 0)),
        Kind::Fifo => (b'6', b"", b"", (0, 0)),
    };
    let mut path = entry.path.clone();
    if entry.kind == Kind::Directory {
        path.push(b'/');
    }
    let mut pax = Vec::new();
    let mut record = |key: &str, value: &[u8]| {
        // The length counts itself.
        let body = key.len() + value.len() + 3;
        let mut length = body + 1;
        while length != body + length.to_string().len() {
            length = body + length.to_string().len();
        }
        pax.extend_from_slice(format!("{length} {key}=").as_bytes());
        pax.extend_from_slice(value);
        pax.push(b'\n');
    };
    if path.len() > 100 {
        record("path", &path);
    }
    if link.len() > 100 {
        record("linkpath", link);
    }
    for (key, id) in [("uid", entry.uid), ("gid", entry.gid)] {
        if id > 0o7_777_777 {
            record(key, id.to_string().as_bytes());
        }
    }
    let (seconds, nanoseconds) = entry.mtime;
    if nanoseconds != 0 || seconds < 0 {
        let sign = if seconds < 0 { "-" } else { "" };
        let fraction = if nanoseconds == 0 { String::new() } else { format!(".{nanoseconds:09}") };
        record("mtime", format!("{sign}{}{fraction}", seconds.unsigned_abs()).as_bytes());
    }
    for (name, value) in &entry.xattrs {
        record(&format!("SCHILY.xattr.{name}"), value);
    }
    if !pax.is_empty() {
        header(out, b"PaxHeaders.0/x", b'x', b"", 0o644, (0, 0), pax.len(), 0, (0, 0))?;
        padded(out, &pax)?;
    }
    let owner = (entry.uid & 0o7_777_777, entry.gid & 0o7_777_777);
    header(out, &path, flag, link, entry.mode, owner, content.len(), seconds.max(0), device)?;
    padded(out, content)
}

fn padded(out: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    out.write_all(bytes)?;
    out.write_all(&[0; 512][..bytes.len().next_multiple_of(512) - bytes.len()])
}

#[allow(clippy::too_many_arguments)] // they are the fields of the header
fn header(
    out: &mut impl Write,
    name: &[u8],
    flag: u8,
    link: &[u8],
    mode: u32,
    owner: (u32, u32),
    size: usize,
    mtime: i64,
    device: (u32, u32),
) -> io::Result<()> {
    let mut block = [0u8; 512];
    let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &name[..name.len().min(100)]);
    put(100, format!("{mode:07o}").as_bytes());
    put(108, format!("{:07o}", owner.0).as_bytes());
    put(116, format!("{:07o}", owner.1).as_bytes());
    put(124, format!("{size:011o}").as_bytes());
    put(136, format!("{mtime:011o}").as_bytes());
    put(148, b"        ");
    put(156, &[flag]);
    put(157, &link[..link.len().min(100)]);
    put(257, b"ustar\x0000");
    put(329, format!("{:07o}", device.0).as_bytes());
    put(337, format!("{:07o}", device.1).as_bytes());
    let sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    out.write_all(&block)
}
