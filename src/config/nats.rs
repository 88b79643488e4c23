//! `[nats]`: which NATS the gateway uses, and what for. Without servers it uses none.

use std::fmt;
use std::path::{Path, PathBuf};

use headgate_bridge_nats::{NatsCredentials, NatsSettings};
use serde::{Deserialize, Serialize, Serializer};

use super::{ConfigError, LogBackend, require};

/// The NATS that the gateway uses.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NatsConfig {
    /// `nats://HOST:PORT` or `tls://HOST:PORT` of one or more servers of a cluster; empty: no NATS.
    pub servers: Vec<String>,
    /// The user in the server's configuration as which the gateway connects; empty for none.
    pub user: String,
    /// Its password.
    pub password: ConfigSecret,
    /// A file with its password, instead of it.
    pub password_file: PathBuf,
    /// A `.creds` file, instead of user and password.
    pub credentials: PathBuf,
    /// A file with the issuers of the servers' certificates (PEM), beside those that the system trusts. With it, every
    /// connection is over TLS.
    pub ca: PathBuf,
    /// What the reply subjects of messages begin with that are answered, without the dot after it. A message that asks
    /// for an answer elsewhere is refused.
    pub reply_prefixes: Vec<String>,
    /// Whether messages on `ingest.{datasource}.{topic}` are admitted.
    pub ingest: bool,
    /// The validated stream.
    pub stream: NatsStreamConfig,
    /// API keys as NATS users.
    pub callout: NatsCalloutConfig,
}

/// The validated stream in JetStream, on `stream.{datasource}.{topic}`. With `log.backend = "jetstream"`
/// it is the log.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NatsStreamConfig {
    /// Whether records are sent to it. With `log.backend = "jetstream"` it always exists.
    pub enabled: bool,
    /// Its name in JetStream.
    pub name: String,
    /// How many servers hold each record.
    pub replicas: usize,
}

/// Auth callout: a client of NATS presents its API key as its user name, password or token.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NatsCalloutConfig {
    /// A file with the account's seed that signs the answers (`SA…`); empty: no auth callout.
    pub issuer_seed_file: PathBuf,
    /// A file with the curve seed to which requests are encrypted (`SX…`); empty: no encryption.
    pub xkey_seed_file: PathBuf,
    /// The account of clients with an API key.
    pub account: String,
    /// A user of the account that receives the requests and what clients publish. That account belongs to the
    /// gateways alone, so it is not that of `nats.user`.
    pub user: String,
    /// Its password.
    pub password: ConfigSecret,
    /// A file with its password, instead of it.
    pub password_file: PathBuf,
    /// A user of the system account, for ending the connections of dead keys. If empty, they end when their
    /// permission expires, and what they publish until then is refused.
    pub system_user: String,
    /// Its password.
    pub system_password: ConfigSecret,
    /// A file with its password, instead of it.
    pub system_password_file: PathBuf,
    /// The longest that a client's permission lasts, in seconds; then the client has to reconnect.
    pub expiry_s: u64,
    /// Whether clients may use the default inbox of NATS clients, `_INBOX.>`. All clients share it, so each
    /// can see the answers to the others. A client may always use the inbox of its own key,
    /// `_INBOX_{key id}.>`.
    pub shared_inbox: bool,
}

impl NatsConfig {
    /// Whether NATS is used.
    pub fn is_used(&self) -> bool {
        !self.servers.is_empty()
    }

    pub(super) fn check(&self, backend: LogBackend) -> Result<(), ConfigError> {
        let callout = &self.callout;
        require(
            backend == LogBackend::Embedded || self.is_used(),
            "nats.servers",
            format_args!("{:?}", self.servers),
            "it has to name a server, as log.backend is \"jetstream\"",
        )?;
        require(
            !callout.is_used() || self.is_used(),
            "nats.servers",
            format_args!("{:?}", self.servers),
            "it has to name a server, as nats.callout.issuer_seed_file is set",
        )?;
        require(
            !callout.is_used() || !callout.user.is_empty() && callout.user != self.user,
            "nats.callout.user",
            format_args!("{:?}", callout.user),
            "it has to be a user of an account of its own, as nats.callout.issuer_seed_file is set",
        )?;
        for prefix in &self.reply_prefixes {
            require(
                is_reply_prefix(prefix),
                "nats.reply_prefixes",
                format_args!("{prefix:?}"),
                "each has to be a subject without wildcards that no messages are published on: not ingest, stream, \
                 quarantine, headgate, denied, or one with $ or _R_",
            )?;
        }
        require(
            (1..=5).contains(&self.stream.replicas),
            "nats.stream.replicas",
            self.stream.replicas,
            "it has to be between 1 and 5",
        )?;
        require(
            (10..=7 * 24 * 3_600).contains(&callout.expiry_s),
            "nats.callout.expiry_s",
            callout.expiry_s,
            "it has to be between 10 seconds and 7 days",
        )
    }

    /// How to connect. `name` says what the connection is for; NATS' monitoring shows it after `headgate`.
    ///
    /// # Errors
    /// [`ConfigError::Secret`] if the password's file cannot be read.
    pub fn connection(&self, name: &str) -> Result<NatsSettings, ConfigError> {
        let unset = |path: &PathBuf| path.as_os_str().is_empty();
        let credentials = if !unset(&self.credentials) {
            NatsCredentials::File(self.credentials.clone())
        } else if self.user.is_empty() {
            NatsCredentials::None
        } else {
            let password = self.password.or_from_file("nats.password_file", &self.password_file)?;
            NatsCredentials::Password { user: self.user.clone(), password }
        };
        Ok(self.settings(credentials, name))
    }

