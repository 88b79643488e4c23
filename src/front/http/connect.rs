//! Command lines that connect a device or a reader, ready to paste into a shell in which `HEADGATE_API_KEY` is set.
//! None of them contains the key, so that it gets into no shell history and no ticket; and none gives it to a program as
//! an argument, which every user of the machine can read while it runs.

use std::net::{IpAddr, SocketAddr};

use axum::http::HeaderMap;
use axum::http::header::HOST;
use serde::Serialize;

use super::HttpFrontParts;
use crate::auth::{Scope, Scopes};
use crate::message::DatasourceId;

/// A line for each client. Lines that the key's scopes do not allow are left out.
#[derive(Debug, Serialize)]
pub(super) struct ConnectLines {
    #[serde(skip_serializing_if = "Option::is_none")]
    mosquitto_pub: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    curl: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    python: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    nats: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mosquitto_sub: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    latest: Option<String>,
}

impl ConnectLines {
    /// The lines for a key of `datasource`, as seen by whoever sent `headers`, over HTTPS or not.
    pub(super) fn new(
        datasource: &DatasourceId,
        scopes: Scopes,
        parts: &HttpFrontParts,
        headers: &HeaderMap,
        is_https: bool,
    ) -> Self {
        let address = ConnectAddress::new(parts, headers, is_https);
        let ConnectAddress { base_url, mqtt_host, mqtt_port, tls } = &address;
        // Trusts the certificate authorities of the device's system; for others there is --cafile.
        let (mosquitto_tls, paho_tls) = if *tls { (" --tls-use-os-certs", ", tls={}") } else { ("", "") };
        let publish = |line: String| scopes.allow(Scope::Ingest).then_some(line);
        let subscribe = |line: String| scopes.allow(Scope::Subscribe).then_some(line);
        let mosquitto = |program: &str, rest: &str| {
            mosquitto_line(program, &format!("-h {mqtt_host} -p {mqtt_port}{mosquitto_tls} -q 1 {rest}"))
        };
        Self {
            mosquitto_pub: publish(mosquitto("mosquitto_pub", "-t temperature -m '{\"value\": 21.5}'")),
            curl: publish(curl_line(&format!(
                "-H 'Content-Type: application/json' -d '{{\"value\": 21.5}}' \
                 {base_url}/v1/ingest/{datasource}/temperature"
            ))),
            python: publish(format!(
                "python3 -c 'import os; from paho.mqtt import publish; \
                 publish.single(\"temperature\", \"{{\\\"value\\\": 21.5}}\", qos=1, \
                 hostname=\"{mqtt_host}\", port={mqtt_port}{paho_tls}, \
                 auth={{\"username\": os.environ[\"HEADGATE_API_KEY\"]}})'  # pip install paho-mqtt"
            )),
            nats: nats_server(&parts.nats_servers).and_then(|server| {
                publish(match parts.callout {
                    Some(_) => format!(
                        "NATS_USER=device NATS_PASSWORD=\"$HEADGATE_API_KEY\" nats -s {server} req \
                         ingest.{datasource}.temperature '{{\"value\": 21.5}}'"
                    ),
                    None => nats_script(&server, datasource),
                })
            }),
            mosquitto_sub: subscribe(mosquitto("mosquitto_sub", "-t '#' -v")),
            latest: subscribe(curl_line(&format!("{base_url}/v1/datasources/{datasource}/latest"))),
        }
    }
}

/// A line with one of mosquitto's clients, which finds the key in its file of options, in a directory of its own that only
/// this user can read.
fn mosquitto_line(program: &str, arguments: &str) -> String {
    format!(
        "(d=$(mktemp -d); trap 'rm -rf \"$d\"' EXIT INT TERM; printf '%s\\n' \"-u $HEADGATE_API_KEY\" > \"$d/{program}\"; \
         XDG_CONFIG_HOME=\"$d\" {program} {arguments})"
    )
}

/// A line with curl, which reads the header with the key from its standard input.
fn curl_line(arguments: &str) -> String {
    format!("printf '%s\\n' \"Authorization: Bearer $HEADGATE_API_KEY\" | curl -H @- {arguments}")
}

