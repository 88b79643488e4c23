//! The PROXY protocol (v1 and v2): a proxy of TCP says in a header, before the bytes that it passes on, whose connection
//! it is. The header is read from the socket to its last byte and not one further, so that whatever comes behind it,
//! a TLS handshake for instance, finds the connection as if nothing had been there.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use proxy_header::{ParseConfig, Protocol, ProxyHeader};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};

use super::ProxyTrust;
use crate::limits::{PROXY_V1_BYTES_MAX, PROXY_V2_BYTES_MAX};
use crate::observe::cause::Cause;

/// What every header of version 1 begins with.
const V1_START: &[u8] = b"PROXY ";
/// What every header of version 2 begins with.
const V2_START: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";
/// What tells headers from all else that a connection may begin with: HTTP may have line ends before its first request,
/// and never NUL.
pub const PROXY_HEADER_STARTS: [&[u8]; 2] = [V1_START, b"\r\n\r\n\0"];
/// Signature, command, family and length of version 2.
const V2_FIXED_BYTES: usize = 16;
/// Version and command of a connection that is the proxy's own.
const V2_LOCAL: u8 = 0x20;
/// How long to wait for the rest of what may yet become a header.
const PEEK_AGAIN_AFTER: Duration = Duration::from_millis(5);

/// Why a connection from a proxy cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ProxyHeaderError {
    /// It ended, or failed, before its header was whole; a check whether the port is open, for instance.
    #[error("the connection ended within its PROXY protocol header")]
    Ended,
    /// The header is not what the protocol has.
    #[error("the PROXY protocol header cannot be read: {0}")]
    Malformed(&'static str),
    /// There is no header, and there has to be one.
    #[error("there is no PROXY protocol header, and proxy_protocol is \"required\"")]
    Missing,
    /// The header was not whole in time.
    #[error("the PROXY protocol header was not whole in time")]
    TimedOut,
    /// A client that no trusted proxy is has sent one.
    #[error(
        "it begins with a PROXY protocol header, which is taken from trusted_proxies alone (proxy_protocol)"
    )]
    Untrusted,
}

impl ProxyHeaderError {
    /// The cause for metrics and refusals; `None` if there is nothing to say, because the client just left.
    pub fn cause(&self) -> Option<Cause> {
        match self {
            Self::Ended => None,
            Self::Malformed(_) | Self::Missing | Self::TimedOut => Some(Cause::ProxyHeader),
            Self::Untrusted => Some(Cause::UntrustedProxy),
        }
    }
}

impl From<io::Error> for ProxyHeaderError {
    fn from(_: io::Error) -> Self {
        Self::Ended
    }
}

/// Whether bytes, which may be the first of a connection or of a part of them, are those of a header. Three are needed
/// to tell it from what else clients begin with.
pub fn is_proxy_header(first: &[u8]) -> bool {
    first.len() >= 3 && PROXY_HEADER_STARTS.iter().any(|start| is_prefix_of_either(first, start))
}

/// Whether one is how the other begins.
fn is_prefix_of_either(bytes: &[u8], start: &[u8]) -> bool {
    let n = bytes.len().min(start.len());
    bytes[..n] == start[..n]
}

/// Fails if what a client that is no trusted proxy has sent first is a header. For where the first bytes would be lost
/// otherwise, as in a TLS handshake.
///
/// # Errors
/// [`ProxyHeaderError::Untrusted`], or that the connection has ended.
pub async fn peek_proxy_header(tcp: &TcpStream) -> Result<(), ProxyHeaderError> {
    let mut first = [0; V2_START.len()];
    let n = tcp.peek(&mut first).await?;
    if is_proxy_header(&first[..n]) { Err(ProxyHeaderError::Untrusted) } else { Ok(()) }
}

