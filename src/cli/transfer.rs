//! `headgate export` and `headgate import`: moves datasources between gateways, with the digests of their keys, so that
//! devices keep theirs. No secret and no record is in it.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;

use anyhow::Context;
use serde::Deserialize;
use serde_json::{Value, json};

use super::client::ApiClient;
use super::datasource;
use super::exit_code::{RefusedHere, is_refusal};
use super::out::CommandOutput;

#[derive(Debug, clap::Args)]
pub(super) struct ExportArgs {
    /// The datasources' ids; all of them, if none is named
    datasources: Vec<String>,
}

#[derive(Debug, clap::Args)]
pub(super) struct ImportArgs {
    /// What `headgate export` has printed; - for standard input
    file: PathBuf,
    /// Give a datasource another id if its own is taken: press-4-2
    #[arg(long)]
    rename: bool,
    /// Print what was imported as JSON, a line for each datasource
    #[arg(long)]
    json: bool,
}

#[derive(Deserialize)]
struct ExportListAnswer {
    datasources: Vec<DatasourceIdAnswer>,
}

#[derive(Deserialize)]
struct DatasourceIdAnswer {
    id: String,
}

/// The gateway's answer to an import.
#[derive(Deserialize)]
struct ImportAnswer {
    id: String,
    keys: usize,
}

pub(super) fn run_export(args: ExportArgs, out: &mut CommandOutput) -> anyhow::Result<()> {
    let client = ApiClient::from_environment()?;
    let mut ids = args.datasources;
    if ids.is_empty() {
        let list: ExportListAnswer = client.get("/v1/datasources", &[])?;
        ids = list.datasources.into_iter().map(|datasource| datasource.id).collect();
    }
    for id in ids {
        let exported: Value = client.get(&format!("{}/export", datasource::path(&id)?), &[])?;
        writeln!(out, "{exported}")?;
    }
    Ok(())
}

/// Checks all of them before the first is imported.
pub(super) fn run_import(args: ImportArgs, out: &mut CommandOutput) -> anyhow::Result<()> {
    let client = ApiClient::from_environment()?;
    let lines = exported_lines(&args.file)?;
    let rename = format!("rename={}", args.rename);
    let mut conflicts = Vec::new();
    for (number, exported) in &lines {
        let checked = client.post::<ImportAnswer>(&format!("/v1/import?check=true&{rename}"), exported);
        let line = format!("line {number} ({})", name_of(exported));
        match checked {
            Ok(_) => {}
            Err(error) if is_refusal(&error) => {
                let why = format!("{error:#}");
                conflicts.push(format!("{line}: {}", why.strip_prefix("refused: ").unwrap_or(&why)));
            }
            Err(error) => return Err(error.context(format!("nothing is imported; {line}"))),
        }
    }
    if !conflicts.is_empty() {
        return Err(RefusedHere(format!("nothing is imported. {}", conflicts.join("; "))).into());
    }
    for (number, exported) in &lines {
        let was = name_of(exported);
        let imported: ImportAnswer = client
            .post(&format!("/v1/import?{rename}"), exported)
            .with_context(|| format!("line {number} ({was}); what is before it is imported"))?;
        match imported.id == was {
            _ if args.json => {
                writeln!(out, "{}", json!({ "datasource": imported.id, "was": was, "keys": imported.keys }))?
            }
            true => writeln!(out, "{was}: {} keys", imported.keys)?,
            false => writeln!(out, "{was} as {}: {} keys", imported.id, imported.keys)?,
        }
        out.flush()?;
    }
    Ok(())
}

fn name_of(exported: &Value) -> &str {
    exported["id"].as_str().unwrap_or("without an id")
}

/// The lines of a file that are not blank, with their numbers.
fn exported_lines(file: &PathBuf) -> anyhow::Result<Vec<(usize, Value)>> {
    let input: Box<dyn Read> = match file.to_str() {
        Some("-") => Box::new(std::io::stdin()),
        _ => Box::new(std::fs::File::open(file).with_context(|| file.display().to_string())?),
    };
    let mut lines = Vec::new();
    for (line, number) in BufReader::new(input).lines().zip(1..) {
        let line = line.with_context(|| format!("line {number}"))?;
        if !line.trim().is_empty() {
            let exported =
                serde_json::from_str(&line).with_context(|| format!("line {number} is no JSON"))?;
            lines.push((number, exported));
        }
    }
    Ok(lines)
}
