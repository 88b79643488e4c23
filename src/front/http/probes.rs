//! Probes: whether the process is alive, and whether it can take messages. They need no key,
//! and they reveal nothing about a single datasource or key, but for the ids of dead keys whose end is not durable.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use super::HttpFrontState;

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
    let subscribers = &parts.subscribers;
    let (sessions, retained) = (subscribers.store.trouble(), subscribers.retained.trouble());
    let aside = [subscribers.retained.set_aside(), subscribers.store.set_aside()];
    let registry = parts.intake.authorizer().registry().trouble();
    let rules = parts.intake.authorizer().registry().unread_rules();
    let log = parts.log.warning();
    let warnings = [registry, rules, log].into_iter().chain(sinks);
    let warnings = warnings.chain([
        nats.or_else(callout),
        egress,
        subscribers.router.trouble(),
        sessions,
        retained,
        lost,
    ]);
    Readiness::new(reasons, warnings.chain(sinks_aside).chain(aside).flatten().collect())
}

impl Readiness {
    /// How many reasons there are for no message to be taken, and how many warnings.
    pub(super) fn counts(&self) -> (usize, usize) {
        (self.reasons.len(), self.warnings.len())
    }

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
