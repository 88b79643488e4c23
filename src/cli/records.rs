//! `headgate records`: prints a datasource's stored records, page by page, oldest first.

use std::io::{self, Write};

use serde::Deserialize;
use serde_json::value::RawValue;

use super::client::ApiClient;
use super::datasource;
use super::out::{CommandOutput, table};
use crate::message::{Incarnation, Offset};

/// Records per request. Each page prints its own table, so that a long answer starts early.
const RECORDS_PAGE_RECORDS: u64 = 1_000;
/// Characters of a payload that a table shows; the other formats show all.
const RECORDS_PAYLOAD_CHARS_MAX: usize = 100;

#[derive(Debug, clap::Args)]
pub(super) struct RecordsArgs {
    /// The datasource's id
    datasource: String,
    /// Only this topic, or the topics of an MQTT filter: 'spindle/#'
    #[arg(long)]
    topic: Option<String>,
    /// Only records received at or after this time: 2026-11-23T09:00:00Z
    #[arg(long, value_name = "TIME")]
    from: Option<String>,
    /// Only records received before this time
    #[arg(long, value_name = "TIME")]
    to: Option<String>,
    /// Of a datasource that was deleted: the number that `headgate datasource list --deleted` shows
    #[arg(long, value_name = "N")]
    incarnation: Option<Incarnation>,
    /// At most so many
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..))]
    limit: u64,
    /// A table, a JSON object a line, or CSV
    #[arg(long, value_enum, default_value_t = RecordsFormat::Table)]
    format: RecordsFormat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum RecordsFormat {
    Table,
    Json,
    Csv,
}

/// A page of the gateway's answer.
#[derive(Deserialize)]
struct RecordsPageAnswer {
    records: Vec<RawRecord>,
    next: Option<Offset>,
}

/// A record as the gateway wrote it. A JSON payload has the digits that the device sent.
pub(super) type RawRecord = Box<RawValue>;

/// The columns that are shown of a record.
#[derive(Deserialize)]
struct RecordColumns<'a> {
    offset: Offset,
    received_at: String,
    topic: String,
    #[serde(borrow)]
    payload: &'a RawValue,
    payload_encoding: Option<String>,
    content_type: Option<String>,
    key_id: String,
    transport: String,
}

impl RecordColumns<'_> {
    fn parse_record(record: &RawRecord) -> serde_json::Result<RecordColumns<'_>> {
        serde_json::from_str(record.get())
    }

    /// The payload: a JSON string without its quotes, anything else as JSON.
    fn payload(&self) -> String {
        serde_json::from_str(self.payload.get()).unwrap_or_else(|_| self.payload.get().to_owned())
    }
}

/// The columns of CSV.
const CSV_HEADER: &str = "offset,received_at,topic,payload,payload_encoding,content_type,key_id,transport";

pub(super) fn run(args: RecordsArgs, out: &mut CommandOutput) -> anyhow::Result<()> {
    let client = ApiClient::from_environment()?;
    let mut query: Vec<(&str, &str)> = Vec::new();
    for (name, value) in [("topic", &args.topic), ("from", &args.from), ("to", &args.to)] {
        if let Some(value) = value {
            query.push((name, value));
        }
    }
    let incarnation = args.incarnation.map(|incarnation| incarnation.to_string());
    query.extend(incarnation.as_deref().map(|incarnation| ("incarnation", incarnation)));
    if args.format == RecordsFormat::Csv {
        writeln!(out, "{CSV_HEADER}")?;
    }
    for_each_page(&client, &args.datasource, &query, args.limit, |records| {
        match args.format {
            RecordsFormat::Json => {
                for record in records {
                    writeln!(out, "{}", record.get())?;
                }
            }
            RecordsFormat::Csv => {
                for record in &records {
                    write_csv_line(&RecordColumns::parse_record(record)?, out)?;
                }
            }
            RecordsFormat::Table => {
                let mut rows = table(&["offset", "received", "topic", "payload"], &[0]);
                for record in &records {
                    let record = RecordColumns::parse_record(record)?;
                    let payload = shorten(&record.payload());
                    let payload = match &record.payload_encoding {
                        Some(encoding) => format!("{encoding}: {payload}"),
                        None => payload,
                    };
                    rows.add_row([record.offset.to_string(), record.received_at, record.topic, payload]);
                }
                writeln!(out, "{rows}")?;
            }
        }
        Ok(out.flush()?)
    })
}

