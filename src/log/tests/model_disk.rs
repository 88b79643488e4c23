//! A disk for tests: files whose changes are durable once they are synced, any call of which can be made to fail, syncs that
//! wait to be told how they end, and losses of power.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, AtomicUsize};

use parking_lot::{Condvar, Mutex};

use super::*;

/// What is on the disk, what is still on its way there, and which call fails.
#[derive(Default)]
pub(super) struct ModelDisk {
    pub(super) files: Mutex<BTreeMap<PathBuf, Arc<Mutex<ModelContent>>>>,
    calls: AtomicUsize,
    /// The call that fails, counted from 0, with this error.
    fails: Mutex<Option<(usize, i32)>>,
    /// Syncs fail with this error, and what they were to write is forgotten, as the kernel does.
    pub(super) sync_fails: Mutex<Option<i32>>,
    pub(super) unremovable: Mutex<Option<PathBuf>>,
    /// How long a sync takes, in microseconds.
    pub(super) sync_micros: AtomicU64,
    /// Syncs wait until the test says how they end.
    pub(super) held: HeldSyncs,
    /// What is free on it: by default nothing, so that nothing is written ahead.
    pub(super) free_bytes: AtomicU64,
    /// How often it was asked for that.
    pub(super) free_bytes_asked: AtomicUsize,
}

#[derive(Default)]
pub(super) struct ModelContent {
    durable: Vec<u8>,
    /// What was done since the last sync, each with its number.
    pub(super) pending: VecDeque<(u64, ModelChange)>,
    changes: u64,
    /// How often the file could not be written: each descriptor learns of it once.
    errors: usize,
}

#[derive(Clone)]
pub(super) enum ModelChange {
    Write(usize, Vec<u8>),
    Length(usize),
}

impl ModelContent {
    fn note(&mut self, change: ModelChange) {
        self.changes += 1;
        self.pending.push_back((self.changes, change));
    }

    /// Makes durable what was done up to the change with this number.
    fn settle(&mut self, number: u64) {
        while let Some((_, change)) = self.pending.pop_front_if(|change| change.0 <= number) {
            change.apply(&mut self.durable);
        }
    }

    /// What is on the disk after a loss of power: of what was not synced, each sector of 512 bytes for which `reached`
    /// says so.
    fn after_power_loss(&self, reached: &mut dyn FnMut() -> bool) -> Vec<u8> {
        let mut left = self.durable.clone();
        for (_, change) in &self.pending {
            match change {
                ModelChange::Write(at, bytes) => {
                    let mut done = 0;
                    while done < bytes.len() {
                        let end = bytes.len().min(done + 512 - (at + done) % 512);
                        if reached() {
                            ModelChange::Write(at + done, bytes[done..end].to_vec()).apply(&mut left);
                        }
                        done = end;
                    }
                }
                length @ ModelChange::Length(_) if reached() => length.apply(&mut left),
                ModelChange::Length(_) => {}
            }
        }
        left
    }
}

impl ModelChange {
    fn apply(&self, file: &mut Vec<u8>) {
        match self {
            ModelChange::Write(at, bytes) => {
                file.resize(file.len().max(at + bytes.len()), 0);
                file[*at..at + bytes.len()].copy_from_slice(bytes);
            }
            ModelChange::Length(length) => file.resize(*length, 0),
        }
    }
}

/// Its number, and how it ends once the test has said so.
type HeldSync = (u64, Option<Result<(), i32>>);

/// Syncs that wait, in the order in which they began.
#[derive(Default)]
pub(super) struct HeldSyncs {
    is_on: AtomicBool,
    syncs: Mutex<Vec<HeldSync>>,
    changed: Condvar,
}

impl HeldSyncs {
    /// Has syncs wait from now on.
    pub(super) fn begin(&self) {
        self.is_on.store(true, Ordering::SeqCst);
    }

    /// Has those that wait succeed, and all others go on.
    pub(super) fn end(&self) {
        self.is_on.store(false, Ordering::SeqCst);
        self.syncs.lock().iter_mut().for_each(|(_, ends)| _ = ends.get_or_insert(Ok(())));
        self.changed.notify_all();
    }

