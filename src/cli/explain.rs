//! `headgate explain`: all that the gateway knows of one client, by the name that it gives itself or by its address: which
//! keys it has used, its sessions, and what was refused to it and what to do about that.

use std::io::{self, Write};
use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::client::ApiClient;
use super::datasource;
use super::exit_code::NotFoundHere;
use super::key;
use super::key_table::is_not_found;
use super::out::{CommandOutput, grouped, print_json};
use super::time_argument::ago;

/// Refusals that are shown of a client.
const REFUSALS_SHOWN_MAX: &str = "10";

#[derive(Debug, clap::Args)]
pub(super) struct ExplainArgs {
    /// The client's MQTT identifier, or its IP address
    client: String,
    /// Only what it did with this datasource; without it, with all of them
    #[arg(long, value_name = "DS")]
    datasource: Option<String>,
    /// Print what is known as JSON
    #[arg(long)]
    json: bool,
}

/// What is known of a client.
#[derive(Debug, Serialize)]
struct ClientCase {
    client: String,
    /// The keys that it has used lately, the last use first.
    keys: Vec<Value>,
    /// Its MQTT sessions on this gateway.
    sessions: Vec<Value>,
    /// What was refused to it, the last first.
    refusals: Vec<Value>,
}

#[derive(Deserialize)]
struct OwnerAnswer {
    id: String,
}

#[derive(Deserialize)]
struct OwnersAnswer {
    datasources: Vec<OwnerAnswer>,
}

pub(super) fn run(args: ExplainArgs, out: &mut CommandOutput) -> anyhow::Result<()> {
    let client = ApiClient::from_environment()?;
    let owners = match &args.datasource {
        Some(id) => {
            datasource::path(id)?;
            vec![id.clone()]
        }
        None => {
            let list: OwnersAnswer = client.get("/v1/datasources", &[])?;
            std::iter::once("*".to_owned()).chain(list.datasources.into_iter().map(|of| of.id)).collect()
        }
    };
    let mut case =
        ClientCase { client: args.client.clone(), keys: vec![], sessions: vec![], refusals: vec![] };
    for owner in &owners {
        match case.look_under(&client, owner) {
            // It was deleted meanwhile.
            Err(error) if is_not_found(&error) && args.datasource.is_none() => {}
            looked => looked?,
        }
    }
    case.keys.sort_by(|a, b| b["at"].as_str().cmp(&a["at"].as_str()));
    let name = if case.client.parse::<IpAddr>().is_ok() { "address" } else { "client" };
    let mut query = vec![(name, case.client.as_str()), ("limit", REFUSALS_SHOWN_MAX)];
    query.extend(args.datasource.as_deref().map(|id| ("datasource", id)));
    let mut refused: Value = client.get("/v1/refusals", &query)?;
    case.refusals = refused["refusals"].as_array_mut().map(std::mem::take).unwrap_or_default();
    match args.json {
        true => print_json(&case, out),
        false => case.print(out),
    }
}

impl ClientCase {
    /// Adds what it did under the keys of a datasource, or of all (`*`).
    fn look_under(&mut self, client: &ApiClient, owner: &str) -> anyhow::Result<()> {
        let list: Value = client.get(&key::path(owner)?, &[])?;
        for key in list["keys"].as_array().into_iter().flatten() {
            let users = key["users"].as_array().into_iter().flatten();
            for used in users.filter(|user| is_use_of(&self.client, user)) {
                self.keys.push(json!({
                    "datasource": owner, "key_id": key["id"], "label": key["label"],
                    "scopes": key["scopes"], "state": key["state"], "client_id": used["client_id"],
                    "address": used["address"], "transport": used["transport"], "at": used["at"],
                }));
            }
        }
        let id = self.client.as_str();
        // Sessions come in the order of their identifiers: a page begins right before this one.
        let before: String = id.chars().take(id.chars().count().saturating_sub(1)).collect();
        let mut after = before;
        loop {
            let path = match owner {
                "*" => "/v1/datasources/*/sessions".to_owned(),
                owner => format!("{}/sessions", datasource::path(owner)?),
            };
            let query = [("limit", "1000"), ("after", after.as_str()), ("publishers", "true")];
            let page: Value = client.get(&path, &query)?;
            for session in page["sessions"].as_array().into_iter().flatten() {
                if session["client_id"] == id {
                    let mut session = session.clone();
                    session["datasource"] = owner.into();
                    self.sessions.push(session);
                    return Ok(());
                }
            }
            match page["next"].as_str() {
                Some(next) if next < id => after = next.to_owned(),
                _ => return Ok(()),
            }
        }
    }

