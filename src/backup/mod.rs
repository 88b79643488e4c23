//! Backups: a copy of a data directory as it was at one moment, made while the gateway runs.
//!
//! In this order, so that all that is copied goes together and nobody waits for it:
//!
//! 1. A copy of `sessions.db`, and snapshots of the stores (`records.db`, `retained.db`): no cursor is ahead of the log.
//! 2. The cut. While nothing of the registry can change, it is copied, and the log's end is noted: no record in the
//!    backup has a key or datasource that its registry does not know, and no rule is about offsets that are given anew.
//! 3. The log: ended segments get a second name in the backup (a hard link), and the log writes no such file over
//!    (`src/log/spare.rs`). What has no second name, because the backup is on another disk or the segment is the newest,
//!    is copied up to the cut.
//! 4. Small files such as `admin.key`, at once, so that they go with the registry. The stores are copied from their
//!    snapshots, and to another disk the other two from their near copies (`near_copy.rs`). Files that were set aside come
//!    last, and may be removed meanwhile.
//! 5. The manifest, with the digest of each file.
//!
//! All of it is written under another name beside the directory that was asked for, synced, and renamed: a backup is
//! complete, or it is not there. [`BackupDesk`] runs one at a time.

mod error;
pub mod manifest;
mod near_copy;
mod pace;
pub mod place;
mod progress;
pub mod restore;
mod restore_mark;
mod sources;
mod writer;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use parking_lot::Mutex;
use serde::Serialize;
use serde_json::json;
use tokio::sync::watch;
use tracing::{info, warn};

pub use error::BackupError;
pub use pace::BackupPace;
pub use sources::BackupSources;

use self::manifest::BackupManifest;
use self::place::BackupPlace;
use self::progress::BackupProgress;
use self::writer::BackupWriter;
use crate::auth::audit::{Actor, AuditEvent};
use crate::message::{Offset, TimeMicros, now_micros};
use crate::time::Rfc3339;

/// Makes backups of one gateway, one after the other.
pub struct BackupDesk {
    /// `None` in a cluster, whose data is on NATS.
    sources: Option<Arc<BackupSources>>,
    last: Mutex<Option<Arc<BackupRun>>>,
    /// Held while one is begun, which waits for the disk.
    beginning: Mutex<()>,
    /// No backup goes on.
    is_closed: AtomicBool,
}

/// A backup that runs or has ended.
struct BackupRun {
    dir: PathBuf,
    started_at: TimeMicros,
    progress: BackupProgress,
    outcome: watch::Sender<Option<BackupOutcome>>,
}

/// How a backup has ended.
#[derive(Clone)]
struct BackupOutcome {
    ended_at: TimeMicros,
    result: Result<BackupSummary, String>,
}

/// What a backup has.
#[derive(Debug, Clone, Serialize)]
pub struct BackupSummary {
    /// Files, without the manifest.
    pub files: usize,
    /// Their bytes.
    pub bytes: u64,
    /// Of these, in files that the log has too.
    pub linked_bytes: u64,
    /// The oldest offset in it.
    pub first_offset: Offset,
    /// The offset behind its last record.
    pub next_offset: Offset,
    /// Files of the data directory that are not in it, because of their names, or because they were set aside and have been
    /// removed meanwhile.
    pub left_out: Vec<String>,
}

/// A backup as it is shown.
#[derive(Debug, Serialize)]
pub struct BackupReport {
    /// Where it is, or will be.
    pub dir: PathBuf,
    /// `running`, `done` or `failed`.
    pub state: &'static str,
    /// When it was asked for.
    pub started_at: Rfc3339,
    /// When it ended.
    pub ended_at: Option<Rfc3339>,
    /// Bytes that are copied or checked.
    pub bytes_done: u64,
    /// Of so many; 0 until that is known.
    pub bytes_total: u64,
    /// What it has, once it is done.
    #[serde(flatten)]
    pub summary: Option<BackupSummary>,
    /// Why there is none.
    pub error: Option<String>,
}

impl BackupRun {
    fn report(&self) -> BackupReport {
        let outcome = self.outcome.borrow().clone();
        let (ended_at, result) = outcome.map(|outcome| (Rfc3339(outcome.ended_at), outcome.result)).unzip();
        let (state, summary, error) = match result {
            None => ("running", None, None),
            Some(Ok(summary)) => ("done", Some(summary), None),
            Some(Err(error)) => ("failed", None, Some(error)),
        };
        let (bytes_done, bytes_total) = self.progress.bytes();
        let bytes_done = if bytes_total > 0 { bytes_done.min(bytes_total) } else { bytes_done };
        let (dir, started_at) = (self.dir.clone(), Rfc3339(self.started_at));
        BackupReport { dir, state, started_at, ended_at, bytes_done, bytes_total, summary, error }
    }
}

