//! `headgate sinks`: where records are stored, how far each sink is, and what is wrong with it, over the HTTP API.

use std::io::Write;

use serde::Deserialize;
use serde_json::Value;

use super::client::ApiClient;
use super::out::{CommandOutput, grouped, table};

#[derive(Debug, clap::Args)]
pub(super) struct SinksArgs {
    /// Print the gateway's answer as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Deserialize)]
struct SinksAnswer {
    sinks: Vec<SinkAnswer>,
}

#[derive(Deserialize)]
struct SinkAnswer {
    sink: String,
    is_read: bool,
    is_writer: bool,
    cursor: u64,
    lag: u64,
    records_per_s: f64,
    trouble: Option<String>,
    last_error: Option<SinkErrorAnswer>,
    set_aside: Option<String>,
}

#[derive(Deserialize)]
struct SinkErrorAnswer {
    at: String,
    error: String,
}

pub(super) fn run(args: SinksArgs, out: &mut CommandOutput) -> anyhow::Result<()> {
    let answer: Value = ApiClient::from_environment()?.get("/v1/sinks", &[])?;
    if args.json {
        return Ok(writeln!(out, "{answer:#}")?);
    }
    let SinksAnswer { sinks } = serde_json::from_value(answer)?;
    if sinks.is_empty() {
        return Ok(writeln!(out, "nothing is stored beside the log: storage.sinks is empty")?);
    }
    let mut rows = table(&["sink", "reads", "state", "stored up to", "behind", "records/s"], &[3, 4, 5]);
    let mut notes = Vec::new();
    for sink in sinks {
        let state = match (&sink.trouble, sink.is_writer) {
            (Some(_), _) => "failing",
            (None, true) => "well",
            (None, false) => "another gateway writes",
        };
        let reads = if sink.is_read { "yes" } else { "" };
        let (cursor, lag) = (grouped(sink.cursor), grouped(sink.lag));
        let rate = format!("{:.1}", sink.records_per_s);
        rows.add_row([&*sink.sink, reads, state, &cursor, &lag, &rate]);
        let present = sink.trouble.map(|trouble| format!("{}: {trouble}", sink.sink));
        let past = sink.last_error.filter(|_| present.is_none());
        let past = past.map(|last| format!("{}: until {}: {}", sink.sink, last.at, last.error));
        let aside = sink.set_aside.map(|aside| format!("{}: {aside}", sink.sink));
        notes.extend([present, past, aside].into_iter().flatten());
    }
    writeln!(out, "{rows}")?;
    for note in notes {
        writeln!(out, "{note}")?;
    }
    Ok(())
}
