//! Spare segments: files that retention has taken out of the log, kept to be written over. A sync of a block
//! that was written before costs little more than half of one of a block that was only reserved, because
//! the file system need not note that it is written now.
//!
//! A young log has nothing to recycle: its spare segments are written ahead, with zeros, while it is idle.
//!
//! A file that a backup has too, by a hard link, is never one: writing it over would change the backup.
//!
//! A frame of an earlier life of the file is never taken for a new one: each life has a secret of its own.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tracing::debug;

use super::disk::{Disk, SegmentFile};
use super::segment::Segment;
use crate::message::Offset;

/// Spare segments at once.
const SPARE_SEGMENTS_MAX: usize = 2;

/// A file that the log may write over.
struct SpareSegment {
    path: PathBuf,
    file: Arc<dyn SegmentFile>,
    bytes: u64,
    /// The segment that it was: a reader may still be in it.
    former: Option<Arc<Segment>>,
}

/// The spare segments of a log.
#[derive(Default)]
pub(super) struct SpareSegments {
    files: Vec<SpareSegment>,
    /// A name was changed and the directory was not synced since: after a loss of power a spare may be a
    /// segment again, so it must still have what that had.
    is_dir_unsynced: bool,
}

impl SpareSegments {
    /// Finds what an earlier run left in `dir`.
    pub(super) fn find(disk: &dyn Disk, dir: &Path) -> io::Result<Self> {
        let mut found = Self::default();
        for entry in std::fs::read_dir(dir)? {
            let entry = entry?;
            let path = entry.path();
            if path.extension().is_none_or(|name| name != "spare")
                || Segment::offset_of(&path.with_extension("log")).is_none()
                || !entry.file_type()?.is_file()
            {
                continue;
            }
            if !found.has_room() {
                disk.remove(&path)?;
                continue;
            }
            let file = disk.open(&path, false)?;
            // Linked by a backup while it became a spare one. What has no former segment is written ahead, so it must
            // be nobody's.
            if is_linked(&*file) {
                disk.remove(&path)?;
            } else {
                let bytes = file.len()?;
                found.is_dir_unsynced = true;
                found.files.push(SpareSegment { path, file, bytes, former: None });
            }
        }
        Ok(found)
    }

    /// Whether another one may be kept.
    pub(super) fn has_room(&self) -> bool {
        self.files.len() < SPARE_SEGMENTS_MAX
    }

    /// Whether there is none.
    pub(super) fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// Their size on disk, in bytes.
    pub(super) fn bytes(&self) -> u64 {
        self.files.iter().map(|spare| spare.bytes).sum()
    }

    /// The size of the one that is taken next, in bytes; 0 if none can be.
    pub(super) fn next_bytes(&self) -> u64 {
        self.files.iter().find(|spare| spare.is_free()).map_or(0, |spare| spare.bytes)
    }

    /// Takes a segment's file out of the log, which makes it no segment: call [`SpareSegments::sync_dir`].
    /// A file that cannot be kept is removed.
    pub(super) fn keep(&mut self, disk: &dyn Disk, segment: Arc<Segment>) -> io::Result<()> {
        let path = segment.path().with_extension("spare");
        if segment.is_linked() {
            return disk.remove(segment.path());
        }
        if let Err(error) = disk.rename(segment.path(), &path) {
            debug!(%error, path = %segment.path().display(), "a segment could not be kept as a spare one");
            return disk.remove(segment.path());
        }
        self.is_dir_unsynced = true;
        let (file, bytes) = (segment.file(), segment.disk_bytes());
        self.files.push(SpareSegment { path, file, bytes, former: Some(segment) });
        Ok(())
    }

    /// Makes the directory's entries durable.
    pub(super) fn sync_dir(&mut self, disk: &dyn Disk, dir: &Path) -> io::Result<()> {
        disk.sync_dir(dir)?;
        self.is_dir_unsynced = false;
        Ok(())
    }

