//! `headgate records`: prints a datasource's stored records as they come, oldest or newest first, however many.

use std::io::{self, BufRead, BufReader, Read, Write};

use anyhow::Context;
use serde::Deserialize;
use serde_json::value::RawValue;
use ureq::Body;
use ureq::http::Response;

use super::client::ApiClient;
use super::datasource;
use super::key::parse_key_id;
use super::out::{CommandOutput, table};
use super::time_argument::TimeArgument;
use crate::message::{Incarnation, Offset};

/// Records of one table: a long answer is several, so that it starts early.
const RECORDS_TABLE_ROWS: usize = 1_000;
/// Characters of a payload that a table shows; the other formats show all.
const RECORDS_PAYLOAD_CHARS_MAX: usize = 100;
/// Bytes of an answer that are passed on at a time.
const RECORDS_PIECE_BYTES: usize = 64 << 10;

#[derive(Debug, clap::Args)]
pub(super) struct RecordsArgs {
    /// The datasource's id
    datasource: String,
    /// Only this topic, or the topics of an MQTT filter: 'spindle/#'
    #[arg(long)]
    topic: Option<String>,
    /// Only records received at or after this time: 2026-11-23T09:00:00Z, or 1h for an hour ago
    #[arg(long, value_name = "TIME|AGO", value_parser = TimeArgument::parse_past, alias = "since")]
    from: Option<TimeArgument>,
    /// Only records received before this time
    #[arg(long, value_name = "TIME|AGO", value_parser = TimeArgument::parse_past)]
    to: Option<TimeArgument>,
    /// Only records measured at or after this time; where nobody says when that was, the time of receipt counts
    #[arg(long, value_name = "TIME|AGO", value_parser = TimeArgument::parse_past)]
    event_from: Option<TimeArgument>,
    /// Only records measured before this time
    #[arg(long, value_name = "TIME|AGO", value_parser = TimeArgument::parse_past)]
    event_to: Option<TimeArgument>,
    /// Only records with this offset or a greater one
    #[arg(long, value_name = "OFFSET")]
    from_offset: Option<Offset>,
    /// Only records with a lower offset
    #[arg(long, value_name = "OFFSET")]
    to_offset: Option<Offset>,
    /// Only records let in by the key with this id, as `key list` shows it
    #[arg(long, value_name = "KEY_ID", visible_alias = "key")]
    key_id: Option<String>,
    /// Which come first
    #[arg(long, value_enum, default_value_t = OrderArg::Oldest)]
    order: OrderArg,
    /// The newest so many, the oldest of them first
    #[arg(long, value_name = "N", num_args = 0..=1, default_missing_value = "10",
        value_parser = clap::value_parser!(u64).range(1..), conflicts_with_all = ["order", "limit", "all", "cursor"])]
    tail: Option<u64>,
    /// Goes on behind this offset, the last one of an earlier answer in the same order
    #[arg(long, value_name = "OFFSET")]
    cursor: Option<Offset>,
    /// Of a datasource that was deleted: the number that `headgate datasource list --deleted` shows
    #[arg(long, value_name = "N")]
    incarnation: Option<Incarnation>,
    /// At most so many
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..))]
    limit: u64,
    /// As many as there are
    #[arg(long, conflicts_with = "limit")]
    all: bool,
    /// A table, a JSON object a line (json and ndjson are the same), or CSV
    #[arg(long, value_enum, default_value_t = RecordsFormat::Table)]
    format: RecordsFormat,
    /// The same as --format json
    #[arg(long, conflicts_with = "format")]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum RecordsFormat {
    Table,
    Json,
    Ndjson,
    Csv,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum OrderArg {
    Oldest,
    Newest,
}

/// The columns that a table shows of a record. A JSON payload has the digits that the device sent.
#[derive(Deserialize)]
struct RecordColumns<'a> {
    offset: Offset,
    received_at: String,
    topic: String,
    #[serde(borrow)]
    payload: &'a RawValue,
    payload_encoding: Option<String>,
}

impl RecordColumns<'_> {
    /// The payload: a JSON string without its quotes, anything else as JSON.
    fn payload(&self) -> String {
        serde_json::from_str(self.payload.get()).unwrap_or_else(|_| self.payload.get().to_owned())
    }
}

impl RecordsArgs {
    /// The query string of the request.
    fn query(&self) -> Vec<(&'static str, String)> {
        let offset = |offset: Option<Offset>| offset.map(|offset| offset.to_string());
        let time = |time: Option<TimeArgument>| time.map(|time| time.to_string());
        let form = if self.format == RecordsFormat::Csv { "csv" } else { "ndjson" };
        let order = (self.order == OrderArg::Newest).then(|| "newest".to_owned());
        let parameters = [
            ("topic", self.topic.clone()),
            ("from", time(self.from)),
            ("to", time(self.to)),
            ("event_from", time(self.event_from)),
            ("event_to", time(self.event_to)),
            ("from_offset", offset(self.from_offset)),
            ("to_offset", offset(self.to_offset)),
            ("key_id", self.key_id.clone()),
            ("order", order),
            ("cursor", offset(self.cursor)),
            ("incarnation", self.incarnation.map(|incarnation| incarnation.to_string())),
            ("limit", (!self.all).then(|| self.limit.to_string())),
            ("format", Some(form.to_owned())),
        ];
        parameters.into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
    }

