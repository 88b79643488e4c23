//! What Telegraf and the clients of InfluxDB say, so that they publish line protocol here unchanged: `POST /api/v2/write`
//! (InfluxDB 2), `POST /write` (1.x), and what clients ask before they write: `/ping`, `/health`, and `/query` as far as it
//! creates databases.
//!
//! The bucket or database is the datasource, and the API key is the token or the password (see [`presented`]). A request is
//! then what it is at `/v1/ingest`: one record for each line, all of them or none, and the answer when they are durable:
//! 204, as those clients expect it. Refusals are those of every other request, in the form that InfluxDB gives them
//! ([`answer`]).
//!
//! `org`, `rp`, `consistency` and other parameters say nothing here: what a key may do says the key, and for how long
//! records are kept the gateway.

mod answer;
mod presented;

use std::sync::Arc;

use axum::Json;
use axum::extract::{Query, Request, State};
use axum::http::{HeaderName, HeaderValue, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use headgate_format::line::TimePrecision;
use serde::Deserialize;
use serde_json::json;

use self::answer::InfluxDialect;
use self::presented::influx_key;
use super::HttpFrontState;
use super::body::{self, BodyLimits};
use super::credentials::{Caller, DataCaller};
use super::ingest::{self, IngestDestination};
use super::limits::rate_headers;
use crate::auth::{Grant, Scope};
use crate::front::problem::Problem;
use crate::limits::HTTP_MANAGE_BYTES_MAX;
use crate::message::DatasourceId;
use crate::observe::cause::Cause;

pub(super) use answer::in_dialect_of;

/// Where clients of InfluxDB 2 write.
const WRITE_V2_PATH: &str = "/api/v2/write";
/// Where those of InfluxDB 1.x do.
const WRITE_V1_PATH: &str = "/write";
/// Where those create databases.
const QUERY_PATH: &str = "/query";
/// What every answer to `/ping` has, and clients read a version from.
const VERSION_HEADER: &str = "x-influxdb-version";
/// Says which program that is the version of.
const BUILD_HEADER: &str = "x-influxdb-build";

/// The query of a request that writes. What else it names is not read.
#[derive(Deserialize)]
struct WriteQuery {
    bucket: Option<String>,
    db: Option<String>,
    precision: Option<String>,
}

impl WriteQuery {
    fn read(uri: &Uri) -> Result<Self, Problem> {
        let Query(query) = Query::try_from_uri(uri)?;
        Ok(query)
    }

    /// The name of the datasource, as each version has it.
    fn datasource(&self, dialect: InfluxDialect) -> Option<&str> {
        let named = match dialect {
            InfluxDialect::V1 => &self.db,
            InfluxDialect::V2 => &self.bucket,
        };
        named.as_deref().filter(|name| !name.is_empty())
    }

    fn precision(&self) -> Result<TimePrecision, Problem> {
        match self.precision.as_deref() {
            None | Some("") => Ok(TimePrecision::default()),
            Some(name) => TimePrecision::parse(name).ok_or_else(|| ingest::unknown_precision(name)),
        }
    }
}

/// `POST /api/v2/write?bucket=DATASOURCE[&precision=]`
pub(super) async fn write_v2(State(shared): State<Arc<HttpFrontState>>, request: Request) -> Response {
    let written = write(&shared, InfluxDialect::V2, request).await;
    written.unwrap_or_else(|problem| InfluxDialect::V2.refuse(problem))
}

/// `POST /write?db=DATASOURCE[&precision=]`
pub(super) async fn write_v1(State(shared): State<Arc<HttpFrontState>>, request: Request) -> Response {
    let written = write(&shared, InfluxDialect::V1, request).await;
    written.unwrap_or_else(|problem| InfluxDialect::V1.refuse(problem))
}

async fn write(
    shared: &HttpFrontState,
    dialect: InfluxDialect,
    request: Request,
) -> Result<Response, Problem> {
    let (parts, body) = request.into_parts();
    let presented = influx_key(&parts.headers);
    let key = presented.as_deref().map_err(Clone::clone);
    let DataCaller(caller) = DataCaller::identify(&parts, shared, key).await?;
    let query = WriteQuery::read(&parts.uri)?;
    let datasource = named_datasource(&caller.0, query.datasource(dialect), dialect)?.to_owned();
    let destination = IngestDestination {
        datasource: &datasource,
        topic: String::new(),
        content_type: String::new(),
        precision: Some(query.precision()?),
    };
    let request = Request::from_parts(parts, body);
    let (_, standing) = ingest::keep(shared, caller, destination, request).await?;
    let mut response = StatusCode::NO_CONTENT.into_response();
    response.headers_mut().extend(standing.iter().flat_map(rate_headers));
    Ok(response)
}

/// The datasource that a request names, or that of its key.
fn named_datasource<'a>(
    grant: &'a Grant,
    named: Option<&'a str>,
    dialect: InfluxDialect,
) -> Result<&'a str, Problem> {
    match named {
        Some(named) => Ok(named),
        None if !grant.datasource().is_all() => Ok(grant.datasource().as_str()),
        None => {
            let parameter = dialect.datasource_parameter();
            let words =
                format!("A key for all datasources writes to one of them: say '{parameter}=DATASOURCE'.");
            Err(Problem::new(Cause::Malformed, words))
        }
    }
}