    /// Writes ahead, durably: `zeros` more of a spare segment of `bytes_max`, which is made if there is none to go on
    /// with. Returns whether there was anything to do.
    pub(super) fn write_ahead(
        &mut self,
        disk: &dyn Disk,
        dir: &Path,
        zeros: &[u8],
        bytes_max: u64,
    ) -> io::Result<bool> {
        let step_bytes = zeros.len() as u64;
        // A recycled one is shorter by what did not fit.
        let is_short = |spare: &SpareSegment| spare.former.is_none() && spare.bytes + step_bytes <= bytes_max;
        if !self.files.iter().any(is_short) {
            if !self.has_room() {
                return Ok(false);
            }
            self.files.push(SpareSegment::create(disk, dir)?);
            self.is_dir_unsynced = true;
        }
        let Some(spare) = self.files.iter_mut().find(|spare| is_short(spare)) else { return Ok(false) };
        spare.file.write_all_at(zeros, spare.bytes)?;
        spare.file.sync_data()?;
        spare.bytes += step_bytes;
        Ok(true)
    }

    /// Takes one that nobody reads, and no backup has linked since it was kept. Whoever links it reads it meanwhile, so the
    /// links are looked at once nobody does. Those that are linked are removed.
    fn take_free(&mut self, disk: &dyn Disk) -> Option<SpareSegment> {
        while let Some(free) = self.files.iter().position(SpareSegment::is_free) {
            let spare = self.files.remove(free);
            if !is_linked(&*spare.file) {
                return Some(spare);
            }
            if let Err(error) = disk.remove(&spare.path) {
                debug!(%error, path = %spare.path.display(), "a linked spare segment could not be removed");
            }
        }
        None
    }

    /// Gives the room of one back.
    pub(super) fn give_back(&mut self, disk: &dyn Disk) {
        if let Some(spare) = self.files.pop()
            && let Err(error) = disk.remove(&spare.path)
        {
            debug!(%error, path = %spare.path.display(), "a spare segment could not be removed");
        }
    }

    /// Makes a new segment, durably, from a spare one if there is one that nobody reads.
    pub(super) fn create(
        &mut self,
        disk: &dyn Disk,
        dir: &Path,
        first_offset: Offset,
    ) -> io::Result<Segment> {
        let Some(spare) = self.take_free(disk) else {
            return Segment::create(disk, dir, first_offset);
        };
        if self.is_dir_unsynced
            && let Err(error) = self.sync_dir(disk, dir)
        {
            self.files.push(spare);
            return Err(error);
        }
        let SpareSegment { path, file, bytes, .. } = spare;
        let made = Segment::create_over(disk, dir, first_offset, (&path, file, bytes));
        if let Err(error) = &made {
            // The next try makes a new file; this one may be in no order.
            let _ = disk.remove(&path);
            debug!(%error, path = %path.display(), "a spare segment could not be used");
        }
        match made {
            // An operator may have deleted it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Segment::create(disk, dir, first_offset),
            made => made,
        }
    }
}

impl SpareSegment {
    /// An empty one. No segment ever had its name.
    fn create(disk: &dyn Disk, dir: &Path) -> io::Result<Self> {
        let name = |nth: u64| Segment::path_of(dir, Offset::MAX - nth).with_extension("spare");
        let mut names = (0..=SPARE_SEGMENTS_MAX as u64).map(name);
        loop {
            let Some(path) = names.next() else { return Err(io::ErrorKind::AlreadyExists.into()) };
            match disk.open(&path, true) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                made => return Ok(Self { path, file: made?, bytes: 0, former: None }),
            }
        }
    }

    /// Whether no reader is left in it. None can come: it is not in the log.
    fn is_free(&self) -> bool {
        self.former.as_ref().is_none_or(|former| Arc::strong_count(former) == 1)
    }
}

/// Whether a file has another name too. One that does not say counts as linked.
pub(super) fn is_linked(file: &dyn SegmentFile) -> bool {
    file.link_count().map_or(true, |names| names > 1)
}

#[cfg(test)]
mod tests {
    use parking_lot::Mutex;
    use tempfile::TempDir;

    use super::super::disk::FileSystem;
    use super::*;

