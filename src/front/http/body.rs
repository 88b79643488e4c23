//! A request's body, read to its end and decoded from its content encoding (gzip, zstd). The limit on
//! one body and the limit on all bodies together apply to what is in memory, so that a small compressed
//! body cannot expand past them.
//!
//! Decompression uses `async-compression` directly rather than a layer around the service. The layer
//! stops at the end of a gzip body's first member, which would acknowledge the rest of it unread, and
//! it lets a zstd body ask for a window of 128 MiB.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use async_compression::tokio::bufread::{GzipDecoder, ZstdDecoder};
use async_compression::zstd::DParameter;
use axum::body::Body;
use axum::http::HeaderMap;
use axum::http::header::{CONTENT_ENCODING, CONTENT_LENGTH};
use bytes::Bytes;
use futures_util::{Stream, StreamExt, TryStreamExt};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::io::{ReaderStream, StreamReader};

use crate::front::problem::Problem;
use crate::limits::ZSTD_WINDOW_LOG_MAX;
use crate::observe::cause::Cause;

/// The size of the chunks that a decoder produces.
const DECODED_CHUNK_BYTES: usize = 32 << 10;

/// The limits on one body.
#[derive(Clone, Copy)]
pub(super) struct BodyLimits {
    /// Bytes, on the wire and decompressed.
    pub(super) bytes_max: usize,
    /// The key in the configuration that sets it, or empty.
    pub(super) setting: &'static str,
    /// How long it may take until its last byte has arrived.
    pub(super) time_max: Duration,
}

/// A body that was read. Until it is dropped it holds its permits of the memory for all bodies.
pub(super) struct ReceivedBody {
    pub(super) bytes: Bytes,
    _room: Option<OwnedSemaphorePermit>,
}

/// Reads a body to its end. `room` holds a permit for each byte that all bodies together may take.
pub(super) async fn read(
    headers: &HeaderMap,
    body: Body,
    limits: BodyLimits,
    room: &Arc<Semaphore>,
) -> Result<ReceivedBody, Problem> {
    let encoding = encoding(headers)?;
    let claimed = headers.get(CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    if claimed.is_some_and(|length| length > limits.bytes_max as u64) {
        return Err(too_large(limits));
    }
    match tokio::time::timeout(limits.time_max, collect(decode(encoding, body, limits), limits, room)).await {
        Ok(received) => received,
        Err(_) => {
            let ms_max = limits.time_max.as_millis();
            let words = format!("The body was not there within {ms_max} ms (http.body_ms_max).");
            Err(Problem::new(Cause::Timeout, words))
        }
    }
}

/// How a body is encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum BodyEncoding {
    Identity,
    Gzip,
    Zstd,
}

fn encoding(headers: &HeaderMap) -> Result<BodyEncoding, Problem> {
    let values = headers.get_all(CONTENT_ENCODING).iter();
    let codings = values.flat_map(|value| value.as_bytes().split(|&b| b == b',')).map(<[u8]>::trim_ascii);
    let mut encoding = BodyEncoding::Identity;
    for coding in codings.filter(|coding| !coding.is_empty() && !coding.eq_ignore_ascii_case(b"identity")) {
        let known = match coding.to_ascii_lowercase().as_slice() {
            b"gzip" | b"x-gzip" => BodyEncoding::Gzip,
            b"zstd" => BodyEncoding::Zstd,
            _ => BodyEncoding::Identity,
        };
        if known == BodyEncoding::Identity || encoding != BodyEncoding::Identity {
            let words = "A body is sent as it is, or with one of the content encodings gzip and zstd.";
            return Err(Problem::new(Cause::ContentEncoding, words));
        }
        encoding = known;
    }
    Ok(encoding)
}

type BodyChunks = Pin<Box<dyn Stream<Item = io::Result<Bytes>> + Send>>;

