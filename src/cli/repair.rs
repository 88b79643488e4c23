//! `headgate repair`: does on purpose what a start refuses to do by itself.

use std::io::Write;
use std::path::PathBuf;

use serde_json::json;

use super::out::{CommandOutput, print_json};
use super::serve;
use crate::config::Config;
use crate::gateway::{RepairOrder, repair};
use crate::observe::trace;

#[derive(Debug, clap::Args)]
pub(super) struct RepairArgs {
    /// The configuration (TOML) of the gateway [env: HEADGATE_CONFIG]; without it, the defaults and the environment
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The data directory, whatever the configuration says. No gateway may be running on it
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Begin with an empty registry if registry.db is gone or cannot be used, in which case it is set aside: datasources
    /// and keys are then created anew
    #[arg(long)]
    new_registry: bool,
    /// Do it; without this, only say what would be done
    #[arg(long)]
    yes: bool,
    /// Print what was done as JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: RepairArgs, out: &mut CommandOutput) -> anyhow::Result<()> {
    let mut config = Config::load(serve::config_file(args.config).as_deref())?;
    if let Some(data_dir) = args.data_dir {
        config.data_dir = data_dir;
    }
    trace::init(&config.trace)?;
    let steps = repair(&config, RepairOrder { apply: args.yes, new_registry: args.new_registry })?;
    if args.json {
        let done = args.yes && !steps.is_empty();
        return print_json(&json!({ "data_dir": config.data_dir, "steps": steps, "done": done }), out);
    }
    for step in &steps {
        writeln!(out, "{step}")?;
    }
    match (steps.is_empty(), args.yes) {
        (true, _) => writeln!(out, "nothing is to be repaired in {}", config.data_dir.display())?,
        (false, true) => writeln!(out, "done")?,
        (false, false) => writeln!(out, "nothing is set aside yet: with --yes it is done")?,
    }
    Ok(())
}
