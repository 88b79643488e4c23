//! Records that a log which was put back no longer has, and `records.db` of a gateway still has: they are published again.
//!
//! Where the stream ends is compared with the copy, message by message:
//!
//! - All that it has is what the copy has. Then each record gets the offset that it had (*in place*): stores, cursors and
//!   subscribers that have it have it once, and the others get it now. What is missing in between (the ends of keys,
//!   records of dead keys) stays a gap: a message takes its place and is removed at the end.
//! - It has grown since. Then the records come behind that, at other offsets, and what stores have beyond the common part
//!   is set aside first, as ever. Each says in a header which record of which epoch it is, so that a second attempt after a
//!   kill publishes none twice.
//!
//! Nobody appends meanwhile: gateways take nothing before it is decided, and begin the new epoch after it.

use std::collections::HashSet;
use std::time::Duration;

use headgate_bridge_nats::stream::{JetstreamAck, OutgoingMessage, PublishError, StreamPublisher};
use headgate_bridge_nats::{HeaderMap, JetstreamStream, Nats};

use super::adoption::AdoptionError;
use super::comparison::{COMPARED_RECORDS_MAX, CommonPart, compare, may_return};
use crate::config::Config;
use crate::consume::sink::record_copy::{CopiedRecord, RecordCopy};
use crate::log::nats_message::{
    NATS_EXPECTED_LAST_SEQUENCE_HEADER, NATS_MESSAGE_ID_HEADER, RECORD_RESTORED_HEADER, encode_record,
    origin_headers,
};
use crate::log::open_log_stream;
use crate::message::{KeyId, Offset};
use crate::sqlite::SqliteError;
use crate::subject::SubjectSpace;

/// Messages that wait for their acknowledgement, and for how long.
const REPUBLISHED_IN_FLIGHT_MAX: usize = 512;
const REPUBLISH_ACK_TIMEOUT: Duration = Duration::from_secs(5);
/// Gaps that are filled so that records get the offsets that they had.
const FILLED_GAPS_MAX: u64 = 1_000_000;
/// Where what fills a gap is published; no datasource has such an id.
const GAP_TOKEN: &str = "$gap";

/// What is to be published again.
pub(super) struct MissingRecords {
    copy: RecordCopy,
    /// The stream's last message.
    last: Offset,
    /// The first offset that is given anew, as stores have to take it.
    pub(super) end: Offset,
    /// From where on records of the copy are missing, and where it ends.
    from: Offset,
    copied_to: Offset,
    is_in_place: bool,
    /// Whether the stream has no message, so that it can be made to begin where the copy does.
    is_empty: bool,
    /// The epoch that ends.
    epoch: u64,
    /// Offsets of the copy that an earlier attempt has published.
    was_published: HashSet<Offset>,
    live_keys: HashSet<KeyId>,
    /// How many records are published, and how many are not: see [`may_return`].
    pub(super) records: u64,
    pub(super) left_out: u64,
}

impl MissingRecords {
    /// Compares the stream, which ends at `last` and is known to be the same below `common`, with the copy. Records of keys
    /// that are not in `live_keys` stay out.
    pub(super) async fn find(
        stream: Option<&JetstreamStream>,
        copy: RecordCopy,
        (common, last): (Offset, Offset),
        epoch: u64,
        live_keys: HashSet<KeyId>,
    ) -> Result<Self, AdoptionError> {
        let copied_to = copy.cursor()?;
        let part = match stream {
            Some(stream) => compare(stream, &copy, (common, last), epoch, &live_keys).await?,
            None => CommonPart::new(0),
        };
        let is_empty = match stream {
            Some(stream) => stream.state().await?.messages == 0,
            None => true,
        };
        let from = part.same_to + 1;
        let mut missing = Self {
            copy,
            last,
            end: from,
            from,
            copied_to,
            is_in_place: !part.has_other,
            is_empty,
            epoch,
            was_published: part.was_published,
            live_keys,
            records: 0,
            left_out: 0,
        };
        let first = missing.count()?;
        let begins = if is_empty { first.unwrap_or(missing.from) } else { missing.from };
        let places = missing.copied_to.saturating_sub(begins);
        missing.is_in_place &= places.saturating_sub(missing.records) <= FILLED_GAPS_MAX;
        if missing.is_in_place {
            missing.end = missing.copied_to.max(last + 1);
        }
        Ok(missing)
    }

    /// Counts what is to be published. Returns the first of it.
    fn count(&mut self) -> Result<Option<Offset>, AdoptionError> {
        let (mut at, mut first) = (self.from, None);
        loop {
            let page = self.copy.read(at, COMPARED_RECORDS_MAX)?;
            let Some(last) = page.last() else { return Ok(first) };
            at = last.offset + 1;
            for record in page.iter().filter(|record| !self.was_published.contains(&record.offset)) {
                let may_return = may_return(record, &self.live_keys);
                *(if may_return { &mut self.records } else { &mut self.left_out }) += 1;
                first = first.or(may_return.then_some(record.offset));
            }
        }
    }

    /// What is (or would be) done, for people.
    pub(super) fn words(&self) -> String {
        let (records, from) = (self.records, self.from);
        let place = match self.is_in_place {
            true => "at the offsets that they had".to_owned(),
            false => format!("behind what the log has by now, which ends at {}", self.last),
        };
        let left_out = match self.left_out {
            0 => String::new(),
            left_out => format!(
                "; {left_out} records stay out: their keys are dead, their datasources deleted, or they were let in again"
            ),
        };
        format!(
            "{records} records from offset {from} on are published again from records.db, which ends at {}, {place}{left_out}",
            self.copied_to.saturating_sub(1)
        )
    }

