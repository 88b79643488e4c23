//! The frames of a WebSocket (RFC 6455, section 5), decoded in place: the bytes of one socket read are
//! unmasked and moved together in the reader's own buffer. Nothing is collected here but the payload of a
//! control frame, so a message may have any length, and a length that a stranger announces allocates nothing.

const OPCODE_CONTINUATION: u8 = 0x0;
const OPCODE_TEXT: u8 = 0x1;
pub(super) const OPCODE_BINARY: u8 = 0x2;
pub(super) const OPCODE_CLOSE: u8 = 0x8;
const OPCODE_PING: u8 = 0x9;
pub(super) const OPCODE_PONG: u8 = 0xA;

/// The last frame of a message.
const FIN_BIT: u8 = 0x80;
/// The largest header: two bytes, a length of eight, a mask of four.
const WEBSOCKET_HEADER_BYTES_MAX: usize = 14;
/// The largest payload of a control frame: RFC 6455, section 5.5.
const CONTROL_FRAME_BYTES_MAX: usize = 125;

/// Status codes of a close, RFC 6455 section 7.4.1.
pub(super) const STATUS_NORMAL: u16 = 1000;
const STATUS_PROTOCOL_ERROR: u16 = 1002;
const STATUS_UNSUPPORTED_DATA: u16 = 1003;

/// Appends a message as one frame, unmasked because it is a server's.
pub(super) fn put_frame(out: &mut Vec<u8>, opcode: u8, payload: &[u8]) {
    let length = u16::try_from(payload.len()).expect("a frame of ours is at most WEBSOCKET_FRAME_BYTES_MAX");
    out.reserve(4 + payload.len());
    out.push(FIN_BIT | opcode);
    match u8::try_from(length) {
        Ok(short) if short < 126 => out.push(short),
        _ => {
            out.push(126);
            out.extend_from_slice(&length.to_be_bytes());
        }
    }
    out.extend_from_slice(payload);
}

/// A violation of the WebSocket protocol by the client.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct WebSocketFault {
    pub(super) status: u16,
    pub(super) text: &'static str,
}

impl WebSocketFault {
    fn protocol(text: &'static str) -> Self {
        Self { status: STATUS_PROTOCOL_ERROR, text }
    }
}

/// What a run of the client's bytes held.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct DecodedFrames {
    /// How many bytes of binary messages are now at the front of the buffer.
    pub(super) bytes: usize,
    /// The newest ping's payload.
    pub(super) ping: Option<Vec<u8>>,
    /// The status to answer a close frame with. Bytes behind the close frame are ignored.
    pub(super) close: Option<u16>,
}

/// Decodes a client's frames, wherever the socket's reads cut them.
#[derive(Default)]
pub(super) struct WebSocketDecoder {
    /// A header that is not complete yet.
    header: [u8; WEBSOCKET_HEADER_BYTES_MAX],
    header_bytes: usize,
    /// The frame whose payload is being read.
    frame: Option<WebSocketFrame>,
    /// The payload of a control frame, as far as it has arrived.
    control: Vec<u8>,
    /// A message has begun and has not ended.
    in_message: bool,
    /// The close frame has arrived.
    pub(super) closed: bool,
}

struct WebSocketFrame {
    opcode: u8,
    /// How many bytes of the payload are still missing.
    left: u64,
    /// Rotated so that its first byte applies to the payload's next byte.
    mask: [u8; 4],
}

