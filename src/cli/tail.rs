//! `headgate tail`: follows the stream of a datasource. When the connection breaks, it connects again and goes on behind
//! the last record that it has had, on whatever gateway answers at `HEADGATE_URL` then.

use std::io::{self, BufRead, BufReader, IsTerminal, Read, Write};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context, bail};
use serde::Deserialize;
use serde_json::value::RawValue;

use super::client::{ApiClient, ProblemAnswer};
use super::datasource;
use super::out::CommandOutput;
use super::time_argument::TimeArgument;
use crate::message::Offset;

/// Lines that wait to be printed.
const LINES_WAITING_MAX: usize = 64;
/// How long nothing may come, until the gateway says how often something does.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// How long to wait before connecting again, at first and at most.
const RECONNECT_PAUSE_MIN: Duration = Duration::from_millis(250);
const RECONNECT_PAUSE_MAX: Duration = Duration::from_secs(10);

#[derive(Debug, clap::Args)]
pub(super) struct TailArgs {
    /// The datasource's id
    datasource: String,
    /// Only this topic, or the topics of an MQTT filter: 'spindle/#'
    #[arg(long)]
    topic: Option<String>,
    /// Begin earlier: so long ago (30s, 15m, 1h, 7d), at an offset, or at a time: 2026-11-23T09:00:00Z
    #[arg(long, value_name = "AGO|OFFSET|TIME", value_parser = TailStart::parse, alias = "since")]
    from: Option<TailStart>,
    /// Begin with the last so many
    #[arg(long, value_name = "N", conflicts_with = "from")]
    last: Option<u64>,
    /// End after so many
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    limit: Option<u64>,
    /// Print each record as the gateway sends it, as JSON
    #[arg(long)]
    json: bool,
}

/// Where a tail begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TailStart {
    Offset(Offset),
    Time(TimeArgument),
}

impl TailStart {
    fn parse(text: &str) -> Result<Self, String> {
        if text.bytes().all(|b| b.is_ascii_digit())
            && let Ok(offset) = text.parse()
        {
            return Ok(Self::Offset(offset));
        }
        TimeArgument::parse_past(text).map(Self::Time).map_err(|words| format!("{words}, or an offset"))
    }

    /// The parameter that says so.
    fn parameter(self) -> (&'static str, String) {
        match self {
            Self::Offset(offset) => ("from_offset", offset.to_string()),
            Self::Time(time) => ("from_time", time.to_string()),
        }
    }
}

/// A line of the stream: a record, or what the gateway says itself.
#[derive(Deserialize)]
struct StreamLine<'a> {
    offset: Option<Offset>,
    #[serde(default)]
    received_at: String,
    #[serde(default)]
    topic: String,
    #[serde(borrow)]
    payload: Option<&'a RawValue>,
    payload_encoding: Option<String>,
    heartbeat: Option<HeartbeatLine>,
    skipped: Option<SkippedLine>,
    end: Option<EndLine>,
}

#[derive(Deserialize)]
struct HeartbeatLine {
    next_offset: Offset,
    interval_ms: u64,
}

#[derive(Deserialize)]
struct SkippedLine {
    records: u64,
    next_offset: Offset,
}

#[derive(Deserialize)]
struct EndLine {
    reason: String,
    detail: String,
}

/// Why one connection's part of the stream is over.
enum TailPause {
    /// As many records are printed as were wanted.
    Done,
    /// To be connected again.
    Broken,
}

/// What is followed, and how far it is.
struct TailProgress<'a> {
    out: &'a mut CommandOutput,
    json: bool,
    coloured: bool,
    left: Option<u64>,
    /// Everything below it is printed, once that is known.
    next: Option<Offset>,
    silence_max: Duration,
}

