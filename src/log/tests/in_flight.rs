//! Two commits under way: what is acknowledged when, what a failure of either takes back, and what a loss of power
//! between them leaves.

use super::model_disk::{ModelDisk, assert_kept, open_model_with, payload};
use super::*;
use crate::log::PendingCommit;

/// Segments of four records, so that two commits that begin with an even number are in one.
fn fours() -> config::LogConfig {
    config::LogConfig { segment_bytes: 18 << 10, retention_bytes: 72 << 10, ..config() }
}

/// A log whose syncs wait for the test.
struct HeldLog {
    dir: TempDir,
    model: Arc<ModelDisk>,
    log: EmbeddedLog,
}

impl Drop for HeldLog {
    fn drop(&mut self) {
        self.model.held.end();
    }
}

impl HeldLog {
    fn open() -> Self {
        let (dir, model) = (TempDir::new().expect("temporary directory"), Arc::new(ModelDisk::default()));
        let log = open_model_with(&model, dir.path(), &fours()).expect("opens");
        log.begin_retention();
        Self { dir, model, log }
    }

    /// Begins an append of the record with this number, without an id or with one.
    fn begin(&self, number: u64, id: Option<OnceId>) -> PendingCommit {
        let mut section = section(&[&payload(number)], &Lease::new());
        id.into_iter().for_each(|id| section.keep_once(id));
        self.log.append(vec![section], later())
    }

    /// Begins two appends whose syncs wait.
    fn begin_two(&self) -> [PendingCommit; 2] {
        self.model.held.begin();
        let next = self.log.next_offset();
        let first = self.begin(next, None);
        self.model.held.wait_for(1);
        let second = self.begin(next + 1, None);
        while !self.model.held.are_waiting(2) {
            // It is due once the first has been under way for a while: whatever comes then finds that out.
            drop(self.log.append(Vec::new(), later()));
            std::thread::yield_now();
        }
        [first, second]
    }
}

fn outcome(pending: PendingCommit) -> Result<SectionOutcome, AppendError> {
    pending.blocking_recv().expect("answered").map(|mut committed| committed.outcomes.remove(0))
}

fn is_open(pending: &mut PendingCommit) -> bool {
    matches!(pending.try_recv(), Err(tokio::sync::oneshot::error::TryRecvError::Empty))
}

#[test]
fn of_two_commits_under_way_the_first_is_acknowledged_when_it_is_durable_and_the_second_not_before() {
    let held = HeldLog::open();
    let [first, mut second] = held.begin_two();
    held.model.held.end_one(0, Ok(()));
    assert_eq!(outcome(first).expect("kept"), kept(0, 1));
    assert!(is_open(&mut second), "its own sync is under way");
    assert_eq!(held.log.next_offset(), 1, "nor does a reader see it");
    held.model.held.end();
    assert_eq!(outcome(second).expect("kept"), kept(1, 1));
    assert_kept(&held.log, 2, "both");
}

/// It began when the first was written, so it covers that too.
#[test]
fn the_sync_of_the_second_acknowledges_both_in_order() {
    let held = HeldLog::open();
    let [first, second] = held.begin_two();
    held.model.held.end_one(1, Ok(()));
    assert_eq!(outcome(second).expect("kept"), kept(1, 1));
    assert_eq!(outcome(first).expect("kept"), kept(0, 1));
    let left = TempDir::new().expect("temporary directory");
    held.model.copy_after_power_loss(left.path(), || false);
    assert_kept(&open(left.path(), &fours()).expect("opens"), 2, "after a loss of power");
    held.model.held.end();
}

#[test]
fn a_duplicate_of_what_is_under_way_waits_for_its_outcome_and_so_does_a_barrier() {
    let held = HeldLog::open();
    let id = OnceId::of_exchange(1, 1);
    held.model.held.begin();
    let first = held.begin(0, Some(id));
    held.model.held.wait_for(1);
    let mut duplicate = held.begin(0, Some(id));
    let mut barrier = held.log.append(Vec::new(), later());
    let release = held.log.release(vec![id], later());
    assert!(is_open(&mut duplicate) && is_open(&mut barrier));
    held.model.held.end();
    assert_eq!(outcome(first).expect("kept"), kept(0, 1));
    assert_eq!(outcome(duplicate).expect("known"), SectionOutcome::Duplicate(Offsets::consecutive(0, 1)));
    assert!(barrier.blocking_recv().expect("answered").is_ok());
    assert!(release.blocking_recv().expect("answered").is_ok());
    assert_eq!(outcome(held.begin(1, Some(id))).expect("kept"), kept(1, 1), "it was released");
}

