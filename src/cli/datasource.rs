//! `headgate datasource`: manages datasources, each created with its first key, over the HTTP API.

use std::io::{self, Write};

use anyhow::bail;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::client::{Client, Problem, Secret};
use super::key::NewKey;
use super::out::{Out, table};
use crate::message::DatasourceId;

/// Ids to try: in a data directory that was used before, the first ones may be taken.
const IDS_MAX: u32 = 1_000;

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
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
struct Datasource {
    id: String,
    name: String,
    created_at: String,
}

/// The answer to a creation.
#[derive(Deserialize)]
struct Created {
    datasource: Datasource,
    key: NewKey,
    connect: Map<String, Value>,
}

pub(super) fn run(command: Command, out: &mut Out) -> anyhow::Result<()> {
    let client = Client::from_environment()?;
    match command {
        Command::Create { name, id, scopes, json } => {
            create(&client, &name, id.as_deref(), &scopes, json, out)
        }
        Command::List { json } => list(&client, json, out),
        Command::Show { id, json } => show(&client, &id, json, out),
        Command::Delete { id } => {
            client.delete(&path(&id)?)?;
            writeln!(
                out,
                "{id} is deleted: its keys are dead and their connections closed; what was stored stays in the \
                 gateway's records.db"
            )?;
            Ok(())
        }
    }
}

/// A datasource's path in the API. Checks the id first, because it becomes part of the path.
pub(super) fn path(id: &str) -> anyhow::Result<String> {
    Ok(format!("/v1/datasources/{}", DatasourceId::new(id)?))
}

fn create(
    client: &Client,
    name: &str,
    id: Option<&str>,
    scopes: &[String],
    as_json: bool,
    out: &mut Out,
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
    let created: Created = serde_json::from_value(answer)?;
    writeln!(out, "datasource  {}", created.datasource.id)?;
    created.key.print(out)?;
    Ok(print_connect(&created.connect, out)?)
}

/// The lines to paste, one for each kind of client.
pub(super) fn print_connect(connect: &Map<String, Value>, out: &mut Out) -> io::Result<()> {
    for (client, line) in connect {
        writeln!(out, "\n# {client}\n{}", line.as_str().unwrap_or_default().trim_end())?;
    }
    Ok(())
}

/// Creates a datasource for a command's own use, with this id, or with a number appended if it is
/// taken. Returns its id and key.
pub(super) fn create_as(admin: &Client, id: &str, name: &str) -> anyhow::Result<(String, Secret)> {
    for number in 1..=IDS_MAX {
        let id = if number == 1 { id.to_owned() } else { format!("{id}-{number}") };
        match admin.post::<Created>("/v1/datasources", &json!({ "id": id, "name": name })) {
            Ok(created) => return Ok((created.datasource.id, Secret::new(&created.key.secret))),
            Err(error) if error.downcast_ref::<Problem>().is_some_and(|problem| problem.status == 409) => {}
            Err(error) => return Err(error),
        }
    }
    bail!("{id} and {IDS_MAX} ids made of it are taken")
}

fn list(client: &Client, as_json: bool, out: &mut Out) -> anyhow::Result<()> {
    #[derive(Deserialize)]
    struct List {
        datasources: Vec<Datasource>,
    }
    let answer: Value = client.get("/v1/datasources", &[])?;
    if as_json {
        writeln!(out, "{answer:#}")?;
        return Ok(());
    }
    let mut rows = table(&["id", "name", "created"], &[]);
    for datasource in serde_json::from_value::<List>(answer)?.datasources {
        rows.add_row([datasource.id, datasource.name, datasource.created_at]);
    }
    writeln!(out, "{rows}")?;
    Ok(())
}

fn show(client: &Client, id: &str, as_json: bool, out: &mut Out) -> anyhow::Result<()> {
    let answer: Value = client.get(&path(id)?, &[])?;
    if as_json {
        writeln!(out, "{answer:#}")?;
        return Ok(());
    }
    let mut rows = table(&["field", "value"], &[]);
    describe("", &answer, &mut rows);
    writeln!(out, "{rows}")?;
    Ok(())
}

/// Adds a row for each value of the answer, so that new fields of the gateway's show up as well.
fn describe(name: &str, value: &Value, rows: &mut comfy_table::Table) {
    match value {
        Value::Object(fields) => {
            for (field, value) in fields {
                let name = if name.is_empty() { field.clone() } else { format!("{name}.{field}") };
                describe(&name, value, rows);
            }
        }
        Value::String(text) => drop(rows.add_row([name, text])),
        other => drop(rows.add_row([name.to_owned(), other.to_string()])),
    }
}
