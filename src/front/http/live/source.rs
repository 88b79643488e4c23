//! What the live view's chunks are made of: each second a digest of the log, and an event for each thing that has changed.
//! A watcher that does not take what it is sent gets the next second when it has; nothing waits for it meanwhile.

use std::future::Future;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use serde::Serialize;
use serde_json::json;
use tokio::time::{Instant, Sleep};

use super::digest::look;
use super::places::LivePlace;
use super::start::{datasource_list, visible_datasources};
use super::{LiveView, write_event};
use crate::auth::{Grant, Scope};
use crate::front::http::HttpFrontState;
use crate::front::http::answer::AnswerHold;
use crate::front::http::dashboard::browser_sessions::SessionDigest;
use crate::front::http::probes::{Readiness, readiness_of};
use crate::front::http::request_clock::StreamUnderWay;
use crate::front::http::sinks::{SinkView, sinks_and_end};
use crate::front::http::stream::{ChunkSource, StreamEnd, StreamReader};
use crate::limits::HTTP_REQUEST_BYTES;
use crate::message::{DatasourceId, Incarnation, Offset, TimeMicros, now_micros};

/// How often a watcher hears something.
const LIVE_INTERVAL: Duration = Duration::from_secs(1);

/// Where the chunks of a live view come from.
pub(super) struct LiveSource {
    shared: Arc<HttpFrontState>,
    grant: Grant,
    /// The session of the page that watches, which it ends with.
    session: Option<SessionDigest>,
    _place: LivePlace,
    view: LiveView,
    /// The first event.
    hello: Option<Vec<u8>>,
    timer: Pin<Box<Sleep>>,
    /// The first offset that was not looked at.
    next: Offset,
    looked_at: Instant,
    told: ToldState,
    is_over: bool,
    /// What its request is charged for.
    hold: Option<AnswerHold>,
    /// Its connection is not idle.
    under_way: Option<StreamUnderWay>,
}

/// What the watcher was told last.
#[derive(Default)]
struct ToldState {
    datasources: Vec<(DatasourceId, Incarnation)>,
    health: Vec<u8>,
    keys: Option<u64>,
    refusals: Option<(TimeMicros, u64)>,
}

/// The event that says how the gateway is.
#[derive(Serialize)]
struct HealthEvent {
    readiness: Readiness,
    #[serde(skip_serializing_if = "Option::is_none")]
    gateway: Option<GatewayHealth>,
}

/// What only admins of the gateway are told.
#[derive(Serialize)]
struct GatewayHealth {
    log_first: Offset,
    log_end: Offset,
    log_bytes: u64,
    sinks: Vec<SinkView>,
    egress: Option<EgressHealth>,
    /// Open streams over HTTP, and how many of their clients take nothing.
    streams: (usize, usize),
    keys: usize,
}

/// How far the records are that go to NATS.
#[derive(Serialize)]
struct EgressHealth {
    cursor: Offset,
    lag: u64,
    sent: u64,
    trouble: Option<String>,
}

impl LiveSource {
    pub(super) fn new(
        shared: Arc<HttpFrontState>,
        (grant, session): (Grant, Option<SessionDigest>),
        place: LivePlace,
        view: LiveView,
        next: Offset,
        hello: Vec<u8>,
    ) -> Self {
        // The rest of what it begins with comes at once.
        let timer = Box::pin(tokio::time::sleep(Duration::ZERO));
        let (present, _) = visible_datasources(&shared, &view);
        let told = ToldState { datasources: ids_of(&present), ..ToldState::default() };
        Self {
            shared,
            grant,
            session,
            _place: place,
            view,
            hello: Some(hello),
            timer,
            next,
            looked_at: Instant::now(),
            told,
            is_over: false,
            hold: None,
            under_way: None,
        }
    }

    /// Why it has to end here, if it has to.
    fn find_end(&self, reader: &StreamReader) -> Option<StreamEnd> {
        let (datasource, _) = self.view.scope.of_scope();
        if !self.view.scope.is_all() {
            let present = self.shared.registry().datasource(datasource.as_str());
            if present.is_none_or(|present| present.scope() != self.view.scope) {
                return Some(StreamEnd::DatasourceDeleted);
            }
        }
        if self.grant.allows(Scope::Subscribe, datasource.as_str()).is_err() {
            return Some(StreamEnd::KeyDead);
        }
        let session = self.session.as_ref();
        if session.is_some_and(|of| !self.shared.browser_sessions.keep(of, std::time::Instant::now())) {
            return Some(StreamEnd::SessionOver);
        }
        reader.told()
    }

    fn finish(&mut self, why: StreamEnd) -> Vec<u8> {
        let mut out = Vec::new();
        write_event(&mut out, "end", &json!({ "reason": why.name(), "detail": why.words() }));
        self.note_end(why);
        self.is_over = true;
        out
    }

