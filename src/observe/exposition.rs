//! Metrics in Prometheus' text format, version 0.0.4: those with series that come and go, or with values that are no whole
//! numbers. All others are recorded in [`Metrics`](super::metrics::Metrics).

use std::fmt::{Display, Write};

/// The kind of a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MetricKind {
    /// It only grows.
    Counter,
    /// It is what it is.
    Gauge,
    /// Counts by the largest value that each has.
    Histogram,
}

/// Metrics as text.
#[derive(Debug, Default)]
pub struct ExpositionText(String);

impl ExpositionText {
    /// Begins a metric: its samples have to follow. `help` is one line.
    pub fn family(&mut self, name: &str, kind: MetricKind, help: &str) {
        let kind = match kind {
            MetricKind::Counter => "counter",
            MetricKind::Gauge => "gauge",
            MetricKind::Histogram => "histogram",
        };
        self.put(format_args!("# HELP {name} {help}\n# TYPE {name} {kind}\n"));
    }

    /// One sample of the metric that was begun last.
    pub fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        self.put(format_args!("{name}"));
        for (at, (label, value)) in labels.iter().enumerate() {
            self.put(format_args!("{}{label}=\"{}\"", if at == 0 { '{' } else { ',' }, LabelText(value)));
        }
        let end = if labels.is_empty() { "" } else { "}" };
        self.put(format_args!("{end} {value}\n"));
    }

    /// The text.
    pub fn into_text(self) -> String {
        self.0
    }

    fn put(&mut self, text: std::fmt::Arguments<'_>) {
        self.0.write_fmt(text).expect("a string takes everything");
    }
}

/// The value of a label, escaped.
struct LabelText<'a>(&'a str);

impl Display for LabelText<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for c in self.0.chars() {
            match c {
                '\\' => f.write_str("\\\\")?,
                '"' => f.write_str("\\\"")?,
                '\n' => f.write_str("\\n")?,
                c => f.write_char(c)?,
            }
        }
        Ok(())
    }
}

/// Whole and fractional seconds of a time in microseconds, as metrics have them.
#[expect(clippy::cast_precision_loss, reason = "exact to the microsecond until the year 2255")]
pub fn seconds_of(micros: i64) -> f64 {
    micros as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_can_end_neither_its_value_nor_its_line() {
        let mut out = ExpositionText::default();
        out.family("a_total", MetricKind::Counter, "What it is");
        out.sample("a_total", &[("x", "1\"} 2\nb \\"), ("y", "ü")], 3_u64);
        out.sample("a_total", &[], 0.25);
        let expected = "# HELP a_total What it is\n# TYPE a_total counter\n\
                        a_total{x=\"1\\\"} 2\\nb \\\\\",y=\"ü\"} 3\na_total 0.25\n";
        assert_eq!(out.into_text(), expected);
    }
}
