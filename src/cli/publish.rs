//! `headgate publish`: sends one or more payloads as a device would, over MQTT at QoS 1, and reports
//! how many the gateway has acknowledged.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context, bail};
use futures_util::{Stream, stream};
use indicatif::ProgressBar;
use serde::Deserialize;
use serde_json::json;
use tokio::sync::mpsc;

use super::client::{self, ApiClient};
use super::exit_code::RefusedHere;
use super::mqtt_place::{MqttPlace, TlsRelay};
use super::out::{self, CommandOutput, grouped, latency, print_json};
use super::replay::{disconnect_session, replay};
use super::session::{Dialect, MqttClientSession, MqttTransport, UNACKED_MESSAGES_MAX};
use crate::message::check_topic;

#[derive(Debug, clap::Args)]
pub(super) struct PublishArgs {
    /// The datasource's id
    datasource: String,
    /// The topic, relative to the datasource: spindle/temp
    topic: String,
    /// One payload; without it, every line of standard input is one
    #[arg(conflicts_with = "file")]
    payload: Option<String>,
    /// Every line of this file is a payload
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Where the gateway's MQTT is: HOST:PORT, mqtt://HOST:PORT or, over TLS, mqtts://HOST:PORT; by default the
    /// gateway is asked
    #[arg(long, value_name = "ADDRESS")]
    addr: Option<String>,
    /// Print what was done as JSON
    #[arg(long)]
    json: bool,
}

/// The gateway's answer about the key and its listeners.
#[derive(Deserialize)]
struct ConnectAnswer {
    key: ConnectKey,
    mqtt: Vec<String>,
}

#[derive(Deserialize)]
struct ConnectKey {
    id: String,
    datasource: String,
    scopes: Vec<String>,
}

pub(super) fn run(args: PublishArgs, out: &mut CommandOutput) -> anyhow::Result<()> {
    check_topic(&args.topic)?;
    let url = client::gateway_url()?;
    let key = client::key_from_environment(&url)?;
    let answer: ConnectAnswer = ApiClient::new(&url, key.clone())?.get("/v1/connect", &[])?;
    let topic = wire_topic(&answer.key, &args.datasource, &args.topic)?;
    let place = match &args.addr {
        Some(addr) => MqttPlace::parse(addr)?,
        None => choose_place(&answer.mqtt, &url)?,
    };
    let bar = args.file.as_deref().map(progress).transpose()?;
    let payloads = payloads(args.payload, args.file.as_deref())?;

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let tally = runtime.block_on(async {
        let client_id = format!("headgate-publish-{}", std::process::id());
        let addr = place.resolve()?;
        // Lives as long as the session.
        let relay = if place.tls { Some(TlsRelay::open(addr, &place.host).await?) } else { None };
        let through =
            relay.as_ref().map_or(MqttTransport::Tcp(addr), |relay| MqttTransport::Unix(relay.path()));
        let mut session = MqttClientSession::new(Dialect::V5, through, &client_id, Some(&key));
        let tally = replay(&mut session, &topic, payloads, || {
            if let Some(bar) = &bar {
                bar.inc(1);
            }
        })
        .await?;
        disconnect_session(session).await?;
        anyhow::Ok(tally)
    })?;
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    let quantile_ns = |quantile| tally.latency.value_at_quantile(quantile);
    if args.json {
        let latency_us = json!({ "p50": quantile_ns(0.5) / 1_000, "p99": quantile_ns(0.99) / 1_000 });
        return print_json(&json!({ "acked": tally.acked, "topic": topic, "latency_us": latency_us }), out);
    }
    if tally.acked == 0 {
        return Ok(writeln!(out, "nothing to publish: there was no line to read")?);
    }
    writeln!(
        out,
        "{} published and acknowledged, latency p50 {} p99 {}",
        grouped(tally.acked),
        latency(quantile_ns(0.5)),
        latency(quantile_ns(0.99))
    )?;
    Ok(())
}

/// The topic as it goes over the wire. With a datasource's own key, topics are relative to it. With a
/// key for all datasources, the topic begins with the datasource's id.
fn wire_topic(key: &ConnectKey, datasource: &str, topic: &str) -> anyhow::Result<String> {
    if !key.scopes.iter().any(|scope| scope == "ingest" || scope == "admin") {
        let words = format!("the key {} lacks the scope ingest: create a key with it", key.id);
        return Err(RefusedHere(words).into());
    }
    match key.datasource.as_str() {
        "*" => Ok(format!("{datasource}/{topic}")),
        own if own == datasource => Ok(topic.to_owned()),
        own => {
            let words = format!("the key {} is one of the datasource {own}, not of {datasource}", key.id);
            Err(RefusedHere(words).into())
        }
    }
}