#[test]
fn a_duplicate_of_what_failed_is_kept_in_its_place() {
    let held = HeldLog::open();
    let id = OnceId::of_exchange(1, 1);
    held.model.held.begin();
    let mut section = section(&[&payload(0)], &Lease::new());
    section.keep_once(id);
    let impatient = held.log.append(vec![section], Instant::now());
    held.model.held.wait_for(1);
    let duplicate = held.begin(0, Some(id));
    held.model.held.end_one(0, Err(libc::ENOSPC));
    assert!(matches!(outcome(impatient), Err(AppendError::DiskFull)));
    held.model.held.end();
    assert_eq!(outcome(duplicate).expect("kept"), kept(0, 1));
    assert_kept(&held.log, 1, "once");
}

/// The pulse of a log, or `None` if it has not come within two seconds.
fn pulse(log: &EmbeddedLog) -> Option<bool> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    runtime.block_on(async { tokio::time::timeout(Duration::from_secs(2), log.pulse()).await.ok() })
}

/// A watchdog that takes a slow disk for a hang restarts a gateway again and again, which makes no disk faster.
#[test]
fn a_log_whose_disk_does_not_answer_has_a_pulse() {
    let held = HeldLog::open();
    assert_eq!(pulse(&held.log), Some(true), "nothing is under way");
    held.model.held.begin();
    let appended = held.begin(0, None);
    held.model.held.wait_for(1);
    assert_eq!(pulse(&held.log), Some(true), "a sync is");
    held.model.held.end();
    assert_eq!(outcome(appended).expect("kept"), kept(0, 1));
    assert_eq!(pulse(&held.log), Some(true));
}

#[test]
fn a_log_that_takes_nothing_until_a_restart_says_so_in_its_pulse() {
    let held = HeldLog::open();
    held.model.held.begin();
    let full = held.begin(0, None);
    held.model.held.wait_for(1);
    held.model.held.end_one(0, Err(libc::ENOSPC));
    assert_eq!(pulse(&held.log), Some(true), "room may come, and helps without a restart");
    held.model.held.end();
    assert!(outcome(full).is_ok());
    held.model.held.begin();
    let failed = held.begin(1, None);
    held.model.held.wait_for(1);
    held.model.held.end_one(0, Err(libc::EIO));
    held.model.held.end();
    assert!(matches!(outcome(failed), Err(AppendError::Failed(_))));
    assert_eq!(pulse(&held.log), Some(false));
}

/// Puts what a start would find after a kill into another directory: the disk lives on.
fn copy_after_kill(from: &Path, to: &Path) {
    fs::create_dir_all(to.join("log")).expect("made");
    for entry in fs::read_dir(from.join("log")).expect("there").map(|entry| entry.expect("readable")) {
        if entry.path().extension().is_some_and(|ends| ends == "log") {
            fs::copy(entry.path(), to.join("log").join(entry.file_name())).expect("copied");
        }
    }
}

/// A barrier says that nothing more comes of a key that is dead, so a kill must not bring it back.
#[test]
fn what_a_key_has_written_in_vain_is_gone_for_good_once_a_barrier_is_answered_after_its_death() {
    for others in [0, 1] {
        let held = HeldLog::open();
        (0..others).for_each(|n| assert_eq!(outcome(held.begin(n, None)).expect("kept"), kept(n, 1)));
        held.model.held.begin();
        let lease = Lease::new();
        let dying = held.log.append(vec![section(&[&payload(others)], &lease)], later());
        held.model.held.wait_for(1);
        *held.model.sync_fails.lock() = Some(libc::ENOSPC);
        lease.end();
        held.model.held.end();
        let barrier = held.log.append(Vec::new(), later());
        assert!(barrier.blocking_recv().expect("answered").is_ok());
        let left = TempDir::new().expect("temporary directory");
        copy_after_kill(held.dir.path(), left.path());
        assert_eq!(open(left.path(), &fours()).expect("opens").next_offset(), others, "of the dead key");
        assert_eq!(outcome(dying).expect("answered"), SectionOutcome::KeyDead);
        *held.model.sync_fails.lock() = None;
        assert_eq!(outcome(held.begin(others, None)).expect("kept"), kept(others, 1), "{others} before");
        assert_kept(&held.log, others + 1, "afterwards");
    }
}

