//! The limits of a key or a datasource, and their JSON form in the API.
//!
//! ```json
//! {"messages_per_s": {"max": 100, "burst": 200, "policy": "hold_back"}, "payload_bytes": 4096}
//! ```
//!
//! A number alone is the `max`. A rate has a `burst`, the most that may come at once; its default is one
//! second's worth. The [`LimitPolicy`] says what happens to a message over the limit.

use serde::{Serialize, Serializer};
use serde_json::{Map, Value, json};

use super::bucket::Rate;
use crate::limits::{
    INFLIGHT_PER_TENANT_MAX, KEYS_PER_TENANT_MAX, LIMIT_MAX, LIMIT_TOPICS_MAX, RETAINED_BYTES_PER_TENANT_MAX,
    RETAINED_TOPICS_LIMIT, RETAINED_TOPICS_PER_TENANT_MAX, SESSIONS_PER_TENANT_MAX,
    SHARE_GROUPS_PER_TENANT_MAX, SUBSCRIPTION_BYTES_PER_TENANT_MAX, SUBSCRIPTIONS_PER_TENANT_MAX,
};
use crate::whole_number::WholeNumber;

/// What can be limited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Limit {
    /// Messages a second.
    MessagesPerS,
    /// Bytes of payload a second.
    BytesPerS,
    /// Connections at once.
    Connections,
    /// The largest payload of one message, in bytes.
    PayloadBytes,
    /// Different topics.
    Topics,
    /// Of a datasource: MQTT sessions that outlive their connection.
    Sessions,
    /// Of a datasource: subscriptions of all its MQTT sessions.
    Subscriptions,
    /// Of a datasource: what those take in memory, in bytes.
    SubscriptionBytes,
    /// Of a datasource: groups of shared subscriptions.
    ShareGroups,
    /// Of a datasource: messages that were sent to its subscribers and are not acknowledged; who is over it is
    /// sent no more until some are.
    Inflight,
    /// Of a datasource: topics with a retained message.
    RetainedTopics,
    /// Of a datasource: bytes of its retained messages.
    RetainedBytes,
    /// Of a datasource: keys that are not revoked.
    Keys,
    /// Of a datasource: for how long a stored record is kept, in seconds since it was received.
    StoredAgeS,
    /// Of a datasource: bytes of all stored records, as [`STORED_RECORD_BYTES`](crate::limits::STORED_RECORD_BYTES)
    /// and [`STORED_NAME_BYTES`](crate::limits::STORED_NAME_BYTES) count them.
    StoredBytes,
}

impl Limit {
    /// All of them, in the order in which they are shown.
    pub const ALL: [Limit; 15] = [
        Limit::MessagesPerS,
        Limit::BytesPerS,
        Limit::Connections,
        Limit::PayloadBytes,
        Limit::Topics,
        Limit::Sessions,
        Limit::Subscriptions,
        Limit::SubscriptionBytes,
        Limit::ShareGroups,
        Limit::Inflight,
        Limit::RetainedTopics,
        Limit::RetainedBytes,
        Limit::Keys,
        Limit::StoredAgeS,
        Limit::StoredBytes,
    ];

