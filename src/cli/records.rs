//! `headgate records`: what storage holds of a datasource, page by page, oldest first.

use std::io::{self, Write};

use serde::Deserialize;
use serde_json::Value;

use super::client::Client;
use super::datasource;
use super::out::{Out, table};

/// Records asked for at once. A table prints after each page, so that a long answer starts early.
const PAGE: u64 = 1_000;
/// Characters of a payload that a table shows; the other formats show all.
const PAYLOAD_CHARS_MAX: usize = 100;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
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
    /// At most so many
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..))]
    limit: u64,
    /// A table, a JSON object a line, or CSV
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    Table,
    Json,
    Csv,
}

/// A page of the gateway's answer.
#[derive(Debug, Deserialize)]
struct Page {
    records: Vec<Value>,
    next: Option<Value>,
}

/// A record's fields as the columns of a table or of CSV, in this order.
const COLUMNS: [&str; 7] =
    ["offset", "received_at", "topic", "payload", "content_type", "key_id", "transport"];

pub(super) fn run(args: Args, out: &mut Out) -> anyhow::Result<()> {
    let client = Client::from_environment()?;
    let mut query: Vec<(&str, &str)> = Vec::new();
    for (name, value) in [("topic", &args.topic), ("from", &args.from), ("to", &args.to)] {
        if let Some(value) = value {
            query.push((name, value));
        }
    }
    if args.format == Format::Csv {
        writeln!(out, "{}", COLUMNS.join(","))?;
    }
    for_each_page(&client, &args.datasource, &query, args.limit, |records| {
        match args.format {
            Format::Json => records.iter().try_for_each(|record| writeln!(out, "{record}")),
            Format::Csv => records.iter().try_for_each(|record| csv(record, out)),
            Format::Table => {
                let mut rows = table(&["offset", "received", "topic", "payload"], &[0]);
                for record in &records {
                    let mut cells: Vec<String> =
                        COLUMNS[..4].iter().map(|column| cell(record, column)).collect();
                    shorten(&mut cells[3]);
                    rows.add_row(cells);
                }
                writeln!(out, "{rows}")
            }
        }?;
        Ok(out.flush()?)
    })
}

/// Hands every page of at most `limit` records to `page`, at least one, which may be empty.
pub(super) fn for_each_page(
    client: &Client,
    datasource: &str,
    query: &[(&str, &str)],
    limit: u64,
    mut page: impl FnMut(Vec<Value>) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let path = format!("{}/records", datasource::path(datasource)?);
    let mut left = limit;
    let mut after: Option<String> = None;
    loop {
        let count = left.min(PAGE).to_string();
        let mut query = query.to_vec();
        query.push(("limit", &count));
        if let Some(after) = &after {
            query.push(("after_offset", after));
        }
        let Page { records, next } = client.get(&path, &query)?;
        left = left.saturating_sub(records.len() as u64);
        page(records)?;
        match next {
            Some(cursor) if left > 0 => after = Some(text(&cursor)),
            _ => return Ok(()),
        }
    }
}

/// A value as people read it: text without quotes, anything else as JSON.
fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

fn cell(record: &Value, column: &str) -> String {
    record.get(column).map(text).unwrap_or_default()
}

/// Cuts a long payload for a table, and keeps what would move the cursor out of it.
fn shorten(payload: &mut String) {
    *payload = payload.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
    if let Some((cut, _)) = payload.char_indices().nth(PAYLOAD_CHARS_MAX) {
        payload.truncate(cut);
        payload.push('…');
    }
}

/// One line of CSV (RFC 4180): what holds a comma, a quote or a line break is quoted.
fn csv(record: &Value, out: &mut impl Write) -> io::Result<()> {
    for (index, column) in COLUMNS.into_iter().enumerate() {
        if index > 0 {
            out.write_all(b",")?;
        }
        let cell = cell(record, column);
        if cell.contains([',', '"', '\n', '\r']) {
            write!(out, "\"{}\"", cell.replace('"', "\"\""))?;
        } else {
            out.write_all(cell.as_bytes())?;
        }
    }
    out.write_all(b"\n")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn csv_quotes_what_would_break_a_line() {
        let record = json!({ "offset": 7, "topic": "a,b", "payload": { "value": 1 }, "transport": "mqtt" });
        let mut line = Vec::new();
        csv(&record, &mut line).expect("a Vec takes all");
        assert_eq!(String::from_utf8_lossy(&line), "7,,\"a,b\",\"{\"\"value\"\":1}\",,,mqtt\n");
    }

    #[test]
    fn a_table_shows_no_more_than_fits_and_no_control_characters() {
        let mut payload = format!("\u{1b}[2J{}", "é".repeat(200));
        shorten(&mut payload);
        assert_eq!(payload.chars().count(), PAYLOAD_CHARS_MAX + 1);
        assert!(payload.starts_with("\u{fffd}[2J") && payload.ends_with('…'), "{payload}");
    }
}
