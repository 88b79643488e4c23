//! A request's body, read to its end and decoded from its content encoding (gzip, zstd). The limit on
//! one body and the memory of its sender ([`crate::memory`]) apply to what is in memory, so that a small compressed
//! body cannot expand past them. A body that comes too slowly is not waited for: it holds memory meanwhile.
//!
//! Decompression uses `async-compression` directly rather than a layer around the service. The layer
//! stops at the end of a gzip body's first member, which would acknowledge the rest of it unread, and
//! it lets a zstd body ask for a window of 128 MiB.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_compression::tokio::bufread::{GzipDecoder, ZstdDecoder};
use async_compression::zstd::DParameter;
use axum::body::Body;
use axum::http::HeaderMap;
use axum::http::header::{CONTENT_ENCODING, CONTENT_LENGTH};
use bytes::Bytes;
use futures_util::{Stream, StreamExt, TryStreamExt};
use tokio::time::Instant;
use tokio_util::io::{ReaderStream, StreamReader};

use crate::front::problem::Problem;
use crate::limits::{HTTP_BODY_BYTES_PER_S_MIN, HTTP_BODY_BYTES_PER_TURN, ZSTD_WINDOW_LOG_MAX};
use crate::memory::{MemoryAccount, MemoryCharge};
use crate::observe::cause::Cause;

/// The size of the chunks that a decoder produces.
const DECODED_CHUNK_BYTES: usize = 32 << 10;
/// What is reserved at once for a body that announces its length; the rest comes as it comes.
const BODY_RESERVE_BYTES: usize = 1 << 20;

/// The limits on one body.
#[derive(Clone, Copy)]
pub(super) struct BodyLimits {
    /// Bytes, on the wire and decompressed.
    pub(super) bytes_max: usize,
    /// The key in the configuration that sets it, or empty.
    pub(super) setting: &'static str,
    /// How long it may take until its last byte has arrived.
    pub(super) time_max: Duration,
    /// How long it may be slower than [`HTTP_BODY_BYTES_PER_S_MIN`].
    pub(super) pace_window: Duration,
}

/// A body that was read. Its memory is charged until it is dropped.
pub(super) struct ReceivedBody {
    pub(super) bytes: Bytes,
    _memory: MemoryCharge,
}

