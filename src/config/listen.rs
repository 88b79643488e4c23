//! Where a front listens: `HOST:PORT`. A name such as `localhost` stands for all its addresses, which are looked up
//! when the listener is bound.

use std::fmt;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A host, which is an address or a name, and a port; port 0 takes a free one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenAddress {
    host: String,
    port: u16,
}

/// The text is not `HOST:PORT`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not HOST:PORT, such as 127.0.0.1:1883, [::1]:1883 or localhost:1883")]
pub struct ListenAddressError(String);

impl ListenAddress {
    /// Takes the address over that the system chose, if it was to choose the port.
    pub fn pin(&mut self, addr: SocketAddr) {
        if self.port == 0 {
            *self = addr.into();
        }
    }

    /// Its addresses, IPv4 first, each once, at least one.
    ///
    /// # Errors
    /// A name that cannot be resolved.
    pub fn resolve(&self) -> io::Result<Vec<SocketAddr>> {
        let mut found: Vec<SocketAddr> = Vec::new();
        for addr in (self.host.as_str(), self.port).to_socket_addrs()? {
            if !found.contains(&addr) {
                found.push(addr);
            }
        }
        found.sort_by_key(SocketAddr::is_ipv6);
        if found.is_empty() {
            return Err(io::Error::new(io::ErrorKind::NotFound, "the name has no address"));
        }
        Ok(found)
    }

    /// Changes the port.
    pub fn set_port(&mut self, port: u16) {
        self.port = port;
    }
}

impl From<SocketAddr> for ListenAddress {
    fn from(addr: SocketAddr) -> Self {
        let host = match addr {
            SocketAddr::V4(addr) => addr.ip().to_string(),
            SocketAddr::V6(addr) if addr.scope_id() != 0 => format!("{}%{}", addr.ip(), addr.scope_id()),
            SocketAddr::V6(addr) => addr.ip().to_string(),
        };
        Self { host, port: addr.port() }
    }
}

impl FromStr for ListenAddress {
    type Err = ListenAddressError;

    fn from_str(text: &str) -> Result<Self, ListenAddressError> {
        let no = || ListenAddressError(text.to_owned());
        if let Ok(addr) = text.parse::<SocketAddr>() {
            return Ok(addr.into());
        }
        let (host, port) = text.rsplit_once(':').ok_or_else(no)?;
        let is_name_letter = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
        // What consists of digits and dots alone is meant as an address, and is none.
        let is_number = host.bytes().all(|b| b.is_ascii_digit() || b == b'.');
        if host.is_empty() || host.len() > 253 || is_number || !host.bytes().all(is_name_letter) {
            return Err(no());
        }
        if !port.bytes().all(|b| b.is_ascii_digit()) {
            return Err(no());
        }
        Ok(Self { host: host.to_owned(), port: port.parse().map_err(|_| no())? })
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, port } = self;
        if host.contains(':') { write!(f, "[{host}]:{port}") } else { write!(f, "{host}:{port}") }
    }
}

impl Serialize for ListenAddress {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ListenAddress {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_names_are_read_and_shown_as_they_are_written() {
        for text in ["127.0.0.1:1883", "[::1]:0", "0.0.0.0:65535", "localhost:1883", "gw-1.example:8080"] {
            assert_eq!(text.parse::<ListenAddress>().expect(text).to_string(), text);
        }
        for text in
            ["", "1883", ":1883", "localhost", "localhost:", "localhost:x", "localhost:+1", "localhost:65536"]
        {
            assert!(text.parse::<ListenAddress>().is_err(), "{text}");
        }
        for text in ["127.0.0:1883", "::1:1883", "a b:1", "http://localhost:80", "[::1:80"] {
            assert!(text.parse::<ListenAddress>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_name_stands_for_all_its_addresses() {
        let addrs = "localhost:1883".parse::<ListenAddress>().expect("read").resolve().expect("it is known");
        assert!(addrs.iter().all(|addr| addr.ip().is_loopback() && addr.port() == 1883), "{addrs:?}");
        assert!("no-such-host.invalid:1".parse::<ListenAddress>().expect("read").resolve().is_err());
    }
}
