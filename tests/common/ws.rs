//! A WebSocket by hand: the client's side of RFC 6455, as far as a test makes it speak it.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};

use super::PATIENCE;
use super::wire::Carrier;

/// First bytes of frames.
pub const FIN: u8 = 0x80;
pub const CONTINUATION: u8 = 0x0;
pub const TEXT: u8 = 0x1;
pub const BINARY: u8 = 0x2;
pub const CLOSE: u8 = 0x8;
pub const PING: u8 = 0x9;
pub const PONG: u8 = 0xA;

const MASK: [u8; 4] = [0xA5, 0x00, 0xFF, 0x3C];

/// A frame as a client sends it, masked.
pub fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut out = header(first, payload.len() as u64);
    out.extend(payload.iter().zip(MASK.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    out
}

/// The header of a frame whose payload is this long.
pub fn header(first: u8, length: u64) -> Vec<u8> {
    let mut out = vec![first];
    match length {
        0..126 => out.push(0x80 | u8::try_from(length).expect("below 126")),
        126..=0xFFFF => {
            out.push(0x80 | 126);
            out.extend(u16::try_from(length).expect("two bytes").to_be_bytes());
        }
        _ => {
            out.push(0x80 | 127);
            out.extend(length.to_be_bytes());
        }
    }
    out.extend(MASK);
    out
}

/// The request that opens a WebSocket, with these lines more.
pub fn request(lines: &str) -> String {
    format!(
        "GET /mqtt HTTP/1.1\r\nHost: gateway\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{lines}\r\n"
    )
}

/// An open WebSocket. As a [`Carrier`] it sends each write as one binary message, and reads what is in
/// binary messages.
pub struct WsClient {
    tcp: TcpStream,
    /// What is read of a message and not taken yet.
    payload: Vec<u8>,
}

impl WsClient {
    /// Opens one with the subprotocol `mqtt`.
    pub fn open(addr: SocketAddr) -> Self {
        Self::open_with(addr, &[])
    }

    /// Opens one and sends `early` in the same write as the request.
    pub fn open_with(addr: SocketAddr, early: &[u8]) -> Self {
        let mut tcp = TcpStream::connect_timeout(&addr, PATIENCE).expect("the listener accepts");
        tcp.set_nodelay(true).expect("a socket option");
        tcp.set_read_timeout(Some(PATIENCE)).expect("a socket option");
        let request = request("Sec-WebSocket-Protocol: mqtt\r\nOrigin: https://elsewhere.example\r\n");
        tcp.write_all(&[request.as_bytes(), early].concat()).expect("sent");
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            tcp.read_exact(&mut byte).expect("an answer");
            head.push(byte[0]);
        }
        let head = String::from_utf8(head).expect("ASCII").to_lowercase();
        assert!(head.starts_with("http/1.1 101 "), "{head}");
        assert!(head.contains("\r\nsec-websocket-protocol: mqtt\r\n"), "{head}");
        assert!(head.contains("\r\nsec-websocket-accept: s3pplmbitxaq9kygzzhzrbk+xoo=\r\n"), "{head}");
        Self { tcp, payload: Vec::new() }
    }

    /// Sends bytes as they are.
    pub fn send(&mut self, bytes: &[u8]) {
        let _ = self.tcp.write_all(bytes);
    }

    /// The next frame of the gateway: its first byte and its payload; `None` at the end.
    pub fn next_frame(&mut self) -> io::Result<Option<(u8, Vec<u8>)>> {
        let mut head = [0; 2];
        match self.tcp.read(&mut head[..1])? {
            0 => return Ok(None),
            _ => self.tcp.read_exact(&mut head[1..])?,
        }
        assert_eq!(head[1] & 0x80, 0, "a server's frame is not masked");
        let length = match head[1] {
            126 => {
                let mut length = [0; 2];
                self.tcp.read_exact(&mut length)?;
                u16::from_be_bytes(length).into()
            }
            127 => panic!("no frame of the gateway is that long"),
            short => usize::from(short),
        };
        let mut payload = vec![0; length];
        self.tcp.read_exact(&mut payload)?;
        Ok(Some((head[0], payload)))
    }

    /// The gateway has to send this frame next.
    pub fn expect(&mut self, first: u8, payload: &[u8]) {
        let frame = self.next_frame().expect("a frame in time");
        assert_eq!(frame, Some((first, payload.to_vec())));
    }

    /// The gateway has to close with this status next, and end the connection.
    pub fn closed(&mut self, status: u16) {
        self.expect(FIN | CLOSE, &status.to_be_bytes());
        assert_eq!(self.next_frame().expect("an end in time"), None, "after a close comes nothing");
    }
}

impl Read for WsClient {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.payload.is_empty() {
            match self.next_frame()? {
                Some((first, payload)) if first == FIN | BINARY => self.payload = payload,
                Some((first, payload)) if first == FIN | CLOSE => {
                    assert_eq!(payload, 1000u16.to_be_bytes(), "a close without a fault");
                    assert_eq!(self.next_frame()?, None, "after a close comes nothing");
                    return Ok(0);
                }
                Some(frame) => panic!("{frame:?}"),
                None => panic!("an end without a close"),
            }
        }
        let n = self.payload.len().min(buffer.len());
        buffer[..n].copy_from_slice(&self.payload[..n]);
        self.payload.drain(..n);
        Ok(n)
    }
}

impl Write for WsClient {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.tcp.write_all(&frame(FIN | BINARY, bytes))?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.tcp.flush()
    }
}

impl Carrier for WsClient {
    fn tcp(&self) -> &TcpStream {
        &self.tcp
    }
}