impl WebSocketDecoder {
    /// Decodes `raw` and moves the payload of binary messages to its front.
    pub(super) fn decode(&mut self, raw: &mut [u8]) -> Result<DecodedFrames, WebSocketFault> {
        let mut took = DecodedFrames::default();
        let mut at = 0;
        loop {
            let Some(frame) = &mut self.frame else {
                let Some(&byte) = raw.get(at) else { return Ok(took) };
                at += 1;
                self.frame = self.header_byte(byte)?;
                continue;
            };
            let here = raw.len() - at;
            let n = usize::try_from(frame.left).map_or(here, |left| left.min(here));
            frame.left -= n as u64;
            unmask(&mut raw[at..at + n], &mut frame.mask);
            if frame.opcode >= OPCODE_CLOSE {
                self.control.extend_from_slice(&raw[at..at + n]);
            } else {
                raw.copy_within(at..at + n, took.bytes);
                took.bytes += n;
            }
            at += n;
            if frame.left > 0 {
                return Ok(took);
            }
            let opcode = frame.opcode;
            self.frame = None;
            let control = std::mem::take(&mut self.control);
            match opcode {
                OPCODE_PING => took.ping = Some(control),
                OPCODE_CLOSE => {
                    self.closed = true;
                    took.close = Some(close_status(&control)?);
                    return Ok(took);
                }
                _ => {}
            }
        }
    }

    /// Adds a header's next byte. Returns the frame when the header is complete.
    fn header_byte(&mut self, byte: u8) -> Result<Option<WebSocketFrame>, WebSocketFault> {
        self.header[self.header_bytes] = byte;
        self.header_bytes += 1;
        if self.header_bytes == 1 {
            self.check_first_byte(byte)?;
            return Ok(None);
        }
        let (opcode, short) = (self.header[0] & 0x0F, self.header[1] & 0x7F);
        if self.header_bytes == 2 {
            if self.header[1] & 0x80 == 0 {
                return Err(WebSocketFault::protocol("a client's frame has to be masked"));
            }
            if opcode >= OPCODE_CLOSE && usize::from(short) > CONTROL_FRAME_BYTES_MAX {
                return Err(WebSocketFault::protocol("a control frame has at most 125 bytes"));
            }
        }
        let length_bytes = match short {
            126 => 2,
            127 => 8,
            _ => 0,
        };
        if self.header_bytes < 2 + length_bytes + 4 {
            return Ok(None);
        }
        let (length, mask) = self.header[2..self.header_bytes].split_at(length_bytes);
        let long = length.iter().fold(0, |n: u64, &byte| n << 8 | u64::from(byte));
        let left = match short {
            126 if long < 126 => {
                return Err(WebSocketFault::protocol("a frame's length is longer than it need be"));
            }
            127 if long <= u64::from(u16::MAX) || long >> 63 != 0 => {
                return Err(WebSocketFault::protocol("a frame's length of eight bytes is out of range"));
            }
            126 | 127 => long,
            short => u64::from(short),
        };
        let mask = [mask[0], mask[1], mask[2], mask[3]];
        self.header_bytes = 0;
        Ok(Some(WebSocketFrame { opcode, left, mask }))
    }

    fn check_first_byte(&mut self, byte: u8) -> Result<(), WebSocketFault> {
        let fin = byte & FIN_BIT != 0;
        if byte & 0x70 != 0 {
            return Err(WebSocketFault::protocol("a reserved bit is set, and no extension was agreed on"));
        }
        match byte & 0x0F {
            // [MQTT-6.0.0-1]
            OPCODE_TEXT => Err(WebSocketFault {
                status: STATUS_UNSUPPORTED_DATA,
                text: "a text frame: MQTT is in binary frames",
            }),
            OPCODE_BINARY if self.in_message => {
                Err(WebSocketFault::protocol("a new message began inside an unfinished message"))
            }
            OPCODE_CONTINUATION if !self.in_message => {
                Err(WebSocketFault::protocol("a continuation without a message that has begun"))
            }
            OPCODE_BINARY | OPCODE_CONTINUATION => {
                self.in_message = !fin;
                Ok(())
            }
            OPCODE_CLOSE | OPCODE_PING | OPCODE_PONG if fin => Ok(()),
            OPCODE_CLOSE | OPCODE_PING | OPCODE_PONG => {
                Err(WebSocketFault::protocol("a control frame cannot be in pieces"))
            }
            _ => Err(WebSocketFault::protocol("a frame of a type that is reserved")),
        }
    }
}

