//! What the key that a request presents is good for, and where the gateway's MQTT is. A client that knows the URL of
//! HTTP asks here, instead of sending its key to whatever listens on MQTT's standard port.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use super::HttpFrontState;
use super::connect::mqtt_urls;
use super::credentials::Caller;
use crate::auth::Scopes;
use crate::message::{DatasourceId, KeyId};

/// The answer to `GET /v1/connect`.
#[derive(Serialize)]
struct ConnectResponse<'a> {
    key: ConnectKeyView<'a>,
    /// `mqtt://HOST:PORT` and `mqtts://HOST:PORT`, as seen by whoever asks.
    mqtt: Vec<String>,
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
) -> Response {
    let key = caller.0.key();
    let key = ConnectKeyView { id: key.id, datasource: &key.datasource, scopes: key.scopes };
    Json(ConnectResponse { key, mqtt: mqtt_urls(&shared.parts, &headers) }).into_response()
}
