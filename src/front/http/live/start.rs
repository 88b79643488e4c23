//! What the live view begins with: the datasources that its watcher may see, what they have had so far, and their last
//! minute second by second, as far as that is in memory.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Serialize;

use super::digest::visible_records;
use super::{LiveView, write_event};
use crate::auth::Datasource;
use crate::front::http::HttpFrontState;
use crate::front::http::credentials::Caller;
use crate::front::problem::Problem;
use crate::limits::{
    LIVE_DATASOURCES_MAX, LIVE_HISTORY_RECORDS_MAX, LIVE_HISTORY_S, LIVE_KEYS_MAX, LIVE_SCAN_BYTES_MAX,
    USAGE_KEYS_PER_CHANGE,
};
use crate::message::{DatasourceId, Incarnation, Offset, RecordFlags, TimeMicros, now_micros};
use crate::time::Rfc3339;

/// A datasource, as the live view lists it.
#[derive(Serialize)]
struct LiveDatasourceView<'a> {
    id: &'a DatasourceId,
    name: &'a str,
    created_at: Rfc3339,
    incarnation: Incarnation,
}

/// The datasources that there are.
#[derive(Serialize)]
struct LiveDatasourceList<'a> {
    datasources: Vec<LiveDatasourceView<'a>>,
    /// How many more there are than are listed.
    more: usize,
}

/// What a datasource has had so far, by the usage of the keys that it has.
#[derive(Default, Serialize)]
struct DatasourceTotals {
    accepted: u64,
    refused: u64,
    last_at: Option<Rfc3339>,
}

/// The first event.
#[derive(Serialize)]
struct LiveHello<'a> {
    version: &'a str,
    at: Rfc3339,
    log_end: Offset,
    #[serde(flatten)]
    list: LiveDatasourceList<'a>,
    totals: BTreeMap<&'a str, DatasourceTotals>,
    /// For each datasource its records in each of the last seconds, the newest last.
    history: BTreeMap<String, Vec<u32>>,
}

/// What has to be read for the first event.
pub(super) struct LiveStart {
    view: LiveView,
}

impl LiveStart {
    pub(super) fn of(view: &LiveView, caller: &Caller) -> Self {
        let LiveView { scope, filter, is_admin, .. } = view;
        let is_gateway_admin = caller.require_gateway_admin().is_ok();
        Self {
            view: LiveView {
                scope: scope.clone(),
                filter: filter.clone(),
                is_admin: *is_admin,
                is_gateway_admin,
            },
        }
    }

    /// The first event. Blocks on the registry.
    pub(super) fn render(&self, shared: &HttpFrontState, next: Offset) -> Result<Vec<u8>, Problem> {
        let (present, more) = visible_datasources(shared, &self.view);
        let mut totals = BTreeMap::new();
        let mut keys_left = LIVE_KEYS_MAX;
        for datasource in &present {
            let keys = shared.registry().keys(&datasource.id);
            let Some(left) = keys_left.checked_sub(keys.len()) else { continue };
            keys_left = left;
            let mut sum = DatasourceTotals::default();
            // Changes of the registry wait during each read.
            for some in keys.chunks(USAGE_KEYS_PER_CHANGE) {
                for used in shared.registry().usage(some)? {
                    sum.accepted += used.accepted;
                    sum.refused += used.refused;
                }
            }
            totals.insert(datasource.id.as_str(), sum);
        }
        let now = now_micros();
        let mut hello = LiveHello {
            version: env!("CARGO_PKG_VERSION"),
            at: Rfc3339(now),
            log_end: next,
            list: LiveDatasourceList { datasources: present.iter().map(datasource_view).collect(), more },
            totals,
            history: BTreeMap::new(),
        };
        add_history(shared, &self.view, next, now, &mut hello);
        let mut out = b"retry: 1000\n\n".to_vec();
        write_event(&mut out, "hello", &hello);
        Ok(out)
    }
}

fn datasource_view(datasource: &Arc<Datasource>) -> LiveDatasourceView<'_> {
    let Datasource { id, name, created_at, incarnation, .. } = &**datasource;
    LiveDatasourceView { id, name, created_at: Rfc3339(*created_at), incarnation: *incarnation }
}

/// The event that says which datasources there are.
pub(super) fn datasource_list(present: &[Arc<Datasource>], more: usize) -> impl Serialize {
    LiveDatasourceList { datasources: present.iter().map(datasource_view).collect(), more }
}

/// The datasources that a watcher may see, and how many more there are.
pub(super) fn visible_datasources(shared: &HttpFrontState, view: &LiveView) -> (Vec<Arc<Datasource>>, usize) {
    if !view.scope.is_all() {
        let (id, _) = view.scope.of_scope();
        return (shared.registry().datasource(id.as_str()).into_iter().collect(), 0);
    }
    let mut all = shared.registry().datasources();
    let more = all.len().saturating_sub(LIVE_DATASOURCES_MAX);
    all.truncate(LIVE_DATASOURCES_MAX);
    (all, more)
}

/// Adds the last minute, as far as its records are in memory, and when the last record of each datasource came.
fn add_history(
    shared: &HttpFrontState,
    view: &LiveView,
    next: Offset,
    now: TimeMicros,
    hello: &mut LiveHello<'_>,
) {
    const SECOND: TimeMicros = 1_000_000;
    let log = &*shared.parts.log;
    let mut back = LIVE_HISTORY_RECORDS_MAX.min(next);
    let batches = loop {
        if back == 0 {
            break Vec::new();
        }
        match log.read_recent(next - back, LIVE_SCAN_BYTES_MAX) {
            Some(batches) if batches.last().is_some_and(|last| last.next_offset() >= next) => break batches,
            _ => back /= 2,
        }
    };
    for record in visible_records(log, &batches, next.saturating_sub(back), view) {
        let totals = hello.totals.get_mut(record.datasource);
        if let Some(totals) = totals {
            totals.last_at = Some(Rfc3339(record.received_at));
        }
        if record.flags.contains(RecordFlags::QUARANTINED) {
            continue;
        }
        let age_s = usize::try_from((now - record.received_at).max(0) / SECOND).unwrap_or(usize::MAX);
        if age_s < LIVE_HISTORY_S {
            let seconds = hello.history.entry(record.datasource.to_owned());
            seconds.or_insert_with(|| vec![0; LIVE_HISTORY_S])[LIVE_HISTORY_S - 1 - age_s] += 1;
        }
    }
}
