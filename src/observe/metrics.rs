//! Every metric by name. Each gateway has a recorder of its own, so that two in one process do not mix.
//! Handles are created once, so that counting costs one atomic addition.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use metrics::{Counter, Gauge, Histogram, Unit, describe_counter, describe_gauge, describe_histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder};

use super::cause::Cause;
use super::exposition::{ExpositionText, MetricKind, seconds_of};
use super::traffic::{TrafficBoard, TrafficCounts, TrafficSource};
use crate::limits::METRICS_DATASOURCES_DEFAULT;
use crate::message::Transport;

/// Latencies from 50 µs to 10 s, about three buckets per factor of ten.
const SECONDS_BUCKETS: [f64; 16] = [
    0.000_05, 0.000_1, 0.000_2, 0.000_5, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5,
    10.0,
];

/// One of a datasource's counts.
type TrafficFigure = fn(&TrafficCounts) -> u64;

/// A gateway's metrics.
pub struct Metrics {
    recorder: PrometheusRecorder,
    handle: PrometheusHandle,
    accepted: [Counter; 3],
    accepted_bytes: [Counter; 3],
    /// What these show when they are rendered: messages and bytes of each transport.
    accepted_counts: [[AtomicU64; 2]; 3],
    duplicates: [Counter; 3],
    /// There from the start: an alert on its growth has to see the first.
    quarantined: [Counter; 3],
    /// Refusals that were about a datasource.
    refused_of_datasources: AtomicU64,
    /// What each datasource sends.
    pub traffic: TrafficBoard,
    /// Records that were sent to subscribers over each transport.
    delivered: [Counter; 3],
    /// From submission to durability, per draft (a read of a socket or a request), in seconds.
    pub commit_seconds: Histogram,
    /// Open MQTT connections whose key was accepted.
    pub mqtt_connections: Gauge,
    /// Messages and wills by which bridges say that they are there, and that were dropped.
    pub bridge_notices: Counter,
    /// How often a connection was held back because of a limit.
    pub held_back: Counter,
    /// Records that retention removed before a subscriber had read them.
    pub skipped: Counter,
    /// Records that were sent to readers of streams over HTTP.
    stream_records: Counter,
    /// From the moment at which the end of a key was asked for to the last of its connections closed, in seconds.
    pub revocation_seconds: Histogram,
}

