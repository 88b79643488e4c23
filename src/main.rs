//! The `headgate` command: parse, run, exit code.

use std::process::ExitCode;

use clap::Parser;
use headgate::cli::{self, Cli};

/// mimalloc frees memory that another thread allocated without a lock: a message crosses several
/// threads.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    cli::run(Cli::parse())
}
