//! A frame of the log as it comes from a disk: it is turned away, or every record in it can be read.

use bytes::Bytes;

use headgate_format::log::batch::Batch;
use headgate_format::log::find_crc_frame;
use headgate_format::log::frame::{FRAME_HEADER_BYTES, FrameFlags, FrameFormat, FrameHeader, FrameKey};
use headgate_format::log::frame::LogFormatVersion as Version;
use headgate_format::log::segment::SegmentHeader;

/// Checks bytes as headers, and as a batch's body, and reads all that is let through in every way there is.
/// The first byte has the version and the flags, the second how many records there should be.
pub fn run(data: &[u8]) {
    headers(data);
    let [how, records, body @ ..] = data else { return };
    let version = match how >> 2 & 3 {
        0 => Version::V2,
        1 => Version::V1,
        _ => Version::V3,
    };
    let given =
        [(1, FrameFlags::RETAINED), (2, FrameFlags::ONCE)].into_iter().filter(|(bit, _)| how & bit != 0);
    let flags = given.fold(FrameFlags::default(), |flags, (_, flag)| flags.with(flag));
    let body = Bytes::copy_from_slice(body);
    let Some(batch) = Batch::check(version, flags, 7, u32::from(*records), body) else { return };
    assert_eq!(batch.next_offset(), 7 + u64::from(*records));
    let all: Vec<_> = batch.records().collect();
    assert_eq!(all.len(), usize::from(*records));
    let mut reader = batch.reader();
    let mut read = Vec::new();
    for section in batch.sections() {
        for (topic, place) in section.topics() {
            let record = reader.read(place);
            assert_eq!((record.topic, record.datasource), (topic, section.datasource()));
            read.push(record);
        }
    }
    let shown = all.into_iter().filter(|record| !record.flags.contains(headgate_format::message::RecordFlags::QUARANTINED));
    assert_eq!(read, shown.collect::<Vec<_>>());
    if let Some(once) = batch.once() {
        let _ = (once.open().map(Iterator::count), once.releases().count());
    }
}

/// What nobody but the log can make is none, and what is sealed is what comes back.
fn headers(data: &[u8]) {
    if let Ok(header) = SegmentHeader::decode(data) {
        let _ = FrameFormat::of_segment(&header).version();
    }
    for version in [Version::V1, Version::V2] {
        let format = FrameFormat::Crc(version);
        if let Some(header) = format.decode(data, 32) {
            let _ = (header.next_offset(), format.flags(&header), format.is_whole(&header, data));
        }
    }
    if let Some((position, header)) = find_crc_frame(data, 32, 0) {
        let at = usize::try_from(position - 32).expect("within the data");
        let end = at + usize::try_from(header.frame_bytes()).expect("within the data");
        assert!(FrameFormat::Crc(Version::V2).is_whole(&header, &data[at..end]));
    }
    let format = FrameFormat::Keyed(FrameKey::derive(&[7; 32]));
    assert_eq!(format.decode(data, 4096), None, "a sender does not know the key");
    let Some(fields) = data.first_chunk::<20>() else { return };
    let (offset, rest) = fields.split_first_chunk::<8>().expect("20 bytes");
    let (time, rest) = rest.split_first_chunk::<8>().expect("12 bytes");
    let records = u32::from_le_bytes(*rest.first_chunk().expect("4 bytes"));
    let offset = u64::from_le_bytes(*offset);
    let header = FrameHeader::new(FrameFlags::RETAINED, records, offset, i64::from_le_bytes(*time));
    let mut frame = vec![0; FRAME_HEADER_BYTES];
    frame.extend_from_slice(data);
    format.key().expect("keyed").seal(&mut frame, &header, 4096);
    match format.decode(&frame, 4096) {
        Some(decoded) => assert!(format.is_whole(&decoded, &frame) && decoded.next_offset() >= offset),
        None => assert!(offset.checked_add(records.into()).is_none(), "a header in bounds comes back"),
    }
}
