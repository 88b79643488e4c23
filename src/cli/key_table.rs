//! Keys as a table: what each is good for, whether it is used, and with `--wide` by whom.

use std::io::Write;

use serde::Deserialize;
use serde_json::Value;

use super::client::ApiClient;
use super::datasource::DatasourceAnswer;
use super::key;
use super::out::{CommandOutput, grouped, is_wide, keep_whole, table};
use super::time_argument::{ago, distance};
use crate::message::now_micros;
use crate::time::parse_time;

/// A key in the gateway's answers, without its secret.
#[derive(Debug, Deserialize)]
pub(super) struct KeyAnswer {
    id: String,
    label: String,
    scopes: Vec<String>,
    state: String,
    created_at: String,
    expires_at: Option<String>,
    grace_ends_at: Option<String>,
    pub(super) accepted: u64,
    pub(super) refused: u64,
    pub(super) connections: u64,
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

/// The gateway's list.
#[derive(Debug, Deserialize)]
pub(super) struct KeyListAnswer {
    pub(super) keys: Vec<KeyAnswer>,
}

impl KeyAnswer {
    /// Its state, and how long that lasts.
    fn state(&self) -> String {
        let left = |until: &str| match parse_time(until) {
            Some(time) => distance(now_micros(), time),
            None => until.to_owned(),
        };
        match (&self.grace_ends_at, &self.expires_at) {
            (Some(until), _) if is_wide() => format!("{} until {until}", self.state),
            (Some(until), _) => format!("{}, {} left", self.state, left(until)),
            (None, Some(at)) if self.state == "active" && is_wide() => format!("active until {at}"),
            (None, Some(at)) if self.state == "active" => format!("active, {} left", left(at)),
            _ => self.state.clone(),
        }
    }

    /// The cells of its row.
    fn cells(&self) -> Vec<String> {
        let last_used = match &self.last_used {
            None => "never".to_owned(),
            Some(user) if is_wide() => user.describe_last_use(),
            Some(user) => ago(&user.at),
        };
        let mut cells = vec![self.id.clone(), self.label.clone(), self.scopes.join(", "), self.state()];
        cells.extend([last_used, grouped(self.accepted), grouped(self.refused), grouped(self.connections)]);
        if is_wide() {
            let users: Vec<_> = self.users.iter().map(KeyUserAnswer::describe_use).collect();
            cells.extend([self.created_at.clone(), users.join("\n")]);
        }
        cells
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

/// The columns of [`KeyAnswer::cells`].
const KEY_COLUMNS: [&str; 8] =
    ["key id", "label", "scopes", "state", "last used", "accepted", "refused", "open"];

fn columns(first: Option<&'static str>) -> Vec<&'static str> {
    let more: &[&str] = if is_wide() { &["created", "users"] } else { &[] };
    first.into_iter().chain(KEY_COLUMNS).chain(more.iter().copied()).collect()
}

/// Prints the gateway's list of a datasource's keys.
pub(super) fn print_keys(answer: Value, out: &mut CommandOutput) -> anyhow::Result<()> {
    let mut rows = table(&columns(None), &[5, 6, 7]);
    for key in serde_json::from_value::<KeyListAnswer>(answer)?.keys {
        rows.add_row(key.cells());
    }
    keep_whole(&mut rows, 0);
    Ok(writeln!(out, "{rows}")?)
}

/// Prints the keys for all datasources, and then those of each.
pub(super) fn print_all_keys(
    client: &ApiClient,
    as_json: bool,
    out: &mut CommandOutput,
) -> anyhow::Result<()> {
    #[derive(Deserialize)]
    struct OwnerListAnswer {
        datasources: Vec<DatasourceAnswer>,
    }
    let list: OwnerListAnswer = client.get("/v1/datasources", &[])?;
    let ids = list.datasources.into_iter().map(|datasource| datasource.id);
    let mut rows = table(&columns(Some("datasource")), &[6, 7, 8]);
    for id in std::iter::once("*".to_owned()).chain(ids) {
        let answer: Value = match client.get(&key::path(&id)?, &[]) {
            Ok(answer) => answer,
            // It was deleted meanwhile.
            Err(error) if is_not_found(&error) => continue,
            Err(error) => return Err(error),
        };
        if as_json {
            writeln!(out, "{}", serde_json::json!({ "datasource": id, "keys": answer["keys"] }))?;
            continue;
        }
        for key in serde_json::from_value::<KeyListAnswer>(answer)?.keys {
            rows.add_row(std::iter::once(id.clone()).chain(key.cells()));
        }
    }
    keep_whole(&mut rows, 1);
    if as_json { Ok(()) } else { Ok(writeln!(out, "{rows}")?) }
}

/// Whether the gateway has said that there is nothing of that name.
pub(super) fn is_not_found(error: &anyhow::Error) -> bool {
    error.downcast_ref::<super::client::ProblemAnswer>().is_some_and(|problem| problem.status == 404)
}