    fn print(&self, out: &mut CommandOutput) -> anyhow::Result<()> {
        let Self { client, keys, sessions, refusals } = self;
        if keys.is_empty() && sessions.is_empty() && refusals.is_empty() {
            let words = format!(
                "nothing is known of {client}: it has used no live key lately, has no session here, and was refused \
                 nothing since the gateway was started; does it reach the gateway?"
            );
            return Err(NotFoundHere(words).into());
        }
        if keys.is_empty() {
            writeln!(out, "key      it has used none of those that live now")?;
        }
        keys.iter().try_for_each(|key| print_key(key, out))?;
        if sessions.is_empty() {
            writeln!(out, "session  none, connected or kept, on this gateway")?;
        }
        sessions.iter().try_for_each(|session| print_session(session, out))?;
        if refusals.is_empty() {
            writeln!(out, "refused  nothing since the gateway was started")?;
        }
        Ok(refusals.iter().try_for_each(|refusal| print_refusal(refusal, out))?)
    }
}

/// A text of the gateway's, or a dash.
fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("-")
}

fn print_key(key: &Value, out: &mut CommandOutput) -> io::Result<()> {
    let (id, of, state, label) =
        (text(&key["key_id"]), text(&key["datasource"]), text(&key["state"]), text(&key["label"]));
    let (at, over, from) = (ago(text(&key["at"])), text(&key["transport"]), text(&key["address"]));
    let name = text(&key["client_id"]);
    writeln!(
        out,
        "key      {id} of {of} ({state}) {label}: last used {at} over {over} from {from}, as {name}"
    )
}

fn print_session(session: &Value, out: &mut CommandOutput) -> io::Result<()> {
    let state = if session["connected"] == true { "connected" } else { "away" };
    let (of, cursor, in_flight) = (text(&session["datasource"]), &session["cursor"], &session["in_flight"]);
    let behind = grouped(session["behind"].as_u64().unwrap_or_default());
    write!(
        out,
        "session  of {of}: {state}, at offset {cursor}, {behind} behind, {in_flight} not acknowledged"
    )?;
    if let Some(since) = session["still_since"].as_str() {
        write!(out, "; it takes nothing since {}", ago(since))?;
    }
    if let Some(at) = session["expires_at"].as_str() {
        write!(out, "; it ends at {at}")?;
    }
    writeln!(out)
}

fn print_refusal(refusal: &Value, out: &mut CommandOutput) -> io::Result<()> {
    let (count, last, over) =
        (&refusal["count"], ago(text(&refusal["last_at"])), text(&refusal["transport"]));
    let (cause, detail) = (text(&refusal["cause"]), text(&refusal["detail"]));
    let times = if *count == 1 { "once".to_owned() } else { format!("{count} times, last") };
    writeln!(out, "refused  {times} {last}, over {over}: {cause}: {detail}")?;
    writeln!(out, "         what to do: {}", text(&refusal["advice"]))
}

/// Whether a use of a key was that of a client, by its identifier or by its address.
fn is_use_of(client: &str, used: &Value) -> bool {
    let address = |text: &str| text.parse::<IpAddr>().ok().map(|address| address.to_canonical());
    let same_address = || {
        let wanted = address(client);
        wanted.is_some() && wanted == used["address"].as_str().and_then(address)
    };
    used["client_id"] == client || same_address()
}
