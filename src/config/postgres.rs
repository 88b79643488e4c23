//! `[storage.postgres]`: PostgreSQL as a sink.

use std::path::PathBuf;

use headgate_bridge_postgres::PostgresSettings;
use serde::{Deserialize, Serialize};

use super::nats::ConfigSecret;
use super::{ConfigError, require};

/// The longest name of a schema; PostgreSQL cuts longer ones.
const SCHEMA_NAME_BYTES_MAX: usize = 63;

/// The type of the column of JSON payloads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum JsonColumn {
    /// `jsonb`: it can be indexed; white space, the order of keys and keys that come twice are lost.
    Jsonb,
    /// `json`: the text as it came.
    Json,
}

impl JsonColumn {
    /// The type's name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Jsonb => "jsonb",
            Self::Json => "json",
        }
    }
}

/// PostgreSQL as a sink.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PostgresConfig {
    /// `postgres://USER@HOST:PORT/DATABASE?sslmode=…`. It may hold a password, and is shown nowhere.
    pub url: ConfigSecret,
    /// The password.
    pub password: ConfigSecret,
    /// A file with the password, instead of it. It is read at every connection.
    pub password_file: PathBuf,
    /// A file with the issuers of the server's certificate (PEM), instead of those that the system trusts.
    pub ca: PathBuf,
    /// The schema that Headgate makes its tables in.
    pub schema: String,
    /// The type of JSON payloads, in tables that are made anew.
    pub json: JsonColumn,
}

impl Default for PostgresConfig {
    fn default() -> Self {
        Self {
            url: ConfigSecret::default(),
            password: ConfigSecret::default(),
            password_file: PathBuf::new(),
            ca: PathBuf::new(),
            schema: "headgate".to_owned(),
            json: JsonColumn::Jsonb,
        }
    }
}

impl PostgresConfig {
    pub(super) fn check(&self, is_used: bool) -> Result<(), ConfigError> {
        require(
            !self.schema.is_empty()
                && self.schema.len() <= SCHEMA_NAME_BYTES_MAX
                && !self.schema.starts_with("pg_")
                && !self.schema.contains(char::is_control),
            "storage.postgres.schema",
            format_args!("{:?}", self.schema),
            "it has to be the name of a schema, of at most 63 bytes, and not begin with pg_",
        )?;
        if !is_used {
            return Ok(());
        }
        let settings = PostgresSettings::new(self.url.secret(), None, None, "headgate");
        settings.map(drop).map_err(|fault| ConfigError::Value {
            key: "storage.postgres.url",
            value: "not usable".to_owned(),
            rule: fault.rule(),
        })
    }

    /// How to connect.
    ///
    /// # Errors
    /// [`ConfigError`]: the file with the password cannot be read, the URL cannot be used.
    pub fn settings(&self) -> Result<PostgresSettings, ConfigError> {
        let password = self.password.or_from_file("storage.postgres.password_file", &self.password_file)?;
        let ca = (!self.ca.as_os_str().is_empty()).then(|| self.ca.clone());
        let password = (!password.is_empty()).then_some(&*password);
        PostgresSettings::new(self.url.secret(), password, ca, "headgate").map_err(|fault| {
            ConfigError::Value {
                key: "storage.postgres.url",
                value: "not usable".to_owned(),
                rule: fault.rule(),
            }
        })
    }
}
