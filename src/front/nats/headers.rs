//! The headers of a NATS message, besides its key: its id, its media type, and the sender's own headers,
//! which subscribers receive as MQTT 5 user properties.

use crate::front::credentials::is_key_header;
use crate::front::mqtt::codec::write::user_property;
use crate::front::reserved_names::is_reserved_name;
use crate::intake::Refusal;
use crate::limits::NATS_HEADERS_BYTES_MAX;
use crate::log::nats_message::{NATS_CONTENT_TYPE_HEADER, NATS_MESSAGE_ID_HEADER};
use crate::message::{holds_key, is_noncharacter};

/// The stream from which a client expects the answer.
const NATS_EXPECTED_STREAM_HEADER: &str = "Nats-Expected-Stream";
/// Requests to JetStream that Headgate does not serve: accepting the message would promise them.
const UNSUPPORTED_JETSTREAM_HEADERS: [&str; 9] = [
    NATS_EXPECTED_STREAM_HEADER,
    "Nats-Expected-Last-Sequence",
    "Nats-Expected-Last-Subject-Sequence",
    "Nats-Expected-Last-Msg-Id",
    "Nats-Rollup",
    "Nats-TTL",
    "Nats-Batch-Id",
    "Nats-Incr",
    "Nats-Schedule",
];

/// The headers of a message, read.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct NatsMessageHeaders<'a> {
    /// The media type; empty if none.
    pub(super) content_type: &'a str,
    pub(super) message_id: Option<&'a str>,
    /// The sender's own headers in MQTT 5's wire form, sorted by name, up to [`NATS_HEADERS_BYTES_MAX`].
    /// Headers that MQTT cannot carry are left out, and those reserved for gateways (`Headgate-…`) and
    /// servers (`Nats-…`).
    pub(super) properties: Vec<u8>,
    /// How many headers were left out because their names are Headgate's own.
    pub(super) reserved: u64,
}

impl<'a> NatsMessageHeaders<'a> {
    /// Reads the headers of a message.
    ///
    /// # Errors
    /// [`Refusal::Header`] for a header that asks for something unsupported.
    pub(super) fn read(
        headers: impl Iterator<Item = (&'a str, &'a str)>,
        stream: &str,
    ) -> Result<Self, Refusal> {
        let mut read = Self::default();
        let mut own = Vec::new();
        for (name, value) in headers {
            if has_prefix_ignoring_case(name, "Nats-") {
                if name.eq_ignore_ascii_case(NATS_MESSAGE_ID_HEADER.as_ref()) {
                    read.message_id = Some(value);
                } else if let Some(asked) =
                    UNSUPPORTED_JETSTREAM_HEADERS.iter().find(|known| name.eq_ignore_ascii_case(known))
                    && !(*asked == NATS_EXPECTED_STREAM_HEADER && value == stream)
                {
                    return Err(Refusal::Header(asked));
                }
            } else if name.eq_ignore_ascii_case(NATS_CONTENT_TYPE_HEADER.as_ref()) {
                read.content_type = value;
            } else if is_reserved_name(name) {
                read.reserved += 1;
            } else if !is_key_header(name)
                && !has_prefix_ignoring_case(name, "Nmqtt-")
                && may_be_user_property(name, value)
            {
                own.push((name, value));
            }
        }
        // The headers arrive in no particular order: sort, so that the same ones give the same record.
        own.sort_by_key(|(name, _)| *name);
        for (name, value) in own {
            if read.properties.len() + 5 + name.len() + value.len() <= NATS_HEADERS_BYTES_MAX {
                user_property(&mut read.properties, name, value);
            }
        }
        Ok(read)
    }
}

fn has_prefix_ignoring_case(name: &str, prefix: &str) -> bool {
    name.get(..prefix.len()).is_some_and(|begin| begin.eq_ignore_ascii_case(prefix))
}

/// Whether a header may become a user property: valid in MQTT, and without a secret.
fn may_be_user_property(name: &str, value: &str) -> bool {
    let plain = |text: &str| !text.chars().any(|c| c.is_control() || is_noncharacter(c)) && !holds_key(text);
    plain(name) && plain(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read<'a>(headers: &[(&'a str, &'a str)]) -> Result<NatsMessageHeaders<'a>, Refusal> {
        NatsMessageHeaders::read(headers.iter().copied(), "headgate")
    }

    fn properties(pairs: &[(&str, &str)]) -> Vec<u8> {
        let mut properties = Vec::new();
        pairs.iter().for_each(|(name, value)| user_property(&mut properties, name, value));
        properties
    }

    #[test]
    fn what_is_known_has_its_place_and_the_rest_are_user_properties() {
        let headers = read(&[
            ("unit", "°C"),
            ("Nats-Msg-Id", "a"),
            ("content-type", "application/json"),
            ("Nats-Expected-Stream", "headgate"),
            ("line", "3"),
        ]);
        let expected = NatsMessageHeaders {
            content_type: "application/json",
            message_id: Some("a"),
            properties: properties(&[("line", "3"), ("unit", "°C")]),
            reserved: 0,
        };
        assert_eq!(headers.expect("nothing is asked for"), expected);
    }

    #[test]
    fn no_secret_goes_on_and_nothing_that_only_a_gateway_or_a_server_says() {
        let headers = read(&[
            ("authorization", "Bearer hgk_secret"),
            ("X-Api-Key", "hgk_secret"),
            ("x", "HGK_secret"),
            ("hgk_secret", "x"),
            ("headgate-key-id", "0123456789ab"),
            ("Headgate-Flags", "4"),
            ("nats-trace", "x"),
            ("bell", "\u{7}"),
        ]);
        let expected = NatsMessageHeaders { reserved: 2, ..NatsMessageHeaders::default() };
        assert_eq!(headers.expect("nothing is asked for"), expected);
    }

    #[test]
    fn what_jetstream_alone_does_is_refused_by_name() {
        for (name, value) in [("nats-rollup", "sub"), ("Nats-TTL", "1"), ("Nats-Expected-Stream", "other")] {
            let Err(Refusal::Header(named)) = read(&[(name, value)]) else { panic!("{name}") };
            assert!(named.eq_ignore_ascii_case(name), "{named}");
        }
    }

    #[test]
    fn own_headers_are_bounded() {
        let longest = "x".repeat(NATS_HEADERS_BYTES_MAX - 6);
        let kept = |value: &str| read(&[("b", value), ("c", "1")]).expect("read").properties;
        assert_eq!(kept(&longest), properties(&[("b", &longest)]));
        assert_eq!(kept(&format!("{longest}x")), properties(&[("c", "1")]));
    }
}