/// Calls `page` with each page, `limit` records in all at most; at least once, maybe with no records.
pub(super) fn for_each_page(
    client: &ApiClient,
    datasource: &str,
    query: &[(&str, &str)],
    limit: u64,
    mut page: impl FnMut(Vec<RawRecord>) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let path = format!("{}/records", datasource::path(datasource)?);
    let mut left = limit;
    let mut after: Option<Offset> = None;
    loop {
        let count = left.min(RECORDS_PAGE_RECORDS).to_string();
        let mut query = query.to_vec();
        query.push(("limit", &count));
        let after_offset = after.map(|offset| offset.to_string());
        if let Some(after_offset) = &after_offset {
            query.push(("after_offset", after_offset));
        }
        let RecordsPageAnswer { records, next } = client.get(&path, &query)?;
        left = left.saturating_sub(records.len() as u64);
        page(records)?;
        match next {
            Some(_) if left > 0 => after = next,
            _ => return Ok(()),
        }
    }
}

/// Truncates a long payload for a table, and replaces control characters, which could move the cursor.
fn shorten(payload: &str) -> String {
    let mut short: String = payload
        .chars()
        .take(RECORDS_PAYLOAD_CHARS_MAX)
        .map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c })
        .collect();
    if payload.chars().nth(RECORDS_PAYLOAD_CHARS_MAX).is_some() {
        short.push('…');
    }
    short
}

/// Writes one line of CSV (RFC 4180); a cell with a comma, a quote or a line break is quoted.
fn write_csv_line(record: &RecordColumns<'_>, out: &mut impl Write) -> io::Result<()> {
    write!(out, "{},{}", record.offset, record.received_at)?;
    let payload = record.payload();
    let [encoding, content_type] =
        [&record.payload_encoding, &record.content_type].map(|text| text.as_deref().unwrap_or_default());
    for cell in [&record.topic, &payload, encoding, content_type, &record.key_id, &record.transport] {
        if cell.contains([',', '"', '\n', '\r']) {
            write!(out, ",\"{}\"", cell.replace('"', "\"\""))?;
        } else {
            write!(out, ",{cell}")?;
        }
    }
    writeln!(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECORD: &str = r#"{"offset":7,"topic":"a,b","payload":{"value": 21.50},"content_type":null,
        "key_id":"0123456789ab","transport":"mqtt","received_at":"2026-11-23T09:28:39.000120Z"}"#;

    fn line(record: &str) -> String {
        let mut line = Vec::new();
        write_csv_line(&serde_json::from_str(record).expect("a record"), &mut line).expect("a Vec takes all");
        String::from_utf8(line).expect("text")
    }

    #[test]
    fn csv_quotes_what_would_break_a_line_and_keeps_every_digit() {
        let expected =
            "7,2026-11-23T09:28:39.000120Z,\"a,b\",\"{\"\"value\"\": 21.50}\",,,0123456789ab,mqtt\n";
        assert_eq!(line(RECORD), expected);
    }

    #[test]
    fn csv_tells_bytes_from_text() {
        let bytes = RECORD.replace(r#"{"value": 21.50}"#, r#""/wA=","payload_encoding":"base64""#);
        assert!(line(&bytes).contains(",/wA=,base64,,"), "{}", line(&bytes));
        let text = RECORD.replace(r#"{"value": 21.50}"#, r#""two\nlines""#);
        assert!(line(&text).contains(",\"two\nlines\",,,"), "{}", line(&text));
    }

    #[test]
    fn a_table_shows_no_more_than_fits_and_no_control_characters() {
        let short = shorten(&format!("\u{1b}[2J{}", "é".repeat(200)));
        assert_eq!(short.chars().count(), RECORDS_PAYLOAD_CHARS_MAX + 1);
        assert!(short.starts_with("\u{fffd}[2J") && short.ends_with('…'), "{short}");
        let fits = "é".repeat(RECORDS_PAYLOAD_CHARS_MAX);
        assert_eq!(shorten(&fits), fits);
    }
}