    /// How to connect to the account that receives the requests of auth callout.
    ///
    /// # Errors
    /// [`ConfigError::Secret`] if the password's file cannot be read.
    pub fn callout_connection(&self, name: &str) -> Result<NatsSettings, ConfigError> {
        let NatsCalloutConfig { user, password, password_file, .. } = &self.callout;
        let password = password.or_from_file("nats.callout.password_file", password_file)?;
        Ok(self.settings(NatsCredentials::Password { user: user.clone(), password }, name))
    }

    /// How to connect to the system account.
    ///
    /// # Errors
    /// [`ConfigError::Secret`] if the password's file cannot be read.
    pub fn system_connection(&self, name: &str) -> Result<NatsSettings, ConfigError> {
        let NatsCalloutConfig { system_user, system_password, system_password_file, .. } = &self.callout;
        let password =
            system_password.or_from_file("nats.callout.system_password_file", system_password_file)?;
        Ok(self.settings(NatsCredentials::Password { user: system_user.clone(), password }, name))
    }

    fn settings(&self, credentials: NatsCredentials, name: &str) -> NatsSettings {
        let ca = (!self.ca.as_os_str().is_empty()).then(|| self.ca.clone());
        NatsSettings { servers: self.servers.clone(), credentials, ca, name: format!("headgate {name}") }
    }
}

/// Whether answers may be published under a prefix: nowhere that messages, questions between gateways, or NATS' own
/// are.
fn is_reply_prefix(prefix: &str) -> bool {
    let is_word = |word: &str| {
        !word.is_empty()
            && !word.contains(|c: char| c.is_whitespace() || c.is_control() || matches!(c, '*' | '>'))
    };
    let first = prefix.split('.').next().unwrap_or_default();
    prefix.split('.').all(is_word)
        && !first.starts_with('$')
        && !["ingest", "stream", "quarantine", "headgate", "denied", "_R_"].contains(&first)
}

impl NatsCalloutConfig {
    /// Whether API keys are NATS users.
    pub fn is_used(&self) -> bool {
        !self.issuer_seed_file.as_os_str().is_empty()
    }
}

impl Default for NatsConfig {
    fn default() -> Self {
        Self {
            servers: Vec::new(),
            user: String::new(),
            password: ConfigSecret::default(),
            password_file: PathBuf::new(),
            credentials: PathBuf::new(),
            ca: PathBuf::new(),
            reply_prefixes: vec!["_INBOX".to_owned()],
            ingest: true,
            stream: NatsStreamConfig { enabled: true, name: "headgate".to_owned(), replicas: 1 },
            callout: NatsCalloutConfig {
                issuer_seed_file: PathBuf::new(),
                xkey_seed_file: PathBuf::new(),
                account: "APP".to_owned(),
                user: String::new(),
                password: ConfigSecret::default(),
                password_file: PathBuf::new(),
                system_user: String::new(),
                system_password: ConfigSecret::default(),
                system_password_file: PathBuf::new(),
                expiry_s: 3_600,
                shared_inbox: true,
            },
        }
    }
}

/// A secret of the configuration. Neither `Debug` nor serialization shows it.
#[derive(Clone, PartialEq, Eq, Default, Deserialize)]
pub struct ConfigSecret(String);

impl ConfigSecret {
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The secret itself.
    pub(super) fn secret(&self) -> &str {
        &self.0
    }

    /// The secret itself, or the content of `file` if one is named; `key` is the file's setting.
    ///
    /// # Errors
    /// [`ConfigError::Secret`] if it cannot be read.
    pub fn or_from_file(&self, key: &'static str, file: &Path) -> Result<String, ConfigError> {
        if file.as_os_str().is_empty() {
            return Ok(self.0.clone());
        }
        let read = std::fs::read_to_string(file);
        let text = read.map_err(|error| ConfigError::Secret { key, file: file.to_owned(), error })?;
        Ok(text.trim().to_owned())
    }

    fn redacted(&self) -> &'static str {
        if self.is_empty() { "" } else { "…" }
    }
}

impl fmt::Debug for ConfigSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.redacted(), f)
    }
}

impl Serialize for ConfigSecret {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.redacted())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_go_nowhere_that_messages_are() {
        for good in ["_INBOX", "_INBOX_press", "my.app", "devices"] {
            assert!(is_reply_prefix(good), "{good}");
        }
        for bad in
            ["", "a.", "a..b", "a.*", ">", "$JS", "$SYS.x", "ingest", "stream.x", "headgate", "_R_", "a b"]
        {
            assert!(!is_reply_prefix(bad), "{bad}");
        }
    }

    #[test]
    fn a_password_may_stand_in_a_file_and_is_never_shown() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let file = dir.path().join("password");
        let nats =
            NatsConfig { user: "gateway".to_owned(), password_file: file.clone(), ..NatsConfig::default() };
        let error = nats.connection("test").expect_err("there is no such file").to_string();
        assert!(error.contains("nats.password_file"), "{error}");
        std::fs::write(&file, "s3cret\n").expect("written");
        let settings = nats.connection("test").expect("readable");
        let NatsCredentials::Password { user, password } = &settings.credentials else {
            panic!("{settings:?}")
        };
        assert_eq!((user.as_str(), password.as_str()), ("gateway", "s3cret"));
        assert!(!format!("{settings:?}").contains("s3cret"));
        assert_eq!(settings.name, "headgate test");
    }
}
