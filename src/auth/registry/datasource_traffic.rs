//! How the registry counts what datasources send: without a lock, and in the incarnation that is there.

use std::sync::Arc;

use super::Registry;
use super::key::Key;
use crate::message::{DatasourceId, TimeMicros};
use crate::observe::traffic::{DatasourceTraffic, TrafficSource};

impl Registry {
    /// Counts messages of a datasource that came in under a key, received at `at`. To be called once for each batch, not
    /// for each message. What came in under a key that has ended since counts for none: another datasource may have the name
    /// now.
    pub fn count_traffic(
        &self,
        key: &Key,
        datasource: &DatasourceId,
        (messages, bytes): (u64, u64),
        at: TimeMicros,
    ) {
        self.with_datasource(datasource.as_str(), |datasource| {
            if key.holds() {
                datasource.traffic().count(messages, bytes, at);
            }
        });
    }

    /// Counts a refusal that was about a datasource, by its id as the client may have written it. Returns whether there is
    /// such a datasource.
    pub fn count_refused(&self, datasource: &str) -> bool {
        !datasource.is_empty()
            && self.with_datasource(datasource, |found| found.traffic().count_refused()).is_some()
    }
}

impl TrafficSource for Registry {
    fn visit(&self, each: &mut dyn FnMut(&DatasourceId, &Arc<DatasourceTraffic>)) {
        for datasource in self.live.datasources.pin().values() {
            if let Some(traffic) = datasource.traffic.get() {
                each(&datasource.id, traffic);
            }
        }
    }

    fn find(&self, datasource: &DatasourceId) -> Option<Arc<DatasourceTraffic>> {
        self.with_datasource(datasource.as_str(), |found| found.traffic.get().cloned()).flatten()
    }
}
