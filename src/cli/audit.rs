//! `headgate audit`: who changed what in the gateway, when and from where, over the HTTP API.

use std::io::Write;

use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

use super::client::ApiClient;
use super::out::{CommandOutput, table};
use super::time_argument::TimeArgument;

/// Entries that one request asks for.
const AUDIT_PAGE_ENTRIES: &str = "1000";

#[derive(Debug, clap::Args)]
pub(super) struct AuditArgs {
    /// Nothing that happened before: 2026-11-23T12:00:00Z, or 1h for an hour ago
    #[arg(long, value_name = "TIME|AGO", value_parser = TimeArgument::parse_past, alias = "since")]
    from: Option<TimeArgument>,
    /// Nothing that happened then or later
    #[arg(long, value_name = "TIME|AGO", value_parser = TimeArgument::parse_past)]
    to: Option<TimeArgument>,
    /// Print an entry a line as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Deserialize)]
struct AuditPageAnswer {
    entries: Vec<Box<RawValue>>,
    next: Option<i64>,
}

#[derive(Deserialize)]
struct AuditEntryAnswer {
    at: String,
    who: String,
    address: Option<String>,
    action: String,
    datasource: Option<String>,
    key_id: Option<String>,
    what: Value,
}

pub(super) fn run(args: AuditArgs, out: &mut CommandOutput) -> anyhow::Result<()> {
    let client = ApiClient::from_environment()?;
    let mut rows = table(&["at", "who", "from", "action", "datasource", "key id", "what"], &[]);
    let [from, to] = [args.from, args.to].map(|time| time.map(|time| time.to_string()));
    let mut after = 0;
    loop {
        let place = after.to_string();
        let mut query = vec![("limit", AUDIT_PAGE_ENTRIES), ("after", &place)];
        query.extend(from.as_deref().map(|from| ("from", from)));
        query.extend(to.as_deref().map(|to| ("to", to)));
        let page: AuditPageAnswer = client.get("/v1/audit", &query)?;
        for entry in &page.entries {
            if args.json {
                writeln!(out, "{entry}")?;
                continue;
            }
            let entry: AuditEntryAnswer = serde_json::from_str(entry.get())?;
            let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
            rows.add_row([
                entry.at,
                entry.who,
                or_dash(entry.address),
                entry.action,
                or_dash(entry.datasource),
                or_dash(entry.key_id),
                entry.what.to_string(),
            ]);
        }
        match page.next {
            Some(next) => after = next,
            None => break,
        }
    }
    if args.json { Ok(()) } else { Ok(writeln!(out, "{rows}")?) }
}
