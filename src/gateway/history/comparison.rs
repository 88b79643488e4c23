//! The log's stream, message by message, beside a copy of its records: how far they are the same.

use std::collections::{BTreeMap, HashSet};

use headgate_bridge_nats::JetstreamStream;
use headgate_bridge_nats::stream::StoredMessage;

use super::adoption::AdoptionError;
use crate::consume::sink::record_copy::{CopiedRecord, RecordCopy};
use crate::log::nats_message::{
    RECORD_KEY_ID_HEADER, RECORD_RECEIVED_AT_HEADER, RECORD_RESTORED_HEADER, header_text,
};
use crate::message::{KeyId, Offset};
use crate::sqlite::SqliteError;
use crate::time::parse_time;

/// Records that are read or compared at once, and their bytes.
pub(super) const COMPARED_RECORDS_MAX: usize = 1_000;
const COMPARED_BYTES_MAX: usize = 8 << 20;

/// What the stream and the copy have in common.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct CommonPart {
    /// The last offset up to which they have the same.
    pub(super) same_to: Offset,
    /// Whether the stream has something else behind that.
    pub(super) has_other: bool,
    /// Offsets of the copy that an earlier attempt has published.
    pub(super) was_published: HashSet<Offset>,
}

/// What is known of the copy while it is compared.
struct CopyTerms<'a> {
    copied_to: Offset,
    /// The epoch that ends.
    epoch: u64,
    live_keys: &'a HashSet<KeyId>,
}

impl CommonPart {
    pub(super) fn new(same_to: Offset) -> Self {
        Self { same_to, has_other: false, was_published: HashSet::new() }
    }

    /// Takes the next offset, at which the copy has `copied` and the stream `stored`.
    fn take(
        &mut self,
        offset: Offset,
        (copied, stored): (Option<&CopiedRecord>, Option<&StoredMessage>),
        terms: &CopyTerms<'_>,
    ) {
        let restored = stored.and_then(|message| restored_from(message, terms.epoch));
        self.was_published.extend(restored);
        let is_same = is_same_record(copied, stored);
        // An earlier attempt has left it out.
        let is_left_out = copied.is_some_and(|record| !may_return(record, terms.live_keys))
            && stored.is_none_or(|message| key_of(message).is_none());
        // The same record at the same offset: all before it is the same too, whatever was removed from the copy since. One
        // that was published behind the end may only look like it, because records of one batch are alike.
        let proves =
            copied.is_some() && is_same && restored.is_none_or(|restored_from| restored_from == offset);
        let is_copied = offset < terms.copied_to;
        self.has_other =
            !(is_copied && proves) && (self.has_other || !is_copied || !(is_same || is_left_out));
        if !self.has_other {
            self.same_to = offset;
        }
    }

    fn end(mut self, last: Offset) -> Self {
        if !self.has_other {
            self.same_to = last.max(self.same_to);
            // They are where they were.
            self.was_published.clear();
        }
        self
    }
}

/// Compares the messages of a stream from `common` on, up to `last`, with the copy.
pub(super) async fn compare(
    stream: &JetstreamStream,
    copy: &RecordCopy,
    (common, last): (Offset, Offset),
    epoch: u64,
    live_keys: &HashSet<KeyId>,
) -> Result<CommonPart, AdoptionError> {
    let terms = CopyTerms { copied_to: copy.cursor()?, epoch, live_keys };
    let first = stream.state().await?.first;
    let mut at = common.max(1);
    let mut part = CommonPart::new(at - 1);
    while at <= last {
        let messages = stream.get(at, COMPARED_RECORDS_MAX, COMPARED_BYTES_MAX).await?;
        let next = messages.last().map_or(last, |message| message.sequence).min(last) + 1;
        let stored: BTreeMap<Offset, &StoredMessage> =
            messages.iter().map(|message| (message.sequence, message)).collect();
        while at < next {
            let (copied, page_end) = copied_page(copy, at, next)?;
            for offset in at..page_end {
                let (copied, stored) = (copied.get(&offset), stored.get(&offset).copied());
                // What is missing has to be missing with the leader, also beyond the copy: an earlier attempt may have
                // published it.
                let matters = offset >= first && (copied.is_some() || offset >= terms.copied_to);
                if matters && stored.is_none() && stream.get_from_leader(offset).await?.is_some() {
                    return Err(AdoptionError::Away("a server of the log's stream is behind".to_owned()));
                }
                part.take(offset, (copied, stored), &terms);
            }
            at = page_end;
        }
    }
    Ok(part.end(last))
}

