//! A delivery: one record on its way to one client, as a PUBLISH packet.
//!
//! An MQTT 5 client whose subscription asks for it also gets the record's metadata: the publisher's own properties
//! are followed by the user properties `headgate-offset`, `headgate-datasource`, `headgate-received-at`, `headgate-key-id`
//! and, if its sender has said when it was measured, `headgate-event-at`. How many records were skipped is always told, as `headgate-skipped`.

use std::collections::HashMap;

use super::codec::MqttVersion;
use super::codec::properties::{
    CONTENT_TYPE, MESSAGE_EXPIRY, Properties, PropertyValue, RESPONSE_TOPIC, SUBSCRIPTION_IDENTIFIER,
    TOPIC_ALIAS,
};
use super::codec::write::{self, PacketForm};
use super::forwarded::RESPONSE_ELSEWHERE_PROPERTY;
use super::session::Subscription;
use crate::consume::render;
use crate::front::reserved_names::is_reserved_name;
use crate::limits::MQTT_TOPIC_ALIASES_SENT_MAX;
use crate::message::{KeyId, RecordFlags, RecordRef, TimeMicros, now_micros};

/// How one record goes to one client.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Delivery {
    /// 0, 1 or 2.
    pub(super) qos: u8,
    /// The DUP flag: it may have been sent before.
    pub(super) dup: bool,
    /// The retain flag.
    pub(super) retain: bool,
    /// The subscriber asked for the record's metadata.
    pub(super) metadata: bool,
    /// The identifiers of the matching subscriptions.
    pub(super) identifiers: Vec<u32>,
    /// `Some` with QoS 1 and 2.
    pub(super) packet_id: Option<u16>,
}

impl Delivery {
    /// About how many bytes the packet of a record has.
    pub(super) fn bytes_of(&self, record: &RecordRef<'_>) -> usize {
        const OWN_PROPERTIES: usize = 256;
        let record = record.datasource.len()
            + record.topic.len()
            + record.payload.len()
            + record.content_type.len()
            + record.properties.len();
        OWN_PROPERTIES + record + 5 * self.identifiers.len()
    }

    /// How a record that matches `subscriptions` is delivered. `None` if it is not, because the subscriber
    /// published it and asked for no-local.
    pub(super) fn for_subscriptions<'a>(
        subscriptions: impl Iterator<Item = &'a Subscription>,
        record: &RecordRef<'_>,
        publisher: u64,
    ) -> Option<Self> {
        let own = publisher != 0 && record.publisher == publisher;
        let mut delivery = None;
        for subscription in subscriptions.filter(|s| !(s.no_local && own)) {
            let delivery = delivery.get_or_insert_with(Self::default);
            delivery.qos = delivery.qos.max(subscription.qos);
            delivery.retain |= subscription.retain_as_published;
            delivery.metadata |= subscription.metadata;
            delivery.identifiers.extend(subscription.identifier);
        }
        let mut delivery = delivery?;
        delivery.retain &= record.flags.contains(RecordFlags::RETAIN);
        delivery.qos = delivery.qos.min(record.flags.mqtt_qos_max());
        Some(delivery)
    }
}

/// Writes PUBLISH packets to one client.
pub(super) struct PublishWriter {
    pub(super) form: PacketForm,
    /// The client's hash, as in the records that it published.
    pub(super) publisher: u64,
    /// The key is for all datasources, so topics begin with the datasource.
    names_datasource: bool,
    /// Every message has its metadata, whether the subscription asked or not.
    always_metadata: bool,
    aliases: SentTopicAliases,
    /// How many records retention removed before they were sent; reported with the next message.
    pub(super) skipped: u64,
    /// How many packets it has written; whoever counts them takes them.
    pub(super) written: u64,
    /// The properties of the packet that is being written.
    properties: Vec<u8>,
    origin: OriginProperties,
}

/// The encoded properties that consecutive records mostly share.
#[derive(Default)]
struct OriginProperties {
    of: Option<(String, TimeMicros, KeyId)>,
    bytes: Vec<u8>,
}

/// The topic aliases that the server has set (section 3.3.2.3.4).
struct SentTopicAliases {
    by_topic: HashMap<String, u16>,
    max: u16,
    /// What the topics take in memory.
    bytes: usize,
}

/// Where in a packet's properties those of the gateway begin.
#[derive(Clone, Copy, Default)]
struct OwnPropertyMarks {
    without_own: usize,
    without_metadata: usize,
}

/// How a packet names its topic.
enum TopicField {
    Whole,
    /// An alias that the client knows.
    Alias,
}