impl Metrics {
    /// A new recorder with every metric described.
    pub fn new() -> Self {
        let buckets = PrometheusBuilder::new()
            .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &SECONDS_BUCKETS);
        // Every handle is made under this recorder, not the global one: tests run several gateways in one
        // process.
        let recorder = buckets.expect("the list of buckets is not empty").build_recorder();
        let handle = recorder.handle();
        let made_here = metrics::set_default_local_recorder(&recorder);
        describe_metrics();
        let per_transport = |name: &'static str| {
            Transport::ALL.map(|transport| metrics::counter!(name, "transport" => transport.as_str()))
        };
        let accepted = per_transport("headgate_accepted_total");
        let accepted_bytes = per_transport("headgate_accepted_bytes_total");
        let duplicates = per_transport("headgate_duplicates_total");
        let quarantined = per_transport("headgate_quarantined_total");
        let delivered = per_transport("headgate_delivered_total");
        let commit_seconds = metrics::histogram!("headgate_commit_seconds");
        let mqtt_connections = metrics::gauge!("headgate_mqtt_connections");
        let bridge_notices = metrics::counter!("headgate_bridge_notices_total");
        let held_back = metrics::counter!("headgate_held_back_total");
        let skipped = metrics::counter!("headgate_subscriber_skipped_total");
        let stream_records = metrics::counter!("headgate_stream_records_total");
        let revocation_seconds = metrics::histogram!("headgate_revocation_seconds");
        drop(made_here);
        Self {
            recorder,
            handle,
            accepted,
            accepted_bytes,
            accepted_counts: Default::default(),
            duplicates,
            quarantined,
            refused_of_datasources: AtomicU64::new(0),
            traffic: TrafficBoard::new(METRICS_DATASOURCES_DEFAULT),
            delivered,
            commit_seconds,
            mqtt_connections,
            bridge_notices,
            held_back,
            skipped,
            stream_records,
            revocation_seconds,
        }
    }

    /// Counts `records` messages with `bytes` of payload that were let in and are durable.
    pub fn count_accepted(&self, transport: Transport, records: u64, bytes: u64) {
        let [of_records, of_bytes] = &self.accepted_counts[transport as usize];
        of_records.fetch_add(records, Ordering::Relaxed);
        of_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Counts records that were sent to a subscriber.
    pub fn count_delivered(&self, transport: Transport, records: u64) {
        self.delivered[transport as usize].increment(records);
        if transport == Transport::Http {
            self.stream_records.increment(records);
        }
    }

    /// Sets how many records were sent over a transport, where they are counted elsewhere.
    pub fn set_delivered(&self, transport: Transport, records: u64) {
        self.delivered[transport as usize].absolute(records);
    }

    /// What all datasources have sent, as far as it is counted for them.
    fn total_traffic(&self) -> TrafficCounts {
        let sum = |what: usize| self.accepted_counts.iter().map(|of| of[what].load(Ordering::Relaxed)).sum();
        let refused = self.refused_of_datasources.load(Ordering::Relaxed);
        TrafficCounts { messages: sum(0), bytes: sum(1), refused }
    }

    /// Writes what each of the busiest datasources has sent, and all others together.
    pub fn write_traffic(&self, out: &mut ExpositionText, source: &dyn TrafficSource) {
        let Some(reading) = self.traffic.read(Instant::now(), source, self.total_traffic()) else { return };
        let families: [(&str, &str, TrafficFigure); 3] = [
            (
                "headgate_datasource_messages_total",
                "Messages of a datasource that were let in; _other: of all that have no series of their own",
                |of| of.messages,
            ),
            ("headgate_datasource_bytes_total", "Payload bytes of a datasource that were let in", |of| {
                of.bytes
            }),
            (
                "headgate_datasource_refused_total",
                "Messages and connections that were refused and were about a datasource that there is",
                |of| of.refused,
            ),
        ];
        for (name, help, value) in families {
            out.family(name, MetricKind::Counter, help);
            for (id, counts, _) in &reading.datasources {
                out.sample(name, &[("datasource", id.as_str())], value(counts));
            }
            // No datasource can have this name.
            out.sample(name, &[("datasource", "_other")], value(&reading.others));
        }
        let name = "headgate_datasource_last_message_timestamp_seconds";
        out.family(
            name,
            MetricKind::Gauge,
            "When the last message of a datasource was received that was let in",
        );
        for (id, _, last_at) in &reading.datasources {
            if let Some(at) = last_at {
                out.sample(name, &[("datasource", id.as_str())], seconds_of(*at));
            }
        }
    }

    /// Counts `records` messages that were acknowledged and not kept again.
    pub fn count_duplicates(&self, transport: Transport, records: u64) {
        self.duplicates[transport as usize].increment(records);
    }

    /// Counts `records` messages that are durable in quarantine.
    pub fn count_quarantined(&self, transport: Transport, records: u64) {
        self.quarantined[transport as usize].increment(records);
    }

    /// Counts a refused message or connection, for [`Refusals::note`](super::refusals::Refusals::note).
    /// `is_of_datasource`: it was counted for one.
    pub(super) fn count_refused(&self, transport: Transport, cause: Cause, is_of_datasource: bool) {
        self.refused_of_datasources.fetch_add(u64::from(is_of_datasource), Ordering::Relaxed);
        metrics::with_local_recorder(&self.recorder, || {
            metrics::counter!("headgate_refused_total", "transport" => transport.as_str(), "cause" => cause.name())
                .increment(1);
        });
    }

    /// Counts properties or headers that were dropped because their names are Headgate's own.
    pub fn count_reserved_names(&self, transport: Transport, names: u64) {
        metrics::with_local_recorder(&self.recorder, || {
            metrics::counter!("headgate_reserved_names_total", "transport" => transport.as_str())
                .increment(names);
        });
    }

    /// Counts a stream over HTTP that has ended, by why.
    pub fn count_stream_end(&self, reason: &'static str) {
        metrics::with_local_recorder(&self.recorder, || {
            metrics::counter!("headgate_stream_ended_total", "reason" => reason).increment(1);
        });
    }

    /// Counts a secret in a report of leaked keys, by what came of it.
    pub fn count_leak_report(&self, outcome: &'static str) {
        metrics::with_local_recorder(&self.recorder, || {
            metrics::counter!("headgate_leak_reports_total", "outcome" => outcome).increment(1);
        });
    }

    /// Sets a gauge whose value is read only when metrics are rendered.
    pub fn set_gauge(&self, name: &'static str, value: f64) {
        metrics::with_local_recorder(&self.recorder, || metrics::gauge!(name).set(value));
    }

    /// Sets a gauge with a label whose value is read only when metrics are rendered.
    pub fn set_labelled_gauge(&self, name: &'static str, label: (&'static str, &'static str), value: f64) {
        metrics::with_local_recorder(&self.recorder, || metrics::gauge!(name, label.0 => label.1).set(value));
    }

    /// Sets a counter that is counted elsewhere.
    pub fn set_counter(&self, name: &'static str, value: u64) {
        metrics::with_local_recorder(&self.recorder, || metrics::counter!(name).absolute(value));
    }

    /// Sets a counter with a label that is counted elsewhere.
    pub fn set_labelled_counter(&self, name: &'static str, label: (&'static str, &'static str), value: u64) {
        metrics::with_local_recorder(&self.recorder, || {
            metrics::counter!(name, label.0 => label.1).absolute(value);
        });
    }

    /// All metrics, in Prometheus' text format.
    pub fn render(&self) -> String {
        let shown = self.accepted.iter().zip(&self.accepted_bytes).zip(&self.accepted_counts);
        for ((accepted, accepted_bytes), [records, bytes]) in shown {
            accepted.absolute(records.load(Ordering::Relaxed));
            accepted_bytes.absolute(bytes.load(Ordering::Relaxed));
        }
        self.handle.render()
    }

    /// Aggregates the samples of histograms. Call it every few seconds.
    pub fn upkeep(&self) {
        self.handle.run_upkeep();
    }
}

