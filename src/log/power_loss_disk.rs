//! A disk for model tests: it can be full, its syncs can fail, and it can lose what was not synced.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use super::disk::{Disk, FileSystem, SegmentFile};
use super::{EmbeddedLog, LogOpenError};
use crate::config;

/// What a loss of power may keep of a write, whole or not at all.
const SECTOR_BYTES: usize = 512;

/// The disk, shared by every log that is opened on it.
#[derive(Default)]
pub(crate) struct PowerLossDisk {
    files: Mutex<BTreeMap<PathBuf, Arc<Mutex<UnsyncedFile>>>>,
    is_full: AtomicBool,
    syncs_fail: AtomicBool,
}

/// A file as a loss of power would leave it, and what was done since.
#[derive(Default)]
struct UnsyncedFile {
    durable: Vec<u8>,
    unsynced: Vec<UnsyncedChange>,
}

enum UnsyncedChange {
    Write(usize, Vec<u8>),
    Length(usize),
}

impl UnsyncedFile {
    fn write(&mut self, at: usize, bytes: &[u8]) {
        let end = at + bytes.len();
        self.durable.resize(self.durable.len().max(end), 0);
        self.durable[at..end].copy_from_slice(bytes);
    }

    /// Makes what was done since the last sync durable: each sector for which `reached` says so.
    fn settle(&mut self, reached: &mut dyn FnMut() -> bool) {
        for change in std::mem::take(&mut self.unsynced) {
            match change {
                UnsyncedChange::Write(at, bytes) => {
                    let mut done = 0;
                    while done < bytes.len() {
                        let end = bytes.len().min(done + SECTOR_BYTES - (at + done) % SECTOR_BYTES);
                        if reached() {
                            self.write(at + done, &bytes[done..end]);
                        }
                        done = end;
                    }
                }
                UnsyncedChange::Length(length) if reached() => self.durable.resize(length, 0),
                UnsyncedChange::Length(_) => {}
            }
        }
    }
}

impl PowerLossDisk {
    /// Opens the log in `dir` on this disk.
    pub(crate) fn open_log(
        self: &Arc<Self>,
        dir: &Path,
        log: &config::LogConfig,
        dedup: &config::IntakeConfig,
    ) -> Result<EmbeddedLog, LogOpenError> {
        EmbeddedLog::open_on(Box::new(OnPowerLossDisk(self.clone())), dir, log, dedup)
    }

    /// From now on it has room or not.
    pub(crate) fn set_full(&self, is_full: bool) {
        self.is_full.store(is_full, Ordering::SeqCst);
    }

    /// From now on syncs fail or not.
    pub(crate) fn set_syncs_fail(&self, fail: bool) {
        self.syncs_fail.store(fail, Ordering::SeqCst);
    }

    /// Loses power: of what was not synced, each sector for which `reached` says so is there. No log may be open.
    pub(crate) fn lose_power(&self, mut reached: impl FnMut() -> bool) {
        for (path, file) in &*self.files.lock() {
            let mut file = file.lock();
            file.settle(&mut reached);
            if path.exists() {
                fs::write(path, &file.durable).expect("writable");
            }
        }
    }

    fn room(&self) -> io::Result<()> {
        match self.is_full.load(Ordering::SeqCst) {
            true => Err(io::ErrorKind::StorageFull.into()),
            false => Ok(()),
        }
    }
}

struct OnPowerLossDisk(Arc<PowerLossDisk>);

struct PowerLossFile {
    file: Arc<dyn SegmentFile>,
    state: Arc<Mutex<UnsyncedFile>>,
    disk: Arc<PowerLossDisk>,
}

impl Disk for OnPowerLossDisk {
    fn open(&self, path: &Path, create: bool) -> io::Result<Arc<dyn SegmentFile>> {
        if create {
            self.0.room()?;
        }
        let file = FileSystem.open(path, create)?;
        let state = self.0.files.lock().entry(path.to_owned()).or_default().clone();
        Ok(Arc::new(PowerLossFile { file, state, disk: self.0.clone() }))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.0.files.lock().remove(path);
        FileSystem.remove(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut files = self.0.files.lock();
        if let Some(file) = files.remove(from) {
            files.insert(to.to_owned(), file);
        }
        FileSystem.rename(from, to)
    }

    fn sync_dir(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }

    /// So little that the log writes nothing ahead, which depends on the clock: a seed gives the same run.
    fn free_bytes(&self, _: &Path) -> io::Result<u64> {
        Ok(0)
    }
}

impl SegmentFile for PowerLossFile {
    fn read_at(&self, buffer: &mut [u8], position: u64) -> io::Result<usize> {
        self.file.read_at(buffer, position)
    }

    fn write_all_at(&self, bytes: &[u8], position: u64) -> io::Result<()> {
        let room = self.disk.room();
        // Like the kernel, a write that fails may have written a part.
        let bytes = if room.is_err() { &bytes[..bytes.len() / 2] } else { bytes };
        self.file.write_all_at(bytes, position)?;
        let at = usize::try_from(position).expect("small");
        self.state.lock().unsynced.push(UnsyncedChange::Write(at, bytes.to_vec()));
        room
    }

    fn sync_data(&self) -> io::Result<()> {
        if self.disk.syncs_fail.load(Ordering::SeqCst) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        self.state.lock().settle(&mut || true);
        Ok(())
    }

    fn allocate(&self, position: u64, bytes: u64) -> io::Result<()> {
        self.disk.room()?;
        let length = self.file.len()?.max(position + bytes);
        self.set_len(length)
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        self.file.set_len(bytes)?;
        self.state.lock().unsynced.push(UnsyncedChange::Length(usize::try_from(bytes).expect("small")));
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }
}