    /// Publishes them, in order. After an error a new attempt goes on.
    pub(super) async fn publish(&self, nats: &Nats, config: &Config) -> Result<(), AdoptionError> {
        let stream = open_log_stream(nats, config).await?;
        let mut next = stream.state().await?.last + 1;
        // Behind what the log has by now they may have any place.
        if self.is_in_place && next != self.last + 1 {
            return Err(AdoptionError::Away("the log's stream has just grown".to_owned()));
        }
        let mut at = self.from;
        if self.is_in_place && self.is_empty {
            // What is older than the copy is no gap to fill.
            let first = self.copy.read(at, 1)?.first().map_or(self.copied_to, |record| record.offset);
            if first > next {
                stream.purge_below(first).await?;
                (next, at) = (first, first);
            }
        }
        let mut publishing = OrderedPublisher::new(nats, self.is_in_place, next).await?;
        loop {
            let page = self.copy.read(at, COMPARED_RECORDS_MAX)?;
            let Some(last) = page.last() else { break };
            at = last.offset + 1;
            for record in page.iter().filter(|record| self.is_published(record)) {
                publishing.fill_to(record.offset).await?;
                publishing.send(self.encode(record)?).await?;
            }
        }
        publishing.fill_to(self.copied_to).await?;
        publishing.end().await?;
        stream.purge_subjects(&gap_subject(), None).await?;
        Ok(())
    }

    fn is_published(&self, record: &CopiedRecord) -> bool {
        may_return(record, &self.live_keys) && !self.was_published.contains(&record.offset)
    }

    fn encode(&self, copied: &CopiedRecord) -> Result<OutgoingMessage, AdoptionError> {
        let record = copied.record();
        let mut headers =
            origin_headers(record.key_id, record.received_at, record.transport, record.publisher);
        headers.insert(RECORD_RESTORED_HEADER, format!("{}/{}", self.epoch, copied.offset));
        if !self.is_in_place {
            // The comparison sees neither what another command publishes now nor what an earlier one has on its way.
            headers.insert(NATS_MESSAGE_ID_HEADER, format!("restored-{}-{}", self.epoch, copied.offset));
        }
        encode_record(&record, headers).map_err(|error| {
            AdoptionError::Refused(anyhow::anyhow!("the record at offset {}: {error}", copied.offset))
        })
    }
}

/// Publishes messages in order, several at once.
struct OrderedPublisher {
    publisher: StreamPublisher<Offset>,
    /// Whether each message has to get the next offset.
    is_in_place: bool,
    next: Offset,
}

impl OrderedPublisher {
    async fn new(nats: &Nats, is_in_place: bool, next: Offset) -> Result<Self, AdoptionError> {
        let publisher = StreamPublisher::new(nats, REPUBLISH_ACK_TIMEOUT).await?;
        Ok(Self { publisher, is_in_place, next })
    }

    /// Fills what is before `offset`, if offsets are to be the same.
    async fn fill_to(&mut self, offset: Offset) -> Result<(), AdoptionError> {
        while self.is_in_place && self.next < offset {
            let (subject, payload) = (gap_subject(), bytes::Bytes::new());
            self.send(OutgoingMessage { subject, headers: HeaderMap::new(), payload }).await?;
        }
        Ok(())
    }

    async fn send(&mut self, mut message: OutgoingMessage) -> Result<(), AdoptionError> {
        while self.publisher.in_flight() >= REPUBLISHED_IN_FLIGHT_MAX {
            self.settle_next().await?;
        }
        if self.is_in_place {
            message.headers.insert(NATS_EXPECTED_LAST_SEQUENCE_HEADER, (self.next - 1).to_string());
        }
        if let Err((_, error)) = self.publisher.send(self.next, message).await {
            return Err(self.fail(error).await);
        }
        self.next += 1;
        Ok(())
    }

    async fn end(&mut self) -> Result<(), AdoptionError> {
        while self.publisher.in_flight() > 0 {
            self.settle_next().await?;
        }
        Ok(())
    }

    async fn settle_next(&mut self) -> Result<(), AdoptionError> {
        match self.publisher.next().await {
            (offset, Ok(JetstreamAck { sequence, .. })) if !self.is_in_place || sequence == offset => Ok(()),
            (offset, Ok(_)) => {
                let words = format!("something else has come into the log at offset {offset} meanwhile");
                Err(self.fail(PublishError::Away(words)).await)
            }
            (_, Err(error)) => Err(self.fail(error).await),
        }
    }

    /// Waits for what is on its way: what comes of it has to be seen by the next attempt.
    async fn fail(&mut self, error: PublishError) -> AdoptionError {
        while self.publisher.in_flight() > 0 {
            let _ = self.publisher.next().await;
        }
        match error {
            PublishError::Away(text) | PublishError::Unknown(text) => AdoptionError::Away(text),
            PublishError::Full(text) => AdoptionError::Refused(anyhow::anyhow!(
                "the log's stream is full ({text}): make log.retention_bytes larger (headgate cluster change)"
            )),
            // Another message was refused before it, and it has to come behind that.
            PublishError::Refused(text) if self.is_in_place => AdoptionError::Away(text),
            PublishError::Refused(text) => AdoptionError::Refused(anyhow::anyhow!(text)),
        }
    }
}

fn gap_subject() -> String {
    format!("{}.{GAP_TOKEN}", SubjectSpace::Quarantine.as_str())
}

impl From<SqliteError> for AdoptionError {
    fn from(error: SqliteError) -> Self {
        Self::Refused(error.into())
    }
}