/// The first offset from `from` to `last` at which the stream has another record than the copy, or none; `None` if there is
/// none. What the copy does not have tells nothing: limits may have removed it.
pub(super) async fn first_other(
    stream: &JetstreamStream,
    copy: &RecordCopy,
    (from, last): (Offset, Offset),
) -> Result<Option<Offset>, AdoptionError> {
    let mut at = from;
    while at <= last {
        let messages = stream.get(at, COMPARED_RECORDS_MAX, COMPARED_BYTES_MAX).await?;
        let next = messages.last().map_or(last, |message| message.sequence).min(last) + 1;
        while at < next {
            let (page, page_end) = copied_page(copy, at, next)?;
            for copied in page.values() {
                let place = messages.binary_search_by_key(&copied.offset, |message| message.sequence);
                let stored = place.ok().map(|place| &messages[place]);
                let is_same = is_same_record(Some(copied), stored);
                // The server that answered may be behind the leader.
                if !is_same
                    && !is_same_record(Some(copied), stream.get_from_leader(copied.offset).await?.as_ref())
                {
                    return Ok(Some(copied.offset));
                }
            }
            at = page_end;
        }
    }
    Ok(None)
}

/// Some records of the copy from `from` on, below `next`, and up to where these are all that it has.
fn copied_page(
    copy: &RecordCopy,
    from: Offset,
    next: Offset,
) -> Result<(BTreeMap<Offset, CopiedRecord>, Offset), SqliteError> {
    let page = copy.read(from, COMPARED_RECORDS_MAX)?;
    let end = page.last().map_or(next, |record| (record.offset + 1).min(next));
    let below = page.into_iter().filter(|record| record.offset < next);
    Ok((below.map(|record| (record.offset, record)).collect(), end))
}

/// Whether a record may come back into the log: as one of the datasource that has its name now, and not a second time.
pub(super) fn may_return(record: &CopiedRecord, live_keys: &HashSet<KeyId>) -> bool {
    live_keys.contains(&record.key_id) && !record.has_ended() && !record.was_let_in
}

/// Whether the two are the same record, or neither is one.
pub(super) fn is_same_record(copied: Option<&CopiedRecord>, stored: Option<&StoredMessage>) -> bool {
    let received_at = |message: &StoredMessage| {
        header_text(&message.headers, RECORD_RECEIVED_AT_HEADER).and_then(parse_time)
    };
    match (copied, stored) {
        (None, stored) => stored.is_none_or(|message| key_of(message).is_none()),
        (Some(_), None) => false,
        (Some(copied), Some(message)) => {
            key_of(message) == Some(copied.key_id)
                && received_at(message) == Some(copied.received_at)
                && message.payload == copied.payload
        }
    }
}

/// The key that a message came in under; `None` for one that is no record.
fn key_of(message: &StoredMessage) -> Option<KeyId> {
    header_text(&message.headers, RECORD_KEY_ID_HEADER).and_then(|id| KeyId::parse(id).ok())
}

/// The offset of the copy from which an earlier attempt has published this message.
fn restored_from(message: &StoredMessage, epoch: u64) -> Option<Offset> {
    let (of, offset) = header_text(&message.headers, RECORD_RESTORED_HEADER)?.split_once('/')?;
    offset.parse().ok().filter(|_| of.parse() == Ok(epoch))
}

#[cfg(test)]
mod tests {
    use headgate_bridge_nats::HeaderMap;

    use super::*;
    use crate::consume::sink::record_copy::end_datasource;
    use crate::consume::sink::sqlite::{RECORDS_FILE_NAME, SqliteSink};
    use crate::consume::testing::quarantine_note;
    use crate::log::RecordNote;
    use crate::log::nats_message::{encode_record, origin_headers};
    use crate::message::{RecordFlags, RecordRef, Transport};

    const EPOCH: u64 = 7;
    const LIVE_KEY: KeyId = KeyId([1; 6]);
    const DEAD_KEY: KeyId = KeyId([2; 6]);
    /// A datasource that was deleted.
    const ENDED: &str = "press-5";

    /// Records of one batch, ten a batch: they are alike but for their offsets.
    fn record<'a>(offset: Offset) -> RecordRef<'a> {
        RecordRef {
            offset,
            datasource: "press-4",
            topic: "t",
            payload: b"21",
            content_type: "",
            properties: b"",
            key_id: LIVE_KEY,
            transport: Transport::Http,
            publisher: 0,
            received_at: 1_000 + i64::try_from(offset / 10).expect("small"),
            event_at: None,
            flags: RecordFlags::default(),
            note: b"",
        }
    }

    fn message(record: &RecordRef<'_>) -> StoredMessage {
        let headers = origin_headers(record.key_id, record.received_at, record.transport, record.publisher);
        let message = encode_record(record, headers).expect("crosses");
        StoredMessage {
            sequence: record.offset,
            subject: message.subject.into(),
            headers: message.headers,
            payload: message.payload,
        }
    }

    /// What an earlier attempt has published behind the end, from `of`.
    fn restored(sequence: Offset, of: Offset) -> StoredMessage {
        let mut message = message(&record(of));
        message.sequence = sequence;
        message.headers.insert(RECORD_RESTORED_HEADER, format!("{EPOCH}/{of}"));
        message
    }