/// Describes every metric to the recorder of this thread.
fn describe_metrics() {
    describe_fronts();
    describe_log_and_consumers();
}

fn describe_fronts() {
    describe_counter!("headgate_accepted_total", "Messages that were let in and are durable");
    describe_counter!("headgate_accepted_bytes_total", Unit::Bytes, "Payload bytes that were let in");
    describe_counter!(
        "headgate_duplicates_total",
        "Messages that were acknowledged and not kept again: their id was known"
    );
    describe_counter!(
        "headgate_quarantined_total",
        "Messages that did not meet their schema and are durable in quarantine"
    );
    describe_counter!(
        "headgate_dedup_evicted_total",
        "Message ids and QoS 2 exchanges that left the window early because there were too many"
    );
    describe_counter!(
        "headgate_reserved_names_total",
        "Properties and headers of messages that were dropped because their names begin with headgate-"
    );
    describe_counter!(
        "headgate_bridge_notices_total",
        "Messages and wills of other brokers' bridges on $SYS/broker/connection/ that were dropped"
    );
    describe_counter!("headgate_refused_total", "Messages and connections that were refused, by cause");
    describe_counter!(
        "headgate_leak_reports_total",
        "Secrets that were reported as leaked, by what came of it: revoked, revoked_not_durable, kept (the last \
         admin key), unknown, failed"
    );
    describe_counter!(
        "headgate_refusals_unlisted_total",
        "Refusals that were counted and not listed in /v1/refusals, as listing would have waited"
    );
    describe_counter!(
        "headgate_held_back_total",
        "How often a connection was not read on because of a limit of its key or datasource"
    );
    describe_histogram!("headgate_commit_seconds", Unit::Seconds, "From submission to durability");
    describe_gauge!("headgate_mqtt_connections", "MQTT connections whose key was accepted");
    describe_gauge!(
        "headgate_subscribers_still",
        "MQTT subscribers that have neither taken nor acknowledged anything for mqtt.still_ms, although messages are sent \
         or wait for them"
    );
    describe_counter!(
        "headgate_delivered_total",
        "Records that were sent to subscribers over MQTT, to streams over HTTP, and to the stream on NATS"
    );
    describe_gauge!(
        "headgate_mqtt_sessions",
        "MQTT sessions of connected clients and of those that are away"
    );
    describe_gauge!("headgate_mqtt_sessions_away", "MQTT sessions whose clients are away");
    describe_gauge!("headgate_mqtt_subscribers", "Connected MQTT clients that have subscribed to something");
    describe_gauge!(
        "headgate_mqtt_inflight_messages",
        "Messages that were sent to MQTT clients and are not acknowledged"
    );
    describe_gauge!(
        "headgate_subscriber_lag_records",
        "Records of the log that the connected MQTT subscriber that is furthest behind has not been sent or passed over"
    );
    describe_gauge!(
        "headgate_session_away_lag_records",
        "The same, of the MQTT session that is furthest behind of those whose clients are away"
    );
    describe_gauge!("headgate_datasources", "Datasources");
    describe_gauge!(
        "headgate_ready",
        "Whether messages can be taken and made durable, as /readyz says it: 1, or 0"
    );
    describe_gauge!(
        "headgate_readiness_warnings",
        "What an operator should look at although messages are taken: /readyz says it in words"
    );
    describe_gauge!(
        "headgate_revocations_not_durable",
        "Ends of keys and deletions that are not written yet: a restart would undo them"
    );
    describe_gauge!("headgate_stream_readers", "Streams over HTTP that are open");
    describe_gauge!(
        "headgate_stream_readers_still",
        "Streams over HTTP whose clients take nothing of what they are sent"
    );
    describe_counter!("headgate_stream_records_total", "Records that were sent over HTTP streams");
    describe_counter!(
        "headgate_stream_ended_total",
        "Streams over HTTP that have ended, by reason: client_left, key_dead, datasource_deleted, shutting_down, \
         connection_closes, not_read, log_unreadable, session_over, token_over"
    );
    describe_gauge!("headgate_http_strangers", "HTTP connections that have presented no valid key");
    describe_gauge!(
        "headgate_memory_held_bytes",
        Unit::Bytes,
        "What clients make the gateway hold: read, waiting for the log, or being sent (intake.memory_bytes_max)"
    );
    describe_histogram!(
        "headgate_revocation_seconds",
        Unit::Seconds,
        "From the moment at which the end of a key was asked for to the last of its connections closed"
    );
    describe_counter!(
        "headgate_subscriber_skipped_total",
        "Records, of any datasource, that retention removed before a subscriber had read them"
    );
}