/// `POST /query`: creates a database, which has to be a datasource that is there. Clients of InfluxDB 1.x do that before
/// they write.
pub(super) async fn query(State(shared): State<Arc<HttpFrontState>>, request: Request) -> Response {
    let answered = create_database(&shared, request).await;
    answered.unwrap_or_else(|problem| InfluxDialect::V1.refuse(problem))
}

/// The query, or the form, of a request that asks something.
#[derive(Deserialize)]
struct StatementQuery {
    q: Option<String>,
}

async fn create_database(shared: &HttpFrontState, request: Request) -> Result<Response, Problem> {
    let (parts, body) = request.into_parts();
    let presented = influx_key(&parts.headers);
    let DataCaller(Caller(grant, _)) =
        DataCaller::identify(&parts, shared, presented.as_deref().map_err(Clone::clone)).await?;
    let Query(StatementQuery { q }) = Query::try_from_uri(&parts.uri)?;
    let statement = match q {
        // The client for Python may announce gzip then, and send nothing.
        Some(in_url) => in_url,
        None => {
            let limits = BodyLimits { bytes_max: HTTP_MANAGE_BYTES_MAX, setting: "", ..shared.body_limits() };
            let received = body::read(&parts.headers, body, limits, &shared.account_of(&parts)).await?;
            // A form is written as a query is.
            let form = Uri::try_from([b"/?", &received.bytes[..]].concat()).ok();
            let form = form.and_then(|form| Query::<StatementQuery>::try_from_uri(&form).ok());
            form.and_then(|Query(form)| form.q).unwrap_or_default()
        }
    };
    let Some(name) = created_database(&statement) else {
        let words = "Nothing is queried here in InfluxQL: /v1/datasources/{datasource}/records, latest and series are for \
            reading. CREATE DATABASE is answered, for a datasource that is there.";
        return Err(Problem::new(Cause::Malformed, words).after_body_read());
    };
    let allowed = grant.allows(Scope::Ingest, name).map_err(Problem::from);
    allowed.and_then(|()| shared.datasource(name)).map_err(Problem::after_body_read)?;
    Ok(Json(json!({"results": [{"statement_id": 0}]})).into_response())
}

/// The name of the database in `CREATE DATABASE name [WITH …]`.
fn created_database(statement: &str) -> Option<&str> {
    let mut rest = statement.trim_ascii();
    for word in ["create", "database"] {
        let (found, after) = rest.split_once(|c: char| c.is_ascii_whitespace())?;
        rest = found.eq_ignore_ascii_case(word).then(|| after.trim_ascii_start())?;
    }
    let (name, rest) = match rest.strip_prefix('"') {
        Some(quoted) => quoted.split_once('"')?,
        None => {
            let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && !matches!(c, '-' | '_'));
            rest.split_at(end.unwrap_or(rest.len()))
        }
    };
    let rest = rest.trim_ascii().trim_end_matches(';').trim_ascii();
    let is_whole = rest.is_empty() || rest.get(..5).is_some_and(|with| with.eq_ignore_ascii_case("with "));
    (is_whole && !name.is_empty()).then_some(name)
}

