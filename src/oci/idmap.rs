//! Owners in a user namespace: the OCI runtime specification's `uidMappings` and `gidMappings`, as containerd's snapshot labels spell them.

use serde::{Deserialize, Serialize};
use std::{borrow::Cow, fmt, str::FromStr};

/// What the kernel takes (user_namespaces(7)).
const MAX_RANGES: usize = 340;
/// Shown for an owner that the container's namespace does not have; chown(2) reads it as "leave it", so it can be nobody's id.
const NOBODY: u32 = u32::MAX;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Range {
    container: u32,
    host: u32,
    len: u32,
}

/// Ids that a container sees, and what they are outside: `container:host:length`, comma-separated.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct IdMap(Vec<Range>);

/// The text is no id mapping.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no id mapping: {why}")]
pub struct InvalidIdMap {
    text: String,
    why: &'static str,
}

impl FromStr for IdMap {
    type Err = InvalidIdMap;

    fn from_str(text: &str) -> Result<IdMap, InvalidIdMap> {
        let invalid = |why| InvalidIdMap { text: text.chars().take(200).collect(), why };
        let mut ranges: Vec<Range> = Vec::new();
        for part in text.split(',') {
            let numbers: Option<Vec<u32>> = part.split(':').map(|number| number.parse().ok()).collect();
            let Some(&[container, host, len]) = numbers.as_deref() else {
                return Err(invalid("want container-id:host-id:length, comma-separated"));
            };
            let (Some(last), Some(last_host)) = (ends(container, len), ends(host, len)) else {
                return Err(invalid("a length is zero or leads past the last id, 4294967294"));
            };
            let overlaps = |r: &Range| {
                container <= r.container + (r.len - 1) && r.container <= last
                    || host <= r.host + (r.len - 1) && r.host <= last_host
            };
            if ranges.iter().any(overlaps) {
                return Err(invalid("two ranges overlap"));
            }
            if ranges.len() == MAX_RANGES {
                return Err(invalid("more than 340 ranges"));
            }
            ranges.push(Range { container, host, len });
        }
        Ok(IdMap(ranges))
    }
}

/// The last id of a range.
fn ends(first: u32, len: u32) -> Option<u32> {
    first.checked_add(len.checked_sub(1)?).filter(|last| *last != NOBODY)
}

impl fmt::Display for IdMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, Range { container, host, len }) in self.0.iter().enumerate() {
            write!(f, "{}{container}:{host}:{len}", if n == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

impl IdMap {
    fn host(&self, id: u32) -> Option<u32> {
        let range = self.0.iter().find(|r| id.checked_sub(r.container).is_some_and(|offset| offset < r.len))?;
        Some(range.host + (id - range.container))
    }
}

/// A user namespace's mappings of users and of groups. As text, and in JSON, both with a semicolon between them.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct IdMaps {
    uids: IdMap,
    gids: IdMap,
}

impl IdMaps {
    /// From the two labels.
    pub fn new(uids: &str, gids: &str) -> Result<IdMaps, InvalidIdMap> {
        Ok(IdMaps { uids: uids.parse()?, gids: gids.parse()? })
    }

    /// The owner outside of what the container sees as `uid`:`gid`, if it has one.
    pub fn host(&self, uid: u32, gid: u32) -> Option<(u32, u32)> {
        Some((self.uids.host(uid)?, self.gids.host(gid)?))
    }

    /// The same, with 4294967295 for what the container does not have.
    pub fn host_or_nobody(&self, uid: u32, gid: u32) -> (u32, u32) {
        (self.uids.host(uid).unwrap_or(NOBODY), self.gids.host(gid).unwrap_or(NOBODY))
    }

