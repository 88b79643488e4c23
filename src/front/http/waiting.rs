//! HTTP while the gateway waits for something that it cannot serve without, such as the log of a cluster:
//! it is alive, it is not ready, and every other request is told to come again.
//!
//! `/livez` answers 200, and `/readyz` names what the gateway waits for.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::arrival::HttpPort;
use super::probes::{self, Readiness};
use super::server::{self, HttpCrowd, ServedRoutes};
use crate::config;
use crate::front::listen_sockets::ListenSockets;
use crate::front::problem::Problem;
use crate::front::proxied::ProxyTrust;
use crate::limits::RETRY_AFTER;
use crate::observe::cause::Cause;

/// Says what the gateway waits for.
pub type UnreadyReason = Arc<dyn Fn() -> String + Send + Sync>;

/// Serves HTTP on `listener` until `ready` resolves, and returns its output. Connections are closed then;
/// new ones wait until the listener is served again.
pub async fn serve_until_ready<T>(
    listener: &ListenSockets,
    config: &config::HttpConfig,
    proxies: Arc<ProxyTrust>,
    reason: UnreadyReason,
    ready: impl Future<Output = T>,
) -> T {
    let router: Router = Router::new()
        .route("/livez", get(probes::live))
        .route("/readyz", get(unready))
        .fallback(unavailable)
        .with_state(reason);
    let routes = ServedRoutes { router, front: None };
    let drain = CancellationToken::new();
    let crowd = HttpCrowd::new(config, None);
    let port = HttpPort { tls: None, proxies, memory: None };
    let mut connections = JoinSet::new();
    tokio::select! {
        // Mostly `ready` resolves at once; polled first, so that then nobody is served here.
        biased;
        ready = ready => ready,
        never = server::accept_on(listener, &port, routes, config, &crowd, &drain, &mut connections) => match never {},
    }
}

async fn unready(State(reason): State<UnreadyReason>) -> Response {
    Readiness::new(vec![reason()], Vec::new()).into_response()
}

async fn unavailable(State(reason): State<UnreadyReason>) -> Response {
    Problem::new(Cause::Unavailable, format!("The gateway is starting: {}.", reason()))
        .with_retry_after(RETRY_AFTER)
        .into_response()
}
