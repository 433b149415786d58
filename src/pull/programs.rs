//! Programs of the operator's that decompress layers (`decompress_streams`): checked once, at start, run without a shell.

use std::{
    collections::BTreeMap,
    io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

/// What the Go daemon does not accept in such a path.
const UNSAFE: &str = "#%{}\\|;&$<>";

/// A program that decompresses from its standard input to its standard output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// Symlinks resolved.
    pub path: PathBuf,
    pub args: Vec<String>,
}

/// Programs by what they decompress.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Programs {
    pub gzip: Option<Program>,
    pub zstd: Option<Program>,
}

/// Why a program cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    #[error("the path {path:?} of the {name} decompressor has the character {found:?}, which is not allowed")]
    Character { name: String, path: String, found: char },
    #[error("the path {path:?} of the {name} decompressor must be absolute")]
    Relative { name: String, path: String },
    #[error("the {name} decompressor {path:?} cannot be found")]
    Missing { name: String, path: String, source: io::Error },
    #[error("the {name} decompressor {path:?} is not a file")]
    NotAFile { name: String, path: String },
    #[error("the {name} decompressor {path:?} is not executable")]
    NotExecutable { name: String, path: String },
}

impl Programs {
    /// Checks what the configuration names: `gzip`, `zstd`; other names are checked and not used.
    pub fn check(named: &BTreeMap<String, (String, Vec<String>)>) -> Result<Programs, ProgramError> {
        let mut programs = Programs::default();
        for (name, (path, args)) in named {
            let program = Program { path: resolve(name, path)?, args: args.clone() };
            match name.as_str() {
                "gzip" => programs.gzip = Some(program),
                "zstd" => programs.zstd = Some(program),
                _ => {}
            }
        }
        Ok(programs)
    }

    /// The program for a layer of this media type.
    pub fn of(&self, media_type: &str) -> Option<&Program> {
        match media_type {
            "application/vnd.oci.image.layer.v1.tar+gzip" | "application/vnd.docker.image.rootfs.diff.tar.gzip" => {
                self.gzip.as_ref()
            }
            "application/vnd.oci.image.layer.v1.tar+zstd" => self.zstd.as_ref(),
            _ => None,
        }
    }
}

fn resolve(name: &str, path: &str) -> Result<PathBuf, ProgramError> {
    let (name, path) = (name.to_owned(), path.to_owned());
    if let Some(found) = path.chars().find(|c| UNSAFE.contains(*c)) {
        return Err(ProgramError::Character { name, path, found });
    }
    if !Path::new(&path).is_absolute() {
        return Err(ProgramError::Relative { name, path });
    }
    let found = std::fs::canonicalize(&path).and_then(|real| Ok((std::fs::metadata(&real)?, real)));
    let (metadata, real) = match found {
        Ok(found) => found,
        Err(source) => return Err(ProgramError::Missing { name, path, source }),
    };
    if !metadata.is_file() {
        return Err(ProgramError::NotAFile { name, path });
    }
    if metadata.permissions().mode() & 0o111 == 0 {
        return Err(ProgramError::NotExecutable { name, path });
    }
    Ok(real)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(name: &str, path: &str) -> Result<Programs, ProgramError> {
        Programs::check(&BTreeMap::from([(name.to_owned(), (path.to_owned(), vec!["-d".to_owned()]))]))
    }

    #[test]
    fn programs_are_found_by_media_type() {
        let docker = "application/vnd.docker.image.rootfs.diff.tar.gzip";
        let (gzip, zstd) =
            ("application/vnd.oci.image.layer.v1.tar+gzip", "application/vnd.oci.image.layer.v1.tar+zstd");
        let programs = check("gzip", "/bin/cat").unwrap();
        assert!(programs.of(gzip).is_some() && programs.of(docker).is_some());
        assert!(programs.of(zstd).is_none() && programs.of("application/vnd.oci.image.layer.v1.tar").is_none());
        let programs = check("zstd", "/bin/cat").unwrap();
        assert!(programs.of(gzip).is_none() && programs.of(zstd).is_some());
        assert_eq!(check("xz", "/bin/cat").unwrap(), Programs::default());
        assert_eq!(Programs::check(&BTreeMap::new()).unwrap(), Programs::default());
    }

    #[test]
    fn links_are_resolved_and_whatever_cannot_be_run_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name).display().to_string();
        std::os::unix::fs::symlink("/bin/cat", at("link")).unwrap();
        std::os::unix::fs::symlink("/nowhere", at("dangling")).unwrap();
        std::fs::write(at("plain"), "").unwrap();
        let real = std::fs::canonicalize("/bin/cat").unwrap();
        assert_eq!(check("gzip", &at("link")).unwrap().gzip.unwrap().path, real);
        assert!(matches!(check("gzip", &at("dangling")), Err(ProgramError::Missing { .. })));
        assert!(matches!(check("gzip", &at("missing")), Err(ProgramError::Missing { .. })));
        assert!(matches!(check("gzip", "/tmp"), Err(ProgramError::NotAFile { .. })));
        assert!(matches!(check("gzip", &at("plain")), Err(ProgramError::NotExecutable { .. })));
        assert!(matches!(check("gzip", "cat"), Err(ProgramError::Relative { .. })));
        for bad in UNSAFE.chars() {
            assert!(matches!(check("gzip", &format!("/bin/{bad}cat")), Err(ProgramError::Character { .. })), "{bad}");
        }
    }
}
