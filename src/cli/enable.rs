//! `soci enable` and `soci disable`: tells containerd of the snapshotter, and takes that back.
//!
//! Where containerd's configuration imports a directory, the settings go there as a file of their own; otherwise, and where containerd would
//! replace a whole section by it instead of merging the two (1.x does), they go into the configuration itself, comments and all else untouched.
//! Which of the two it is, containerd decides: each candidate is shown to `containerd config dump` beside the real configuration first, and taken
//! only if what comes out is what is in effect now, plus what is wanted, and nothing else.
//!
//! What was changed is in [`JOURNAL`] beside the configuration, with the bytes from before, written first: `soci disable` puts them back. A file
//! that somebody has changed since is not put back but freed of our settings.
//!
//! containerd is never restarted from here: that is said, and left to whoever knows when.

use super::{
    args::{self, Target},
    node::{
        Node, NodeError,
        settings::{self, Scope, SettingsError, Wanted},
    },
    output,
};
use crate::oci::{Digest, Platform};
use serde::{Deserialize, Serialize};
use std::{
    fs,
    io::{self, Write},
    os::unix::fs::{MetadataExt, PermissionsExt, chown},
    path::{Path, PathBuf},
};

/// Beside containerd's configuration: what was changed.
const JOURNAL: &str = "soci-enable.json";
/// The file of our own in an imported directory. Late in the alphabet: the last file wins.
const DROP_IN: &str = "90-soci-snapshotter.toml";
/// Largest configuration that is worked with. containerd's own default has 10 KB.
const MAX_CONFIG: u64 = 1 << 20;
/// What the format of [`JOURNAL`] is called.
const FORMAT: u32 = 1;

/// Why containerd's configuration stays as it is.
#[derive(Debug, thiserror::Error)]
pub enum EnableError {
    #[error(transparent)]
    Node(#[from] NodeError),
    #[error("{}", path.display())]
    Settings { path: PathBuf, source: SettingsError },
    #[error("cannot read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("cannot write in {} what containerd is to look at", path.display())]
    Trial { path: PathBuf, source: io::Error },
    #[error("cannot write {}; nothing was changed that is not in {}", path.display(), journal.display())]
    Write { path: PathBuf, journal: PathBuf, source: io::Error },
    #[error("{} is not a record of soci enable that this version understands: {why}", path.display())]
    Journal { path: PathBuf, why: String },
    #[error(
        "with these settings in {} containerd would also change {}: nothing was written. Put them in by hand; README, \"Use it\", has them",
        path.display(), keys.join(", ")
    )]
    SideEffects { path: PathBuf, keys: Vec<String> },
    #[error(
        "{} imports a file that sets {}, and would overrule what is written here: take that out of it, and try again",
        path.display(), if keys.is_empty() { "some of this".to_owned() } else { keys.join(", ") }
    )]
    Overruled { path: PathBuf, keys: Vec<String> },
    #[error("{} was changed after soci enable wrote it: run soci disable {target}, which leaves those changes, and then this again", path.display())]
    Changed { path: PathBuf, target: &'static str },
    #[error("cannot print")]
    Print(#[source] io::Error),
}

/// One file, before and after. `None`: there is none.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Change {
    path: PathBuf,
    before: Option<String>,
    after: String,
}

