//! Standard output, which takes a command's answer; messages about the command itself go to standard
//! error.
//!
//! `headgate records x | head` closes the pipe in the middle of the answer. This is not a failure and
//! must not panic: the write returns an error that [`is_reader_gone`] recognizes, and the command ends
//! silently.

use std::fmt;
use std::io::{self, BufWriter, IsTerminal, StdoutLock, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use comfy_table::{CellAlignment, ColumnConstraint, ContentArrangement, Table, presets};
use console::Term;
use indicatif::ProgressState;
use indicatif::style::{ProgressStyle, TemplateError};
use serde::Serialize;

/// Buffered standard output. Commands flush it when output has to appear at once; `run` does at the end.
pub(crate) struct CommandOutput(BufWriter<StdoutLock<'static>>);

impl CommandOutput {
    pub(super) fn new() -> Self {
        Self(BufWriter::new(io::stdout().lock()))
    }
}

impl Write for CommandOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes).map_err(mark)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush().map_err(mark)
    }
}

/// The reader has closed standard output. It is a type of its own because a broken pipe may also come
/// from a socket, and that error must be reported.
#[derive(Debug)]
struct ReaderGone;

impl fmt::Display for ReaderGone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("standard output was closed")
    }
}

impl std::error::Error for ReaderGone {}

fn mark(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::BrokenPipe => io::Error::new(io::ErrorKind::BrokenPipe, ReaderGone),
        _ => error,
    }
}

/// Whether a command failed only because its reader closed standard output.
pub(super) fn is_reader_gone(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let io = cause.downcast_ref::<io::Error>();
        io.and_then(io::Error::get_ref).is_some_and(|inner| inner.is::<ReaderGone>())
    })
}

/// Whether tables show all that there is, as wide as that needs.
static WIDE: AtomicBool = AtomicBool::new(false);

/// Has tables show everything, for the rest of the process.
pub(super) fn set_wide() {
    WIDE.store(true, Ordering::Relaxed);
}

/// Whether tables show everything.
pub(super) fn is_wide() -> bool {
    WIDE.load(Ordering::Relaxed)
}

/// The columns of the terminal that standard output is, if tables have to fit into them.
fn terminal_columns() -> Option<u16> {
    if is_wide() || !io::stdout().is_terminal() {
        return None;
    }
    Term::stdout().size_checked().map(|(_, columns)| columns).filter(|&columns| columns > 0)
}

/// Prints what the gateway has answered, or what was done, as JSON.
pub(super) fn print_json(value: &impl Serialize, out: &mut CommandOutput) -> anyhow::Result<()> {
    Ok(writeln!(out, "{}", serde_json::to_string_pretty(value)?)?)
}

/// An empty table with these columns; those in `right` hold numbers. It fits the terminal, if there is one.
pub(super) fn table(columns: &[&str], right: &[usize]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    table.set_header(columns.to_vec());
    if let Some(width) = terminal_columns() {
        table.set_content_arrangement(ContentArrangement::Dynamic).set_width(width);
    }
    for &index in right {
        if let Some(column) = table.column_mut(index) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

/// Keeps the cells of a column in one line, however narrow the terminal is: ids, which are copied.
pub(super) fn keep_whole(table: &mut Table, column: usize) {
    if let Some(column) = table.column_mut(column) {
        column.set_constraint(ColumnConstraint::ContentWidth);
    }
}

/// The style of a progress bar; adds `{rate}`, messages per second, to indicatif's placeholders.
pub(super) fn progress_style(template: &str) -> Result<ProgressStyle, TemplateError> {
    let rate = |state: &ProgressState, to: &mut dyn fmt::Write| {
        // Nothing can be done about a rate that cannot be shown.
        let _ = write!(to, "{:.0}/s", state.per_sec());
    };
    Ok(ProgressStyle::with_template(template)?.with_key("rate", rate))
}

/// A number with thousands separators: `37,342`.
pub(super) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A latency of nanoseconds in the unit that fits it: `420 µs`, `1.32 ms`.
pub(super) fn latency(nanos: u64) -> String {
    #[allow(clippy::cast_precision_loss, reason = "three digits are shown")]
    let micros = nanos as f64 / 1e3;
    match micros {
        ..9.995 => format!("{micros:.2} µs"),
        ..999.5 => format!("{micros:.0} µs"),
        ..9_995.0 => format!("{:.2} ms", micros / 1e3),
        ..999_500.0 => format!("{:.0} ms", micros / 1e3),
        _ => format!("{:.2} s", micros / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_own_closed_output_counts_as_reader_gone() {
        let ours = mark(io::Error::from(io::ErrorKind::BrokenPipe));
        assert!(is_reader_gone(&anyhow::Error::new(ours).context("printing")));
        let socket = io::Error::from(io::ErrorKind::BrokenPipe);
        assert!(!is_reader_gone(&anyhow::Error::new(socket)));
    }

    #[test]
    fn thousands_are_kept_apart() {
        for (number, text) in
            [(0, "0"), (999, "999"), (1_000, "1,000"), (37_342, "37,342"), (1_234_567, "1,234,567")]
        {
            assert_eq!(grouped(number), text);
        }
    }

    #[test]
    fn a_latency_is_shown_in_the_unit_that_fits() {
        for (nanos, text) in [
            (850, "0.85 µs"),
            (420_000, "420 µs"),
            (999_600, "1.00 ms"),
            (1_320_000, "1.32 ms"),
            (64_000_000, "64 ms"),
            (2_500_000_000, "2.50 s"),
        ] {
            assert_eq!(latency(nanos), text);
        }
    }
}
