//! A frame of the log as it comes from a disk: it is turned away, or every record in it can be read.

use bytes::Bytes;

use headgate_format::log::batch::Batch;
use headgate_format::log::frame::{FrameFlags, FrameHeader, LogFormatVersion as Version};

/// Checks bytes as a batch's body, and reads all that it lets through in every way there is. The first
/// byte has the version and the flags, the second how many records there should be.
pub fn run(data: &[u8]) {
    if let Some(header) = FrameHeader::decode(data) {
        let _ = (header.frame_bytes(), header.flags(Version::V1), header.flags(Version::V2));
    }
    let [how, records, body @ ..] = data else { return };
    let version = if how & 4 == 0 { Version::V2 } else { Version::V1 };
    let given =
        [(1, FrameFlags::RETAINED), (2, FrameFlags::ONCE)].into_iter().filter(|(bit, _)| how & bit != 0);
    let flags = given.fold(FrameFlags::default(), |flags, (_, flag)| flags.with(flag));
    let body = Bytes::copy_from_slice(body);
    let Some(batch) = Batch::check(version, flags, 7, u32::from(*records), body) else { return };
    assert_eq!(batch.next_offset(), 7 + u64::from(*records));
    let all: Vec<_> = batch.records().collect();
    assert_eq!(all.len(), usize::from(*records));
    let mut reader = batch.reader();
    let mut nth = 0;
    for section in batch.sections() {
        for (topic, place) in section.topics() {
            let record = reader.read(place);
            assert_eq!((record.topic, record.offset), (topic, all[nth].offset));
            assert_eq!(record.payload, all[nth].payload);
            assert_eq!(record.datasource, section.datasource());
            nth += 1;
        }
    }
    assert_eq!(nth, all.len());
    if let Some(once) = batch.once() {
        let _ = (once.open().map(Iterator::count), once.releases().count());
    }
}