    /// The name in the API, in metrics and in messages.
    pub fn name(self) -> &'static str {
        match self {
            Limit::MessagesPerS => "messages_per_s",
            Limit::BytesPerS => "bytes_per_s",
            Limit::Connections => "connections",
            Limit::PayloadBytes => "payload_bytes",
            Limit::Topics => "topics",
            Limit::Sessions => "sessions",
            Limit::Subscriptions => "subscriptions",
            Limit::SubscriptionBytes => "subscription_bytes",
            Limit::ShareGroups => "share_groups",
            Limit::Inflight => "inflight",
            Limit::RetainedTopics => "retained_topics",
            Limit::RetainedBytes => "retained_bytes",
            Limit::Keys => "keys",
            Limit::StoredAgeS => "stored_age_s",
            Limit::StoredBytes => "stored_bytes",
        }
    }

    /// For what is always limited, because it costs memory or disk for long: the limit of a datasource for
    /// which none is set. Keys have no limits of these.
    pub fn default_max(self) -> Option<u64> {
        match self {
            Limit::MessagesPerS
            | Limit::BytesPerS
            | Limit::Connections
            | Limit::PayloadBytes
            | Limit::Topics
            | Limit::StoredAgeS
            | Limit::StoredBytes => None,
            Limit::Sessions => Some(SESSIONS_PER_TENANT_MAX),
            Limit::Subscriptions => Some(SUBSCRIPTIONS_PER_TENANT_MAX),
            Limit::SubscriptionBytes => Some(SUBSCRIPTION_BYTES_PER_TENANT_MAX),
            Limit::ShareGroups => Some(SHARE_GROUPS_PER_TENANT_MAX),
            Limit::Inflight => Some(INFLIGHT_PER_TENANT_MAX),
            Limit::RetainedTopics => Some(RETAINED_TOPICS_PER_TENANT_MAX),
            Limit::RetainedBytes => Some(RETAINED_BYTES_PER_TENANT_MAX),
            Limit::Keys => Some(KEYS_PER_TENANT_MAX),
        }
    }

    /// Whether it is an amount per second, so that waiting helps.
    pub fn is_rate(self) -> bool {
        matches!(self, Limit::MessagesPerS | Limit::BytesPerS)
    }

    /// Whether it says how much of the past is kept, so that nothing is ever over it for long.
    pub fn is_of_storage(self) -> bool {
        matches!(self, Limit::StoredAgeS | Limit::StoredBytes)
    }

    /// Whether keys have none of it.
    fn is_of_datasources(self) -> bool {
        self.default_max().is_some() || self.is_of_storage()
    }

    fn default_policy(self) -> LimitPolicy {
        match self {
            _ if self.is_rate() => LimitPolicy::HoldBack,
            _ if self.is_of_storage() => LimitPolicy::Remove,
            _ => LimitPolicy::Reject,
        }
    }

    fn max(self) -> u64 {
        match self {
            Limit::Topics => LIMIT_TOPICS_MAX,
            Limit::RetainedTopics => RETAINED_TOPICS_LIMIT,
            _ => LIMIT_MAX,
        }
    }
}

/// What happens to a message over a limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LimitPolicy {
    /// It waits: its connection is not read until it may go on. HTTP and NATS clients are not held back:
    /// for them it is as [`LimitPolicy::Reject`]. Only for rates, whose default it is.
    HoldBack,
    /// It is refused.
    Reject,
    /// It is kept in quarantine.
    Quarantine,
    /// Nothing happens to it: the oldest that is stored makes room. Only for what is stored.
    Remove,
}

impl LimitPolicy {
    const ALL: [LimitPolicy; 4] =
        [LimitPolicy::HoldBack, LimitPolicy::Reject, LimitPolicy::Quarantine, LimitPolicy::Remove];

    /// The name in the API.
    pub fn name(self) -> &'static str {
        match self {
            LimitPolicy::HoldBack => "hold_back",
            LimitPolicy::Reject => "reject",
            LimitPolicy::Quarantine => "quarantine",
            LimitPolicy::Remove => "remove",
        }
    }

    /// Checks that it may be set for `limit`. The only place that decides this.
    fn check(self, limit: Limit) -> Result<(), &'static str> {
        match self {
            LimitPolicy::Remove if limit.is_of_storage() => Ok(()),
            LimitPolicy::Remove => Err("only stored_age_s and stored_bytes remove what is there"),
            _ if limit.is_of_storage() => Err("it can only be remove: the oldest that is stored makes room"),
            LimitPolicy::Reject => Ok(()),
            _ if limit.default_max().is_some() => {
                Err("it can only be reject: there is no message to keep or to wait")
            }
            LimitPolicy::Quarantine if limit != Limit::Connections => Ok(()),
            LimitPolicy::HoldBack if limit.is_rate() => Ok(()),
            LimitPolicy::HoldBack => {
                Err("only messages_per_s and bytes_per_s can hold back: waiting helps only there")
            }
            LimitPolicy::Quarantine => Err("messages are quarantined, not connections"),
        }
    }
}