    /// Waits until so many wait.
    pub(super) fn wait_for(&self, count: usize) {
        let deadline = later();
        while !self.are_waiting(count) {
            assert!(Instant::now() < deadline, "{count} syncs under way");
            std::thread::yield_now();
        }
    }

    /// Whether so many wait.
    pub(super) fn are_waiting(&self, count: usize) -> bool {
        self.syncs.lock().iter().filter(|(_, ends)| ends.is_none()).count() >= count
    }

    /// Ends one of those that wait.
    pub(super) fn end_one(&self, nth: usize, result: Result<(), i32>) {
        let mut syncs = self.syncs.lock();
        let mut waiting = syncs.iter_mut().filter(|(_, ends)| ends.is_none());
        waiting.nth(nth).expect("it waits").1 = Some(result);
        self.changed.notify_all();
    }

    fn pass(&self) -> Result<(), i32> {
        if !self.is_on.load(Ordering::SeqCst) {
            return Ok(());
        }
        let mut syncs = self.syncs.lock();
        let id = syncs.last().map_or(0, |(id, _)| id + 1);
        syncs.push((id, None));
        self.changed.notify_all();
        loop {
            let at = syncs.iter().position(|(other, _)| *other == id).expect("only this thread removes it");
            if let Some(result) = syncs[at].1 {
                syncs.remove(at);
                return result;
            }
            self.changed.wait(&mut syncs);
        }
    }
}

impl ModelDisk {
    /// How many calls there were.
    pub(super) fn calls(&self) -> usize {
        self.calls.load(Ordering::SeqCst)
    }

    /// Has one call fail, counted from 0, with this error; or none.
    pub(super) fn fail(&self, call: Option<(usize, i32)>) {
        *self.fails.lock() = call;
    }

    fn call(&self) -> io::Result<()> {
        let call = self.calls.fetch_add(1, Ordering::SeqCst);
        match *self.fails.lock() {
            Some((at, errno)) if at == call => Err(io::Error::from_raw_os_error(errno)),
            _ => Ok(()),
        }
    }

    /// Loses power: of what was not synced, each sector of 512 bytes for which `reached` says so is there.
    pub(super) fn lose_power(&self, mut reached: impl FnMut() -> bool) {
        for (path, content) in &*self.files.lock() {
            let content = &mut *content.lock();
            content.durable = content.after_power_loss(&mut reached);
            content.pending.clear();
            if path.exists() {
                fs::write(path, &content.durable).expect("writable");
            }
        }
    }

    /// Puts what a loss of power would leave into another directory, and goes on.
    pub(super) fn copy_after_power_loss(&self, to: &Path, mut reached: impl FnMut() -> bool) {
        fs::create_dir_all(to.join("log")).expect("made");
        for (path, content) in &*self.files.lock() {
            let left = content.lock().after_power_loss(&mut reached);
            fs::write(to.join("log").join(path.file_name().expect("a file")), left).expect("writable");
        }
    }
}

struct OnModel(Arc<ModelDisk>);

/// A descriptor: the file, its content, the disk, and how many of the content's errors it has told of.
struct ModelFile(Arc<dyn SegmentFile>, Arc<Mutex<ModelContent>>, Arc<ModelDisk>, AtomicUsize);

impl Disk for OnModel {
    fn open(&self, path: &Path, create: bool) -> io::Result<Arc<dyn SegmentFile>> {
        self.0.call()?;
        let file = FileSystem.open(path, create)?;
        let content = self.0.files.lock().entry(path.to_owned()).or_default().clone();
        let errors = AtomicUsize::new(content.lock().errors);
        Ok(Arc::new(ModelFile(file, content, self.0.clone(), errors)))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.0.call()?;
        if self.0.unremovable.lock().as_deref() == Some(path) {
            return Err(io::Error::from_raw_os_error(libc::EPERM));
        }
        self.0.files.lock().remove(path);
        FileSystem.remove(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.0.call()?;
        if self.0.unremovable.lock().as_deref() == Some(from) {
            return Err(io::Error::from_raw_os_error(libc::EPERM));
        }
        let mut files = self.0.files.lock();
        if let Some(content) = files.remove(from) {
            files.insert(to.to_owned(), content);
        }
        FileSystem.rename(from, to)
    }

    fn sync_dir(&self, _: &Path) -> io::Result<()> {
        self.0.call()
    }

    fn free_bytes(&self, _: &Path) -> io::Result<u64> {
        self.0.call()?;
        self.0.free_bytes_asked.fetch_add(1, Ordering::SeqCst);
        Ok(self.0.free_bytes.load(Ordering::SeqCst))
    }
}

impl SegmentFile for ModelFile {
    fn read_at(&self, buffer: &mut [u8], position: u64) -> io::Result<usize> {
        self.2.call()?;
        self.0.read_at(buffer, position)
    }