/// A script that sends a message to a NATS server with the key in a header. The command `nats` takes headers as arguments
/// alone.
fn nats_script(server: &str, datasource: &DatasourceId) -> String {
    format!(
        "python3 - <<'END'  # pip install nats-py\n\
         import asyncio, nats, os\n\
         async def main():\n    \
         client = await nats.connect(\"{server}\")\n    \
         headers = {{\"Authorization\": os.environ[\"HEADGATE_API_KEY\"]}}\n    \
         answer = await client.request(\"ingest.{datasource}.temperature\", b'{{\"value\": 21.5}}', headers=headers)\n    \
         print(answer.data.decode())\n\
         asyncio.run(main())\n\
         END"
    )
}

/// The first NATS server whose address holds nothing that a shell would interpret.
fn nats_server(servers: &[String]) -> Option<String> {
    servers.iter().find_map(|address| {
        let (scheme, server) = address.split_once("://").unwrap_or(("nats", address));
        (is_shell_safe_host(server) && is_shell_safe_host(scheme)).then(|| format!("{scheme}://{server}"))
    })
}

/// Where the gateway is, as seen by the client that asked.
struct ConnectAddress {
    /// `https://HOST:PORT`, with the path that a proxy takes off.
    base_url: String,
    mqtt_host: String,
    mqtt_port: u16,
    /// Whether that port is TLS.
    tls: bool,
}

impl ConnectAddress {
    fn new(parts: &HttpFrontParts, headers: &HeaderMap, is_https: bool) -> Self {
        let named =
            headers.get(HOST).and_then(|host| host.to_str().ok()).filter(|host| is_shell_safe_host(host));
        let base_url = match parts.public_url.get() {
            Some(url) => url.to_owned(),
            None => http_base_url(parts, named, is_https),
        };
        if let Some((host, port, tls)) = parts.public_mqtt.get() {
            return Self { base_url, mqtt_host: host.to_owned(), mqtt_port: port, tls };
        }
        let (mqtt, tls) = listener_for(named, parts.mqtt_addr, parts.mqtt_tls_addr);
        Self { base_url, mqtt_host: host_of(mqtt, named), mqtt_port: mqtt.port(), tls }
    }
}

/// Where HTTP is served to devices, as seen by whoever sent `headers`, over HTTPS or not.
pub(super) fn http_url(parts: &HttpFrontParts, headers: &HeaderMap, is_https: bool) -> String {
    ConnectAddress::new(parts, headers, is_https).base_url
}

/// Where MQTT is served, as seen by whoever sent `headers`: without TLS, then with it; or where the configuration says.
pub(super) fn mqtt_urls(parts: &HttpFrontParts, headers: &HeaderMap) -> Vec<String> {
    let url = |tls: bool, host: &str, port: u16| {
        let scheme = if tls { "mqtts" } else { "mqtt" };
        match host.contains(':') {
            true => format!("{scheme}://[{host}]:{port}"),
            false => format!("{scheme}://{host}:{port}"),
        }
    };
    if let Some((host, port, tls)) = parts.public_mqtt.get() {
        return vec![url(tls, host, port)];
    }
    let named = headers.get(HOST).and_then(|host| host.to_str().ok()).filter(|host| is_shell_safe_host(host));
    let listeners = [(false, Some(parts.mqtt_addr)), (true, parts.mqtt_tls_addr)];
    let served = listeners.into_iter().filter_map(|(tls, addr)| Some((tls, addr?)));
    served.map(|(tls, addr)| url(tls, &host_of(addr, named), addr.port())).collect()
}

/// Where devices reach HTTP: where the client that asks has just reached it, unless that was the administration's own
/// listener.
fn http_base_url(parts: &HttpFrontParts, named: Option<&str>, is_https: bool) -> String {
    let scheme = |tls| if tls { "https" } else { "http" };
    match named {
        Some(host) if parts.config.admin.listen.is_none() => format!("{}://{host}", scheme(is_https)),
        _ => {
            let (addr, tls) = listener_for(named, parts.http_addr, parts.http_tls_addr);
            let (host, port) = (host_of(addr, named), addr.port());
            match host.contains(':') {
                true => format!("{}://[{host}]:{port}", scheme(tls)),
                false => format!("{}://{host}:{port}", scheme(tls)),
            }
        }
    }
}

