//! `[storage.delta]`: where the Delta lake is, and how often it gets what has come.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{ConfigError, ConfigSecret, require};

/// The Delta lake that records are stored in.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeltaConfig {
    /// A directory, or `s3://BUCKET/PREFIX`. A relative path is in the data directory.
    pub place: String,
    /// How long records may wait until they are in the lake, in seconds. Each interval is a commit, and a file for each
    /// datasource that had records.
    pub interval_s: u64,
    /// How long files stay that were merged or rewritten, for those who read an earlier version, in seconds.
    pub removed_kept_s: u64,
    /// How many days of records the lake keeps; 0: all.
    pub retention_days: u64,
    /// `https://HOST:PORT` of a store that is not Amazon's; empty: Amazon's.
    pub endpoint: String,
    /// The store's region; empty: `AWS_REGION`.
    pub region: String,
    /// Who the gateway is to the store; empty: as Amazon's tools find it (`AWS_ACCESS_KEY_ID`, roles).
    pub access_key_id: String,
    /// The secret of that.
    pub secret_access_key: ConfigSecret,
    /// A file with the secret, instead of it.
    pub secret_access_key_file: PathBuf,
    /// A file with the certificates (PEM) that are trusted instead of the system's.
    pub ca: PathBuf,
}

impl Default for DeltaConfig {
    fn default() -> Self {
        Self {
            place: "lake".to_owned(),
            interval_s: 10,
            removed_kept_s: 24 * 3_600,
            retention_days: 0,
            endpoint: String::new(),
            region: String::new(),
            access_key_id: String::new(),
            secret_access_key: ConfigSecret::default(),
            secret_access_key_file: PathBuf::new(),
            ca: PathBuf::new(),
        }
    }
}

impl DeltaConfig {
    /// The secret of the access key, itself or from its file.
    ///
    /// # Errors
    /// The file cannot be read.
    #[cfg(feature = "delta")]
    pub fn secret(&self) -> Result<String, ConfigError> {
        let file = &self.secret_access_key_file;
        self.secret_access_key.or_from_file("storage.delta.secret_access_key_file", file)
    }

    pub(super) fn check(&self) -> Result<(), ConfigError> {
        require(
            (1..=3_600).contains(&self.interval_s),
            "storage.delta.interval_s",
            self.interval_s,
            "it has to be between 1 and 3600",
        )?;
        require(
            self.endpoint.is_empty() || self.endpoint.starts_with("http"),
            "storage.delta.endpoint",
            &self.endpoint,
            "it has to begin with https:// or http://",
        )?;
        require(
            !self.place.is_empty() && (self.place.starts_with("s3://") || !self.place.contains("://")),
            "storage.delta.place",
            &self.place,
            "it has to be a directory or s3://BUCKET/PREFIX",
        )
    }
}