pub(super) fn run(args: TailArgs, out: &mut CommandOutput) -> anyhow::Result<()> {
    let client = ApiClient::from_environment()?;
    let path = format!("{}/stream", datasource::path(&args.datasource)?);
    let start = args.from.map(TailStart::parameter).or(args.last.map(|last| ("tail", last.to_string())));
    let topic = args.topic.as_deref().map(|topic| ("topic", topic));
    let query: Vec<(&str, &str)> =
        start.iter().map(|(name, value)| (*name, value.as_str())).chain(topic).collect();
    let coloured = io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let (json, left) = (args.json, args.limit);
    let mut progress = TailProgress { out, json, coloured, left, next: None, silence_max: SILENCE_MAX };
    let mut pause = RECONNECT_PAUSE_MIN;
    let mut stream = Some(open(&client, &path, &query, None)?);
    loop {
        if let Some(stream) = stream.take() {
            let before = progress.next;
            match progress.follow(stream)? {
                TailPause::Done => return Ok(()),
                TailPause::Broken => say("the stream broke off; connecting again"),
            }
            if progress.next != before {
                pause = RECONNECT_PAUSE_MIN;
            }
        }
        thread::sleep(pause);
        pause = (2 * pause).min(RECONNECT_PAUSE_MAX);
        let last_id = progress.next.map(|next| match next.checked_sub(1) {
            Some(last) => last.to_string(),
            None => "start".to_owned(),
        });
        stream = match open(&client, &path, &query, last_id.as_deref()) {
            Ok(stream) => Some(stream),
            Err(error) if is_final(&error) => return Err(error),
            Err(_) => None,
        };
    }
}

/// Opens the stream in lines. `last_id` says what was had of it before.
fn open(
    client: &ApiClient,
    path: &str,
    query: &[(&str, &str)],
    last_id: Option<&str>,
) -> anyhow::Result<impl Read + Send + 'static> {
    let accept = ("accept", "application/x-ndjson");
    let headers: Vec<_> = [accept].into_iter().chain(last_id.map(|id| ("last-event-id", id))).collect();
    Ok(client.stream_with(path, query, &headers)?.into_body().into_reader())
}

/// Whether it is of no use to ask again: the gateway has answered, and does not only ask for patience.
fn is_final(error: &anyhow::Error) -> bool {
    let status = error.downcast_ref::<ProblemAnswer>().map(|problem| problem.status);
    status.is_some_and(|status| status < 500 && status != 429)
}

fn say(words: &str) {
    // Not eprintln!, which panics when standard error is closed.
    let _ = writeln!(io::stderr(), "headgate: {words}");
}

impl TailProgress<'_> {
    /// Prints what comes until it breaks off.
    fn follow(&mut self, stream: impl Read + Send + 'static) -> anyhow::Result<TailPause> {
        let (lines, waiting) = sync_channel(LINES_WAITING_MAX);
        // Reading waits for as long as nothing comes; on a thread of its own it can be left.
        thread::Builder::new().name("tail".to_owned()).spawn(move || read_lines(stream, &lines))?;
        loop {
            let line = match waiting.try_recv() {
                Ok(line) => line,
                Err(TryRecvError::Disconnected) => return Ok(TailPause::Broken),
                Err(TryRecvError::Empty) => {
                    self.out.flush()?;
                    match self.wait_line(&waiting) {
                        Some(line) => line,
                        None => return Ok(TailPause::Broken),
                    }
                }
            };
            if self.take(&line)? {
                return Ok(TailPause::Done);
            }
        }
    }

    fn wait_line(&self, waiting: &Receiver<String>) -> Option<String> {
        waiting.recv_timeout(self.silence_max).ok()
    }

    /// Takes one line. Returns whether it was the last one that was wanted.
    fn take(&mut self, line: &str) -> anyhow::Result<bool> {
        let parsed: StreamLine<'_> =
            serde_json::from_str(line).context("the gateway's stream is not what was expected")?;
        if let Some(offset) = parsed.offset {
            self.next = Some(offset.saturating_add(1));
            match self.json {
                true => writeln!(self.out, "{line}")?,
                false => writeln!(self.out, "{}", shown(offset, &parsed, self.coloured))?,
            }
            self.left = self.left.map(|left| left - 1);
            return Ok(self.left == Some(0));
        }
        if let Some(HeartbeatLine { next_offset, interval_ms }) = parsed.heartbeat {
            self.next = Some(next_offset);
            self.silence_max = SILENCE_MAX.max(Duration::from_millis(interval_ms.saturating_mul(3)));
        }
        if let Some(SkippedLine { records, next_offset }) = parsed.skipped {
            self.next = Some(next_offset);
            self.out.flush()?;
            say(&format!("retention had removed {records} records; going on at offset {next_offset}"));
        }
        if let Some(EndLine { reason, detail }) = parsed.end {
            self.out.flush()?;
            if matches!(reason.as_str(), "key_dead" | "datasource_deleted") {
                bail!("the stream has ended: {detail}");
            }
            say(&detail);
        }
        Ok(false)
    }
}

