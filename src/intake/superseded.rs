//! Marks of messages in quarantine that were let in, or that a corrected message has taken the place of.

use std::time::Instant;

use super::{Intake, Refusal};
use crate::auth::{Datasource, Grant, GrantDenial, Scope};
use crate::log::{AppendError, RecordNote, Section, SectionOutcome};
use crate::message::{Offset, RecordRef, now_micros};

impl Intake {
    /// Marks messages in quarantine as let in, given with the offset of what was let in: themselves, or a corrected
    /// message in their place. So they are not let in again when their ids are forgotten.
    ///
    /// # Errors
    /// [`Refusal::Denied`], and every transient [`Refusal`] of the log.
    pub async fn mark_superseded(
        &self,
        grant: &Grant,
        datasource: &Datasource,
        superseded: &[(RecordRef<'_>, Offset)],
    ) -> Result<(), Refusal> {
        grant.allows(Scope::Admin, datasource.id.as_str())?;
        let received_at = now_micros();
        let mark = |(record, by): &(RecordRef<'_>, Offset)| {
            let note = RecordNote::Superseded { offset: record.offset, by: *by };
            let RecordRef { key_id, transport, publisher, topic, .. } = *record;
            let (id, lease) = (datasource.id.clone(), grant.lease().clone());
            let mut section = Section::new(id, key_id, lease, transport, publisher, received_at);
            section.bind_to(datasource.lease.clone());
            section.push_noted(topic, &[], "", &[], note.flag(), &note.encode());
            section
        };
        let marks = superseded.iter().map(mark).collect();
        let committed = self.0.log.append(marks, Instant::now()).await.unwrap_or(Err(AppendError::Closed))?;
        let died = committed.outcomes.contains(&SectionOutcome::KeyDead);
        if died { Err(GrantDenial::Revoked.into()) } else { Ok(()) }
    }
}
