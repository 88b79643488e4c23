//! The log on a disk that fails: at every call in turn, for good or for a while, and by losing what was not
//! synced.

use std::collections::VecDeque;
use std::sync::atomic::AtomicUsize;

use super::model_disk::{ModelChange, ModelDisk, assert_kept, open_model, open_model_with, payload, small};
use super::*;

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
    let fail = |call: usize, errno: i32| {
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
    };
    // Each waits for its disk nearly all the time, so that they do it together.
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| {
                loop {
                    let call = next.fetch_add(1, Ordering::SeqCst);
                    if call >= calls {
                        break;
                    }
                    fail(call, wants[call % wants.len()]);
                    fail(call, libc::EIO);
                }
            });
        }
    });
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
        let (now, after) = newest(&log);
        let starts = frame_starts(&path);
        // Not every file had an earlier life: a spare may not have been ready.
        if path == now && starts.len() == 3 && after[starts[2]..].iter().any(|byte| *byte != 0) {
            break (path, before);
        }
    };
    let next = log.next_offset();
    let (_, after) = newest(&log);
    let starts = frame_starts(&path);
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
