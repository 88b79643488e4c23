//! The pace of a backup: what it leaves of the disk and the processors to those who wait for acknowledgements.
//!
//! A sync of the log waits for what the disk is doing, so a backup gives the disk little at a time, has it written before it
//! goes on, and rests for several times as long as that took: where the disk or the processors are busy, a piece takes
//! longer, and so does the rest. It does not flush the disk's cache after each piece, which the log would wait for too; what
//! is complete is synced once, at its end.

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use crate::limits::{BACKUP_PACED_BYTES, BACKUP_SYNC_BYTES};

/// How many times as long as a piece took the backup rests after it.
const REST_TIMES: u32 = 3;
/// The longest rest: a backup that is to end does so after it.
const REST_MAX: Duration = Duration::from_millis(250);

/// How fast a backup is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackupPace {
    /// In pieces with rests between them.
    Paced,
    /// As fast as the disk allows: nobody waits for an acknowledgement, or that does not matter.
    Fast,
}

/// The pace of a backup that is being made.
pub(super) struct CopyPace {
    pace: BackupPace,
    /// When the present piece was begun.
    begun: Cell<Instant>,
}

impl CopyPace {
    pub(super) fn new(pace: BackupPace) -> Self {
        Self { pace, begun: Cell::new(Instant::now()) }
    }

    /// Bytes that are read or written at a time.
    pub(super) fn piece_bytes(&self) -> usize {
        match self.pace {
            BackupPace::Paced => BACKUP_PACED_BYTES,
            BackupPace::Fast => BACKUP_SYNC_BYTES,
        }
    }

    /// Rests after a piece.
    pub(super) fn rest(&self) {
        if self.pace == BackupPace::Paced {
            std::thread::sleep((self.begun.get().elapsed() * REST_TIMES).min(REST_MAX));
        }
        self.begun.set(Instant::now());
    }
}

/// Has the disk write what is in memory of a file from `position` on, and waits for that; neither the file's length nor the
/// disk's own cache is made durable by it.
///
/// # Errors
/// The operating system's.
pub(super) fn write_out(file: &File, position: u64) -> io::Result<()> {
    let position = libc::off64_t::try_from(position).map_err(io::Error::other)?;
    let flags =
        libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    // SAFETY: the descriptor is open for as long as `file` lives; the call touches no memory. 0 stands for the file's end.
    match unsafe { libc::sync_file_range(file.as_raw_fd(), position, 0, flags) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Tells the system that nobody will soon read a file that is written out, so that it pushes nothing out of memory that
/// somebody does.
pub(super) fn forget_pages(file: &File) {
    // SAFETY: as above. It is advice, which may be refused.
    unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rest_is_as_long_as_the_piece_took_several_times_over_and_bounded() {
        let pace = CopyPace::new(BackupPace::Paced);
        for (worked, least, most) in [(20, 60, 10_000), (1_000, 250, 10_000)] {
            pace.begun
                .set(Instant::now().checked_sub(Duration::from_millis(worked)).expect("later than boot"));
            let began = Instant::now();
            pace.rest();
            let rested = began.elapsed();
            assert!(
                rested >= Duration::from_millis(least) && rested < Duration::from_millis(most),
                "{rested:?}"
            );
        }
        let fast = CopyPace::new(BackupPace::Fast);
        fast.begun.set(Instant::now().checked_sub(Duration::from_secs(1)).expect("later than boot"));
        let began = Instant::now();
        fast.rest();
        assert!(began.elapsed() < Duration::from_millis(250));
    }
}
