//! Structured logs on standard error: which lines are written (a filter) and their format (text for
//! people, or one JSON object per line). Standard output belongs to the commands.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::ParseError;
use tracing_subscriber::reload;

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

/// Replaces the filter of the process's logs.
pub struct TraceControl(Box<dyn Fn(EnvFilter) -> Result<(), reload::Error> + Send + Sync>);

impl TraceControl {
    /// Applies the filter of `trace` from now on. The format stays.
    ///
    /// # Errors
    /// [`TraceError::Filter`]; the old filter stays.
    pub fn set_filter(&self, trace: &TraceConfig) -> Result<(), TraceError> {
        let filter = parse_filter(trace)?;
        if (self.0)(filter).is_err() {
            // Only if the receiver is gone, which lives as long as the process.
            tracing::warn!("the log filter cannot be replaced");
        }
        Ok(())
    }
}

/// Sends the logs of this process to standard error from now on.
///
/// # Errors
/// [`TraceError`]: a filter that cannot be read, or a second call.
pub fn init(trace: &TraceConfig) -> Result<TraceControl, TraceError> {
    let colours = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let lines = tracing_subscriber::fmt().with_env_filter(parse_filter(trace)?).with_writer(std::io::stderr);
    // The format decides the receiver's type, and with it that of the handle.
    let (replace, begun): (Box<dyn Fn(EnvFilter) -> _ + Send + Sync>, _) = match trace.format {
        TraceFormat::Text => {
            let lines = lines.with_ansi(colours).with_filter_reloading();
            let handle = lines.reload_handle();
            (Box::new(move |filter| handle.reload(filter)), lines.try_init())
        }
        TraceFormat::Json => {
            let lines = lines.json().flatten_event(true).with_filter_reloading();
            let handle = lines.reload_handle();
            (Box::new(move |filter| handle.reload(filter)), lines.try_init())
        }
    };
    begun.map(|()| TraceControl(replace)).map_err(|_| TraceError::Twice)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::OtlpConfig;

    fn with(filter: &str) -> TraceConfig {
        TraceConfig { filter: filter.to_owned(), format: TraceFormat::Text, otlp: OtlpConfig::default() }
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
