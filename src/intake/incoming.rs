//! One message on its way in, as a front read it, with the ids by which a repetition is recognized.

use crate::limits::MESSAGE_ID_BYTES_MAX;
use crate::log::OnceId;
use crate::message::RecordFlags;

use super::Refusal;

/// One message, as a front read it.
#[derive(Clone, Copy)]
pub struct IncomingMessage<'a> {
    /// Relative to the key's datasource. For a `*` key it begins with the datasource, unless the front's
    /// address names that.
    pub topic: &'a str,
    /// The payload bytes.
    pub payload: &'a [u8],
    /// The media type, or empty.
    pub content_type: &'a str,
    /// MQTT 5 properties to hand on, in wire form, or empty.
    pub properties: &'a [u8],
    /// How it was published.
    pub flags: RecordFlags,
    /// The id that its sender gave it, if any: for `intake.dedup_window_s`, another message with this id
    /// in the same datasource is not kept again.
    pub message_id: Option<&'a str>,
    /// The QoS 2 exchange that it opens, if any: until that is released, the message is not kept again.
    pub exchange: Option<Exchange>,
}

/// A QoS 2 exchange: from a PUBLISH, sent as often as it takes, to its PUBREL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exchange {
    /// The number of the session, never used for another one.
    pub session: u64,
    /// The message's packet id in it.
    pub packet_id: u16,
}

impl Exchange {
    pub(super) fn once_id(self) -> OnceId {
        OnceId::of_exchange(self.session, self.packet_id)
    }
}

/// Checks an id that a client gave a message: 1 to [`MESSAGE_ID_BYTES_MAX`] bytes, without control
/// characters.
///
/// # Errors
/// [`Refusal::MessageId`].
pub fn check_message_id(id: &str) -> Result<(), Refusal> {
    let fits = (1..=MESSAGE_ID_BYTES_MAX).contains(&id.len()) && !id.chars().any(char::is_control);
    if fits { Ok(()) } else { Err(Refusal::MessageId) }
}
