//! Load with a ledger: senders that give every message a number of its own, never send a number
//! twice, and note which were acknowledged. Comparing their notes with what was kept shows whether an
//! ack means what it says.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use serde_json::{Value, json};

use super::wire::{Connect, DISCONNECT, Next, PUBACK, Version, Wire, publish};
use super::{Gateway, PATIENCE, Source, http, http_agent};

/// Gives out numbers, and counts what has been acknowledged.
#[derive(Default)]
pub struct Ledger {
    next: AtomicU64,
    acked: AtomicU64,
}

impl Ledger {
    /// A number that no message has had, in a payload whose size varies with it.
    pub fn message(&self) -> (u64, Value) {
        let n = self.next.fetch_add(1, Ordering::Relaxed);
        let pad = "x".repeat(usize::try_from(n * 37 % 400).expect("small"));
        (n, json!({ "n": n, "pad": pad }))
    }

    /// How many numbers have been given out.
    pub fn sent(&self) -> u64 {
        self.next.load(Ordering::Relaxed)
    }

    /// How many messages have been acknowledged so far.
    pub fn acked(&self) -> u64 {
        self.acked.load(Ordering::Relaxed)
    }

    fn ack(&self, acked: &mut Vec<u64>, numbers: impl IntoIterator<Item = u64>) {
        let before = acked.len();
        acked.extend(numbers);
        let count = u64::try_from(acked.len() - before).expect("small");
        self.acked.fetch_add(count, Ordering::Relaxed);
    }
}

/// The number in a payload that [`Ledger::message`] made.
pub fn number(payload: &[u8]) -> u64 {
    let json: Value = serde_json::from_slice(payload).expect("a payload is kept as it was sent");
    json["n"].as_u64().expect("a number")
}

/// How a sender's work ended.
#[derive(Debug, Default)]
pub struct Sent {
    /// The numbers that were acknowledged.
    pub acked: Vec<u64>,
    /// What the gateway said last: the reason code of a DISCONNECT, or the status of an HTTP answer;
    /// `None` if the connection just ended.
    pub goodbye: Option<u16>,
}

/// Publishes at QoS 1 with `window` messages under way until the connection ends.
pub fn mqtt_sender(
    gateway: &Gateway,
    source: &Source,
    ledger: &Arc<Ledger>,
    version: Version,
    window: u16,
) -> JoinHandle<Sent> {
    let (addr, key, ledger) = (gateway.mqtt, source.key.clone(), ledger.clone());
    std::thread::spawn(move || publish_until_closed(Wire::open(addr), &key, &ledger, version, window))
}

/// As [`mqtt_sender`], on a connection that there is and on this thread.
pub fn publish_until_closed(
    mut wire: Wire,
    key: &str,
    ledger: &Ledger,
    version: Version,
    window: u16,
) -> Sent {
    let mut sent = Sent::default();
    wire.send(&Connect::with_key(version, key).packet());
    let Next::Packet(_connack) = wire.next() else { return sent };
    let mut under_way = HashMap::new();
    let mut free: Vec<u16> = (1..=window).collect();
    loop {
        let mut burst = Vec::new();
        for packet_id in free.drain(..) {
            let (n, payload) = ledger.message();
            under_way.insert(packet_id, n);
            burst.extend(publish(version, packet_id, "load", payload.to_string().as_bytes()));
        }
        wire.send(&burst);
        // One ack is waited for; those that came with it are taken along.
        let mut patience = PATIENCE;
        loop {
            match wire.next_within(patience) {
                Next::Packet(frame) if frame.kind() == DISCONNECT => {
                    sent.goodbye = Some(frame.reason().into());
                }
                // The key has died between the check and the log.
                Next::Packet(frame) if frame.kind() == PUBACK && frame.reason() == 0x87 => {
                    under_way.remove(&frame.packet_id()).expect("an answer to what was sent");
                }
                Next::Packet(frame) => {
                    assert_eq!((frame.kind(), frame.reason()), (PUBACK, 0), "{frame:?}");
                    let n = under_way.remove(&frame.packet_id()).expect("an ack of what was sent");
                    ledger.ack(&mut sent.acked, [n]);
                    free.push(frame.packet_id());
                    patience = Duration::ZERO;
                }
                Next::Silent if patience.is_zero() => break,
                Next::Silent => panic!("no ack of {} messages within {patience:?}", under_way.len()),
                Next::Closed => return sent,
            }
        }
    }
}

/// Posts `size` messages a request, one request after another, until one is not accepted.
pub fn http_sender(
    gateway: &Gateway,
    source: &Source,
    ledger: &Arc<Ledger>,
    size: usize,
) -> JoinHandle<Sent> {
    let (addr, source, ledger) = (gateway.http, source.clone(), ledger.clone());
    std::thread::spawn(move || {
        let mut sent = Sent::default();
        let agent = http_agent();
        let path = format!("/v1/ingest/{}/load", source.id);
        let json = [("content-type", "application/json")];
        loop {
            let (numbers, messages): (Vec<u64>, Vec<Value>) = (0..size).map(|_| ledger.message()).unzip();
            let body = if size == 1 { messages[0].to_string() } else { Value::from(messages).to_string() };
            let answer = http(&agent, addr, "POST", &path, &source.key, &json, body.as_bytes());
            let Ok(answer) = answer else { return sent };
            if answer.status != 200 {
                sent.goodbye = Some(answer.status);
                return sent;
            }
            assert_eq!(answer.json()["accepted"], size, "{}", answer.text());
            ledger.ack(&mut sent.acked, numbers);
        }
    })
}

/// Senders of every kind at once: MQTT 3.1.1 and 5, one message at a time and many, HTTP single and
/// in arrays.
pub fn all_kinds(gateway: &Gateway, source: &Source, ledger: &Arc<Ledger>) -> Vec<JoinHandle<Sent>> {
    use Version::{V5, V311};
    let mqtt = [(V311, 1), (V311, 100), (V5, 1), (V5, 20), (V5, 500)];
    let mqtt = mqtt.map(|(version, window)| mqtt_sender(gateway, source, ledger, version, window));
    let http = [1, 1, 50].map(|size| http_sender(gateway, source, ledger, size));
    mqtt.into_iter().chain(http).collect()
}
