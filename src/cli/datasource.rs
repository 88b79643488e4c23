//! `headgate datasource`: manages datasources, each created with its first key, over the HTTP API.

use std::io::{self, Write};

use anyhow::bail;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::client::{ApiClient, KeySecret, ProblemAnswer};
use super::confirm::{confirm, is_affirmed, is_somebody_there};
use super::datasource_page;
use super::exit_code::RefusedHere;
use super::key::NewKeyAnswer;
use super::limit::LimitArgs;
use super::out::{CommandOutput, print_json, table};
use crate::message::{DatasourceId, Incarnation};

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
        #[arg(long = "scope", value_name = "SCOPE", default_value = "ingest", value_parser = ["ingest", "subscribe", "admin"])]
        scopes: Vec<String>,
        /// Print the gateway's answer as JSON
        #[arg(long)]
        json: bool,
    },
    /// List all datasources
    List {
        /// List those that were deleted instead, with the number of the incarnation
        #[arg(long)]
        deleted: bool,
        /// Print the gateway's answer as JSON
        #[arg(long)]
        json: bool,
    },
    /// Show one datasource: how to connect, what came in last, its keys and limits
    Show {
        /// Its id
        id: String,
        /// Print the gateway's answer as JSON
        #[arg(long)]
        json: bool,
    },
    /// Show a datasource's limits on all its keys together, set and unset them
    Limit {
        /// Its id
        id: String,
        #[command(flatten)]
        change: LimitArgs,
    },
    /// Delete a datasource: its keys are dead and their connections closed when this returns
    Delete {
        /// Its id
        id: String,
        /// Remove what is stored of it as well, also of one that was deleted before
        #[arg(long)]
        purge: bool,
        /// With --purge: remove this incarnation, which was deleted before, and leave a later one alone
        #[arg(long, value_name = "N", requires = "purge")]
        incarnation: Option<Incarnation>,
        /// Ask nothing, on a terminal either
        #[arg(long)]
        yes: bool,
        /// Print what was done as JSON
        #[arg(long)]
        json: bool,
    },
}

/// A datasource in the gateway's answers.
#[derive(Debug, Deserialize)]
pub(super) struct DatasourceAnswer {
    pub(super) id: String,
    pub(super) name: String,
    pub(super) created_at: String,
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
        DatasourceCommand::List { deleted: false, json } => print_datasources(&client, json, out),
        DatasourceCommand::List { deleted: true, json } => print_deleted(&client, json, out),
        DatasourceCommand::Show { id, json: true } => {
            print_json(&client.get::<Value>(&path(&id)?, &[])?, out)
        }
        DatasourceCommand::Show { id, json: false } => datasource_page::print(&client, &id, out),
        DatasourceCommand::Limit { id, change } => {
            let path = path(&id)?;
            change.run(&client, &path, |client| client.get(&path, &[]), out)
        }
        DatasourceCommand::Delete { id, purge: true, incarnation, yes, json } => {
            let path = path(&id)?;
            let whose = incarnation.map_or_else(String::new, |n| format!(" of its incarnation {n}"));
            confirm(
                &format!("Delete {id} and remove everything that is stored{whose}? There is no undo."),
                yes,
            )?;
            purge(&client, &id, &path, incarnation, json, out)
        }
        DatasourceCommand::Delete { id, yes, json, .. } => delete(&client, &id, yes, json, out),
    }
}

fn delete(
    client: &ApiClient,
    id: &str,
    yes: bool,
    as_json: bool,
    out: &mut CommandOutput,
) -> anyhow::Result<()> {
    let path = path(id)?;
    confirm(
        &format!("Delete {id}? Its keys are dead then, and its devices cut off; there is no undo."),
        yes,
    )?;
    let undurable = client.delete(&path)?;
    if as_json {
        let durable = undurable.is_none();
        return print_json(
            &json!({ "datasource": id, "deleted": true, "durable": durable, "detail": undurable }),
            out,
        );
    }
    writeln!(
        out,
        "{id} is deleted: its keys are dead and their connections closed; what was stored stays for admin keys \
         (`headgate datasource list --deleted`) until it is purged"
    )?;
    if let Some(detail) = undurable {
        writeln!(out, "not durable yet: {detail} /readyz warns until it is")?;
    }
    Ok(())
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
    match id {
        Some(id) => wanted["id"] = DatasourceId::new(id)?.as_str().into(),
        None => check_name_is_new(client, name)?,
    }
    let answer: Value = client.post("/v1/datasources", &wanted)?;
    if as_json {
        return print_json(&answer, out);
    }
    let created: DatasourceCreateAnswer = serde_json::from_value(answer)?;
    writeln!(out, "datasource  {}", created.datasource.id)?;
    created.key.print(out)?;
    Ok(print_connect(&created.connect, out)?)
}

