//! MQTT over WebSocket: chapter 6. The frames are made by hand (RFC 6455), so that packets can be cut
//! anywhere.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use super::stage::Stage;
use crate::common::PATIENCE;
use crate::common::wire::{
    CONNACK, Message, PINGREQ, PINGRESP, PUBACK, PUBLISH, SUBACK, VERSIONS, Version::V5, publish, subscribe,
};

const TEXT: u8 = 1;
const BINARY: u8 = 2;
const CLOSE: u8 = 8;

/// A WebSocket, client side.
struct Socket {
    stream: TcpStream,
    /// Of the binary frames that came, what was not taken yet.
    content: Vec<u8>,
}

/// The answer to an opening handshake.
struct Opening {
    status: String,
    headers: Vec<String>,
}

impl Opening {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find_map(|line| {
            let (found, value) = line.split_once(':')?;
            found.eq_ignore_ascii_case(name).then_some(value.trim())
        })
    }
}

impl Socket {
    /// Asks for a WebSocket at `/mqtt` with these subprotocols.
    fn open(stage: &Stage, protocols: Option<&str>) -> (Self, Opening) {
        let mut stream = TcpStream::connect(stage.gateway.http).expect("the listener accepts");
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket option");
        stream.set_nodelay(true).expect("a socket option");
        let protocols = protocols.map_or(String::new(), |p| format!("Sec-WebSocket-Protocol: {p}\r\n"));
        let request = format!(
            "GET /mqtt HTTP/1.1\r\nHost: {}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n{protocols}\r\n",
            stage.gateway.http
        );
        stream.write_all(request.as_bytes()).expect("the request is sent");
        let mut head = Vec::new();
        let mut byte = [0];
        while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).expect("an answer") == 1 {
            head.push(byte[0]);
        }
        let head = String::from_utf8(head).expect("text");
        let mut lines = head.lines().map(str::to_owned);
        let opening = Opening { status: lines.next().unwrap_or_default(), headers: lines.collect() };
        (Self { stream, content: Vec::new() }, opening)
    }

    /// One that speaks MQTT.
    fn mqtt(stage: &Stage) -> Self {
        let (socket, opening) = Self::open(stage, Some("mqtt"));
        assert!(opening.status.contains(" 101 "), "{}", opening.status);
        assert_eq!(opening.header("sec-websocket-protocol"), Some("mqtt"));
        // The example of RFC 6455, section 1.3.
        assert_eq!(opening.header("sec-websocket-accept"), Some("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="));
        socket
    }

    /// Sends one frame; masked, as a client's has to be.
    fn frame(&mut self, last: bool, opcode: u8, content: &[u8]) {
        const MASK: [u8; 4] = [0x37, 0xFA, 0x21, 0x3D];
        let mut bytes = vec![u8::from(last) << 7 | opcode];
        match u16::try_from(content.len()).expect("a short frame") {
            length @ 0..126 => bytes.push(0x80 | u8::try_from(length).expect("seven bits")),
            length => {
                bytes.push(0x80 | 126);
                bytes.extend(length.to_be_bytes());
            }
        }
        bytes.extend(MASK);
        bytes.extend(content.iter().zip(MASK.iter().cycle()).map(|(byte, mask)| byte ^ mask));
        // That the other side has closed already is for the reader to find.
        let _ = self.stream.write_all(&bytes);
    }

    fn send(&mut self, content: &[u8]) {
        self.frame(true, BINARY, content);
    }

    /// One frame from the server: opcode and content. `None` is the end.
    fn next_frame(&mut self) -> Option<(u8, Vec<u8>)> {
        let mut head = [0; 2];
        self.stream.read_exact(&mut head).ok()?;
        assert_eq!(head[1] & 0x80, 0, "a server does not mask");
        let mut length = u64::from(head[1]);
        if length >= 126 {
            let mut more = vec![0; if length == 126 { 2 } else { 8 }];
            self.stream.read_exact(&mut more).ok()?;
            length = more.iter().fold(0, |length, &byte| length << 8 | u64::from(byte));
        }
        let mut content = vec![0; usize::try_from(length).expect("a length that fits memory")];
        self.stream.read_exact(&mut content).ok()?;
        Some((head[0] & 0x0F, content))
    }

    /// The next packet: first byte and body.
    fn packet(&mut self, kind: u8) -> (u8, Vec<u8>) {
        loop {
            if let [first, length, rest @ ..] = &self.content[..] {
                assert!(*length < 0x80, "a short packet");
                let length = usize::from(*length);
                if rest.len() >= length {
                    let packet = (*first, rest[..length].to_vec());
                    self.content.drain(..2 + length);
                    assert_eq!(packet.0 >> 4, kind, "{packet:02x?}");
                    return packet;
                }
            }
            let (opcode, mut content) = self.next_frame().expect("a frame");
            // Whatever a packet is cut into, what comes is binary.
            assert!(matches!(opcode, 0 | BINARY), "opcode {opcode}");
            self.content.append(&mut content);
        }
    }

    /// The connection has to end: with a close frame or without.
    fn closed(&mut self) {
        while let Some((opcode, content)) = self.next_frame() {
            if opcode == CLOSE {
                self.frame(true, CLOSE, &content);
            }
        }
    }
}

