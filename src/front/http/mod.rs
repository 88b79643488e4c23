//! The HTTP front: messages by POST, datasources and keys, stored records, health, and a dashboard.
//! It speaks HTTP and decides nothing: the authorizer decides what a key allows, intake what is kept.
//!
//! A request comes in through `server` (and its `socket`); `middleware` wraps every handler;
//! `cors` answers to pages of other origins; `credentials` identifies the caller before any of the body is read; then one handler of the table
//! in [`routes`] runs; most requests for ingest go past the table ([`ingest::IngestRoute`]). Every refusal becomes a `problem`.

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
mod persistence;
mod presented;
mod probes;
mod problem;
mod problem_pages;
mod quarantine;
mod query;
mod records;
mod refusals;
mod request_clock;
mod request_form;
mod request_meter;
mod schema;
mod series;
mod server;
mod sessions;
mod sinks;
mod socket;
mod stranger_pace;
mod stream;
mod tokens;
mod transfer;
mod waiting;
mod websocket;

use parking_lot::Mutex;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::{FromRequestParts, Path, Request};
use axum::http::header::CONTENT_TYPE;
use axum::http::request::Parts as RequestParts;
use axum::http::{HeaderValue, Method};
use axum::middleware::from_fn_with_state;
use axum::response::IntoResponse;
use axum::routing::{MethodFilter, MethodRouter, on};
use headgate_bridge_nats::Nats;
use serde::de::DeserializeOwned;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use self::answer::RequestMemory;
use self::arrival::HttpPort;
use self::body::BodyLimits;
use self::credentials::Caller;
use self::dashboard::browser_sessions::BrowserSessions;
use self::request_meter::RequestMeter;
use self::server::{HttpCrowd, HttpPeer, ServedRoutes};
use self::stream::StreamReaders;
use crate::auth::failures::AuthFailures;
use crate::auth::{Datasource, Key, Registry};
use crate::backup::BackupDesk;
use crate::config::{self, PublicMqtt, PublicUrl};
use crate::consume::egress::Egress;
use crate::consume::quarantine::QuarantineLeakRules;
use crate::consume::query::RecordsReader;
use crate::consume::storage::StorageSinks;
use crate::consume::subscriber::Subscribers;
use crate::front::connection_table::ConnectionTable;
use crate::front::listen_sockets::ListenSockets;
use crate::front::problem::Problem;
use crate::front::proxied::ProxyTrust;
use crate::front::tls::Tls;
use crate::front::{mqtt, nats};
use crate::intake::{Intake, Refusal};
use crate::limits::{
    HTTP_ADMIN_CONNECTIONS_MAX, HTTP_BODY_PACE_WINDOW, HTTP_MANAGE_BYTES_MAX, LEAK_REPORTS_BURST,
    LEAK_REPORTS_PER_S, PARSES_PER_PROCESSOR_MAX, REVOCATION_WAIT_MAX,
};
use crate::log::Log;
use crate::memory::MemoryAccount;
use crate::message::DatasourceId;
use crate::observe::cause::Cause;
use crate::observe::disk_figures::DiskFigures;
use crate::observe::metrics::Metrics;
use crate::processor::run_usually;
use crate::quota::{Limit, LimitExceeded};

pub use waiting::{UnreadyReason, serve_until_ready};