/// The body's chunks as they were before they were encoded.
fn decode(encoding: BodyEncoding, body: Body, limits: BodyLimits) -> BodyChunks {
    // The encoded bytes are limited as well: an encoded body can be endless and decode to nothing.
    let mut arrived = 0;
    let raw = body.into_data_stream().map(move |chunk| {
        let chunk = chunk.map_err(io::Error::other)?;
        arrived += chunk.len();
        if arrived > limits.bytes_max { Err(io::ErrorKind::FileTooLarge.into()) } else { Ok(chunk) }
    });
    match encoding {
        BodyEncoding::Identity => Box::pin(raw),
        BodyEncoding::Gzip => {
            let mut decoder = GzipDecoder::new(StreamReader::new(raw));
            decoder.multiple_members(true);
            let words = "The body is not valid gzip";
            Box::pin(ReaderStream::with_capacity(decoder, DECODED_CHUNK_BYTES).map_err(|e| invalid(words, e)))
        }
        BodyEncoding::Zstd => {
            let window = DParameter::window_log_max(ZSTD_WINDOW_LOG_MAX);
            let mut decoder = ZstdDecoder::with_params(StreamReader::new(raw), &[window]);
            decoder.multiple_members(true);
            let words = "The body is not valid zstd with a window of at most 8 MiB";
            Box::pin(ReaderStream::with_capacity(decoder, DECODED_CHUNK_BYTES).map_err(|e| invalid(words, e)))
        }
    }
}

fn invalid(words: &str, error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::FileTooLarge => error,
        _ => io::Error::new(io::ErrorKind::InvalidData, format!("{words}: {error}.")),
    }
}

