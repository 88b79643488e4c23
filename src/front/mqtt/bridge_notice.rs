//! Bridge notices: the messages and wills by which the bridges of other brokers tell whether they are connected.
//! They are for whoever watches the broker at the other end. Headgate has no such topics, and takes and drops them: a
//! bridge that is refused for its notices tries for ever, and brings nothing else.

/// Where Mosquitto's bridges publish them, unless they are told otherwise: `{prefix}{client id}/state`.
const BRIDGE_NOTICE_TOPIC_PREFIX: &str = "$SYS/broker/connection/";

/// Whether a topic is of a bridge's notices.
#[inline]
pub(super) fn is_bridge_notice(topic: &str) -> bool {
    topic.starts_with(BRIDGE_NOTICE_TOPIC_PREFIX)
}
