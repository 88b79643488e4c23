//! `headgate key`: more keys for a datasource, and the end of one, over the HTTP API.

use std::io::Write;

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::client::Client;
use super::datasource::{self, print_connect};
use super::out::{Out, table};
use crate::message::KeyId;

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
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
    /// List a datasource's live keys, by their ids
    List {
        /// The datasource's id
        datasource: String,
        /// Print the gateway's answer as JSON
        #[arg(long)]
        json: bool,
    },
    /// Revoke a key: it is dead and its connections are closed when this returns
    Revoke {
        /// The datasource's id
        datasource: String,
        /// The key's id, as `key list` shows it
        key_id: String,
    },
}

/// A key in the gateway's answers, but for its secret.
#[derive(Debug, Deserialize)]
struct Key {
    id: String,
    label: String,
    scopes: Vec<String>,
    created_at: String,
    expires_at: Option<String>,
}

/// A key's text as the gateway shows it once. Shown by no `Debug`.
#[derive(Deserialize)]
pub(super) struct NewKey {
    pub(super) id: String,
    pub(super) secret: String,
    pub(super) scopes: Vec<String>,
}

impl NewKey {
    pub(super) fn print(&self, out: &mut Out) -> std::io::Result<()> {
        writeln!(out, "key id      {}  ({})", self.id, self.scopes.join(", "))?;
        writeln!(out, "key         {}", self.secret)?;
        writeln!(out, "            shown once, keep it now")
    }
}

pub(super) fn run(command: Command, out: &mut Out) -> anyhow::Result<()> {
    let client = Client::from_environment()?;
    match command {
        Command::Create { datasource, label, scopes, expires_at, json: as_json } => {
            let mut wanted = json!({ "label": label, "scopes": scopes });
            if let Some(expires_at) = expires_at {
                wanted["expires_at"] = expires_at.into();
            }
            let answer: Value = client.post(&path(&datasource)?, &wanted)?;
            if as_json { Ok(writeln!(out, "{answer:#}")?) } else { created(answer, out) }
        }
        Command::List { datasource, json: as_json } => {
            let answer: Value = client.get(&path(&datasource)?, &[])?;
            if as_json { Ok(writeln!(out, "{answer:#}")?) } else { list(answer, out) }
        }
        Command::Revoke { datasource, key_id } => {
            let key_id = KeyId::parse(&key_id)?;
            client.delete(&format!("{}/{key_id}", path(&datasource)?))?;
            Ok(writeln!(out, "key {key_id} of {datasource} is dead and its connections are closed")?)
        }
    }
}

/// Where a datasource's keys are; `*` has some too: those that are good for every datasource.
fn path(datasource: &str) -> anyhow::Result<String> {
    match datasource {
        "*" => Ok("/v1/datasources/*/keys".to_owned()),
        id => Ok(format!("{}/keys", datasource::path(id)?)),
    }
}

fn created(answer: Value, out: &mut Out) -> anyhow::Result<()> {
    #[derive(Deserialize)]
    struct Created {
        key: NewKey,
        #[serde(default)]
        connect: Map<String, Value>,
    }
    let created: Created = serde_json::from_value(answer)?;
    created.key.print(out)?;
    Ok(print_connect(&created.connect, out)?)
}

fn list(answer: Value, out: &mut Out) -> anyhow::Result<()> {
    #[derive(Deserialize)]
    struct List {
        keys: Vec<Key>,
    }
    let mut rows = table(&["key id", "label", "scopes", "created", "expires"], &[]);
    for key in serde_json::from_value::<List>(answer)?.keys {
        let expires_at = key.expires_at.unwrap_or_else(|| "never".to_owned());
        rows.add_row([key.id, key.label, key.scopes.join(", "), key.created_at, expires_at]);
    }
    Ok(writeln!(out, "{rows}")?)
}
