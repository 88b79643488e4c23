//! What clients and operators name: datasources, topics, media types, clients.

/// A datasource's id, in bytes (all ASCII).
pub const DATASOURCE_ID_BYTES_MAX: usize = 63;
/// A datasource's name or a key's label, in bytes.
pub const NAME_BYTES_MAX: usize = 200;
/// A topic that is published to.
pub const TOPIC_BYTES_MAX: usize = 1024;
/// Levels of a topic, `a/b/c` has three.
pub const TOPIC_LEVELS_MAX: usize = 64;
/// Tags of a point in line protocol: a level of its topic each, behind that of the measurement.
pub const POINT_TAGS_MAX: usize = TOPIC_LEVELS_MAX - 1;
/// A media type given with a message.
pub const CONTENT_TYPE_BYTES_MAX: usize = 255;
/// An MQTT client identifier.
pub const CLIENT_ID_BYTES_MAX: usize = 256;
/// Default: one message's payload.
pub const PAYLOAD_BYTES_MAX: usize = 1 << 20;
