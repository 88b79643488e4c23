//! How many requests there were of each route, and how long they took. Everything is there from the start: nothing that a
//! client sends adds a series beyond those of the table of routes.
//!
//! A request is counted when its answer begins. Those that go on from there (a stream, MQTT over WebSocket) are counted
//! and not timed. What matches no route is one route, `-`.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::http::{Method, StatusCode};

use crate::observe::exposition::{ExpositionText, MetricKind};

/// The upper bounds of the histogram's buckets, in microseconds and as they are shown.
const REQUEST_BUCKETS: [(u64, &str); 12] = [
    (500, "0.0005"),
    (1_000, "0.001"),
    (2_500, "0.0025"),
    (5_000, "0.005"),
    (10_000, "0.01"),
    (25_000, "0.025"),
    (50_000, "0.05"),
    (100_000, "0.1"),
    (250_000, "0.25"),
    (1_000_000, "1"),
    (2_500_000, "2.5"),
    (10_000_000, "10"),
];
/// The classes of status codes.
const STATUS_CLASSES: [&str; 5] = ["1xx", "2xx", "3xx", "4xx", "5xx"];
/// Routes whose answers have no end that says anything about the gateway.
const UNTIMED_ROUTES: [&str; 3] = ["/mqtt", "/v1/datasources/{datasource}/stream", "/v1/live"];
/// What requests are called that match no route.
const NO_ROUTE: &str = "-";

/// The requests of every route.
pub(super) struct RequestMeter {
    /// The places in `routes` of each path, by method.
    places: HashMap<&'static str, Vec<(Method, usize)>>,
    routes: Vec<RouteCounts>,
}

/// The requests of one route.
struct RouteCounts {
    method: String,
    path: &'static str,
    is_timed: bool,
    by_class: [AtomicU64; STATUS_CLASSES.len()],
    /// Of those that took no longer than each bound, and longer than the one before it; behind them the others.
    buckets: [AtomicU64; REQUEST_BUCKETS.len() + 1],
    micros: AtomicU64,
}

impl RouteCounts {
    fn new(method: &str, path: &'static str) -> Self {
        let is_timed = !UNTIMED_ROUTES.contains(&path);
        let (by_class, buckets, micros) = Default::default();
        Self { method: method.to_owned(), path, is_timed, by_class, buckets, micros }
    }
}