    #[test]
    fn a_file_is_written_over_once_nobody_reads_it_and_what_an_earlier_run_left_is_found() {
        let dir = TempDir::new().expect("temporary directory");
        let segment = |offset| Arc::new(Segment::create(&FileSystem, dir.path(), offset).expect("made"));
        let mut spares = SpareSegments::default();
        let (read, unread) = (segment(0), segment(10));
        spares.keep(&FileSystem, read.clone()).expect("kept");
        assert_eq!((spares.next_bytes(), spares.has_room()), (0, true), "a reader is in it");
        let new = spares.create(&FileSystem, dir.path(), 20).expect("made");
        assert!(spares.bytes() > 0, "of a new file: {}", new.path().display());
        spares.keep(&FileSystem, unread).expect("kept");
        assert!(spares.next_bytes() > 0 && !spares.has_room());
        let over = spares.create(&FileSystem, dir.path(), 30).expect("made");
        assert!(over.is_begin(over.end()) && over.is_newest_version());
        assert!(spares.has_room() && !spares.is_empty());

        let mut found = SpareSegments::find(&FileSystem, dir.path()).expect("found");
        assert_eq!(found.bytes(), spares.bytes(), "the one with the reader, who is gone with the run");
        found.create(&FileSystem, dir.path(), 40).expect("made");
        assert!(found.is_empty() && Segment::path_of(dir.path(), 40).exists());
        drop(read);
    }

    #[test]
    fn a_file_that_has_another_name_is_not_written_over() {
        let dir = TempDir::new().expect("temporary directory");
        let segment = |offset| Arc::new(Segment::create(&FileSystem, dir.path(), offset).expect("made"));
        let link = |path: &Path, name: &str| {
            std::fs::hard_link(path, dir.path().join(name)).expect("linked");
            std::fs::read(path).expect("readable")
        };
        let mut spares = SpareSegments::default();
        let early = segment(0);
        let before = link(early.path(), "early");
        spares.keep(&FileSystem, early).expect("it is out of the log");
        assert!(spares.is_empty(), "linked before it was kept");
        let late = segment(10);
        let held = late.clone();
        spares.keep(&FileSystem, late).expect("kept");
        let late_before = link(&held.path().with_extension("spare"), "late");
        drop(held);
        spares.create(&FileSystem, dir.path(), 20).expect("made");
        assert!(spares.is_empty(), "linked since");
        for (name, bytes) in [("early", before), ("late", late_before)] {
            assert!(std::fs::read(dir.path().join(name)).expect("there") == bytes, "{name}");
        }
    }

    /// A disk on which a reader is done with a segment while another file is removed.
    struct LastReaderDisk(Mutex<Option<Arc<Segment>>>);

    impl Disk for LastReaderDisk {
        fn open(&self, path: &Path, create: bool) -> io::Result<Arc<dyn SegmentFile>> {
            FileSystem.open(path, create)
        }

        fn remove(&self, path: &Path) -> io::Result<()> {
            self.0.lock().take();
            FileSystem.remove(path)
        }

        fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
            FileSystem.rename(from, to)
        }

        fn sync_dir(&self, dir: &Path) -> io::Result<()> {
            FileSystem.sync_dir(dir)
        }

