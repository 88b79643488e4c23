//! `headgate quarantine`: lists a datasource's quarantined messages, and redrives them through intake
//! after the schema was fixed.

use std::io::Write;

use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use super::client::ApiClient;
use super::datasource;
use super::out::{CommandOutput, print_json, table};
use super::time_argument::TimeArgument;
use crate::message::Offset;

/// Characters of a payload that the table shows.
const QUARANTINE_PAYLOAD_CHARS_MAX: usize = 60;
/// Messages that are listed by default.
const QUARANTINE_LIMIT_DEFAULT: u64 = 100;

#[derive(Debug, clap::Subcommand)]
pub(super) enum QuarantineCommand {
    /// List what is in quarantine, oldest first, and why
    List {
        /// The datasource's id
        datasource: String,
        /// Only this topic, or the topics of an MQTT filter: 'spindle/#'
        #[arg(long)]
        topic: Option<String>,
        /// Only messages received at or after this time: 2026-11-23T09:00:00Z, or 1h for an hour ago
        #[arg(long, value_name = "TIME|AGO", value_parser = TimeArgument::parse_past, alias = "since")]
        from: Option<TimeArgument>,
        /// Only messages behind this offset
        #[arg(long, value_name = "OFFSET")]
        after: Option<Offset>,
        /// At most so many
        #[arg(long, default_value_t = QUARANTINE_LIMIT_DEFAULT, value_parser = clap::value_parser!(u64).range(1..=10_000))]
        limit: u64,
        /// Print the gateway's answer as JSON
        #[arg(long)]
        json: bool,
    },
    /// Send what meets its schema by now through intake again; however often, it comes in once
    Redrive {
        /// The datasource's id
        datasource: String,
        /// The offsets of the messages; all of them, if none is named
        offsets: Vec<Offset>,
        /// Only this topic, or the topics of an MQTT filter
        #[arg(long)]
        topic: Option<String>,
        /// Print what was let in as JSON, a line for each page of messages
        #[arg(long)]
        json: bool,
    },
}

/// A page of the gateway's answer.
#[derive(Deserialize)]
struct QuarantinePageAnswer {
    records: Vec<QuarantinedRecordAnswer>,
    next: Option<Offset>,
}

/// The fields that are shown of a message in quarantine.
#[derive(Deserialize)]
struct QuarantinedRecordAnswer {
    offset: Offset,
    received_at: String,
    topic: String,
    payload: Box<RawValue>,
    cause: String,
    pointer: Option<String>,
    detail: Option<String>,
    schema_version: Option<u32>,
    redriven_offset: Option<Offset>,
}

pub(super) fn run(command: QuarantineCommand, out: &mut CommandOutput) -> anyhow::Result<()> {
    let client = ApiClient::from_environment()?;
    match command {
        QuarantineCommand::List { datasource, topic, from, after, limit, json } => {
            let path = format!("{}/quarantine", datasource::path(&datasource)?);
            let (limit, after) = (limit.to_string(), after.map(|after| after.to_string()));
            let from = from.map(|from| from.to_string());
            let mut query = vec![("limit", limit.as_str())];
            query.extend(topic.as_deref().map(|topic| ("topic", topic)));
            query.extend(from.as_deref().map(|from| ("from", from)));
            query.extend(after.as_deref().map(|after| ("after_offset", after)));
            if json {
                let answer: Box<RawValue> = client.get(&path, &query)?;
                Ok(writeln!(out, "{answer}")?)
            } else {
                print_quarantine_page(&client.get(&path, &query)?, out)
            }
        }
        QuarantineCommand::Redrive { datasource, offsets, topic, json: as_json } => {
            let path = format!("{}/quarantine/redrive", datasource::path(&datasource)?);
            let mut wanted = json!({});
            if !offsets.is_empty() {
                wanted["ids"] = offsets.into();
            }
            if let Some(topic) = topic {
                wanted["filter"] = topic.into();
            }
            redrive(&client, &path, &wanted, as_json, out)
        }
    }
}

