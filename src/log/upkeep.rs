//! Upkeep of the log's end: the next segment, retention, spare segments.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tracing::{debug, info, warn};

use super::age::ClockReading;
use super::writer::LogWriter;
use super::{AppendError, retention};
use crate::config::Durability;
use crate::limits::{SEGMENT_ALLOCATE_BYTES, WRITE_AHEAD_BYTES, WRITE_AHEAD_FREE_BYTES_MIN};

/// What is written ahead at a time.
static WRITE_AHEAD_ZEROS: [u8; WRITE_AHEAD_BYTES] = [0; WRITE_AHEAD_BYTES];

impl LogWriter {
    /// Ends the current segment and begins the next one. What is under way is settled first, so that
    /// it is in one segment.
    pub(super) fn roll(&mut self) -> Result<(), AppendError> {
        let shared = self.shared.clone();
        let _waiting = shared.queue.note_disk_wait();
        self.wait_settled()?;
        self.learn_durable();
        let first_offset = self.written.next_offset;
        // Preallocated room must not count against the budget.
        self.current.trim().map_err(|e| self.write_error(e))?;
        self.make_room(self.config.segment_bytes)?;
        if self.config.durability == Durability::Os {
            // So that a power failure can damage the newest segment only.
            self.current.sync().map_err(|e| self.write_error(e))?;
        }
        self.must_roll = true;
        let segment =
            self.spares.create(&*self.disk, &self.dir, first_offset).map_err(|e| self.write_error(e));
        self.shared.spare_bytes.store(self.spares.bytes(), Ordering::Relaxed);
        let segment = segment?;
        let sync_files = segment.sync_files(&*self.disk).map_err(|e| self.write_error(e))?;
        self.must_roll = false;
        self.synced_end = segment.end();
        self.written.position = segment.end();
        self.sync_files = sync_files;
        self.current = Arc::new(segment);
        self.shared.segments_mut().insert(first_offset, self.current.clone());
        Ok(())
    }

    /// Removes the segments that retention allows, and fails if `incoming_bytes` still do not fit. A spare
    /// segment takes no more room when it becomes one of the log.
    fn make_room(&mut self, incoming_bytes: u64) -> Result<(), AppendError> {
        self.give_back_spares_over_budget(incoming_bytes);
        let removable: Vec<_> = {
            let segments = self.shared.segments();
            let held = self.shared.holds.lowest();
            let (config, stay_s, now) = (&self.config, self.stay_s, ClockReading::now());
            let incoming_bytes = self.spares.bytes() + self.beside_spare(incoming_bytes);
            let count = retention::removable(&segments, config, stay_s, held, now, incoming_bytes);
            segments.values().take(count).cloned().collect()
        };
        for segment in removable {
            // One after the other, durably: a segment that stays while a later one is gone would be a gap,
            // which the next start would take for damage.
            let has_budget = self.shared.disk_bytes() + incoming_bytes <= self.config.retention_bytes;
            let keeps = self.spares.is_empty() || self.spares.has_room() && has_budget;
            let removed = match keeps {
                true => self.spares.keep(&*self.disk, segment.clone()),
                false => self.disk.remove(segment.path()),
            };
            if let Err(error) = removed {
                if self.unremovable.replace(segment.first_offset) != Some(segment.first_offset) {
                    warn!(%error, path = %segment.path().display(), "retention cannot remove a segment");
                }
                break;
            }
            let first_offset = segment.first_offset;
            self.shared.segments_mut().remove(&first_offset);
            self.shared.spare_bytes.store(self.spares.bytes(), Ordering::Relaxed);
            info!(first_offset, bytes = segment.disk_bytes(), "retention removed a segment");
            if self.spares.sync_dir(&*self.disk, &self.dir).is_err() {
                break;
            }
        }
        self.give_back_spares_over_budget(incoming_bytes);
        // A current segment that nobody needs goes as soon as there is a next one.
        let is_needed =
            self.shared.segments().len() > 1 || self.shared.holds.lowest().firmly < self.written.next_offset;
        if is_needed && self.is_over_budget(incoming_bytes) {
            return Err(AppendError::Budget { retention_bytes: self.config.retention_bytes });
        }
        Ok(())
    }

