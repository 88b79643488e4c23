//! `headgate publish`: sends one or more payloads as a device would, over MQTT at QoS 1, and reports
//! how many the gateway has acknowledged.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context, bail};
use futures_util::{Stream, stream};
use indicatif::ProgressBar;
use serde_json::Value;
use tokio::sync::mpsc;
use ureq::http::Uri;

use super::client::{self, ApiClient, KeySecret, ProblemAnswer};
use super::datasource;
use super::out::{self, CommandOutput, grouped, latency};
use super::replay::{disconnect_session, replay};
use super::session::{Dialect, MqttClientSession, UNACKED_MESSAGES_MAX};
use crate::message::check_topic;

/// MQTT's standard port, where a gateway listens by default.
const MQTT_PORT_DEFAULT: u16 = 1883;

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
    /// Where the gateway's MQTT is; by default port 1883 of HEADGATE_URL's host
    #[arg(long, value_name = "HOST:PORT")]
    addr: Option<String>,
}

pub(super) fn run(args: PublishArgs, out: &mut CommandOutput) -> anyhow::Result<()> {
    check_topic(&args.topic)?;
    let url = client::gateway_url()?;
    let (key, _) = client::key_from_environment(&url)?;
    let addr = resolve(args.addr, &url)?;
    let topic = wire_topic(&url, &key, &args.datasource, &args.topic)?;
    let bar = args.file.as_deref().map(progress).transpose()?;
    let payloads = payloads(args.payload, args.file.as_deref())?;

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let tally = runtime.block_on(async {
        let client_id = format!("headgate-publish-{}", std::process::id());
        let mut session = MqttClientSession::new(Dialect::V5, addr, &client_id, Some(&key));
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
    writeln!(
        out,
        "{} published and acknowledged, latency p50 {} p99 {}",
        grouped(tally.acked),
        latency(tally.latency.value_at_quantile(0.5)),
        latency(tally.latency.value_at_quantile(0.99))
    )?;
    Ok(())
}

/// The topic as it goes over the wire. With a datasource's own key, topics are relative to it. With a
/// key for all datasources, the topic begins with the datasource's id. Only the latter may read the
/// datasource over HTTP, so that the gateway's answer tells which kind the key is.
fn wire_topic(url: &str, key: &KeySecret, datasource: &str, topic: &str) -> anyhow::Result<String> {
    let looked = ApiClient::new(url, key.clone()).get::<Value>(&datasource::path(datasource)?, &[]);
    match looked {
        Ok(_) => Ok(format!("{datasource}/{topic}")),
        Err(error) => match error.downcast_ref::<ProblemAnswer>() {
            Some(problem) if problem.status == 403 => Ok(topic.to_owned()),
            _ => Err(error),
        },
    }
}

fn resolve(addr: Option<String>, url: &str) -> anyhow::Result<SocketAddr> {
    let addr = match addr {
        Some(addr) => addr,
        None => {
            let uri: Uri = url.parse().context("HEADGATE_URL")?;
            format!("{}:{MQTT_PORT_DEFAULT}", uri.host().unwrap_or_default())
        }
    };
    let mut found = addr.to_socket_addrs().with_context(|| format!("{addr} is not HOST:PORT"))?;
    match found.next() {
        Some(addr) => Ok(addr),
        None => bail!("{addr} has no address"),
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
    fn every_line_that_is_not_blank_is_a_payload() {
        let input = io::Cursor::new(b"{\"value\":1}\r\n\n\xff\xfe\nlast".to_vec());
        let lines: Vec<_> = lines(Box::new(input)).map(|line| line.expect("memory")).collect();
        assert_eq!(lines, [&b"{\"value\":1}"[..], b"\xff\xfe", b"last"]);
    }
}
