//! The frames of HTTP/2 that carry nothing: WINDOW_UPDATE, PRIORITY, SETTINGS, PING, RST_STREAM, CONTINUATION and DATA
//! that is empty or only padding cost the gateway work, and a client may send any number of them (RFC 9113, section 10.5). `h2` bounds what
//! they take in memory and not how many there are. Here they are counted as they are read, against what a client that
//! does something needs: some with each request, with each frame of a body, and with what it was sent. The first bytes
//! of the connection tell also whether it is HTTP/2 at all.

use std::time::Instant;

use crate::front::proxied::PROXY_HEADER_STARTS;

/// What an HTTP/2 client sends first.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const HTTP2_HEADER_BYTES: usize = 9;

/// How many idle frames a client may have sent beyond what it needs.
const IDLE_FRAMES_MAX: i64 = 1_000;
/// How many more a second after that.
const IDLE_FRAMES_PER_S: i64 = 50;
/// Idle frames that go with a request, and with a frame of its body.
const FRAMES_PER_REQUEST: i64 = 4;
const FRAMES_PER_DATA: i64 = 2;
/// What a reset counts: more than its request allows for, so that requests which are only reset are a flood too.
const FRAMES_PER_RESET: i64 = 6;
/// For every so many bytes that it is sent, a client may open its windows once.
const BYTES_PER_WINDOW_UPDATE: usize = 1_024;

const DATA: u8 = 0x0;
const HEADERS: u8 = 0x1;
const RST_STREAM: u8 = 0x3;
const PADDED: u8 = 0x8;

/// Why a connection does not go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum FrameFault {
    /// Frames.
    #[error("too many HTTP/2 frames that carry nothing")]
    Flood,
    /// What a proxy begins with, from a client that no trusted proxy is.
    #[error("a PROXY protocol header that does not come from a trusted proxy")]
    ProxyHeader,
}

/// Counts the frames that a connection has read.
pub(super) struct FrameMeter {
    place: StreamPlace,
    /// How many idle frames may still come.
    allowed: i64,
    refilled_at: Instant,
}

/// What a connection may begin with that is told here from all else: HTTP/2, and what a proxy begins with.
const STARTS: [&[u8]; 3] = [PREFACE, PROXY_HEADER_STARTS[0], PROXY_HEADER_STARTS[1]];

/// Where in the bytes of the connection the meter is.
enum StreamPlace {
    /// So many bytes have come, which each of these may begin with.
    Start(usize, [bool; STARTS.len()]),
    /// Not HTTP/2.
    OtherProtocol,
    /// In a frame's header, of which so many bytes are there.
    Header([u8; HTTP2_HEADER_BYTES], usize),
    /// Before the byte that says how much of a DATA frame of this length is padding.
    PadLength(usize),
    /// So many bytes before the next header.
    Payload(usize),
}

impl FrameMeter {
    pub(super) fn new() -> Self {
        let place = StreamPlace::Start(0, [true; STARTS.len()]);
        Self { place, allowed: IDLE_FRAMES_MAX, refilled_at: Instant::now() }
    }

    /// Whether the connection has turned out to be HTTP/2.
    pub(super) fn is_http2(&self) -> bool {
        !matches!(self.place, StreamPlace::Start(..) | StreamPlace::OtherProtocol)
    }

