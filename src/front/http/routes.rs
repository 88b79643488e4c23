//! The routes: which handler serves which path, and which of them are for devices.

use std::sync::Arc;

use axum::Router;
use axum::http::Method;
use axum::http::header::CONTENT_TYPE;
use axum::middleware::from_fn_with_state;
use axum::response::IntoResponse;
use axum::routing::{MethodFilter, MethodRouter, on};

use super::HttpFrontState;
use super::{
    audit, backup, cors, dashboard, deletion, endpoints, influx, ingest, keys, leaks, limits, live, manage,
    metrics, middleware, probes, problem_pages, quarantine, query, records, redrive, refusals, schema,
    series, sessions, sinks, stream, tokens, transfer, websocket,
};
use crate::front::problem::Problem;
use crate::observe::cause::Cause;

/// Every route. `openapi.json` lists the same; a test compares the two.
pub fn routes() -> Vec<(Method, &'static str, MethodRouter<Arc<HttpFrontState>>)> {
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
        route(post.clone(), "/v1/datasources/{datasource}/quarantine/redrive", redrive::redrive),
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
pub fn is_of_devices(method: &Method, path: &str) -> bool {
    DEVICE_ROUTES.iter().any(|(of, served)| of == method && *served == path)
}

/// The routes that a listener serves.
pub fn router(shared: Arc<HttpFrontState>, is_served: impl Fn(&Method, &str) -> bool) -> Router {
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
