//! A datasource: one named stream of readings, live.

use std::sync::{Arc, OnceLock};

use super::setting::JsonSetting;
use crate::message::{DatasourceId, Incarnation, Lease, TimeMicros};
use crate::observe::traffic::DatasourceTraffic;

/// One named stream of readings.
#[derive(Debug)]
pub struct Datasource {
    /// The slug.
    pub id: DatasourceId,
    /// The display name.
    pub name: Box<str>,
    /// When it was created.
    pub created_at: TimeMicros,
    /// The limits that all its keys share.
    pub limits: JsonSetting,
    /// The schemas that its messages must match.
    pub schemas: JsonSetting,
    /// Where the event time of its messages is.
    pub event_time: JsonSetting,
    /// Which of the datasources that had this id it is.
    pub incarnation: Incarnation,
    /// Ends when it is deleted. What a key for all datasources sends to it is not appended after that.
    pub lease: Lease,
    /// What it has sent to this gateway; made when it first sends something.
    pub traffic: OnceLock<Arc<DatasourceTraffic>>,
}

impl Datasource {
    /// The id under which what belongs to this incarnation alone is kept.
    pub fn scope(&self) -> DatasourceId {
        self.id.scope(self.incarnation)
    }

    /// What it has sent, to be added to.
    pub(super) fn traffic(&self) -> &DatasourceTraffic {
        self.traffic.get_or_init(Arc::default)
    }
}
