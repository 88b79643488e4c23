//! Structured logs on standard error: which lines are written (a filter) and their format (text for
//! people, or one JSON object per line). Standard output belongs to the commands.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::ParseError;

use crate::config::{TraceConfig, TraceFormat};

/// Why the logs could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// `trace.filter` cannot be parsed.
    #[error("trace.filter is {filter:?}: {source}; try \"info\" or \"warn,headgate=debug\"")]
    Filter {
        /// The configured text.
        filter: String,
        /// What is wrong with it.
        source: ParseError,
    },
    /// The logs of this process were set up before; a process can have only one receiver.
    #[error("the logs of this process are set up already")]
    Twice,
}

/// Parses `trace.filter` without applying it.
///
/// # Errors
/// [`TraceError::Filter`].
pub fn parse_filter(trace: &TraceConfig) -> Result<EnvFilter, TraceError> {
    EnvFilter::builder()
        .parse(&trace.filter)
        .map_err(|source| TraceError::Filter { filter: trace.filter.clone(), source })
}

/// Sends the logs of this process to standard error from now on.
///
/// # Errors
/// [`TraceError`]: a filter that cannot be read, or a second call.
pub fn init(trace: &TraceConfig) -> Result<(), TraceError> {
    let colours = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let lines = tracing_subscriber::fmt().with_env_filter(parse_filter(trace)?).with_writer(std::io::stderr);
    match trace.format {
        TraceFormat::Text => lines.with_ansi(colours).try_init(),
        TraceFormat::Json => lines.json().flatten_event(true).try_init(),
    }
    .map_err(|_| TraceError::Twice)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(filter: &str) -> TraceConfig {
        TraceConfig { filter: filter.to_owned(), format: TraceFormat::Text }
    }

    #[test]
    fn a_bad_filter_is_an_error_that_shows_it() {
        let error = parse_filter(&with("headgate=loud")).expect_err("there is no level loud").to_string();
        assert!(error.contains("trace.filter") && error.contains("headgate=loud"), "{error}");
    }

    #[test]
    fn filters_of_levels_and_modules_are_read() {
        for good in ["", "off", "info", "warn,headgate=debug", "headgate::log=trace"] {
            assert!(parse_filter(&with(good)).is_ok(), "{good:?}");
        }
    }
}