/// The setting of one limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LimitSetting {
    /// The most there may be.
    pub max: u64,
    /// For a rate: the most that may come at once.
    pub burst: u64,
    /// What happens to a message over it.
    pub policy: LimitPolicy,
}

impl LimitSetting {
    /// The rate for a bucket.
    pub(super) fn rate(self) -> Rate {
        Rate { per_s: self.max, burst: self.burst }
    }
}

/// The limits of one key or datasource. Those that are not set do not limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct QuotaLimits([Option<LimitSetting>; Limit::ALL.len()]);

/// Why limits cannot be set.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("limits{pointer}: {words}")]
pub struct LimitsError {
    /// Where in the limits, as a JSON pointer.
    pub pointer: String,
    /// What is wrong there.
    pub words: String,
}

impl QuotaLimits {
    /// The setting of one limit, if it is set.
    pub fn get(&self, limit: Limit) -> Option<LimitSetting> {
        self.0[limit as usize]
    }

    /// The setting of one limit, or its default.
    pub fn get_or_default(&self, limit: Limit) -> Option<LimitSetting> {
        let by_default = |max| LimitSetting { max, burst: max, policy: LimitPolicy::Reject };
        self.get(limit).or_else(|| limit.default_max().map(by_default))
    }

    /// The first limit that is set and that only datasources have.
    pub fn first_of_datasources(&self) -> Option<Limit> {
        Limit::ALL.into_iter().find(|limit| limit.is_of_datasources() && self.get(*limit).is_some())
    }

    /// Whether nothing is limited.
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(Option::is_none)
    }

    /// Reads the text that the registry keeps.
    ///
    /// # Errors
    /// As [`QuotaLimits::from_json`].
    pub fn parse(text: &str) -> Result<Self, LimitsError> {
        let fault =
            |error: serde_json::Error| LimitsError { pointer: String::new(), words: error.to_string() };
        Self::from_json(&serde_json::from_str(text).map_err(fault)?)
    }

    /// The text for the registry: `None` for no limits.
    pub fn text(&self) -> Option<String> {
        (!self.is_empty()).then(|| self.to_json().to_string())
    }

    /// Parses the JSON of the registry or of a request: an object, or `null` for no limits.
    ///
    /// # Errors
    /// [`LimitsError`] for a name that is not known, and for a value that is out of range or of
    /// another type.
    pub fn from_json(value: &Value) -> Result<Self, LimitsError> {
        Self::default().patched(value)
    }

    /// Applies `patch` as a JSON merge patch (RFC 7396): limits that it does not name stay, and `null`
    /// removes one limit, or all of them.
    ///
    /// # Errors
    /// As [`QuotaLimits::from_json`].
    pub fn patched(mut self, patch: &Value) -> Result<Self, LimitsError> {
        let fault =
            |pointer: &str, words: &str| LimitsError { pointer: pointer.to_owned(), words: words.to_owned() };
        let settings = match patch {
            Value::Null => return Ok(Self::default()),
            Value::Object(settings) => settings,
            _ => return Err(fault("", "they have to be an object, or null for none")),
        };
        for (name, value) in settings {
            let Some(limit) = Limit::ALL.into_iter().find(|limit| limit.name() == name) else {
                let names = Limit::ALL.map(Limit::name).join(", ");
                return Err(fault("", &format!("one of them is not known; the limits are {names}")));
            };
            let at = |member: &str| format!("/{name}{member}");
            let stated = self.get(limit);
            self.0[limit as usize] = match value {
                Value::Null => None,
                Value::Number(_) => Some(parse_limit_setting(
                    limit,
                    None,
                    &Map::from_iter([("max".to_owned(), value.clone())]),
                )),
                Value::Object(members) => Some(parse_limit_setting(limit, stated, members)),
                _ => return Err(fault(&at(""), "it has to be a whole number, an object with max, or null")),
            }
            .transpose()
            .map_err(|(member, words)| fault(&at(member), &words))?;
        }
        Ok(self)
    }

    /// The JSON form of the API and the registry.
    pub fn to_json(self) -> Value {
        let set = Limit::ALL.into_iter().filter_map(|limit| Some((limit, self.get(limit)?)));
        let shown = set.map(|(limit, LimitSetting { max, burst, policy })| {
            let setting = match limit.is_rate() {
                true => json!({ "max": max, "burst": burst, "policy": policy.name() }),
                false => json!({ "max": max, "policy": policy.name() }),
            };
            (limit.name().to_owned(), setting)
        });
        Value::Object(shown.collect())
    }
}