impl RequestMeter {
    /// No requests yet of these routes.
    pub(super) fn new(routes: impl Iterator<Item = (Method, &'static str)>) -> Self {
        let mut meter = Self { places: HashMap::new(), routes: vec![RouteCounts::new(NO_ROUTE, NO_ROUTE)] };
        for (method, path) in routes {
            let at = meter.routes.len();
            meter.routes.push(RouteCounts::new(method.as_str(), path));
            meter.places.entry(path).or_default().push((method, at));
        }
        meter
    }

    /// Counts a request of a route, named by its path, which took so long until its answer began.
    pub(super) fn note(&self, path: &str, method: &Method, status: StatusCode, took: Duration) {
        let wanted = if method == Method::HEAD { &Method::GET } else { method };
        let of_path = self.places.get(path).map(Vec::as_slice).unwrap_or_default();
        let at = of_path.iter().find(|(of, _)| of == wanted).map_or(0, |(_, at)| *at);
        let route = &self.routes[at];
        let class = usize::from(status.as_u16() / 100).clamp(1, STATUS_CLASSES.len()) - 1;
        route.by_class[class].fetch_add(1, Ordering::Relaxed);
        if route.is_timed {
            let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
            let bucket = REQUEST_BUCKETS.iter().position(|(bound, _)| micros <= *bound);
            route.buckets[bucket.unwrap_or(REQUEST_BUCKETS.len())].fetch_add(1, Ordering::Relaxed);
            route.micros.fetch_add(micros, Ordering::Relaxed);
        }
    }

    /// Writes the routes that had any requests.
    pub(super) fn write(&self, out: &mut ExpositionText) {
        let name = "headgate_http_requests_total";
        out.family(
            name,
            MetricKind::Counter,
            "HTTP requests that were answered, by route and class of status",
        );
        for route in &self.routes {
            for (class, count) in STATUS_CLASSES.iter().zip(&route.by_class) {
                let count = count.load(Ordering::Relaxed);
                if count > 0 {
                    let labels = [("method", &*route.method), ("route", route.path), ("status", class)];
                    out.sample(name, &labels, count);
                }
            }
        }
        let name = "headgate_http_request_seconds";
        out.family(
            name,
            MetricKind::Histogram,
            "From a request's header to the beginning of its answer; without streams and MQTT over WebSocket",
        );
        self.routes.iter().for_each(|route| route.write_seconds(name, out));
    }
}

impl RouteCounts {
    fn write_seconds(&self, name: &str, out: &mut ExpositionText) {
        // Each once, so that the buckets never have more than the whole.
        let counts = self.buckets.each_ref().map(|count| count.load(Ordering::Relaxed));
        let all: u64 = counts.iter().sum();
        if all == 0 {
            return;
        }
        let labels = [("method", &*self.method), ("route", self.path)];
        let mut below = 0;
        let bounds = REQUEST_BUCKETS.iter().map(|(_, shown)| *shown).chain(["+Inf"]);
        for (bound, count) in bounds.zip(counts) {
            below += count;
            let [method, route] = labels;
            out.sample(&format!("{name}_bucket"), &[method, route, ("le", bound)], below);
        }
        #[expect(clippy::cast_precision_loss, reason = "exact up to 2^53 microseconds")]
        let seconds = self.micros.load(Ordering::Relaxed) as f64 / 1e6;
        out.sample(&format!("{name}_sum"), &labels, seconds);
        out.sample(&format!("{name}_count"), &labels, all);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(meter: &RequestMeter) -> String {
        let mut out = ExpositionText::default();
        meter.write(&mut out);
        out.into_text()
    }

    #[test]
    fn whatever_is_asked_for_there_are_no_more_series_than_routes() {
        let routes = [(Method::GET, "/a/{b}"), (Method::POST, "/a/{b}"), (Method::GET, "/mqtt")];
        let meter = RequestMeter::new(routes.into_iter());
        let took = Duration::from_millis(3);
        meter.note("/a/{b}", &Method::GET, StatusCode::OK, took);
        meter.note("/a/{b}", &Method::HEAD, StatusCode::OK, took);
        meter.note("/a/{b}", &Method::POST, StatusCode::UNAUTHORIZED, took);
        meter.note("/mqtt", &Method::GET, StatusCode::SWITCHING_PROTOCOLS, took);
        for n in 0..1_000 {
            let method = Method::from_bytes(format!("M{n}").as_bytes()).expect("a method");
            meter.note("/a/{b}", &method, StatusCode::METHOD_NOT_ALLOWED, took);
            meter.note(&format!("/{n}"), &Method::GET, StatusCode::NOT_FOUND, took);
        }
        let text = text(&meter);
        for line in [
            "headgate_http_requests_total{method=\"GET\",route=\"/a/{b}\",status=\"2xx\"} 2",
            "headgate_http_requests_total{method=\"POST\",route=\"/a/{b}\",status=\"4xx\"} 1",
            "headgate_http_requests_total{method=\"GET\",route=\"/mqtt\",status=\"1xx\"} 1",
            "headgate_http_requests_total{method=\"-\",route=\"-\",status=\"4xx\"} 2000",
            "headgate_http_request_seconds_bucket{method=\"GET\",route=\"/a/{b}\",le=\"0.0025\"} 0",
            "headgate_http_request_seconds_bucket{method=\"GET\",route=\"/a/{b}\",le=\"0.005\"} 2",
            "headgate_http_request_seconds_bucket{method=\"GET\",route=\"/a/{b}\",le=\"+Inf\"} 2",
            "headgate_http_request_seconds_sum{method=\"GET\",route=\"/a/{b}\"} 0.006",
            "headgate_http_request_seconds_count{method=\"GET\",route=\"/a/{b}\"} 2",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in {text}");
        }
        assert!(!text.contains("seconds_count{method=\"GET\",route=\"/mqtt\"}"), "{text}");
        assert_eq!(text.lines().filter(|line| line.starts_with("headgate_http_requests_total")).count(), 4);
    }

    #[test]
    fn a_request_is_in_the_bucket_whose_bound_it_just_reaches() {
        let meter = RequestMeter::new([(Method::GET, "/")].into_iter());
        for (bound, _) in REQUEST_BUCKETS {
            meter.note("/", &Method::GET, StatusCode::OK, Duration::from_micros(bound));
            meter.note("/", &Method::GET, StatusCode::OK, Duration::from_micros(bound + 1));
        }
        let counts = meter.routes[1].buckets.each_ref().map(|count| count.load(Ordering::Relaxed));
        assert_eq!(counts, [1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1]);
        for (bound, shown) in REQUEST_BUCKETS {
            let seconds: f64 = shown.parse().expect("a number");
            assert!((seconds * 1e6 - f64::from(u32::try_from(bound).expect("small"))).abs() < 1e-6);
        }
    }
}
