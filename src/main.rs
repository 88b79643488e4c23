//! The `headgate` command: parse, run, exit code.

use std::process::ExitCode;

use clap::Parser;
use headgate::cli::{self, Cli};

/// What a thread frees that another has allocated goes back without a lock: messages cross several on
/// their way.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    cli::run(Cli::parse())
}
