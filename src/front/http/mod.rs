//! The HTTP front: messages by POST, datasources and keys, stored records, health, and a dashboard.
//! It speaks HTTP and decides nothing: the authorizer decides what a key allows, intake what is kept.
//!
//! A request comes in through `server` (and its `socket`); `middleware` wraps every handler;
//! `cors` answers to pages of other origins; `credentials` identifies the caller before any of the body is read; then one handler of the table
//! in [`routes`] runs, with what all share (`state`); most requests for ingest go past the table ([`ingest::IngestRoute`]). Every refusal becomes a `problem`.

mod answer;
mod arrival;
mod audit;
mod backup;
mod body;
mod charged_list;
mod connect;
mod cors;
mod credentials;
mod dashboard;
mod deletion;
mod endpoints;
mod event_time;
mod frame_meter;
mod influx;
mod ingest;
mod keys;
mod leaks;
mod lent;
mod lent_socket;
mod limits;
mod live;
mod long_answer;
mod manage;
mod members;
mod messages;
mod metrics;
mod middleware;
mod page_stream;
mod parts;
mod path_parameters;
mod persistence;
mod presented;
mod probes;
mod problem;
mod problem_pages;
mod quarantine;
mod query;
mod records;
mod redrive;
mod refusals;
mod request_clock;
mod request_form;
mod request_meter;
mod routes;
mod schema;
mod series;
mod server;
mod sessions;
mod sinks;
mod socket;
mod state;
mod stranger_pace;
mod stream;
mod tokens;
mod transfer;
mod turns;
mod waiting;
mod websocket;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use parking_lot::Mutex;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use self::arrival::HttpPort;
use self::dashboard::browser_sessions::BrowserSessions;
use self::path_parameters::PathParameters;
use self::request_meter::RequestMeter;
use self::routes::{is_of_devices, router, routes};
use self::server::{HttpCrowd, ServedRoutes};
use self::state::{HttpFrontState, no_datasource};
use self::stream::StreamReaders;
use self::turns::{run_blocking, run_in_turn, run_reading};
use crate::auth::failures::AuthFailures;
use crate::config;
use crate::front::listen_sockets::ListenSockets;
use crate::limits::{
    HTTP_ADMIN_CONNECTIONS_MAX, LEAK_REPORTS_BURST, LEAK_REPORTS_PER_S, PARSES_PER_PROCESSOR_MAX,
};

pub use parts::{HttpFrontParts, HttpListeners};
pub use waiting::{UnreadyReason, serve_until_ready};

/// Serves HTTP on `listeners` until `drain` is cancelled; then accepts no more connections, and returns
/// when the requests under way are answered. Dropping the future aborts them.
pub async fn serve(listeners: HttpListeners, parts: HttpFrontParts, drain: CancellationToken) {
    let config = parts.config.clone();
    let refusals = parts.intake.refusals().clone();
    let processor = parts.intake.processor().clone();
    let (table, noted) = (parts.connections.clone(), Some(refusals.clone()));
    let crowd = HttpCrowd::over(table, config.connections_max, noted, processor.clone());
    let admin_table = parts.admin_connections.clone();
    let admin_crowd = HttpCrowd::over(admin_table, HTTP_ADMIN_CONNECTIONS_MAX, Some(refusals), processor);
    let (proxies, memory) = (parts.proxies.clone(), Some(parts.intake.memory().clone()));
    let shared = Arc::new(HttpFrontState {
        crowd: crowd.clone(),
        parses: Arc::new(Semaphore::new(PARSES_PER_PROCESSOR_MAX * crate::shares::processors())),
        setting_schemas: Mutex::new(()),
        redrives: Arc::default(),
        leak_reports: AuthFailures::new(&config::AuthConfig {
            failures_burst: LEAK_REPORTS_BURST,
            failures_per_s: LEAK_REPORTS_PER_S,
            failures_exempt: Vec::new(),
        }),
        requests: RequestMeter::new(routes().into_iter().map(|(method, path, _)| (method, path))),
        limiting: Mutex::new(()),
        streams: StreamReaders::new(config.stream_heartbeat(), Duration::from_millis(config.body_ms_max)),
        live_places: live::LivePlaces::default(),
        browser_sessions: BrowserSessions::default(),
        drain: drain.clone(),
        keep_alive: persistence::keep_alive_value(config.keep_alive_s_max),
        parts,
    });
    let HttpListeners { plain, tls, admin, certificate } = listeners;
    let plain_port = HttpPort { tls: None, proxies, memory };
    let tls_port = HttpPort { tls: certificate, ..plain_port.clone() };
    let served = |router: Router| ServedRoutes { router, front: Some(shared.clone()) };
    let all = served(router(shared.clone(), |_, _| true));
    let of_devices = match admin {
        Some(_) => served(router(shared.clone(), is_of_devices)),
        None => all.clone(),
    };
    let serve = |listener: Option<ListenSockets>, port: HttpPort, routes: ServedRoutes, crowd: HttpCrowd| {
        let (config, drain) = (&config, drain.clone());
        async move {
            if let Some(listener) = listener {
                server::run(listener, port, routes, config, crowd, drain).await;
            }
        }
    };
    let serving = async {
        tokio::join!(
            serve(Some(plain), plain_port, of_devices.clone(), crowd.clone()),
            serve(tls, tls_port.clone(), of_devices, crowd),
            serve(admin, tls_port, all, admin_crowd),
        );
    };
    tokio::select! {
        () = serving => {}
        never = shared.streams.watch(shared.parts.log.withheld()) => match never {},
    }
}
