//! `headgate completions` and `headgate man`: what a shell and `man` have to know of the commands, from their definition.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Context;
use clap::CommandFactory;
use clap_complete::Shell;

use super::Cli;
use super::out::CommandOutput;

#[derive(Debug, clap::Args)]
pub(super) struct CompletionsArgs {
    /// The shell
    shell: Shell,
}

#[derive(Debug, clap::Args)]
pub(super) struct ManArgs {
    /// Where to write the pages, one for each command: headgate.1, headgate-key.1, headgate-key-list.1
    dir: PathBuf,
}

/// Prints the completions for a shell.
pub(super) fn run_completions(args: CompletionsArgs, out: &mut CommandOutput) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "headgate", &mut script);
    Ok(out.write_all(&script)?)
}

/// Writes the manual's pages.
pub(super) fn run_man(args: ManArgs, out: &mut CommandOutput) -> anyhow::Result<()> {
    let dir = args.dir.display();
    std::fs::create_dir_all(&args.dir).with_context(|| dir.to_string())?;
    clap_mangen::generate_to(Cli::command(), &args.dir).with_context(|| dir.to_string())?;
    Ok(writeln!(out, "the pages are in {dir}: man -l {dir}/headgate.1")?)
}
