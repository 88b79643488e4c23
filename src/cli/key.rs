//! `headgate key`: creates, lists, rotates, quarantines and revokes a datasource's keys, over the HTTP
//! API.

use std::io::Write;

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::client::ApiClient;
use super::datasource::{self, print_connect};
use super::out::{CommandOutput, table};
use super::quarantine;
use crate::message::KeyId;

#[derive(Debug, clap::Subcommand)]
pub(super) enum KeyCommand {
    /// Create a key, which is shown once
    Create {
        /// The datasource's id, or '*' for all
        datasource: String,
        /// What people call the key
        #[arg(long, default_value = "")]
        label: String,
        /// What it may be used for: ingest, subscribe or admin; may be given more than once
        #[arg(long = "scope", value_name = "SCOPE", default_value = "ingest")]
        scopes: Vec<String>,
        /// When it stops working: 2027-01-31T12:00:00Z
        #[arg(long, value_name = "TIME")]
        expires_at: Option<String>,
        /// Print the gateway's answer as JSON
        #[arg(long)]
        json: bool,
    },
    /// List a datasource's live keys: what they are good for, and who uses them
    List {
        /// The datasource's id, or '*' for the keys for all
        datasource: String,
        /// Print the gateway's answer as JSON
        #[arg(long)]
        json: bool,
    },
    /// Put another key in a key's place, which works on until the grace is over
    Rotate {
        /// The datasource's id, or '*' for a key for all
        datasource: String,
        /// The key's id, as `key list` shows it
        key_id: String,
        /// How long the old key still works: 30s, 90m, 24h, 7d; 0 for not at all
        #[arg(long, value_name = "TIME", default_value = "24h", value_parser = seconds)]
        grace: u64,
        /// Before the grace is over: the old key lives on, and the new one is dead
        #[arg(long, conflicts_with = "grace")]
        undo: bool,
        /// Print the gateway's answer as JSON
        #[arg(long)]
        json: bool,
    },
    /// Quarantine all that a leaked key let in since a time: subscribers and storage no longer show it
    Quarantine {
        /// The datasource's id, or '*' for all that the key let in anywhere
        datasource: String,
        /// The key's id, as `key list` shows it
        key_id: String,
        /// Since when: 2026-11-23T09:00:00Z
        #[arg(long, value_name = "TIME", required_unless_present = "undo")]
        since: Option<String>,
        /// Put it all back where it was
        #[arg(long, conflicts_with = "since")]
        undo: bool,
    },
    /// Revoke a key: it is dead and its connections are closed when this returns
    Revoke {
        /// The datasource's id
        datasource: String,
        /// The key's id, as `key list` shows it
        key_id: String,
    },
}

/// A key in the gateway's answers, without its secret.
#[derive(Debug, Deserialize)]
struct KeyAnswer {
    id: String,
    label: String,
    scopes: Vec<String>,
    state: String,
    created_at: String,
    expires_at: Option<String>,
    grace_ends_at: Option<String>,
    accepted: u64,
    refused: u64,
    connections: u64,
    last_used: Option<KeyUserAnswer>,
    users: Vec<KeyUserAnswer>,
}

/// Who has used a key.
#[derive(Debug, Deserialize)]
struct KeyUserAnswer {
    client_id: Option<String>,
    address: Option<String>,
    transport: String,
    at: String,
    offset: Option<u64>,
}

impl KeyAnswer {
    /// Its state, and until when it lasts.
    fn state(&self) -> String {
        match (&self.grace_ends_at, &self.expires_at) {
            (Some(until), _) => format!("{} until {until}", self.state),
            (None, Some(at)) if self.state == "active" => format!("active until {at}"),
            _ => self.state.clone(),
        }
    }
}

impl KeyUserAnswer {
    fn describe_use(&self) -> String {
        let name = self.client_id.as_deref().or(self.address.as_deref()).unwrap_or("unknown");
        let from = self.address.as_deref().filter(|_| self.client_id.is_some());
        match from {
            Some(address) => format!("{name} ({address}) {}", self.at),
            None => format!("{name} {}", self.at),
        }
    }

    fn describe_last_use(&self) -> String {
        let address = self.address.as_deref().unwrap_or("-");
        let offset = self.offset.map_or_else(|| "-".to_owned(), |offset| offset.to_string());
        format!("{}\n{} {address}\noffset {offset}", self.at, self.transport)
    }
}

/// A new key with its secret, which the gateway shows only once. It has no `Debug`.
#[derive(Deserialize)]
pub(super) struct NewKeyAnswer {
    pub(super) id: String,
    pub(super) secret: String,
    pub(super) scopes: Vec<String>,
}

impl NewKeyAnswer {
    pub(super) fn print(&self, out: &mut CommandOutput) -> std::io::Result<()> {
        writeln!(out, "key id      {}  ({})", self.id, self.scopes.join(", "))?;
        writeln!(out, "key         {}", self.secret)?;
        writeln!(out, "            shown once, keep it now")
    }
}

