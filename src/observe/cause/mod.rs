//! The cause of a refusal: one word that names why a message, a request or a connection was not let in. Every
//! front and intake refuse with a [`Cause`]; metrics and `/v1/refusals` show its name, a problem document has
//! the status of its [`ProblemKind`], and an operator reads its advice. The table below has one row per cause,
//! so that none is without any of these.

mod kind;

use std::fmt;

pub use kind::ProblemKind;

use crate::auth::GrantDenial;

/// Defines [`Cause`]: a row is a cause, its name, its kind, and its advice.
macro_rules! causes {
    ($($cause:ident $name:literal $kind:ident: $advice:literal;)*) => {
        /// Why something was refused. The documentation of each is what an operator can do about it.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Cause {
            $(#[doc = $advice] $cause,)*
        }

        impl Cause {
            /// Every cause, in the order of `openapi.json`.
            pub const ALL: &[Cause] = &[$(Cause::$cause,)*];

            /// Its name in metrics, `/v1/refusals` and logs; it never changes.
            pub const fn name(self) -> &'static str {
                match self { $(Cause::$cause => $name,)* }
            }

            /// The kind of problem that a client is told of. Causes that only MQTT has, or a NATS server's
            /// question about a client, have the kind that means the same.
            pub const fn kind(self) -> ProblemKind {
                match self { $(Cause::$cause => ProblemKind::$kind,)* }
            }

            /// What to do about it, in one sentence. What begins with "the key" can be said of a key by its id.
            pub const fn advice(self) -> &'static str {
                match self { $(Cause::$cause => $advice,)* }
            }
        }
    };
}

