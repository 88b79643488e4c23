//! `headgate backup`: has a running gateway back up its data directory, and shows how far it is; or backs up one that no
//! gateway uses. `headgate restore`: makes a data directory of a backup.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use indicatif::ProgressBar;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::client::ApiClient;
use super::out::{CommandOutput, grouped, print_json, progress_style};
use super::serve;
use crate::config::Config;
use crate::gateway::{back_up_stopped, restore_backup, undo_restore};
use crate::observe::trace;

/// How often the gateway is asked how far it is.
const BACKUP_POLL_INTERVAL: Duration = Duration::from_millis(100);

#[derive(Debug, clap::Args)]
pub(super) struct BackupArgs {
    /// Where to: a directory on the gateway's own machine that is not there yet, best on another disk
    dir: PathBuf,
    /// As fast as the disk allows, and acknowledgements wait longer meanwhile; without it the backup takes longer, and leaves
    /// room between its pieces
    #[arg(long, conflicts_with = "data_dir")]
    fast: bool,
    /// Back up this data directory, which no gateway may be using; without it a running gateway is asked
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// With --data-dir: the configuration (TOML) of its gateway [env: HEADGATE_CONFIG]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print what was done as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
pub(super) struct RestoreArgs {
    /// The backup
    #[arg(required_unless_present = "undo")]
    dir: Option<PathBuf>,
    /// The data directory to make of it; no gateway may be using it
    #[arg(long, value_name = "DIR")]
    data_dir: PathBuf,
    /// The configuration (TOML) of the gateway that will use it [env: HEADGATE_CONFIG]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// If the data directory is not empty, move what is there to before-restore-TIME in it
    #[arg(long)]
    replace: bool,
    /// Put back what was in the data directory before a restore into it was interrupted
    #[arg(long, conflicts_with_all = ["dir", "replace"])]
    undo: bool,
    /// Print what was done as JSON
    #[arg(long)]
    json: bool,
}

/// The gateway's answer.
#[derive(Deserialize)]
struct BackupAnswer {
    backup: Option<BackupStateAnswer>,
}

/// How far a backup is, or how it has ended.
#[derive(Deserialize)]
struct BackupStateAnswer {
    dir: PathBuf,
    state: String,
    started_at: String,
    bytes_done: u64,
    bytes_total: u64,
    files: Option<usize>,
    bytes: Option<u64>,
    linked_bytes: Option<u64>,
    next_offset: Option<u64>,
    #[serde(default)]
    left_out: Vec<String>,
    error: Option<String>,
}

pub(super) fn run(args: BackupArgs, out: &mut CommandOutput) -> anyhow::Result<()> {
    let dir = std::path::absolute(&args.dir).context("the directory of the backup")?;
    let Some(data_dir) = args.data_dir else {
        let ended = ask_gateway(&ApiClient::from_environment()?, &dir, args.fast)?;
        return ended.print(args.json, out);
    };
    let config = config_of(args.config, data_dir)?;
    let made = back_up_stopped(&config, &dir)?;
    let (files, bytes, linked_bytes, next_offset) =
        (made.files, made.bytes, made.linked_bytes, made.next_offset);
    let left_out = made.left_out;
    FinishedBackup { dir, files, bytes, linked_bytes, next_offset, left_out }.print(args.json, out)
}

pub(super) fn run_restore(args: RestoreArgs, out: &mut CommandOutput) -> anyhow::Result<()> {
    let config = config_of(args.config, args.data_dir)?;
    let Some(backup) = args.dir else {
        undo_restore(&config.data_dir)?;
        let dir = config.data_dir.display();
        return match args.json {
            true => print_json(&json!({ "data_dir": config.data_dir, "undone": true }), out),
            false => Ok(writeln!(out, "{dir} is what it was before the restore")?),
        };
    };
    let restored = restore_backup(&config, &backup, args.replace)?;
    if args.json {
        let done = json!({
            "data_dir": config.data_dir, "aside": restored.aside, "files": restored.files,
            "bytes": restored.bytes, "next_offset": restored.next_offset,
        });
        return print_json(&done, out);
    }
    let dir = config.data_dir.display();
    if let Some(aside) = &restored.aside {
        writeln!(out, "what was there is in {}", aside.display())?;
    }
    writeln!(
        out,
        "restored {} files, {} bytes, into {dir}: all checked; the next record gets offset {}",
        grouped(restored.files as u64),
        grouped(restored.bytes),
        restored.next_offset
    )?;
    Ok(writeln!(out, "start it: headgate serve --data-dir {dir}")?)
}

/// The configuration of a gateway that does not run.
fn config_of(file: Option<PathBuf>, data_dir: PathBuf) -> anyhow::Result<Config> {
    let mut config = Config::load(serve::config_file(file).as_deref())?;
    config.data_dir = data_dir;
    trace::init(&config.trace)?;
    Ok(config)
}

/// Has a gateway begin, and waits for the end.
fn ask_gateway(client: &ApiClient, dir: &Path, fast: bool) -> anyhow::Result<FinishedBackup> {
    let begun: BackupAnswer = client.post("/v1/backup", &json!({ "dir": dir, "fast": fast }))?;
    let Some(begun) = begun.backup else { bail!("the gateway has begun no backup") };
    let bar = ProgressBar::new(0);
    bar.set_style(progress_style("{bar:40} {bytes}/{total_bytes} {elapsed}")?);
    let ended = loop {
        std::thread::sleep(BACKUP_POLL_INTERVAL);
        let answer: BackupAnswer = client.get("/v1/backup", &[])?;
        let state = answer.backup.filter(|state| state.started_at == begun.started_at);
        let Some(state) = state else {
            bail!("the gateway was restarted, and the backup has ended with it: begin it again")
        };
        if state.state != "running" {
            break state;
        }
        bar.set_length(state.bytes_total);
        bar.set_position(state.bytes_done);
    };
    bar.finish_and_clear();
    match (ended.files, ended.bytes, ended.linked_bytes, ended.next_offset) {
        (Some(files), Some(bytes), Some(linked_bytes), Some(next_offset)) => {
            let (dir, left_out) = (ended.dir, ended.left_out);
            Ok(FinishedBackup { dir, files, bytes, linked_bytes, next_offset, left_out })
        }
        _ => {
            bail!("there is no backup: {}", ended.error.as_deref().unwrap_or("the gateway does not say why"))
        }
    }
}

/// A backup that is complete.
#[derive(Serialize)]
struct FinishedBackup {
    dir: PathBuf,
    files: usize,
    bytes: u64,
    linked_bytes: u64,
    next_offset: u64,
    left_out: Vec<String>,
}

impl FinishedBackup {
    fn print(&self, as_json: bool, out: &mut CommandOutput) -> anyhow::Result<()> {
        if as_json {
            return print_json(self, out);
        }
        let Self { dir, files, bytes, linked_bytes, next_offset, left_out } = self;
        let (files, bytes) = (grouped(*files as u64), grouped(*bytes));
        writeln!(
            out,
            "{}: {files} files, {bytes} bytes, everything up to offset {next_offset}",
            dir.display()
        )?;
        if *linked_bytes > 0 {
            writeln!(
                out,
                "{} of these bytes are in files that the log has too: copy the backup to another disk to be safe from \
                 the loss of this one",
                grouped(*linked_bytes)
            )?;
        }
        for name in left_out {
            writeln!(
                out,
                "not in it: {name:?}, because its name has more than letters, digits and .-_ (rename it, or copy it \
                 yourself), or because it was removed meanwhile"
            )?;
        }
        Ok(())
    }
}
