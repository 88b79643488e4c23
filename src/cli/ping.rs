//! `headgate ping`: whether a gateway serves, or takes messages: for health checks, and for scripts that wait for it. It needs no
//! key.

use std::io::Write;
use std::time::Duration;

use anyhow::Context;
use serde::Deserialize;
use serde_json::{Value, json};

use super::client::{self, ProblemAnswer};
use super::exit_code::NotReady;
use super::out::CommandOutput;

/// How long the answer may take. What is asked waits for no disk.
const PING_MAX: Duration = Duration::from_secs(5);

#[derive(Debug, clap::Args)]
pub(super) struct PingArgs {
    /// Ask whether messages can be taken (`/readyz`), and not only whether the gateway serves (`/livez`)
    #[arg(long)]
    ready: bool,
    /// Print the answer as JSON
    #[arg(long)]
    json: bool,
}

/// What `/readyz` says.
#[derive(Deserialize)]
struct ReadinessAnswer {
    reasons: Vec<String>,
    warnings: Vec<String>,
}

pub(super) fn run(args: PingArgs, out: &mut CommandOutput) -> anyhow::Result<()> {
    let url = client::gateway_url()?;
    let url = url.trim_end_matches('/');
    let path = if args.ready { "/readyz" } else { "/livez" };
    let request = client::agent(url)?.get(format!("{url}{path}"));
    let answered = request.config().timeout_global(Some(PING_MAX)).build().call();
    let mut response = answered.map_err(|error| client::unanswered(url, error))?;
    let status = response.status().as_u16();
    let text = response.body_mut().read_to_string().context("the gateway's answer broke off")?;
    if !args.ready {
        if status != 200 || text.trim() != "alive" {
            return Err(ProblemAnswer::of_stranger(status).into());
        }
        match args.json {
            true => writeln!(out, "{:#}", json!({ "alive": true, "url": url }))?,
            false => writeln!(out, "alive at {url}")?,
        }
        return Ok(());
    }
    let answer: Result<Value, _> = serde_json::from_str(&text);
    let said = answer.ok().and_then(|answer| Some((ReadinessAnswer::deserialize(&answer).ok()?, answer)));
    let Some((readiness, answer)) = said.filter(|_| matches!(status, 200 | 503)) else {
        return Err(ProblemAnswer::of_stranger(status).into());
    };
    if args.json {
        writeln!(out, "{answer:#}")?;
    } else if status == 200 {
        writeln!(out, "ready at {url}")?;
        readiness.warnings.iter().try_for_each(|warning| writeln!(out, "warning  {warning}"))?;
    }
    if status != 200 {
        return Err(NotReady(readiness.reasons.join("; ")).into());
    }
    Ok(())
}
