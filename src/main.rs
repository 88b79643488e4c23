//! The `headgate` command: parse, run, exit code.

use std::process::ExitCode;

use clap::Parser;
use headgate::cli::{self, Cli};

fn main() -> ExitCode {
    cli::run(Cli::parse())
}
