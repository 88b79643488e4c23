//! The file operations of the log, behind a trait so that a test can make each of them fail
//! at the worst moment.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::{io, mem};

/// Makes, finds and removes segment files.
pub(super) trait Disk: Send + Sync {
    /// Opens a file for reading and writing. With `create` it must not exist and is made.
    fn open(&self, path: &Path, create: bool) -> io::Result<Arc<dyn SegmentFile>>;
    /// Removes a file. That it is not there is no error.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Gives a file another name.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Makes the directory's entries durable: files created and removed.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;
    /// What is free for this process on the disk with this directory, in bytes.
    fn free_bytes(&self, dir: &Path) -> io::Result<u64>;
}

/// One open file of the log.
pub(super) trait SegmentFile: Send + Sync {
    /// Reads until `buffer` is full or the file ends; returns the bytes read.
    fn read_at(&self, buffer: &mut [u8], position: u64) -> io::Result<usize>;
    /// Writes all of `bytes`, or fails.
    fn write_all_at(&self, bytes: &[u8], position: u64) -> io::Result<()>;
    /// Makes what was written durable (`fdatasync`).
    fn sync_data(&self) -> io::Result<()>;
    /// Reserves `bytes` of disk from `position` on, so that a later write there cannot run out
    /// of space and is cheaper to make durable.
    fn allocate(&self, position: u64, bytes: u64) -> io::Result<()>;
    /// Cuts or extends the file.
    fn set_len(&self, bytes: u64) -> io::Result<()>;
    /// The file's length, in bytes.
    fn len(&self) -> io::Result<u64>;
    /// How many names the file has. One with several is also in a backup, and is not written over.
    fn link_count(&self) -> io::Result<u64> {
        Ok(1)
    }
}

/// The operating system's file system.
pub(super) struct FileSystem;

impl Disk for FileSystem {
    fn open(&self, path: &Path, create: bool) -> io::Result<Arc<dyn SegmentFile>> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).mode(0o600).create_new(create);
        Ok(Arc::new(options.open(path)?))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        match std::fs::remove_file(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        }
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        std::fs::rename(from, to)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        File::open(dir)?.sync_all()
    }

    fn free_bytes(&self, dir: &Path) -> io::Result<u64> {
        free_bytes(dir)
    }
}

/// What is free for this process on the disk with this directory, in bytes.
///
/// # Errors
/// The operating system's.
pub(crate) fn free_bytes(dir: &Path) -> io::Result<u64> {
    disk_room(dir).map(|(free, _)| free)
}

/// What is free for this process on the disk with this directory, and how large that is, in bytes.
///
/// # Errors
/// The operating system's.
pub(crate) fn disk_room(dir: &Path) -> io::Result<(u64, u64)> {
    let path = CString::new(dir.as_os_str().as_bytes())?;
    // SAFETY: all zeros is a valid `statvfs`; the call reads `path` and writes `stat` while both live.
    let (result, stat) = unsafe {
        let mut stat: libc::statvfs = mem::zeroed();
        (libc::statvfs(path.as_ptr(), &raw mut stat), stat)
    };
    match result {
        0 => Ok((stat.f_bavail.saturating_mul(stat.f_frsize), stat.f_blocks.saturating_mul(stat.f_frsize))),
        _ => Err(io::Error::last_os_error()),
    }
}

impl SegmentFile for File {
    fn read_at(&self, buffer: &mut [u8], position: u64) -> io::Result<usize> {
        let mut read = 0;
        while read < buffer.len() {
            match FileExt::read_at(self, &mut buffer[read..], position + read as u64) {
                Ok(0) => break,
                Ok(n) => read += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(read)
    }

    fn write_all_at(&self, bytes: &[u8], position: u64) -> io::Result<()> {
        FileExt::write_all_at(self, bytes, position)
    }

    fn sync_data(&self) -> io::Result<()> {
        File::sync_data(self)
    }

    fn allocate(&self, position: u64, bytes: u64) -> io::Result<()> {
        let range = |n: u64| libc::off_t::try_from(n).map_err(io::Error::other);
        // SAFETY: the descriptor is open for as long as `self` lives; the call touches no memory.
        let result = unsafe { libc::fallocate(self.as_raw_fd(), 0, range(position)?, range(bytes)?) };
        if result == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            // Without preallocation in the file system, the write itself takes the room or fails.
            Some(libc::EOPNOTSUPP | libc::ENOSYS) => Ok(()),
            _ => Err(error),
        }
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        File::set_len(self, bytes)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn link_count(&self) -> io::Result<u64> {
        Ok(self.metadata()?.nlink())
    }
}