impl Serialize for QuotaLimits {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        self.to_json().serialize(s)
    }
}

/// Parses one limit, with its old setting as the default; `Err` says which member is wrong and why.
fn parse_limit_setting(
    limit: Limit,
    stated: Option<LimitSetting>,
    members: &Map<String, Value>,
) -> Result<LimitSetting, (&'static str, String)> {
    let known = |name: &str| matches!(name, "max" | "policy") || name == "burst" && limit.is_rate();
    if !members.keys().all(|name| known(name)) {
        let burst = if limit.is_rate() { ", burst" } else { "" };
        return Err(("", format!("its members are max{burst} and policy")));
    }
    let number = |name: &'static str, pointer, default: Option<u64>| match members.get(name) {
        None => default.ok_or((pointer, format!("it has to be between 1 and {}", limit.max()))),
        Some(value) => value
            .as_number()
            .and_then(WholeNumber::of)
            .map(|WholeNumber(number)| number)
            .filter(|number| (1..=limit.max()).contains(number))
            .ok_or((pointer, format!("it has to be a whole number between 1 and {}", limit.max()))),
    };
    let max = number("max", "/max", stated.map(|s| s.max))?;
    // A burst that was never chosen follows the rate.
    let chosen = stated.filter(|s| s.burst != s.max).map(|s| s.burst);
    let burst = number("burst", "/burst", Some(chosen.unwrap_or(max)))?;
    let policy = match members.get("policy") {
        None => stated.map_or(limit.default_policy(), |s| s.policy),
        Some(value) => LimitPolicy::ALL
            .into_iter()
            .find(|policy| value.as_str() == Some(policy.name()))
            .ok_or_else(|| ("/policy", "it has to be hold_back, reject, quarantine or remove".to_owned()))?,
    };
    policy.check(limit).map_err(|words| ("/policy", words.to_owned()))?;
    Ok(LimitSetting { max, burst, policy })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(value: Value) -> Result<QuotaLimits, LimitsError> {
        QuotaLimits::from_json(&value)
    }

    #[test]
    fn a_number_alone_is_the_max_and_the_rest_is_default() {
        let limits = limits(json!({ "messages_per_s": 100.0, "topics": 5 })).expect("good");
        let rate = limits.get(Limit::MessagesPerS).expect("set");
        assert_eq!((rate.max, rate.burst, rate.policy), (100, 100, LimitPolicy::HoldBack));
        assert_eq!(limits.get(Limit::Topics).expect("set").policy, LimitPolicy::Reject);
        assert_eq!(limits.get(Limit::BytesPerS), None);
    }

    #[test]
    fn what_is_shown_reads_back_as_it_was() {
        let set = limits(json!({
            "messages_per_s": { "max": 10, "burst": 30, "policy": "reject" },
            "bytes_per_s": 1000,
            "connections": { "max": 2 },
            "payload_bytes": 512,
            "topics": LIMIT_TOPICS_MAX,
            "sessions": 3,
            "stored_age_s": { "max": 86_400, "policy": "remove" },
            "stored_bytes": 1 << 30,
        }))
        .expect("good");
        assert_eq!(set.get(Limit::StoredBytes).expect("set").policy, LimitPolicy::Remove);
        assert_eq!(limits(set.to_json()), Ok(set));
        assert_eq!(limits(Value::Null), Ok(QuotaLimits::default()));
    }

    #[test]
    fn what_costs_memory_for_long_is_limited_where_nothing_is_set() {
        let set = limits(json!({ "sessions": 3 })).expect("good");
        for limit in Limit::ALL {
            let max = set.get_or_default(limit).map(|setting| setting.max);
            let expected = if limit == Limit::Sessions { Some(3) } else { limit.default_max() };
            assert_eq!(max, expected, "{}", limit.name());
        }
        assert_eq!(set.first_of_datasources(), Some(Limit::Sessions));
        assert_eq!(
            limits(json!({ "stored_age_s": 3 })).expect("good").first_of_datasources(),
            Some(Limit::StoredAgeS)
        );
        assert_eq!(limits(json!({ "topics": 3 })).expect("good").first_of_datasources(), None);
    }

    #[test]
    fn a_patch_changes_what_it_names_and_null_takes_away() {
        let set = limits(json!({ "messages_per_s": 10, "topics": 5 })).expect("good");
        let patched = set.patched(&json!({ "topics": null, "payload_bytes": 7 })).expect("good");
        assert_eq!(patched, limits(json!({ "messages_per_s": 10, "payload_bytes": 7 })).expect("good"));
        let rejecting = set.patched(&json!({ "messages_per_s": { "policy": "reject" } })).expect("good");
        let rate = rejecting.get(Limit::MessagesPerS).expect("set");
        assert_eq!((rate.max, rate.burst, rate.policy), (10, 10, LimitPolicy::Reject));
        let faster = rejecting.patched(&json!({ "messages_per_s": { "max": 20 } })).expect("good");
        assert_eq!(faster.get(Limit::MessagesPerS).expect("set").burst, 20, "it goes with the rate");
        assert!(set.patched(&Value::Null).expect("good").is_empty());
    }

    #[test]
    fn what_cannot_be_set_is_refused_at_its_place() {
        for (value, pointer) in [
            (json!(7), ""),
            (json!({ "message_per_s": 1 }), ""),
            (json!({ "messages_per_s": "1" }), "/messages_per_s"),
            (json!({ "messages_per_s": 0 }), "/messages_per_s/max"),
            (json!({ "messages_per_s": 1.5 }), "/messages_per_s/max"),
            (json!({ "messages_per_s": -1 }), "/messages_per_s/max"),
            (json!({ "messages_per_s": {} }), "/messages_per_s/max"),
            (json!({ "messages_per_s": { "max": 1, "burst": 0 } }), "/messages_per_s/burst"),
            (json!({ "messages_per_s": { "max": 1, "policy": "drop" } }), "/messages_per_s/policy"),
            (json!({ "connections": { "max": 1, "policy": "quarantine" } }), "/connections/policy"),
            (json!({ "topics": { "max": 1, "policy": "hold_back" } }), "/topics/policy"),
            (json!({ "topics": { "max": 1, "burst": 1 } }), "/topics"),
            (json!({ "topics": LIMIT_TOPICS_MAX + 1 }), "/topics/max"),
            (json!({ "bytes_per_s": LIMIT_MAX + 1 }), "/bytes_per_s/max"),
            (json!({ "sessions": { "max": 1, "policy": "quarantine" } }), "/sessions/policy"),
            (json!({ "retained_topics": RETAINED_TOPICS_LIMIT + 1 }), "/retained_topics/max"),
        ] {
            assert_eq!(limits(value.clone()).map_err(|e| e.pointer), Err(pointer.to_owned()), "{value}");
        }
        assert!(limits(json!({ "topics": LIMIT_TOPICS_MAX, "bytes_per_s": LIMIT_MAX })).is_ok());
    }
}