    fn write_all_at(&self, bytes: &[u8], position: u64) -> io::Result<()> {
        let called = self.2.call();
        // Like the kernel, a write that fails may have written a part.
        let bytes = if called.is_err() { &bytes[..bytes.len() / 2] } else { bytes };
        self.0.write_all_at(bytes, position)?;
        let at = usize::try_from(position).expect("small");
        self.1.lock().note(ModelChange::Write(at, bytes.to_vec()));
        called
    }

    fn sync_data(&self) -> io::Result<()> {
        self.2.call()?;
        let (before, has_frames) = {
            let content = self.1.lock();
            let is_frame = |change: &ModelChange| matches!(change, ModelChange::Write(at, _) if *at >= 4096);
            (content.changes, content.pending.iter().any(|(_, change)| is_frame(change)))
        };
        std::thread::sleep(Duration::from_micros(self.2.sync_micros.load(Ordering::SeqCst)));
        // What makes a segment goes on.
        let held = if has_frames { self.2.held.pass() } else { Ok(()) };
        let content = &mut *self.1.lock();
        match self.2.sync_fails.lock().or(held.err()) {
            // What could not be written is gone, and every descriptor says so.
            Some(libc::EIO) => {
                content.pending.retain(|(number, _)| *number > before);
                content.errors += 1;
            }
            Some(errno) => return Err(io::Error::from_raw_os_error(errno)),
            None => {}
        }
        if self.3.swap(content.errors, Ordering::SeqCst) < content.errors {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        content.settle(before);
        Ok(())
    }

    fn allocate(&self, position: u64, bytes: u64) -> io::Result<()> {
        self.2.call()?;
        let length = self.0.len()?.max(position + bytes);
        self.0.set_len(length)?;
        self.1.lock().note(ModelChange::Length(usize::try_from(length).expect("small")));
        Ok(())
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        self.2.call()?;
        self.0.set_len(bytes)?;
        self.1.lock().note(ModelChange::Length(usize::try_from(bytes).expect("small")));
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        self.2.call()?;
        self.0.len()
    }
}

pub(super) fn small() -> config::LogConfig {
    config::LogConfig { segment_bytes: 16 << 10, retention_bytes: 64 << 10, ..config() }
}

pub(super) fn open_model(model: &Arc<ModelDisk>, dir: &Path) -> Result<EmbeddedLog, LogOpenError> {
    open_model_with(model, dir, &small())
}

pub(super) fn open_model_with(
    model: &Arc<ModelDisk>,
    dir: &Path,
    config: &config::LogConfig,
) -> Result<EmbeddedLog, LogOpenError> {
    EmbeddedLog::open_on(Box::new(OnModel(model.clone())), dir, config, &Config::default().intake)
}

pub(super) fn payload(n: u64) -> Vec<u8> {
    let mut payload = vec![u8::try_from(n).expect("few"); 3000];
    payload[..8].copy_from_slice(&n.to_le_bytes());
    payload
}

/// What is in the log is what was appended, in order, and everything that was acknowledged is in it.
pub(super) fn assert_kept(log: &EmbeddedLog, acknowledged: u64, what: &str) {
    assert!(log.next_offset() >= acknowledged, "{what}: {} of {acknowledged}", log.next_offset());
    let read = read_all(log, log.first_offset()).expect("readable");
    let expected: Vec<_> = (log.first_offset()..log.next_offset()).map(|n| (n, payload(n))).collect();
    assert!(read == expected, "{what}: the records are others");
}