/// Reads the header of a connection from a trusted proxy, and returns whose connection it is. That is the proxy itself
/// if there is no header, or the header says so (LOCAL, UNKNOWN), or names no IP address.
///
/// # Errors
/// [`ProxyHeaderError`]; the connection has to be closed.
pub async fn read_proxy_header(
    tcp: &mut TcpStream,
    proxy: SocketAddr,
    trust: &ProxyTrust,
    deadline: Instant,
) -> Result<SocketAddr, ProxyHeaderError> {
    let reading = async {
        match begun_version(tcp).await? {
            Some(ProxyVersion::V1) => read_v1(tcp).await,
            Some(ProxyVersion::V2) => read_v2(tcp).await,
            None if trust.is_header_required() => Err(ProxyHeaderError::Missing),
            None => Ok(None),
        }
    };
    let source = timeout_at(deadline, reading).await.map_err(|_| ProxyHeaderError::TimedOut)??;
    Ok(source.unwrap_or(proxy))
}

#[derive(Debug, Clone, Copy)]
enum ProxyVersion {
    V1,
    V2,
}

/// Which header the connection begins with, if it does; nothing is taken from it.
async fn begun_version(tcp: &TcpStream) -> Result<Option<ProxyVersion>, ProxyHeaderError> {
    let mut first = [0; V2_START.len()];
    let mut before = 0;
    loop {
        let n = tcp.peek(&mut first).await?;
        if n == 0 {
            return Err(ProxyHeaderError::Ended);
        }
        let first = &first[..n];
        if first.starts_with(V1_START) {
            return Ok(Some(ProxyVersion::V1));
        }
        if first.starts_with(V2_START) {
            return Ok(Some(ProxyVersion::V2));
        }
        if !is_prefix_of_either(first, V1_START) && !is_prefix_of_either(first, V2_START) {
            return Ok(None);
        }
        // Bytes that were not taken leave the socket ready: nothing says when there are more.
        if n == before {
            tokio::time::sleep(PEEK_AGAIN_AFTER).await;
        }
        before = n;
    }
}

/// Reads a header of version 1: a line.
async fn read_v1(tcp: &mut TcpStream) -> Result<Option<SocketAddr>, ProxyHeaderError> {
    let mut line = [0; PROXY_V1_BYTES_MAX];
    let mut filled = 0;
    while filled < line.len() {
        let there = tcp.peek(&mut line[filled..]).await?;
        if there == 0 {
            return Err(ProxyHeaderError::Ended);
        }
        // All that is there before the line's end is the header's, so that it may be taken.
        let end = line[filled..filled + there].iter().position(|&byte| byte == b'\n');
        let taken = end.map_or(there, |end| end + 1);
        tcp.read_exact(&mut line[filled..filled + taken]).await?;
        filled += taken;
        if end.is_some() {
            return source_in(&line[..filled]);
        }
    }
    Err(ProxyHeaderError::Malformed("its line is longer than version 1 allows"))
}

/// Reads a header of version 2, which says how long it is.
async fn read_v2(tcp: &mut TcpStream) -> Result<Option<SocketAddr>, ProxyHeaderError> {
    let mut header = vec![0; V2_FIXED_BYTES];
    tcp.read_exact(&mut header).await?;
    let rest = usize::from(u16::from_be_bytes([header[14], header[15]]));
    if V2_FIXED_BYTES + rest > PROXY_V2_BYTES_MAX {
        return Err(ProxyHeaderError::Malformed("it is longer than 4 KiB"));
    }
    header.resize(V2_FIXED_BYTES + rest, 0);
    tcp.read_exact(&mut header[V2_FIXED_BYTES..]).await?;
    // The rest of a connection of the proxy's own means nothing (section 2.2), not even its family.
    if header[12] == V2_LOCAL { Ok(None) } else { source_in(&header) }
}

