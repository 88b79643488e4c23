//! The invariants of a model run.

use std::collections::HashSet;

use super::client::MessageNumber;
use super::run::{Acknowledged, CONNECTIONS, ModelRun, RecordKind, TENANTS, batches_from};
use crate::log::{Batch, Log};
use crate::message::{Offset, RecordRef, TimeMicros};

/// What came of a run: the records with kind and time, and what was acknowledged.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct RunOutcome {
    records: Vec<(RecordKind, TimeMicros, String)>,
    acknowledged: Vec<(MessageNumber, Offset)>,
}

impl ModelRun {
    /// Checks all invariants. Returns what came of the run so far.
    pub(super) async fn check(&mut self) -> RunOutcome {
        let log = self.gateway().log.clone();
        let batches = batches_from(&*log, 0);
        let records: Vec<RecordRef<'_>> = batches.iter().flat_map(Batch::records).collect();
        let offsets: Vec<Offset> = records.iter().map(|record| record.offset).collect();
        assert_eq!(offsets, (0..log.next_offset()).collect::<Vec<_>>(), "no offset is missing");
        self.check_answers(&records);
        self.check_each_once(&records);
        self.check_order_and_ends(&records);
        self.check_readers(&*log, &records);
        self.check_storage(&records).await;
        let outcome = |record: &RecordRef<'_>| match RecordKind::of(record) {
            // No message, so that no clock of the model says when it was received.
            RecordKind::Mark => (RecordKind::Mark, 0, String::new()),
            kind => (kind, record.received_at, text_of(record)),
        };
        RunOutcome {
            records: records.iter().map(outcome).collect(),
            acknowledged: self.acknowledged.iter().map(|acked| (acked.number, acked.offset)).collect(),
        }
    }

    /// What was acknowledged is kept. What was taken for a repetition is one, and what was refused for its id is none.
    fn check_answers(&self, records: &[RecordRef<'_>]) {
        let at = |offset: Offset| &records[usize::try_from(offset).expect("few")];
        for &Acknowledged { number, offset, as_repetition, quarantined } in &self.acknowledged {
            let (message, record) = (&self.sent[usize::try_from(number).expect("few")], at(offset));
            let kind = RecordKind::of(record);
            assert_eq!(number_of(record), number, "{number} was taken for {}", number_of(record));
            assert_eq!(text_of(record), message.payload(number));
            assert_eq!(kind == RecordKind::Parked, quarantined, "{number} is {kind:?}");
            assert!(as_repetition || kind != RecordKind::Redriven);
        }
        for &(number, offset) in &self.conflicts {
            let (message, record) = (&self.sent[usize::try_from(number).expect("few")], at(offset));
            let other = &self.sent[usize::try_from(number_of(record)).expect("few")];
            let is_parked = RecordKind::of(record) == RecordKind::Parked;
            assert!(message.shares_id(other) && !is_parked, "{number} conflicts with {}", number_of(record));
            assert_ne!(number_of(record), number);
        }
        let kept: HashSet<_> =
            records.iter().filter(|record| !record.payload.is_empty()).map(number_of).collect();
        for (number, message) in (0..).zip(&self.sent) {
            let is_refused = message.refused && message.attempts == 1;
            assert!(!is_refused || !kept.contains(&number), "{number} was refused and is kept");
        }
    }

    /// Once per id and per exchange.
    fn check_each_once(&self, records: &[RecordRef<'_>]) {
        let mut once = HashSet::new();
        for record in records {
            let kind = RecordKind::of(record);
            if matches!(kind, RecordKind::Parked | RecordKind::Mark) {
                continue;
            }
            let message = &self.sent[usize::try_from(number_of(record)).expect("few")];
            let id = message.id.as_ref().map(|id| (message.tenant, id));
            assert!(id.is_none() || once.insert((id, None)), "{id:?} is there twice");
            let exchange =
                message.exchange.map(|(exchange, round)| (exchange.session, exchange.packet_id, round));
            // A message in quarantine has no exchange.
            let is_once = kind == RecordKind::Redriven || exchange.is_none() || once.insert((None, exchange));
            assert!(is_once, "{exchange:?} is there twice");
        }
    }

    /// The messages of a connection are in the order in which it sent them, and none came after its key's end.
    fn check_order_and_ends(&self, records: &[RecordRef<'_>]) {
        let mut newest = [None; CONNECTIONS.len()];
        for record in records {
            let kind = RecordKind::of(record);
            if matches!(kind, RecordKind::Redriven | RecordKind::Mark) {
                continue;
            }
            let number = number_of(record);
            let message = &self.sent[usize::try_from(number).expect("few")];
            assert_eq!(record.datasource, TENANTS[message.tenant]);
            let end = self.dead.get(&record.key_id).copied();
            assert!(end.is_none_or(|end| record.offset < end), "{number} came after its key's end");
            if message.attempts == 1 {
                let before = newest[message.connection].replace(number);
                assert!(before < Some(number), "{number} came after {before:?}");
            }
        }
    }

    /// Readers from any offset or time agree.
    fn check_readers(&mut self, log: &dyn Log, records: &[RecordRef<'_>]) {
        for _ in 0..5 {
            let from = self.random.below(records.len() + 1) as Offset;
            let read = batches_from(log, from);
            let read = read.iter().flat_map(Batch::records).filter(|record| record.offset >= from);
            let read: Vec<_> = read.map(|record| (record.offset, text_of(&record))).collect();
            let expected = records.iter().filter(|record| record.offset >= from);
            assert_eq!(read, expected.map(|r| (r.offset, text_of(r))).collect::<Vec<_>>(), "from {from}");
        }
        for _ in 0..5 {
            let time = match self.random.below(records.len() + 1) {
                at if at < records.len() => records[at].received_at,
                _ => self.clock,
            };
            let from = log.offset_at(time).expect("readable");
            let missed = records.iter().find(|record| record.received_at >= time && record.offset < from);
            assert!(missed.is_none(), "from time {time} it begins at {from} behind {missed:?}");
        }
    }

    /// Storage has what the log has, in quarantine or not, and knows what of that was let in after all.
    async fn check_storage(&self, records: &[RecordRef<'_>]) {
        let gateway = self.gateway();
        gateway.storage.wait_stored(gateway.log.next_offset()).await;
        let stored = rusqlite::Connection::open(self.dir.path().join("records.db")).expect("opens");
        let rows = |sql: &str| {
            let mut rows = stored.prepare(sql).expect("a view");
            let row = |row: &rusqlite::Row<'_>| Ok((row.get::<_, i64>(0)?.cast_unsigned(), row.get(1)?));
            let rows = rows.query_map([], row).expect("rows");
            rows.collect::<Result<Vec<(Offset, String)>, _>>().expect("rows")
        };
        let logged = |kinds: &[RecordKind]| {
            let records = records.iter().filter(|record| kinds.contains(&RecordKind::of(record)));
            records.map(|record| (record.offset, text_of(record))).collect::<Vec<_>>()
        };
        let (let_in, parked) = ([RecordKind::LetIn, RecordKind::Redriven], [RecordKind::Parked]);
        assert_eq!(rows("SELECT \"offset\", payload FROM records ORDER BY 1"), logged(&let_in));
        assert_eq!(rows("SELECT \"offset\", payload FROM quarantine ORDER BY 1"), logged(&parked));
        let noted = "SELECT \"offset\", payload FROM quarantine WHERE redriven_offset IS NOT NULL";
        let noted: HashSet<Offset> = rows(noted).into_iter().map(|(offset, _)| offset).collect();
        let missed: Vec<_> = self.superseded.difference(&noted).collect();
        assert!(missed.is_empty(), "not noted as let in: {missed:?}");
        check_values(&stored, records);
    }
}

/// The numbers and the newest values that storage has are those of what was let in, at its event time or when it was
/// received.
fn check_values(stored: &rusqlite::Connection, records: &[RecordRef<'_>]) {
    let let_in =
        |record: &&RecordRef<'_>| matches!(RecordKind::of(record), RecordKind::LetIn | RecordKind::Redriven);
    let is_number = |record: &&RecordRef<'_>| !text_of(record).contains(": \"");
    let value = |record: &RecordRef<'_>| i64::try_from(number_of(record)).expect("few");
    let offset = |record: &RecordRef<'_>| record.offset.cast_signed();
    let samples = records
        .iter()
        .filter(let_in)
        .filter(is_number)
        .map(|record| (offset(record), value(record), record.event_at.unwrap_or(record.received_at)));
    let rows = |sql: &str| {
        let mut rows = stored.prepare(sql).expect("a view");
        let row = |row: &rusqlite::Row<'_>| Ok((row.get(0)?, row.get(1)?, row.get(2)?));
        rows.query_map([], row).expect("rows").collect::<Result<Vec<(i64, i64, i64)>, _>>().expect("rows")
    };
    let found =
        rows("SELECT \"offset\", CAST(value AS INTEGER), at_us FROM samples WHERE key = 'n' ORDER BY 1");
    assert_eq!(found, samples.collect::<Vec<_>>(), "samples");
    let newest = TENANTS
        .iter()
        .filter_map(|tenant| records.iter().filter(let_in).rfind(|record| record.datasource == *tenant));
    let mut newest: Vec<_> =
        newest.map(|record| (offset(record), value(record), record.received_at)).collect();
    newest.sort_unstable();
    let found =
        rows("SELECT \"offset\", CAST(value AS INTEGER), received_us FROM latest WHERE key = 'n' ORDER BY 1");
    assert_eq!(found, newest, "latest");
}

fn text_of(record: &RecordRef<'_>) -> String {
    String::from_utf8_lossy(record.payload).into_owned()
}

/// The number in a payload.
fn number_of(record: &RecordRef<'_>) -> MessageNumber {
    let text = std::str::from_utf8(record.payload).expect("text");
    text.trim_matches(|c: char| !c.is_ascii_digit()).parse().expect("a number")
}
