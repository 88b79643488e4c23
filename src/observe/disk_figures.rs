//! What the data directory takes, and how much room its disk has. Measured every few seconds on a thread that may wait:
//! whoever reads the metrics gets what was measured last, and does not wait for a disk.

use std::path::{Path, PathBuf};

use parking_lot::Mutex;

use super::exposition::{ExpositionText, MetricKind};
use super::process_figures::count_open_fds;
use crate::log::disk_room;

/// The stores in the data directory, by their files.
const STORE_FILES: [(&str, &str); 4] = [
    ("records", "records.db"),
    ("registry", "registry.db"),
    ("retained", "retained.db"),
    ("sessions", "sessions.db"),
];

/// What the data directory takes.
pub struct DiskFigures {
    dir: PathBuf,
    /// How much the log may take.
    log_bytes_max: u64,
    last: Mutex<MeasuredFigures>,
}

/// What was measured last.
#[derive(Debug, Clone, Default)]
struct MeasuredFigures {
    /// What is free for the gateway on the disk, and how large that is.
    room: Option<(u64, u64)>,
    /// The stores that there are.
    stores: Vec<(&'static str, u64)>,
    open_fds: Option<u64>,
}

impl DiskFigures {
    /// Of a data directory whose log may take so much. Nothing is measured yet.
    pub fn new(dir: &Path, log_bytes_max: u64) -> Self {
        Self { dir: dir.to_owned(), log_bytes_max, last: Mutex::default() }
    }

    /// Measures it. Waits for the disk.
    pub fn measure_blocking(&self) {
        let bytes = |file: String| std::fs::metadata(self.dir.join(file)).ok().map(|found| found.len());
        let stores = STORE_FILES.iter().filter_map(|(store, file)| {
            Some((*store, bytes((*file).to_owned())? + bytes(format!("{file}-wal")).unwrap_or(0)))
        });
        let stores = stores.collect();
        let measured =
            MeasuredFigures { room: disk_room(&self.dir).ok(), stores, open_fds: count_open_fds() };
        *self.last.lock() = measured;
    }

    /// Writes what was measured last.
    pub fn write(&self, out: &mut ExpositionText) {
        let MeasuredFigures { room, stores, .. } = self.last.lock().clone();
        let name = "headgate_log_limit_bytes";
        out.family(name, MetricKind::Gauge, "What the log may take on disk (log.retention_bytes)");
        out.sample(name, &[], self.log_bytes_max);
        if let Some((free, all)) = room {
            let name = "headgate_disk_free_bytes";
            out.family(
                name,
                MetricKind::Gauge,
                "What is free for the gateway on the disk of its data directory",
            );
            out.sample(name, &[], free);
            let name = "headgate_disk_size_bytes";
            out.family(name, MetricKind::Gauge, "How large that disk is");
            out.sample(name, &[], all);
        }
        if !stores.is_empty() {
            let name = "headgate_store_bytes";
            out.family(name, MetricKind::Gauge, "What a store of the data directory takes on disk");
            stores.iter().for_each(|(store, bytes)| out.sample(name, &[("store", store)], bytes));
        }
    }

    /// How many file descriptors were open.
    pub fn open_fds(&self) -> Option<u64> {
        self.last.lock().open_fds
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stores_are_measured_with_their_write_ahead_logs() {
        let dir = tempfile::tempdir().expect("a directory");
        let figures = DiskFigures::new(dir.path(), 77);
        let text = |figures: &DiskFigures| {
            let mut out = ExpositionText::default();
            figures.write(&mut out);
            out.into_text()
        };
        assert!(!text(&figures).contains("headgate_disk_free_bytes"), "nothing is measured yet");
        std::fs::write(dir.path().join("records.db"), [0; 10]).expect("written");
        std::fs::write(dir.path().join("records.db-wal"), [0; 5]).expect("written");
        figures.measure_blocking();
        let text = text(&figures);
        for line in ["headgate_log_limit_bytes 77", "headgate_store_bytes{store=\"records\"} 15"] {
            assert!(text.lines().any(|found| found == line), "{text}");
        }
        assert!(!text.contains("store=\"sessions\""), "it is not there: {text}");
        assert!(text.contains("\nheadgate_disk_free_bytes "), "{text}");
    }
}