impl PublishWriter {
    /// A writer for a client that takes up to `topic_alias_maximum` topic aliases.
    pub(super) fn new(
        form: PacketForm,
        publisher: u64,
        names_datasource: bool,
        always_metadata: bool,
        topic_alias_maximum: u16,
    ) -> Self {
        let max = topic_alias_maximum.min(MQTT_TOPIC_ALIASES_SENT_MAX);
        Self {
            form,
            publisher,
            names_datasource,
            always_metadata,
            aliases: SentTopicAliases { by_topic: HashMap::new(), max, bytes: 0 },
            skipped: 0,
            written: 0,
            properties: Vec::new(),
            origin: OriginProperties::default(),
        }
    }

    /// What the topics of its aliases take in memory.
    pub(super) fn alias_bytes(&self) -> usize {
        self.aliases.bytes
    }

    /// Appends a record to `out`. Calls `packet_id` only once it is certain that the record is sent.
    /// Returns whether it is: a record that has expired, or is larger than the client accepts, is not
    /// (sections 3.3.2.3.3 and 3.1.2.11.4).
    pub(super) fn write(
        &mut self,
        record: &RecordRef<'_>,
        delivery: &mut Delivery,
        out: &mut Vec<u8>,
        packet_id: impl FnOnce() -> u16,
    ) -> bool {
        let topic = [record.datasource, "/", record.topic];
        let mut topic = if self.names_datasource { &topic[..] } else { &topic[2..] };
        let v5 = self.form.version == MqttVersion::V5;
        let mut marks = OwnPropertyMarks::default();
        if v5 {
            let Some(put) = self.put_properties(record, delivery) else { return false };
            marks = put;
        }
        let topic_bytes = topic.iter().map(|part| part.len()).sum();
        let fits = |properties: usize| {
            // Three bytes for a topic alias, which may lengthen the lengths too.
            let properties = v5.then_some(properties + 3);
            let bytes = write::publish_bytes(topic_bytes, delivery.qos > 0, properties, record.payload.len());
            bytes <= self.form.packet_bytes_max as usize
        };
        // The gateway's own properties must not make a message too large for the client.
        let bytes = [self.properties.len(), marks.without_metadata, marks.without_own];
        let Some(bytes) = bytes.into_iter().find(|bytes| fits(*bytes)) else { return false };
        self.properties.truncate(bytes);
        if v5 && let TopicField::Alias = self.put_topic_alias(topic) {
            topic = &[];
        }
        let properties = v5.then_some(&self.properties[..]);
        if delivery.qos > 0 && delivery.packet_id.is_none() {
            delivery.packet_id = Some(packet_id());
        }
        let first = 0x30 | u8::from(delivery.dup) << 3 | delivery.qos << 1 | u8::from(delivery.retain);
        write::publish(out, first, topic, delivery.packet_id, properties, record.payload);
        self.written += 1;
        if v5 && bytes >= marks.without_metadata {
            self.skipped = 0;
        }
        true
    }

    /// Writes the properties. `None` if the message has expired.
    fn put_properties(&mut self, record: &RecordRef<'_>, delivery: &Delivery) -> Option<OwnPropertyMarks> {
        let to = &mut self.properties;
        to.clear();
        for (id, value, bytes) in Properties::from_wire(record.properties).iter() {
            match (id, value) {
                (MESSAGE_EXPIRY, PropertyValue::Number(expiry_s)) => {
                    let waited_s = now_micros().saturating_sub(record.received_at).max(0) / 1_000_000;
                    let left_s = i64::from(expiry_s) - waited_s;
                    // An exchange that has begun goes on, whatever becomes of its message (section 4.3.3).
                    let left_s_min = if delivery.qos == 2 && delivery.dup { 0 } else { 1 };
                    let left_s = u32::try_from(left_s.max(0)).unwrap_or(u32::MAX);
                    if left_s < left_s_min {
                        return None;
                    }
                    to.push(MESSAGE_EXPIRY);
                    to.extend_from_slice(&left_s.to_be_bytes());
                }
                // As a key for all datasources names topics.
                (RESPONSE_TOPIC, PropertyValue::Text(topic)) if self.names_datasource => {
                    write::text_property(to, RESPONSE_TOPIC, &format!("{}/{topic}", record.datasource));
                }
                (_, PropertyValue::Pair(RESPONSE_ELSEWHERE_PROPERTY, topic)) if self.names_datasource => {
                    write::text_property(to, RESPONSE_TOPIC, topic);
                }
                // Older logs may have some from publishers.
                (_, PropertyValue::Pair(name, _)) if is_reserved_name(name) => {}
                _ => to.extend_from_slice(bytes),
            }
        }
        if !record.content_type.is_empty() {
            write::text_property(to, CONTENT_TYPE, record.content_type);
        }
        for identifier in &delivery.identifiers {
            to.push(SUBSCRIPTION_IDENTIFIER);
            write::varint(to, *identifier as usize);
        }
        let without_own = to.len();
        if self.skipped > 0 {
            write::user_property(to, "headgate-skipped", &self.skipped.to_string());
        }
        let without_metadata = to.len();
        if delivery.metadata || self.always_metadata {
            write::user_property(to, "headgate-offset", &record.offset.to_string());
            self.origin.put(record, to);
            if let Some(event_at) = record.event_at {
                write::user_property(to, "headgate-event-at", &render::rfc3339_text(event_at));
            }
        }
        Some(OwnPropertyMarks { without_own, without_metadata })
    }