/// What the HTTP front works with.
pub struct HttpFrontParts {
    /// Where messages are handed in.
    pub intake: Intake,
    /// For offsets and health.
    pub log: Arc<dyn Log>,
    /// Stored records, if there is storage.
    pub query: Option<RecordsReader>,
    /// The rules for records that leaked keys let in.
    pub leaks: QuarantineLeakRules,
    /// Retained messages, of which those that a leaked key let in are withheld too, and the health of what
    /// serves subscribers.
    pub subscribers: Arc<Subscribers>,
    /// The storage consumers, if there are any.
    pub storage: Option<Arc<StorageSinks>>,
    /// The egress consumer, which sends records to NATS, if there is one.
    pub egress: Option<Arc<Egress>>,
    /// For `/metrics`.
    pub metrics: Arc<Metrics>,
    /// Limits.
    pub config: config::HttpConfig,
    /// Where connections are entered.
    pub connections: Arc<ConnectionTable>,
    /// Where those to the administration's listener are entered. Of its own, so that a crowd of devices or strangers never
    /// keeps an administrator out.
    pub admin_connections: Arc<ConnectionTable>,
    /// Takes over connections that carry MQTT over WebSocket.
    pub mqtt: mqtt::Acceptor,
    /// Where MQTT is served, for the lines that say how to connect.
    pub mqtt_addr: SocketAddr,
    /// Where MQTT is served over TLS, if it is.
    pub mqtt_tls_addr: Option<SocketAddr>,
    /// Where HTTP is served.
    pub http_addr: SocketAddr,
    /// Where HTTP is served over TLS, if it is.
    pub http_tls_addr: Option<SocketAddr>,
    /// Where clients reach HTTP and MQTT, if that is not where they are served.
    pub public_url: PublicUrl,
    /// As `public_url`.
    pub public_mqtt: PublicMqtt,
    /// The proxies that are believed.
    pub proxies: Arc<ProxyTrust>,
    /// The NATS front, if there is one.
    pub nats: Option<Arc<nats::NatsFront>>,
    /// Addresses of the NATS servers, for the lines that say how to connect.
    pub nats_servers: Vec<String>,
    /// The connection on which NATS asks about its clients, if API keys are NATS users.
    pub callout: Option<Nats>,
    /// Makes backups.
    pub backups: Arc<BackupDesk>,
    /// What the data directory takes.
    pub disk_figures: Arc<DiskFigures>,
    /// The certificates in service.
    pub certificates: Vec<Arc<Tls>>,
}

/// Where HTTP is served.
pub struct HttpListeners {
    /// Without TLS.
    pub plain: ListenSockets,
    /// Over TLS, if there is a certificate.
    pub tls: Option<ListenSockets>,
    /// The administration's own, over TLS if there is a certificate.
    pub admin: Option<ListenSockets>,
    /// The certificate.
    pub certificate: Option<Arc<Tls>>,
}

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
        redriving: tokio::sync::Mutex::default(),
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

/// What every handler may use.
struct HttpFrontState {
    parts: HttpFrontParts,
    /// The connections, for their number.
    crowd: HttpCrowd,
    /// A permit for each large body that may be made a draft at once: what that takes meanwhile is not all charged.
    parses: Arc<Semaphore>,
    /// Counts leak reports by source address.
    leak_reports: AuthFailures,
    /// Counts requests by route.
    requests: RequestMeter,
    /// Held while limits are changed, so that of two concurrent changes neither is lost.
    limiting: Mutex<()>,
    /// Held while the schemas of a datasource are read and set, so that no version number is used twice.
    setting_schemas: Mutex<()>,
    /// The streams that are open.
    streams: Arc<StreamReaders>,
    /// Who watches what happens.
    live_places: live::LivePlaces,
    /// Who has signed in on the dashboard.
    browser_sessions: BrowserSessions,
    /// Held from where quarantine is read until what is sent again of it is in the log, so that it is sent again once.
    redriving: tokio::sync::Mutex<()>,
    drain: CancellationToken,
    /// What says in answers how long a connection may be idle.
    keep_alive: HeaderValue,
}

impl HttpFrontState {
    fn registry(&self) -> &Arc<Registry> {
        self.parts.intake.authorizer().registry()
    }

    /// The datasource that a path names. Call it only after the caller is authorized for that id.
    fn datasource(&self, id: &str) -> Result<Arc<Datasource>, Problem> {
        self.registry().datasource(id).ok_or_else(|| no_datasource(id))
    }

    /// Fails if a datasource has `times` as many live keys as its limit allows.
    fn check_key_count(&self, datasource: &DatasourceId, times: u64) -> Result<(), Problem> {
        let setting = self.parts.intake.count_limit(datasource, Limit::Keys);
        if (self.registry().keys(datasource).len() as u64) < setting.max.saturating_mul(times) {
            return Ok(());
        }
        Err(Refusal::from(LimitExceeded::of_count(Limit::Keys, setting, datasource)).into())
    }

    /// Waits until nothing more can come in under keys that a call has ended and their connections are
    /// closed. The caller's own connection is not waited for: it closes after this answer.
    async fn settle(&self, caller: &Caller, dead: &[Arc<Key>], called: Instant) {
        dead.iter().for_each(|key| caller.1.keys.leave(key.id));
        let settled = self.parts.intake.settle(dead, called);
        // Without its cluster the log may not answer for long; the keys are dead here all the same.
        if self.registry().trouble().is_none() {
            settled.await;
        } else if tokio::time::timeout(REVOCATION_WAIT_MAX, settled).await.is_err() {
            tracing::warn!("the log has not confirmed the end of a key; nothing new is let in under it");
        }
    }

