//! Where sessions stand: what each has in flight and how far behind the log it is, for those who look after them. A
//! subscriber that neither takes nor acknowledges anything is counted and said.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::warn;

use super::{ClientEntry, Sessions};
use crate::auth::connections::CloseReason;
use crate::message::{DatasourceId, Offset, TimeMicros, now_micros};
use crate::observe::metrics::Metrics;

/// How many subscribers that have begun to stand still are said one by one each time; the others as a number.
const STILL_SAID_MAX: usize = 8;

/// Where one session stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionStanding {
    /// The client identifier.
    pub client_id: Arc<str>,
    /// Whether the client is connected to this gateway.
    pub is_connected: bool,
    /// Whether it has subscribed to anything, or may have left messages to be sent.
    pub is_subscriber: bool,
    /// Everything below was sent.
    pub cursor: Offset,
    /// How many messages the client has not acknowledged.
    pub in_flight: u32,
    /// Since when it has neither taken nor acknowledged anything, although something is sent or waits to be.
    pub still_since: Option<TimeMicros>,
    /// When the session of a client that is away ends; `None`: never, or it is connected.
    pub expires_at: Option<TimeMicros>,
}

/// Which sessions are asked for beside those that are away, and those of subscribers that are connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum StandingWish {
    /// No others.
    #[default]
    Subscribers,
    /// Only subscribers that stand still.
    StillSubscribers,
    /// Also connected clients that have subscribed to nothing.
    AllClients,
}

impl Sessions {
    /// The sessions under keys of this scope whose clients come after one, in the order of their identifiers: those
    /// that are away, and those of subscribers that are connected, or those of `wish`. At most `count`, and whether
    /// there are more.
    pub(in super::super) fn standings(
        &self,
        scope: &DatasourceId,
        after: Option<&str>,
        count: usize,
        wish: StandingWish,
    ) -> (Vec<SessionStanding>, bool) {
        let (routed, still_after) = (self.subscribers.router.routed_offset(), self.still_after);
        let (now, now_us) = (Instant::now(), now_micros());
        let mut found: BTreeMap<Arc<str>, SessionStanding> = BTreeMap::new();
        for ((of, client_id), entry) in &self.lock_clients().entries {
            let is_beyond =
                found.len() > count && found.last_key_value().is_some_and(|(last, _)| client_id > last);
            if of != scope || is_beyond || after.is_some_and(|after| &**client_id <= after) {
                continue;
            }
            let standing = entry.standing(client_id, routed, still_after, now, now_us);
            let is_wanted = |of: &SessionStanding| match wish {
                StandingWish::Subscribers => of.is_subscriber,
                StandingWish::StillSubscribers => of.still_since.is_some(),
                StandingWish::AllClients => true,
            };
            if let Some(standing) = standing.filter(is_wanted) {
                found.insert(client_id.clone(), standing);
                if found.len() > count + 1 {
                    found.pop_last();
                }
            }
        }
        let has_more = found.len() > count;
        (found.into_values().take(count).collect(), has_more)
    }

    /// Closes the connection of a client under keys of this scope, if it has one here. Its session stays.
    pub(in super::super) fn kick(&self, scope: &DatasourceId, client_id: &str) -> bool {
        let key = (scope.clone(), Arc::from(client_id));
        let clients = self.lock_clients();
        let connected = clients.entries.get(&key).and_then(|entry| entry.connected.as_ref());
        let control = connected.map(|connected| connected.control.clone());
        // Unlocked first: waking a task can drop it, and its guard locks the clients.
        drop(clients);
        control.inspect(|control| control.close(CloseReason::Kicked)).is_some()
    }

    /// Counts the subscribers that stand still, and says which have begun to.
    pub(super) fn look_for_still(&self) {
        let (mut still, mut begun) = (0_u32, Vec::new());
        let mut figures = SessionFigures::default();
        let routed = self.subscribers.router.routed_offset();
        for ((scope, _), entry) in &self.lock_clients().entries {
            let mailbox = entry.connected.as_ref().and_then(|connected| connected.mailbox.as_ref());
            figures.add(entry, mailbox.map(|mailbox| (mailbox.cursor(routed), mailbox.standing().0)));
            let Some((is_new, in_flight)) = mailbox.and_then(|mailbox| mailbox.note_still(self.still_after))
            else {
                continue;
            };
            still += 1;
            if is_new {
                begun.push((scope.clone(), in_flight));
            }
        }
        self.intake.metrics().set_gauge("headgate_subscribers_still", f64::from(still));
        figures.set_gauges(self.intake.metrics(), self.subscribers.log.next_offset());
        let seconds = self.still_after.as_secs();
        for (scope, in_flight) in begun.iter().take(STILL_SAID_MAX) {
            let (datasource, _) = scope.of_scope();
            warn!(
                %datasource, in_flight, seconds,
                "a subscriber stands still: GET /v1/datasources/{datasource}/sessions?still=true names it"
            );
        }
        if let Some(more @ 1..) = begun.len().checked_sub(STILL_SAID_MAX) {
            warn!(more, "and more subscribers stand still");
        }
    }
}

