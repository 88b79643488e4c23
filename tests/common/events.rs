//! A client of `GET /v1/datasources/{id}/stream`, over a plain socket: what comes is looked at byte by byte.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};

use serde_json::Value;

use super::{PATIENCE, openapi};

/// An event of a stream, or a line of one in NDJSON.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// `message` for a record.
    pub name: String,
    pub id: Option<String>,
    pub data: Value,
}

/// A stream that is open.
pub struct EventStream {
    tcp: BufReader<TcpStream>,
    /// Status line and headers.
    pub head: String,
    /// What came and was not looked at.
    rest: Vec<u8>,
    is_over: bool,
    /// The id of the last event.
    pub last_id: Option<String>,
    /// What its events, and its lines, are by the description of the API.
    schemas: Option<(&'static str, &'static str)>,
}

impl EventStream {
    /// Opens the stream of `press-4`, with a query string or none; it has to be answered with 200.
    pub fn open(addr: SocketAddr, key: &str, query: &str) -> Self {
        Self::open_with(addr, key, query, &[])
    }

    /// As [`EventStream::open`], with more headers.
    pub fn open_with(addr: SocketAddr, key: &str, query: &str, headers: &[(&str, &str)]) -> Self {
        let stream = Self::ask(addr, &format!("/v1/datasources/press-4/stream{query}"), key, headers)
            .unwrap_or_else(|error| panic!("the connection ended: {error}"));
        assert!(stream.head.starts_with("HTTP/1.1 200 "), "{}", stream.head);
        stream
    }

    /// Goes on behind the last event, at this address.
    pub fn come_back(self, addr: SocketAddr, key: &str, query: &str) -> Self {
        let last_id = self.last_id.clone().expect("an event came before");
        drop(self);
        let mut stream = Self::open_with(addr, key, query, &[("last-event-id", &last_id)]);
        stream.last_id = Some(last_id);
        stream
    }

    /// Asks for a stream, whatever is answered.
    pub fn ask(addr: SocketAddr, path: &str, key: &str, headers: &[(&str, &str)]) -> std::io::Result<Self> {
        let bearer = format!("Bearer {key}");
        Self::ask_with(addr, path, &[&[("authorization", bearer.as_str())][..], headers].concat())
    }

    /// As [`EventStream::ask`], with no headers but these.
    pub fn ask_with(addr: SocketAddr, path: &str, headers: &[(&str, &str)]) -> std::io::Result<Self> {
        let mut tcp = TcpStream::connect(addr)?;
        tcp.set_read_timeout(Some(PATIENCE))?;
        let more: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        write!(tcp, "GET {path} HTTP/1.1\r\nhost: g\r\n{more}\r\n")?;
        let mut tcp = BufReader::new(tcp);
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if tcp.read_line(&mut head)? == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
        }
        let schemas = match path.split('?').next() {
            Some("/v1/live") => Some(("LiveEvent", "LiveEvent")),
            Some(path) if path.ends_with("/stream") => Some(("StreamEvent", "StreamLine")),
            _ => None,
        };
        Ok(Self { tcp, head, rest: Vec::new(), is_over: false, last_id: None, schemas })
    }

    /// The socket.
    pub fn socket(&self) -> &TcpStream {
        self.tcp.get_ref()
    }

    /// Takes the next chunk. Returns whether there was one; none is at the end, and when the connection breaks.
    fn take_chunk(&mut self) -> bool {
        let mut size = String::new();
        if self.is_over || !self.tcp.read_line(&mut size).is_ok_and(|n| n > 0) {
            return false;
        }
        let size = usize::from_str_radix(size.trim(), 16).expect("the size of a chunk");
        let mut chunk = vec![0; size + 2];
        if self.tcp.read_exact(&mut chunk).is_err() {
            return false;
        }
        self.is_over = size == 0;
        self.rest.extend_from_slice(&chunk[..size]);
        size > 0
    }

    fn take_until(&mut self, end: &[u8]) -> Option<String> {
        loop {
            if let Some(at) = self.rest.windows(end.len()).position(|window| window == end) {
                let rest = self.rest.split_off(at + end.len());
                let part = std::mem::replace(&mut self.rest, rest);
                return Some(String::from_utf8(part[..at].to_vec()).expect("a stream is UTF-8"));
            }
            if !self.take_chunk() {
                return None;
            }
        }
    }

    /// The next event; `None` at the end of the stream or of the connection.
    pub fn event(&mut self) -> Option<Event> {
        loop {
            let text = self.take_until(b"\n\n")?;
            let mut event = Event { name: "message".to_owned(), id: None, data: Value::Null };
            for line in text.split('\n') {
                match line.split_once(": ").expect("a field") {
                    ("event", name) => event.name = name.to_owned(),
                    ("id", id) => event.id = Some(id.to_owned()),
                    ("data", data) => event.data = serde_json::from_str(data).expect("JSON"),
                    ("retry", _) => {}
                    (other, _) => panic!("a field {other:?}"),
                }
            }
            if event.id.is_some() {
                self.last_id.clone_from(&event.id);
            }
            if event.data != Value::Null {
                if let Some((schema, _)) = self.schemas {
                    openapi::check_event(schema, &event.name, &event.data);
                }
                return Some(event);
            }
        }
    }

    /// The next line of NDJSON.
    pub fn line(&mut self) -> Option<Value> {
        let line = self.take_until(b"\n").map(|line| serde_json::from_str(&line).expect("JSON"))?;
        if let Some((_, schema)) = self.schemas {
            openapi::check_value(schema, &line);
        }
        Some(line)
    }

    /// The next event that is no heartbeat.
    pub fn telling(&mut self) -> Option<Event> {
        loop {
            let event = self.event()?;
            if event.name != "heartbeat" {
                return Some(event);
            }
        }
    }

    /// The next record, which has to come.
    pub fn record(&mut self) -> Value {
        let event = self.telling().expect("a record");
        assert_eq!((event.name.as_str(), event.id), ("message", Some(event.data["offset"].to_string())));
        event.data
    }

    /// The next so many records, by their payloads.
    pub fn payloads(&mut self, count: usize) -> Vec<Value> {
        (0..count).map(|_| self.record()["payload"].take()).collect()
    }

    /// The reason in the last event, behind which nothing comes.
    pub fn end(&mut self) -> String {
        loop {
            let event = self.telling().expect("an event that says why");
            if event.name == "end" {
                assert_eq!(self.event(), None);
                return event.data["reason"].as_str().expect("a reason").to_owned();
            }
        }
    }
}