/// Two datasources of one name are most often one that was created twice: asks on a terminal whether they are two.
///
/// # Errors
/// [`RefusedHere`] if they are not, or nobody is there to say so.
fn check_name_is_new(client: &ApiClient, name: &str) -> anyhow::Result<()> {
    #[derive(Deserialize)]
    struct NamedListAnswer {
        datasources: Vec<DatasourceAnswer>,
    }
    let list: NamedListAnswer = client.get("/v1/datasources", &[])?;
    let plain = |name: &str| name.trim().to_lowercase();
    let known = list.datasources.into_iter().find(|known| plain(&known.name) == plain(name));
    let Some(DatasourceAnswer { id, name, created_at }) = known else { return Ok(()) };
    let what = format!("there is a datasource {name:?} already: {id}, created at {created_at}");
    if is_somebody_there() && is_affirmed(&format!("{what}. Create another one?"))? {
        return Ok(());
    }
    Err(RefusedHere(format!("{what}; --id ID creates another one under an id of its own")).into())
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
        return print_json(&answer, out);
    }
    let mut rows = table(&["id", "name", "created"], &[]);
    for datasource in serde_json::from_value::<DatasourceListAnswer>(answer)?.datasources {
        rows.add_row([datasource.id, datasource.name, datasource.created_at]);
    }
    writeln!(out, "{rows}")?;
    Ok(())
}

/// An ended incarnation in the gateway's answers.
#[derive(Debug, Deserialize)]
struct EndedIncarnationAnswer {
    id: String,
    incarnation: Incarnation,
    name: Option<String>,
    deleted_at: String,
    purged_at: Option<String>,
}

fn print_deleted(client: &ApiClient, as_json: bool, out: &mut CommandOutput) -> anyhow::Result<()> {
    #[derive(Deserialize)]
    struct EndedIncarnationListAnswer {
        deleted: Vec<EndedIncarnationAnswer>,
    }
    let answer: Value = client.get("/v1/datasources", &[("deleted", "true")])?;
    if as_json {
        return print_json(&answer, out);
    }
    let mut rows = table(&["id", "incarnation", "name", "deleted", "purged"], &[1]);
    for ended in serde_json::from_value::<EndedIncarnationListAnswer>(answer)?.deleted {
        rows.add_row([
            ended.id,
            ended.incarnation.to_string(),
            ended.name.unwrap_or_default(),
            ended.deleted_at,
            ended.purged_at.unwrap_or_default(),
        ]);
    }
    writeln!(out, "{rows}")?;
    Ok(())
}

/// What a purge has removed.
#[derive(Debug, Deserialize)]
struct PurgeAnswer {
    done: bool,
    records: u64,
    quarantined: u64,
    bytes: u64,
    retained: u64,
    sessions: u64,
}

fn purge(
    client: &ApiClient,
    id: &str,
    path: &str,
    incarnation: Option<Incarnation>,
    as_json: bool,
    out: &mut CommandOutput,
) -> anyhow::Result<()> {
    let mut path = format!("{path}?purge=true");
    if let Some(incarnation) = incarnation {
        path = format!("{path}&incarnation={incarnation}");
    }
    let answer: Value = client.delete_with_answer(&path)?;
    let Ok(purged) = serde_json::from_value::<PurgeAnswer>(answer.clone()) else {
        // Its keys are dead, and that is not durable: nothing is removed before it is.
        let detail = answer["detail"].as_str().unwrap_or_default();
        bail!("nothing is purged yet: {detail} Purge it again then");
    };
    if as_json {
        return print_json(&answer, out);
    }
    let PurgeAnswer { records, quarantined, bytes, retained, sessions, .. } = purged;
    writeln!(
        out,
        "{id} is purged: {records} records and {quarantined} in quarantine ({bytes} bytes), {retained} retained messages, \
         {sessions} sessions; the log drops what it has of it with its retention, and nobody can read that"
    )?;
    if !purged.done {
        writeln!(out, "the gateway has not removed all of it yet, and goes on; call this again to see")?;
    }
    Ok(())
}