impl BackupDesk {
    /// Makes backups of these; `None` in a cluster.
    pub fn new(sources: Option<BackupSources>) -> Self {
        let (last, beginning, is_closed) = (Mutex::default(), Mutex::default(), AtomicBool::new(false));
        Self { sources: sources.map(Arc::new), last, beginning, is_closed }
    }

    /// Begins a backup in `dir`, which must not be there yet, or be empty. Blocks until that is noted in the audit; the
    /// rest is done by a thread of its own.
    ///
    /// # Errors
    /// [`BackupError`]: nothing is begun.
    pub fn begin(&self, dir: &Path, pace: BackupPace, actor: &Actor) -> Result<BackupReport, BackupError> {
        let sources = self.sources.clone().ok_or(BackupError::Cluster)?;
        let _one_at_a_time = self.beginning.lock();
        if self.last.lock().as_ref().is_some_and(|run| run.outcome.borrow().is_none()) {
            return Err(BackupError::Running);
        }
        let place = BackupPlace::prepare(dir, sources.data_dir())?;
        let what = json!({ "dir": place.dir() });
        let act = AuditEvent { action: "backup.begun", datasource: None, key_id: None, what: &what };
        sources.registry().audit(actor, &act)?;
        let run = Arc::new(BackupRun {
            dir: place.dir().to_owned(),
            started_at: now_micros(),
            progress: BackupProgress::default(),
            outcome: watch::Sender::new(None),
        });
        let (kept, actor) = (run.clone(), actor.under_way());
        let thread = std::thread::Builder::new().name("backup".to_owned());
        let thread = thread.spawn(move || kept.carry_out(&sources, place, pace, &actor));
        thread.map_err(|error| BackupError::Io { path: dir.to_owned(), error })?;
        let report = run.report();
        *self.last.lock() = Some(run);
        if self.is_closed.load(Ordering::SeqCst) {
            self.cancel();
        }
        Ok(report)
    }

    /// The last backup since the start.
    pub fn report(&self) -> Option<BackupReport> {
        self.last.lock().as_ref().map(|run| run.report())
    }

    /// Ends a backup that runs at its next step, which leaves nothing of it, and every later one.
    pub fn cancel(&self) {
        self.is_closed.store(true, Ordering::SeqCst);
        if let Some(run) = &*self.last.lock() {
            run.progress.cancel();
        }
    }

    /// Returns once no backup runs, or at the deadline.
    pub async fn ended(&self, deadline: Instant) {
        let Some(run) = self.last.lock().clone() else { return };
        let mut outcome = run.outcome.subscribe();
        if tokio::time::timeout_at(deadline.into(), outcome.wait_for(Option::is_some)).await.is_err() {
            warn!("an unfinished backup is left behind; the next one removes it");
        }
    }
}

impl BackupRun {
    fn carry_out(&self, sources: &BackupSources, place: BackupPlace, pace: BackupPace, actor: &Actor) {
        let _ended = BackupEndGuard(self);
        let result = self.make_apart(sources, place, pace);
        let what = match &result {
            Ok(summary) => {
                let BackupSummary { bytes, next_offset, .. } = summary;
                info!(dir = %self.dir.display(), bytes, next_offset, "a backup is complete");
                json!({ "dir": self.dir, "summary": summary })
            }
            Err(error) => {
                warn!(dir = %self.dir.display(), %error, "a backup has failed");
                json!({ "dir": self.dir, "error": error.to_string() })
            }
        };
        let action = if result.is_ok() { "backup.made" } else { "backup.failed" };
        let act = AuditEvent { action, datasource: None, key_id: None, what: &what };
        if let Err(error) = sources.registry().audit(actor, &act) {
            warn!(%error, action, "it is not in the audit");
        }
        self.end(result.map_err(|error| error.to_string()));
    }

    /// Makes it on a thread of its own, whose priority is lowered for good: the caller goes on to the audit, for which
    /// it locks the registry.
    fn make_apart(
        &self,
        sources: &BackupSources,
        place: BackupPlace,
        pace: BackupPace,
    ) -> Result<BackupSummary, BackupError> {
        std::thread::scope(|scope| {
            let making = std::thread::Builder::new().name("backup-copy".to_owned());
            let making = making.spawn_scoped(scope, || make_backup(sources, place, pace, &self.progress));
            let making = making.map_err(|error| BackupError::Io { path: self.dir.clone(), error })?;
            making.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    fn end(&self, result: Result<BackupSummary, String>) {
        self.outcome.send_replace(Some(BackupOutcome { ended_at: now_micros(), result }));
    }
}

/// Ends a run whose thread panics.
struct BackupEndGuard<'a>(&'a BackupRun);

impl Drop for BackupEndGuard<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.end(Err("the gateway has failed: see its own log, and report it".to_owned()));
        }
    }
}

