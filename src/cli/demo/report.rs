//! The demo's result: the tables at its end, and the check that nothing is missing or too much.

use std::io::{self, Write};

use anyhow::{bail, ensure};
use hdrhistogram::Histogram;

use super::sensors::{Reading, Sensor};
use super::strangers::RefusedAttempts;
use crate::cli::out::{CommandOutput, grouped, latency, table};
use crate::cli::replay::{Tally, latency_histogram};

/// One sensor, from its device to storage and back.
pub(super) struct SensorRow {
    pub(super) sensor: Sensor,
    pub(super) tally: Tally,
    pub(super) stored: StoredReadings,
}

/// What storage holds of a datasource.
#[derive(Debug)]
pub(super) struct StoredReadings {
    /// How many records.
    pub(super) records: u64,
    /// The position of the first record that differs from the reading sent at that position.
    pub(super) first_difference: Option<u64>,
    /// The newest reading, as the gateway gives it.
    pub(super) newest: String,
    /// Whether `newest` is the recording's last reading.
    pub(super) newest_is_last: bool,
}

/// The whole report.
pub(super) struct DemoReport {
    pub(super) rows: Vec<SensorRow>,
    pub(super) refused: RefusedAttempts,
    /// Records in the log that no client got an acknowledgement for.
    pub(super) unaccounted: i128,
}

impl DemoReport {
    pub(super) fn print(&self, out: &mut CommandOutput) -> io::Result<()> {
        let columns = ["sensor", "sent over", "sent", "acknowledged", "stored", "ack p50", "p99"];
        let mut rows = table(&columns, &[2, 3, 4, 5, 6]);
        let mut all = latency_histogram();
        for SensorRow { sensor, tally, stored } in &self.rows {
            all.add(&tally.latency).expect("both have the same bounds");
            let (p50, p99) = quantiles(&tally.latency);
            let counts = [tally.sent, tally.acked, stored.records].map(grouped);
            let cells = [sensor.id, sensor.way.describe()].map(str::to_owned);
            rows.add_row(cells.into_iter().chain(counts).chain([p50, p99]));
        }
        let (p50, p99) = quantiles(&all);
        let sum = |count: fn(&SensorRow) -> u64| grouped(self.rows.iter().map(count).sum());
        let counts = [sum(|row| row.tally.sent), sum(|row| row.tally.acked), sum(|row| row.stored.records)];
        rows.add_row(["all".to_owned(), String::new()].into_iter().chain(counts).chain([p50, p99]));
        writeln!(out, "\n{rows}\n")?;

        let mut rows = table(&["sensor", "newest reading, read back from storage"], &[]);
        for SensorRow { sensor, stored, .. } in &self.rows {
            rows.add_row([sensor.id, &stored.newest]);
        }
        writeln!(out, "{rows}\n")?;

        let mut rows = table(&["refused", "over MQTT", "over HTTP"], &[1, 2]);
        for (cause, [mqtt, http]) in &self.refused {
            rows.add_row([cause.describe().to_owned(), grouped(*mqtt), grouped(*http)]);
        }
        let [mqtt, http] = [0, 1].map(|over| grouped(self.refused.values().map(|counts| counts[over]).sum()));
        rows.add_row(["all".to_owned(), mqtt, http]);
        writeln!(out, "{rows}\n")?;
        out.flush()
    }

    /// Checks that every reading sent is acknowledged and stored unchanged, and that nothing else is.
    ///
    /// # Errors
    /// The first deviation.
    pub(super) fn check(&self, readings: u64) -> anyhow::Result<()> {
        for SensorRow { sensor, tally, stored } in &self.rows {
            let (id, sent) = (sensor.id, tally.sent);
            ensure!(tally.acked == sent, "{id}: {} of {sent} readings were acknowledged", tally.acked);
            ensure!(stored.records == sent, "{id}: {} of {sent} readings are stored", stored.records);
            if let Some(place) = stored.first_difference {
                bail!("{id}: stored record {place} is not what was sent");
            }
            ensure!(stored.newest_is_last, "{id}: the newest stored reading is {}", stored.newest);
        }
        let acked: u64 = self.rows.iter().map(|row| row.tally.acked).sum();
        ensure!(acked == readings, "{acked} of {readings} readings were acknowledged");
        ensure!(
            self.unaccounted == 0,
            "the log holds {} records more than were acknowledged",
            self.unaccounted
        );
        Ok(())
    }