    /// Counts the frames in bytes that were read.
    ///
    /// # Errors
    /// [`FrameFault`].
    pub(super) fn read(&mut self, mut bytes: &[u8]) -> Result<(), FrameFault> {
        while !bytes.is_empty() {
            match &mut self.place {
                StreamPlace::OtherProtocol => return Ok(()),
                StreamPlace::Start(came, may_be) => {
                    let mut begun = None;
                    for (index, start) in STARTS.iter().enumerate() {
                        may_be[index] &= start.get(*came) == bytes.first();
                        begun = begun.or((may_be[index] && *came + 1 == start.len()).then_some(index));
                    }
                    (*came, bytes) = (*came + 1, &bytes[1..]);
                    match begun {
                        Some(0) => self.place = StreamPlace::Header([0; HTTP2_HEADER_BYTES], 0),
                        Some(_) => {
                            self.place = StreamPlace::OtherProtocol;
                            return Err(FrameFault::ProxyHeader);
                        }
                        None if *may_be == [false; STARTS.len()] => self.place = StreamPlace::OtherProtocol,
                        None => {}
                    }
                }
                StreamPlace::PadLength(length) => {
                    let (carried, rest) = (length.saturating_sub(1 + usize::from(bytes[0])), *length - 1);
                    bytes = &bytes[1..];
                    self.place = match rest {
                        0 => StreamPlace::Header([0; HTTP2_HEADER_BYTES], 0),
                        rest => StreamPlace::Payload(rest),
                    };
                    self.count(DATA, carried)?;
                }
                StreamPlace::Payload(left) => {
                    let n = bytes.len().min(*left);
                    *left -= n;
                    if *left == 0 {
                        self.place = StreamPlace::Header([0; HTTP2_HEADER_BYTES], 0);
                    }
                    bytes = &bytes[n..];
                }
                StreamPlace::Header(header, came) => {
                    let n = bytes.len().min(HTTP2_HEADER_BYTES - *came);
                    header[*came..*came + n].copy_from_slice(&bytes[..n]);
                    *came += n;
                    bytes = &bytes[n..];
                    if *came == HTTP2_HEADER_BYTES {
                        let [a, b, c, kind, flags, ..] = *header;
                        let length = u32::from_be_bytes([0, a, b, c]) as usize;
                        let is_padded = kind == DATA && flags & PADDED != 0;
                        self.place = match length {
                            0 => StreamPlace::Header([0; HTTP2_HEADER_BYTES], 0),
                            length if is_padded => StreamPlace::PadLength(length),
                            length => StreamPlace::Payload(length),
                        };
                        if length == 0 || !is_padded {
                            self.count(kind, length)?;
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// Notes that the client was sent so many bytes.
    pub(super) fn sent(&mut self, bytes: usize) {
        let updates = i64::try_from(bytes.div_ceil(BYTES_PER_WINDOW_UPDATE)).unwrap_or(i64::MAX);
        self.allow(updates);
    }

    /// Counts a frame that carries so many bytes. DATA that only ends a stream is paid for by its request.
    fn count(&mut self, kind: u8, carried: usize) -> Result<(), FrameFault> {
        match kind {
            DATA if carried > 0 => self.allow(FRAMES_PER_DATA),
            HEADERS => self.allow(FRAMES_PER_REQUEST),
            RST_STREAM => self.allowed -= FRAMES_PER_RESET,
            _ => self.allowed -= 1,
        }
        if self.allowed < 0 {
            // The clock is looked at only then.
            let seconds = self.refilled_at.elapsed().as_secs();
            self.refilled_at = Instant::now();
            self.allow(IDLE_FRAMES_PER_S.saturating_mul(i64::try_from(seconds).unwrap_or(i64::MAX)));
        }
        if self.allowed < 0 { Err(FrameFault::Flood) } else { Ok(()) }
    }

    fn allow(&mut self, frames: i64) {
        self.allowed = self.allowed.saturating_add(frames).min(IDLE_FRAMES_MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let [_, a, b, c] = u32::try_from(payload.len()).expect("short").to_be_bytes();
        [&[a, b, c, kind, flags, 0, 0, 0, 1], payload].concat()
    }

    fn begun() -> FrameMeter {
        let mut meter = FrameMeter::new();
        assert_eq!(meter.read(PREFACE), Ok(()));
        meter
    }

    #[test]
    fn every_kind_of_frame_that_carries_nothing_is_a_flood_at_some_number() {
        let idle: [(u8, u8, &[u8]); 11] = [
            (0x8, 0, &[0, 0, 0, 1]),         // WINDOW_UPDATE
            (0x2, 0, &[0; 5]),               // PRIORITY
            (0x4, 0, &[]),                   // SETTINGS
            (0x6, 0, &[0; 8]),               // PING
            (0x9, 0, &[]),                   // CONTINUATION
            (0x0, 0, &[]),                   // empty DATA
            (0x0, 1, &[]),                   // empty DATA that ends a stream
            (0x0, 8, &[3, 0, 0, 0]),         // DATA that is only padding
            (0x0, 8, &[200, 0]),             // DATA with more padding than it has bytes
            (0x3, 0, &[0; 4]),               // RST_STREAM
            (0xbe, 0, b"of a type to come"), // unknown
        ];
        for (kind, flags, payload) in idle {
            let (mut meter, frame) = (begun(), frame(kind, flags, payload));
            let allowed = (0..2 * IDLE_FRAMES_MAX).take_while(|_| meter.read(&frame).is_ok()).count();
            assert!((100..=1_000).contains(&allowed), "{allowed} of type {kind}");
        }
        // Requests that are only reset.
        let (mut meter, pair) = (begun(), [frame(HEADERS, 4, b"x"), frame(RST_STREAM, 0, &[0; 4])].concat());
        let allowed = (0..2 * IDLE_FRAMES_MAX).take_while(|_| meter.read(&pair).is_ok()).count();
        assert!((100..=1_000).contains(&allowed), "{allowed}");
    }

    #[test]
    fn a_client_that_does_something_is_never_a_flood() {
        let mut meter = begun();
        let upload = [frame(DATA, 0, &[0; 16_384]), frame(0x6, 1, &[0; 8])].concat();
        let request =
            [frame(HEADERS, 5, b"x"), frame(0x2, 0, &[0; 5]), frame(0x8, 0, &[0, 0, 1, 0])].concat();
        let update = frame(0x8, 0, &[0, 0, 64, 0]);
        let padded = [frame(DATA, PADDED, &[2, 7, 7, 0, 0]), frame(0x6, 1, &[0; 8])].concat();
        let posted = [frame(HEADERS, 4, b"x"), frame(DATA, 0, b"{}"), frame(DATA, 1, b"")].concat();
        for _ in 0..10_000 {
            assert_eq!(meter.read(&upload), Ok(()));
            assert_eq!(meter.read(&padded), Ok(()));
            assert_eq!(meter.read(&posted), Ok(()));
            assert_eq!(meter.read(&request), Ok(()));
            // A download: windows are opened again for what has come.
            meter.sent(16_384);
            assert_eq!(meter.read(&update.repeat(2)), Ok(()));
        }
    }

    #[test]
    fn frames_are_found_wherever_the_reads_end_and_http_1_is_not_looked_at() {
        let bytes = [PREFACE, &frame(HEADERS, 4, b"abc"), &frame(0x6, 0, &[0; 8]).repeat(3)].concat();
        for split in 1..bytes.len() {
            let mut meter = FrameMeter::new();
            assert_eq!(meter.read(&bytes[..split]), Ok(()));
            assert_eq!(meter.read(&bytes[split..]), Ok(()));
            assert_eq!(meter.allowed, IDLE_FRAMES_MAX - 3, "{split}");
        }
        let mut meter = FrameMeter::new();
        for _ in 0..10_000 {
            assert_eq!(meter.read(b"GET / HTTP/1.1\r\n\r\n"), Ok(()));
        }
    }

    #[test]
    fn what_a_proxy_begins_with_is_told_wherever_the_reads_end() {
        for start in PROXY_HEADER_STARTS {
            for split in 0..start.len() {
                let mut meter = FrameMeter::new();
                assert_eq!(meter.read(&start[..split]), Ok(()));
                assert_eq!(meter.read(&start[split..]), Err(FrameFault::ProxyHeader));
            }
        }
        for other in
            [&b"PROPFIND / HTTP/1.1\r\n"[..], b"\r\n\r\nGET / HTTP/1.1\r\n", b"PRI * HTTP/1.1\r\n", b"P"]
        {
            let mut meter = FrameMeter::new();
            assert_eq!(meter.read(other), Ok(()));
            assert!(!meter.is_http2());
        }
        assert!(begun().is_http2());
    }
}
