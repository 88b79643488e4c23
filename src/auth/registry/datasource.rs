//! A datasource: one named stream of readings, live.

use super::setting::JsonSetting;
use crate::message::{DatasourceId, Incarnation, Lease, TimeMicros};

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
}

impl Datasource {
    /// The id under which what belongs to this incarnation alone is kept.
    pub fn scope(&self) -> DatasourceId {
        self.id.scope(self.incarnation)
    }
}
