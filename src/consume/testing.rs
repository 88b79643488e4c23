//! What the tests of this directory share: records without a log behind them.

use crate::log::{QuarantineReason, RecordNote};
use crate::message::{KeyId, Offset, RecordFlags, RecordRef, TimeMicros, Transport};

/// When the record with offset 0 was received. Each later one came a millisecond after the one before.
pub(super) const EPOCH: TimeMicros = 1_795_426_119_000_000;

/// A record with nothing special about it.
pub(super) fn record<'a>(
    offset: Offset,
    datasource: &'a str,
    topic: &'a str,
    payload: &'a [u8],
) -> RecordRef<'a> {
    RecordRef {
        offset,
        datasource,
        topic,
        payload,
        content_type: "",
        properties: b"",
        key_id: KeyId([0x0a; 6]),
        transport: Transport::Mqtt,
        publisher: 0,
        received_at: EPOCH + 1_000 * TimeMicros::try_from(offset).expect("a small offset"),
        event_at: None,
        flags: RecordFlags::default(),
        note: b"",
    }
}

/// The note of a record that its schema has put into quarantine.
pub fn quarantine_note() -> Vec<u8> {
    let reason = QuarantineReason {
        keyword: "maximum".into(),
        pointer: "/t".into(),
        words: "too much".into(),
        schema_version: 3,
    };
    RecordNote::Quarantined(reason).encode()
}