    /// Adds a topic alias to the properties if the topic has or can get one.
    fn put_topic_alias(&mut self, topic: &[&str]) -> TopicField {
        let SentTopicAliases { by_topic, max, bytes } = &mut self.aliases;
        if *max == 0 {
            return TopicField::Whole;
        }
        let whole = topic.concat();
        let known = by_topic.len();
        let (alias, topic) = match by_topic.get(&whole) {
            Some(alias) => (*alias, TopicField::Alias),
            None if known < usize::from(*max) => {
                let alias = u16::try_from(known + 1).expect("at most the maximum");
                *bytes += whole.capacity() + size_of::<(String, u16)>();
                by_topic.insert(whole, alias);
                (alias, TopicField::Whole)
            }
            None => return TopicField::Whole,
        };
        self.properties.push(TOPIC_ALIAS);
        self.properties.extend_from_slice(&alias.to_be_bytes());
        topic
    }
}

impl OriginProperties {
    fn put(&mut self, record: &RecordRef<'_>, to: &mut Vec<u8>) {
        let same = self.of.as_ref().is_some_and(|(datasource, received_at, key_id)| {
            datasource == record.datasource && *received_at == record.received_at && *key_id == record.key_id
        });
        if !same {
            self.of = Some((record.datasource.to_owned(), record.received_at, record.key_id));
            self.bytes.clear();
            write::user_property(&mut self.bytes, "headgate-datasource", record.datasource);
            write::user_property(
                &mut self.bytes,
                "headgate-received-at",
                &render::rfc3339_text(record.received_at),
            );
            write::user_property(&mut self.bytes, "headgate-key-id", &record.key_id.to_string());
        }
        to.extend_from_slice(&self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::Transport;

    fn record(flags: RecordFlags) -> RecordRef<'static> {
        RecordRef {
            offset: 41,
            datasource: "press-4",
            topic: "spindle/temp",
            payload: b"21.5",
            content_type: "",
            properties: &[],
            key_id: KeyId([1; 6]),
            transport: Transport::Mqtt,
            received_at: now_micros(),
            event_at: None,
            flags,
            note: &[],
            publisher: 7,
        }
    }

    fn subscription(qos: u8) -> Subscription {
        Subscription {
            filter: "#".to_owned(),
            qos,
            no_local: false,
            retain_as_published: false,
            metadata: false,
            identifier: None,
            from: 0,
            replay: None,
            is_renewed: false,
        }
    }

    #[test]
    fn a_record_goes_out_once_with_the_most_that_its_subscriptions_ask_for() {
        let mut more = subscription(1);
        more.identifier = Some(9);
        more.retain_as_published = true;
        let two = [subscription(0), more];
        let delivery =
            Delivery::for_subscriptions(two.iter(), &record(RecordFlags::RETAIN), 0).expect("wanted");
        let expected = Delivery { qos: 1, retain: true, identifiers: vec![9], ..Delivery::default() };
        assert_eq!(delivery, expected);
        let at_most_once =
            Delivery::for_subscriptions(two.iter(), &record(RecordFlags::AT_MOST_ONCE), 0).expect("wanted");
        assert_eq!((at_most_once.qos, at_most_once.retain), (0, false));
        assert_eq!(Delivery::for_subscriptions([].iter(), &record(RecordFlags::default()), 0), None);
    }

    #[test]
    fn no_local_keeps_back_the_subscribers_own_records_and_no_others() {
        let mut no_local = subscription(1);
        no_local.no_local = true;
        let own = |publisher| {
            Delivery::for_subscriptions([no_local.clone()].iter(), &record(RecordFlags::default()), publisher)
        };
        assert_eq!(own(7), None);
        assert!(own(8).is_some());
        let both = [no_local.clone(), subscription(0)];
        assert!(
            Delivery::for_subscriptions(both.iter(), &record(RecordFlags::default()), 7)
                .is_some_and(|d| d.qos == 0)
        );
    }

    #[test]
    fn what_does_not_fit_or_has_expired_is_not_sent_and_takes_no_identifier() {
        let form = PacketForm { version: MqttVersion::V5, reasons: true, packet_bytes_max: 300 };
        let mut writer = PublishWriter::new(form, 0, false, false, 0);
        let mut out = Vec::new();
        let mut send = |record: &RecordRef<'_>, out: &mut Vec<u8>| {
            let mut delivery = Delivery { qos: 1, ..Delivery::default() };
            writer.write(record, &mut delivery, out, || 5) && delivery.packet_id == Some(5)
        };
        let mut small = record(RecordFlags::default());
        assert!(send(&small, &mut out));
        let taken = out.len();
        small.payload = &[0; 300];
        assert!(!send(&small, &mut out));
        small.payload = b"";
        small.properties = &[MESSAGE_EXPIRY, 0, 0, 0, 10];
        assert!(send(&small, &mut out));
        small.received_at -= 11_000_000;
        out.truncate(taken);
        assert!(!send(&small, &mut out));
        assert_eq!(out.len(), taken);
    }

