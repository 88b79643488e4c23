//! `GET /metrics`, in Prometheus' text format, and `GET /v1/version`. Neither needs a key: they reveal nothing about a single
//! datasource or key. What each datasource sends is shown to a key for all datasources that may read or manage them.

use std::sync::Arc;

use axum::Json;
use axum::extract::{FromRequestParts, Request, State};
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use super::HttpFrontState;
use super::credentials::{Caller, presented_key};
use super::probes::readiness_of;
use crate::auth::{GrantDenial, Scope};
use crate::consume::egress::EgressSkipReason;
use crate::front::problem::Problem;
use crate::message::Transport;
use crate::observe::build::{BUILD_COMMIT, BUILD_VERSION, build_features, write_build_info};
use crate::observe::exposition::{ExpositionText, MetricKind, seconds_of};
use crate::observe::process_figures::write_process_figures;

/// What the gateway was built of.
#[derive(Serialize)]
pub(super) struct VersionView {
    version: &'static str,
    commit: Option<&'static str>,
    /// The optional parts that are in it.
    features: Vec<&'static str>,
}

/// `GET /v1/version`
pub(super) async fn version() -> Json<VersionView> {
    Json(VersionView { version: BUILD_VERSION, commit: BUILD_COMMIT, features: build_features().collect() })
}

/// `GET /metrics`: every metric.
pub(super) async fn metrics(
    State(shared): State<Arc<HttpFrontState>>,
    request: Request,
) -> Result<Response, Problem> {
    let (mut request, _) = request.into_parts();
    let shows_datasources = match presented_key(&request.headers) {
        Err(GrantDenial::NoKey) => false,
        // One that is presented has to be good for it: who scrapes would not see otherwise that something is missing.
        _ => {
            let caller = Caller::from_request_parts(&mut request, &shared).await?;
            require_all(&caller)?;
            true
        }
    };
    set_gauges(&shared);
    let mut out = ExpositionText::default();
    write_build_info(&mut out);
    write_process_figures(&mut out, shared.parts.disk_figures.open_fds());
    shared.parts.disk_figures.write(&mut out);
    write_certificates(&shared, &mut out);
    shared.requests.write(&mut out);
    if shows_datasources {
        shared.parts.metrics.write_traffic(&mut out, &**shared.registry());
    }
    let mut text = shared.parts.metrics.render();
    text.push_str(&out.into_text());
    Ok(([(CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response())
}

/// Checks that the caller may read or manage all datasources.
fn require_all(caller: &Caller) -> Result<(), Problem> {
    if caller.require_gateway_admin().is_ok() {
        return Ok(());
    }
    caller.0.allows_scope(Scope::Subscribe)?;
    match caller.0.datasource().is_all() {
        true => Ok(()),
        false => Err(Problem::needs_key_for_all(caller.0.key_id())),
    }
}

fn write_certificates(shared: &HttpFrontState, out: &mut ExpositionText) {
    let standings: Vec<_> = shared.parts.certificates.iter().map(|tls| tls.standing()).collect();
    if standings.is_empty() {
        return;
    }
    let name = "headgate_certificate_expiry_timestamp_seconds";
    out.family(
        name,
        MetricKind::Gauge,
        "When the first certificate of the chain in service ends, of each listener",
    );
    for standing in &standings {
        if let Some(ends_at) = standing.ends_at {
            out.sample(name, &[("listener", standing.front)], seconds_of(ends_at));
        }
    }
    let name = "headgate_certificate_loaded_timestamp_seconds";
    out.family(name, MetricKind::Gauge, "When the certificate in service was read, of each listener");
    for standing in &standings {
        out.sample(name, &[("listener", standing.front)], seconds_of(standing.loaded_at));
    }
    let name = "headgate_certificate_current";
    let help = "Whether the certificate in service is that of its files: 1, or 0 if these cannot be used";
    out.family(name, MetricKind::Gauge, help);
    for standing in &standings {
        out.sample(name, &[("listener", standing.front)], u8::from(standing.is_current));
    }
}

/// Sets the gauges, and the counters that are counted elsewhere.
fn set_gauges(shared: &HttpFrontState) {
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
    let (reasons, warnings) = readiness_of(shared).counts();
    gauge("headgate_ready", u64::from(reasons == 0));
    gauge("headgate_readiness_warnings", warnings as u64);
    gauge("headgate_revocations_not_durable", shared.registry().unwritten_count() as u64);
    gauge("headgate_datasources", shared.registry().datasource_count() as u64);
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
        parts.metrics.set_delivered(Transport::Nats, counts.sent());
        for why in EgressSkipReason::ALL {
            parts.metrics.set_labelled_counter(
                "headgate_egress_skipped_total",
                ("reason", why.as_str()),
                counts.skipped(why),
            );
        }
    }
}
