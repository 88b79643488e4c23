//! The types that all other modules share: what a client sends, the names it uses, and the record that
//! an accepted message becomes.
//!
//! A message arrives at a front with a topic and a payload. Intake turns it into a record, and the log
//! gives the record an [`Offset`]. Nothing in this file does I/O.

use std::borrow::Borrow;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::limits::{DATASOURCE_ID_BYTES_MAX, TOPIC_BYTES_MAX, TOPIC_LEVELS_MAX};

/// A record's place in the log: 0 for the first record ever kept, then one more for each.
pub type Offset = u64;

/// Microseconds since the Unix epoch, UTC.
pub type TimeMicros = i64;

/// The wall clock now, in microseconds since the Unix epoch.
pub fn now_micros() -> TimeMicros {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    TimeMicros::try_from(since_epoch.as_micros()).unwrap_or(TimeMicros::MAX)
}

/// Which of the datasources that had the same id one after the other, counted from 1. A deletion ends an
/// incarnation, and nothing of it outlives that: the next one begins empty.
pub type Incarnation = u32;

/// Stands between a datasource's id and its incarnation in the id of its scope. No slug has it.
const SCOPE_SEPARATOR: char = '~';

/// Why a name was not accepted. The text is for the person who chose it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Not a slug.
    #[error("a datasource id is 1 to {DATASOURCE_ID_BYTES_MAX} of the characters a-z, 0-9 and '-'")]
    DatasourceId,
    /// Not 12 lowercase hexadecimal characters.
    #[error("a key id is 12 characters of 0-9 and a-f")]
    KeyId,
    /// The topic has no characters.
    #[error("a topic needs at least one character")]
    TopicEmpty,
    /// The topic is longer than [`TOPIC_BYTES_MAX`].
    #[error("a topic has at most {TOPIC_BYTES_MAX} bytes")]
    TopicTooLong,
    /// The topic has more than [`TOPIC_LEVELS_MAX`] levels.
    #[error("a topic has at most {TOPIC_LEVELS_MAX} levels")]
    TopicTooDeep,
    /// `+` or `#`: these select topics and cannot name one.
    #[error("'+' and '#' are wildcards and cannot be part of a topic that is published to")]
    TopicWildcard,
    /// NUL or another control character, or a Unicode non-character.
    #[error("a topic holds no control characters")]
    TopicControl,
    /// An API key, or its beginning.
    #[error(
        "a topic holds no API key: topics are stored and shown. Present it as user name or password or in \
         a header; if this one is real, replace it"
    )]
    TopicKey,
    /// A topic that begins with `$`, which MQTT keeps for servers.
    #[error("topics that begin with '$' are reserved")]
    TopicReserved,
}

/// The id of a datasource: a slug, `[a-z0-9-]{1,63}`.
///
/// No client can create [`DatasourceId::all`], `*`; only keys carry it.
#[derive(Clone, Eq, PartialOrd, Ord)]
pub struct DatasourceId(Arc<str>);

impl PartialEq for DatasourceId {
    /// Each message is compared with those before it, whose id is mostly the same one.
    #[inline]
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0) || self.0 == other.0
    }
}

impl Hash for DatasourceId {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.hash(state);
    }
}

impl DatasourceId {
    /// Checks and takes a slug.
    ///
    /// # Errors
    /// [`NameError::DatasourceId`] for anything that is not `[a-z0-9-]{1,63}`.
    pub fn new(id: &str) -> Result<Self, NameError> {
        let slug = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        if id.is_empty() || id.len() > DATASOURCE_ID_BYTES_MAX || !id.bytes().all(slug) {
            return Err(NameError::DatasourceId);
        }
        Ok(Self(id.into()))
    }

    /// The slug made from a person's name for a datasource: `Press 4, hall B` → `press-4-hall-b`.
    /// `None` when the name holds no ASCII letter or digit.
    pub fn from_name(name: &str) -> Option<Self> {
        let mut slug = String::with_capacity(name.len());
        for c in name.chars() {
            if slug.len() >= DATASOURCE_ID_BYTES_MAX {
                break;
            }
            if c.is_ascii_alphanumeric() {
                slug.push(c.to_ascii_lowercase());
            } else if !slug.is_empty() && !slug.ends_with('-') {
                slug.push('-');
            }
        }
        let slug = slug.trim_end_matches('-');
        (!slug.is_empty()).then(|| Self(slug.into()))
    }