async fn collect(
    mut chunks: BodyChunks,
    limits: BodyLimits,
    room: &Arc<Semaphore>,
) -> Result<ReceivedBody, Problem> {
    let mut bytes = Vec::new();
    let mut taken: Option<OwnedSemaphorePermit> = None;
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.map_err(|error| match error.kind() {
            io::ErrorKind::FileTooLarge => too_large(limits),
            io::ErrorKind::InvalidData => Problem::new(Cause::Malformed, error.to_string()),
            _ => Problem::new(Cause::Malformed, "The body broke off before its end."),
        })?;
        if bytes.len() + chunk.len() > limits.bytes_max {
            return Err(too_large(limits));
        }
        // Two bodies that are half read would wait for each other's room for ever: refuse one instead.
        let permits = u32::try_from(chunk.len()).map_err(|_| too_large(limits))?;
        let more = room.clone().try_acquire_many_owned(permits).map_err(|_| {
            Problem::new(Cause::Bodies, "Too many request bodies are in memory already; try again.")
        })?;
        match &mut taken {
            Some(taken) => taken.merge(more),
            None => taken = Some(more),
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(ReceivedBody { bytes: bytes.into(), _room: taken })
}

fn too_large(limits: BodyLimits) -> Problem {
    let BodyLimits { bytes_max, setting, .. } = limits;
    let setting = if setting.is_empty() { String::new() } else { format!(" ({setting})") };
    let words = format!("The body is over the limit of {bytes_max} bytes{setting}, compressed or not.");
    Problem::new(Cause::TooLarge, words).with("limit", bytes_max)
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use async_compression::tokio::bufread::{GzipEncoder, ZstdEncoder};
    use async_compression::zstd::CParameter;
    use tokio::io::AsyncReadExt;

    use super::*;
    use crate::observe::cause::ProblemKind;

    const LIMITS: BodyLimits =
        BodyLimits { bytes_max: 1 << 20, setting: "", time_max: Duration::from_secs(20) };

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
        runtime.expect("a runtime").block_on(future)
    }

    fn read_as(coding: &str, body: Vec<u8>, room: &Arc<Semaphore>) -> Result<ReceivedBody, ProblemKind> {
        let coding = coding.parse().expect("a header value");
        let headers = [(CONTENT_ENCODING, coding)].into_iter().collect();
        block_on(read(&headers, Body::from(body), LIMITS, room)).map_err(|problem| problem.kind())
    }

    fn plenty() -> Arc<Semaphore> {
        Arc::new(Semaphore::new(1 << 30))
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        let mut encoder = GzipEncoder::new(Cursor::new(bytes));
        block_on(encoder.read_to_end(&mut out)).expect("in memory");
        out
    }

    fn zstd(bytes: &[u8], window_log: u32) -> Vec<u8> {
        let mut out = Vec::new();
        let level = async_compression::Level::Fastest;
        let window = [CParameter::window_log(window_log)];
        let mut encoder = ZstdEncoder::with_quality_and_params(Cursor::new(bytes), level, &window);
        block_on(encoder.read_to_end(&mut out)).expect("in memory");
        out
    }

    #[test]
    fn a_body_comes_out_as_it_was_before_it_was_compressed() {
        for (coding, body) in [
            ("identity", b"hello".to_vec()),
            ("gzip", gzip(b"hello")),
            ("X-GZIP", gzip(b"hello")),
            ("identity, gzip", gzip(b"hello")),
            ("zstd", zstd(b"hello", 20)),
        ] {
            let received = read_as(coding, body, &plenty());
            assert_eq!(received.map(|r| r.bytes).as_deref(), Ok(&b"hello"[..]), "{coding}");
        }
    }

    #[test]
    fn every_member_of_a_compressed_body_is_read() {
        let twice = [gzip(b"hel"), gzip(b"lo")].concat();
        assert_eq!(read_as("gzip", twice, &plenty()).map(|r| r.bytes).as_deref(), Ok(&b"hello"[..]));
        let twice = [zstd(b"hel", 20), zstd(b"lo", 20)].concat();
        assert_eq!(read_as("zstd", twice, &plenty()).map(|r| r.bytes).as_deref(), Ok(&b"hello"[..]));
    }

    #[test]
    fn a_compressed_body_that_breaks_off_or_goes_on_is_malformed() {
        for (coding, whole) in [("gzip", gzip(b"hello")), ("zstd", zstd(b"hello", 20))] {
            let cut = whole[..whole.len() - 1].to_vec();
            assert_eq!(read_as(coding, cut, &plenty()).err(), Some(ProblemKind::Malformed), "{coding}");
            let more = [&whole[..], b"x"].concat();
            assert_eq!(read_as(coding, more, &plenty()).err(), Some(ProblemKind::Malformed), "{coding}");
            assert_eq!(read_as(coding, b"hello".to_vec(), &plenty()).err(), Some(ProblemKind::Malformed));
        }
    }

    #[test]
    fn the_limit_holds_for_what_comes_out_at_one_below_and_one_above() {
        let (at, above) = (vec![7; LIMITS.bytes_max], vec![7; LIMITS.bytes_max + 1]);
        type Encode = fn(&[u8]) -> Vec<u8>;
        let encoders: [(&str, Encode); 3] =
            [("identity", |body| body.to_vec()), ("gzip", gzip), ("zstd", |body| zstd(body, 20))];
        for (coding, encode) in encoders {
            let taken = read_as(coding, encode(&at), &plenty()).map(|r| r.bytes.len());
            assert_eq!(taken, Ok(LIMITS.bytes_max), "{coding}");
            assert_eq!(
                read_as(coding, encode(&above), &plenty()).err(),
                Some(ProblemKind::TooLarge),
                "{coding}"
            );
        }
    }

    #[test]
    fn a_compressed_body_that_decodes_to_nothing_is_limited_too() {
        // A skippable frame of zstd: 8 bytes of header, then what it says.
        let frame = [&[0x50, 0x2A, 0x4D, 0x18, 0, 0, 1, 0][..], &[0; 1 << 16]].concat();
        let body = frame.repeat(LIMITS.bytes_max / frame.len() + 1);
        assert_eq!(read_as("zstd", body, &plenty()).err(), Some(ProblemKind::TooLarge));
    }

    #[test]
    fn a_zstd_body_may_not_ask_for_a_window_over_8_mib() {
        let log_max = ZSTD_WINDOW_LOG_MAX;
        // More bytes than a window, or zstd would write a smaller one.
        let body = vec![7; LIMITS.bytes_max];
        assert!(read_as("zstd", zstd(&body, log_max), &plenty()).is_ok());
        assert_eq!(read_as("zstd", zstd(&body, log_max + 1), &plenty()).err(), Some(ProblemKind::Malformed));
    }

    #[test]
    fn an_encoding_that_is_not_known_or_is_applied_twice_is_refused() {
        for coding in ["br", "deflate", "gzip, zstd", "gzip, gzip"] {
            let refused = read_as(coding, gzip(b"hello"), &plenty()).err();
            assert_eq!(refused, Some(ProblemKind::ContentEncoding), "{coding}");
        }
    }

    #[test]
    fn bodies_in_memory_are_bounded_together() {
        let room = Arc::new(Semaphore::new(10));
        let first = read_as("identity", vec![0; 6], &room).map_err(|kind| panic!("{kind:?}"));
        assert_eq!(read_as("identity", vec![0; 5], &room).err(), Some(ProblemKind::Unavailable));
        drop(first);
        assert!(read_as("identity", vec![0; 10], &room).is_ok());
    }

    #[test]
    fn a_body_that_does_not_come_is_not_waited_for() {
        let limits = BodyLimits { time_max: Duration::from_millis(20), ..LIMITS };
        let never = Body::from_stream(futures_util::stream::pending::<io::Result<Bytes>>());
        let read = block_on(read(&HeaderMap::new(), never, limits, &plenty()));
        assert_eq!(read.err().map(|problem| problem.kind()), Some(ProblemKind::Timeout));
    }
}