/// Reads a body to its end. Its memory is charged to `account`, before it is taken.
pub(super) async fn read(
    headers: &HeaderMap,
    body: Body,
    limits: BodyLimits,
    account: &Arc<MemoryAccount>,
) -> Result<ReceivedBody, Problem> {
    let encoding = encoding(headers)?;
    let claimed = headers.get(CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    if claimed.is_some_and(|length| length > limits.bytes_max as u64) {
        return Err(too_large(limits));
    }
    let arrived = Arc::new(AtomicU64::new(0));
    let chunks = decode(encoding, body, limits, arrived.clone());
    let length = claimed.filter(|_| encoding == BodyEncoding::Identity);
    let length = length.map(|length| usize::try_from(length).unwrap_or(limits.bytes_max));
    let mut collector = BodyCollector {
        limits,
        length,
        encoding,
        arrived,
        bytes: Vec::new(),
        memory: account.charge(encoding.decoder_bytes())?,
    };
    if let Some(length) = length {
        collector.grow_to(length.min(BODY_RESERVE_BYTES))?;
    }
    match tokio::time::timeout(limits.time_max, collector.collect(chunks)).await {
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

impl BodyEncoding {
    /// What its decoder takes in memory from the start, with the chunks that go in and come out.
    fn decoder_bytes(self) -> usize {
        match self {
            BodyEncoding::Identity => 0,
            BodyEncoding::Gzip => 128 << 10,
            BodyEncoding::Zstd => 512 << 10,
        }
    }
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
fn decode(encoding: BodyEncoding, body: Body, limits: BodyLimits, arrived: Arc<AtomicU64>) -> BodyChunks {
    // The encoded bytes are limited as well: an encoded body can be endless and decode to nothing.
    let raw = body.into_data_stream().map(move |chunk| {
        let chunk = chunk.map_err(io::Error::other)?;
        let bytes = chunk.len() as u64;
        if arrived.fetch_add(bytes, Ordering::Relaxed) + bytes > limits.bytes_max as u64 {
            Err(io::ErrorKind::FileTooLarge.into())
        } else {
            Ok(chunk)
        }
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

/// A body that is being read.
struct BodyCollector {
    limits: BodyLimits,
    encoding: BodyEncoding,
    /// How long it will be, if that is known.
    length: Option<usize>,
    /// Bytes that have arrived, as they are on the wire.
    arrived: Arc<AtomicU64>,
    bytes: Vec<u8>,
    memory: MemoryCharge,
}

impl BodyCollector {
    async fn collect(mut self, mut chunks: BodyChunks) -> Result<ReceivedBody, Problem> {
        let limits = self.limits;
        let (mut window_ends, mut arrived_before) = (Instant::now() + limits.pace_window, 0);
        let mut turn_ends = HTTP_BODY_BYTES_PER_TURN;
        loop {
            match tokio::time::timeout_at(window_ends, chunks.next()).await {
                Ok(None) => break,
                Ok(Some(chunk)) => self.add(&chunk.map_err(|error| match error.kind() {
                    io::ErrorKind::FileTooLarge => too_large(limits),
                    io::ErrorKind::InvalidData => Problem::new(Cause::Malformed, error.to_string()),
                    _ => Problem::new(Cause::Malformed, "The body broke off before its end."),
                })?)?,
                Err(_) => {
                    let arrived = self.arrived.load(Ordering::Relaxed);
                    let least =
                        limits.pace_window.as_millis() * u128::from(HTTP_BODY_BYTES_PER_S_MIN) / 1_000;
                    if u128::from(arrived - arrived_before) < least {
                        return Err(too_slow(limits));
                    }
                    (window_ends, arrived_before) = (Instant::now() + limits.pace_window, arrived);
                }
            }
            if self.bytes.len() >= turn_ends {
                // A compressed body becomes a large one without a wait.
                turn_ends = self.bytes.len() + HTTP_BODY_BYTES_PER_TURN;
                tokio::task::yield_now().await;
            }
        }
        let Self { bytes, mut memory, .. } = self;
        // The decoder is gone by now.
        drop(chunks);
        memory.set_held(bytes.capacity());
        Ok(ReceivedBody { bytes: bytes.into(), _memory: memory })
    }

    fn add(&mut self, chunk: &[u8]) -> Result<(), Problem> {
        if self.bytes.len() + chunk.len() > self.limits.bytes_max {
            return Err(too_large(self.limits));
        }
        self.make_room(chunk.len())?;
        self.bytes.extend_from_slice(chunk);
        Ok(())
    }

    /// Makes room for `more` bytes, and charges for it first. Two bodies that wait for each other's room would wait for
    /// ever: one is refused instead.
    fn make_room(&mut self, more: usize) -> Result<(), Problem> {
        let needed = self.bytes.len() + more;
        if needed <= self.bytes.capacity() {
            return Ok(());
        }
        // A large body of unknown length grows by a quarter and not to twice its size: it is copied more often, and
        // takes less.
        let step = if self.length.is_some() || needed < BODY_RESERVE_BYTES { needed } else { needed / 4 };
        let largest = self.length.unwrap_or(self.limits.bytes_max);
        let ample = needed.saturating_add(step).min(largest).max(needed);
        self.grow_to(ample).or_else(|_| self.grow_to(needed))
    }

    fn grow_to(&mut self, capacity: usize) -> Result<(), Problem> {
        // zstd has a window of what it has decoded last; it is there only as far as it was written.
        let window = match self.encoding {
            BodyEncoding::Zstd => capacity.min(1 << ZSTD_WINDOW_LOG_MAX),
            BodyEncoding::Identity | BodyEncoding::Gzip => 0,
        };
        self.memory.resize(capacity + window + self.encoding.decoder_bytes())?;
        self.bytes.reserve_exact(capacity - self.bytes.len());
        Ok(())
    }
}

fn too_slow(limits: BodyLimits) -> Problem {
    let words = format!(
        "The body comes too slowly: fewer than {HTTP_BODY_BYTES_PER_S_MIN} bytes a second within {:?}.",
        limits.pace_window
    );
    Problem::new(Cause::Timeout, words).with("limit", HTTP_BODY_BYTES_PER_S_MIN)
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
    use crate::memory::MemoryBudget;
    use crate::message::{DatasourceId, KeyId};
    use crate::observe::cause::ProblemKind;

    const LIMITS: BodyLimits = BodyLimits {
        bytes_max: 1 << 20,
        setting: "",
        time_max: Duration::from_secs(20),
        pace_window: Duration::from_secs(10),
    };

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
        runtime.expect("a runtime").block_on(future)
    }

    fn read_as(
        coding: &str,
        body: Vec<u8>,
        account: &Arc<MemoryAccount>,
    ) -> Result<ReceivedBody, ProblemKind> {
        let coding = coding.parse().expect("a header value");
        let headers = [(CONTENT_ENCODING, coding)].into_iter().collect();
        block_on(read(&headers, Body::from(body), LIMITS, account)).map_err(|problem| problem.kind())
    }

    fn account(share_bytes: usize) -> Arc<MemoryAccount> {
        let budget = MemoryBudget::new(4 * share_bytes, share_bytes);
        budget.account_of_key(KeyId([1; 6]), &DatasourceId::new("press-4").expect("slug"))
    }

    fn plenty() -> Arc<MemoryAccount> {
        account(1 << 30)
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
    fn the_bodies_of_a_key_are_bounded_together_and_one_that_never_fits_is_too_large() {
        let account = account(64 << 10);
        let first = read_as("identity", vec![0; 30 << 10], &account).map_err(|kind| panic!("{kind:?}"));
        let second = read_as("identity", vec![0; 40 << 10], &account);
        assert_eq!(second.err(), Some(ProblemKind::TooManyRequests));
        drop(first);
        assert!(read_as("identity", vec![0; 40 << 10], &account).is_ok());
        assert_eq!(read_as("identity", vec![0; 65 << 10], &account).err(), Some(ProblemKind::TooLarge));
    }

    #[test]
    fn a_bomb_is_charged_for_what_it_becomes_and_given_back_when_it_is_refused() {
        let budget = MemoryBudget::new(1 << 30, 700 << 10);
        let account = budget.account_of_key(KeyId([1; 6]), &DatasourceId::new("press-4").expect("slug"));
        let body = vec![7; 900 << 10];
        for (coding, bomb) in [("gzip", gzip(&body)), ("zstd", zstd(&body, 20))] {
            assert!(bomb.len() < 10 << 10, "{} bytes of {coding}", bomb.len());
            assert_eq!(read_as(coding, bomb, &account).err(), Some(ProblemKind::TooLarge), "{coding}");
            assert_eq!(budget.held_bytes(), 0);
        }
    }

    #[test]
    fn a_body_that_does_not_come_is_not_waited_for() {
        let limits = BodyLimits { time_max: Duration::from_millis(20), ..LIMITS };
        let never = Body::from_stream(futures_util::stream::pending::<io::Result<Bytes>>());
        let read = block_on(read(&HeaderMap::new(), never, limits, &plenty()));
        assert_eq!(read.err().map(|problem| problem.kind()), Some(ProblemKind::Timeout));
    }

    #[test]
    fn a_compressed_body_is_decoded_in_turns() {
        for (coding, body) in
            [("gzip", gzip(&vec![7; LIMITS.bytes_max])), ("zstd", zstd(&vec![7; LIMITS.bytes_max], 20))]
        {
            let headers: HeaderMap =
                [(CONTENT_ENCODING, coding.parse().expect("a header value"))].into_iter().collect();
            let account = plenty();
            let mut turns = 0;
            let received = block_on(async {
                let mut reading = std::pin::pin!(read(&headers, Body::from(body), LIMITS, &account));
                std::future::poll_fn(|cx| {
                    turns += 1;
                    reading.as_mut().poll(cx)
                })
                .await
            });
            assert!(received.is_ok());
            assert!(turns >= LIMITS.bytes_max / HTTP_BODY_BYTES_PER_TURN / 2, "{turns} turns of {coding}");
        }
    }

    #[test]
    fn a_body_slower_than_the_least_rate_is_not_waited_for() {
        let coming = |bytes: usize| {
            Body::from_stream(futures_util::stream::unfold(0, move |nth| async move {
                tokio::time::sleep(Duration::from_millis(20)).await;
                (nth < 20).then(|| (Ok::<_, io::Error>(Bytes::from(vec![b'x'; bytes])), nth + 1))
            }))
        };
        // Far fewer bytes than the rate asks for, and far more.
        let limits = BodyLimits { pace_window: Duration::from_millis(100), ..LIMITS };
        let slow = block_on(read(&HeaderMap::new(), coming(1), limits, &plenty()));
        assert_eq!(slow.err().map(|problem| problem.kind()), Some(ProblemKind::Timeout));
        let steady = block_on(read(&HeaderMap::new(), coming(10_000), limits, &plenty()));
        assert_eq!(steady.map(|body| body.bytes.len()).map_err(|problem| problem.kind()), Ok(200_000));
    }
}