fn print_quarantine_page(page: &QuarantinePageAnswer, out: &mut CommandOutput) -> anyhow::Result<()> {
    let mut rows = table(&["offset", "received", "topic", "payload", "why", "let in at"], &[0, 5]);
    for record in &page.records {
        let why = match (&record.pointer, &record.detail, record.schema_version) {
            (Some(pointer), Some(detail), Some(version)) => format!("{pointer} {detail} (version {version})"),
            _ => record.cause.clone(),
        };
        let redriven = record.redriven_offset.map_or_else(String::new, |offset| offset.to_string());
        let payload: String = record.payload.get().chars().take(QUARANTINE_PAYLOAD_CHARS_MAX).collect();
        rows.add_row([
            record.offset.to_string(),
            record.received_at.clone(),
            record.topic.clone(),
            payload,
            why.trim().to_owned(),
            redriven,
        ]);
    }
    writeln!(out, "{rows}")?;
    match page.next {
        Some(next) => Ok(writeln!(out, "more with --after {next}")?),
        None => Ok(()),
    }
}

/// Redrives page by page until nothing more is redriven.
fn redrive(
    client: &ApiClient,
    path: &str,
    wanted: &Value,
    as_json: bool,
    out: &mut CommandOutput,
) -> anyhow::Result<()> {
    #[derive(Deserialize)]
    struct RedrivePageAnswer {
        redriven: u64,
        duplicates: u64,
        failing: u64,
        errors: Vec<FailingRecordAnswer>,
        more: bool,
    }
    #[derive(Deserialize)]
    struct FailingRecordAnswer {
        offset: Offset,
        topic: String,
        pointer: String,
        detail: String,
        schema_version: u32,
    }
    loop {
        let answer: Value = client.post(path, wanted)?;
        if as_json {
            writeln!(out, "{answer}")?;
        }
        let RedrivePageAnswer { redriven, duplicates, failing, errors, more } =
            serde_json::from_value(answer)?;
        if !as_json {
            writeln!(out, "{redriven} let in, {duplicates} let in before, {failing} still failing")?;
            for FailingRecordAnswer { offset, topic, pointer, detail, schema_version } in &errors {
                writeln!(out, "  {offset} {topic}: {pointer} {detail} (version {schema_version})")?;
            }
        }
        // Each request tries the failing messages again. If nothing else came, another one is useless.
        if !more || redriven + duplicates == 0 {
            return Ok(());
        }
    }
}

/// `headgate key quarantine`: quarantines the records that a leaked key let in, or restores them.
pub(super) fn quarantine_leaked_key(
    client: &ApiClient,
    path: &str,
    since: Option<&str>,
    as_json: bool,
    out: &mut CommandOutput,
) -> anyhow::Result<()> {
    #[derive(Deserialize)]
    struct LeakQuarantineAnswer {
        records: u64,
        topics: Vec<LeakedTopicAnswer>,
        last_offset: Option<Offset>,
    }
    #[derive(Deserialize)]
    struct LeakedTopicAnswer {
        datasource: String,
        topic: String,
        records: u64,
    }
    let wanted = since.map_or_else(|| json!({ "undo": true }), |since| json!({ "since": since }));
    let answer: Value = client.post(path, &wanted)?;
    if as_json {
        return print_json(&answer, out);
    }
    let LeakQuarantineAnswer { records, topics, last_offset } = serde_json::from_value(answer)?;
    writeln!(out, "{records} records that this key let in are in quarantine")?;
    for LeakedTopicAnswer { datasource, topic, records } in topics {
        writeln!(out, "  {records} of {datasource} {topic}")?;
    }
    match last_offset {
        Some(offset) => Ok(writeln!(out, "the last that it wrote has offset {offset}")?),
        None => Ok(()),
    }
}