/// The listener to send the key to, of those that the gateway names. One that is on the gateway's own loopback is of
/// no use elsewhere: there is another program at that address here. Whoever asked over TLS sends the key over TLS.
fn choose_place(named: &[String], url: &str) -> anyhow::Result<MqttPlace> {
    let places = named.iter().map(|place| MqttPlace::parse(place)).collect::<Result<Vec<_>, _>>()?;
    let is_near = client::is_loopback(url);
    let needs_tls = client::is_https(url);
    let is_usable = |place: &&MqttPlace| {
        let is_loopback = client::is_loopback_host(&place.host);
        (is_near || !is_loopback) && (place.tls || !needs_tls || is_loopback)
    };
    // Over TLS wherever HTTP is.
    let mut usable: Vec<&MqttPlace> = places.iter().filter(is_usable).collect();
    usable.sort_by_key(|place| place.tls != needs_tls);
    match usable.first() {
        Some(place) => Ok((*place).clone()),
        None => bail!(
            "the gateway at {url} serves MQTT at {}, where the key cannot be sent from here{}; --addr names another place",
            named.join(", "),
            if needs_tls { " over TLS" } else { "" }
        ),
    }
}

/// A progress bar over the lines of a file, drawn only on a terminal.
fn progress(file: &Path) -> anyhow::Result<ProgressBar> {
    let lines = lines(Box::new(open(file)?)).count();
    let bar = ProgressBar::new(lines as u64);
    bar.set_style(out::progress_style("{bar:40} {human_pos}/{human_len} {rate} {eta}")?);
    Ok(bar)
}

fn open(file: &Path) -> anyhow::Result<BufReader<File>> {
    Ok(BufReader::new(File::open(file).with_context(|| file.display().to_string())?))
}

/// The lines of `input`, without line ends; skips empty ones.
fn lines(input: Box<dyn BufRead + Send>) -> impl Iterator<Item = io::Result<Vec<u8>>> + Send {
    let lines = input.split(b'\n').map(|line| {
        line.map(|mut line| {
            if line.last() == Some(&b'\r') {
                line.pop();
            }
            line
        })
    });
    lines.filter(|line| !line.as_ref().is_ok_and(Vec::is_empty))
}

/// The payloads as they arrive. A thread of its own reads them: the next line may take long
/// (`tail -f | headgate publish`), and acknowledgements have to be received meanwhile.
fn payloads(
    payload: Option<String>,
    file: Option<&Path>,
) -> anyhow::Result<impl Stream<Item = anyhow::Result<Vec<u8>>>> {
    let (send, mut receive) = mpsc::channel(UNACKED_MESSAGES_MAX.into());
    let payloads: Box<dyn Iterator<Item = io::Result<Vec<u8>>> + Send> = match (payload, file) {
        (Some(payload), _) => Box::new(std::iter::once(Ok(payload.into_bytes()))),
        (None, Some(file)) => Box::new(lines(Box::new(open(file)?))),
        (None, None) => Box::new(lines(Box::new(BufReader::new(io::stdin())))),
    };
    let read = move || {
        for payload in payloads {
            let failed = payload.is_err();
            if send.blocking_send(payload.context("reading payloads")).is_err() || failed {
                break;
            }
        }
    };
    // Not joined: after a refusal it may still wait for standard input. It ends with the process.
    thread::Builder::new().name("payloads".to_owned()).spawn(read)?;
    Ok(stream::poll_fn(move |cx| receive.poll_recv(cx)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_goes_nowhere_that_the_gateway_does_not_name_for_whoever_asks() {
        let choose = |named: &[&str], url: &str| {
            let named: Vec<String> = named.iter().map(|one| (*one).to_owned()).collect();
            choose_place(&named, url).map(|place| place.to_string()).ok()
        };
        let both = ["mqtt://gw.example:1883", "mqtts://gw.example:8883"];
        let near = ["mqtt://127.0.0.1:11883"];
        for (named, url, chosen) in [
            (&both[..], "http://gw.example:8080", Some("mqtt://gw.example:1883")),
            (&both, "https://gw.example", Some("mqtts://gw.example:8883")),
            (&both[..1], "https://gw.example", None),
            (&both[1..], "http://gw.example", Some("mqtts://gw.example:8883")),
            (&near, "http://127.0.0.1:8080", Some("mqtt://127.0.0.1:11883")),
            (&near, "https://localhost", Some("mqtt://127.0.0.1:11883")),
            (&near, "http://gw.example:8080", None),
        ] {
            assert_eq!(choose(named, url).as_deref(), chosen, "{named:?} {url}");
        }
    }

    #[test]
    fn every_line_that_is_not_blank_is_a_payload() {
        let input = io::Cursor::new(b"{\"value\":1}\r\n\n\xff\xfe\nlast".to_vec());
        let lines: Vec<_> = lines(Box::new(input)).map(|line| line.expect("memory")).collect();
        assert_eq!(lines, [&b"{\"value\":1}"[..], b"\xff\xfe", b"last"]);
    }
}
