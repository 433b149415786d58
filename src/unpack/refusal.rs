//! Why a tar is not unpacked, in words and as a byte of a fixed-size message.

use crate::tar::TarError;

/// What is wrong with an entry of a tar. Trying again would end the same way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The detail is the tar reader's own message.
    #[error("it is not a tar that can be read")]
    NotATar,
    #[error("it ends in the middle")]
    Truncated,
    #[error("a sparse entry")]
    Sparse,
    #[error("a type of entry that nobody can unpack")]
    Unsupported,
    #[error("a name with a '..' in it")]
    DotDot,
    #[error("no name, or that of the root, for something that is not a directory")]
    NamesRoot,
    #[error("a name longer than 4095 bytes, or a part of one longer than 255")]
    NameTooLong,
    #[error("a name that leads through a symlink or a file of the same layer")]
    ThroughNonDirectory,
    #[error("a hard link to something that is not a file of the same layer before it")]
    LinkTarget,
    #[error("a hard link with more names than the filesystem gives to one file")]
    TooManyLinks,
    #[error("a symlink whose target is empty or longer than 4095 bytes")]
    SymlinkTarget,
    #[error("a whiteout that hides no possible name")]
    Whiteout,
    #[error("an owner that no file can have")]
    Owner,
    #[error("a device number that no device can have")]
    Device,
    #[error("extended attributes that this filesystem cannot hold")]
    Xattr,
    #[error("more bytes than the layer may unpack to")]
    TooManyBytes,
    #[error("more files than the layer may unpack to")]
    TooManyInodes,
    #[error("more directories than there is memory for")]
    TooManyDirectories,
}

impl Refusal {
    /// All of them; a place in this list is a number in messages.
    pub const ALL: [Refusal; 18] = [
        Refusal::NotATar,
        Refusal::Truncated,
        Refusal::Sparse,
        Refusal::Unsupported,
        Refusal::DotDot,
        Refusal::NamesRoot,
        Refusal::NameTooLong,
        Refusal::ThroughNonDirectory,
        Refusal::LinkTarget,
        Refusal::TooManyLinks,
        Refusal::SymlinkTarget,
        Refusal::Whiteout,
        Refusal::Owner,
        Refusal::Device,
        Refusal::Xattr,
        Refusal::TooManyBytes,
        Refusal::TooManyInodes,
        Refusal::TooManyDirectories,
    ];

    /// Its number.
    pub fn code(self) -> u8 {
        // The list is shorter than 256, so the fallback is never taken; it would be a number of no refusal.
        Refusal::ALL.iter().position(|r| *r == self).and_then(|at| u8::try_from(at).ok()).unwrap_or(u8::MAX)
    }

    /// The refusal with that number.
    pub fn from_code(code: u8) -> Option<Refusal> {
        Refusal::ALL.get(usize::from(code)).copied()
    }
}

impl From<&TarError> for Refusal {
    fn from(error: &TarError) -> Refusal {
        match error {
            TarError::Header { .. } | TarError::Region(_) => Refusal::NotATar,
            TarError::Truncated(_) => Refusal::Truncated,
            TarError::Sparse { .. } => Refusal::Sparse,
            TarError::Unsupported { .. } => Refusal::Unsupported,
        }
    }
}

/// Where it happened: the beginning of an entry's name, or of a message. Bytes from a stranger's tar, escaped when shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Detail(Box<[u8]>);

impl Detail {
    /// Enough to find the entry; what is longer is cut.
    pub const MAX: usize = 200;

    pub fn new(text: &[u8]) -> Detail {
        Detail(text[..text.len().min(Detail::MAX)].into())
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl std::fmt::Display for Detail {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "\"{}\"", self.as_bytes().escape_ascii())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_refusal_has_a_number_of_its_own() {
        for (at, refusal) in Refusal::ALL.into_iter().enumerate() {
            assert_eq!(usize::from(refusal.code()), at);
            assert_eq!(Refusal::from_code(refusal.code()), Some(refusal));
        }
        assert_eq!(Refusal::from_code(Refusal::ALL.len() as u8), None);
    }

    #[test]
    fn details_are_cut_and_shown_without_control_characters() {
        assert_eq!(Detail::new(&[b'x'; 500]).as_bytes().len(), Detail::MAX);
        assert_eq!(Detail::new(b"a\x1b[2J\xff\n").to_string(), r#""a\x1b[2J\xff\n""#);
    }
}