    fn body_limits(&self) -> BodyLimits {
        let config = &self.parts.config;
        let time_max = Duration::from_millis(config.body_ms_max);
        let (bytes_max, setting) = (config.body_bytes_max, "http.body_bytes_max");
        BodyLimits { bytes_max, setting, time_max, pace_window: HTTP_BODY_PACE_WINDOW }
    }

    /// Who is charged for what a request brings: its key, or the address of a stranger.
    fn account_of(&self, request: &RequestParts) -> Arc<MemoryAccount> {
        let of_key = request.extensions.get::<RequestMemory>().and_then(RequestMemory::account);
        of_key.unwrap_or_else(|| {
            let peer = request.extensions.get::<HttpPeer>();
            let address = peer.map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), |peer| peer.addr.ip());
            self.parts.intake.memory().account_of_stranger(address)
        })
    }

    /// Reads and parses the body of a management request. Unknown fields are refused: to ignore one
    /// would promise what it asks for.
    async fn read_json<T: DeserializeOwned>(&self, request: Request) -> Result<T, Problem> {
        self.read_json_up_to(request, HTTP_MANAGE_BYTES_MAX).await
    }

    /// As [`HttpFrontState::read_json`], with a limit of its own.
    async fn read_json_up_to<T: DeserializeOwned>(
        &self,
        request: Request,
        bytes_max: usize,
    ) -> Result<T, Problem> {
        let (parts, body) = request.into_parts();
        let limits = BodyLimits { bytes_max, setting: "", ..self.body_limits() };
        let received = body::read(&parts.headers, body, limits, &self.account_of(&parts)).await?;
        let json = messages::without_bom(&received.bytes);
        // An array would be taken for the members in the order of their declaration.
        if json.trim_ascii_start().starts_with(b"[") {
            let words = "The body cannot be used: it is an array and has to be an object.";
            return Err(Problem::new(Cause::Malformed, words).after_body_read());
        }
        serde_json::from_slice(json).map_err(|error| {
            Problem::new(Cause::Malformed, format!("The body cannot be used: {error}.")).after_body_read()
        })
    }
}

fn no_datasource(id: &str) -> Problem {
    let id: String = id.chars().take(64).collect();
    Problem::new(Cause::NoDatasource, format!("There is no datasource {id:?}."))
}

/// Runs work that waits for a disk on a blocking thread of the usual priority: it may lock the registry.
async fn run_blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Problem> + Send + 'static,
) -> Result<T, Problem> {
    run_usually(work).await.map_err(|error| Problem::internal(&error))?
}

/// Runs work that reads or computes for long on a blocking thread, at the caller's priority.
async fn run_reading<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Problem> + Send + 'static,
) -> Result<T, Problem> {
    tokio::task::spawn_blocking(work).await.map_err(|error| Problem::internal(&error))?
}

/// As [`run_reading`], for what a caller reads: in a turn of its tenant, so that others and the registry always
/// find a thread. The work goes on, and keeps the turn, if the caller goes away.
async fn run_in_turn<T: Send + 'static>(
    shared: &HttpFrontState,
    caller: &Caller,
    work: impl FnOnce() -> Result<T, Problem> + Send + 'static,
) -> Result<T, Problem> {
    let turn = shared.parts.subscribers.shares.share(caller.0.datasource()).read_turn().await;
    run_reading(move || {
        let _turn = turn;
        work()
    })
    .await
}

