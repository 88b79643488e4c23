//! The event time of messages over HTTP: the header that says it for a request, and the setting of a datasource that says
//! where it is in the payloads.

use axum::http::HeaderMap;
use serde_json::Value;

use crate::auth::setting::JsonSetting;
use crate::front::mqtt::codec::write::user_property;
use crate::front::problem::Problem;
use crate::limits::EVENT_TIME_TEXT_BYTES_MAX;
use crate::observe::cause::Cause;
use crate::values::event_time::EventTimeSettingError;
use crate::values::{EVENT_TIME_PROPERTY, EventTimeSetting};

/// The MQTT 5 properties, in wire form, of messages whose request has these headers: the header `event-time`, which is
/// said of all of them.
pub(super) fn stated_property(headers: &HeaderMap) -> Result<Vec<u8>, Problem> {
    let mut values = headers.get_all(EVENT_TIME_PROPERTY).iter();
    let Some(value) = values.next() else { return Ok(Vec::new()) };
    let refused = |words: &str| Problem::new(Cause::Malformed, words.to_owned());
    if values.next().is_some() {
        return Err(refused("The request has more than one Event-Time."));
    }
    let text = value.to_str().map_err(|_| refused("The Event-Time is not printable ASCII."))?;
    if text.len() > EVENT_TIME_TEXT_BYTES_MAX {
        return Err(refused("The Event-Time is too long to be a time."));
    }
    let mut properties = Vec::with_capacity(EVENT_TIME_PROPERTY.len() + text.len() + 5);
    user_property(&mut properties, EVENT_TIME_PROPERTY, text);
    Ok(properties)
}

/// The registry's text for the setting in a request; `null` is none.
pub(super) fn parse(setting: &Value) -> Result<Option<String>, Problem> {
    match setting {
        Value::Null => Ok(None),
        setting => Ok(Some(EventTimeSetting::from_json(setting)?.to_text())),
    }
}

/// The registry's text for a setting after a JSON merge patch (RFC 7396) of it.
pub(super) fn patched(setting: &JsonSetting, patch: &Value) -> Result<Option<String>, Problem> {
    let Value::Object(changes) = patch else { return parse(patch) };
    let mut merged = current(setting).as_object().cloned().unwrap_or_default();
    for (member, value) in changes {
        match value {
            Value::Null => drop(merged.remove(member)),
            value => drop(merged.insert(member.clone(), value.clone())),
        }
    }
    parse(&merged.into())
}

/// The setting that counts now, as the API shows it; `null` for none.
pub(super) fn current(setting: &JsonSetting) -> Value {
    setting.text().and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default()
}

impl From<EventTimeSettingError> for Problem {
    fn from(error: EventTimeSettingError) -> Self {
        let words = format!("The event_time cannot be used: {}.", error.words);
        Self::new(Cause::Malformed, words).with("pointer", format!("/event_time{}", error.pointer))
    }
}
