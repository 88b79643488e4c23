//! `headgate refusals`: prints recent refusals: whom, why, and what to do about each.

use std::io::Write;

use serde::Deserialize;
use serde_json::{Value, json};

use super::client::ApiClient;
use super::out::{CommandOutput, grouped, is_wide, print_json, table};
use super::time_argument::ago;
use crate::observe::cause::Cause;

/// What to look for.
#[derive(Debug, clap::Args)]
pub(super) struct RefusalsArgs {
    /// Only this MQTT client identifier
    #[arg(long, value_name = "ID")]
    client: Option<String>,
    /// Only this IP address
    #[arg(long, value_name = "IP")]
    address: Option<String>,
    /// Only this cause
    #[arg(long)]
    cause: Option<String>,
    /// Only about this datasource
    #[arg(long, value_name = "DS")]
    datasource: Option<String>,
    /// List every cause that there is, and what to do about it, instead of what was refused
    #[arg(long, conflicts_with_all = ["client", "address", "cause", "datasource", "limit"])]
    causes: bool,
    /// How many at most
    #[arg(long, default_value_t = 50)]
    limit: usize,
    /// Print the gateway's answer as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Deserialize)]
struct RefusalsAnswer {
    refusals: Vec<RefusalAnswer>,
    unlisted: u64,
}

#[derive(Debug, Deserialize)]
struct RefusalAnswer {
    #[serde(default)]
    address: String,
    #[serde(default)]
    client: String,
    transport: String,
    cause: String,
    #[serde(default)]
    detail: String,
    #[serde(default)]
    datasource: String,
    count: u64,
    last_at: String,
    advice: String,
}

pub(super) fn run(args: RefusalsArgs, out: &mut CommandOutput) -> anyhow::Result<()> {
    if args.causes {
        return print_causes(args.json, out);
    }
    let client = ApiClient::from_environment()?;
    let limit = args.limit.to_string();
    let given = [
        ("client", &args.client),
        ("address", &args.address),
        ("cause", &args.cause),
        ("datasource", &args.datasource),
    ];
    let mut query: Vec<(&str, &str)> =
        given.iter().filter_map(|(name, value)| Some((*name, value.as_deref()?))).collect();
    query.push(("limit", &limit));
    let answer: Value = client.get("/v1/refusals", &query)?;
    if args.json { print_json(&answer, out) } else { print_refusals(serde_json::from_value(answer)?, out) }
}

fn print_refusals(list: RefusalsAnswer, out: &mut CommandOutput) -> anyhow::Result<()> {
    if list.refusals.is_empty() {
        writeln!(out, "nothing of that kind was refused since the gateway was started")?;
    } else {
        let columns = ["last", "client", "address", "over", "datasource", "why", "times", "what to do"];
        let mut rows = table(&columns, &[6]);
        for refusal in list.refusals {
            let RefusalAnswer {
                address,
                client,
                transport,
                cause,
                detail,
                datasource,
                count,
                last_at,
                advice,
            } = refusal;
            let cause = if detail.is_empty() { cause } else { format!("{cause}: {detail}") };
            let last_at = if is_wide() { last_at } else { ago(&last_at) };
            let count = grouped(count);
            rows.add_row([last_at, client, address, transport, datasource, cause, count, advice]);
        }
        writeln!(out, "{rows}")?;
    }
    if list.unlisted > 0 {
        writeln!(out, "{} more were counted and not listed, in a flood", grouped(list.unlisted))?;
    }
    Ok(())
}

/// Every cause of a refusal, with what to do about it.
fn print_causes(as_json: bool, out: &mut CommandOutput) -> anyhow::Result<()> {
    if as_json {
        let causes: Vec<_> = Cause::ALL
            .iter()
            .map(|cause| json!({ "cause": cause.name(), "advice": cause.advice() }))
            .collect();
        return print_json(&causes, out);
    }
    let mut rows = table(&["cause", "what to do"], &[]);
    for cause in Cause::ALL {
        rows.add_row([cause.name(), cause.advice()]);
    }
    Ok(writeln!(out, "{rows}")?)
}