/// Whichever of the two fails, and whichever ends first: nothing that was acknowledged is lost, nothing is there
/// twice, and a want is waited out.
#[test]
fn whichever_of_two_syncs_fails_nothing_acknowledged_is_lost_and_nothing_is_there_twice() {
    let ends = [Ok(()), Err(libc::ENOSPC), Err(libc::EIO)];
    for (first_end, second_end) in ends.iter().flat_map(|first| ends.map(|second| (*first, second))) {
        for ends_first in [0, 1] {
            let what = format!("{first_end:?} and {second_end:?}, {ends_first} first");
            let held = HeldLog::open();
            (0..2).for_each(|n| assert_eq!(outcome(held.begin(n, None)).expect("kept"), kept(n, 1)));
            let [first, second] = held.begin_two();
            let ends = [first_end, second_end];
            held.model.held.end_one(ends_first, ends[ends_first]);
            held.model.held.end_one(0, ends[1 - ends_first]);
            held.model.held.end();
            let outcomes = [outcome(first), outcome(second)];
            let acknowledged = 2 + outcomes.iter().filter(|outcome| outcome.is_ok()).count() as u64;
            assert!(outcomes[0].is_ok() || outcomes[1].is_err(), "{what}: {outcomes:?}");
            assert!(acknowledged == 4 || ends.contains(&Err(libc::EIO)), "{what}: {outcomes:?}");
            let left = TempDir::new().expect("temporary directory");
            held.model.copy_after_power_loss(left.path(), || false);
            assert_kept(&open(left.path(), &fours()).expect("opens"), acknowledged, &what);
            if !ends.contains(&Err(libc::EIO)) {
                assert_eq!(outcome(held.begin(4, None)).expect("kept"), kept(4, 1), "{what}");
                assert_kept(&held.log, 5, &what);
            }
        }
    }
}

/// Both frames torn and reordered, over segments that were written over, with what retention and rolls do between.
#[test]
fn whatever_a_loss_of_power_takes_of_two_commits_nothing_acknowledged_is_lost() {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state >> 33
    };
    let held = HeldLog::open();
    let mut cases = 0;
    let mut check = |held: &HeldLog, acknowledged: u64, random: &mut dyn FnMut() -> u64| {
        let rounds = if acknowledged < 30 { 10 } else { 30 };
        for _ in 0..rounds {
            let left = TempDir::new().expect("temporary directory");
            // Now most of it is lost, now little.
            let share = random() % 8;
            held.model.copy_after_power_loss(left.path(), || random() % 8 < share);
            let what = format!("case {cases}");
            let log = open_model_with(&Arc::default(), left.path(), &fours())
                .unwrap_or_else(|e| panic!("{what}: {e}"));
            assert_kept(&log, acknowledged, &what);
            log.begin_retention();
            assert!(log.next_offset() <= acknowledged + 2, "{what}: more than was ever written");
            if cases % 4 == 0 {
                let next = log.next_offset();
                assert_eq!(append(&log, &[&payload(next)]).expect("kept").outcomes, [kept(next, 1)]);
                assert_kept(&log, next + 1, &what);
            }
            cases += 1;
        }
    };
    while held.log.next_offset() < 60 {
        let next = held.log.next_offset();
        let [first, second] = held.begin_two();
        check(&held, next, &mut random);
        // One of them ends, or the second, which settles both.
        let ends_first = usize::from(random() % 3 == 0);
        held.model.held.end_one(ends_first, Ok(()));
        if ends_first == 0 {
            assert!(outcome(first).is_ok());
            check(&held, next + 1, &mut random);
            held.model.held.end();
            assert!(outcome(second).is_ok());
        } else {
            assert!(outcome(second).is_ok() && outcome(first).is_ok());
            check(&held, next + 2, &mut random);
            held.model.held.end();
        }
    }
    assert!(held.log.first_offset() > 0, "retention has removed segments, and they were written over");
    assert!(cases > 1_000, "{cases}");
}
