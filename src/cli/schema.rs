//! `headgate schema`: shows and sets the JSON Schemas of a datasource's messages, and infers one from
//! its stored records.

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde_json::{Value, json};

use super::client::ApiClient;
use super::datasource;
use super::out::{CommandOutput, grouped};

#[derive(Debug, clap::Subcommand)]
pub(super) enum SchemaCommand {
    /// Show the schemas that are enforced, with their versions
    Show {
        /// The datasource's id
        datasource: String,
    },
    /// Print the schema that what is stored meets, ready for `schema set`
    Infer {
        /// The datasource's id
        datasource: String,
        /// One for each topic instead of one for all
        #[arg(long)]
        by_topic: bool,
    },
    /// Set what messages have to meet: a JSON Schema, or a list of {"filter", "schema"}
    Set {
        /// The datasource's id
        datasource: String,
        /// The file, or '-' for standard input
        file: PathBuf,
    },
    /// Let every message in, whatever it holds
    Clear {
        /// The datasource's id
        datasource: String,
    },
}

pub(super) fn run(command: SchemaCommand, out: &mut CommandOutput) -> anyhow::Result<()> {
    let client = ApiClient::from_environment()?;
    let path = |id: &str| Ok::<_, anyhow::Error>(format!("{}/schema", datasource::path(id)?));
    let shown = match command {
        SchemaCommand::Show { datasource } => {
            client.get::<Value>(&path(&datasource)?, &[])?["enforced"].take()
        }
        SchemaCommand::Infer { datasource, by_topic } => {
            let mut answer: Value = client.get(&path(&datasource)?, &[])?;
            tell_examined(&answer);
            answer[if by_topic { "by_topic" } else { "inferred" }].take()
        }
        SchemaCommand::Set { datasource, file } => {
            let written = read_schema_file(&file)?;
            // A list holds one schema per filter; a schema itself is an object or a boolean.
            let name = if written.is_array() { "schemas" } else { "schema" };
            client.put::<Value>(&path(&datasource)?, &json!({ name: written }))?["enforced"].take()
        }
        SchemaCommand::Clear { datasource } => {
            client.put::<Value>(&path(&datasource)?, &json!({ "schemas": [] }))?["enforced"].take()
        }
    };
    Ok(writeln!(out, "{shown:#}")?)
}

/// Says beside the schema how much was examined for it.
fn tell_examined(answer: &Value) {
    let count = |value: &Value| grouped(value.as_u64().unwrap_or_default());
    let time = |name: &str| answer[name].as_str().unwrap_or("-").to_owned();
    let mut words = format!("{} records examined", count(&answer["records"]));
    words.push_str(match answer["complete"].as_bool() {
        Some(true) => ", all that are stored",
        _ => ", not all that are stored: numbers and strings are left open",
    });
    words.push_str(&format!(", received from {} to {}", time("from"), time("to")));
    if answer["not_json"].as_u64().is_some_and(|some| some > 0) {
        words.push_str(&format!("; {} are no JSON, and no schema lets those in", count(&answer["not_json"])));
    }
    for (topic, seen) in answer["counts"].as_object().into_iter().flatten() {
        words.push_str(&format!("\n  {topic}: {}", count(seen)));
    }
    // Standard output has the schema alone. Not eprintln!, which panics when standard error is closed.
    let _ = writeln!(io::stderr(), "{words}");
}

fn read_schema_file(file: &Path) -> anyhow::Result<Value> {
    let mut text = String::new();
    if file == Path::new("-") {
        std::io::stdin().read_to_string(&mut text).context("standard input")?;
    } else {
        text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
    }
    serde_json::from_str(&text).with_context(|| format!("{} is not JSON", file.display()))
}
