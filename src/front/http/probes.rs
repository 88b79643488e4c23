//! Probes: whether the process is alive, whether it can take messages, and its metrics. They need no key,
//! and they reveal nothing about a single datasource or key, but for the ids of dead keys whose end is not durable.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use super::HttpFrontState;
use crate::consume::egress::EgressSkipReason;

/// `GET /livez`: the process serves.
pub(super) async fn live() -> &'static str {
    "alive\n"
}

/// Whether messages can be taken and made durable, and what is wrong.
#[derive(Serialize)]
pub(super) struct Readiness {
    status: &'static str,
    /// Why no message can be taken.
    reasons: Vec<String>,
    /// What an operator should look at although messages are taken.
    warnings: Vec<String>,
}

/// `GET /readyz`: messages can be taken and made durable. Only the log and the drain make it unready. All else
/// is a warning, because devices are still served: the log keeps what storage, egress and the retained
/// messages have not read yet, sessions that cannot be written go on in memory, and clients of MQTT and HTTP
/// need no NATS. A store that cannot be opened is warned of until it is. Keys whose end is not durable are dead all the same. Records that are lost to damage, and files
/// that were set aside, are warned of until the next start.
pub(super) async fn ready(State(shared): State<Arc<HttpFrontState>>) -> Response {
    readiness_of(&shared).into_response()
}

/// Whether this gateway is ready.
pub(super) fn readiness_of(shared: &HttpFrontState) -> Readiness {
    let parts = &shared.parts;
    let draining = shared.drain.is_cancelled().then(|| "the gateway is shutting down".to_owned());
    let reasons: Vec<String> = parts.log.trouble().into_iter().chain(draining).collect();
    let sinks = parts.storage.iter().flat_map(|storage| storage.states());
    let (sinks, sinks_aside): (Vec<_>, Vec<_>) = sinks.map(|sink| (sink.trouble, sink.set_aside)).unzip();
    let nats = parts.nats.as_ref().and_then(|nats| nats.trouble());
    let callout = || parts.callout.as_ref().and_then(|callout| callout.trouble());
    let egress = parts.egress.as_ref().and_then(|egress| egress.trouble());
    let lost = match parts.log.lost_records() {
        0 => None,
        lost => Some(format!(
            "{lost} records are lost to damage of the log (log.accept_corruption); the gateway's own log says which"
        )),
    };
    let (sessions, retained) = (parts.subscribers.store.trouble(), parts.subscribers.retained.trouble());
    let aside = [parts.subscribers.retained.set_aside(), parts.subscribers.store.set_aside()];
    let registry = parts.intake.authorizer().registry().trouble();
    let rules = parts.intake.authorizer().registry().unread_rules();
    let log = parts.log.warning();
    let warnings = [registry, rules, log].into_iter().chain(sinks);
    let warnings = warnings.chain([nats.or_else(callout), egress, sessions, retained, lost]);
    Readiness::new(reasons, warnings.chain(sinks_aside).chain(aside).flatten().collect())
}

impl Readiness {
    pub(super) fn new(reasons: Vec<String>, warnings: Vec<String>) -> Self {
        let status = if reasons.is_empty() { "ready" } else { "unready" };
        Self { status, reasons, warnings }
    }
}

/// The answer of `/readyz`.
impl IntoResponse for Readiness {
    fn into_response(self) -> Response {
        let code = if self.reasons.is_empty() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        (code, Json(self)).into_response()
    }
}

/// `GET /metrics`: every metric, in Prometheus' text format.
pub(super) async fn metrics(State(shared): State<Arc<HttpFrontState>>) -> Response {
    let parts = &shared.parts;
    #[expect(clippy::cast_precision_loss, reason = "a metric is an f64; exact up to 2^53")]
    let gauge = |name, value: u64| parts.metrics.set_gauge(name, value as f64);
    gauge("headgate_log_next_offset", parts.log.next_offset());
    gauge("headgate_log_first_offset", parts.log.first_offset());
    gauge("headgate_log_bytes", parts.log.bytes());
    gauge("headgate_memory_held_bytes", parts.intake.memory().held_bytes() as u64);
    gauge("headgate_http_strangers", shared.crowd.stranger_count() as u64);
    let (streams, still) = shared.streams.counts();
    gauge("headgate_stream_readers", streams as u64);
    gauge("headgate_stream_readers_still", still as u64);
    gauge("headgate_keys", parts.intake.authorizer().registry().key_count() as u64);
    parts.metrics.set_counter("headgate_dedup_evicted_total", parts.log.evicted_ids());
    parts.metrics.set_counter("headgate_log_lost_records_total", parts.log.lost_records());
    parts.metrics.set_counter("headgate_log_fenced_records_total", parts.log.fenced_records());
    parts.metrics.set_counter("headgate_refusals_unlisted_total", parts.intake.refusals().unlisted());
    if let Some(nats) = &parts.nats {
        gauge("headgate_nats_connected", u64::from(nats.trouble().is_none()));
    }
    if let Some(storage) = &parts.storage {
        gauge("headgate_storage_cursor", storage.cursor());
        for sink in storage.states() {
            let label = ("sink", sink.kind.as_str());
            #[expect(clippy::cast_precision_loss, reason = "a metric is an f64; exact up to 2^53")]
            let gauge = |name, value: u64| parts.metrics.set_labelled_gauge(name, label, value as f64);
            gauge("headgate_sink_cursor", sink.cursor);
            gauge("headgate_sink_lag_records", parts.log.next_offset().saturating_sub(sink.cursor));
            gauge("headgate_sink_up", u64::from(sink.trouble.is_none()));
        }
    }
    if let Some(egress) = &parts.egress {
        let counts = egress.counts();
        gauge("headgate_egress_cursor", counts.cursor());
        gauge("headgate_egress_lag_records", parts.log.next_offset().saturating_sub(counts.cursor()));
        parts.metrics.set_counter("headgate_egress_sent_total", counts.sent());
        for why in EgressSkipReason::ALL {
            parts.metrics.set_labelled_counter(
                "headgate_egress_skipped_total",
                ("reason", why.as_str()),
                counts.skipped(why),
            );
        }
    }
    ([(CONTENT_TYPE, "text/plain; version=0.0.4")], parts.metrics.render()).into_response()
}
