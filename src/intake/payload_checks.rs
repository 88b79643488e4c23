//! What intake looks for in a payload, by the settings of its datasource: whether it meets its schema, and when it was
//! measured.

use std::sync::Arc;

use headgate_format::codec::properties::Properties;

use crate::auth::Datasource;
use crate::log::QuarantineReason;
use crate::message::TimeMicros;
use crate::validate::Validation;
use crate::values::{EVENT_TIME_PROPERTY, EventTimeRule, ShapedPayload, may_be_shaped};

/// The present settings of a datasource for its payloads.
#[derive(Clone, Default)]
pub(super) struct PayloadChecks {
    validation: Validation,
    /// `None` if the datasource says nothing about it.
    event_time: Option<Arc<EventTimeRule>>,
}

impl PayloadChecks {
    pub(super) fn of(datasource: &Datasource) -> Self {
        let event_time = &datasource.event_time;
        Self {
            validation: Validation::from_setting(&datasource.schemas),
            event_time: event_time.is_set().then(|| event_time.made(EventTimeRule::from_text)),
        }
    }

    /// Checks a message, whose MQTT 5 properties are in wire form, and returns its event time, if it has one.
    ///
    /// # Errors
    /// Why it goes into quarantine.
    #[inline]
    pub(super) fn check(
        &self,
        topic: &str,
        content_type: &str,
        payload: &[u8],
        properties: &[u8],
        received_at: TimeMicros,
    ) -> Result<Option<TimeMicros>, Box<QuarantineReason<'static>>> {
        self.validation.check(topic, payload)?;
        let stated = stated_event_time(properties);
        let shaped = || {
            if !may_be_shaped(content_type, payload) {
                return None;
            }
            let text = std::str::from_utf8(payload).ok()?;
            ShapedPayload { topic, content_type, text, received_at }.event_time()
        };
        match &self.event_time {
            Some(rule) => rule.event_time(stated, shaped, payload, received_at),
            None => EventTimeRule::default().event_time(stated, shaped, payload, received_at),
        }
    }
}

/// The event time that is said with a message. NATS headers and their names come in any case.
#[inline]
fn stated_event_time(properties: &[u8]) -> Option<&str> {
    if properties.is_empty() {
        return None;
    }
    let mut own = Properties::from_wire(properties).user();
    own.find(|(name, _)| name.eq_ignore_ascii_case(EVENT_TIME_PROPERTY)).map(|(_, value)| value)
}
