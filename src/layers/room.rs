//! Room on the disk, the last of which is for others than us: for indexes and records of layers to come, without which no other image could be
//! made lazy, and for what containers write. What can be fetched or inflated again never takes it.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    os::unix::fs::MetadataExt,
    sync::{Mutex, MutexGuard, PoisonError},
};

/// What fetched data leaves. Of a small disk, a part.
const RESERVE: u64 = 32 << 20;
const RESERVE_PART: u64 = 64;
/// What is inflated leaves so many times as much: fetched data, which saves more, is kept longer.
const INFLATED: u64 = 2;

/// The sum of all claims, by filesystem. Locked for moments only.
static CLAIMED: Mutex<BTreeMap<u64, u64>> = Mutex::new(BTreeMap::new());

/// Room for what is being written. Several writers that looked at what is free, each for itself, would all see the same room, and take together
/// what none of them may take.
#[derive(Debug)]
pub struct Claim {
    filesystem: u64,
    bytes: u64,
}

impl Claim {
    /// Room for fetched bytes on the filesystem of `file`; [`io::ErrorKind::StorageFull`] where it would be the last.
    pub fn for_fetched(file: &File, bytes: u64) -> io::Result<Claim> {
        Claim::leaving(file, bytes, 1)
    }

    /// The same for bytes that were inflated from fetched ones.
    pub fn for_inflated(file: &File, bytes: u64) -> io::Result<Claim> {
        Claim::leaving(file, bytes, INFLATED)
    }

    fn leaving(file: &File, bytes: u64, reserves: u64) -> io::Result<Claim> {
        let filesystem = file.metadata()?.dev();
        let mut claimed = claimed();
        let stat = rustix::fs::fstatvfs(file)?;
        let reserve = RESERVE.min(stat.f_blocks.saturating_mul(stat.f_frsize) / RESERVE_PART);
        // What others claim is in the sum, or written and no longer free, or both for a moment.
        let sum = claimed.entry(filesystem).or_default();
        let needed = sum.saturating_add(bytes).saturating_add(reserve * reserves);
        if stat.f_bavail.saturating_mul(stat.f_frsize) < needed {
            return Err(io::ErrorKind::StorageFull.into());
        }
        *sum += bytes;
        Ok(Claim { filesystem, bytes })
    }

    /// So many bytes of it were written: the filesystem itself counts them now.
    pub fn spend(&mut self, bytes: u64) {
        let spent = bytes.min(self.bytes);
        self.bytes -= spent;
        if let Some(sum) = claimed().get_mut(&self.filesystem) {
            *sum -= spent;
        }
    }
}

fn claimed() -> MutexGuard<'static, BTreeMap<u64, u64>> {
    CLAIMED.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.spend(self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_that_one_writer_claims_is_not_there_for_another() {
        let home = tempfile::tempdir().unwrap();
        let file = File::create(home.path().join("file")).unwrap();
        let stat = rustix::fs::fstatvfs(&file).unwrap();
        // Others write to this disk, too.
        let most = stat.f_bavail * stat.f_frsize / 3 * 2;
        let mut first = Claim::for_fetched(&file, most).unwrap();
        assert_eq!(Claim::for_fetched(&file, most).unwrap_err().kind(), io::ErrorKind::StorageFull);
        first.spend(most - 1);
        Claim::for_inflated(&file, most)
            .expect("what was refused claims nothing; what was spent is the filesystem's to count");
        drop(first);
        Claim::for_fetched(&file, most).unwrap();
    }
}
