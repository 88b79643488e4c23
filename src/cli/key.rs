//! `headgate key`: creates, lists, rotates, quarantines, limits and revokes a datasource's keys, and makes access tokens of
//! them, over the HTTP API.

use std::io::Write;

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::admin_key_file::AdminKeyFile;
use super::client::ApiClient;
use super::confirm::confirm;
use super::datasource::{self, print_connect};
use super::exit_code::{NotFoundHere, UsageError};
use super::key_table;
use super::limit::LimitArgs;
use super::out::{CommandOutput, print_json};
use super::quarantine;
use super::time_argument::{TimeArgument, parse_seconds};
use crate::auth::Digest;
use crate::auth::key::may_hold_key;
use crate::limits::{GRACE_S_MAX, TOKEN_TTL_S_MAX};
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
        #[arg(long = "scope", value_name = "SCOPE", default_value = "ingest", value_parser = ["ingest", "subscribe", "admin"])]
        scopes: Vec<String>,
        /// When it stops working: 2027-01-31T12:00:00Z, or 90d for in 90 days
        #[arg(long, value_name = "TIME|SPAN", value_parser = TimeArgument::parse_future)]
        expires_at: Option<TimeArgument>,
        /// Print the gateway's answer as JSON
        #[arg(long)]
        json: bool,
    },
    /// List a datasource's live keys: what they are good for, and whether they are used; with --wide, by whom
    List {
        /// The datasource's id, or '*' for the keys for all
        #[arg(required_unless_present = "all")]
        datasource: Option<String>,
        /// The keys of every datasource, and those for all
        #[arg(long, conflicts_with = "datasource")]
        all: bool,
        /// Print the gateway's answer as JSON; with --all, a line for each datasource
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
        #[arg(long, value_name = "SPAN", default_value = "24h", value_parser = parse_grace)]
        grace: u64,
        /// Before the grace is over: the old key lives on, and the new one is dead
        #[arg(long, conflicts_with = "grace")]
        undo: bool,
        /// Print the gateway's answer as JSON
        #[arg(long)]
        json: bool,
    },
    /// Make an access token of a key, for a page of a browser: it is shown once, ends soon and dies with its key
    Token {
        /// The datasource's id, or '*' for a key for all
        datasource: String,
        /// The key's id, as `key list` shows it
        key_id: String,
        /// For how long it is good: 90s, 15m, 1h; 24h at most
        #[arg(long, value_name = "SPAN", default_value = "1h", value_parser = parse_ttl)]
        ttl: u64,
        /// A topic filter that it is for, such as 'spindle/#'; may be given more than once; all topics without
        #[arg(long = "topic", value_name = "FILTER")]
        topics: Vec<String>,
        /// What it may be used for: ingest or subscribe; may be given more than once; all that its key may without
        #[arg(long = "scope", value_name = "SCOPE", value_parser = ["ingest", "subscribe"])]
        scopes: Vec<String>,
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
        /// Since when: 2026-11-23T09:00:00Z, or 2h for two hours ago
        #[arg(long, value_name = "TIME|AGO", value_parser = TimeArgument::parse_past, required_unless_present = "undo")]
        since: Option<TimeArgument>,
        /// Put it all back where it was
        #[arg(long, conflicts_with = "since")]
        undo: bool,
        /// Print the gateway's answer as JSON
        #[arg(long)]
        json: bool,
    },
    /// Show a key's own limits, set and unset them
    Limit {
        /// The datasource's id, or '*' for a key for all
        datasource: String,
        /// The key's id, as `key list` shows it
        key_id: String,
        #[command(flatten)]
        change: LimitArgs,
    },
    /// Revoke a key: it is dead and its connections are closed when this returns
    Revoke {
        /// The datasource's id, or '*' for a key for all
        datasource: String,
        /// The key's id, as `key list` shows it
        key_id: String,
        /// Ask nothing, on a terminal either
        #[arg(long)]
        yes: bool,
        /// Print what was done as JSON
        #[arg(long)]
        json: bool,
    },
}

/// Reads a key's id. A key itself goes no further than this.
///
/// # Errors
/// [`UsageError`] for a key; [`NameError::KeyId`](crate::message::NameError::KeyId) for any other text.
pub(super) fn parse_key_id(text: &str) -> anyhow::Result<KeyId> {
    if !may_hold_key(text) {
        return Ok(KeyId::parse(text)?);
    }
    let id = Digest::from_presented(text.as_bytes()).map(|digest| format!(": {}", digest.key_id()));
    let id = id.unwrap_or_default();
    Err(UsageError(format!(
        "this is a key itself, and was sent nowhere. Every user of this machine can read an argument: rotate the key if it \
         is real, and give its id{id}"
    ))
    .into())
}