    /// Everything that is to be told now.
    fn render(&mut self) -> Vec<u8> {
        let mut out = Vec::new();
        let now = Instant::now();
        let seconds = now.duration_since(self.looked_at).as_secs_f64();
        let (digest, next) = look(&*self.shared.parts.log, &self.view, self.next, seconds, now_micros());
        (self.next, self.looked_at) = (next, now);
        let (present, more) = visible_datasources(&self.shared, &self.view);
        let ids = ids_of(&present);
        if ids != self.told.datasources {
            write_event(&mut out, "datasources", &datasource_list(&present, more));
            self.told.datasources = ids;
        }
        write_event(&mut out, "tick", &digest);
        self.render_health(&mut out);
        if self.view.is_admin {
            self.render_keys(&mut out);
            self.render_refusals(&mut out);
        }
        out
    }

    fn render_health(&mut self, out: &mut Vec<u8>) {
        let gateway = self.view.is_gateway_admin.then(|| GatewayHealth::of(&self.shared));
        let health = HealthEvent { readiness: readiness_of(&self.shared), gateway };
        let mut event = Vec::new();
        write_event(&mut event, "health", &health);
        if event != self.told.health {
            out.extend_from_slice(&event);
            self.told.health = event;
        }
    }

    /// Says that the keys of the datasource have changed, or who uses them.
    fn render_keys(&mut self, out: &mut Vec<u8>) {
        if !self.view.is_of_one() {
            return;
        }
        let (datasource, _) = self.view.scope.of_scope();
        let keys = self.shared.registry().keys(&datasource);
        let mut hash = DefaultHasher::new();
        let mut connections = 0;
        for key in &keys {
            let rotation = key.rotation();
            let of_key = (key.id.0, key.connection_count(), key.has_expired());
            (of_key, rotation.replaces.map(|id| id.0), rotation.replaced_by.map(|(id, at)| (id.0, at)))
                .hash(&mut hash);
            connections += key.connection_count();
        }
        let state = hash.finish();
        if self.told.keys.replace(state) != Some(state) {
            write_event(out, "keys", &json!({ "keys": keys.len(), "connections": connections }));
        }
    }

    /// Says that something was refused.
    fn render_refusals(&mut self, out: &mut Vec<u8>) {
        let (datasource, _) = self.view.scope.of_scope();
        let of = (!self.view.scope.is_all()).then_some(datasource.as_str());
        let state = self.shared.parts.intake.refusals().state(of);
        if self.told.refusals.replace(state) != Some(state) {
            write_event(out, "refusals", &json!({ "count": state.1 }));
        }
    }
}

impl GatewayHealth {
    fn of(shared: &HttpFrontState) -> Self {
        let parts = &shared.parts;
        let (sinks, log_end) = sinks_and_end(shared);
        let egress = parts.egress.as_ref().map(|egress| {
            let counts = egress.counts();
            let cursor = counts.cursor();
            let lag = log_end.saturating_sub(cursor);
            EgressHealth { cursor, lag, sent: counts.sent(), trouble: egress.trouble() }
        });
        Self {
            log_first: parts.log.first_offset(),
            log_end,
            log_bytes: parts.log.bytes(),
            sinks,
            egress,
            streams: shared.streams.counts(),
            keys: shared.registry().key_count(),
        }
    }
}

impl ChunkSource for LiveSource {
    fn scope(&self) -> &DatasourceId {
        &self.view.scope
    }

    fn hold(&mut self, hold: AnswerHold) {
        self.hold = Some(hold);
    }

    fn note_under_way(&mut self, under_way: StreamUnderWay) {
        self.under_way = Some(under_way);
    }

    fn note_end(&self, why: StreamEnd) {
        if !self.is_over {
            self.shared.parts.metrics.count_stream_end(why.name());
            tracing::debug!(key_id = %self.grant.key_id(), reason = why.name(), "a live view has ended");
        }
    }

    fn poll_chunk(&mut self, reader: &StreamReader, cx: &mut Context<'_>) -> Poll<Option<Vec<u8>>> {
        if self.is_over {
            return Poll::Ready(None);
        }
        let unsent = reader.unsent_bytes();
        if let Some(hold) = &mut self.hold {
            hold.memory.set_held(HTTP_REQUEST_BYTES + unsent);
        }
        if let Some(why) = self.find_end(reader) {
            return Poll::Ready(Some(self.finish(why)));
        }
        if let Some(hello) = self.hello.take() {
            return Poll::Ready(Some(hello));
        }
        let is_probed = reader.takes_probe();
        if self.timer.as_mut().poll(cx).is_pending() && !is_probed {
            return Poll::Pending;
        }
        self.timer.as_mut().reset(Instant::now() + LIVE_INTERVAL);
        // So that it wakes the task.
        let _ = self.timer.as_mut().poll(cx);
        if unsent > 0 && !is_probed {
            return Poll::Pending;
        }
        Poll::Ready(Some(self.render()))
    }
}

fn ids_of(present: &[Arc<crate::auth::Datasource>]) -> Vec<(DatasourceId, Incarnation)> {
    present.iter().map(|of| (of.id.clone(), of.incarnation)).collect()
}
