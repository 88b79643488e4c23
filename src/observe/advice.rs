//! Advice: what an operator can do about a refusal, in one sentence.

use super::refusals::RefusalEntry;
use crate::auth::shape::{KeyChecksum, KeyLength, KeyShape};

impl RefusalEntry {
    /// What to do about it. `end` says how its key ended, if it was revoked.
    pub fn advice(&self, end: Option<&str>) -> String {
        let key = self.key_id.map_or_else(|| "the key".to_owned(), |id| format!("key {id}"));
        if let Some(limit) = &self.limit {
            let mut words = format!("it is over the limit {} {} of {}", limit.name, limit.max, limit.owner);
            if !limit.wait.is_zero() {
                words.push_str(&format!(": wait {:.1} s, send less", limit.wait.as_secs_f64()));
            }
            return words + ", or raise the limit";
        }
        // The match is on the metrics' word for the cause, because entries keep nothing else; a cause that is
        // missing here falls back to the words of the refusal itself.
        let fixed = match self.cause {
            "revoked_key" => {
                let end = end.unwrap_or("was revoked");
                return format!("{key} {end}: give the client one that is live");
            }
            "expired_key" => return format!("{key} has expired: give the client a new one"),
            "malformed_key" | "unknown_key" => return self.unknown_key_advice(),
            "other_datasource" => {
                return format!("{key} is good for another datasource: check the address or the topic");
            }
            "missing_scope" => return format!("{key} lacks a scope: create a key with it"),
            "no_key" => "send a key: as MQTT user name or password, or in an Authorization header",
            "too_many_failures" => {
                "too many invalid keys came from this address: find the client with the bad key, or set auth.failures_exempt"
            }
            "ambiguous_key" => "it presented two different keys: it has to send one",
            "key_in_url" => "a key stood in a URL, which is kept in logs on the way: rotate it if it is real",
            "topic" => "the topic cannot be published to: it may be empty, reserved ($…) or hold + or #",
            "reply_subject" => {
                "a NATS message is answered in its sender's inbox: use the client's request or js.publish"
            }
            "connection_type" => {
                "a NATS server tried to connect as a leaf node: give it a user of its own in nats-server's configuration"
            }
            "header" => "JetStream's own headers are not taken: send the message without the one named",
            "no_datasource" => "create the datasource, or correct its name in the topic",
            "too_large" => {
                "send smaller payloads, or raise intake.payload_bytes_max or mqtt.packet_bytes_max"
            }
            "connections_max" => "there are too many connections in all: raise mqtt.connections_max",
            "tls_handshake" => {
                "the client and the gateway do not agree on TLS: check versions and certificates"
            }
            "malformed_connect" => "it does not speak MQTT on this port; TLS has a port of its own",
            "connect_timeout" => {
                "it connected and sent no CONNECT in time: check its network, or what probes the port"
            }
            "busy" | "disk_full" | "log_budget" | "log_failed" => {
                "the log cannot take more: see the gateway's own log"
            }
            "log_away" | "log_unknown" => {
                "the log is away: see /readyz, and whether NATS and the stream's leader are there"
            }
            "unavailable" => {
                "NATS could not be asked for the client's session: see /readyz; it comes again by itself"
            }
            "shutting_down" => "the gateway was shutting down; it comes again by itself",
            "protocol" => "the client broke a rule of MQTT: see the words, and update its library",
            _ => "see the words",
        };
        fixed.to_owned()
    }

    fn unknown_key_advice(&self) -> String {
        let words = match self.key_shape {
            Some(KeyShape { prefix: false, .. }) => {
                "what it sent is no Headgate key: those begin with hgk_. Check which secret it was given"
            }
            Some(KeyShape { length: KeyLength::TooShort, .. }) => {
                "the key is cut short: copy all of its 53 characters"
            }
            Some(KeyShape { length: KeyLength::TooLong, .. }) => {
                "there is something behind the key: it has 53 characters"
            }
            Some(KeyShape { checksum: KeyChecksum::Wrong, .. }) => "the key is misspelt: copy it again",
            Some(KeyShape { checksum: KeyChecksum::Right, .. }) => {
                "the key is well-formed and was never given out here: is it another gateway's?"
            }
            None => "the key is not known",
        };
        words.to_owned()
    }
}
