//! Callers that commit for themselves: when they do, and what a disk that fails or stalls makes of it.

use tokio::runtime::{Builder, Runtime};

use super::model_disk::{ModelDisk, assert_kept, open_model_with, payload};
use super::*;
use crate::log::PendingCommit;

/// Bytes of a segment that holds four records, and of one that holds all.
const SMALL: u64 = 16 << 10;
const LARGE: u64 = 1 << 20;

/// A log beside a runtime of one worker. Small commits are made by who appends, once eight have come one by one.
struct SoloLog {
    runtime: Runtime,
    dir: TempDir,
    model: Arc<ModelDisk>,
}

impl SoloLog {
    fn new() -> Self {
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_time().build().expect("a runtime");
        let (dir, model) = (TempDir::new().expect("temporary directory"), Arc::new(ModelDisk::default()));
        Self { runtime, dir, model }
    }

    fn open(&self, segment_bytes: u64) -> Result<EmbeddedLog, LogOpenError> {
        let config =
            config::LogConfig { segment_bytes, retention_bytes: 4 * segment_bytes, ..super::config() };
        open_model_with(&self.model, self.dir.path(), &config)
    }

    /// A log whose next append is committed by who calls it.
    fn open_warm(&self) -> EmbeddedLog {
        let log = self.open(LARGE).expect("opens");
        let _entered = self.runtime.enter();
        for number in 0.. {
            assert!(number < 100, "what comes one by one is committed by its caller");
            let mut pending = begin(&log, number);
            if pending.try_recv().is_ok() {
                break;
            }
            pending.blocking_recv().expect("answered").expect("kept");
            // The turn that answered has to end.
            std::thread::sleep(Duration::from_millis(1));
        }
        log
    }
}

fn begin(log: &EmbeddedLog, number: u64) -> PendingCommit {
    log.append(vec![section(&[&payload(number)], &Lease::new())], later())
}

/// Appends one by one until it fails, over several segments and retention. Returns how many were acknowledged.
fn fill(log: &EmbeddedLog) -> u64 {
    log.begin_retention();
    let from = log.next_offset();
    let failed =
        (from..from + 36).find(|number| !begin(log, *number).blocking_recv().is_ok_and(|kept| kept.is_ok()));
    failed.unwrap_or(from + 36)
}

#[test]
fn whichever_call_of_a_caller_fails_nothing_acknowledged_is_lost_and_a_want_is_waited_out() {
    let calls = {
        let solo = SoloLog::new();
        let _entered = solo.runtime.enter();
        let log = solo.open(SMALL).expect("opens");
        assert_eq!(fill(&log), 36);
        drop(log);
        solo.model.calls()
    };
    let wants = [libc::ENOSPC, libc::EMFILE, libc::ENFILE, libc::ENOMEM, libc::EINTR, libc::EDQUOT];
    for call in 0..calls {
        for errno in [wants[call % wants.len()], libc::EIO] {
            let what = format!("call {call} fails with {}", io::Error::from_raw_os_error(errno));
            let solo = SoloLog::new();
            let _entered = solo.runtime.enter();
            solo.model.fail(Some((call, errno)));
            let mut acknowledged = 0;
            if let Ok(log) = solo.open(SMALL) {
                acknowledged = fill(&log);
                assert!(errno == libc::EIO || acknowledged == 36, "{what}: {acknowledged}");
            }
            solo.model.fail(None);
            let log = solo.open(SMALL).unwrap_or_else(|error| panic!("{what}: {error}"));
            assert_kept(&log, acknowledged, &what);
        }
    }
}

#[test]
fn while_the_disk_stalls_what_else_the_thread_had_to_do_goes_on_and_the_next_commit_begins() {
    let solo = SoloLog::new();
    let log = Arc::new(solo.open_warm());
    let next = log.next_offset();
    solo.model.held.begin();
    let stalled = solo.runtime.spawn({
        let log = log.clone();
        async move { begin(&log, next).await.expect("answered").expect("kept").outcomes }
    });
    solo.model.held.wait_for(1);
    // The runtime has one worker.
    let (done, wait) = std::sync::mpsc::channel();
    solo.runtime.spawn(async move { done.send(()) });
    wait.recv_timeout(Duration::from_secs(20)).expect("another thread has taken the work over");
    let mut second = begin(&log, next + 1);
    let deadline = later();
    while !solo.model.held.are_waiting(2) {
        assert!(Instant::now() < deadline, "a thread commits beside a slow sync");
        drop(log.append(Vec::new(), later()));
        std::thread::yield_now();
    }
    assert!(second.try_recv().is_err(), "it is not durable");
    solo.model.held.end();
    assert_eq!(solo.runtime.block_on(stalled).expect("no panic"), [kept(next, 1)]);
    assert_eq!(second.blocking_recv().expect("answered").expect("kept").outcomes, [kept(next + 1, 1)]);
    assert_kept(&log, next + 2, "both");
}

#[test]
fn a_failed_sync_of_a_caller_is_waited_out_by_a_thread_and_the_caller_is_free() {
    let solo = SoloLog::new();
    let log = solo.open_warm();
    let next = log.next_offset();
    *solo.model.sync_fails.lock() = Some(libc::ENOSPC);
    let mut pending = {
        let _entered = solo.runtime.enter();
        begin(&log, next)
    };
    assert!(pending.try_recv().is_err(), "the disk is full");
    let deadline = later();
    while log.trouble().is_none() {
        assert!(Instant::now() < deadline, "the trouble is told");
        std::thread::yield_now();
    }
    *solo.model.sync_fails.lock() = None;
    assert_eq!(pending.blocking_recv().expect("answered").expect("kept").outcomes, [kept(next, 1)]);
    drop(log);
    assert_kept(&solo.open(LARGE).expect("opens"), next + 1, "after a restart");
}

#[test]
fn a_log_that_is_closed_while_a_caller_commits_answers_it_whatever_the_disk_does() {
    for result in [Ok(()), Err(libc::ENOSPC), Err(libc::EIO)] {
        let solo = SoloLog::new();
        let log = Arc::new(solo.open_warm());
        let next = log.next_offset();
        solo.model.held.begin();
        let appended = solo.runtime.spawn({
            let log = log.clone();
            async move {
                let soon = Instant::now() + Duration::from_millis(100);
                log.append(vec![section(&[&payload(next)], &Lease::new())], soon).await
            }
        });
        solo.model.held.wait_for(1);
        let closed = solo.runtime.spawn({
            let log = log.clone();
            async move { log.close().await }
        });
        std::thread::sleep(Duration::from_millis(20));
        solo.model.held.end_one(0, result);
        solo.model.held.end();
        let is_kept = solo.runtime.block_on(appended).expect("no panic").expect("answered").is_ok();
        solo.runtime.block_on(closed).expect("closes");
        // With nobody to wait for, a failure is told at once.
        assert_eq!(is_kept, result.is_ok(), "{result:?}");
        drop(log);
        let log = solo.open(LARGE).expect("opens");
        assert_kept(&log, next + u64::from(is_kept), "after a restart");
        // After an error for good nobody can say what is on the disk.
        let is_known = result != Err(libc::EIO);
        assert!(is_kept || !is_known || log.next_offset() == next, "what was answered as failed is kept");
    }
}
