//! A datasource: one named stream of readings, live.

use super::setting::JsonSetting;
use crate::message::{DatasourceId, TimeMicros};

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
}
