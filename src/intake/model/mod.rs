//! A model test: seeded runs of intake, log, window and storage, with everything mixed that a client may mix and
//! everything that may go wrong beneath, against what was promised. The same seed gives the same run; only how much
//! a crash leaves of what was not synced depends on how long times are on the disk.
//! `HEADGATE_MODEL_SEEDS=50000` tries so many seeds, however long that takes, and `HEADGATE_MODEL_SEED=17` only
//! that one.
//!
//! Not in it: ids that expire or are evicted, and retention. A client there keeps something twice, as is promised.

mod check;
mod client;
mod faults;
mod run;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use self::run::ModelRun;

/// Seeds of a normal run.
const SEEDS: u64 = 3000;
/// The normal run ends after this time, however few seeds the machine has tried by then.
const NORMAL_RUN_MAX: Duration = Duration::from_secs(30);
/// Runs beside each other: each mostly waits for other threads.
const RUNNERS: usize = 8;
/// One in so many seeds has no crash, and is run twice.
const REPEATED_SEEDS: u64 = 50;

#[test]
fn what_was_promised_holds_whatever_is_mixed() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect("a number"));
    let (only, seeds) = (number("HEADGATE_MODEL_SEED"), number("HEADGATE_MODEL_SEEDS"));
    let began = Instant::now();
    let range = only.map_or(0..seeds.unwrap_or(SEEDS), |only| only..only + 1);
    let (next, done) = (AtomicU64::new(range.start), AtomicU64::new(0));
    let runner = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= range.end || (seeds.is_none() && began.elapsed() > NORMAL_RUN_MAX) {
                return;
            }
            let run = std::panic::AssertUnwindSafe(|| {
                let is_repeated = seed % REPEATED_SEEDS == 0;
                let run = || runtime.block_on(ModelRun::new(seed, !is_repeated).run());
                let outcome = run();
                if is_repeated {
                    assert_eq!(outcome, run(), "another run of the same seed");
                }
            });
            if let Err(panic) = std::panic::catch_unwind(run) {
                next.store(range.end, Ordering::Relaxed);
                eprintln!("HEADGATE_MODEL_SEED={seed} runs this again");
                std::panic::resume_unwind(panic);
            }
            done.fetch_add(1, Ordering::Relaxed);
        }
    };
    std::thread::scope(|scope| (0..RUNNERS).for_each(|_| drop(scope.spawn(runner))));
    eprintln!("{} seeds in {:?}", done.load(Ordering::Relaxed), began.elapsed());
}