    /// The texts of user properties in a packet, name and value, that are there.
    fn has(packet: &[u8], pairs: &[(&str, &str)]) -> Vec<bool> {
        let encoded = pairs.iter().map(|(name, value)| {
            let mut property = Vec::new();
            write::user_property(&mut property, name, value);
            property
        });
        encoded.map(|property| packet.windows(property.len()).any(|bytes| bytes == property)).collect()
    }

    #[test]
    fn metadata_goes_out_where_it_is_asked_for_and_what_was_skipped_always() {
        let own = [("headgate-offset", "41"), ("headgate-datasource", "press-4")];
        let form = |bytes| PacketForm { version: MqttVersion::V5, reasons: true, packet_bytes_max: bytes };
        let sent = |writer: &mut PublishWriter, metadata| {
            let mut out = Vec::new();
            let mut delivery = Delivery { metadata, ..Delivery::default() };
            assert!(writer.write(&record(RecordFlags::default()), &mut delivery, &mut out, || 1));
            out
        };
        let mut writer = PublishWriter::new(form(u32::MAX), 0, false, false, 0);
        assert_eq!(has(&sent(&mut writer, true), &own), [true, true]);
        assert_eq!(has(&sent(&mut writer, false), &own), [false, false]);
        writer.skipped = 3;
        let packet = sent(&mut writer, false);
        assert_eq!(has(&packet, &[own[0], ("headgate-skipped", "3")]), [false, true]);
        assert_eq!(writer.skipped, 0, "told once");
        let mut always = PublishWriter::new(form(u32::MAX), 0, false, true, 0);
        assert_eq!(has(&sent(&mut always, false), &own), [true, true]);
        // What does not fit is left out, and what was skipped is told later.
        let mut small = PublishWriter::new(form(40), 0, false, true, 0);
        small.skipped = 3;
        assert_eq!(has(&sent(&mut small, true), &[own[0], ("headgate-skipped", "3")]), [false, false]);
        assert_eq!(small.skipped, 3);
    }

    #[test]
    fn reserved_names_of_older_logs_do_not_go_out() {
        let mut properties = Vec::new();
        write::user_property(&mut properties, "Headgate-Offset", "7");
        write::user_property(&mut properties, "colour", "red");
        let forged = RecordRef { properties: &properties, ..record(RecordFlags::default()) };
        let form = PacketForm { version: MqttVersion::V5, reasons: true, packet_bytes_max: u32::MAX };
        let mut out = Vec::new();
        let mut writer = PublishWriter::new(form, 0, false, false, 0);
        assert!(writer.write(&forged, &mut Delivery::default(), &mut out, || 1));
        assert_eq!(has(&out, &[("Headgate-Offset", "7"), ("colour", "red")]), [false, true]);
    }

    #[test]
    fn a_topic_gets_an_alias_until_there_are_no_more() {
        let form = PacketForm { version: MqttVersion::V5, reasons: true, packet_bytes_max: u32::MAX };
        let mut writer = PublishWriter::new(form, 0, true, false, 1);
        let mut sent = |topic| {
            let mut out = Vec::new();
            let mut record = record(RecordFlags::default());
            record.topic = topic;
            assert!(writer.write(&record, &mut Delivery::default(), &mut out, || 1));
            out
        };
        let first = sent("a");
        assert!(first.windows(9).any(|bytes| bytes == b"press-4/a"));
        assert!(first.windows(3).any(|bytes| bytes == [TOPIC_ALIAS, 0, 1]));
        let again = sent("a");
        assert!(!again.windows(9).any(|bytes| bytes == b"press-4/a"));
        assert!(again.windows(3).any(|bytes| bytes == [TOPIC_ALIAS, 0, 1]));
        let other = sent("b");
        assert!(other.windows(9).any(|bytes| bytes == b"press-4/b"));
        assert!(!other.windows(3).any(|bytes| bytes[0] == TOPIC_ALIAS && bytes[1] == 0 && bytes[2] == 2));
    }
}
