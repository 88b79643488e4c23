//! Questions before what cannot be undone, to whoever sits at a terminal. Scripts are asked nothing.

use std::io::{self, BufRead, IsTerminal, Write};

use super::exit_code::RefusedHere;

/// Whether somebody is there who could answer.
pub(super) fn is_somebody_there() -> bool {
    io::stdin().is_terminal() && io::stderr().is_terminal()
}

/// Asks on a terminal, unless `yes` says that it is answered already.
///
/// # Errors
/// [`RefusedHere`] for any other answer than yes.
pub(super) fn confirm(question: &str, yes: bool) -> anyhow::Result<()> {
    if yes || !is_somebody_there() || is_affirmed(question)? {
        return Ok(());
    }
    Err(RefusedHere("nothing was done".to_owned()).into())
}

/// Asks. Whether the answer is yes.
pub(super) fn is_affirmed(question: &str) -> anyhow::Result<bool> {
    let mut terminal = io::stderr();
    write!(terminal, "{question} [y/N] ")?;
    terminal.flush()?;
    let mut answer = String::new();
    io::stdin().lock().read_line(&mut answer)?;
    Ok(matches!(answer.trim().to_lowercase().as_str(), "y" | "yes"))
}
