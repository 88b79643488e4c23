//! `headgate datasource`: manages datasources, each created with its first key, over the HTTP API.

use std::io::{self, Write};

use anyhow::bail;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::client::{ApiClient, KeySecret, ProblemAnswer};
use super::key::NewKeyAnswer;
use super::out::{CommandOutput, table};
use crate::message::DatasourceId;

/// Ids to try: in a data directory that was used before, the first ones may be taken.
const ID_ATTEMPTS_MAX: u32 = 1_000;

#[derive(Debug, clap::Subcommand)]
pub(super) enum DatasourceCommand {
    /// Create a datasource and its first key, which is shown once
    Create {
        /// What people call it
        name: String,
        /// Its id (a-z, 0-9 and '-'); made from the name if left out
        #[arg(long)]
        id: Option<String>,
        /// What the key may be used for: ingest, subscribe; may be given twice
        #[arg(long = "scope", value_name = "SCOPE", default_value = "ingest")]
        scopes: Vec<String>,
        /// Print the gateway's answer as JSON
        #[arg(long)]
        json: bool,
    },
    /// List all datasources
    List {
        /// Print the gateway's answer as JSON
        #[arg(long)]
        json: bool,
    },
    /// Show one datasource
    Show {
        /// Its id
        id: String,
        /// Print the gateway's answer as JSON
        #[arg(long)]
        json: bool,
    },
    /// Delete a datasource: its keys are dead and their connections closed when this returns
    Delete {
        /// Its id
        id: String,
    },
}

/// A datasource in the gateway's answers.
#[derive(Debug, Deserialize)]
struct DatasourceAnswer {
    id: String,
    name: String,
    created_at: String,
}

/// The answer to a creation.
#[derive(Deserialize)]
struct DatasourceCreateAnswer {
    datasource: DatasourceAnswer,
    key: NewKeyAnswer,
    connect: Map<String, Value>,
}

pub(super) fn run(command: DatasourceCommand, out: &mut CommandOutput) -> anyhow::Result<()> {
    let client = ApiClient::from_environment()?;
    match command {
        DatasourceCommand::Create { name, id, scopes, json } => {
            create_and_print(&client, &name, id.as_deref(), &scopes, json, out)
        }
        DatasourceCommand::List { json } => print_datasources(&client, json, out),
        DatasourceCommand::Show { id, json } => print_datasource(&client, &id, json, out),
        DatasourceCommand::Delete { id } => {
            let undurable = client.delete(&path(&id)?)?;
            writeln!(
                out,
                "{id} is deleted: its keys are dead and their connections closed; what was stored stays in the \
                 gateway's records.db"
            )?;
            if let Some(detail) = undurable {
                writeln!(out, "not durable yet: {detail} /readyz warns until it is")?;
            }
            Ok(())
        }
    }
}

/// A datasource's path in the API. Checks the id first, because it becomes part of the path.
pub(super) fn path(id: &str) -> anyhow::Result<String> {
    Ok(format!("/v1/datasources/{}", DatasourceId::new(id)?))
}

fn create_and_print(
    client: &ApiClient,
    name: &str,
    id: Option<&str>,
    scopes: &[String],
    as_json: bool,
    out: &mut CommandOutput,
) -> anyhow::Result<()> {
    let mut wanted = json!({ "name": name, "scopes": scopes });
    if let Some(id) = id {
        wanted["id"] = id.into();
    }
    let answer: Value = client.post("/v1/datasources", &wanted)?;
    if as_json {
        writeln!(out, "{answer:#}")?;
        return Ok(());
    }
    let created: DatasourceCreateAnswer = serde_json::from_value(answer)?;
    writeln!(out, "datasource  {}", created.datasource.id)?;
    created.key.print(out)?;
    Ok(print_connect(&created.connect, out)?)
}

/// The lines to paste, one for each kind of client.
pub(super) fn print_connect(connect: &Map<String, Value>, out: &mut CommandOutput) -> io::Result<()> {
    for (client, line) in connect {
        writeln!(out, "\n# {client}\n{}", line.as_str().unwrap_or_default().trim_end())?;
    }
    Ok(())
}

/// Creates a datasource for a command's own use, with this id, or with a number appended if it is
/// taken. Returns its id and key.
pub(super) fn create_for_command(
    admin: &ApiClient,
    id: &str,
    name: &str,
) -> anyhow::Result<(String, KeySecret)> {
    for number in 1..=ID_ATTEMPTS_MAX {
        let id = if number == 1 { id.to_owned() } else { format!("{id}-{number}") };
        match admin.post::<DatasourceCreateAnswer>("/v1/datasources", &json!({ "id": id, "name": name })) {
            Ok(created) => return Ok((created.datasource.id, KeySecret::new(&created.key.secret))),
            Err(error)
                if error.downcast_ref::<ProblemAnswer>().is_some_and(|problem| problem.status == 409) => {}
            Err(error) => return Err(error),
        }
    }
    bail!("{id} and {ID_ATTEMPTS_MAX} ids made of it are taken")
}

fn print_datasources(client: &ApiClient, as_json: bool, out: &mut CommandOutput) -> anyhow::Result<()> {
    #[derive(Deserialize)]
    struct DatasourceListAnswer {
        datasources: Vec<DatasourceAnswer>,
    }
    let answer: Value = client.get("/v1/datasources", &[])?;
    if as_json {
        writeln!(out, "{answer:#}")?;
        return Ok(());
    }
    let mut rows = table(&["id", "name", "created"], &[]);
    for datasource in serde_json::from_value::<DatasourceListAnswer>(answer)?.datasources {
        rows.add_row([datasource.id, datasource.name, datasource.created_at]);
    }
    writeln!(out, "{rows}")?;
    Ok(())
}

fn print_datasource(
    client: &ApiClient,
    id: &str,
    as_json: bool,
    out: &mut CommandOutput,
) -> anyhow::Result<()> {
    let answer: Value = client.get(&path(id)?, &[])?;
    if as_json {
        writeln!(out, "{answer:#}")?;
        return Ok(());
    }
    let mut rows = table(&["field", "value"], &[]);
    add_value_rows("", &answer, &mut rows);
    writeln!(out, "{rows}")?;
    Ok(())
}

/// Adds a row for each value of the answer, so that new fields of the gateway's show up as well.
fn add_value_rows(name: &str, value: &Value, rows: &mut comfy_table::Table) {
    match value {
        Value::Object(fields) => {
            for (field, value) in fields {
                let name = if name.is_empty() { field.clone() } else { format!("{name}.{field}") };
                add_value_rows(&name, value, rows);
            }
        }
        Value::String(text) => drop(rows.add_row([name, text])),
        other => drop(rows.add_row([name.to_owned(), other.to_string()])),
    }
}
