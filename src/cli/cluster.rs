//! `headgate cluster`: what counts for all gateways of a cluster.

use std::io::Write;
use std::path::PathBuf;

use serde_json::json;

use super::out::{CommandOutput, print_json};
use super::serve;
use crate::config::Config;
use crate::gateway::{AdoptionOrder, AdoptionReport, adopt_cluster, change_cluster};
use crate::observe::trace;

#[derive(Debug, clap::Subcommand)]
pub(super) enum ClusterCommand {
    /// Change the cluster's settings (replicas, size of the log, how long ids and sessions are known) to those of a
    /// configuration, which a start never does
    Change(ClusterChangeArgs),
    /// Let the cluster go on from what its servers have, when that is not what its gateways have followed: a stream or
    /// bucket was put back to an earlier state, made anew, or is gone. What is beyond it is set aside
    Adopt(ClusterAdoptArgs),
    /// As adopt, and publish the registry (datasources and keys) again as the gateway of this data directory has it
    Restore(ClusterRestoreArgs),
}

#[derive(Debug, clap::Args)]
pub(super) struct ClusterAdoptArgs {
    /// The configuration (TOML) of a gateway [env: HEADGATE_CONFIG]; without it, the defaults and the environment
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The data directory of a gateway, whatever the configuration says: what it has followed is compared
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Go on also if the registry has no key: every datasource and key has to be created again
    #[arg(long)]
    new_registry: bool,
    /// Do it; without this, only say what would be done
    #[arg(long)]
    yes: bool,
    /// Print what was done as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
pub(super) struct ClusterRestoreArgs {
    #[command(flatten)]
    adopted: ClusterAdoptArgs,
    /// Publish the records again, too, that the log has no longer and records.db of this data directory has
    #[arg(long)]
    records: bool,
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
    let args = match command {
        ClusterCommand::Change(args) => args,
        ClusterCommand::Adopt(args) => return adopt(args, false, false, out),
        ClusterCommand::Restore(args) => return adopt(args.adopted, true, args.records, out),
    };
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

fn adopt(
    args: ClusterAdoptArgs,
    is_restored: bool,
    has_records: bool,
    out: &mut CommandOutput,
) -> anyhow::Result<()> {
    let mut config = Config::load(serve::config_file(args.config).as_deref())?;
    if let Some(data_dir) = args.data_dir {
        config.data_dir = data_dir;
    }
    trace::init(&config.trace)?;
    let is_new_registry = args.new_registry;
    let order = AdoptionOrder { is_restored, has_records, is_new_registry, apply: args.yes };
    let AdoptionReport { said, is_needed, is_done } = adopt_cluster(&config, order)?;
    if args.json {
        let said: Vec<&str> = said.lines().collect();
        return print_json(&json!({ "said": said, "needed": is_needed, "done": is_done }), out);
    }
    write!(out, "{said}")?;
    Ok(())
}