    /// A `security.capability` for this namespace: version 2 counts only outside of user namespaces, version 3 names the namespace by
    /// its root (capabilities(7), linux/capability.h). Anything else stays what it is.
    pub fn file_capabilities<'a>(&self, value: &'a [u8]) -> Cow<'a, [u8]> {
        const REVISION_2: u32 = 0x0200_0000;
        const REVISION_3: u32 = 0x0300_0000;
        const FLAGS: u32 = 0x00ff_ffff;
        let (Ok(value), Some(root)) = (<&[u8; 20]>::try_from(value), self.uids.host(0)) else {
            return Cow::Borrowed(value);
        };
        let magic = u32::from_le_bytes([value[0], value[1], value[2], value[3]]);
        if magic & !FLAGS != REVISION_2 {
            return Cow::Borrowed(value);
        }
        let magic = REVISION_3 | magic & FLAGS;
        Cow::Owned([&magic.to_le_bytes(), &value[4..], &root.to_le_bytes()].concat())
    }
}

impl fmt::Display for IdMaps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{};{}", self.uids, self.gids)
    }
}

impl FromStr for IdMaps {
    type Err = InvalidIdMap;

    fn from_str(text: &str) -> Result<IdMaps, InvalidIdMap> {
        let (uids, gids) = text.split_once(';').unwrap_or((text, ""));
        IdMaps::new(uids, gids)
    }
}

impl TryFrom<String> for IdMaps {
    type Error = InvalidIdMap;

    fn try_from(text: String) -> Result<IdMaps, InvalidIdMap> {
        text.parse()
    }
}

impl From<IdMaps> for String {
    fn from(maps: IdMaps) -> String {
        maps.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_in_every_range_are_mapped_and_no_others() {
        let maps = IdMaps::new("0:12345:1000,1000:22222:1", "0:12345:1001").unwrap();
        assert_eq!(maps.host(0, 0), Some((12345, 12345)));
        assert_eq!(maps.host(999, 1000), Some((13344, 13345)));
        assert_eq!(maps.host(1000, 0), Some((22222, 12345)));
        assert_eq!(maps.host(1001, 0), None);
        assert_eq!(maps.host_or_nobody(1001, 5000), (NOBODY, NOBODY));
        assert_eq!(maps.to_string().parse::<IdMaps>(), Ok(maps.clone()));
        assert_eq!(serde_json::from_str::<IdMaps>(&serde_json::to_string(&maps).unwrap()).unwrap(), maps);
    }

    #[test]
    fn what_is_no_mapping_is_refused() {
        for text in [
            "",
            "0",
            "0:1",
            "0:1:2:3",
            "a:1:2",
            "0:1:0",
            "-1:1:1",
            "0:4294967295:1",
            "1:4294967294:2",
            "4294967296:0:1",
            "0:100:10,5:200:10",
            "0:100:10,50:105:10",
            "0:1:1,",
        ] {
            assert!(IdMaps::new(text, "0:0:1").is_err(), "{text:?}");
            assert!(IdMaps::new("0:0:1", text).is_err(), "{text:?}");
        }
        let many: Vec<String> = (0..341).map(|n| format!("{n}:{n}:1")).collect();
        assert!(IdMaps::new(&many.join(","), "0:0:1").unwrap_err().to_string().contains("340"));
        assert!(IdMaps::new("0:0:4294967295", "0:0:1").is_ok());
    }

    #[test]
    fn file_capabilities_name_the_root_of_the_namespace() {
        let maps = IdMaps::new("0:0x3039:1", "0:0:1").err();
        assert!(maps.is_some(), "numbers are decimal");
        let maps = IdMaps::new("0:12345:1", "0:0:1").unwrap();
        let mut version_2 = [0u8; 20];
        version_2[..8].copy_from_slice(&[1, 0, 0, 2, 0, 0x20, 0, 0]);
        let version_3 = maps.file_capabilities(&version_2);
        assert_eq!(version_3[..8], [1, 0, 0, 3, 0, 0x20, 0, 0]);
        assert_eq!(version_3[20..], 12345u32.to_le_bytes());
        assert_eq!(maps.file_capabilities(&version_3).as_ref(), version_3.as_ref(), "only once");
        assert_eq!(maps.file_capabilities(b"junk").as_ref(), b"junk");
    }
}
