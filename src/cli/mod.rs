//! The commands. `serve` and `demo` run a gateway; the others talk to a running one over HTTP or MQTT,
//! as any client does. Their key comes from the environment or a file, never from the command line,
//! where every user of the machine could read it.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod admin_key_file;
mod audit;
mod backup;
mod bench;
mod check_config;
mod client;
mod cluster;
mod confirm;
mod datasource;
mod datasource_page;
mod demo;
mod doctor;
mod exit_code;
mod explain;
mod key;
mod key_table;
mod limit;
mod mqtt_place;
mod nats;
mod out;
mod ping;
mod publish;
mod quarantine;
mod records;
mod refusals;
mod repair;
mod replay;
mod schema;
mod serve;
mod service_manager;
mod session;
mod shell;
mod signals;
mod sinks;
mod tail;
mod time_argument;
mod transfer;
mod trust;

use out::CommandOutput;

/// Exit code of a command whose output was closed, as if SIGPIPE had ended it.
const READER_GONE_EXIT_CODE: u8 = 141;

/// A gateway between devices and backends: a message is let in by its datasource's API key, and
/// acknowledged when it is on disk.
#[derive(Debug, Parser)]
#[command(version, long_version = LONG_VERSION, propagate_version = true, after_help = after_help())]
pub struct Cli {
    #[command(subcommand)]
    command: CliCommand,
    /// A file with issuers of certificates (PEM) that are trusted for https:// beside the system's
    /// [env: HEADGATE_CACERT]
    #[arg(long, global = true, value_name = "FILE", help_heading = "TLS")]
    cacert: Option<PathBuf>,
    /// Tables show everything, however wide that is; without it they fit the terminal
    #[arg(long, global = true)]
    wide: bool,
}

/// The version, and which of the parts are in it that a build may leave out.
const LONG_VERSION: &str = match (cfg!(feature = "delta"), cfg!(feature = "otlp")) {
    (true, true) => concat!(env!("CARGO_PKG_VERSION"), " (with the features delta and otlp)"),
    (true, false) => concat!(env!("CARGO_PKG_VERSION"), " (with the feature delta, without otlp)"),
    (false, true) => concat!(env!("CARGO_PKG_VERSION"), " (with the feature otlp, without delta)"),
    (false, false) => concat!(env!("CARGO_PKG_VERSION"), " (without the features delta and otlp)"),
};

const ENVIRONMENT_HELP: &str = "\
Environment of the commands that talk to a running gateway:
  HEADGATE_URL           where its HTTP is: http:// or https:// (default http://127.0.0.1:8080)
  HEADGATE_CACERT        a file with issuers of certificates (PEM) to trust beside the system's (or --cacert)
  HEADGATE_API_KEY       the key
  HEADGATE_API_KEY_FILE  or a file that holds it
  HEADGATE_DATA_DIR      or, on the gateway's own machine, where its admin.key is (default headgate-data,
                         or /var/lib/headgate where the package has installed it)

Every setting of `serve` can be set by environment too: HEADGATE_MQTT__LISTEN=127.0.0.1:1883. An empty variable
counts as absent.";

/// What `--help` says behind the commands.
fn after_help() -> String {
    format!("{ENVIRONMENT_HELP}\n\n{}", exit_code::EXIT_CODES_HELP)
}

#[derive(Debug, Subcommand)]
enum CliCommand {
    /// Run the gateway; makes the data directory and the first admin key
    Serve(serve::ServeArgs),
    /// Run a gateway and send it 37,342 recorded readings through real clients, some with a bad key
    Demo(demo::DemoArgs),
    /// Create, list, show and delete datasources
    #[command(subcommand, alias = "ds")]
    Datasource(datasource::DatasourceCommand),
    /// Create, list and revoke the keys of a datasource, and make access tokens of them
    #[command(subcommand)]
    Key(key::KeyCommand),
    /// Show, infer and set the JSON Schemas that a datasource's messages have to meet
    #[command(subcommand)]
    Schema(schema::SchemaCommand),
    /// List what was not let through and why, and send it through again
    #[command(subcommand)]
    Quarantine(quarantine::QuarantineCommand),
    /// Print who changed what, when and from where
    Audit(audit::AuditArgs),
    /// Print a datasource's stored records
    Records(records::RecordsArgs),
    /// Follow a datasource's records as they come in, from now on or from earlier
    Tail(tail::TailArgs),
    /// Print what was refused lately, why, and what to do about it
    Refusals(refusals::RefusalsArgs),
    /// Print what is known of a client: its keys and sessions, what was refused to it and what to do about it
    Explain(explain::ExplainArgs),
    /// Print where records are stored, how far each sink is, and what is wrong with it
    Sinks(sinks::SinksArgs),
    /// Publish a payload, or a line of standard input or of a file each, over MQTT
    Publish(publish::PublishArgs),
    /// Load a gateway over MQTT and report acknowledged messages per second and latency
    Bench(bench::BenchArgs),
    /// Ask whether a gateway serves, or with `--ready` whether it takes messages; for health checks and scripts
    Ping(ping::PingArgs),
    /// Back up a gateway's data directory while it runs, or one that no gateway uses
    Backup(backup::BackupArgs),
    /// Make a data directory of a backup
    Restore(backup::RestoreArgs),
    /// Print datasources with the digests of their keys, a line each, for another gateway
    Export(transfer::ExportArgs),
    /// Create the datasources that `export` has printed; their keys work here then
    Import(transfer::ImportArgs),
    /// Put a data directory right with which the gateway does not start, and say what that loses
    Repair(repair::RepairArgs),
    /// Set NATS up, so that its clients connect with their API keys
    #[command(subcommand)]
    Nats(nats::NatsCommand),
    /// Change what counts for all gateways of a cluster
    #[command(subcommand)]
    Cluster(cluster::ClusterCommand),
    /// Read a configuration file, say what it sets or what is wrong with it
    CheckConfig(check_config::CheckConfigArgs),
    /// Look at configuration, disk, ports, clock, NATS and storage as a gateway would, and say what to do
    Doctor(doctor::DoctorArgs),
    /// Print what a shell needs to complete these commands
    Completions(shell::CompletionsArgs),
    /// Write the manual, a page for each command
    Man(shell::ManArgs),
}