    /// `*`: every datasource. A key may belong to it; no record does.
    pub fn all() -> Self {
        Self("*".into())
    }

    /// The id of the scope of an incarnation, under which things are kept that belong to this incarnation alone
    /// (sessions, groups, ids of messages, rows of stored records): the id itself for the first one, `press-4~2` for
    /// the second one. No datasource has such an id.
    #[must_use]
    pub fn scope(&self, incarnation: Incarnation) -> Self {
        if incarnation <= 1 {
            self.clone()
        } else {
            Self(format!("{self}{SCOPE_SEPARATOR}{incarnation}").into())
        }
    }

    /// Parses the id of a scope, or `*`.
    ///
    /// # Errors
    /// [`NameError::DatasourceId`] for anything else.
    pub fn parse_scope(text: &str) -> Result<Self, NameError> {
        if text == "*" {
            return Ok(Self::all());
        }
        let Some((id, incarnation)) = text.split_once(SCOPE_SEPARATOR) else { return Self::new(text) };
        let scope = Self::new(id)?.scope(incarnation.parse().map_err(|_| NameError::DatasourceId)?);
        if scope.as_str() == text { Ok(scope) } else { Err(NameError::DatasourceId) }
    }

    /// The datasource of a scope, and which incarnation of it.
    pub fn of_scope(&self) -> (Self, Incarnation) {
        match self.0.split_once(SCOPE_SEPARATOR) {
            Some((id, incarnation)) => (Self(id.into()), incarnation.parse().unwrap_or(1)),
            None => (self.clone(), 1),
        }
    }

    /// Whether this is `*`.
    pub fn is_all(&self) -> bool {
        &*self.0 == "*"
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Borrow<str> for DatasourceId {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for DatasourceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for DatasourceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Serialize for DatasourceId {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&self.0)
    }
}

/// The public handle of a key: the first 6 bytes of its digest, shown as 12 hex characters.
/// Safe to log: it identifies a key in the registry and grants nothing.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct KeyId(pub [u8; 6]);

impl KeyId {
    /// Reads the 12 hex characters.
    ///
    /// # Errors
    /// [`NameError::KeyId`] for any other text.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        let digits = text.as_bytes();
        if digits.len() != 12 {
            return Err(NameError::KeyId);
        }
        let nibble = |b: u8| match b {
            b'0'..=b'9' => Ok(b - b'0'),
            b'a'..=b'f' => Ok(b - b'a' + 10),
            _ => Err(NameError::KeyId),
        };
        let mut id = [0; 6];
        for (byte, pair) in id.iter_mut().zip(digits.chunks_exact(2)) {
            *byte = nibble(pair[0])? << 4 | nibble(pair[1])?;
        }
        Ok(Self(id))
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The 12 characters in formats for people (JSON), the 6 bytes in others (the log).
impl Serialize for KeyId {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        if s.is_human_readable() { s.collect_str(self) } else { self.0.serialize(s) }
    }
}

impl<'de> Deserialize<'de> for KeyId {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        if d.is_human_readable() {
            Self::parse(&String::deserialize(d)?).map_err(serde::de::Error::custom)
        } else {
            Deserialize::deserialize(d).map(Self)
        }
    }
}