#[test]
fn packets_travel_in_binary_frames_however_they_are_cut() {
    let stage = Stage::new();
    for version in VERSIONS {
        let mut socket = Socket::mqtt(&stage);
        // A byte at a time.
        for byte in stage.hello(version, "ws").packet() {
            socket.send(&[byte]);
        }
        assert_eq!(socket.packet(CONNACK).1[..2], [0, 0]);
        // Many packets in one frame, and half of one more.
        let half = publish(version, 9, "a", b"half");
        let (front, back) = half.split_at(3);
        let several =
            [&PINGREQ[..], &publish(version, 7, "a", b"x"), &publish(version, 8, "a", b"y"), front].concat();
        socket.send(&several);
        let mut kinds: Vec<u8> = Vec::new();
        for _ in 0..3 {
            loop {
                if socket.content.len() >= 2 {
                    break;
                }
                let (opcode, mut content) = socket.next_frame().expect("a frame");
                assert_eq!(opcode, BINARY);
                socket.content.append(&mut content);
            }
            let kind = socket.content[0] >> 4;
            socket.packet(kind);
            kinds.push(kind);
        }
        kinds.sort_unstable();
        assert_eq!(kinds, [PUBACK, PUBACK, PINGRESP]);
        socket.send(back);
        assert_eq!(socket.packet(PUBACK).1[..2], [0, 9]);
        // A message of several frames.
        let ping = PINGREQ;
        socket.frame(false, BINARY, &ping[..1]);
        socket.frame(true, 0, &ping[1..]);
        socket.packet(PINGRESP);
        // It is the same gateway behind it.
        socket.send(&subscribe(version, 10, &["b"]));
        socket.packet(SUBACK);
        stage.client(version, "tcp").publish(0, "b", "from TCP");
        let (first, body) = socket.packet(PUBLISH);
        let message = Message::read(version, &crate::common::wire::Frame { first, body });
        assert_eq!(message.payload, b"from TCP");
    }
}

#[test]
fn a_frame_of_text_ends_the_connection() {
    let stage = Stage::new();
    for version in VERSIONS {
        let mut socket = Socket::mqtt(&stage);
        socket.frame(true, TEXT, &stage.hello(version, "ws").packet());
        socket.closed();
        let mut socket = Socket::mqtt(&stage);
        socket.send(&stage.hello(version, "ws").packet());
        socket.packet(CONNACK);
        socket.frame(true, TEXT, &PINGREQ);
        socket.closed();
    }
}

#[test]
fn mqtt_is_chosen_among_the_subprotocols_and_nothing_else_is_spoken() {
    let stage = Stage::new();
    let (mut socket, opening) = Socket::open(&stage, Some("chat, mqtt"));
    assert_eq!(opening.header("sec-websocket-protocol"), Some("mqtt"), "{}", opening.status);
    socket.send(&stage.hello(V5, "ws").packet());
    socket.packet(CONNACK);
    for protocols in [None, Some("chat"), Some("mqtts")] {
        let (_, opening) = Socket::open(&stage, protocols);
        assert!(!opening.status.contains(" 101 "), "{protocols:?}: {}", opening.status);
    }
}

#[test]
fn a_malformed_packet_ends_a_websocket_as_it_ends_a_connection() {
    let stage = Stage::new();
    let mut socket = Socket::mqtt(&stage);
    socket.send(&stage.hello(V5, "ws").packet());
    socket.packet(CONNACK);
    socket.send(&[0x00, 0]);
    let (_, body) = socket.packet(crate::common::wire::DISCONNECT);
    assert_eq!(body[0], 0x81);
    socket.stream.set_read_timeout(Some(Duration::from_secs(5))).expect("a socket option");
    socket.closed();
}
