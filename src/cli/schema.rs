//! `headgate schema`: shows and sets the JSON Schemas of a datasource's messages, and infers one from
//! its stored records.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde_json::{Value, json};

use super::client::ApiClient;
use super::datasource;
use super::out::CommandOutput;

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

fn read_schema_file(file: &Path) -> anyhow::Result<Value> {
    let mut text = String::new();
    if file == Path::new("-") {
        std::io::stdin().read_to_string(&mut text).context("standard input")?;
    } else {
        text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
    }
    serde_json::from_str(&text).with_context(|| format!("{} is not JSON", file.display()))
}