    /// How many attempts were refused.
    pub(super) fn refusals(&self) -> u64 {
        self.refused.values().flatten().sum()
    }
}

fn quantiles(latencies: &Histogram<u64>) -> (String, String) {
    (latency(latencies.value_at_quantile(0.5)), latency(latencies.value_at_quantile(0.99)))
}

/// Compares stored records with the readings sent, one by one.
#[derive(Default)]
pub(super) struct Comparison {
    records: u64,
    first_difference: Option<u64>,
}

impl Comparison {
    /// Compares the next stored payload with the reading sent at its position, if any. They have to be
    /// the same text: storage returns what was sent, digit for digit.
    pub(super) fn record(&mut self, payload: &str, sent: Option<Reading>) {
        if sent.is_none_or(|sent| sent.payload() != payload) {
            self.first_difference.get_or_insert(self.records);
        }
        self.records += 1;
    }

    /// Ends the comparison; `newest` is the newest reading as the gateway gives it.
    pub(super) fn finish(self, newest: String, last: Option<Reading>) -> StoredReadings {
        let newest_is_last = last.is_some_and(|last| last.payload() == newest);
        StoredReadings {
            records: self.records,
            first_difference: self.first_difference,
            newest,
            newest_is_last,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::sensors::SENSORS;
    use super::*;

    /// A report of one sensor for which all is well.
    fn well() -> (DemoReport, u64) {
        let sensor = SENSORS[2];
        let mut tally = Tally::default();
        let mut comparison = Comparison::default();
        for reading in sensor.readings() {
            tally.sent += 1;
            tally.count_acked(1, std::time::Duration::from_millis(1));
            comparison.record(&reading.payload(), Some(reading));
        }
        let readings = tally.sent;
        let last = sensor.readings().last().expect("many");
        let row = SensorRow { sensor, tally, stored: comparison.finish(last.payload(), Some(last)) };
        (DemoReport { rows: vec![row], refused: RefusedAttempts::new(), unaccounted: 0 }, readings)
    }

    #[test]
    fn only_all_sent_acknowledged_and_stored_is_well() {
        let (report, readings) = well();
        report.check(readings).expect("all is well");
        assert!(report.check(readings + 1).is_err(), "a sensor is missing");

        let (mut report, readings) = well();
        report.rows[0].tally.acked -= 1;
        assert!(report.check(readings).is_err(), "one is not acknowledged");

        let (mut report, readings) = well();
        report.rows[0].stored.records -= 1;
        assert!(report.check(readings).is_err(), "one is not stored");

        let (mut report, readings) = well();
        report.rows[0].stored.newest_is_last = false;
        assert!(report.check(readings).is_err(), "the newest is an older one");

        let (mut report, readings) = well();
        report.unaccounted = 1;
        assert!(report.check(readings).is_err(), "a refused one is kept");
    }

    #[test]
    fn a_record_that_differs_from_what_was_sent_is_found() {
        let mut readings = SENSORS[2].readings();
        let (first, second) = (readings.next().expect("many"), readings.next().expect("many"));
        let mut comparison = Comparison::default();
        comparison.record(&first.payload(), Some(first));
        comparison.record(&first.payload(), Some(second));
        let (mut report, sent) = well();
        report.rows[0].stored =
            StoredReadings { records: sent, ..comparison.finish(second.payload(), Some(second)) };
        assert_eq!(report.rows[0].stored.first_difference, Some(1));
        assert!(report.check(sent).is_err(), "a stored reading differs");
    }
}