/// Checks a topic that is published to, slightly more strictly than MQTT 5 section 4.7: not
/// empty, no wildcard, no control character, not reserved (`$…`), no API key, and within
/// [`crate::limits`].
///
/// # Errors
/// The first rule that `topic` breaks.
#[inline]
pub fn check_topic(topic: &str) -> Result<(), NameError> {
    let bytes = topic.as_bytes();
    match bytes {
        [] => return Err(NameError::TopicEmpty),
        [b'$', ..] => return Err(NameError::TopicReserved),
        _ if bytes.len() > TOPIC_BYTES_MAX => return Err(NameError::TopicTooLong),
        _ => {}
    }
    let mut levels = 1;
    let (mut ascii, mut underscore, mut forbidden) = (true, false, false);
    // Without a branch for each byte: it is done for every message.
    for &b in bytes {
        levels += usize::from(b == b'/');
        underscore |= b == b'_';
        ascii &= b < 0x80;
        forbidden |= (b == b'+') | (b == b'#') | (b < 0x20) | (b == 0x7f);
    }
    if forbidden {
        let is_wildcard = |b: &u8| matches!(b, b'+' | b'#');
        let first = bytes.iter().find(|b| is_wildcard(b) || matches!(b, 0..0x20 | 0x7f));
        let is_first_wildcard = first.is_some_and(is_wildcard);
        return Err(if is_first_wildcard { NameError::TopicWildcard } else { NameError::TopicControl });
    }
    if underscore && holds_key(topic) {
        return Err(NameError::TopicKey);
    }
    if levels > TOPIC_LEVELS_MAX {
        return Err(NameError::TopicTooDeep);
    }
    if !ascii && topic.chars().any(|c| c.is_control() || is_noncharacter(c)) {
        return Err(NameError::TopicControl);
    }
    Ok(())
}

/// Whether a text contains the prefix of every API key, in any case, or what is like an access token. Such a text is
/// never stored, shown or logged.
pub fn holds_key(text: &str) -> bool {
    text.as_bytes().windows(4).any(|part| part.eq_ignore_ascii_case(b"hgk_")) || holds_access_token(text)
}

/// Characters behind the prefix that make a text like an access token: a name such as `hgt_cm` is none.
const ACCESS_TOKEN_LIKE_CHARS: usize = 24;

/// Whether a text contains the prefix of every access token and as many of its characters behind it as no name has.
pub fn holds_access_token(text: &str) -> bool {
    let is_of_token = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    text.as_bytes().windows(4 + ACCESS_TOKEN_LIKE_CHARS).any(|part| {
        let (prefix, rest) = part.split_at(4);
        prefix.eq_ignore_ascii_case(b"hgt_") && rest.iter().all(is_of_token)
    })
}

/// Whether `c` is one of Unicode's 66 noncharacters (MQTT 5 section 1.5.4 lets a server refuse them).
pub fn is_noncharacter(c: char) -> bool {
    let code = u32::from(c);
    (0xFDD0..=0xFDEF).contains(&code) || code & 0xFFFE == 0xFFFE
}

/// The protocol that a message came in over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// MQTT 3.1.1 or 5, whatever carries it.
    Mqtt,
    /// HTTP POST.
    Http,
    /// A NATS subject.
    Nats,
}

impl Transport {
    /// Every transport, each at the index that it has as a number.
    pub const ALL: [Transport; 3] = [Transport::Mqtt, Transport::Http, Transport::Nats];

    /// The transport of that name, if there is one; the inverse of [`Transport::as_str`].
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|transport| transport.as_str() == name)
    }

    /// The lower-case name, as in the API, in storage and in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Transport::Mqtt => "mqtt",
            Transport::Http => "http",
            Transport::Nats => "nats",
        }
    }
}

/// Tells whether a key is still valid. Each key has one, shared by the registry, every connection that
/// the key opened and every message on its way into the log. Once it has ended, none of them gets any
/// further.
#[derive(Debug, Clone)]
pub struct Lease(Arc<LeaseCell>);

/// On a cache line of its own: everybody reads it for each message, and writes the count of its holders beside it.
#[derive(Debug)]
#[repr(align(64))]
struct LeaseCell(AtomicBool);

impl Lease {
    /// A lease that holds until [`Lease::end`].
    pub fn new() -> Self {
        Self(Arc::new(LeaseCell(AtomicBool::new(true))))
    }

    /// Whether the key is still valid. One atomic load.
    #[inline]
    pub fn holds(&self) -> bool {
        self.0.0.load(Ordering::Acquire)
    }

    /// Ends the key for every holder, from now on.
    pub fn end(&self) {
        self.0.0.store(false, Ordering::Release);
    }
}

impl Default for Lease {
    fn default() -> Self {
        Self::new()
    }
}