/// Every route. `openapi.json` lists the same; a test compares the two.
fn routes() -> Vec<(Method, &'static str, MethodRouter<Arc<HttpFrontState>>)> {
    fn route<H, T>(
        method: Method,
        path: &'static str,
        handler: H,
    ) -> (Method, &'static str, MethodRouter<Arc<HttpFrontState>>)
    where
        H: axum::handler::Handler<T, Arc<HttpFrontState>>,
        T: 'static,
    {
        let filter = MethodFilter::try_from(method.clone()).expect("the table has standard methods alone");
        (method, path, on(filter, handler))
    }
    let (get, post, delete, put) = (Method::GET, Method::POST, Method::DELETE, Method::PUT);
    let patch = Method::PATCH;
    vec![
        route(post.clone(), "/v1/ingest/{datasource}", ingest::to_datasource),
        route(post.clone(), "/v1/ingest/{datasource}/{*topic}", ingest::to_topic),
        route(post.clone(), "/api/v2/write", influx::write_v2),
        route(post.clone(), "/write", influx::write_v1),
        route(post.clone(), "/query", influx::query),
        route(get.clone(), "/ping", influx::ping),
        route(get.clone(), "/health", influx::health),
        route(post.clone(), "/v1/datasources", manage::create),
        route(get.clone(), "/v1/datasources", manage::list),
        route(get.clone(), "/v1/datasources/{datasource}", manage::show),
        route(patch.clone(), "/v1/datasources/{datasource}", limits::patch_datasource),
        route(delete.clone(), "/v1/datasources/{datasource}", deletion::delete),
        route(put, "/v1/datasources/{datasource}/schema", schema::set),
        route(get.clone(), "/v1/datasources/{datasource}/schema", schema::show),
        route(get.clone(), "/v1/datasources/{datasource}/quarantine", quarantine::list),
        route(post.clone(), "/v1/datasources/{datasource}/quarantine/redrive", quarantine::redrive),
        route(
            post.clone(),
            "/v1/datasources/{datasource}/keys/{key_id}/quarantine",
            quarantine::quarantine_key_records,
        ),
        route(post.clone(), "/v1/datasources/{datasource}/keys", keys::create),
        route(get.clone(), "/v1/datasources/{datasource}/keys", keys::list),
        route(patch, "/v1/datasources/{datasource}/keys/{key_id}", limits::patch_key_limits),
        route(delete.clone(), "/v1/datasources/{datasource}/keys/{key_id}", keys::revoke),
        route(post.clone(), "/v1/datasources/{datasource}/keys/{key_id}/rotate", keys::rotate),
        route(post.clone(), "/v1/datasources/{datasource}/keys/{key_id}/tokens", tokens::create),
        route(get.clone(), "/v1/datasources/{datasource}/records", records::records),
        route(get.clone(), "/v1/datasources/{datasource}/latest", query::latest),
        route(get.clone(), "/v1/datasources/{datasource}/series", series::series),
        route(get.clone(), "/v1/datasources/{datasource}/stream", stream::read),
        route(get.clone(), "/v1/datasources/{datasource}/sessions", sessions::list),
        route(
            post.clone(),
            "/v1/datasources/{datasource}/sessions/{client_id}/disconnect",
            sessions::disconnect,
        ),
        route(get.clone(), "/v1/connect", endpoints::show),
        route(post.clone(), "/v1/session", dashboard::session::begin),
        route(get.clone(), "/v1/session", dashboard::session::show),
        route(delete, "/v1/session", dashboard::session::end),
        route(get.clone(), "/v1/live", live::watch),
        route(get.clone(), "/v1/refusals", refusals::list),
        route(get.clone(), "/v1/audit", audit::list),
        route(get.clone(), "/v1/sinks", sinks::list),
        route(post.clone(), "/v1/leaks", leaks::report),
        route(get.clone(), "/v1/datasources/{datasource}/export", transfer::export),
        route(post.clone(), "/v1/import", transfer::import),
        route(post.clone(), "/v1/backup", backup::begin),
        route(get.clone(), "/v1/backup", backup::show),
        route(get.clone(), "/mqtt", websocket::open),
        route(get.clone(), "/livez", probes::live),
        route(get.clone(), "/readyz", probes::ready),
        route(get.clone(), "/metrics", metrics::metrics),
        route(get.clone(), "/v1/version", metrics::version),
        route(get.clone(), "/openapi.json", openapi),
        route(get.clone(), "/problems/{kind}", problem_pages::show),
        route(get.clone(), "/dashboard/{version}/{file}", dashboard::file),
        route(get, "/", dashboard::page),
    ]
}

/// The routes that are for devices and readers. All others are the administration's: where it has a listener of its own,
/// they are not found at any other.
const DEVICE_ROUTES: [(Method, &str); 20] = [
    (Method::POST, "/v1/ingest/{datasource}"),
    (Method::POST, "/v1/ingest/{datasource}/{*topic}"),
    (Method::POST, "/api/v2/write"),
    (Method::POST, "/write"),
    (Method::POST, "/query"),
    (Method::GET, "/ping"),
    (Method::GET, "/health"),
    (Method::GET, "/v1/datasources/{datasource}/schema"),
    (Method::GET, "/v1/datasources/{datasource}/records"),
    (Method::GET, "/v1/datasources/{datasource}/latest"),
    (Method::GET, "/v1/datasources/{datasource}/series"),
    (Method::GET, "/v1/datasources/{datasource}/stream"),
    // A key makes tokens of itself.
    (Method::POST, "/v1/datasources/{datasource}/keys/{key_id}/tokens"),
    (Method::GET, "/v1/connect"),
    (Method::POST, "/v1/leaks"),
    (Method::GET, "/mqtt"),
    (Method::GET, "/livez"),
    (Method::GET, "/readyz"),
    (Method::GET, "/openapi.json"),
    (Method::GET, "/problems/{kind}"),
];

/// Whether a route is one of those.
fn is_of_devices(method: &Method, path: &str) -> bool {
    DEVICE_ROUTES.iter().any(|(of, served)| of == method && *served == path)
}

/// The routes that a listener serves.
fn router(shared: Arc<HttpFrontState>, is_served: impl Fn(&Method, &str) -> bool) -> Router {
    // A path that is served for one method is not found for the others that it has elsewhere.
    let is_path_served =
        |path: &str| routes().iter().any(|(method, of, _)| *of == path && is_served(method, path));
    let routes = routes().into_iter().filter(|(_, path, _)| is_path_served(path));
    let mut router = routes.fold(Router::new(), |router, (method, path, handler)| {
        let is_served = is_served(&method, path);
        let filter = || MethodFilter::try_from(method).expect("the table has standard methods alone");
        router.route(path, if is_served { handler } else { on(filter(), no_route) })
    });
    // A slash at the end names no topic.
    router = router.route("/v1/ingest/{datasource}/", on(MethodFilter::POST, ingest::to_datasource));
    router
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(from_fn_with_state(shared.clone(), cors::cors_middleware))
        .layer(from_fn_with_state(shared.clone(), middleware::request_middleware))
        .with_state(shared)
}

async fn no_route() -> Problem {
    Problem::new(Cause::NotFound, "There is no such path; /openapi.json lists those that there are.")
}

async fn no_method(method: Method) -> Problem {
    Problem::new(
        Cause::MethodNotAllowed,
        format!("{method} is not allowed here; the Allow header says what is."),
    )
}

/// `GET /openapi.json`: this API, for programs and people.
async fn openapi() -> impl IntoResponse {
    ([(CONTENT_TYPE, "application/json")], include_str!("openapi.json"))
}

/// The parameters in a request's path, decoded. A path that cannot be decoded becomes a [`Problem`].
struct PathParameters<T>(T);

impl<T: DeserializeOwned + Send> FromRequestParts<Arc<HttpFrontState>> for PathParameters<T> {
    type Rejection = Problem;

    async fn from_request_parts(
        parts: &mut RequestParts,
        shared: &Arc<HttpFrontState>,
    ) -> Result<Self, Problem> {
        let Path(parameters) = Path::from_request_parts(parts, shared).await?;
        Ok(Self(parameters))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::Value;

    use super::*;
    use crate::observe::cause::ProblemKind;

    fn described() -> Value {
        serde_json::from_str(include_str!("openapi.json")).expect("openapi.json is JSON")
    }

    #[test]
    fn openapi_lists_the_routes_that_there_are_and_no_others() {
        let served: BTreeSet<(String, String)> = routes()
            .into_iter()
            .map(|(method, path, _)| (path.replace("{*", "{"), method.as_str().to_ascii_lowercase()))
            .collect();
        let openapi = described();
        let paths = openapi["paths"].as_object().expect("paths");
        let listed = paths.iter().flat_map(|(path, operations)| {
            let methods = operations.as_object().expect("operations").keys();
            methods.filter(|&method| method != "parameters").map(|method| (path.clone(), method.clone()))
        });
        assert_eq!(served, listed.collect());
    }

    #[test]
    fn every_route_of_devices_is_a_route_and_none_of_them_is_managed_by() {
        let served: Vec<(Method, &str)> =
            routes().into_iter().map(|(method, path, _)| (method, path)).collect();
        for route in &DEVICE_ROUTES {
            assert!(served.contains(route), "{route:?}");
        }
        for admin in
            ["/", "/metrics", "/v1/audit", "/v1/refusals", "/v1/datasources", "/v1/datasources/{datasource}"]
        {
            assert!(DEVICE_ROUTES.iter().all(|(_, path)| *path != admin), "{admin}");
        }
    }

    #[test]
    fn openapi_lists_every_kind_of_problem() {
        let openapi = described();
        let listed = openapi["components"]["schemas"]["Problem"]["properties"]["type"]["enum"].clone();
        let listed: Vec<String> = serde_json::from_value(listed).expect("a list of types");
        let all = ProblemKind::ALL.iter().map(|kind| format!("/problems/{}", kind.slug()));
        assert_eq!(listed, all.collect::<Vec<_>>());
    }
}