causes! {
    // The key.
    NoKey "no_key" Unauthorized:
        "send a key: as MQTT user name or password, or in an Authorization header";
    MalformedKey "malformed_key" Unauthorized:
        "what it sent is no Headgate key: those begin with hgk_ and have 53 characters";
    UnknownKey "unknown_key" Unauthorized:
        "the key is not known here: is it another gateway's?";
    RevokedKey "revoked_key" Unauthorized:
        "the key was revoked: give the client one that is live";
    ExpiredKey "expired_key" Unauthorized:
        "the key has expired: give the client a new one";
    Fenced "fenced" Unauthorized:
        "the key had ended before it reached the cluster's log, through a gateway or server that stood still: it is no record";
    AmbiguousKey "ambiguous_key" Unauthorized:
        "it presented two different keys: it has to send one";
    KeyInUrl "key_in_url" KeyInUrl:
        "a key stood in a URL, which is kept in logs on the way: rotate it if it is real";
    DamagedToken "damaged_token" Unauthorized:
        "the access token that it sent is cut or mistyped: those begin with hgt_; take all of what the gateway answered";
    UnknownToken "unknown_token" Unauthorized:
        "the access token that it sent was made by another gateway, or by nobody: ask this one for a token";
    ExpiredToken "expired_token" Unauthorized:
        "the access token that it sent was good for a time, which is over: whoever gives it its tokens has to ask for a new one";
    TokenTopics "token_topics" BeyondToken:
        "the access token is for other topics: use one of those, or make a token for this topic";
    TokenUse "token_use" BeyondToken:
        "access tokens are for sending and reading data in a session that ends with its connection: use the key for anything else";
    OtherDatasource "other_datasource" Unauthorized:
        "the key is good for another datasource: check the address or the topic";
    MissingScope "missing_scope" MissingScope:
        "the key lacks a scope: create a key with it";
    TooManyFailures "too_many_failures" TooManyRequests:
        "too many invalid keys came from this address: find the client with the bad key; a proxy belongs into trusted_proxies, and what many clients come through else into auth.failures_exempt";

    // The message.
    Topic "topic" Topic:
        "the topic cannot be published to: it may be empty, reserved ($…) or hold + or #";
    NoDatasource "no_datasource" NotFound:
        "create the datasource, or correct its name in the topic";
    TooLarge "too_large" TooLarge:
        "send smaller payloads, or raise intake.payload_bytes_max or mqtt.packet_bytes_max";
    ContentType "content_type" Malformed:
        "its content type is too long or not printable: send a plain one, such as application/json";
    MessageId "message_id" Malformed:
        "its message id is empty, too long or not printable: send a short one, or none";
    IdConflict "id_conflict" IdConflict:
        "another message was kept under its id: give every message an id of its own, or end the client's session if it has lost its state";
    ReplySubject "reply_subject" Malformed:
        "a NATS message is answered in its sender's inbox: use the client's own inbox prefix (_INBOX), or add the one that it has to nats.reply_prefixes";
    Header "header" Malformed:
        "JetStream's own headers are not taken: send the message without the one named";
    HeaderForm "header_form" Malformed:
        "a header of its NATS message holds a line break, has no colon, or is not UTF-8: send plain names and values";
    Schema "schema" Validation:
        "what it sent does not meet its schema, or is a schema that cannot be used: correct the sender, or the schema; 'headgate quarantine list' shows what was kept";

    // Limits of keys and datasources.
    LimitMessagesPerS "limit_messages_per_s" TooManyRequests:
        "it sends more messages than its limit allows: send fewer, or raise the limit";
    LimitBytesPerS "limit_bytes_per_s" TooManyRequests:
        "it sends more bytes than its limit allows: send less, or raise the limit";
    LimitConnections "limit_connections" TooManyRequests:
        "it opens more connections than its limit allows: close some, or raise the limit";
    LimitPayloadBytes "limit_payload_bytes" TooLarge:
        "its payloads are larger than its limit allows: send smaller ones, or raise the limit";
    LimitTopics "limit_topics" OverLimit:
        "it uses more topics than its limit allows: use fewer, or raise the limit";
    Exchanges "exchanges" TooManyRequests:
        "its clients publish with QoS 2 and do not release: have them end their sessions, or raise intake.exchanges_per_datasource_max";
    LimitIds "limit_ids" TooManyRequests:
        "its datasource brings more message ids or QoS 2 messages than the cluster remembers: give fewer messages an id, send bulk data without, or raise intake.dedup_ids_per_datasource_max and intake.dedup_ids_max";
    LimitSessions "limit_sessions" OverLimit:
        "its datasource has as many lasting MQTT sessions as its limit allows: use a clean session, end old ones, or raise the limit";
    LimitSubscriptions "limit_subscriptions" OverLimit:
        "its datasource has as many subscriptions as its limit allows: subscribe to less, or raise the limit";
    LimitSubscriptionBytes "limit_subscription_bytes" OverLimit:
        "the filters of its datasource take as much memory as its limit allows: use fewer, shorter filters, or raise the limit";
    LimitShareGroups "limit_share_groups" OverLimit:
        "its datasource has as many groups of shared subscriptions as its limit allows: use fewer groups, or raise the limit";
    LimitInflight "limit_inflight" TooManyRequests:
        "its datasource has too many messages that subscribers have not acknowledged: have them acknowledge, or raise the limit";
    LimitRetainedTopics "limit_retained_topics" OverLimit:
        "its datasource has retained messages on as many topics as its limit allows: clear some, publish without retain, or raise the limit";
    LimitRetainedBytes "limit_retained_bytes" OverLimit:
        "its datasource has as many bytes of retained messages as its limit allows: clear some, retain smaller ones, or raise the limit";
    LimitKeys "limit_keys" OverLimit:
        "its datasource has as many keys as its limit allows: revoke some, or raise the limit";
    Replays "replays" TooManyRequests:
        "too many subscriptions of its datasource begin in the past at once: begin fewer at a time, or begin now";
    LimitQuarantine "limit_quarantine" Validation:
        "it is over a limit whose policy is quarantine: send less, or raise the limit and redrive what was kept";

    // Memory.
    MemoryShare "memory_share" TooManyRequests:
        "its key or datasource holds as much memory as one may: send less at a time, read what is answered, or raise intake.memory_share_bytes_max";
    MemoryFull "memory_full" Unavailable:
        "clients hold as much memory as all of them may: see who sends how much in /metrics, or raise intake.memory_bytes_max; it may come again";
    StrangersShare "strangers_share" TooManyRequests:
        "clients without a valid key take all that strangers may have: find who they are by their addresses, and give them a key or keep them out";

    // The log.
    Busy "busy" Unavailable:
        "the log cannot take more: see the gateway's own log";
    DiskFull "disk_full" Unavailable:
        "the log cannot take more: see the gateway's own log";
    LogBudget "log_budget" Unavailable:
        "the log cannot take more: see the gateway's own log";
    LogStarved "log_starved" Unavailable:
        "the machine has no memory or file descriptors left for the log: raise the open-file limit, or free some; it comes again by itself";
    LogTooLarge "log_too_large" TooLarge:
        "the request with its id is larger than a frame of the log: send fewer messages at once";
    LogFailed "log_failed" Unavailable:
        "the log cannot take more: see the gateway's own log";
    LogAway "log_away" Unavailable:
        "the log is away: see /readyz, and whether NATS and the stream's leader are there";
    LogUnknown "log_unknown" Unavailable:
        "the log is away: see /readyz, and whether NATS and the stream's leader are there";
    LogHistory "log_history" Unavailable:
        "the cluster's log or registry is not the one that this gateway has followed: /readyz says what happened, and which command decides";
    ShuttingDown "shutting_down" Unavailable:
        "the gateway was shutting down; it comes again by itself";

    // MQTT and its connections.
    ConnectionsMax "connections_max" Unavailable:
        "there are too many connections in all: raise mqtt.connections_max";
    Strangers "strangers" Unavailable:
        "too many connections have presented no valid key: see from where, keep those out, or raise the limit that is named";
    TlsHandshake "tls_handshake" Malformed:
        "the client and the gateway do not agree on TLS: check versions and certificates";
    ProxyHeader "proxy_header" Malformed:
        "a proxy in trusted_proxies does not begin with a PROXY protocol header in order: see the words, and set the proxy or proxy_protocol";
    UntrustedProxy "untrusted_proxy" Malformed:
        "it begins with a PROXY protocol header: if it is your proxy, add its address to trusted_proxies; if not, keep it out";
    MalformedConnect "malformed_connect" Malformed:
        "it does not speak MQTT on this port; TLS has a port of its own";
    ConnectTimeout "connect_timeout" Timeout:
        "it connected and sent no CONNECT in time: check its network, or what probes the port";
    AuthenticationMethod "authentication_method" Unauthorized:
        "it asks for extended authentication, which is not served: turn it off, and send the key as user name or password";
    ClientId "client_id" Malformed:
        "its client identifier cannot be used: give it a short one of its own that is not a key, or let it connect with a clean session";
    SharedClientId "shared_client_id" Conflict:
        "two devices use one client identifier, or one opens connections that it forgets: give every device an identifier of its own";
    Will "will" Malformed:
        "its will would be refused as a message: correct the will's topic, size or content";
    Subscribe "subscribe" Malformed:
        "a filter was not granted: correct it, give the client a key with the scope subscribe, or have it subscribe to less";
    Protocol "protocol" Malformed:
        "the client broke a rule of MQTT: see the words, and update its library";
    Websocket "websocket" UpgradeRequired:
        "it does not speak MQTT over WebSocket: use a client with the subprotocol mqtt, and proxies that pass the upgrade on unchanged";

    // NATS.
    ConnectionType "connection_type" Unauthorized:
        "a NATS server tried to connect as a leaf node: give it a user of its own in nats-server's configuration";

    // HTTP requests.
    FrameFlood "frame_flood" Malformed:
        "it floods its HTTP/2 connection with frames that carry nothing: update its client, or keep it out";
    Malformed "malformed" Malformed:
        "the gateway cannot read the request: correct what the words name; /openapi.json says what each call takes";
    NotPossible "not_possible" NotPossible:
        "the request is in order, and what it asks for cannot be: its values contradict each other or what is there; ask for what the words name";
    NotFound "not_found" NotFound:
        "nothing is at this address: correct the path or the name in it; /openapi.json lists the paths";
    NoKeyId "no_key_id" NotFound:
        "the datasource has no key of this id: 'headgate key list' shows those that it has";
    NoStorage "no_storage" NotFound:
        "nothing is stored for reading here: name one in storage.sinks, and restart the gateway";
    MethodNotAllowed "method_not_allowed" MethodNotAllowed:
        "the path does not take this method: use one that /openapi.json lists for it";
    Timeout "timeout" Timeout:
        "its body came too slowly: check its network, send less at once, or raise http.body_ms_max";
    Conflict "conflict" Conflict:
        "it would overwrite what is there already: use another id, or change what is there";
    Rotation "rotation" Conflict:
        "the key cannot be rotated as it is: see the words, or create another key";
    LastAdminKey "last_admin_key" Conflict:
        "it would lock everybody out: create another admin key for all datasources first";
    BackupRefused "backup_refused" Conflict:
        "no backup can be made there, or not now: name an absolute path outside the data directory at which nothing is yet, wait for the one that runs, and back a cluster up on NATS";
    ContentEncoding "content_encoding" ContentEncoding:
        "send the body as it is, or encode it once, as gzip or zstd";
    TooManyRequests "too_many_requests" TooManyRequests:
        "too many reports of leaked keys came from this address: report several in one request, or wait";
    ClusterAway "cluster_away" Unavailable:
        "the registry cannot be changed while NATS is away: see /readyz, and ask again";
    StorageBehind "storage_behind" Unavailable:
        "storage has not caught up: see /readyz, and ask again; what was asked for holds";
    StoreAway "store_away" Unavailable:
        "PostgreSQL, which reads are answered from, does not answer now: see /readyz and 'headgate sinks', and ask again; messages are let in meanwhile, and nothing is lost";
    StoreBusy "store_busy" Unavailable:
        "PostgreSQL has too much to read at once, or takes too long for this: ask again, for a shorter range or one topic";
    BackupFailed "backup_failed" Unavailable:
        "no backup could be begun, and nothing of it is left: put right what the words name, and ask again";
    Unavailable "unavailable" Unavailable:
        "the gateway could not reach or write what it needed: see the words, /readyz and its own log; it may come again";
    Internal "internal" Internal:
        "the gateway has failed: see its own log, and report it";
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl GrantDenial {
    /// The cause for metrics and logs, which distinguishes what a stranger is not told apart.
    pub fn cause(&self) -> Cause {
        match self {
            GrantDenial::NoKey => Cause::NoKey,
            GrantDenial::Malformed => Cause::MalformedKey,
            GrantDenial::Unknown => Cause::UnknownKey,
            GrantDenial::Revoked => Cause::RevokedKey,
            GrantDenial::Expired => Cause::ExpiredKey,
            GrantDenial::DamagedToken => Cause::DamagedToken,
            GrantDenial::UnknownToken => Cause::UnknownToken,
            GrantDenial::ExpiredToken => Cause::ExpiredToken,
            GrantDenial::TokenTopics { .. } => Cause::TokenTopics,
            GrantDenial::TokenUse { .. } => Cause::TokenUse,
            GrantDenial::TooManyFailures { .. } => Cause::TooManyFailures,
            GrantDenial::Ambiguous => Cause::AmbiguousKey,
            GrantDenial::OtherDatasource { .. } => Cause::OtherDatasource,
            GrantDenial::MissingScope { .. } => Cause::MissingScope,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_cause_has_a_name_of_its_own_in_snake_case() {
        let names: BTreeSet<_> = Cause::ALL.iter().map(|cause| cause.name()).collect();
        assert_eq!(names.len(), Cause::ALL.len());
        for name in names {
            let plain = name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_');
            assert!(plain && !name.starts_with('_') && !name.ends_with('_'), "{name}");
        }
    }

    #[test]
    fn every_cause_has_advice_that_says_more_than_to_read_the_words() {
        for cause in Cause::ALL {
            let advice = cause.advice();
            assert!(advice.len() >= 30 && !advice.ends_with('.'), "{cause}: {advice}");
            assert!(!advice.starts_with("see the words"), "{cause}: {advice}");
        }
    }

    #[test]
    fn every_cause_has_the_status_of_an_error() {
        for cause in Cause::ALL {
            assert!((400..=503).contains(&cause.kind().status()), "{cause}");
        }
        assert_eq!((Cause::NoKey.kind().status(), Cause::MissingScope.kind().status()), (401, 403));
        assert_eq!((Cause::Schema.kind().status(), Cause::LogBudget.kind().status()), (422, 503));
    }

    #[test]
    fn openapi_lists_every_cause() {
        let openapi = include_str!("../../front/http/openapi.json");
        let openapi: serde_json::Value = serde_json::from_str(openapi).expect("openapi.json is JSON");
        let entry = &openapi["components"]["schemas"]["Refusals"]["properties"]["refusals"]["items"];
        let listed: Vec<String> =
            serde_json::from_value(entry["properties"]["cause"]["enum"].clone()).expect("a list of causes");
        assert_eq!(listed, Cause::ALL.iter().map(|cause| cause.name()).collect::<Vec<_>>());
    }
}
