//! The columns of the lake's table.
//!
//! | column | type | |
//! |---|---|---|
//! | `offset` | long | the record's place in the log, unique |
//! | `datasource` | string, partition | one that was deleted is called `press-4~1`, with the number of its incarnation |
//! | `day` | date, partition | the day of `received_at`, in UTC |
//! | `received_at` | timestamp, UTC | |
//! | `event_at` | timestamp, UTC | when it was measured; null if nothing says so |
//! | `topic`, `key_id`, `transport` | string | |
//! | `content_type` | string | null if the client gave none |
//! | `payload` | string | null if it is not UTF-8 |
//! | `payload_bytes` | binary | such a payload |
//! | `v_KEY` | double, boolean or string | the member `KEY` of payloads that are JSON objects ([`super::values`]) |

use headgate_bridge_delta::{ColumnType, FileSettings, PartitionValues, TableColumn, TableSpec};
use jiff::Timestamp;

use crate::message::TimeMicros;

pub(super) const OFFSET: &str = "offset";
pub(super) const DATASOURCE: &str = "datasource";
pub(super) const DAY: &str = "day";
pub(super) const RECEIVED_AT: &str = "received_at";
pub(super) const EVENT_AT: &str = "event_at";
pub(super) const TOPIC: &str = "topic";
pub(super) const KEY_ID: &str = "key_id";
pub(super) const TRANSPORT: &str = "transport";
pub(super) const CONTENT_TYPE: &str = "content_type";
pub(super) const PAYLOAD: &str = "payload";
pub(super) const PAYLOAD_BYTES: &str = "payload_bytes";

/// Whose cursor the table has.
const APP_ID: &str = "headgate";
/// Commits after which a checkpoint of the table is written.
const CHECKPOINT_COMMITS: i64 = 50;
pub(super) const DAY_US: TimeMicros = 24 * 60 * 60 * 1_000_000;

/// What the table is.
pub(super) fn table_spec() -> TableSpec {
    let text = |name| TableColumn::nullable(name, ColumnType::Text);
    TableSpec {
        name: "headgate records".to_owned(),
        columns: vec![
            TableColumn::required(OFFSET, ColumnType::Long),
            TableColumn::required(DATASOURCE, ColumnType::Text),
            TableColumn::required(DAY, ColumnType::Date),
            TableColumn::required(RECEIVED_AT, ColumnType::Timestamp),
            TableColumn::nullable(EVENT_AT, ColumnType::Timestamp),
            text(TOPIC),
            text(KEY_ID),
            text(TRANSPORT),
            text(CONTENT_TYPE),
            text(PAYLOAD),
            TableColumn::nullable(PAYLOAD_BYTES, ColumnType::Binary),
        ],
        partitions: vec![DATASOURCE.to_owned(), DAY.to_owned()],
        order_column: OFFSET.to_owned(),
        app_id: APP_ID.to_owned(),
        files: FileSettings {
            opaque_columns: vec![PAYLOAD.to_owned(), PAYLOAD_BYTES.to_owned()],
            ..FileSettings::default()
        },
        checkpoint_commits: CHECKPOINT_COMMITS,
    }
}

/// The day of a time, counted from 1970-01-01, in UTC.
pub(super) fn day_of(time: TimeMicros) -> i64 {
    time.div_euclid(DAY_US)
}

/// A day as the table has it: `2026-11-30`.
pub(super) fn day_text(day: i64) -> String {
    let midnight = Timestamp::from_microsecond(day.saturating_mul(DAY_US)).unwrap_or_default();
    midnight.strftime("%Y-%m-%d").to_string()
}

/// The partition of a datasource on a day.
pub(super) fn partition(datasource: &str, day: &str) -> PartitionValues {
    let value = |text: &str| Some(text.to_owned());
    PartitionValues::from([(DATASOURCE.to_owned(), value(datasource)), (DAY.to_owned(), value(day))])
}