/// The client that a whole header names, if it names an IP address.
fn source_in(header: &[u8]) -> Result<Option<SocketAddr>, ProxyHeaderError> {
    let config = ParseConfig { include_tlvs: false, ..ParseConfig::default() };
    match ProxyHeader::parse(header, config) {
        Ok((parsed, bytes)) if bytes == header.len() => match parsed.proxied_address() {
            Some(proxied) if proxied.protocol != Protocol::Stream => {
                Err(ProxyHeaderError::Malformed("it is for datagrams"))
            }
            Some(proxied) => {
                Ok(Some(SocketAddr::new(proxied.source.ip().to_canonical(), proxied.source.port())))
            }
            None => Ok(None),
        },
        _ => Err(ProxyHeaderError::Malformed("its addresses are not what its version has")),
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;
    use tokio::net::TcpListener;

    use super::*;
    use crate::config::{Config, ProxyProtocol};

    fn v2(command: u8, family: u8, rest: &[u8]) -> Vec<u8> {
        let length = u16::try_from(rest.len()).expect("short").to_be_bytes();
        [V2_START, &[command, family], &length, rest].concat()
    }

    /// What a connection that begins with these bytes is taken for, and what is left of them. `pieces` come apart.
    async fn read(
        pieces: &[&[u8]],
        protocol: ProxyProtocol,
    ) -> (Result<SocketAddr, ProxyHeaderError>, Vec<u8>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let mut client = TcpStream::connect(listener.local_addr().expect("bound")).await.expect("connected");
        client.set_nodelay(true).expect("an option");
        let (mut tcp, _) = listener.accept().await.expect("accepted");
        let proxy: SocketAddr = "10.0.0.7:1".parse().expect("an address");
        let trust = ProxyTrust::new(&Config {
            trusted_proxies: vec!["10.0.0.0/8".parse().expect("a network")],
            proxy_protocol: protocol,
            ..Config::default()
        });
        let sending = async {
            for piece in pieces {
                client.write_all(piece).await.expect("sent");
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            client.shutdown().await.expect("shut down");
        };
        let deadline = Instant::now() + Duration::from_secs(20);
        let (source, ()) = tokio::join!(read_proxy_header(&mut tcp, proxy, &trust, deadline), sending);
        let mut rest = Vec::new();
        let _ = tcp.read_to_end(&mut rest).await;
        (source, rest)
    }

    #[tokio::test]
    async fn a_header_names_the_client_and_takes_nothing_of_what_comes_behind_it() {
        let v4 = [203, 0, 113, 9, 10, 0, 0, 1, 0x12, 0x67, 0x07, 0x5B];
        let mapped =
            ["::ffff:203.0.113.9".parse::<std::net::Ipv6Addr>().expect("v6").octets(), [0; 16]].concat();
        let mapped = [&mapped[..], &[0x12, 0x67, 0x07, 0x5B]].concat();
        let tlvs = [&v4[..], &[0x05, 0, 200], &[7; 200]].concat();
        let unix = [0; 216];
        for (header, source) in [
            (b"PROXY TCP4 203.0.113.9 10.0.0.1 4711 1883\r\n".to_vec(), "203.0.113.9:4711"),
            (b"PROXY TCP6 2001:db8::9 ::1 4711 1883\r\n".to_vec(), "[2001:db8::9]:4711"),
            (b"PROXY UNKNOWN\r\n".to_vec(), "10.0.0.7:1"),
            (b"PROXY UNKNOWN what ever\r\n".to_vec(), "10.0.0.7:1"),
            (v2(0x21, 0x11, &v4), "203.0.113.9:4711"),
            (v2(0x21, 0x11, &tlvs), "203.0.113.9:4711"),
            (v2(0x21, 0x21, &mapped), "203.0.113.9:4711"),
            (v2(0x21, 0x00, &[]), "10.0.0.7:1"),
            (v2(0x21, 0x31, &unix), "10.0.0.7:1"),
            (v2(0x20, 0x00, &[]), "10.0.0.7:1"),
            (v2(0x20, 0x11, &v4), "10.0.0.7:1"),
            (v2(0x20, 0x11, &[]), "10.0.0.7:1"),
        ] {
            let whole = [&header[..], b"\x10behind"].concat();
            let apart: Vec<&[u8]> = whole.chunks(1).collect();
            for pieces in [&[&whole[..]][..], &apart] {
                let (named, rest) = read(pieces, ProxyProtocol::Required).await;
                assert_eq!(named.expect("in order").to_string(), source, "{header:?}");
                assert_eq!(rest, b"\x10behind", "{header:?}");
            }
        }
    }

    #[tokio::test]
    async fn a_header_that_is_not_in_order_is_refused() {
        let v4 = [203, 0, 113, 9, 10, 0, 0, 1, 0x12, 0x67, 0x07, 0x5B];
        let long_line = format!("PROXY TCP4 {}\r\n", "9".repeat(PROXY_V1_BYTES_MAX));
        for header in [
            b"PROXY TCP4 203.0.113.9 10.0.0.1 4711\r\n".to_vec(),
            b"PROXY TCP4 2001:db8::9 ::1 4711 1883\r\n".to_vec(),
            b"PROXY TCP4 203.0.113.9 10.0.0.1 4711 70000\r\n".to_vec(),
            b"PROXY TCP4 203.0.113.9 10.0.0.1 4711 1883\n".to_vec(),
            b"PROXY UDP4 203.0.113.9 10.0.0.1 4711 1883\r\n".to_vec(),
            long_line.into_bytes(),
            v2(0x21, 0x11, &v4[..11]),
            v2(0x21, 0x12, &v4),
            v2(0x21, 0x31, &v4),
            v2(0x21, 0x99, &v4),
            v2(0x22, 0x11, &v4),
            v2(0x11, 0x11, &v4),
            v2(0x21, 0x11, &[&v4[..], &[0; PROXY_V2_BYTES_MAX]].concat()),
            v2(0x20, 0x00, &[0; u16::MAX as usize]),
        ] {
            let (named, _) = read(&[&header], ProxyProtocol::Optional).await;
            let error = named.expect_err("not in order");
            assert!(matches!(error, ProxyHeaderError::Malformed(_)), "{error:?}: {header:?}");
        }
    }

    #[tokio::test]
    async fn the_largest_header_is_read_and_one_byte_more_is_not() {
        for (more, is_read) in [(0, true), (1, false)] {
            let rest = vec![0; PROXY_V2_BYTES_MAX - V2_FIXED_BYTES + more];
            let (named, _) = read(&[&v2(0x20, 0x00, &rest)], ProxyProtocol::Optional).await;
            assert_eq!(named.is_ok(), is_read, "{more}");
        }
    }

    #[tokio::test]
    async fn a_connection_without_a_header_is_the_proxys_own_unless_one_is_required() {
        for bytes in [
            &b"\x10"[..],
            b"POST / HTTP/1.1\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"\r\nGET /",
            b"PR\x16",
        ] {
            let (named, rest) = read(&[bytes], ProxyProtocol::Optional).await;
            assert_eq!((named.expect("served").to_string().as_str(), &rest[..]), ("10.0.0.7:1", bytes));
            let (named, _) = read(&[bytes], ProxyProtocol::Required).await;
            assert!(matches!(named, Err(ProxyHeaderError::Missing)), "{named:?}");
        }
    }

    #[tokio::test]
    async fn a_header_that_breaks_off_is_no_refusal() {
        for bytes in [&b""[..], b"PROXY TCP4 1", b"\r\n\r\n\0\r\nQUIT\n\x21\x11"] {
            let (named, _) = read(&[bytes], ProxyProtocol::Required).await;
            let error = named.expect_err("not whole");
            assert!(error.cause().is_none(), "{error:?}: {bytes:?}");
        }
    }

    #[test]
    fn a_header_is_told_from_what_clients_begin_with() {
        for header in [&b"PRO"[..], b"PROXY TCP4", b"\r\n\r", V2_START, b"\r\n\r\n\0\r\nQUIT\n\x21"] {
            assert!(is_proxy_header(header), "{header:?}");
        }
        for other in [
            &b""[..],
            b"P",
            b"PR",
            b"PRI * HTTP/2.0",
            b"POST /",
            b"PUT /",
            b"PROPFIND / HTTP/1.1",
            b"\r\nGET",
            b"\x16\x03\x01",
        ] {
            assert!(!is_proxy_header(other), "{other:?}");
        }
    }
}
