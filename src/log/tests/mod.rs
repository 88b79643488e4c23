//! The log against faults: torn and damaged files, a disk that fails or fills up, dead keys, budgets.

mod disk;
mod frames;
mod in_flight;
mod model_disk;
mod once;
mod solo;
mod versions;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use std::{fs, io};

use proptest::prelude::*;
use tempfile::TempDir;

use super::disk::{Disk, FileSystem, SegmentFile};
use super::frame::{FrameFlags, FrameFormat};
use super::segment::SegmentHeader;
use super::{
    AppendError, Batch, CommitOutcome, EmbeddedLog, Log, LogOpenError, LogReadError, Offsets, OnceId,
    QuarantineReason, RecordNote, Section, SectionOutcome,
};
use crate::config::{self, Config};
use crate::message::{DatasourceId, KeyId, Lease, Offset, RecordFlags, Transport, now_micros};

/// The faults that a test injects.
#[derive(Default)]
struct Faults {
    sync_fails: AtomicBool,
    disk_is_full: AtomicBool,
    write_panics: AtomicBool,
}

struct FaultyDisk(Arc<Faults>);

struct FaultyFile(Arc<dyn SegmentFile>, Arc<Faults>);

impl Disk for FaultyDisk {
    fn open(&self, path: &Path, create: bool) -> io::Result<Arc<dyn SegmentFile>> {
        Ok(Arc::new(FaultyFile(FileSystem.open(path, create)?, self.0.clone())))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
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

impl SegmentFile for FaultyFile {
    fn read_at(&self, buffer: &mut [u8], position: u64) -> io::Result<usize> {
        self.0.read_at(buffer, position)
    }

    fn write_all_at(&self, bytes: &[u8], position: u64) -> io::Result<()> {
        assert!(!self.1.write_panics.load(Ordering::SeqCst), "as a bug in the writer would");
        if self.1.disk_is_full.load(Ordering::SeqCst) {
            // Like the kernel, writes a part before it fails.
            self.0.write_all_at(&bytes[..bytes.len() / 2], position)?;
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.0.write_all_at(bytes, position)
    }

    fn sync_data(&self) -> io::Result<()> {
        if self.1.sync_fails.load(Ordering::SeqCst) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        self.0.sync_data()
    }

    fn allocate(&self, _: u64, _: u64) -> io::Result<()> {
        if self.1.disk_is_full.load(Ordering::SeqCst) {
            Err(io::ErrorKind::StorageFull.into())
        } else {
            Ok(())
        }
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        self.0.set_len(bytes)
    }

    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }
}

fn config() -> config::LogConfig {
    Config::default().log
}

fn open(dir: &Path, config: &config::LogConfig) -> Result<EmbeddedLog, LogOpenError> {
    EmbeddedLog::open(dir, config, &Config::default().intake)
}

fn open_faulty(faults: &Arc<Faults>, dir: &Path) -> Result<EmbeddedLog, LogOpenError> {
    let disk = Box::new(FaultyDisk(faults.clone()));
    EmbeddedLog::open_on(disk, dir, &config(), &Config::default().intake)
}

fn section(payloads: &[&[u8]], lease: &Lease) -> Section {
    let id = DatasourceId::new("press-4").expect("slug");
    let mut section = Section::new(id, KeyId([1; 6]), lease.clone(), Transport::Mqtt, 0, now_micros());
    for payload in payloads {
        section.push("t", payload, "", &[], RecordFlags::default());
    }
    section
}

fn kept(first: Offset, records: u32) -> SectionOutcome {
    SectionOutcome::Kept(Offsets::consecutive(first, records))
}

fn later() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

/// Appends one section and waits for it.
fn append(log: &EmbeddedLog, payloads: &[&[u8]]) -> Result<CommitOutcome, AppendError> {
    let appended = log.append(vec![section(payloads, &Lease::new())], later());
    appended.blocking_recv().expect("the writer answers")
}

/// Everything from `from` on, as offsets and payloads.
fn read_all(log: &EmbeddedLog, from: Offset) -> Result<Vec<(Offset, Vec<u8>)>, LogReadError> {
    let mut seen = Vec::new();
    let mut next = from;
    loop {
        let batches = log.read(next, 64 << 10)?;
        let Some(last) = batches.last() else { return Ok(seen) };
        let from = next;
        next = last.next_offset();
        let records = batches.iter().flat_map(|batch| batch.records()).filter(|r| r.offset >= from);
        seen.extend(records.map(|r| (r.offset, r.payload.to_vec())));
    }
}

fn numbered(range: std::ops::Range<u64>) -> Vec<(Offset, Vec<u8>)> {
    range.map(|n| (n, n.to_string().into_bytes())).collect()
}

/// A log of batches of one record each, whose payload is its offset; left as a kill leaves it.
fn killed_after(dir: &Path, records: u64) -> PathBuf {
    let log = open(dir, &config()).expect("opens");
    for n in 0..records {
        append(&log, &[n.to_string().as_bytes()]).expect("kept");
    }
    let path = super::segment::Segment::path_of(&dir.join("log"), 0);
    let as_killed = fs::read(&path).expect("readable");
    drop(log);
    // A clean end seals the log; a kill does not.
    fs::write(&path, as_killed).expect("writable");
    path
}

/// Where each frame of a segment begins, and where the last one ends.
fn frame_starts(path: &Path) -> Vec<usize> {
    let bytes = fs::read(path).expect("readable");
    let header = SegmentHeader::decode(&bytes).expect("a segment");
    let format = FrameFormat::of_segment(&header);
    let mut starts = vec![header.header_bytes()];
    loop {
        let at = starts[starts.len() - 1];
        let Some(header) = format.decode(&bytes[at.min(bytes.len())..], at as u64) else { return starts };
        starts.push(at + usize::try_from(header.frame_bytes()).expect("short"));
    }
}

#[test]
fn what_was_acknowledged_is_read_back_before_and_after_a_restart() {
    let dir = TempDir::new().expect("temporary directory");
    let log = open(dir.path(), &config()).expect("opens");
    assert_eq!(append(&log, &[b"0", b"1"]).expect("kept").outcomes, [kept(0, 2)]);
    assert_eq!(append(&log, &[b"2"]).expect("kept").outcomes, [kept(2, 1)]);
    assert_eq!(read_all(&log, 0).expect("readable"), numbered(0..3));
    assert_eq!(read_all(&log, 1).expect("readable"), numbered(1..3));
    drop(log);
    let log = open(dir.path(), &config()).expect("opens");
    assert_eq!(log.next_offset(), 3);
    append(&log, &[b"3"]).expect("kept");
    assert_eq!(read_all(&log, 0).expect("readable"), numbered(0..4));
}

#[test]
fn after_a_failed_fdatasync_nothing_more_is_acknowledged_until_a_restart() {
    let dir = TempDir::new().expect("temporary directory");
    let faults = Arc::new(Faults::default());
    let log = open_faulty(&faults, dir.path()).expect("opens");
    append(&log, &[b"0"]).expect("kept");
    faults.sync_fails.store(true, Ordering::SeqCst);
    assert!(matches!(append(&log, &[b"lost"]), Err(AppendError::Failed(_))));
    // The disk works again, but the state of the pages that failed is unknown.
    faults.sync_fails.store(false, Ordering::SeqCst);
    assert!(matches!(append(&log, &[b"lost"]), Err(AppendError::Failed(_))));
    assert!(log.trouble().is_some_and(|trouble| trouble.contains("cannot be written")));
    assert_eq!(read_all(&log, 0).expect("readable"), numbered(0..1));
    drop(log);
    let log = open(dir.path(), &config()).expect("opens");
    let next = log.next_offset();
    assert_eq!(append(&log, &[b"after"]).expect("kept").outcomes, [kept(next, 1)]);
}

#[test]
fn a_writer_that_panics_leaves_nobody_waiting() {
    let dir = TempDir::new().expect("temporary directory");
    let faults = Arc::new(Faults::default());
    let log = open_faulty(&faults, dir.path()).expect("opens");
    faults.write_panics.store(true, Ordering::SeqCst);
    let lost = log.append(vec![section(&[b"x"], &Lease::new())], later());
    assert!(!matches!(lost.blocking_recv(), Ok(Ok(_))));
    let deadline = later();
    while log.trouble().is_none() {
        assert!(Instant::now() < deadline, "the panic is reported");
        std::thread::yield_now();
    }
    let after = log.append(vec![section(&[b"x"], &Lease::new())], later());
    assert!(matches!(after.blocking_recv(), Ok(Err(_))));
}

#[test]
fn a_full_disk_is_waited_out_or_refused_and_loses_nothing() {
    let dir = TempDir::new().expect("temporary directory");
    let faults = Arc::new(Faults::default());
    let log = open_faulty(&faults, dir.path()).expect("opens");
    append(&log, &[b"0"]).expect("kept");
    faults.disk_is_full.store(true, Ordering::SeqCst);
    let impatient = log.append(vec![section(&[b"x"], &Lease::new())], Instant::now());
    assert!(matches!(impatient.blocking_recv(), Ok(Err(AppendError::DiskFull))));
    assert_eq!(log.trouble().as_deref(), Some("the disk is full"));
    let patient = log.append(vec![section(&[b"1"], &Lease::new())], later());
    faults.disk_is_full.store(false, Ordering::SeqCst);
    let committed = patient.blocking_recv().expect("the writer answers").expect("kept");
    assert_eq!(committed.outcomes, [kept(1, 1)]);
    assert_eq!(log.trouble(), None);
    assert_eq!(read_all(&log, 0).expect("readable"), numbered(0..2));
    drop(log);
    let log = open(dir.path(), &config()).expect("opens");
    assert_eq!(read_all(&log, 0).expect("readable"), numbered(0..2));
}

#[test]
fn a_write_torn_at_any_byte_is_cut_off_and_costs_no_other_record() {
    let dir = TempDir::new().expect("temporary directory");
    let path = killed_after(dir.path(), 5);
    let whole = fs::read(&path).expect("readable");
    let starts = frame_starts(&path);
    let (last, end) = (starts[4], starts[5]);
    for cut in last..end {
        // The file's room was allocated: behind the cut are zeros, or the end.
        for room in [0, 4096] {
            let mut torn = whole[..cut].to_vec();
            torn.resize(cut + room, 0);
            fs::write(&path, torn).expect("writable");
            let log = open(dir.path(), &config()).expect("a torn end is no damage");
            assert_eq!(read_all(&log, 0).expect("readable"), numbered(0..4), "cut at {cut}");
            assert_eq!(append(&log, &[b"4"]).expect("kept").outcomes, [kept(4, 1)]);
        }
    }
    // Cut between two frames, nothing is missing.
    fs::write(&path, &whole[..end]).expect("writable");
    let log = open(dir.path(), &config()).expect("opens");
    assert_eq!(read_all(&log, 0).expect("readable"), numbered(0..5));
}

#[test]
fn any_damaged_byte_in_the_middle_is_reported_and_never_passed_over_in_silence() {
    // Each waits for the disk nearly all the time, so that they do it together.
    const PARTS: usize = 4;
    std::thread::scope(|scope| {
        for part in 0..PARTS {
            scope.spawn(move || {
                let dir = TempDir::new().expect("temporary directory");
                let path = killed_after(dir.path(), 5);
                let starts = frame_starts(&path);
                for at in (starts[2]..starts[3]).skip(part).step_by(PARTS) {
                    // Going on without the record writes and syncs a new segment, which takes most of the test's time.
                    let goes_on = (at - starts[2]) / PARTS % 4 == part;
                    assert_reported(dir.path(), &path, at, goes_on);
                }
            });
        }
    });
}

/// Damages a byte of the third of five records, and puts it back.
fn assert_reported(dir: &Path, path: &Path, at: usize, goes_on: bool) {
    let whole = fs::read(path).expect("readable");
    let mut damaged = whole.clone();
    damaged[at] ^= 0x40;
    fs::write(path, &damaged).expect("writable");
    match open(dir, &config()) {
        Err(LogOpenError::Corrupt(text)) => {
            assert!(text.contains(".log") && text.contains("offset 2 "), "byte {at}: {text}");
        }
        Err(error) => panic!("byte {at}: {error}"),
        Ok(_) => panic!("byte {at}: damage went unnoticed"),
    }
    assert_eq!(fs::read(path).expect("readable"), damaged, "a log that is refused is left as it was");
    if goes_on {
        let accepting = config::LogConfig { accept_corruption: true, ..config() };
        let log = open(dir, &accepting).expect("opens without the lost record");
        let kept: Vec<_> = [numbered(0..2), numbered(3..5)].concat();
        assert_eq!(read_all(&log, 0).expect("readable"), kept, "byte {at}");
        assert_eq!(log.lost_records(), 1);
    }
    fs::write(path, &whole).expect("writable");
}

#[test]
fn damage_to_the_last_record_of_a_log_that_was_closed_is_no_torn_write() {
    let dir = TempDir::new().expect("temporary directory");
    let log = open(dir.path(), &config()).expect("opens");
    append(&log, &[b"0"]).expect("kept");
    append(&log, &[b"1"]).expect("kept");
    drop(log);
    let path = super::segment::Segment::path_of(&dir.path().join("log"), 0);
    let starts = frame_starts(&path);
    let mut bytes = fs::read(&path).expect("readable");
    bytes[starts[2] - 1] ^= 1;
    fs::write(&path, bytes).expect("writable");
    assert!(matches!(open(dir.path(), &config()), Err(LogOpenError::Corrupt(_))));
}

#[test]
fn nothing_comes_in_under_a_lease_that_has_ended() {
    let dir = TempDir::new().expect("temporary directory");
    let log = open(dir.path(), &config()).expect("opens");
    let (dead, alive) = (Lease::new(), Lease::new());
    dead.end();
    let sections = vec![section(&[b"x", b"y"], &dead), section(&[b"0"], &alive)];
    let committed = log.append(sections, later()).blocking_recv().expect("answered").expect("kept");
    assert_eq!(committed.outcomes, [SectionOutcome::KeyDead, kept(0, 1)]);
    assert_eq!(read_all(&log, 0).expect("readable"), numbered(0..1));
}

/// Another gateway may have redriven the same by then.
#[test]
fn what_is_to_be_kept_before_a_time_is_left_out_after_it_also_if_it_waited_until_then() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let log = open(dir.path(), &config()).expect("opens");
    let before = |time: Instant| {
        let mut section = section(&[b"a"], &Lease::new());
        section.keep_before(time);
        section
    };
    let late = before(Instant::now());
    assert!(!late.holds());
    let appended = log.append(vec![late, before(later())], later());
    let committed = appended.blocking_recv().expect("the writer answers").expect("kept");
    assert_eq!(committed.outcomes, [SectionOutcome::KeyDead, kept(0, 1)]);
}

#[test]
fn retention_removes_what_no_consumer_holds_and_holds_back_what_one_does() {
    let dir = TempDir::new().expect("temporary directory");
    let small = config::LogConfig { segment_bytes: 64 << 10, retention_bytes: 256 << 10, ..config() };
    let log = open(dir.path(), &small).expect("opens");
    let (storage, other) = (log.hold(), log.hold());
    log.begin_retention();
    let payload = vec![7; 16 << 10];
    let fill = |log: &EmbeddedLog| {
        for n in 0..1000 {
            let soon = Instant::now() + Duration::from_millis(100);
            let appended = log.append(vec![section(&[&payload], &Lease::new())], soon).blocking_recv();
            if let Err(error) = appended.expect("answered") {
                return (n, error);
            }
        }
        panic!("the budget was never reached")
    };
    let (kept, error) = fill(&log);
    assert!(matches!(error, AppendError::Budget { retention_bytes: 262_144 }), "{error}");
    assert!(log.bytes() <= small.retention_bytes);
    assert_eq!(read_all(&log, 0).expect("readable").len(), kept);

    storage.set(log.next_offset());
    let (none, _) = fill(&log);
    assert_eq!((none, log.first_offset()), (0, 0), "nothing that one of them holds is removed");
    let before = log.bytes();
    for _ in 0..20 {
        fill(&log);
    }
    assert!(log.bytes() <= before.max(small.retention_bytes), "waiting for room takes none");

    other.set(log.next_offset());
    append(&log, &[&payload]).expect("there is room again");
    assert!(log.first_offset() > 0);
    assert!(log.bytes() <= small.retention_bytes);
    fill(&log);
    let first = log.first_offset();

    drop(other);
    drop(storage);
    for _ in 0..100 {
        append(&log, &[&payload]).expect("nobody holds anything");
    }
    assert!(log.first_offset() > first);
}

#[test]
fn before_retention_begins_nothing_is_removed() {
    let dir = TempDir::new().expect("temporary directory");
    let small = config::LogConfig { segment_bytes: 64 << 10, retention_bytes: 128 << 10, ..config() };
    let log = open(dir.path(), &small).expect("opens");
    let payload = vec![7; 16 << 10];
    let append = || log.append(vec![section(&[&payload], &Lease::new())], Instant::now()).blocking_recv();
    while append().expect("answered").is_ok() {}
    assert_eq!(log.first_offset(), 0);
    log.begin_retention();
    append().expect("answered").expect("the oldest segment makes room");
    assert!(log.first_offset() > 0);
}

#[test]
fn received_times_never_go_back_by_a_little_and_follow_a_clock_that_was_set_back() {
    let dir = TempDir::new().expect("temporary directory");
    let log = open(dir.path(), &config()).expect("opens");
    let at = |received_at| {
        let id = DatasourceId::new("press-4").expect("slug");
        let mut section = Section::new(id, KeyId([1; 6]), Lease::new(), Transport::Http, 0, received_at);
        section.push("t", b"", "", &[], RecordFlags::default());
        log.append(vec![section], later()).blocking_recv().expect("answered").expect("kept");
    };
    let start = 1_700_000_000_000_000;
    for time in [start, start - 900_000, start + 5, start - 60_000_000] {
        at(time);
    }
    let batches = log.read(0, 1 << 20).expect("readable");
    let times: Vec<_> = batches.iter().flat_map(|b| b.records()).map(|r| r.received_at - start).collect();
    assert_eq!(times, [0, 0, 5, -60_000_000]);
}

/// The clock goes forwards and back, more than once in a segment and from one to the next.
#[test]
fn a_time_is_found_whatever_the_clock_has_done() {
    let dir = TempDir::new().expect("temporary directory");
    let config = config::LogConfig { segment_bytes: 1 << 20, ..config() };
    let log = open(dir.path(), &config).expect("opens");
    let start = now_micros();
    let hour = 3_600_000_000;
    let jumps = [0, 10, -20, 5, -40].map(|hours| hours * hour);
    let clock = |n: u32| start + i64::from(n) * 1_000_000 + jumps[n as usize / 30 % jumps.len()];
    let append_at = |log: &EmbeddedLog, n| {
        let id = DatasourceId::new("press-4").expect("slug");
        let mut section = Section::new(id, KeyId([1; 6]), Lease::new(), Transport::Http, 0, clock(n));
        section.push("t", &[0; 60_000], "", &[], RecordFlags::default());
        log.append(vec![section], later()).blocking_recv().expect("answered").expect("kept");
    };
    let times = |log: &EmbeddedLog, mut from: Offset| {
        let mut times = Vec::new();
        while from < log.next_offset() {
            let batches = log.read(from, 1 << 20).expect("readable");
            let records = batches.iter().flat_map(|batch| batch.records());
            times.extend(records.filter(|r| r.offset >= from).map(|r| (r.offset, r.received_at)));
            from = batches.last().expect("some").next_offset();
        }
        times
    };
    (0..170).for_each(|n| append_at(&log, n));
    let check = |log: &EmbeddedLog| {
        let all = times(log, 0);
        assert!(fs::read_dir(dir.path().join("log")).expect("a directory").count() > 4);
        for wanted in
            (-42..12).flat_map(|hours| [0, 31, 95, 155].map(|s| start + hours * hour + s * 1_000_000))
        {
            let at = log.offset_at(wanted).expect("found");
            let first = all.iter().find(|(_, received_at)| *received_at >= wanted);
            assert!(first.is_none_or(|(offset, _)| at <= *offset), "{at} is behind {first:?}");
        }
        // And not always at the beginning.
        assert!(log.offset_at(start + 20 * hour).expect("found") > 100);
    };
    check(&log);
    drop(log);
    let log = open(dir.path(), &config).expect("opens");
    check(&log);
}

#[test]
fn a_batch_says_whether_a_record_of_it_is_to_be_retained_and_a_record_who_published_it() {
    let dir = TempDir::new().expect("temporary directory");
    let at = |log: &EmbeddedLog, flags| {
        let id = DatasourceId::new("press-4").expect("slug");
        let mut section = Section::new(id, KeyId([1; 6]), Lease::new(), Transport::Mqtt, u64::MAX, 0);
        section.push("t", b"", "", &[], RecordFlags::WILL);
        section.push("t", b"", "", &[], flags);
        log.append(vec![section], later()).blocking_recv().expect("answered").expect("kept");
    };
    let log = open(dir.path(), &config()).expect("opens");
    at(&log, RecordFlags::default());
    at(&log, RecordFlags::RETAIN.with(RecordFlags::WILL));
    let seen = |log: &EmbeddedLog| {
        let batches = log.read(0, 1 << 20).expect("readable");
        let publishers = batches.iter().flat_map(|b| b.records()).map(|r| r.publisher);
        (batches.iter().map(Batch::has_retained).collect::<Vec<_>>(), publishers.collect::<Vec<_>>())
    };
    let expected = (vec![false, true], vec![u64::MAX; 4]);
    assert_eq!(seen(&log), expected, "from memory");
    drop(log);
    let log = open(dir.path(), &config()).expect("opens");
    assert_eq!(seen(&log), expected, "from the disk");
}

#[derive(Debug, Clone)]
enum Step {
    Append(Vec<u16>),
    Reopen,
    ReadFrom(prop::sample::Index),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => prop::collection::vec(0..2000_u16, 1..6).prop_map(Step::Append),
        1 => Just(Step::Reopen),
        3 => any::<prop::sample::Index>().prop_map(Step::ReadFrom),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Compares the log with the simplest model of it: a vector of payload lengths.
    #[test]
    fn the_log_behaves_as_a_vector(steps in prop::collection::vec(step(), 1..40)) {
        let dir = TempDir::new().expect("temporary directory");
        let small = config::LogConfig { segment_bytes: 8 << 10, retention_bytes: 1 << 30, ..config() };
        let mut log = open(dir.path(), &small).expect("opens");
        let mut model: Vec<usize> = Vec::new();
        for step in steps {
            match step {
                Step::Append(lengths) => {
                    let payloads: Vec<Vec<u8>> = lengths.iter().map(|n| vec![1; usize::from(*n)]).collect();
                    let borrowed: Vec<&[u8]> = payloads.iter().map(Vec::as_slice).collect();
                    let committed = append(&log, &borrowed).expect("kept");
                    let records = u32::try_from(lengths.len()).expect("few");
                    prop_assert_eq!(committed.outcomes, vec![kept(model.len() as Offset, records)]);
                    model.extend(lengths.iter().map(|n| usize::from(*n)));
                }
                Step::Reopen => {
                    drop(log);
                    log = open(dir.path(), &small).expect("opens");
                }
                Step::ReadFrom(index) => {
                    let from = index.index(model.len() + 1);
                    let read = read_all(&log, from as Offset).expect("readable");
                    let read: Vec<_> = read.iter().map(|(offset, payload)| (*offset, payload.len())).collect();
                    let expected: Vec<_> = (from..model.len()).map(|n| (n as Offset, model[n])).collect();
                    prop_assert_eq!(read, expected);
                }
            }
            prop_assert_eq!(log.next_offset(), model.len() as Offset);
        }
    }
}