pub(super) fn run(command: KeyCommand, out: &mut CommandOutput) -> anyhow::Result<()> {
    let client = ApiClient::from_environment()?;
    match command {
        KeyCommand::Create { datasource, label, scopes, expires_at, json: as_json } => {
            let mut wanted = json!({ "label": label, "scopes": scopes });
            if let Some(expires_at) = expires_at {
                wanted["expires_at"] = expires_at.into();
            }
            let answer: Value = client.post(&path(&datasource)?, &wanted)?;
            if as_json { Ok(writeln!(out, "{answer:#}")?) } else { print_created_key(answer, out) }
        }
        KeyCommand::List { datasource, json: as_json } => {
            let answer: Value = client.get(&path(&datasource)?, &[])?;
            if as_json { Ok(writeln!(out, "{answer:#}")?) } else { print_keys(answer, out) }
        }
        KeyCommand::Rotate { datasource, key_id, grace, undo, json: as_json } => {
            let key_id = KeyId::parse(&key_id)?;
            let wanted = if undo { json!({ "undo": true }) } else { json!({ "grace_seconds": grace }) };
            let answer: Value = client.post(&format!("{}/{key_id}/rotate", path(&datasource)?), &wanted)?;
            match (as_json, undo) {
                (true, _) => Ok(writeln!(out, "{answer:#}")?),
                (false, true) => {
                    Ok(writeln!(out, "key {key_id} of {datasource} lives on; the new one is dead")?)
                }
                (false, false) => print_rotated_key(answer, out),
            }
        }
        KeyCommand::Quarantine { datasource, key_id, since, undo: _ } => {
            quarantine::quarantine_leaked_key(&client, &path(&datasource)?, &key_id, since.as_deref(), out)
        }
        KeyCommand::Revoke { datasource, key_id } => {
            let key_id = KeyId::parse(&key_id)?;
            let undurable = client.delete(&format!("{}/{key_id}", path(&datasource)?))?;
            writeln!(out, "key {key_id} of {datasource} is dead and its connections are closed")?;
            if let Some(detail) = undurable {
                writeln!(out, "not durable yet: {detail} /readyz warns until it is")?;
            }
            Ok(())
        }
    }
}

/// The API path of a datasource's keys. `*` has keys too: those for every datasource.
fn path(datasource: &str) -> anyhow::Result<String> {
    match datasource {
        "*" => Ok("/v1/datasources/*/keys".to_owned()),
        id => Ok(format!("{}/keys", datasource::path(id)?)),
    }
}

fn print_created_key(answer: Value, out: &mut CommandOutput) -> anyhow::Result<()> {
    #[derive(Deserialize)]
    struct KeyCreateAnswer {
        key: NewKeyAnswer,
        #[serde(default)]
        connect: Map<String, Value>,
    }
    let created: KeyCreateAnswer = serde_json::from_value(answer)?;
    created.key.print(out)?;
    Ok(print_connect(&created.connect, out)?)
}

fn print_rotated_key(answer: Value, out: &mut CommandOutput) -> anyhow::Result<()> {
    #[derive(Deserialize)]
    struct KeyRotateAnswer {
        key: NewKeyAnswer,
        replaced: ReplacedKeyAnswer,
        #[serde(default)]
        connect: Map<String, Value>,
    }
    #[derive(Deserialize)]
    struct ReplacedKeyAnswer {
        id: String,
        grace_ends_at: String,
    }
    let rotated: KeyRotateAnswer = serde_json::from_value(answer)?;
    rotated.key.print(out)?;
    let ReplacedKeyAnswer { id, grace_ends_at } = rotated.replaced;
    writeln!(out, "key {id} works until {grace_ends_at}")?;
    Ok(print_connect(&rotated.connect, out)?)
}

/// Parses a span of time into seconds: a number, optionally followed by `s`, `m`, `h` or `d`.
fn seconds(text: &str) -> Result<u64, String> {
    let (number, unit) = match text.char_indices().last() {
        Some((at, 's')) => (&text[..at], 1),
        Some((at, 'm')) => (&text[..at], 60),
        Some((at, 'h')) => (&text[..at], 3_600),
        Some((at, 'd')) => (&text[..at], 24 * 3_600),
        _ => (text, 1),
    };
    let seconds = number.parse::<u64>().ok().and_then(|number| number.checked_mul(unit));
    seconds.ok_or_else(|| "give a number of seconds, or 90m, 24h, 7d".to_owned())
}

fn print_keys(answer: Value, out: &mut CommandOutput) -> anyhow::Result<()> {
    #[derive(Deserialize)]
    struct KeyListAnswer {
        keys: Vec<KeyAnswer>,
    }
    let columns = [
        "key id",
        "label",
        "scopes",
        "state",
        "created",
        "last used",
        "accepted",
        "refused",
        "open",
        "users",
    ];
    let mut rows = table(&columns, &[]);
    for key in serde_json::from_value::<KeyListAnswer>(answer)?.keys {
        let last_used =
            key.last_used.as_ref().map_or_else(|| "never".to_owned(), KeyUserAnswer::describe_last_use);
        let users: Vec<_> = key.users.iter().map(KeyUserAnswer::describe_use).collect();
        rows.add_row([
            key.id.clone(),
            key.label.clone(),
            key.scopes.join(", "),
            key.state(),
            key.created_at.clone(),
            last_used,
            key.accepted.to_string(),
            key.refused.to_string(),
            key.connections.to_string(),
            users.join("\n"),
        ]);
    }
    Ok(writeln!(out, "{rows}")?)
}

#[cfg(test)]
mod tests {
    use super::seconds;

    #[test]
    fn a_span_of_time_has_a_unit_or_is_in_seconds() {
        for (text, expected) in
            [("0", 0), ("90", 90), ("30s", 30), ("90m", 5_400), ("24h", 86_400), ("7d", 604_800)]
        {
            assert_eq!(seconds(text), Ok(expected), "{text}");
        }
        for bad in ["", "h", "-1h", "1.5h", "1w", "99999999999999999999d", "1é"] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }
}
