//! `public_url` and `public_mqtt`: where clients reach the gateway, if that is not where it listens.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A URL under which clients reach HTTP: scheme, host, port, and the path that a proxy takes off; or empty.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PublicUrl(String);

/// Where clients reach MQTT: host and port, and whether over TLS.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PublicMqtt {
    host: String,
    port: u16,
    tls: bool,
}

/// The text is no address that clients could use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not of the form {form}")]
pub struct PublicAddressError {
    text: String,
    form: &'static str,
}

const URL_FORM: &str = "https://HOST[:PORT][/PATH]";
const MQTT_FORM: &str = "mqtt://HOST[:PORT] or mqtts://HOST[:PORT]";

impl PublicUrl {
    /// The URL, without a slash at its end; `None` if none is set.
    pub fn get(&self) -> Option<&str> {
        (!self.0.is_empty()).then_some(&self.0)
    }
}

impl PublicMqtt {
    /// Host, port and whether over TLS; `None` if none is set.
    pub fn get(&self) -> Option<(&str, u16, bool)> {
        (!self.host.is_empty()).then_some((&self.host, self.port, self.tls))
    }
}

/// Whether a host, with a port or not, holds nothing that a shell would interpret.
fn is_plain_host(host: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_' | b':' | b'[' | b']');
    !host.is_empty() && !host.starts_with(['-', ':']) && host.bytes().all(plain)
}

/// Splits a port off. An IPv6 address stands in brackets, and comes without them.
fn split_port(authority: &str) -> Option<(&str, Option<u16>)> {
    let (host, rest) = match authority.strip_prefix('[') {
        Some(rest) => rest.split_once(']')?,
        None => match authority.find(':') {
            Some(at) => authority.split_at(at),
            None => (authority, ""),
        },
    };
    match rest.strip_prefix(':') {
        Some(port) => Some((host, Some(port.parse().ok().filter(|port| *port > 0)?))),
        None => rest.is_empty().then_some((host, None)),
    }
}

impl FromStr for PublicUrl {
    type Err = PublicAddressError;

    fn from_str(text: &str) -> Result<Self, PublicAddressError> {
        let no = || PublicAddressError { text: text.to_owned(), form: URL_FORM };
        if text.is_empty() {
            return Ok(Self::default());
        }
        let rest = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://")).ok_or_else(no)?;
        let (authority, path) = rest.find('/').map_or((rest, ""), |at| rest.split_at(at));
        let of_path = |b: u8| b.is_ascii_alphanumeric() || b"/._-~".contains(&b);
        let is_whole =
            is_plain_host(authority) && split_port(authority).is_some() && path.bytes().all(of_path);
        if is_whole { Ok(Self(text.trim_end_matches('/').to_owned())) } else { Err(no()) }
    }
}

impl FromStr for PublicMqtt {
    type Err = PublicAddressError;

    fn from_str(text: &str) -> Result<Self, PublicAddressError> {
        let no = || PublicAddressError { text: text.to_owned(), form: MQTT_FORM };
        if text.is_empty() {
            return Ok(Self::default());
        }
        let (rest, tls) = match text.strip_prefix("mqtts://") {
            Some(rest) => (rest, true),
            None => (text.strip_prefix("mqtt://").ok_or_else(no)?, false),
        };
        let (host, port) =
            Some(rest).filter(|rest| is_plain_host(rest)).and_then(split_port).ok_or_else(no)?;
        let port = port.unwrap_or(if tls { 8883 } else { 1883 });
        if host.is_empty() { Err(no()) } else { Ok(Self { host: host.to_owned(), port, tls }) }
    }
}

impl fmt::Display for PublicMqtt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, port, tls } = self;
        let scheme = if *tls { "mqtts" } else { "mqtt" };
        match host.as_str() {
            "" => Ok(()),
            host if host.contains(':') => write!(f, "{scheme}://[{host}]:{port}"),
            host => write!(f, "{scheme}://{host}:{port}"),
        }
    }
}

impl Serialize for PublicUrl {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for PublicUrl {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

impl Serialize for PublicMqtt {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PublicMqtt {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_public_url_is_one_that_a_shell_takes_as_it_is() {
        for (text, url) in [
            ("https://gw.example.com", "https://gw.example.com"),
            ("http://10.0.0.1:8080/", "http://10.0.0.1:8080"),
            ("https://example.com/gate", "https://example.com/gate"),
            ("https://[2001:db8::1]:8443", "https://[2001:db8::1]:8443"),
        ] {
            assert_eq!(text.parse::<PublicUrl>().expect(text).get(), Some(url));
        }
        assert_eq!("".parse::<PublicUrl>().expect("none").get(), None);
        for bad in [
            "gw.example.com",
            "ftp://a",
            "https://",
            "https://a b",
            "https://a;b",
            "https://a:0",
            "https://a?x",
            "https://u@a",
        ] {
            assert!(bad.parse::<PublicUrl>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_public_mqtt_has_the_port_of_its_scheme_unless_it_names_one() {
        for (text, host, port, tls) in [
            ("mqtt://gw.example", "gw.example", 1883, false),
            ("mqtts://gw.example", "gw.example", 8883, true),
            ("mqtts://gw.example:443", "gw.example", 443, true),
            ("mqtt://[::1]:1884", "::1", 1884, false),
        ] {
            let parsed: PublicMqtt = text.parse().expect(text);
            assert_eq!(parsed.get(), Some((host, port, tls)));
            assert_eq!(parsed.to_string().parse(), Ok(parsed));
        }
        for bad in
            ["gw.example", "mqtt://", "mqtt://a/b", "mqtt://a:b", "mqtt://a:70000", "mqtt://$(a)", "ws://a"]
        {
            assert!(bad.parse::<PublicMqtt>().is_err(), "{bad}");
        }
    }
}
