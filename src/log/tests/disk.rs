//! The log on a disk that fails: at every call in turn, for good or for a while, and by losing what was not
//! synced.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, AtomicUsize};

use parking_lot::{Condvar, Mutex};

use super::*;

/// What is on the disk, what is still on its way there, and which call fails.
#[derive(Default)]
pub(super) struct ModelDisk {
    files: Mutex<BTreeMap<PathBuf, Arc<Mutex<ModelContent>>>>,
    calls: AtomicUsize,
    /// The call that fails, counted from 0, with this error.
    fails: Mutex<Option<(usize, i32)>>,
    /// Syncs fail with this error, and what they were to write is forgotten, as the kernel does.
    pub(super) sync_fails: Mutex<Option<i32>>,
    unremovable: Mutex<Option<PathBuf>>,
    /// How long a sync takes, in microseconds.
    sync_micros: AtomicU64,
    /// Syncs wait until the test says how they end.
    pub(super) held: HeldSyncs,
    /// What is free on it: by default nothing, so that nothing is written ahead.
    pub(super) free_bytes: AtomicU64,
    /// How often it was asked for that.
    free_bytes_asked: AtomicUsize,
}

#[derive(Default)]
struct ModelContent {
    durable: Vec<u8>,
    /// What was done since the last sync, each with its number.
    pending: VecDeque<(u64, ModelChange)>,
    changes: u64,
    /// How often the file could not be written: each descriptor learns of it once.
    errors: usize,
}