/// The host under which a listener can be reached. A listener on every address can be reached under the name that the
/// client has just used.
fn host_of(listener: SocketAddr, named: Option<&str>) -> String {
    match named.map(hostname) {
        Some(name) if listener.ip().is_unspecified() => name.to_owned(),
        _ => reachable(listener).ip().to_string(),
    }
}

/// Of a plain listener and one over TLS, that for a client that reached HTTP as `host`, and whether it is TLS. It is the plain
/// one, unless that is on loopback, the TLS one is not, and the client is on another machine.
fn listener_for(host: Option<&str>, plain: SocketAddr, tls: Option<SocketAddr>) -> (SocketAddr, bool) {
    let here = |name: &str| name == "localhost" || name.parse().is_ok_and(|ip: IpAddr| ip.is_loopback());
    match tls {
        Some(tls) if plain.ip().is_loopback() && !tls.ip().is_loopback() => match host.map(hostname) {
            Some(name) if !here(name) => (tls, true),
            _ => (plain, false),
        },
        _ => (plain, false),
    }
}

/// An address that can be connected to.
fn reachable(addr: SocketAddr) -> SocketAddr {
    match addr.ip() {
        ip if !ip.is_unspecified() => addr,
        _ if addr.is_ipv4() => ([127, 0, 0, 1], addr.port()).into(),
        _ => (std::net::Ipv6Addr::LOCALHOST, addr.port()).into(),
    }
}

/// Whether a `Host` header holds nothing that a shell would interpret.
fn is_shell_safe_host(host: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b':' | b'[' | b']');
    !host.is_empty() && host.len() <= 255 && host.bytes().all(plain) && !host.starts_with('-')
}

/// The name without the port: `[::1]:8080` is `::1`.
fn hostname(host: &str) -> &str {
    match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((ip, _)) => ip,
        None => host.split(':').next().unwrap_or(host),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_header_that_a_shell_would_act_on_is_not_repeated() {
        for good in ["localhost:8080", "gw.example.com", "[::1]:8080", "10.0.0.1"] {
            assert!(is_shell_safe_host(good), "{good}");
        }
        for bad in ["", "a b", "a;reboot", "$(reboot)", "a'b", "`a`", "-o", "a/b", "a\\b", "ä"] {
            assert!(!is_shell_safe_host(bad), "{bad}");
        }
    }

    #[test]
    fn who_is_elsewhere_is_told_of_tls_where_that_alone_can_be_reached() {
        let addr = |text: &str| text.parse::<SocketAddr>().expect("an address");
        let (near, far) = (addr("127.0.0.1:1883"), addr("0.0.0.0:1883"));
        let (near_tls, far_tls) = (addr("127.0.0.1:8883"), addr("0.0.0.0:8883"));
        for (host, plain, tls, told) in [
            (Some("gw.example:8080"), near, Some(far_tls), (far_tls, true)),
            (Some("10.0.0.1:8080"), near, Some(far_tls), (far_tls, true)),
            (Some("localhost:8080"), near, Some(far_tls), (near, false)),
            (Some("127.0.0.1:8080"), near, Some(far_tls), (near, false)),
            (Some("[::1]:8080"), near, Some(far_tls), (near, false)),
            (None, near, Some(far_tls), (near, false)),
            (Some("gw.example"), near, Some(near_tls), (near, false)),
            (Some("gw.example"), far, Some(far_tls), (far, false)),
            (Some("gw.example"), near, None, (near, false)),
        ] {
            assert_eq!(listener_for(host, plain, tls), told, "{host:?} {plain} {tls:?}");
        }
    }

    #[test]
    fn a_nats_server_is_named_that_a_shell_takes_as_it_is() {
        let named = |server: &str| nats_server(&[server.to_owned()]);
        assert_eq!(named("nats://nats.example:4222").as_deref(), Some("nats://nats.example:4222"));
        assert_eq!(named("tls://10.0.0.1:4222").as_deref(), Some("tls://10.0.0.1:4222"));
        assert_eq!(named("127.0.0.1").as_deref(), Some("nats://127.0.0.1"));
        assert_eq!(named("nats://a;reboot"), None);
        assert_eq!(nats_server(&[]), None);
    }

    #[test]
    fn a_host_is_told_from_its_port() {
        for (host, name) in [("gw:8080", "gw"), ("gw", "gw"), ("[::1]:80", "::1"), ("[::1]", "::1")] {
            assert_eq!(hostname(host), name);
        }
    }
}
