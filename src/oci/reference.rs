//! Image references as containerd writes them: `host/repository[:tag][@digest]`, nothing implied.

use super::Digest;
use std::{fmt, str::FromStr};

/// A fully written image reference.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Reference {
    /// Registry as named in the reference, with its port: `docker.io`, `localhost:5000`, `[::1]:5000`.
    pub host: String,
    /// Repository: lower-case path components.
    pub repository: String,
    pub tag: Option<String>,
    pub digest: Option<Digest>,
}

/// A reference that does not name an image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid image reference {text:?}: {why}")]
pub struct InvalidReference {
    text: String,
    why: &'static str,
}

impl Reference {
    /// As people write them and kubelet sends them: [`Reference::short`], and without a tag it is `latest`.
    pub fn familiar(text: &str) -> Result<Reference, InvalidReference> {
        let mut reference = Reference::short(text)?;
        if reference.tag.is_none() && reference.digest.is_none() {
            reference.tag = Some("latest".to_owned());
        }
        Ok(reference)
    }

    /// `ubuntu` is `docker.io/library/ubuntu`, `team/app` is on Docker Hub, too; a first component with a dot or a port, and `localhost`,
    /// is a registry.
    pub fn short(text: &str) -> Result<Reference, InvalidReference> {
        let (first, rest) = text.split_once('/').unwrap_or(("", text));
        let is_host =
            first == "localhost" || first.contains(['.', ':']) || first.chars().any(|c| c.is_ascii_uppercase());
        let full = match (is_host, first) {
            (true, "index.docker.io" | "docker.io") if !rest.contains('/') => format!("docker.io/library/{rest}"),
            (true, "index.docker.io") => format!("docker.io/{rest}"),
            (true, _) => text.to_owned(),
            (false, "") => format!("docker.io/library/{rest}"),
            (false, _) => format!("docker.io/{text}"),
        };
        full.parse()
    }

    /// `host/repository`, without tag and digest.
    pub fn locator(&self) -> String {
        format!("{}/{}", self.host, self.repository)
    }
}

impl FromStr for Reference {
    type Err = InvalidReference;

    fn from_str(text: &str) -> Result<Reference, InvalidReference> {
        let invalid = |why| InvalidReference { text: text.chars().take(300).collect(), why };
        let (host, rest) = text.split_once('/').ok_or_else(|| invalid("it has no registry host before the first /"))?;
        let host_ok = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | ':' | '[' | ']' | '_');
        if host.is_empty() || !host.chars().all(host_ok) {
            return Err(invalid("the registry host is not a host name"));
        }
        let (rest, digest) = match rest.split_once('@') {
            Some((rest, digest)) => {
                (rest, Some(digest.parse().map_err(|_| invalid("the part after @ is not a sha256 digest"))?))
            }
            None => (rest, None),
        };
        let (repository, tag) = match rest.rsplit_once(':') {
            Some((repository, tag)) if !tag.contains('/') => (repository, Some(tag)),
            _ => (rest, None),
        };
        let tag_ok = |t: &str| {
            !t.is_empty()
                && t.len() <= 128
                && !t.starts_with(['.', '-'])
                && t.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_'))
        };
        if !tag.is_none_or(tag_ok) {
            return Err(invalid("the tag has characters that tags cannot have"));
        }
        let component_ok = |c: &str| {
            c.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
                && c.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '.' | '-' | '_'))
        };
        if repository.len() > 255 || !repository.split('/').all(component_ok) {
            return Err(invalid("the repository is not a path of lower-case names"));
        }
        Ok(Reference { host: host.into(), repository: repository.into(), tag: tag.map(Into::into), digest })
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_round_trip() {
        let d = Digest::of(b"x");
        for text in ["docker.io/library/nginx:1.2", "localhost:5000/a", "[::1]:5000/a/b-c", &format!("h:1/a/b:t@{d}")] {
            assert_eq!(text.parse::<Reference>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_is_not_a_reference_is_refused() {
        for text in ["nginx", "/a", "h/", "h/A", "h/a:", "h/a@sha256:1", "h/../a", "h/a//b", "h ost/a", "h/a?x"] {
            assert!(text.parse::<Reference>().is_err(), "{text}");
        }
    }

    #[test]
    fn short_names_are_those_of_docker_hub() {
        for (text, full) in [
            ("ubuntu", "docker.io/library/ubuntu:latest"),
            ("team/app:1", "docker.io/team/app:1"),
            ("docker.io/ubuntu", "docker.io/library/ubuntu:latest"),
            ("index.docker.io/team/app", "docker.io/team/app:latest"),
            ("localhost/x", "localhost/x:latest"),
            ("r.example/x:2", "r.example/x:2"),
            ("localhost:5000/x", "localhost:5000/x:latest"),
        ] {
            assert_eq!(Reference::familiar(text).unwrap().to_string(), full, "{text}");
        }
        assert!(Reference::familiar("sha256:abc/../x y").is_err() && Reference::familiar("").is_err());
    }
}