    /// Narrows it to the newest `count` records that it selects: asks for their offsets, newest first, and lets it begin at
    /// the last of these. So nothing has to be held here, however many they are.
    fn begin_at_tail(&mut self, client: &ApiClient, count: u64) -> anyhow::Result<()> {
        #[derive(Deserialize)]
        struct TailOffset {
            offset: Offset,
        }
        self.limit = count;
        let form = std::mem::replace(&mut self.format, RecordsFormat::Ndjson);
        self.order = OrderArg::Newest;
        let mut answer = request(client, &self.datasource, &self.query())?;
        (self.order, self.format) = (OrderArg::Oldest, form);
        let (mut newest, mut oldest) = (None, None);
        for line in BufReader::new(answer.body_mut().with_config().limit(u64::MAX).reader()).lines() {
            let TailOffset { offset } = serde_json::from_str(&line.context(BROKEN_OFF)?)?;
            newest.get_or_insert(offset);
            oldest = Some(offset);
        }
        if let (Some(newest), Some(oldest)) = (newest, oldest) {
            // What comes in meanwhile is no part of it.
            (self.from_offset, self.to_offset) = (Some(oldest), Some(newest.saturating_add(1)));
        }
        Ok(())
    }
}

pub(super) fn run(mut args: RecordsArgs, out: &mut CommandOutput) -> anyhow::Result<()> {
    if let Some(key_id) = &args.key_id {
        parse_key_id(key_id)?;
    }
    if args.json {
        args.format = RecordsFormat::Json;
    }
    let client = ApiClient::from_environment()?;
    if let Some(tail) = args.tail {
        args.begin_at_tail(&client, tail)?;
    }
    let mut answer = request(&client, &args.datasource, &args.query())?;
    tell_removed(&answer);
    let body = answer.body_mut().with_config().limit(u64::MAX).reader();
    match args.format {
        RecordsFormat::Table => print_tables(body, out),
        RecordsFormat::Json | RecordsFormat::Ndjson | RecordsFormat::Csv => pass_on(body, out),
    }
}

fn request(client: &ApiClient, datasource: &str, query: &[(&str, String)]) -> anyhow::Result<Response<Body>> {
    let query: Vec<(&str, &str)> = query.iter().map(|(name, value)| (*name, value.as_str())).collect();
    client.stream(&format!("{}/records", datasource::path(datasource)?), &query)
}

/// Calls `each` with each record that matches a query as the gateway shows it, oldest first.
pub(super) fn for_each_record(
    client: &ApiClient,
    datasource: &str,
    query: &[(&str, &str)],
    mut each: impl FnMut(&str) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut query: Vec<_> = query.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
    query.push(("format", "ndjson".to_owned()));
    let mut answer = request(client, datasource, &query)?;
    let body = answer.body_mut().with_config().limit(u64::MAX).reader();
    for line in BufReader::new(body).lines() {
        each(&line.context(BROKEN_OFF)?)?;
    }
    Ok(())
}

/// What an answer says that ends before its end.
const BROKEN_OFF: &str = "the gateway's answer broke off";

/// Says from where on there is something, if the limits of the datasource have had something removed.
fn tell_removed(answer: &Response<Body>) {
    let header = |name| answer.headers().get(name).and_then(|value| value.to_str().ok());
    let Some(below) = header("headgate-removed-below") else { return };
    let from = match (header("headgate-stored-from"), header("headgate-stored-from-time")) {
        (Some(offset), Some(time)) => format!("stored from offset {offset}, received {time}, on"),
        _ => "nothing is stored now".to_owned(),
    };
    // Not eprintln!, which panics when standard error is closed.
    let _ = writeln!(
        io::stderr(),
        "{from}: what was below offset {below} was removed (limits stored_age_s, stored_bytes)"
    );
}

fn pass_on(mut body: impl Read, out: &mut CommandOutput) -> anyhow::Result<()> {
    let mut piece = vec![0; RECORDS_PIECE_BYTES];
    loop {
        let bytes = body.read(&mut piece).context(BROKEN_OFF)?;
        if bytes == 0 {
            return Ok(());
        }
        out.write_all(&piece[..bytes])?;
        out.flush()?;
    }
}

fn print_tables(body: impl Read, out: &mut CommandOutput) -> anyhow::Result<()> {
    let columns = ["offset", "received", "topic", "payload"];
    let mut lines = BufReader::new(body).lines();
    let mut is_first = true;
    loop {
        let mut rows = table(&columns, &[0]);
        for line in lines.by_ref().take(RECORDS_TABLE_ROWS) {
            let line = line.context(BROKEN_OFF)?;
            let record: RecordColumns<'_> = serde_json::from_str(&line)?;
            let payload = shorten(&record.payload());
            let payload = match &record.payload_encoding {
                Some(encoding) => format!("{encoding}: {payload}"),
                None => payload,
            };
            rows.add_row([record.offset.to_string(), record.received_at, record.topic, payload]);
        }
        if rows.is_empty() && !is_first {
            return Ok(());
        }
        writeln!(out, "{rows}")?;
        out.flush()?;
        is_first = false;
        if rows.row_count() < RECORDS_TABLE_ROWS {
            return Ok(());
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_shows_no_more_than_fits_and_no_control_characters() {
        let short = shorten(&format!("\u{1b}[2J{}", "é".repeat(200)));
        assert_eq!(short.chars().count(), RECORDS_PAYLOAD_CHARS_MAX + 1);
        assert!(short.starts_with("\u{fffd}[2J") && short.ends_with('…'), "{short}");
        let fits = "é".repeat(RECORDS_PAYLOAD_CHARS_MAX);
        assert_eq!(shorten(&fits), fits);
    }
}