/// Runs a command: 0 when it did what was asked; otherwise one line on standard error says why, and the code which kind of
/// failure it was.
pub fn run(cli: Cli) -> ExitCode {
    let mut out = CommandOutput::new();
    if let Some(file) = cli.cacert {
        trust::set_ca_file(file);
    }
    if cli.wide {
        out::set_wide();
    }
    let done = match cli.command {
        CliCommand::Serve(args) => serve::run(args, &mut out),
        CliCommand::Demo(args) => demo::run(args, &mut out),
        CliCommand::Datasource(command) => datasource::run(command, &mut out),
        CliCommand::Key(command) => key::run(command, &mut out),
        CliCommand::Schema(command) => schema::run(command, &mut out),
        CliCommand::Quarantine(command) => quarantine::run(command, &mut out),
        CliCommand::Audit(args) => audit::run(args, &mut out),
        CliCommand::Records(args) => records::run(args, &mut out),
        CliCommand::Tail(args) => tail::run(args, &mut out),
        CliCommand::Refusals(args) => refusals::run(args, &mut out),
        CliCommand::Explain(args) => explain::run(args, &mut out),
        CliCommand::Sinks(args) => sinks::run(args, &mut out),
        CliCommand::Publish(args) => publish::run(args, &mut out),
        CliCommand::Bench(args) => bench::run(args, &mut out),
        CliCommand::Ping(args) => ping::run(args, &mut out),
        CliCommand::Backup(args) => backup::run(args, &mut out),
        CliCommand::Restore(args) => backup::run_restore(args, &mut out),
        CliCommand::Export(args) => transfer::run_export(args, &mut out),
        CliCommand::Import(args) => transfer::run_import(args, &mut out),
        CliCommand::Repair(args) => repair::run(args, &mut out),
        CliCommand::Nats(command) => nats::run(command, &mut out),
        CliCommand::Cluster(command) => cluster::run(command, &mut out),
        CliCommand::CheckConfig(args) => check_config::run(args, &mut out),
        CliCommand::Doctor(args) => doctor::run(args, &mut out),
        CliCommand::Completions(args) => shell::run_completions(args, &mut out),
        CliCommand::Man(args) => shell::run_man(args, &mut out),
    };
    match done.and_then(|()| Ok(out.flush()?)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if out::is_reader_gone(&error) => ExitCode::from(READER_GONE_EXIT_CODE),
        Err(error) => {
            // Not eprintln!, which panics when standard error is closed.
            let _ = writeln!(std::io::stderr(), "headgate: {}", error_text(&error));
            ExitCode::from(exit_code::exit_code(&error))
        }
    }
}

/// An error and its causes, each said once: some errors repeat their cause in their own text.
fn error_text(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(|cause| cause.to_string()) {
        if text.is_empty() {
            text = cause;
        } else if !text.contains(cause.trim()) {
            text = format!("{text}: {cause}");
        }
    }
    text.trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_commands_and_their_options_do_not_contradict_each_other() {
        Cli::command().debug_assert();
    }

    #[test]
    fn each_cause_is_told_once() {
        let error = anyhow::anyhow!("no such file").context("registry: no such file").context("starting");
        assert_eq!(error_text(&error), "starting: registry: no such file");
    }

    #[test]
    fn every_command_that_tells_something_tells_it_as_json_too() {
        /// They serve, print JSON or a script anyway, or write pages.
        const OTHERS: [&str; 9] = [
            "serve",
            "demo",
            "completions",
            "man",
            "export",
            "schema show",
            "schema infer",
            "schema set",
            "schema clear",
        ];
        fn walk(command: &clap::Command, path: &str, lacking: &mut Vec<String>) {
            let mut is_leaf = true;
            for below in command.get_subcommands().filter(|below| below.get_name() != "help") {
                is_leaf = false;
                walk(below, format!("{path} {}", below.get_name()).trim_start(), lacking);
            }
            let has_json = command.get_arguments().any(|argument| argument.get_long() == Some("json"));
            if is_leaf && has_json == OTHERS.contains(&path) {
                lacking.push(path.to_owned());
            }
        }
        let mut lacking = Vec::new();
        walk(&Cli::command(), "", &mut lacking);
        assert!(lacking.is_empty(), "without --json, or with it against the list: {lacking:?}");
    }

    #[test]
    fn no_command_takes_a_key_as_an_argument() {
        fn walk(command: &clap::Command) {
            for argument in command.get_arguments() {
                let id = argument.get_id().as_str();
                let secret = id != "key_id" && (id.contains("key") || id.contains("secret"));
                assert!(!secret, "{} {id}", command.get_name());
            }
            command.get_subcommands().for_each(walk);
        }
        walk(&Cli::command());
    }
}