fn describe_log_and_consumers() {
    describe_gauge!(
        "headgate_nats_connected",
        "Whether the NATS that messages are taken from is there: 1, or 0"
    );
    describe_gauge!("headgate_log_next_offset", "The offset that the next record will get");
    describe_gauge!("headgate_log_first_offset", "The oldest offset in the log");
    describe_gauge!("headgate_log_bytes", Unit::Bytes, "What the log takes on disk");
    describe_counter!(
        "headgate_log_lost_records_total",
        "Records that are lost to damage of the log and were passed over (log.accept_corruption)"
    );
    describe_counter!(
        "headgate_log_fenced_records_total",
        "Messages that came into the log of a cluster behind the end of their key, and are no records"
    );
    describe_gauge!("headgate_storage_cursor", "The first offset that is not stored in every sink yet");
    describe_gauge!("headgate_sink_cursor", "The first offset that is not stored in this sink yet");
    describe_gauge!("headgate_sink_lag_records", "Records of the log that are not stored in this sink yet");
    describe_gauge!("headgate_sink_up", "Whether this sink takes records: 1, or 0");
    describe_gauge!("headgate_egress_cursor", "The first offset that is not on the NATS stream yet");
    describe_gauge!("headgate_egress_lag_records", "Records that are not on the NATS stream yet");
    describe_counter!("headgate_egress_sent_total", "Records that were sent to the NATS stream");
    describe_counter!(
        "headgate_egress_skipped_total",
        "Records that will not be on the NATS stream, by reason: topic, size, or gone from the log"
    );
    describe_gauge!("headgate_keys", "Live API keys");
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}