fn parse_grace(text: &str) -> Result<u64, String> {
    let seconds = parse_seconds(text)?;
    match seconds <= GRACE_S_MAX {
        true => Ok(seconds),
        false => Err(format!("it can be {} days at most", GRACE_S_MAX / 86_400)),
    }
}

fn parse_ttl(text: &str) -> Result<u64, String> {
    let seconds = parse_seconds(text)?;
    match (1..=TOKEN_TTL_S_MAX).contains(&seconds) {
        true => Ok(seconds),
        false => Err(format!("it can be {} hours at most, and has to be a second", TOKEN_TTL_S_MAX / 3_600)),
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
    // An argument that cannot be used is told before anything is asked of a gateway, or of a person.
    let key_id = match &command {
        KeyCommand::Rotate { key_id, .. }
        | KeyCommand::Token { key_id, .. }
        | KeyCommand::Quarantine { key_id, .. }
        | KeyCommand::Limit { key_id, .. }
        | KeyCommand::Revoke { key_id, .. } => Some(parse_key_id(key_id)?),
        KeyCommand::Create { .. } | KeyCommand::List { .. } => None,
    };
    let client = ApiClient::from_environment()?;
    let key_path = |datasource: &str| match key_id {
        Some(key_id) => Ok(format!("{}/{key_id}", path(datasource)?)),
        None => path(datasource),
    };
    match command {
        KeyCommand::Create { datasource, label, scopes, expires_at, json: as_json } => {
            let mut wanted = json!({ "label": label, "scopes": scopes });
            if let Some(expires_at) = expires_at {
                wanted["expires_at"] = expires_at.to_string().into();
            }
            let answer: Value = client.post(&path(&datasource)?, &wanted)?;
            if as_json { print_json(&answer, out) } else { print_created_key(answer, out) }
        }
        KeyCommand::List { datasource: Some(datasource), json: as_json, .. } => {
            let answer: Value = client.get(&path(&datasource)?, &[])?;
            if as_json { print_json(&answer, out) } else { key_table::print_keys(answer, out) }
        }
        KeyCommand::List { datasource: None, json: as_json, .. } => {
            key_table::print_all_keys(&client, as_json, out)
        }
        KeyCommand::Rotate { datasource, grace, undo, json: as_json, .. } => {
            let wanted = if undo { json!({ "undo": true }) } else { json!({ "grace_seconds": grace }) };
            let path = format!("{}/rotate", key_path(&datasource)?);
            rotate(&client, &path, &wanted, as_json, out)
        }
        KeyCommand::Token { datasource, ttl, topics, scopes, json: as_json, .. } => {
            let mut wanted = json!({ "ttl_s": ttl });
            for (name, given) in [("topics", topics), ("scopes", scopes)] {
                if !given.is_empty() {
                    wanted[name] = given.into();
                }
            }
            let path = format!("{}/tokens", key_path(&datasource)?);
            let answer: Value = client.post(&path, &wanted)?;
            if as_json { print_json(&answer, out) } else { print_token(answer, out) }
        }
        KeyCommand::Quarantine { datasource, since, json, .. } => {
            let since = since.map(|since| since.to_string());
            let path = format!("{}/quarantine", key_path(&datasource)?);
            quarantine::quarantine_leaked_key(&client, &path, since.as_deref(), json, out)
        }
        KeyCommand::Limit { datasource, key_id, change } => {
            let find = |client: &ApiClient| find_key(client, &datasource, &key_id);
            change.run(&client, &key_path(&datasource)?, find, out)
        }
        KeyCommand::Revoke { datasource, key_id, yes, json: as_json } => {
            let path = key_path(&datasource)?;
            confirm(
                &format!(
                    "Revoke key {key_id} of {datasource}? Whoever uses it is cut off; there is no undo."
                ),
                yes,
            )?;
            let undurable = client.delete(&path)?;
            if as_json {
                let done = json!({
                    "datasource": datasource, "key_id": key_id, "revoked": true,
                    "durable": undurable.is_none(), "detail": undurable,
                });
                return print_json(&done, out);
            }
            writeln!(out, "key {key_id} of {datasource} is dead and its connections are closed")?;
            if let Some(detail) = undurable {
                writeln!(out, "not durable yet: {detail} /readyz warns until it is")?;
            }
            Ok(())
        }
    }
}

/// The API path of a datasource's keys. `*` has keys too: those for every datasource.
pub(super) fn path(datasource: &str) -> anyhow::Result<String> {
    match datasource {
        "*" => Ok("/v1/datasources/*/keys".to_owned()),
        id => Ok(format!("{}/keys", datasource::path(id)?)),
    }
}

/// A key of a datasource, as the list has it.
fn find_key(client: &ApiClient, datasource: &str, key_id: &str) -> anyhow::Result<Value> {
    let mut answer: Value = client.get(&path(datasource)?, &[])?;
    let keys = answer["keys"].as_array_mut().into_iter().flatten();
    let found = keys.into_iter().find(|key| key["id"] == key_id).map(Value::take);
    found.ok_or_else(|| NotFoundHere(format!("{datasource} has no key {key_id}")).into())
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

fn print_token(answer: Value, out: &mut CommandOutput) -> anyhow::Result<()> {
    #[derive(Deserialize)]
    struct TokenAnswer {
        token: String,
        datasource: String,
        scopes: Vec<String>,
        topics: Option<Vec<String>>,
        expires_at: String,
    }
    let TokenAnswer { token, datasource, scopes, topics, expires_at } = serde_json::from_value(answer)?;
    writeln!(out, "token       {token}")?;
    writeln!(out, "            shown once; it ends with its key, and at {expires_at}")?;
    writeln!(out, "good for    {}", scopes.join(", "))?;
    writeln!(out, "topics      {}", topics.map_or("all".to_owned(), |topics| topics.join(", ")))?;
    if datasource != "*" && scopes.iter().any(|scope| scope == "subscribe") {
        writeln!(out)?;
        writeln!(
            out,
            "in a page   new EventSource(\"/v1/datasources/{datasource}/stream?access_token=\" + token)"
        )?;
    }
    Ok(())
}

/// Rotates a key, or undoes it, and keeps the `admin.key` that was presented in step.
fn rotate(
    client: &ApiClient,
    path: &str,
    wanted: &Value,
    as_json: bool,
    out: &mut CommandOutput,
) -> anyhow::Result<()> {
    let file = AdminKeyFile::of(client.key());
    let answer: Value = client.post(path, wanted)?;
    let kept = file.and_then(|file| file.follow(&answer).transpose());
    if as_json {
        print_json(&answer, out)?;
    } else {
        print_rotated_key(answer, out)?;
    }
    match kept {
        // Standard output may be a script's.
        Some(Ok(words)) if as_json => writeln!(std::io::stderr(), "headgate: {words}")?,
        Some(Ok(words)) => writeln!(out, "\n{words}")?,
        Some(Err(error)) => {
            return Err(error.context("it is rotated; keep the new key, which is shown above"));
        }
        None => {}
    }
    Ok(())
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
    if answer.get("replaced").is_none() {
        let lives_on = answer["key"]["id"].as_str().unwrap_or_default();
        return Ok(writeln!(out, "key {lives_on} lives on; the new one is dead")?);
    }
    let rotated: KeyRotateAnswer = serde_json::from_value(answer)?;
    rotated.key.print(out)?;
    let ReplacedKeyAnswer { id, grace_ends_at } = rotated.replaced;
    writeln!(out, "key {id} works until {grace_ends_at}")?;
    Ok(print_connect(&rotated.connect, out)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::ApiKey;

    #[test]
    fn a_key_in_the_place_of_its_id_is_not_repeated() {
        let secret = ApiKey::generate();
        for text in [secret.expose().to_owned(), secret.expose()[..20].to_owned()] {
            let words = parse_key_id(&text).expect_err("a key").to_string();
            assert!(!words.contains(&text[4..]) && words.contains("sent nowhere"), "{words}");
        }
        let words = parse_key_id(secret.expose()).expect_err("a key").to_string();
        assert!(words.contains(&secret.digest().key_id().to_string()), "{words}");
        assert!(parse_key_id("0123456789ab").is_ok() && parse_key_id("0123").is_err());
    }

    #[test]
    fn a_token_s_time_has_bounds() {
        assert_eq!((parse_ttl("1h"), parse_ttl("24h")), (Ok(3_600), Ok(TOKEN_TTL_S_MAX)));
        assert!(parse_ttl("0").is_err() && parse_ttl("25h").is_err());
    }

    #[test]
    fn a_grace_has_a_bound() {
        assert_eq!(parse_grace("24h"), Ok(86_400));
        assert!(parse_grace("soon").is_err() && parse_grace(&(GRACE_S_MAX + 1).to_string()).is_err());
    }
}