/// `GET /ping`: the process serves. Clients read a version there.
pub(super) async fn ping() -> Response {
    let headers = [
        (
            HeaderName::from_static(VERSION_HEADER),
            HeaderValue::from_static(concat!("headgate-", env!("CARGO_PKG_VERSION"))),
        ),
        (HeaderName::from_static(BUILD_HEADER), HeaderValue::from_static("Headgate")),
    ];
    (StatusCode::NO_CONTENT, headers).into_response()
}

/// `GET /health`: whether messages can be taken, in the words of InfluxDB 2. `/readyz` says why not.
pub(super) async fn health(State(shared): State<Arc<HttpFrontState>>) -> Response {
    let takes = shared.parts.log.trouble().is_none() && !shared.drain.is_cancelled();
    let (code, status, message) = match takes {
        true => (StatusCode::OK, "pass", "ready for writes"),
        false => (StatusCode::SERVICE_UNAVAILABLE, "fail", "no message can be taken now: see /readyz"),
    };
    let document = json!({"name": "headgate", "message": message, "status": status, "checks": []});
    (code, Json(document)).into_response()
}

/// The datasource that a request to write names, for its refusal.
pub(super) fn datasource_named(uri: &Uri) -> Option<String> {
    let dialect = InfluxDialect::of_path(uri.path())?;
    let name = WriteQuery::read(uri).ok()?.datasource(dialect)?.to_owned();
    DatasourceId::new(&name).is_ok().then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_database_is_created_in_the_ways_that_clients_write_it() {
        for (statement, name) in [
            ("CREATE DATABASE \"press-4\"", Some("press-4")),
            ("create  database press-4;", Some("press-4")),
            (" CREATE\tDATABASE \"press-4\" WITH DURATION 1d NAME \"x\" ", Some("press-4")),
            ("CREATE DATABASE telegraf_1 with replication 1", Some("telegraf_1")),
            ("CREATE DATABASE \"a\"; DROP DATABASE \"b\"", None),
            ("CREATE DATABASE", None),
            ("CREATE DATABASE ", None),
            ("CREATE DATABASE \"\"", None),
            ("CREATE DATABASE \"a", None),
            ("CREATE DATABASE a b", None),
            ("SHOW DATABASES", None),
            ("SELECT * FROM x", None),
            ("", None),
        ] {
            assert_eq!(created_database(statement), name, "{statement:?}");
        }
    }

    #[test]
    fn the_datasource_and_the_precision_are_named_as_in_each_version() {
        let read = |uri: &'static str| WriteQuery::read(&Uri::from_static(uri)).expect("a query");
        let query = read("/write?db=press-4&rp=autogen&consistency=one&precision=s");
        assert_eq!(query.datasource(InfluxDialect::V1), Some("press-4"));
        assert_eq!(query.datasource(InfluxDialect::V2), None);
        assert_eq!(query.precision().map_err(|p| p.kind()), Ok(TimePrecision::Seconds));
        let query = read("/api/v2/write?org=&bucket=press-4");
        assert_eq!(query.datasource(InfluxDialect::V2), Some("press-4"));
        assert_eq!(query.precision().map_err(|p| p.kind()), Ok(TimePrecision::Nanoseconds));
        assert!(read("/write?precision=day").precision().is_err());
        assert_eq!(read("/write?db=").datasource(InfluxDialect::V1), None);
        let named = |uri| datasource_named(&Uri::from_static(uri));
        assert_eq!(named("/api/v2/write?bucket=press-4").as_deref(), Some("press-4"));
        assert_eq!(named("/write?db=Press+4"), None);
        assert_eq!(named("/v1/datasources?db=press-4"), None);
    }
}
