//! Leak reports: somebody has found API keys where they do not belong, and sends them here. Each live one
//! is revoked. A report needs no key. The answer is the same whatever was sent, and comes after the same
//! time, so that it does not tell whether a key exists.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use serde_json::{Value, json};

use super::body::{self, BodyLimits};
use super::messages::without_bom;
use super::server::HttpPeer;
use super::{HttpFrontState, run_blocking};
use crate::auth::Actor;
use crate::auth::{Digest, Key, LeakedKeyFate, Registry};
use crate::front::problem::Problem;
use crate::limits::{HTTP_MANAGE_BYTES_MAX, LEAK_URL_BYTES_MAX, LEAKS_PER_REPORT_MAX};
use crate::observe::cause::Cause;
use crate::observe::metrics::Metrics;

/// How long after its arrival a report is answered: well above the few milliseconds that a revocation takes.
const LEAK_ANSWER_DELAY: Duration = Duration::from_millis(200);

/// The forms that a report has, in the words of answers.
const REPORT_FORMS: &str =
    "The accepted forms are [{\"token\": …, \"url\": …}, …] and {\"secret\": …, \"url\": …}.";

/// A secret that is reported, and where it was found.
struct ReportedSecret {
    token: String,
    url: Option<String>,
}

impl ReportedSecret {
    /// Those of a report: a list, as GitHub's secret scanning sends it, or one secret alone. Further members, such as the kind
    /// of secret, are not needed here. `None` for what is no report.
    fn all(report: &Value) -> Option<Vec<Self>> {
        match report {
            Value::Array(found) => found.iter().map(|found| Self::read(found, "token")).collect(),
            alone => Some(vec![Self::read(alone, "secret")?]),
        }
    }

    fn read(found: &Value, member: &str) -> Option<Self> {
        let token = found.get(member)?.as_str()?.to_owned();
        let url = match found.get("url") {
            None | Some(Value::Null) => None,
            Some(url) => Some(url.as_str()?.to_owned()),
        };
        Some(Self { token, url })
    }
}

/// `POST /v1/leaks`
pub(super) async fn report(
    State(shared): State<Arc<HttpFrontState>>,
    Extension(peer): Extension<HttpPeer>,
    request: Request,
) -> Result<Response, Problem> {
    let called = Instant::now();
    let address = peer.addr.ip();
    shared.leak_reports.count(address).map_err(|wait| {
        let words = "Too many reports came from this address: limit leak_reports.";
        Problem::new(Cause::TooManyRequests, words).with("limit_name", "leak_reports").with_retry_after(wait)
    })?;
    let (parts, body) = request.into_parts();
    let limits = BodyLimits { bytes_max: HTTP_MANAGE_BYTES_MAX, setting: "", ..shared.body_limits() };
    let received = body::read(&parts.headers, body, limits, &shared.account_of(&parts)).await?;
    let report = serde_json::from_slice(without_bom(&received.bytes)).ok();
    let found = report.as_ref().and_then(ReportedSecret::all).ok_or_else(|| {
        let words = format!("The body is no report of leaked keys. {REPORT_FORMS}");
        Problem::new(Cause::Malformed, words).after_body_read()
    })?;
    let revoking = async {
        let registry = shared.registry().clone();
        let actor = Actor::leak_report(address);
        let metrics = shared.parts.metrics.clone();
        let dead = run_blocking(move || {
            let found = found.iter().take(LEAKS_PER_REPORT_MAX);
            let reported = found.map(|found| revoke_reported(&registry, &metrics, &actor, found));
            Ok(reported.flatten().collect::<Vec<_>>())
        });
        let dead = dead.await?;
        if !dead.is_empty() {
            settle_in_background(&shared, &peer, dead, called);
        }
        Ok::<_, Problem>(())
    };
    let (revoked, ()) = tokio::join!(revoking, tokio::time::sleep(LEAK_ANSWER_DELAY));
    revoked?;
    let body = match shared.registry().trouble() {
        None => {
            let words = "Live API keys of this gateway are revoked, but for the last admin key.";
            json!({ "detail": format!("{words} {REPORT_FORMS}") })
        }
        // Said to everybody as long as the registry cannot be written, whatever was reported.
        Some(_) => {
            let words = "Live API keys of this gateway are revoked, but for the last admin key. The registry \
                         cannot be written at this moment, so that is not durable yet; it is tried again.";
            json!({ "detail": format!("{words} {REPORT_FORMS}"), "durable": false })
        }
    };
    Ok((StatusCode::ACCEPTED, Json(body)).into_response())
}

/// Revokes one reported key, and counts what came of it. Returns the key if it is dead now.
fn revoke_reported(
    registry: &Registry,
    metrics: &Metrics,
    actor: &Actor,
    found: &ReportedSecret,
) -> Option<Arc<Key>> {
    let fate = Digest::from_presented(found.token.as_bytes()).map_or(Ok(LeakedKeyFate::Unknown), |digest| {
        registry.revoke_leaked(actor, &digest, &audited_url(found.url.as_deref()))
    });
    let (outcome, dead) = match fate {
        Ok(LeakedKeyFate::Unknown) => ("unknown", None),
        Ok(LeakedKeyFate::Kept) => ("kept", None),
        Ok(LeakedKeyFate::Revoked(key)) => match registry.describe_unwritten(&key.datasource, Some(key.id)) {
            None => ("revoked", Some(key)),
            Some(_) => ("revoked_not_durable", Some(key)),
        },
        // A failure of one does not spare the others of the report.
        Err(error) => {
            tracing::error!(%error, "the report of a leaked admin key could not be carried out: report it again");
            ("failed", None)
        }
    };
    metrics.count_leak_report(outcome);
    dead
}

/// Waits for the connections of the dead keys in a task of its own, so that the answer is not delayed.
fn settle_in_background(shared: &Arc<HttpFrontState>, peer: &HttpPeer, dead: Vec<Arc<Key>>, called: Instant) {
    dead.iter().for_each(|key| peer.keys.leave(key.id));
    let intake = shared.parts.intake.clone();
    let usual = intake.processor().usual_runtime();
    // Nobody awaits the task: it is bounded in time, and the keys are dead already.
    usual.spawn(async move { intake.settle(&dead, called).await });
}

/// Where the key was found, for the audit: cut to a bounded length, and without the key itself.
fn audited_url(url: Option<&str>) -> String {
    let url = url.unwrap_or_default();
    if crate::auth::key::may_hold_key(url) {
        return "(left out: it holds what looks like an API key)".to_owned();
    }
    let printable = url.chars().filter(|c| !c.is_control());
    let mut length = 0;
    let fits = |c: &char| {
        length += c.len_utf8();
        length <= LEAK_URL_BYTES_MAX
    };
    printable.take_while(fits).collect()
}