    fn is_over_budget(&self, incoming_bytes: u64) -> bool {
        self.shared.disk_bytes() + self.beside_spare(incoming_bytes) > self.config.retention_bytes
    }

    /// Spares never outrank data.
    fn give_back_spares_over_budget(&mut self, incoming_bytes: u64) {
        while !self.spares.is_empty() && self.is_over_budget(incoming_bytes) {
            self.give_back_spare();
        }
    }

    pub(super) fn give_back_spare(&mut self) {
        self.spares.give_back(&*self.disk);
        self.shared.spare_bytes.store(self.spares.bytes(), Ordering::Relaxed);
    }

    /// How many of `incoming_bytes` a spare segment has no room for.
    fn beside_spare(&self, incoming_bytes: u64) -> u64 {
        incoming_bytes.saturating_sub(self.spares.next_bytes())
    }

    /// Idle work: retention, and checking whether a trouble is over.
    pub(super) fn maintain(&mut self) {
        if self.shared.failure.get().is_some() {
            return;
        }
        self.learn_durable();
        self.window.expire(self.window.stamp());
        if self.shared.trouble.is_present() {
            let weight = self.shared.queue.begin_empty_turn();
            let is_over = self.check_room().is_ok();
            self.shared.queue.end_turn(weight);
            if is_over {
                self.shared.trouble.set(None);
            }
        } else {
            // Being over the budget is no trouble until something is to be written.
            let _ = self.make_room(0);
        }
    }

    /// Idle work: writes a little of the room that commits will take, so that their syncs cost less. Returns whether
    /// there is more of it to do. It is short, because a commit that comes meanwhile waits for it.
    pub(super) fn write_ahead(&mut self) -> bool {
        let may_write = self.config.durability == Durability::Fsync
            && self.shared.failure.get().is_none()
            && !self.shared.trouble.is_present()
            && !self.must_roll;
        if !may_write || self.is_short_of_room() {
            return false;
        }
        let shared = self.shared.clone();
        let _waiting = shared.queue.note_disk_wait();
        let segment_bytes = self.config.segment_bytes;
        let step = SEGMENT_ALLOCATE_BYTES.min(segment_bytes);
        let written = if self.current.is_untouched_below(segment_bytes) {
            let weight = self.shared.queue.begin_empty_turn();
            self.shared.queue.wait_alone();
            let ahead = self.current.write_ahead(&WRITE_AHEAD_ZEROS, segment_bytes, step);
            self.shared.queue.end_turn(weight);
            ahead.map(|()| true).map_err(|e| self.write_error(e).to_string())
        } else if self.written.position > segment_bytes / 2 {
            let ahead = self.spares.write_ahead(&*self.disk, &self.dir, &WRITE_AHEAD_ZEROS, segment_bytes);
            self.shared.spare_bytes.store(self.spares.bytes(), Ordering::Relaxed);
            ahead.map_err(|e| e.to_string())
        } else {
            Ok(false)
        };
        written.unwrap_or_else(|error| {
            debug!(error, "the log could not be written ahead");
            false
        })
    }

    /// Whether the budget or the disk needs its room for records.
    fn is_short_of_room(&self) -> bool {
        let ahead = 2 * self.config.segment_bytes;
        self.shared.disk_bytes() + ahead > self.config.retention_bytes
            || self.disk.free_bytes(&self.dir).unwrap_or(0) < WRITE_AHEAD_FREE_BYTES_MIN + ahead
    }

    /// Whether there is room again, on the disk and in the budget.
    fn check_room(&mut self) -> Result<(), AppendError> {
        self.wait_settled()?;
        let step = SEGMENT_ALLOCATE_BYTES.min(self.config.segment_bytes);
        self.current.probe(step).map_err(|e| self.write_error(e))?;
        self.make_room(0)
    }
}
