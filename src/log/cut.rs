//! A cut through the log: its segments up to what is durable at one moment, to be copied while the log goes on. As long
//! as a segment of it is held, retention may take its name away, and nothing writes its file over.

use std::io;
use std::path::Path;
use std::sync::Arc;

use super::embedded::EmbeddedLogShared;
use super::segment::Segment;
use crate::message::Offset;

/// The files of the log at one moment.
pub struct LogCut {
    /// Its first offset.
    pub first_offset: Offset,
    /// The offset behind its last record.
    pub next_offset: Offset,
    /// Oldest first.
    pub segments: Vec<CutSegment>,
}

/// One segment of a [`LogCut`].
pub struct CutSegment {
    segment: Arc<Segment>,
    /// What belongs to the cut, in bytes.
    pub bytes: u64,
    /// Whether the log has ended it: the file does not change any more.
    is_ended: bool,
}

impl LogCut {
    /// A cut through everything that is durable now.
    pub(super) fn make(shared: &EmbeddedLogShared) -> Self {
        shared.unsettled.while_nothing_settles(|| {
            let segments = shared.segments();
            let newest = segments.keys().next_back().copied().unwrap_or_default();
            Self {
                first_offset: segments.keys().next().copied().unwrap_or_default(),
                next_offset: shared.tail.next_offset(),
                segments: segments
                    .values()
                    .map(|segment| CutSegment {
                        segment: segment.clone(),
                        bytes: segment.end(),
                        is_ended: segment.first_offset != newest,
                    })
                    .collect(),
            }
        })
    }
}

impl CutSegment {
    /// The name of its file in the log's directory.
    pub fn file_name(&self) -> String {
        self.segment.path().file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Gives its file a second name, if it is whole and does not change any more. Returns whether it has that.
    pub fn link(&self, to: &Path) -> bool {
        self.is_ended && std::fs::hard_link(self.segment.path(), to).is_ok()
    }

    /// Reads until `buffer` is full or the segment ends; returns the bytes read.
    ///
    /// # Errors
    /// The operating system's.
    pub fn read_at(&self, buffer: &mut [u8], position: u64) -> io::Result<usize> {
        let left = usize::try_from(self.bytes.saturating_sub(position)).unwrap_or(usize::MAX);
        let wanted = buffer.len().min(left);
        self.segment.file().read_at(&mut buffer[..wanted], position)
    }
}
