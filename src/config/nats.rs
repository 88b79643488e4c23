//! `[nats]`: which NATS the gateway uses, and for what. Without servers it uses none.

use std::fmt;
use std::path::{Path, PathBuf};

use headgate_bridge_nats::{Credentials, Settings};
use serde::{Deserialize, Serialize, Serializer};

use super::ConfigError;

/// NATS.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nats {
    /// `nats://HOST:PORT` or `tls://HOST:PORT`, of one or more servers of a cluster; none: NATS is not
    /// used.
    pub servers: Vec<String>,
    /// The user of the server's configuration that the gateway connects as; empty for none.
    pub user: String,
    /// Its password.
    pub password: Secret,
    /// A file with its password, instead of it.
    pub password_file: PathBuf,
    /// A `.creds` file, instead of user and password.
    pub credentials: PathBuf,
    /// A file with the issuers of the servers' certificates (PEM), beside those that the system trusts.
    pub ca: PathBuf,
    /// Messages on `ingest.{datasource}.{topic}` are let in.
    pub ingest: bool,
    /// The validated stream.
    pub stream: NatsStream,
    /// API keys as NATS users.
    pub callout: NatsCallout,
}

/// The validated stream in JetStream, on `stream.{datasource}.{topic}`. With `log.backend = "jetstream"`
/// it is the log.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NatsStream {
    /// Whether records are sent on to it; as the log it is always there.
    pub enabled: bool,
    /// What JetStream calls it.
    pub name: String,
    /// On how many servers each record is.
    pub replicas: usize,
}

/// Auth callout: a client of NATS presents its API key as its user name, password or token.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NatsCallout {
    /// A file with the account's seed that answers are signed with (`SA…`); empty: no auth callout.
    pub issuer_seed_file: PathBuf,
    /// A file with the curve seed that requests are encrypted to (`SX…`); empty: they are not.
    pub xkey_seed_file: PathBuf,
    /// The account that clients with an API key are in.
    pub account: String,
    /// A user of the account that requests come to, and what clients publish: one that is the gateways'
    /// alone, so not that of `nats.user`.
    pub user: String,
    /// Its password.
    pub password: Secret,
    /// A file with its password, instead of it.
    pub password_file: PathBuf,
    /// A user of the system account, to end connections of dead keys as; empty: they end when their
    /// permission expires, and what they publish until then is refused.
    pub system_user: String,
    /// Its password.
    pub system_password: Secret,
    /// A file with its password, instead of it.
    pub system_password_file: PathBuf,
    /// How long a client's permission lasts at most, in seconds; it connects again then.
    pub expiry_s: u64,
    /// Whether clients may use the inbox that NATS clients use by themselves, `_INBOX.>`. It is one for
    /// all: whoever has a key can then see the answers to others. Each may use an inbox of its own in any
    /// case, `_INBOX_{key id}.>`.
    pub shared_inbox: bool,
}

impl Nats {
    /// Whether there is any to use.
    pub fn is_used(&self) -> bool {
        !self.servers.is_empty()
    }
}

impl Nats {
    /// How to connect. `name` is what the connection is for: what it is called in NATS' monitoring begins
    /// with `headgate`.
    ///
    /// # Errors
    /// [`ConfigError::Secret`] if the password's file cannot be read.
    pub fn connection(&self, name: &str) -> Result<Settings, ConfigError> {
        let unset = |path: &PathBuf| path.as_os_str().is_empty();
        let credentials = if !unset(&self.credentials) {
            Credentials::File(self.credentials.clone())
        } else if self.user.is_empty() {
            Credentials::None
        } else {
            let password = self.password.or_from("nats.password_file", &self.password_file)?;
            Credentials::Password { user: self.user.clone(), password }
        };
        Ok(self.settings(credentials, name))
    }

    /// How to connect to the account that requests of auth callout come to.
    ///
    /// # Errors
    /// [`ConfigError::Secret`] if the password's file cannot be read.
    pub fn callout_connection(&self, name: &str) -> Result<Settings, ConfigError> {
        let NatsCallout { user, password, password_file, .. } = &self.callout;
        let password = password.or_from("nats.callout.password_file", password_file)?;
        Ok(self.settings(Credentials::Password { user: user.clone(), password }, name))
    }

    /// How to connect to the system account.
    ///
    /// # Errors
    /// [`ConfigError::Secret`] if the password's file cannot be read.
    pub fn system_connection(&self, name: &str) -> Result<Settings, ConfigError> {
        let NatsCallout { system_user, system_password, system_password_file, .. } = &self.callout;
        let password = system_password.or_from("nats.callout.system_password_file", system_password_file)?;
        Ok(self.settings(Credentials::Password { user: system_user.clone(), password }, name))
    }

    fn settings(&self, credentials: Credentials, name: &str) -> Settings {
        let ca = (!self.ca.as_os_str().is_empty()).then(|| self.ca.clone());
        Settings { servers: self.servers.clone(), credentials, ca, name: format!("headgate {name}") }
    }
}

impl NatsCallout {
    /// Whether API keys are NATS users.
    pub fn is_used(&self) -> bool {
        !self.issuer_seed_file.as_os_str().is_empty()
    }
}

impl Default for Nats {
    fn default() -> Self {
        Self {
            servers: Vec::new(),
            user: String::new(),
            password: Secret::default(),
            password_file: PathBuf::new(),
            credentials: PathBuf::new(),
            ca: PathBuf::new(),
            ingest: true,
            stream: NatsStream { enabled: true, name: "headgate".to_owned(), replicas: 1 },
            callout: NatsCallout {
                issuer_seed_file: PathBuf::new(),
                xkey_seed_file: PathBuf::new(),
                account: "APP".to_owned(),
                user: String::new(),
                password: Secret::default(),
                password_file: PathBuf::new(),
                system_user: String::new(),
                system_password: Secret::default(),
                system_password_file: PathBuf::new(),
                expiry_s: 3_600,
                shared_inbox: true,
            },
        }
    }
}

/// A secret of the configuration: shown nowhere.
#[derive(Clone, PartialEq, Eq, Default, Deserialize)]
pub struct Secret(String);

impl Secret {
    /// The secret itself, for whoever it is to be presented to.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The secret itself, or what is in `file` if one is named; `key` is the file's setting.
    ///
    /// # Errors
    /// [`ConfigError::Secret`] if it cannot be read.
    pub fn or_from(&self, key: &'static str, file: &Path) -> Result<String, ConfigError> {
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

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.redacted(), f)
    }
}

impl Serialize for Secret {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.redacted())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_may_stand_in_a_file_and_is_never_shown() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let file = dir.path().join("password");
        let nats = Nats { user: "gateway".to_owned(), password_file: file.clone(), ..Nats::default() };
        let error = nats.connection("test").expect_err("there is no such file").to_string();
        assert!(error.contains("nats.password_file"), "{error}");
        std::fs::write(&file, "s3cret\n").expect("written");
        let settings = nats.connection("test").expect("readable");
        let Credentials::Password { user, password } = &settings.credentials else { panic!("{settings:?}") };
        assert_eq!((user.as_str(), password.as_str()), ("gateway", "s3cret"));
        assert!(!format!("{settings:?}").contains("s3cret"));
        assert_eq!(settings.name, "headgate test");
    }
}