/// Hands over whole lines; one that breaks off comes again.
fn read_lines(stream: impl Read, lines: &SyncSender<String>) {
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    while stream.read_line(&mut line).is_ok_and(|bytes| bytes > 0) && line.ends_with('\n') {
        line.truncate(line.trim_end().len());
        if lines.send(std::mem::take(&mut line)).is_err() {
            return;
        }
    }
}

/// A record in one line, without control characters, which could move the cursor.
fn shown(offset: Offset, record: &StreamLine<'_>, coloured: bool) -> String {
    let payload = record.payload.map_or("null", RawValue::get);
    let payload = serde_json::from_str::<String>(payload).unwrap_or_else(|_| payload.to_owned());
    let clean = |text: &str| -> String {
        text.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect()
    };
    let (topic, payload) = (clean(&record.topic), clean(&payload));
    let payload = match &record.payload_encoding {
        Some(encoding) => format!("{encoding}: {payload}"),
        None => payload,
    };
    let at = &record.received_at;
    match coloured {
        true => format!("\u{1b}[2m{offset} {at}\u{1b}[0m \u{1b}[1;36m{topic}\u{1b}[0m {payload}"),
        false => format!("{offset} {at} {topic} {payload}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tail_begins_at_an_offset_or_at_a_time() {
        for (text, start) in [
            ("0", TailStart::Offset(0)),
            ("1234", TailStart::Offset(1234)),
            ("1970-01-01T00:00:01Z", TailStart::Time(TimeArgument(1_000_000))),
        ] {
            assert_eq!(TailStart::parse(text), Ok(start), "{text}");
        }
        assert!(matches!(TailStart::parse("1h30m"), Ok(TailStart::Time(_))));
        for bad in ["", "-1", "h", "1w", "1 h", "noon", "99999999999999999999d", "18446744073709551616", "1é"]
        {
            assert!(TailStart::parse(bad).is_err(), "{bad}");
        }
        let start = TailStart::parse("99999999999d").expect("a span");
        assert_eq!(start.parameter(), ("from_time", "1970-01-01T00:00:00.000000Z".to_owned()));
    }

    #[test]
    fn a_line_shows_no_control_characters_but_its_own_colours() {
        let line = r#"{"offset":7,"topic":"a/b","payload":"\u001b[2Jx\ny","received_at":"T","key_id":"k"}"#;
        let record: StreamLine<'_> = serde_json::from_str(line).expect("a record");
        assert_eq!(shown(7, &record, false), "7 T a/b \u{fffd}[2Jx\u{fffd}y");
        assert!(shown(7, &record, true).starts_with("\u{1b}[2m7 T\u{1b}[0m"));
        let line =
            r#"{"offset":7,"topic":"a","payload":"/w==","payload_encoding":"base64","received_at":"T"}"#;
        let record: StreamLine<'_> = serde_json::from_str(line).expect("a record");
        assert_eq!(shown(7, &record, false), "7 T a base64: /w==");
    }
}