/// One record as a consumer sees it, borrowed from the batch that it was read in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordRef<'a> {
    /// The record's place in the log.
    pub offset: Offset,
    /// The datasource's id.
    pub datasource: &'a str,
    /// The topic as the device wrote it, relative to its datasource.
    pub topic: &'a str,
    /// The bytes the device sent.
    pub payload: &'a [u8],
    /// The media type the client gave, or empty.
    pub content_type: &'a str,
    /// The other MQTT 5 properties for subscribers (user properties, response topic, correlation
    /// data, …), in wire form without the length prefix; or empty.
    pub properties: &'a [u8],
    /// The key that let it in.
    pub key_id: KeyId,
    /// The protocol that it came in over.
    pub transport: Transport,
    /// A hash of the client that published it, or 0 if unknown.
    pub publisher: u64,
    /// When the front read its last byte from the socket.
    pub received_at: TimeMicros,
    /// When it was measured, if its sender has said so.
    pub event_at: Option<TimeMicros>,
    /// How it was published.
    pub flags: RecordFlags,
    /// The gateway's note: why it is in quarantine, or which quarantined record it was redriven from
    /// (see [`crate::log::RecordNote`]). Empty for all other records.
    pub note: &'a [u8],
}

/// How a record was published, as bits stored with it in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RecordFlags(pub u8);

impl RecordFlags {
    /// The publisher asked for the message to be retained.
    pub const RETAIN: RecordFlags = RecordFlags(1);
    /// A will: the gateway published it for a client whose connection was lost.
    pub const WILL: RecordFlags = RecordFlags(2);
    /// The publisher asked for no acknowledgement (MQTT QoS 0); subscribers get it at QoS 0 too.
    pub const AT_MOST_ONCE: RecordFlags = RecordFlags(4);
    /// MQTT QoS 1: subscribers get it at QoS 1 at most.
    pub const AT_LEAST_ONCE: RecordFlags = RecordFlags(32);
    /// It failed validation and is in quarantine: only the quarantine consumer gets it. It has a note.
    pub const QUARANTINED: RecordFlags = RecordFlags(8);
    /// It was in quarantine and went through intake again. It has a note.
    pub const REDRIVEN: RecordFlags = RecordFlags(16);

    /// In the log only: its event time follows. Readers find that in [`RecordRef::event_at`], and not this flag.
    pub const EVENT_TIMED: RecordFlags = RecordFlags(64);

    /// How far a message that was published over MQTT with this QoS may go.
    #[inline]
    pub fn of_mqtt_qos(qos: u8) -> Self {
        match qos {
            0 => Self::AT_MOST_ONCE,
            1 => Self::AT_LEAST_ONCE,
            _ => Self::default(),
        }
    }

    /// The highest QoS at which subscribers get it.
    #[inline]
    pub fn mqtt_qos_max(self) -> u8 {
        match self {
            _ if self.contains(Self::AT_MOST_ONCE) => 0,
            _ if self.contains(Self::AT_LEAST_ONCE) => 1,
            _ => 2,
        }
    }

    /// Both sets of bits.
    #[inline]
    pub fn with(self, other: RecordFlags) -> Self {
        Self(self.0 | other.0)
    }

    /// The bits that are not in `other`.
    pub fn without(self, other: RecordFlags) -> Self {
        Self(self.0 & !other.0)
    }