/// The file [`JOURNAL`].
#[derive(Debug, Default, Serialize, Deserialize)]
struct Journal {
    format: u32,
    files: Vec<Entry>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Entry {
    path: PathBuf,
    /// Bytes from before the first change.
    before: Option<String>,
    /// Of what was written last.
    after: Digest,
}

/// `soci enable`, or with `--undo` and as `soci disable` the way back.
pub fn run(args: &args::Enable, undo: bool, global: &args::Global) -> Result<(), EnableError> {
    let scope = match args.target {
        Target::Docker => return say(&docker(args, global)),
        Target::K3s => return say(&k3s(args, global)),
        Target::Containerd => Scope::Containerd,
        Target::Cri => Scope::Cri,
    };
    let address = Path::new(global.address.trim_start_matches("unix://"));
    let node = Node::find(address, args.containerd.as_deref(), args.containerd_config.as_deref())?;
    if undo || args.undo {
        return disable(&node, args);
    }
    let wanted = wanted(args, global, scope);
    let found = format!("containerd {} with {}\n", node.version, node.config.display());
    if node.dump(&node.config)?.has(&wanted) {
        return say(&format!("{found}Everything is there already.\n"));
    }
    let change = plan(&node, &wanted)?;
    let shown = format!("{found}{}", diff(&change));
    if args.dry_run {
        return say(&format!("{shown}\nNothing was changed.\n"));
    }
    let mut journal = read_journal(&journal_of(&node))?;
    note(&mut journal, &change, args.target.name())?;
    write_journal(&node, &journal)?;
    put(&node, &change.path, &change.after)?;
    say(&format!("{shown}\n{}", next_step(&node, args.target)))
}

fn wanted(args: &args::Enable, global: &args::Global, scope: Scope) -> Wanted {
    Wanted {
        address: args.daemon.daemon.display().to_string(),
        root: global.root.display().to_string(),
        platform: Platform::host().to_string(),
        scope,
    }
}

fn say(text: &str) -> Result<(), EnableError> {
    io::stdout().lock().write_all(text.as_bytes()).map_err(EnableError::Print)
}

fn next_step(node: &Node, target: Target) -> String {
    let what = match target {
        Target::Cri => "Pods use the snapshotter for images that are pulled from then on.",
        _ => "Then, for example: ctr images pull --snapshotter soci IMAGE",
    };
    let running = if node.running.is_some() { "Restart containerd" } else { "Start containerd" };
    format!("{running} to make it take effect: systemctl restart containerd\n{what}\nsoci doctor checks the result.\n")
}

/// What to change: a drop-in if that does, else the configuration itself.
fn plan(node: &Node, wanted: &Wanted) -> Result<Change, EnableError> {
    let config = &node.config;
    let of = |path: &Path| {
        let path = path.to_owned();
        move |source| EnableError::Settings { path, source }
    };
    let before = read(config)?;
    let text = before.clone().unwrap_or_default();
    // 1.x knows neither exports nor the transfer service, and its parser complains of what it does not know.
    let is_second = node.major >= 2;
    let newest = if is_second { 3 } else { 2 };
    let in_effect = node.dump(config)?;
    let parent = config.parent().unwrap_or(Path::new("/"));
    if let Some(directory) = settings::imported_directories(&text, config).map_err(of(config))?.first() {
        let path = directory.join(DROP_IN);
        let version = settings::version(&text).map_err(of(config))?.unwrap_or(newest);
        let ours = read(&path)?;
        let after = settings::drop_in(version, wanted, is_second);
        if let Ok(after) = after
            && directory.is_dir()
        {
            // As the last of the files it imports.
            let imported = trial(directory, &after)?;
            let importing = settings::importing(&text, imported.path()).map_err(of(config))?;
            let dump = node.dump(trial(parent, &importing)?.path())?;
            let harmless = dump.side_effects(&in_effect, wanted, is_second).map_err(of(config))?.is_empty();
            if harmless && dump.has(wanted) {
                return Ok(Change { path, before: ours, after });
            }
        }
    }
    let after = settings::apply(&text, newest, wanted, is_second).map_err(of(config))?;
    let dump = node.dump(trial(parent, &after)?.path())?;
    let keys = dump.side_effects(&in_effect, wanted, is_second).map_err(of(config))?;
    match (dump.has(wanted), keys.is_empty()) {
        (true, true) => Ok(Change { path: config.clone(), before, after }),
        (true, false) => Err(EnableError::SideEffects { path: config.clone(), keys }),
        (false, _) => Err(EnableError::Overruled { path: config.clone(), keys }),
    }
}

/// A file for containerd to look at, gone when that is done. In `directory`, because imports may be relative to it; if there is none, anywhere.
fn trial(directory: &Path, text: &str) -> Result<tempfile::NamedTempFile, EnableError> {
    let directory = if directory.is_dir() { directory.to_owned() } else { std::env::temp_dir() };
    let attempt = || -> io::Result<tempfile::NamedTempFile> {
        // No pattern of imports matches it.
        let mut file = tempfile::Builder::new().prefix(".soci-enable-").tempfile_in(&directory)?;
        file.write_all(text.as_bytes())?;
        Ok(file)
    };
    attempt().map_err(|source| EnableError::Trial { path: directory.clone(), source })
}

fn beside(path: &Path, name: &str) -> PathBuf {
    path.parent().unwrap_or(Path::new("/")).join(name)
}

fn journal_of(node: &Node) -> PathBuf {
    beside(&node.config, JOURNAL)
}

/// A text file; `None` where there is none.
fn read(path: &Path) -> Result<Option<String>, EnableError> {
    use io::Read;
    let failed = |source| EnableError::Read { path: path.to_owned(), source };
    let file = match fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    let mut text = String::new();
    file.take(MAX_CONFIG + 1).read_to_string(&mut text).map_err(failed)?;
    match text.len() as u64 > MAX_CONFIG {
        true => Err(failed(io::Error::new(io::ErrorKind::FileTooLarge, format!("larger than {MAX_CONFIG} bytes")))),
        false => Ok(Some(text)),
    }
}

fn read_journal(path: &Path) -> Result<Journal, EnableError> {
    let bad = |why: String| EnableError::Journal { path: path.to_owned(), why };
    let Some(text) = read(path)? else { return Ok(Journal { format: FORMAT, files: Vec::new() }) };
    let journal: Journal = serde_json::from_str(&text).map_err(|e| bad(e.to_string()))?;
    match journal.format {
        FORMAT => Ok(journal),
        other => Err(bad(format!("it has format {other}"))),
    }
}

fn write_journal(node: &Node, journal: &Journal) -> Result<(), EnableError> {
    let path = journal_of(node);
    let failed = |source: serde_json::Error| EnableError::Write {
        path: path.clone(),
        journal: path.clone(),
        source: source.into(),
    };
    let text = serde_json::to_vec_pretty(journal).map_err(failed)?;
    put(node, &path, &String::from_utf8_lossy(&text))
}

/// Remembers the bytes from before the first change.
fn note(journal: &mut Journal, change: &Change, target: &'static str) -> Result<(), EnableError> {
    let after = Digest::of(change.after.as_bytes());
    let current = change.before.as_ref().map(|text| Digest::of(text.as_bytes()));
    match journal.files.iter_mut().find(|entry| entry.path == change.path) {
        // Written, and gone or as it was before since: nothing of ours is in it.
        Some(entry) if change.before == entry.before => entry.after = after,
        Some(entry) if current == Some(entry.after) => entry.after = after,
        Some(_) => return Err(EnableError::Changed { path: change.path.clone(), target }),
        None => journal.files.push(Entry { path: change.path.clone(), before: change.before.clone(), after }),
    }
    Ok(())
}

/// Replaces a file in one step, with the owner and mode of the one that was there. The text is on disk before it has the name.
fn put(node: &Node, path: &Path, text: &str) -> Result<(), EnableError> {
    let failed = |source| EnableError::Write { path: path.to_owned(), journal: journal_of(node), source };
    // A configuration may be a link to where it is kept; the link stays.
    let path = &fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let directory = path.parent().unwrap_or(Path::new("/"));
    let attempt = || -> io::Result<()> {
        fs::create_dir_all(directory)?;
        let mut file = tempfile::Builder::new().prefix(".soci-enable-").tempfile_in(directory)?;
        file.write_all(text.as_bytes())?;
        match fs::metadata(path) {
            Ok(old) => {
                fs::set_permissions(file.path(), fs::Permissions::from_mode(old.mode() & 0o7777))?;
                chown(file.path(), Some(old.uid()), Some(old.gid()))?;
            }
            Err(_) => fs::set_permissions(file.path(), fs::Permissions::from_mode(0o644))?,
        }
        file.as_file().sync_all()?;
        file.persist(path)?;
        fs::File::open(directory)?.sync_all()
    };
    attempt().map_err(failed)
}

fn disable(node: &Node, args: &args::Enable) -> Result<(), EnableError> {
    let path = journal_of(node);
    let journal = read_journal(&path)?;
    if journal.files.is_empty() {
        return say(&format!("soci enable has changed nothing beside {}.\n", node.config.display()));
    }
    let mut said = String::new();
    for entry in &journal.files {
        let current = read(&entry.path)?;
        let is_ours = current.as_ref().is_some_and(|text| Digest::of(text.as_bytes()) == entry.after);
        let (to, words) = match (&current, &entry.before) {
            (None, _) => (None, "is gone already"),
            (Some(_), before) if is_ours => (before.clone(), if before.is_some() { "is as it was" } else { "removed" }),
            (Some(text), _) => {
                let out = settings::take_out(text);
                let out = out.map_err(|source| EnableError::Settings { path: entry.path.clone(), source })?;
                (Some(out), "was changed since: only the settings of the snapshotter were taken out")
            }
        };
        if let (true, Some(before)) = (args.dry_run, &current) {
            let change =
                Change { path: entry.path.clone(), before: Some(before.clone()), after: to.unwrap_or_default() };
            said += &diff(&change);
            continue;
        }
        let failed = |source| EnableError::Write { path: entry.path.clone(), journal: path.clone(), source };
        match (&to, &current) {
            (Some(text), _) => put(node, &entry.path, text)?,
            (None, Some(_)) => fs::remove_file(&entry.path).map_err(failed)?,
            (None, None) => {}
        }
        said += &format!("{} {words}\n", entry.path.display());
    }
    if args.dry_run {
        return say(&format!("{said}\nNothing was changed.\n"));
    }
    // Last: whatever ended early above is found, and finished, by the next try.
    let removed = fs::remove_file(&path);
    removed.map_err(|source| EnableError::Write { path: path.clone(), journal: path.clone(), source })?;
    say(&format!("{said}Restart containerd to make it take effect: systemctl restart containerd\n"))
}

/// The change as lines with `+` and `-`, in their surroundings.
fn diff(change: &Change) -> String {
    let before: Vec<&str> = change.before.as_deref().unwrap_or_default().lines().collect();
    let after: Vec<&str> = change.after.lines().collect();
    let old = if change.before.is_some() { change.path.display().to_string() } else { "/dev/null".to_owned() };
    let mut out = format!("--- {old}\n+++ {}\n", change.path.display());
    out += &output::diff(&before, &after);
    out
}

fn docker(args: &args::Enable, global: &args::Global) -> String {
    let (socket, root) = (args.daemon.daemon.display(), global.root.display());
    format!(
        "Docker uses the snapshotter through containerd's image store (Docker 25 or newer).\n\n\
         1. The containerd that dockerd uses must know the snapshotter. With the system's containerd: soci enable containerd\n   \
            In another one's configuration (dockerd started its own: /var/run/docker/containerd/containerd.toml is written anew each time;\n   \
            give dockerd --containerd /run/containerd/containerd.sock instead):\n\n\
         [proxy_plugins.soci]\n  type = \"snapshot\"\n  address = \"{socket}\"\n  \
             capabilities = [\"remap-ids\", \"multi-remap-ids\"]\n  [proxy_plugins.soci.exports]\n    root = \"{root}\"\n    \
             enable_remote_snapshot_annotations = \"true\"\n\n\
         2. In /etc/docker/daemon.json:\n\n\
         {{\n  \"features\": {{ \"containerd-snapshotter\": true }},\n  \"storage-driver\": \"soci\"\n}}\n\n\
         3. systemctl restart containerd docker\n   docker info --format '{{{{.Driver}}}}' must print soci.\n\n\
         Images that Docker has pulled with another driver are not shown while this one is in use; they come back with it.\n\
         Nothing was changed.\n"
    )
}

fn k3s(args: &args::Enable, global: &args::Global) -> String {
    let (socket, root) = (args.daemon.daemon.display(), global.root.display());
    format!(
        "k3s runs a containerd of its own and writes its configuration at each start, from a template.\n\n\
         1. As /var/lib/rancher/k3s/agent/etc/containerd/config-v3.toml.tmpl (k3s with containerd 2; with 1.x: config.toml.tmpl):\n\n\
         {{{{ template \"base\" . }}}}\n\n\
         [proxy_plugins.soci]\n  type = \"snapshot\"\n  address = \"{socket}\"\n  \
             capabilities = [\"remap-ids\", \"multi-remap-ids\"]\n  [proxy_plugins.soci.exports]\n    root = \"{root}\"\n    \
             enable_remote_snapshot_annotations = \"true\"\n\n\
         2. In /etc/rancher/k3s/config.yaml:\n\n\
         snapshotter: soci\n\n\
         3. In the same template, so that the snapshotter hears of images. containerd 2: \n\n\
         [plugins.\"io.containerd.cri.v1.images\"]\n  disable_snapshot_annotations = false\n\n   \
            k3s' base template has that section already: there, copy what /var/lib/rancher/k3s/agent/etc/containerd/config.toml has into the template\n   \
            instead of the first line, and change the value in it. containerd 1.x: the same in [plugins.\"io.containerd.grpc.v1.cri\".containerd].\n\n\
         4. systemctl restart k3s (k3s-agent on agents)\n   \
            soci doctor --address /run/k3s/containerd/containerd.sock checks the result.\n\n\
         Nothing was changed.\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(before: Option<&str>, after: &str) -> Change {
        Change { path: "/c".into(), before: before.map(str::to_owned), after: after.to_owned() }
    }

    #[test]
    fn the_bytes_from_before_the_first_change_are_kept() {
        let mut journal = Journal::default();
        note(&mut journal, &change(Some("a"), "b"), "cri").unwrap();
        note(&mut journal, &change(Some("b"), "c"), "cri").unwrap();
        assert_eq!((journal.files.len(), journal.files[0].before.as_deref()), (1, Some("a")));
        assert_eq!(journal.files[0].after, Digest::of(b"c"));
    }

    #[test]
    fn what_somebody_changed_between_two_enables_is_not_lost_by_undoing_both() {
        let mut journal = Journal::default();
        note(&mut journal, &change(Some("a"), "b"), "cri").unwrap();
        let refused = note(&mut journal, &change(Some("b edited"), "c"), "cri").unwrap_err();
        assert!(refused.to_string().contains("soci disable cri"), "{refused}");
    }
}