/// All sessions together.
#[derive(Default)]
struct SessionFigures {
    connected: u64,
    subscribers: u64,
    away: u64,
    in_flight: u64,
    /// The least cursor of a subscriber that is connected, and of one that is away.
    cursors: [Option<Offset>; 2],
}

impl SessionFigures {
    /// Adds a session, with the cursor of a connected subscriber and how many messages it has in flight.
    fn add(&mut self, entry: &ClientEntry, subscriber: Option<(Offset, u32)>) {
        let [of_connected, of_away] = &mut self.cursors;
        self.connected += u64::from(entry.connected.is_some());
        if let Some((cursor, in_flight)) = subscriber {
            self.subscribers += 1;
            self.in_flight += u64::from(in_flight);
            *of_connected = Some(of_connected.map_or(cursor, |least| least.min(cursor)));
        } else if let Some(away) = entry.away.as_ref().filter(|_| entry.connected.is_none()) {
            let session = &away.session;
            self.away += 1;
            self.in_flight += session.flights.len() as u64;
            if session.subscription_count() > 0 {
                *of_away = Some(of_away.map_or(session.position, |least| least.min(session.position)));
            }
        }
    }

    #[expect(clippy::cast_precision_loss, reason = "a metric is an f64; exact up to 2^53")]
    fn set_gauges(&self, metrics: &Metrics, log_end: Offset) {
        let lag = |cursor: Option<Offset>| cursor.map_or(0, |cursor| log_end.saturating_sub(cursor));
        let [of_connected, of_away] = self.cursors;
        for (name, value) in [
            ("headgate_mqtt_sessions", self.connected + self.away),
            ("headgate_mqtt_sessions_away", self.away),
            ("headgate_mqtt_subscribers", self.subscribers),
            ("headgate_mqtt_inflight_messages", self.in_flight),
            ("headgate_subscriber_lag_records", lag(of_connected)),
            ("headgate_session_away_lag_records", lag(of_away)),
        ] {
            metrics.set_gauge(name, value as f64);
        }
    }
}

impl ClientEntry {
    fn standing(
        &self,
        client_id: &Arc<str>,
        routed: Offset,
        still_after: Duration,
        now: Instant,
        now_us: TimeMicros,
    ) -> Option<SessionStanding> {
        let micros = |time: Duration| TimeMicros::try_from(time.as_micros()).unwrap_or(TimeMicros::MAX);
        let client_id = client_id.clone();
        if let Some(mailbox) = self.connected.as_ref().and_then(|connected| connected.mailbox.as_ref()) {
            let (in_flight, still_since) = mailbox.standing();
            let still = still_since.map(|since| now.saturating_duration_since(since));
            return Some(SessionStanding {
                client_id,
                is_connected: true,
                is_subscriber: true,
                cursor: mailbox.cursor(routed),
                in_flight,
                still_since: still.filter(|for_| *for_ >= still_after).map(|for_| now_us - micros(for_)),
                expires_at: None,
            });
        }
        if self.connected.is_some() {
            return Some(SessionStanding {
                client_id,
                is_connected: true,
                is_subscriber: false,
                cursor: routed,
                in_flight: 0,
                still_since: None,
                expires_at: None,
            });
        }
        let away = self.away.as_ref()?;
        let left = away.expires_at.map(|at| at.saturating_duration_since(now));
        Some(SessionStanding {
            client_id,
            is_connected: false,
            is_subscriber: true,
            cursor: away.session.position,
            in_flight: u32::try_from(away.session.flights.len()).unwrap_or(u32::MAX),
            still_since: None,
            expires_at: left.map(|left| now_us.saturating_add(micros(left))),
        })
    }
}