/// Makes a backup of `sources` in `place`, which is complete when this returns.
///
/// # Errors
/// [`BackupError`]: nothing is left of it.
fn make_backup(
    sources: &BackupSources,
    place: BackupPlace,
    pace: BackupPace,
    progress: &BackupProgress,
) -> Result<BackupSummary, BackupError> {
    let mut writer = BackupWriter::new(place.unfinished(), sources.data_dir(), progress, pace)?;
    let (first_offset, next_offset) = sources.write(&mut writer)?;
    let (linked_bytes, left_out) = (writer.linked_bytes(), writer.take_left_out());
    let manifest = BackupManifest::new(first_offset, next_offset, writer.finish())?;
    let summary = BackupSummary {
        files: manifest.files.len(),
        bytes: manifest.files.iter().map(|file| file.bytes).sum(),
        linked_bytes,
        first_offset,
        next_offset,
        left_out,
    };
    place.finish(&manifest)?;
    Ok(summary)
}

/// Makes a backup of a data directory that no gateway uses.
///
/// # Errors
/// [`BackupError`]: nothing is left of it.
pub fn make_backup_here(sources: &BackupSources, dir: &Path) -> Result<BackupSummary, BackupError> {
    let place = BackupPlace::prepare(dir, sources.data_dir())?;
    make_backup(sources, place, BackupPace::Fast, &BackupProgress::default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::Registry;
    use crate::config::Config;
    use crate::consume::subscriber::sessions::SessionStore;
    use crate::log::EmbeddedLog;
    use crate::scheduler::is_lowered;

    #[tokio::test]
    async fn the_thread_that_notes_a_backup_in_the_audit_keeps_its_priority() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let data_dir = dir.path().join("data");
        std::fs::create_dir(&data_dir).expect("made");
        let config = Config::default();
        let log = EmbeddedLog::open(&data_dir, &config.log, &config.intake).expect("opens");
        let registry = Arc::new(Registry::open(&data_dir).expect("opens"));
        let (sessions, _) = SessionStore::open(&data_dir).expect("opens");
        let sources = BackupSources::new(&data_dir, registry, Arc::new(log), sessions);
        let place = BackupPlace::prepare(&dir.path().join("b"), &data_dir).expect("nothing is there");
        let run = BackupRun {
            dir: place.dir().to_owned(),
            started_at: now_micros(),
            progress: BackupProgress::default(),
            outcome: watch::Sender::new(None),
        };
        let noting = std::thread::spawn(move || {
            run.carry_out(&sources, place, BackupPace::Paced, &Actor::SYSTEM);
            let outcome = run.outcome.borrow().clone().map(|outcome| outcome.result);
            (outcome, is_lowered())
        });
        let (outcome, is_lowered) = noting.join().expect("no panic");
        assert!(matches!(outcome, Some(Ok(_))), "{:?}", outcome.and_then(Result::err));
        assert!(!is_lowered);
    }

    #[tokio::test]
    async fn what_is_not_in_a_backup_because_of_its_name_is_in_its_summary() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let data_dir = dir.path().join("data");
        std::fs::create_dir(&data_dir).expect("made");
        let config = Config::default();
        let log = EmbeddedLog::open(&data_dir, &config.log, &config.intake).expect("opens");
        let registry = Arc::new(Registry::open(&data_dir).expect("opens"));
        let (sessions, _) = SessionStore::open(&data_dir).expect("opens");
        for name in ["records-set-aside-1.db", "records-set-aside-1 (copy).db"] {
            std::fs::write(data_dir.join(name), "").expect("written");
        }
        let sources = BackupSources::new(&data_dir, registry, Arc::new(log), sessions);
        let (to, kept) = (dir.path().join("b"), dir.path().join("b"));
        // A thread of its own: its priority is lowered for good.
        let making = std::thread::spawn(move || make_backup_here(&sources, &to));
        let summary = making.join().expect("no panic").expect("made");
        assert_eq!(summary.left_out, ["records-set-aside-1 (copy).db"]);
        assert!(kept.join("records-set-aside-1.db").exists());
    }
}
