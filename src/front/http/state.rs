//! What every handler shares: the front's parts, and what it counts, holds and has open.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::Request;
use axum::http::HeaderValue;
use axum::http::request::Parts as RequestParts;
use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::answer::RequestMemory;
use super::body::{self, BodyLimits};
use super::credentials::Caller;
use super::dashboard::browser_sessions::BrowserSessions;
use super::parts::HttpFrontParts;
use super::redrive::RedriveTurns;
use super::request_meter::RequestMeter;
use super::server::{HttpCrowd, HttpPeer};
use super::stream::StreamReaders;
use super::{live, messages};
use crate::auth::failures::AuthFailures;
use crate::auth::{Datasource, Grant, Key, Registry};
use crate::front::problem::Problem;
use crate::intake::Refusal;
use crate::limits::{HTTP_BODY_PACE_WINDOW, HTTP_MANAGE_BYTES_MAX, REVOCATION_WAIT_MAX};
use crate::memory::MemoryAccount;
use crate::message::DatasourceId;
use crate::observe::cause::Cause;
use crate::quota::{Limit, LimitExceeded};

/// What every handler may use.
pub struct HttpFrontState {
    pub parts: HttpFrontParts,
    /// The connections, for their number.
    pub crowd: HttpCrowd,
    /// A permit for each large body that may be made a draft at once: what that takes meanwhile is not all charged.
    pub parses: Arc<Semaphore>,
    /// Counts leak reports by source address.
    pub leak_reports: AuthFailures,
    /// Counts requests by route.
    pub requests: RequestMeter,
    /// Held while limits are changed, so that of two concurrent changes neither is lost.
    pub limiting: Mutex<()>,
    /// Held while the schemas of a datasource are read and set, so that no version number is used twice.
    pub setting_schemas: Mutex<()>,
    /// The streams that are open.
    pub streams: Arc<StreamReaders>,
    /// Who watches what happens.
    pub live_places: live::LivePlaces,
    /// Who has signed in on the dashboard.
    pub browser_sessions: BrowserSessions,
    /// The redrives, one at a time of each datasource.
    pub redrives: Arc<RedriveTurns>,
    pub drain: CancellationToken,
    /// What says in answers how long a connection may be idle.
    pub keep_alive: HeaderValue,
}

impl HttpFrontState {
    pub fn registry(&self) -> &Arc<Registry> {
        self.parts.intake.authorizer().registry()
    }

    /// The datasource that a path names. Call it only after the caller is authorized for that id.
    pub fn datasource(&self, id: &str) -> Result<Arc<Datasource>, Problem> {
        self.registry().datasource(id).ok_or_else(|| no_datasource(id))
    }

    /// Fails if a datasource has `times` as many live keys as its limit allows.
    pub fn check_key_count(&self, datasource: &DatasourceId, times: u64) -> Result<(), Problem> {
        let setting = self.parts.intake.count_limit(datasource, Limit::Keys);
        if (self.registry().keys(datasource).len() as u64) < setting.max.saturating_mul(times) {
            return Ok(());
        }
        Err(Refusal::from(LimitExceeded::of_count(Limit::Keys, setting, datasource)).into())
    }

    /// Waits until nothing more can come in under keys that a call has ended and their connections are
    /// closed. The caller's own connection is not waited for: it closes after this answer.
    pub async fn settle(&self, caller: &Caller, dead: &[Arc<Key>], called: Instant) {
        dead.iter().for_each(|key| caller.1.keys.leave(key.id));
        let settled = self.parts.intake.settle(dead, called);
        // Without its cluster the log may not answer for long; the keys are dead here all the same.
        if self.registry().trouble().is_none() {
            settled.await;
        } else if tokio::time::timeout(REVOCATION_WAIT_MAX, settled).await.is_err() {
            tracing::warn!("the log has not confirmed the end of a key; nothing new is let in under it");
        }
    }

    pub fn body_limits(&self) -> BodyLimits {
        let config = &self.parts.config;
        let time_max = Duration::from_millis(config.body_ms_max);
        let (bytes_max, setting) = (config.body_bytes_max, "http.body_bytes_max");
        BodyLimits { bytes_max, setting, time_max, pace_window: HTTP_BODY_PACE_WINDOW }
    }

    /// Who is charged for what a request brings: its key, or the address of a stranger.
    pub fn account_of(&self, request: &RequestParts) -> Arc<MemoryAccount> {
        let of_key = request.extensions.get::<RequestMemory>().and_then(RequestMemory::account);
        of_key.unwrap_or_else(|| {
            let peer = request.extensions.get::<HttpPeer>();
            let address = peer.map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), |peer| peer.addr.ip());
            self.parts.intake.memory().account_of_stranger(address)
        })
    }

    /// Reads and parses the body of a management request. Unknown fields are refused: to ignore one
    /// would promise what it asks for.
    pub async fn read_json<T: DeserializeOwned>(&self, request: Request) -> Result<T, Problem> {
        self.read_json_up_to(request, HTTP_MANAGE_BYTES_MAX).await
    }

    /// As [`HttpFrontState::read_json`], with a limit of its own.
    pub async fn read_json_up_to<T: DeserializeOwned>(
        &self,
        request: Request,
        bytes_max: usize,
    ) -> Result<T, Problem> {
        let (parts, body) = request.into_parts();
        let limits = BodyLimits { bytes_max, setting: "", ..self.body_limits() };
        let received = body::read(&parts.headers, body, limits, &self.account_of(&parts)).await?;
        // A body may take a minute, in which the key may have died: what it asks for would outlive the key.
        if let Some(grant) = parts.extensions.get::<Grant>() {
            grant.check().map_err(|denied| Problem::from(denied).after_body_read())?;
        }
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

pub fn no_datasource(id: &str) -> Problem {
    let id: String = id.chars().take(64).collect();
    Problem::new(Cause::NoDatasource, format!("There is no datasource {id:?}."))
}
