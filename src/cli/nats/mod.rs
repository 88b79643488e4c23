//! `headgate nats`: sets up NATS and the gateway to work together.

use super::out::CommandOutput;

mod server;
mod setup;

#[derive(Debug, clap::Subcommand)]
pub(super) enum NatsCommand {
    /// Write a nats-server's configuration in which API keys are users, and the gateway's beside it
    Setup(setup::NatsSetupArgs),
}

pub(super) fn run(command: NatsCommand, out: &mut CommandOutput) -> anyhow::Result<()> {
    match command {
        NatsCommand::Setup(args) => setup::run(&args, out),
    }
}