    /// Whether every bit of `other` is set.
    #[inline]
    pub fn contains(self, other: RecordFlags) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether the gateway wrote a note about the record.
    pub fn has_note(self) -> bool {
        self.0 & (Self::QUARANTINED.0 | Self::REDRIVEN.0) != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transport_is_read_as_it_is_written() {
        for (at, transport) in Transport::ALL.into_iter().enumerate() {
            assert_eq!(Transport::parse(transport.as_str()), Some(transport));
            assert_eq!(transport as usize, at);
        }
        for other in ["", "MQTT", "mqtt ", "ws"] {
            assert_eq!(Transport::parse(other), None, "{other:?}");
        }
    }

    #[test]
    fn a_datasource_id_is_a_slug_of_1_to_63() {
        assert!(DatasourceId::new("press-4").is_ok());
        assert!(DatasourceId::new(&"a".repeat(63)).is_ok());
        for bad in ["", "Press", "a b", "ä", "*", "a/b", "a.b", &"a".repeat(64)] {
            assert_eq!(DatasourceId::new(bad), Err(NameError::DatasourceId), "{bad:?}");
        }
    }

    #[test]
    fn a_scope_is_a_datasource_in_one_incarnation_and_no_datasource_s_id() {
        let press = DatasourceId::new("press-4").expect("a slug");
        assert_eq!(press.scope(1), press);
        let second = press.scope(2);
        assert_eq!((second.as_str(), second.of_scope()), ("press-4~2", (press.clone(), 2)));
        for scope in [press.clone(), second, DatasourceId::all()] {
            assert_eq!(DatasourceId::parse_scope(scope.as_str()), Ok(scope));
        }
        for bad in ["press-4~1", "press-4~02", "press-4~", "~2", "press-4~x", "*~2", "press-4~2~3", ""] {
            assert!(DatasourceId::parse_scope(bad).is_err(), "{bad:?}");
        }
        assert!(DatasourceId::new("press-4~2").is_err());
    }

    #[test]
    fn a_name_becomes_a_slug() {
        let slug = |name| DatasourceId::from_name(name).map(|id| id.to_string());
        assert_eq!(slug("Press 4, hall B").as_deref(), Some("press-4-hall-b"));
        assert_eq!(slug("  --x--  ").as_deref(), Some("x"));
        assert_eq!(slug("温度"), None);
        let long = slug(&"ab ".repeat(100)).expect("has letters");
        assert!(DatasourceId::new(&long).is_ok(), "{long}");
    }

    #[test]
    fn a_topic_names_one_place() {
        for good in ["a", "a/b", "/", "a//b", "spindle/temp °C", "a/$b"] {
            assert_eq!(check_topic(good), Ok(()), "{good:?}");
        }
        assert_eq!(check_topic(""), Err(NameError::TopicEmpty));
        assert_eq!(check_topic("a/+"), Err(NameError::TopicWildcard));
        assert_eq!(check_topic("#"), Err(NameError::TopicWildcard));
        assert_eq!(check_topic("$SYS/x"), Err(NameError::TopicReserved));
        assert_eq!(check_topic("a\0b"), Err(NameError::TopicControl));
        assert_eq!(check_topic("a\u{85}b"), Err(NameError::TopicControl));
        assert_eq!(check_topic("a\u{FDD0}"), Err(NameError::TopicControl));
    }

    #[test]
    fn topic_limits_hold_at_one_below_and_one_above() {
        assert_eq!(check_topic(&"a".repeat(TOPIC_BYTES_MAX)), Ok(()));
        assert_eq!(check_topic(&"a".repeat(TOPIC_BYTES_MAX + 1)), Err(NameError::TopicTooLong));
        assert_eq!(check_topic(&"/".repeat(TOPIC_LEVELS_MAX - 1)), Ok(()));
        assert_eq!(check_topic(&"/".repeat(TOPIC_LEVELS_MAX)), Err(NameError::TopicTooDeep));
    }

    #[test]
    fn a_key_id_is_12_hex_characters_both_ways() {
        let id = KeyId::parse("0123456789ab").expect("hex");
        assert_eq!(id.to_string(), "0123456789ab");
        for bad in ["", "0123456789a", "0123456789abc", "0123456789aB", "0123456789ag"] {
            assert_eq!(KeyId::parse(bad), Err(NameError::KeyId), "{bad:?}");
        }
    }

    #[test]
    fn a_key_id_is_text_in_json_and_6_bytes_in_the_log() {
        let id = KeyId([1, 0x23, 0x45, 0x67, 0x89, 0xab]);
        let json = serde_json::to_string(&id).expect("serializable");
        assert_eq!(json, "\"0123456789ab\"");
        assert_eq!(serde_json::from_str::<KeyId>(&json).expect("reads back"), id);
        let bytes = postcard::to_stdvec(&id).expect("serializable");
        assert_eq!(bytes, id.0);
        assert_eq!(postcard::from_bytes::<KeyId>(&bytes).expect("reads back"), id);
    }
}
