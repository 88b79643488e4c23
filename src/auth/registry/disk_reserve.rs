//! The disk reserve: a small file beside `registry.db` whose room on the disk is given up, piece by piece, when
//! the end of a key cannot be written because the disk is full. So whoever fills the disk cannot keep its key
//! alive by that. The file is made whole again once there is room for others too.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::limits::{REGISTRY_RESERVE_BYTES, REGISTRY_RESERVE_STEP_BYTES};

/// The file's name in the data directory.
const RESERVE_FILE_NAME: &str = "registry.reserve";
/// The size of a block in `stat(2)`'s count of blocks.
const STAT_BLOCK_BYTES: u64 = 512;

/// Room on the disk that is kept for the registry.
#[derive(Debug)]
pub(super) struct DiskReserve {
    path: PathBuf,
}

impl DiskReserve {
    /// Takes the reserve in `dir`, if there is room for it. A gateway without it works as well, but on a full disk
    /// the end of a key has to wait for room.
    pub(super) fn open(dir: &Path) -> Self {
        let reserve = Self { path: dir.join(RESERVE_FILE_NAME) };
        if let Err(error) = reserve.fill() {
            tracing::warn!(%error, path = %reserve.path.display(), "there is no room for the registry's reserve");
        }
        reserve
    }

    /// Gives up the next piece. Returns `false` if nothing is left.
    pub(super) fn release(&self) -> bool {
        let released = OpenOptions::new().write(true).open(&self.path).and_then(|file| {
            let bytes = file.metadata()?.len();
            file.set_len(bytes.saturating_sub(REGISTRY_RESERVE_STEP_BYTES))?;
            Ok(bytes > 0)
        });
        released.unwrap_or(false)
    }

    /// Makes the reserve whole again, if as much would be left for others. A failure changes nothing: the next
    /// call tries again.
    pub(super) fn take_again(&self) {
        let held = std::fs::metadata(&self.path).map_or(0, |file| held_bytes(&file));
        let lacking = REGISTRY_RESERVE_BYTES.saturating_sub(held);
        if lacking > 0 && free_bytes(&self.path).is_some_and(|free| free >= lacking + REGISTRY_RESERVE_BYTES)
        {
            match self.fill() {
                Ok(()) => {
                    tracing::info!(path = %self.path.display(), "the registry's reserve is whole again")
                }
                Err(error) => tracing::debug!(%error, "the registry's reserve cannot be taken yet"),
            }
        }
    }

    /// Allocates the whole file: a sparse one would reserve nothing.
    fn fill(&self) -> io::Result<()> {
        let file =
            OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&self.path)?;
        let before = file.metadata()?;
        if held_bytes(&before) >= REGISTRY_RESERVE_BYTES && before.len() >= REGISTRY_RESERVE_BYTES {
            return Ok(());
        }
        if let Err(error) = allocate(&file, REGISTRY_RESERVE_BYTES) {
            // Some file systems keep what they have allocated before they failed.
            let _ = file.set_len(before.len());
            return Err(error);
        }
        file.sync_all()
    }
}

/// The bytes of a file that take up room on the disk.
fn held_bytes(file: &std::fs::Metadata) -> u64 {
    file.len().min(file.blocks() * STAT_BLOCK_BYTES)
}

fn allocate(file: &File, bytes: u64) -> io::Result<()> {
    let bytes = libc::off_t::try_from(bytes).map_err(io::Error::other)?;
    // SAFETY: the descriptor is open as long as `file` is borrowed.
    match unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, bytes) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// The bytes that this process may still allocate on the disk of a path.
#[allow(clippy::useless_conversion, reason = "some systems have narrower numbers")]
fn free_bytes(path: &Path) -> Option<u64> {
    let dir = std::ffi::CString::new(path.parent()?.as_os_str().as_encoded_bytes()).ok()?;
    // SAFETY: an all-zero `statvfs` is valid, and both pointers are good for the call.
    let stats = unsafe {
        let mut stats: libc::statvfs = std::mem::zeroed();
        if libc::statvfs(dir.as_ptr(), &raw mut stats) != 0 {
            return None;
        }
        stats
    };
    Some(stats.f_bavail.saturating_mul(stats.f_frsize))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_reserve_is_allocated_and_private_and_given_up_piece_by_piece() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let reserve = DiskReserve::open(dir.path());
        let file = || std::fs::metadata(dir.path().join(RESERVE_FILE_NAME)).expect("exists");
        assert_eq!(held_bytes(&file()), REGISTRY_RESERVE_BYTES);
        assert_eq!(file().permissions().mode() & 0o777, 0o600);
        for left in (0..REGISTRY_RESERVE_BYTES / REGISTRY_RESERVE_STEP_BYTES).rev() {
            assert!(reserve.release());
            assert_eq!(held_bytes(&file()), left * REGISTRY_RESERVE_STEP_BYTES);
        }
        assert!(!reserve.release(), "nothing is left");
        reserve.take_again();
        assert_eq!(held_bytes(&file()), REGISTRY_RESERVE_BYTES);
        std::fs::remove_file(&reserve.path).expect("removed");
        assert!(!reserve.release(), "somebody removed it");
        reserve.take_again();
        assert_eq!(held_bytes(&file()), REGISTRY_RESERVE_BYTES);
    }
}
