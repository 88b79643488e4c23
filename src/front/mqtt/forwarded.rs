//! The properties of a message or will that go on to its subscribers, in wire form.
//!
//! Topics are relative to the key ([`crate::message`]), and so is the Response Topic: a key for all datasources
//! names one as `{datasource}/{topic}`. It is kept as the message's own datasource knows it. One of another
//! datasource is none that a device could answer to: it is kept for subscribers with keys for all datasources alone,
//! under a [name](RESPONSE_ELSEWHERE_PROPERTY) that no client can give.

use super::codec::properties::{
    CONTENT_TYPE, CORRELATION_DATA, MESSAGE_EXPIRY, PAYLOAD_FORMAT, Properties, PropertyValue, RESPONSE_TOPIC,
};
use super::codec::write;
use crate::auth::Grant;
use crate::front::credentials::is_key_header;
use crate::front::reserved_names::is_reserved_name;
use crate::message::Transport;
use crate::observe::metrics::Metrics;

/// The user property under which a record has a Response Topic of another datasource, with that datasource in front.
pub(super) const RESPONSE_ELSEWHERE_PROPERTY: &str = "headgate-response-topic";

/// What goes on of a message's properties.
pub(super) struct ForwardedProperties<'a> {
    /// The media type, which records keep in a field of its own; or empty.
    pub(super) content_type: &'a str,
    /// The others, without keys and reserved names.
    pub(super) wire: Vec<u8>,
}

impl<'a> ForwardedProperties<'a> {
    /// `mount` is the datasource that the topic names, if the key is for all datasources.
    pub(super) fn of(properties: &Properties<'a>, mount: Option<&str>, metrics: &Metrics) -> Self {
        let mut to = Vec::new();
        let (mut content_type, mut reserved) = ("", 0);
        for (id, value, bytes) in properties.iter() {
            match (id, value) {
                (CONTENT_TYPE, PropertyValue::Text(text)) => content_type = text,
                (RESPONSE_TOPIC, PropertyValue::Text(topic)) if mount.is_some() => {
                    put_response_topic(&mut to, topic, mount.unwrap_or_default());
                }
                (_, PropertyValue::Pair(name, _)) if is_reserved_name(name) => reserved += 1,
                (_, PropertyValue::Pair(name, _)) if is_key_header(name) => {}
                (_, PropertyValue::Pair(..))
                | (PAYLOAD_FORMAT | MESSAGE_EXPIRY | RESPONSE_TOPIC | CORRELATION_DATA, _) => {
                    to.extend_from_slice(bytes);
                }
                _ => {}
            }
        }
        if reserved > 0 {
            metrics.count_reserved_names(Transport::Mqtt, reserved);
        }
        Self { content_type, wire: to }
    }
}

/// The datasource that a topic names, if the key is for all datasources.
pub(super) fn mount_of<'t>(grant: &Grant, topic: &'t str) -> Option<&'t str> {
    grant.datasource().is_all().then(|| topic.split('/').next().unwrap_or_default())
}

fn put_response_topic(to: &mut Vec<u8>, topic: &str, mount: &str) {
    let within = topic.strip_prefix(mount).and_then(|rest| rest.strip_prefix('/'));
    match within.filter(|within| !within.is_empty()) {
        Some(within) => write::text_property(to, RESPONSE_TOPIC, within),
        None => write::user_property(to, RESPONSE_ELSEWHERE_PROPERTY, topic),
    }
}