/// The status to answer a client's close frame with: its own.
fn close_status(payload: &[u8]) -> Result<u16, WebSocketFault> {
    match payload {
        [] => Ok(STATUS_NORMAL),
        &[high, low, ..] => match u16::from_be_bytes([high, low]) {
            status @ (1000..=1003 | 1007..=1014 | 3000..=4999) => Ok(status),
            _ => Err(WebSocketFault::protocol("a close with a status that may not be sent")),
        },
        _ => Err(WebSocketFault::protocol("a close with half a status")),
    }
}

/// Unmasks `bytes`, and rotates the mask for the bytes that follow.
fn unmask(bytes: &mut [u8], mask: &mut [u8; 4]) {
    let [a, b, c, d] = *mask;
    let wide = u64::from_ne_bytes([a, b, c, d, a, b, c, d]);
    mask.rotate_left(bytes.len() % 4);
    let (words, rest) = bytes.as_chunks_mut::<8>();
    for word in words {
        *word = (u64::from_ne_bytes(*word) ^ wide).to_ne_bytes();
    }
    for (byte, mask) in rest.iter_mut().zip([a, b, c, d, a, b, c]) {
        *byte ^= mask;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::limits::WEBSOCKET_FRAME_BYTES_MAX;

    /// A client's frame, masked.
    fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
        let mask = [0x12, 0x34, 0x56, 0x78];
        let mut out = vec![first];
        match payload.len() {
            n @ 0..126 => out.push(0x80 | u8::try_from(n).expect("below 126")),
            n @ 126..=0xFFFF => {
                out.push(0x80 | 126);
                out.extend(u16::try_from(n).expect("two bytes").to_be_bytes());
            }
            n => {
                out.push(0x80 | 127);
                out.extend((n as u64).to_be_bytes());
            }
        }
        out.extend(mask);
        out.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
        out
    }

    /// The data, the pings, and the end.
    type Taken = (Vec<u8>, Vec<Vec<u8>>, Result<Option<u16>, WebSocketFault>);

    /// What comes of `bytes` when they are read `step` at a time.
    fn taken(bytes: &[u8], step: usize) -> Taken {
        let (mut frames, mut data, mut pings) = (WebSocketDecoder::default(), Vec::new(), Vec::new());
        for piece in bytes.chunks(step) {
            let mut piece = piece.to_vec();
            match frames.decode(&mut piece) {
                Ok(took) => {
                    data.extend_from_slice(&piece[..took.bytes]);
                    pings.extend(took.ping);
                    if took.close.is_some() {
                        return (data, pings, Ok(took.close));
                    }
                }
                Err(fault) => return (data, pings, Err(fault)),
            }
        }
        (data, pings, Ok(None))
    }

    #[test]
    fn the_status_says_what_a_client_did_wrong() {
        let unmasked = [FIN_BIT | OPCODE_BINARY, 1, 0];
        let long_ping = frame(FIN_BIT | OPCODE_PING, &[0; 126]);
        let wide_16 = [FIN_BIT | OPCODE_BINARY, 0x80 | 126, 0, 125];
        let wide_64 = [FIN_BIT | OPCODE_BINARY, 0x80 | 127, 0, 0, 0, 0, 0, 0, 0xFF, 0xFF];
        let huge = [FIN_BIT | OPCODE_BINARY, 0x80 | 127, 0x80, 0, 0, 0, 0, 0, 0, 0];
        let mask = [0; 4];
        let twice = [frame(OPCODE_BINARY, b"a"), frame(FIN_BIT | OPCODE_BINARY, b"b")].concat();
        for (bytes, status) in [
            (frame(FIN_BIT | OPCODE_TEXT, b"hello"), 1003),
            (frame(OPCODE_TEXT, b"hello"), 1003),
            (unmasked.to_vec(), 1002),
            (long_ping, 1002),
            ([&wide_16[..], &mask].concat(), 1002),
            ([&wide_64[..], &mask].concat(), 1002),
            ([&huge[..], &mask].concat(), 1002),
            (twice, 1002),
            (frame(FIN_BIT | OPCODE_CONTINUATION, b"a"), 1002),
            (frame(OPCODE_PING, b""), 1002),
            (frame(FIN_BIT | 0x40 | OPCODE_BINARY, b"a"), 1002),
            (frame(FIN_BIT | 0x3, b""), 1002),
            (frame(FIN_BIT | 0xB, b""), 1002),
            (frame(FIN_BIT | OPCODE_CLOSE, &[3]), 1002),
            (frame(FIN_BIT | OPCODE_CLOSE, &1005u16.to_be_bytes()), 1002),
        ] {
            for step in [1, bytes.len()] {
                let (_, _, end) = taken(&bytes, step);
                assert_eq!(end.map_err(|fault| fault.status), Err(status), "{bytes:02x?}");
            }
        }
    }

    #[test]
    fn a_close_is_answered_with_its_own_status_and_ends_the_stream() {
        let bytes = |payload: &[u8]| {
            [frame(FIN_BIT | OPCODE_BINARY, b"last"), frame(FIN_BIT | OPCODE_CLOSE, payload)].concat()
        };
        for (payload, status) in [(&b""[..], 1000), (&[0x03, 0xE9][..], 1001), (b"\x0F\xA0bye", 4000)] {
            let behind = [bytes(payload), frame(FIN_BIT | OPCODE_BINARY, b"too late")].concat();
            for step in [1, 3, behind.len()] {
                assert_eq!(taken(&behind, step), (b"last".to_vec(), Vec::new(), Ok(Some(status))));
            }
        }
    }

    proptest! {
        #[test]
        fn messages_come_out_as_they_went_in_however_they_are_cut(
            messages in prop::collection::vec(
                (prop::collection::vec(any::<u8>(), 0..300), 1usize..4, any::<bool>()), 0..8),
            step in 1usize..400,
            large in prop::bool::weighted(0.05),
        ) {
            let (mut wire, mut sent, mut pings) = (Vec::new(), Vec::new(), 0);
            for (payload, pieces, ping) in &messages {
                let payload = if large { payload.repeat(400) } else { payload.clone() };
                let length = payload.len().div_ceil(*pieces).max(1);
                let mut parts: Vec<&[u8]> = payload.chunks(length).collect();
                if parts.is_empty() {
                    parts.push(&[]);
                }
                for (i, part) in parts.iter().enumerate() {
                    let fin = if i + 1 == parts.len() { FIN_BIT } else { 0 };
                    wire.extend(frame(fin | if i == 0 { OPCODE_BINARY } else { OPCODE_CONTINUATION }, part));
                    if *ping {
                        // Between the pieces of a message, as section 5.4 allows.
                        wire.extend(frame(FIN_BIT | OPCODE_PING, b"there?"));
                        wire.extend(frame(FIN_BIT | OPCODE_PONG, b"unasked"));
                        pings += 1;
                    }
                }
                sent.extend(payload);
            }
            let (data, answered, end) = taken(&wire, step);
            prop_assert_eq!(data, sent);
            prop_assert_eq!(end, Ok(None));
            prop_assert_eq!(answered.is_empty(), pings == 0);
            prop_assert!(answered.len() <= pings && answered.iter().all(|ping| ping == b"there?"));
        }

        #[test]
        fn our_frames_are_as_long_as_they_say(length in 0usize..=WEBSOCKET_FRAME_BYTES_MAX) {
            let mut out = Vec::new();
            put_frame(&mut out, OPCODE_BINARY, &vec![7; length]);
            let header = if length < 126 { 2 } else { 4 };
            prop_assert_eq!(out.len(), header + length);
            let said = if header == 2 { usize::from(out[1]) } else { usize::from(u16::from_be_bytes([out[2], out[3]])) };
            prop_assert_eq!((out[0], said), (FIN_BIT | OPCODE_BINARY, length));
        }

        #[test]
        fn garbage_is_a_fault_or_data_and_never_a_panic(
            bytes in prop::collection::vec(any::<u8>(), 0..200), step in 1usize..64,
        ) {
            let (data, _, _) = taken(&bytes, step);
            prop_assert!(data.len() <= bytes.len());
        }
    }
}
