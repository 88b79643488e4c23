//! `headgate cluster`: what counts for all gateways of a cluster.

use std::io::Write;
use std::path::PathBuf;

use serde_json::json;

use super::out::{CommandOutput, print_json};
use super::serve;
use crate::config::Config;
use crate::gateway::change_cluster;
use crate::observe::trace;

#[derive(Debug, clap::Subcommand)]
pub(super) enum ClusterCommand {
    /// Change the cluster's settings (replicas, size of the log, how long ids and sessions are known) to those of a
    /// configuration, which a start never does
    Change(ClusterChangeArgs),
}

#[derive(Debug, clap::Args)]
pub(super) struct ClusterChangeArgs {
    /// The configuration (TOML) of a gateway [env: HEADGATE_CONFIG]; without it, the defaults and the environment
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Do it; without this, only say what would be changed
    #[arg(long)]
    yes: bool,
    /// Print what was done as JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(command: ClusterCommand, out: &mut CommandOutput) -> anyhow::Result<()> {
    let ClusterCommand::Change(args) = command;
    let config = Config::load(serve::config_file(args.config).as_deref())?;
    trace::init(&config.trace)?;
    let differences = change_cluster(&config, args.yes)?;
    if args.json {
        let changes: Vec<_> = differences
            .iter()
            .map(
                |one| json!({ "what": one.what, "setting": one.setting, "is": one.is, "wanted": one.wanted }),
            )
            .collect();
        let done = args.yes && !changes.is_empty();
        return print_json(&json!({ "changes": changes, "done": done }), out);
    }
    for difference in &differences {
        let (what, setting) = (&difference.what, difference.setting);
        writeln!(out, "{what}: {setting}: {} -> {}", difference.is, difference.wanted)?;
    }
    match (differences.is_empty(), args.yes) {
        (true, _) => writeln!(out, "the cluster has the settings of this configuration")?,
        (false, true) => {
            writeln!(out, "done; the other gateways need the same settings at their next start")?
        }
        (false, false) => writeln!(out, "nothing is changed yet: with --yes it is done")?,
    }
    Ok(())
}