        fn free_bytes(&self, dir: &Path) -> io::Result<u64> {
            FileSystem.free_bytes(dir)
        }
    }

    #[test]
    fn a_linked_file_whose_last_reader_leaves_while_one_is_chosen_is_not_written_over() {
        let dir = TempDir::new().expect("temporary directory");
        let segment = |offset| Arc::new(Segment::create(&FileSystem, dir.path(), offset).expect("made"));
        let (read, unread) = (segment(0), segment(10));
        let disk = LastReaderDisk(Mutex::new(Some(read.clone())));
        let mut spares = SpareSegments::default();
        for (segment, name) in [(read, "read"), (unread, "unread")] {
            let path = segment.path().with_extension("spare");
            spares.keep(&disk, segment).expect("kept");
            std::fs::hard_link(path, dir.path().join(name)).expect("linked");
        }
        let before = std::fs::read(dir.path().join("read")).expect("readable");
        spares.create(&disk, dir.path(), 20).expect("made");
        assert!(std::fs::read(dir.path().join("read")).expect("there") == before);
        assert!(spares.is_empty() && disk.0.lock().is_none(), "both are removed");
    }

    #[test]
    fn a_file_that_a_backup_linked_while_it_became_a_spare_one_is_not_written_ahead_after_a_restart() {
        let dir = TempDir::new().expect("temporary directory");
        let segment = Arc::new(Segment::create(&FileSystem, dir.path(), 0).expect("made"));
        let linked = dir.path().join("linked");
        let mut spares = SpareSegments::default();
        // Between the look at the number of names and the new name.
        let path = segment.path().to_owned();
        spares.keep(&FileSystem, segment).expect("kept");
        std::fs::hard_link(path.with_extension("spare"), &linked).expect("linked");
        let before = std::fs::read(&linked).expect("readable");
        let mut spares = SpareSegments::find(&FileSystem, dir.path()).expect("found");
        assert!(spares.is_empty() && !path.with_extension("spare").exists());
        let bytes_max = before.len() as u64 + 8192;
        assert!(spares.write_ahead(&FileSystem, dir.path(), &[0; 4096], bytes_max).expect("written"));
        assert!(std::fs::read(&linked).expect("there") == before);
    }

    #[test]
    fn a_young_log_has_its_spares_written_ahead_and_a_restart_goes_on_with_them() {
        let dir = TempDir::new().expect("temporary directory");
        let mut spares = SpareSegments::default();
        let (zeros, bytes_max) = (vec![0; 4096], 10_000);
        let ahead =
            |spares: &mut SpareSegments| spares.write_ahead(&FileSystem, dir.path(), &zeros, bytes_max);
        assert!(ahead(&mut spares).expect("written"));
        let mut spares = SpareSegments::find(&FileSystem, dir.path()).expect("found");
        assert_eq!(spares.bytes(), 4096);
        for _ in 1..4 {
            assert!(ahead(&mut spares).expect("written"));
        }
        assert!(
            !ahead(&mut spares).expect("nothing to do"),
            "as many as there may be, as large as they may be"
        );
        assert_eq!(spares.bytes(), 4 * 4096);
        let first = spares.create(&FileSystem, dir.path(), 20).expect("made");
        assert_eq!((first.disk_bytes(), spares.bytes()), (8192, 8192));
        assert!(ahead(&mut spares).expect("written"), "another one in its place");
        assert_eq!(spares.bytes(), 3 * 4096);
    }

    #[test]
    fn what_is_no_file_is_no_spare_and_stops_nothing() {
        let dir = TempDir::new().expect("temporary directory");
        let named = |offset: Offset| Segment::path_of(dir.path(), offset).with_extension("spare");
        // Also where a new spare would be, and where a segment would go.
        for offset in [0, 7, Offset::MAX] {
            std::fs::create_dir(named(offset)).expect("made");
        }
        std::os::unix::fs::symlink("/nowhere/at-all", named(8)).expect("made");
        let mut spares = SpareSegments::find(&FileSystem, dir.path()).expect("found");
        assert!(spares.is_empty());
        let ahead = spares.write_ahead(&FileSystem, dir.path(), &[0; 4096], 10_000);
        assert!(ahead.expect("written") && spares.bytes() == 4096);
        let segment = Arc::new(Segment::create(&FileSystem, dir.path(), 0).expect("made"));
        spares.keep(&FileSystem, segment.clone()).expect("it is out of the log");
        assert!(!segment.path().exists() && named(0).is_dir());
        let full = |offset: Offset| std::fs::write(named(offset), b"spare").expect("written");
        [20, 21, 22].into_iter().for_each(full);
        let found = SpareSegments::find(&FileSystem, dir.path()).expect("found");
        assert!(!found.has_room() && named(7).is_dir(), "none of them takes the room of a file");
    }

    #[test]
    fn a_file_that_an_operator_deleted_is_no_spare_and_stops_nothing() {
        let dir = TempDir::new().expect("temporary directory");
        let segment = |offset| Arc::new(Segment::create(&FileSystem, dir.path(), offset).expect("made"));
        let mut spares = SpareSegments::default();
        let deleted = segment(0);
        std::fs::remove_file(deleted.path()).expect("removed");
        spares.keep(&FileSystem, deleted).expect("it is out of the log");
        assert!(spares.is_empty());
        spares.keep(&FileSystem, segment(10)).expect("kept");
        std::fs::remove_file(dir.path().join(format!("{:020}.spare", 10))).expect("removed");
        let new = spares.create(&FileSystem, dir.path(), 20).expect("made");
        assert!(new.path().exists() && spares.is_empty());
    }
}