#[derive(Clone)]
enum ModelChange {
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
    fn lose_power(&self, mut reached: impl FnMut() -> bool) {
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

fn small() -> config::LogConfig {
    config::LogConfig { segment_bytes: 16 << 10, retention_bytes: 64 << 10, ..config() }
}

fn open_model(model: &Arc<ModelDisk>, dir: &Path) -> Result<EmbeddedLog, LogOpenError> {
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

/// Appends until it fails, three at a time, over several segments and retention. Returns how many were acknowledged.
fn fill(log: &EmbeddedLog) -> u64 {
    log.begin_retention();
    let from = log.next_offset();
    let (mut pending, mut acknowledged) = (VecDeque::new(), None);
    for n in from..from + 36 + 3 {
        if n < from + 36 && acknowledged.is_none() {
            pending.push_back((n, log.append(vec![section(&[&payload(n)], &Lease::new())], later())));
            // On a slow disk the sync of the one before it is still under way.
            std::thread::sleep(Duration::from_micros(1100));
        }
        while pending.len() > 2 || n >= from + 36 && !pending.is_empty() {
            let (n, appended) = pending.pop_front().expect("some");
            let is_kept = appended.blocking_recv().is_ok_and(|kept| kept.is_ok());
            assert!(!is_kept || acknowledged.is_none(), "{n} was acknowledged behind one that failed");
            if !is_kept {
                acknowledged.get_or_insert(n);
            }
        }
    }
    acknowledged.unwrap_or(from + 36)
}

#[test]
fn whichever_call_fails_nothing_acknowledged_is_lost_and_a_want_is_waited_out() {
    let calls = {
        let (dir, model) = (TempDir::new().expect("temporary directory"), Arc::new(ModelDisk::default()));
        model.sync_micros.store(3000, Ordering::SeqCst);
        let log = open_model(&model, dir.path()).expect("opens");
        assert_eq!(fill(&log), 36);
        assert!(log.first_offset() > 0, "retention has removed a segment");
        drop(log);
        model.calls()
    };
    let wants = [libc::ENOSPC, libc::EMFILE, libc::ENFILE, libc::ENOMEM, libc::EINTR, libc::EDQUOT];
    for call in 0..calls {
        for errno in [wants[call % wants.len()], libc::EIO] {
            let what = format!("call {call} fails with {}", io::Error::from_raw_os_error(errno));
            let (dir, model) = (TempDir::new().expect("temporary directory"), Arc::new(ModelDisk::default()));
            model.fail(Some((call, errno)));
            model.sync_micros.store(3000, Ordering::SeqCst);
            let mut acknowledged = 0;
            if let Ok(log) = open_model(&model, dir.path()) {
                acknowledged = fill(&log);
                assert!(errno == libc::EIO || acknowledged == 36, "{what}: {acknowledged}");
            }
            // How many calls there are depends a little on timing: the last ones may not have come.
            model.fail(None);
            let log = open_model(&model, dir.path()).unwrap_or_else(|error| panic!("{what}: {error}"));
            assert_kept(&log, acknowledged, &what);
            drop(log);
        }
    }
}

#[test]
fn what_a_failed_sync_left_in_memory_is_on_the_disk_before_it_counts_as_kept() {
    let (dir, model) = (TempDir::new().expect("temporary directory"), Arc::new(ModelDisk::default()));
    let log = open_model(&model, dir.path()).expect("opens");
    append(&log, &[&payload(0)]).expect("kept");
    *model.sync_fails.lock() = Some(libc::EIO);
    let id = OnceId::of_exchange(1, 1);
    let once = || {
        let mut once = section(&[&payload(1)], &Lease::new());
        once.keep_once(id);
        vec![once]
    };
    let failed = log.append(once(), later()).blocking_recv().expect("answered");
    assert!(matches!(failed, Err(AppendError::Failed(_))));
    drop(log);
    *model.sync_fails.lock() = None;
    let log = open_model(&model, dir.path()).expect("opens");
    let again = log.append(once(), later()).blocking_recv().expect("answered").expect("kept");
    assert_eq!(again.outcomes, [SectionOutcome::Duplicate(Offsets::consecutive(1, 1))]);
    model.lose_power(|| false);
    drop(log);
    model.lose_power(|| false);
    let log = open(dir.path(), &small()).expect("opens");
    assert_kept(&log, 2, "after the power was lost");
}

#[test]
fn a_segment_that_cannot_be_removed_keeps_those_behind_it_and_stops_no_start() {
    let (dir, model) = (TempDir::new().expect("temporary directory"), Arc::new(ModelDisk::default()));
    let log = open_model(&model, dir.path()).expect("opens");
    *model.unremovable.lock() = Some(super::super::segment::Segment::path_of(&dir.path().join("log"), 0));
    log.begin_retention();
    let soon = || Instant::now() + Duration::from_millis(100);
    let keep = |n| log.append(vec![section(&[&payload(n)], &Lease::new())], soon()).blocking_recv();
    let full = (0..100).find(|n| keep(*n).expect("answered").is_err()).expect("the budget is reached");
    assert_eq!(log.first_offset(), 0);
    drop(log);
    let log = open_model(&model, dir.path()).expect("opens");
    assert_kept(&log, full, "with the segment that stayed");
    *model.unremovable.lock() = None;
    assert_eq!(fill(&log), full + 36);
    assert!(log.first_offset() > 0);
}

/// Segments that retention removes become the next ones, with all that was in them.
#[test]
fn what_an_earlier_life_of_the_file_left_behind_the_end_is_never_read() {
    let (dir, model) = (TempDir::new().expect("temporary directory"), Arc::new(ModelDisk::default()));
    let log = open_model(&model, dir.path()).expect("opens");
    assert_eq!(fill(&log), 36);
    let newest = |log: &EmbeddedLog| {
        let segment = (0..log.next_offset())
            .rev()
            .map(|n| super::super::segment::Segment::path_of(&dir.path().join("log"), n));
        let path = segment.into_iter().find(|path| path.exists()).expect("a segment");
        (path.clone(), fs::read(path).expect("readable"))
    };
    // A segment's second record, with room for a third behind it.
    let (path, before) = loop {
        let (path, before) = newest(&log);
        append(&log, &[&payload(log.next_offset())]).expect("kept");
        let frames = frame_starts(&path).len() - 1;
        if path == newest(&log).0 && frames == 2 {
            break (path, before);
        }
    };
    let next = log.next_offset();
    let (_, after) = newest(&log);
    let starts = frame_starts(&path);
    assert!(after[starts[2]..].iter().any(|byte| *byte != 0), "the file had an earlier life");
    drop(log);
    for cut in (starts[1]..starts[2]).step_by(61).chain([starts[2]]) {
        let mut torn = after.clone();
        torn[cut..starts[2]].copy_from_slice(&before[cut..starts[2]]);
        fs::write(&path, &torn).expect("writable");
        let log = open(dir.path(), &small()).expect("a torn end is no damage");
        let whole = torn == after;
        assert_eq!(log.next_offset(), if whole { next } else { next - 1 }, "torn at {cut}");
        assert_kept(&log, next - 1, "with an earlier life behind the end");
        drop(log);
    }
}

#[test]
fn spares_that_an_earlier_run_left_are_given_back_when_records_need_their_room() {
    let dir = TempDir::new().expect("temporary directory");
    drop(open(dir.path(), &small()).expect("opens"));
    for n in 0..2 {
        fs::write(dir.path().join(format!("log/{n:020}.spare")), vec![0; 64 << 10]).expect("written");
    }
    let log = open(dir.path(), &small()).expect("opens");
    (0..12).for_each(|n| _ = append(&log, &[&payload(n)]).expect("kept, though nothing may be removed"));
    assert!(log.bytes() <= small().retention_bytes, "{}", log.bytes());
}

#[test]
fn a_young_log_is_written_ahead_while_it_is_idle_and_not_on_a_disk_that_is_short() {
    let roomy = config::LogConfig { segment_bytes: 1 << 20, retention_bytes: 8 << 20, ..config() };
    for free_bytes in [0, u64::MAX / 2] {
        let (dir, model) = (TempDir::new().expect("temporary directory"), Arc::new(ModelDisk::default()));
        model.free_bytes.store(free_bytes, Ordering::SeqCst);
        let reopen = || open_model_with(&model, dir.path(), &roomy).expect("opens");
        let log = reopen();
        (0..200).for_each(|n| _ = append(&log, &[&payload(n)]).expect("kept"));
        let spare_bytes = || {
            let files =
                fs::read_dir(dir.path().join("log")).expect("listable").map(|file| file.expect("a file"));
            let spares = files.filter(|file| file.path().extension().is_some_and(|name| name == "spare"));
            spares.map(|file| file.metadata().expect("its size").len()).sum::<u64>()
        };
        let asked = model.free_bytes_asked.load(Ordering::SeqCst);
        let is_done = || match free_bytes {
            0 => model.free_bytes_asked.load(Ordering::SeqCst) > asked + 1,
            _ => spare_bytes() == 2 << 20,
        };
        let deadline = later();
        while !is_done() {
            assert!(Instant::now() < deadline, "{} written ahead", spare_bytes());
            std::thread::yield_now();
        }
        assert_eq!(spare_bytes(), if free_bytes == 0 { 0 } else { 2 << 20 });
        assert!(log.bytes() <= roomy.retention_bytes);
        (200..900).for_each(|n| _ = append(&log, &[&payload(n % 256)]).expect("kept"));
        assert_eq!(log.next_offset(), 900);
        drop(log);
        assert_eq!(reopen().next_offset(), 900);
    }
}

#[test]
fn an_append_that_was_answered_as_failed_is_not_in_the_log_after_a_kill() {
    let (dir, model) = (TempDir::new().expect("temporary directory"), Arc::new(ModelDisk::default()));
    let log = open_model(&model, dir.path()).expect("opens");
    append(&log, &[&payload(0)]).expect("kept");
    *model.sync_fails.lock() = Some(libc::ENOSPC);
    let failed = log.append(vec![section(&[&payload(1)], &Lease::new())], Instant::now());
    assert!(failed.blocking_recv().expect("answered").is_err());
    let path = super::super::segment::Segment::path_of(&dir.path().join("log"), 0);
    let killed = fs::read(&path).expect("readable");
    drop(log);
    fs::write(&path, killed).expect("writable");
    let log = open(dir.path(), &small()).expect("opens");
    assert_eq!(log.next_offset(), 1);
    assert_kept(&log, 1, "after the kill");
}

#[test]
fn a_half_made_next_segment_is_never_passed_by_the_one_before_it() {
    let (dir, model) = (TempDir::new().expect("temporary directory"), Arc::new(ModelDisk::default()));
    let log = open_model(&model, dir.path()).expect("opens");
    (0..3).for_each(|n| _ = append(&log, &[&payload(n)]).expect("kept"));
    *model.unremovable.lock() = Some(super::super::segment::Segment::path_of(&dir.path().join("log"), 3));
    *model.sync_fails.lock() = Some(libc::ENOSPC);
    let abandoned = log.append(vec![section(&[&payload(3)], &Lease::new())], Instant::now());
    assert!(abandoned.blocking_recv().expect("answered").is_err());
    *model.sync_fails.lock() = None;
    append(&log, &[b"has room in the first segment"]).expect("kept");
    drop(log);
    let log = open_model(&model, dir.path()).expect("opens");
    assert_eq!(read_all(&log, 3).expect("readable"), [(3, b"has room in the first segment".to_vec())]);
}

#[test]
fn an_abandoned_write_behind_the_end_of_a_segment_does_not_outrank_the_next_segment() {
    let (dir, model) = (TempDir::new().expect("temporary directory"), Arc::new(ModelDisk::default()));
    let log = open_model(&model, dir.path()).expect("opens");
    (0..3).for_each(|n| _ = append(&log, &[&payload(n)]).expect("kept"));
    *model.sync_fails.lock() = Some(libc::ENOSPC);
    let abandoned = log.append(vec![section(&[b"fits"], &Lease::new())], Instant::now());
    assert!(abandoned.blocking_recv().expect("answered").is_err());
    *model.sync_fails.lock() = None;
    append(&log, &[&payload(3)]).expect("kept, in the next segment");
    drop(log);
    // Every write reached the disk, no change of a length did.
    for content in model.files.lock().values() {
        content.lock().pending.retain(|(_, change)| matches!(change, ModelChange::Write(..)));
    }
    model.lose_power(|| true);
    let log = open_model(&model, dir.path()).expect("opens");
    assert_eq!(log.next_offset(), 4);
    assert_kept(&log, 4, "after the power was lost");
}

#[test]
fn what_else_is_in_the_directory_is_left_alone() {
    let dir = TempDir::new().expect("temporary directory");
    drop(open(dir.path(), &config()).expect("opens"));
    let names = ["gateway.log", "0.log", "0000000000000000000x.log", "zzz.log", "notes.txt"];
    for name in names {
        fs::write(dir.path().join("log").join(name), "short").expect("written");
    }
    let log = open(dir.path(), &config()).expect("opens");
    assert_eq!(append(&log, &[b"0"]).expect("kept").outcomes, [kept(0, 1)]);
    drop(log);
    for name in names {
        assert_eq!(fs::read(dir.path().join("log").join(name)).expect("still there"), b"short");
    }
}

#[test]
fn a_segment_without_a_header_is_named_and_left_out_only_when_told_to() {
    let (dir, model) = (TempDir::new().expect("temporary directory"), Arc::new(ModelDisk::default()));
    let log = open_model(&model, dir.path()).expect("opens");
    (0..12).for_each(|n| _ = append(&log, &[&payload(n)]).expect("kept"));
    drop(log);
    let second = 3;
    let path = super::super::segment::Segment::path_of(&dir.path().join("log"), second);
    let mut bytes = fs::read(&path).expect("segments of three records");
    [0, 2048].iter().for_each(|at| bytes[at + 30] ^= 1);
    fs::write(&path, &bytes).expect("writable");
    let Err(LogOpenError::Corrupt(text)) = open(dir.path(), &small()) else { panic!("opened") };
    assert!(text.contains(&path.display().to_string()) && text.contains("from offset 3"), "{text}");
    let accepting = config::LogConfig { accept_corruption: true, ..small() };
    let log = open(dir.path(), &accepting).expect("opens");
    let read: Vec<_> = read_all(&log, 0).expect("readable").into_iter().map(|(offset, _)| offset).collect();
    assert_eq!(read, (0..3).chain(6..12).collect::<Vec<_>>());
    assert_eq!(log.lost_records(), 3);
}

#[test]
fn the_oldest_segment_is_left_out_if_it_was_written_over_while_the_log_was_copied() {
    let (dir, model) = (TempDir::new().expect("temporary directory"), Arc::new(ModelDisk::default()));
    let log = open_model(&model, dir.path()).expect("opens");
    (0..9).for_each(|n| _ = append(&log, &[&payload(n)]).expect("kept"));
    drop(log);
    let path = |first| super::super::segment::Segment::path_of(&dir.path().join("log"), first);
    let newest = fs::read(path(6)).expect("segments of three records");
    let (oldest, second) = (fs::read(path(0)).expect("readable"), fs::read(path(3)).expect("readable"));
    fs::write(path(3), &newest).expect("writable");
    assert!(matches!(open(dir.path(), &small()), Err(LogOpenError::Corrupt(_))), "not the oldest");
    fs::write(path(3), &second).expect("writable");
    fs::write(path(0), &newest).expect("writable");
    let log = open(dir.path(), &small()).expect("opens");
    assert_eq!((log.first_offset(), log.next_offset(), log.lost_records()), (3, 9, 0));
    assert_kept(&log, 9, "without the oldest");
    drop(log);
    fs::write(path(0), &oldest).expect("writable");
    assert_kept(&open(dir.path(), &small()).expect("opens"), 9, "as it was");
}

#[derive(Debug, Clone)]
enum Step {
    Append,
    /// An append whose sync fails for a while, so that nobody is told of it.
    Abandon,
    Restart,
    LosePower(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => Just(Step::Append),
        2 => Just(Step::Abandon),
        1 => Just(Step::Restart),
        2 => any::<u64>().prop_map(Step::LosePower),
    ];
    prop::collection::vec(step, 1..30)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    #[test]
    fn whatever_a_loss_of_power_takes_it_is_nothing_that_was_acknowledged(steps in steps()) {
        let (dir, model) = (TempDir::new().expect("temporary directory"), Arc::new(ModelDisk::default()));
        let reopen = || {
            let log = open_model(&model, dir.path()).expect("neither a restart nor a loss of power is damage");
            log.begin_retention();
            log
        };
        let mut log = reopen();
        for step in steps {
            let next = log.next_offset();
            match step {
                Step::Append => {
                    append(&log, &[&payload(next)]).expect("kept");
                }
                Step::Abandon => {
                    *model.sync_fails.lock() = Some(libc::ENOSPC);
                    let appended = log.append(vec![section(&[&payload(next)], &Lease::new())], Instant::now());
                    prop_assert!(appended.blocking_recv().expect("answered").is_err());
                    *model.sync_fails.lock() = None;
                }
                Step::Restart => {
                    drop(log);
                    log = reopen();
                    assert_kept(&log, next, "after a restart");
                }
                Step::LosePower(seed) => {
                    // The writer ends first; what it still wrote, such as its last frame, may be lost too.
                    *model.sync_fails.lock() = Some(libc::ENOSPC);
                    drop(log);
                    *model.sync_fails.lock() = None;
                    let mut state = seed | 1;
                    model.lose_power(|| {
                        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                        state >> 63 == 1
                    });
                    log = reopen();
                    assert_kept(&log, next, "after a loss of power");
                }
            }
        }
    }
}