    fn stored(offsets: impl IntoIterator<Item = Offset>) -> Vec<StoredMessage> {
        offsets.into_iter().map(|offset| message(&record(offset))).collect()
    }

    /// Compares a stream with the copy of `records` that ends at `copied_to`.
    fn compared<'a>(
        records: impl IntoIterator<Item = RecordRef<'a>>,
        copied_to: Offset,
        stream: &[StoredMessage],
    ) -> CommonPart {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut sink = SqliteSink::open(&dir.path().join(RECORDS_FILE_NAME)).expect("opens");
        let records: Vec<_> = records.into_iter().collect();
        let has_ended = records.iter().any(|record| record.datasource == ENDED);
        sink.store(records.into_iter(), copied_to, true).expect("stored");
        if has_ended {
            end_datasource(dir.path(), ENDED);
        }
        let copy = RecordCopy::in_dir(dir.path()).expect("it is there");
        let last = stream.last().map_or(0, |message| message.sequence);
        let live_keys = HashSet::from([LIVE_KEY]);
        let terms = CopyTerms { copied_to, epoch: EPOCH, live_keys: &live_keys };
        let mut part = CommonPart::new(0);
        let mut at = 1;
        while at <= last {
            let (page, end) = copied_page(&copy, at, last + 1).expect("read");
            for offset in at..end {
                let stored = stream.iter().find(|message| message.sequence == offset);
                part.take(offset, (page.get(&offset), stored), &terms);
            }
            at = end;
        }
        part.end(last)
    }

    fn same(same_to: Offset) -> CommonPart {
        CommonPart::new(same_to)
    }

    #[test]
    fn what_was_removed_from_the_copy_does_not_make_the_rest_another_history() {
        // Retention has removed the first ones, and a redrive mark at 41 never had a row.
        let kept = || (20..=100).filter(|offset| *offset != 41).map(record);
        assert_eq!(compared(kept(), 101, &stored(1..=90)), same(90));
        // The stream ends with one that the copy has lost: from there on nothing is known to be the same.
        let part = compared(kept(), 101, &stored(1..=41));
        assert_eq!((part.same_to, part.has_other), (40, true));
    }

    #[test]
    fn a_stream_that_has_grown_is_the_same_up_to_there() {
        let mut stream = stored(1..=90);
        let grown = (91..=95).map(|offset| RecordRef { received_at: 9_000, ..record(offset) });
        stream.extend(grown.map(|record| message(&record)));
        let part = compared((1..=100).map(record), 101, &stream);
        assert_eq!((part.same_to, part.has_other), (90, true));
        // Also where the copy ends before.
        let part = compared((1..=80).map(record), 81, &stored(1..=90));
        assert_eq!((part.same_to, part.has_other), (80, true));
    }

    #[test]
    fn what_was_published_again_behind_the_end_proves_nothing_although_it_looks_the_same() {
        let mut stream = stored(1..=90);
        stream.push(message(&RecordRef { received_at: 9_000, ..record(91) }));
        // 91 to 94 come back at 92 to 95, in one batch with those of the copy there.
        stream.extend((91..=94).map(|of| restored(of + 1, of)));
        let part = compared((1..=100).map(record), 101, &stream);
        assert_eq!((part.same_to, part.has_other), (90, true));
        assert_eq!(part.was_published, HashSet::from([91, 92, 93, 94]));
        // In place it does prove it.
        let in_place: Vec<_> = stored(1..=90).into_iter().chain([restored(91, 91)]).collect();
        assert_eq!(compared((1..=100).map(record), 101, &in_place), same(91));
    }

    #[test]
    fn what_an_earlier_attempt_has_left_out_is_no_difference() {
        let note = quarantine_note();
        let mark = RecordNote::Superseded { offset: 42, by: 60 }.encode();
        let ended = RecordRef { datasource: ENDED, ..record(41) };
        let let_in = RecordRef { flags: RecordFlags::QUARANTINED, note: &note, ..record(42) };
        let dead = RecordRef { key_id: DEAD_KEY, ..record(43) };
        let marked = RecordRef {
            flags: RecordFlags::QUARANTINED.with(RecordFlags::REDRIVEN),
            note: &mark,
            ..record(61)
        };
        let others = |offset: &Offset| ![41, 42, 43, 61].contains(offset);
        let copied = (1..=100).filter(others).map(record).chain([ended, let_in, dead, marked]);
        let mut copied: Vec<_> = copied.collect();
        copied.sort_unstable_by_key(|record| record.offset);
        let gap = StoredMessage { headers: HeaderMap::new(), ..message(&record(43)) };
        let stream: Vec<_> = stored(1..=40).into_iter().chain([gap]).collect();
        assert_eq!(compared(copied, 101, &stream), same(43));
    }
}
