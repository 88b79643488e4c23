//! What differs between two configurations, by the names of the settings: which changes of a file hold at once when it
//! is read again, and which only after a restart.

use figment::value::{Dict, Value};

use super::Config;

/// The settings that a running gateway takes over.
const LIVE_SETTINGS: [&str; 12] = [
    "auth.failures_burst",
    "auth.failures_exempt",
    "auth.failures_per_s",
    "drain_ms_max",
    "http.strangers_max",
    "http.strangers_per_address_max",
    "intake.memory_bytes_max",
    "intake.memory_share_bytes_max",
    "metrics.datasources_max",
    "mqtt.strangers_max",
    "mqtt.strangers_per_address_max",
    "trace.filter",
];

/// The settings that two configurations differ in, by their dotted names.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct ConfigChanges {
    /// Those that a running gateway takes over.
    pub live: Vec<String>,
    /// Those that hold after a restart.
    pub after_restart: Vec<String>,
}

impl ConfigChanges {
    /// What differs in `after`.
    pub fn between(before: &Config, after: &Config) -> Self {
        let mut names = Vec::new();
        if let (Ok(Value::Dict(_, one)), Ok(Value::Dict(_, other))) =
            (Value::serialize(before), Value::serialize(after))
        {
            collect_differences(&one, &other, "", &mut names);
        }
        // Secrets are not serialized.
        let secrets = |config: &Config| {
            let nats = &config.nats;
            let (postgres, delta) = (&config.storage.postgres, &config.storage.delta);
            [
                nats.password.clone(),
                nats.callout.password.clone(),
                nats.callout.system_password.clone(),
                postgres.url.clone(),
                postgres.password.clone(),
                delta.secret_access_key.clone(),
            ]
        };
        let secret_names = [
            "nats.password",
            "nats.callout.password",
            "nats.callout.system_password",
            "storage.postgres.url",
            "storage.postgres.password",
            "storage.delta.secret_access_key",
        ];
        for ((name, one), other) in secret_names.into_iter().zip(secrets(before)).zip(secrets(after)) {
            if one != other && !names.iter().any(|known| known == name) {
                names.push(name.to_owned());
            }
        }
        names.sort();
        let (live, after_restart) =
            names.into_iter().partition(|name| LIVE_SETTINGS.contains(&name.as_str()));
        Self { live, after_restart }
    }
}

fn collect_differences(one: &Dict, other: &Dict, section: &str, names: &mut Vec<String>) {
    for (name, value) in one {
        let path = if section.is_empty() { name.clone() } else { format!("{section}.{name}") };
        match (value, other.get(name)) {
            (Value::Dict(_, one), Some(Value::Dict(_, other))) => {
                collect_differences(one, other, &path, names);
            }
            (value, other) if Some(value) != other => names.push(path),
            _ => {}
        }
    }
    let added = other.keys().filter(|name| !one.contains_key(*name));
    names.extend(
        added.map(|name| if section.is_empty() { name.clone() } else { format!("{section}.{name}") }),
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::shape::ConfigShape;

    #[test]
    fn a_change_is_told_by_its_name_and_a_secret_s_too() {
        let before = Config::default();
        let mut after = before.clone();
        assert_eq!(ConfigChanges::between(&before, &after), ConfigChanges::default());
        after.mqtt.receive_maximum = 7;
        after.mqtt.listen.set_port(7);
        after.nats.callout.password = toml::from_str::<toml::Table>("p = \"s3cret\"")
            .expect("TOML")
            .remove("p")
            .and_then(|value| value.try_into().ok())
            .expect("a secret");
        after.storage.delta.secret_access_key = after.nats.callout.password.clone();
        after.intake.memory_bytes_max += 1;
        after.trace.filter = "debug".to_owned();
        let changes = ConfigChanges::between(&before, &after);
        assert_eq!(changes.live, ["intake.memory_bytes_max", "trace.filter"]);
        assert_eq!(
            changes.after_restart,
            [
                "mqtt.listen",
                "mqtt.receive_maximum",
                "nats.callout.password",
                "storage.delta.secret_access_key"
            ]
        );
    }

    #[test]
    fn every_live_setting_exists() {
        let shape = ConfigShape::of_defaults();
        for name in LIVE_SETTINGS {
            assert!(shape.is_setting(name), "{name}");
        }
    }
}
