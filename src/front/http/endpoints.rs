//! What the key that a request presents is good for, and where the gateway's MQTT is. A client that knows the URL of
//! HTTP asks here, instead of sending its key to whatever listens on MQTT's standard port.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Query as QueryString, State};
use axum::http::{HeaderMap, Uri};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};

use super::HttpFrontState;
use super::connect::{ConnectLines, http_url, mqtt_urls};
use super::credentials::Caller;
use crate::auth::{Scope, Scopes};
use crate::front::problem::Problem;
use crate::message::{DatasourceId, KeyId};

/// The query string.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ConnectParameters {
    datasource: Option<String>,
}

/// The answer to `GET /v1/connect`.
#[derive(Serialize)]
struct ConnectResponse<'a> {
    key: ConnectKeyView<'a>,
    /// `mqtt://HOST:PORT` and `mqtts://HOST:PORT`, as seen by whoever asks.
    mqtt: Vec<String>,
    /// Where devices reach HTTP.
    http: String,
    /// Of the datasource that is asked for: lines for a key with the scopes of this one; for an admin key, for all that its
    /// keys can do.
    #[serde(skip_serializing_if = "Option::is_none")]
    connect: Option<ConnectLines>,
}

/// The key that was presented.
#[derive(Serialize)]
struct ConnectKeyView<'a> {
    id: KeyId,
    /// Its datasource, or `*`.
    datasource: &'a DatasourceId,
    scopes: Scopes,
}

/// `GET /v1/connect`
pub(super) async fn show(
    State(shared): State<Arc<HttpFrontState>>,
    caller: Caller,
    headers: HeaderMap,
    uri: Uri,
) -> Result<Response, Problem> {
    let QueryString(ConnectParameters { datasource }) = QueryString::try_from_uri(&uri)?;
    let (parts, is_https) = (&shared.parts, caller.1.is_https);
    let key = caller.0.key();
    let connect = match datasource {
        None => None,
        Some(id) => {
            let scopes = match key.scopes.allow(Scope::Admin) {
                true => Scopes::from_slice(&[Scope::Ingest, Scope::Subscribe]),
                false => key.scopes,
            };
            caller.require_scope(scopes.iter().next().unwrap_or(Scope::Ingest), &id)?;
            let datasource = shared.datasource(&id)?;
            Some(ConnectLines::new(&datasource.id, scopes, parts, &headers, is_https))
        }
    };
    let (mqtt, http) = (mqtt_urls(parts, &headers), http_url(parts, &headers, is_https));
    let key = ConnectKeyView { id: key.id, datasource: &key.datasource, scopes: key.scopes };
    Ok(Json(ConnectResponse { key, mqtt, http, connect }).into_response())
}
