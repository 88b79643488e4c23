//! `headgate nats`: sets up NATS and the gateway to work together.

use super::out::Out;

mod server;
mod setup;

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Write a nats-server's configuration in which API keys are users, and the gateway's beside it
    Setup(setup::Args),
}

pub(super) fn run(command: Command, out: &mut Out) -> anyhow::Result<()> {
    match command {
        Command::Setup(args) => setup::run(&args, out),
    }
}
