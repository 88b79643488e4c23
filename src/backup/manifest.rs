//! The manifest: `backup.json`, which says what a backup has and by which it is checked. It is written last. A directory
//! that has one is a backup and no data directory: nothing may change in it.
//!
//! | member | what |
//! |---|---|
//! | `headgate_backup` | the version of this format: 1 |
//! | `headgate` | the version that made it |
//! | `made_at` | when |
//! | `first_offset`, `next_offset` | of its log |
//! | `files` | of each: `path`, `bytes`, `blake3` (the digest of its content), and of a database `format` (its `user_version`) |
//! | `check` | BLAKE3 of this document with an empty `check`, without white space |

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::BackupError;
use crate::limits::BACKUP_MANIFEST_BYTES_MAX;
use crate::message::{Offset, now_micros};
use crate::time::Rfc3339;

/// The file's name.
pub const MANIFEST_FILE_NAME: &str = "backup.json";
/// The newest version of the format.
const MANIFEST_FORMAT: u32 = 1;

/// What a backup has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupManifest {
    headgate_backup: u32,
    headgate: String,
    made_at: String,
    /// The oldest offset in its log.
    pub first_offset: Offset,
    /// The offset behind its last record.
    pub next_offset: Offset,
    /// Its files.
    pub files: Vec<BackupFile>,
    check: String,
}

/// A file of a backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupFile {
    /// Relative to the directory, with `/`.
    pub path: String,
    /// Its length.
    pub bytes: u64,
    /// The digest of its content, in hex.
    pub blake3: String,
    /// The version of a database's format.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<u32>,
}

/// Why a manifest cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// There is none.
    #[error("it is no backup: it has no {MANIFEST_FILE_NAME}")]
    Missing,
    /// It cannot be read.
    #[error("{MANIFEST_FILE_NAME}: {0}")]
    Io(#[from] io::Error),
    /// It is not what was written.
    #[error("{MANIFEST_FILE_NAME} is damaged ({0}): use another backup")]
    Damaged(String),
    /// A newer Headgate has made it.
    #[error(
        "{MANIFEST_FILE_NAME} has format {0}, and this Headgate knows formats up to {MANIFEST_FORMAT}: use a newer one"
    )]
    Newer(u64),
}

impl BackupManifest {
    /// That of a backup that is made now.
    ///
    /// # Errors
    /// [`BackupError::Name`]: a file has a name that [`BackupManifest::read`] would refuse.
    pub(super) fn new(
        first_offset: Offset,
        next_offset: Offset,
        files: Vec<BackupFile>,
    ) -> Result<Self, BackupError> {
        if let Some(file) = files.iter().find(|file| !is_plain_path(&file.path)) {
            return Err(BackupError::Name { path: file.path.clone() });
        }
        let mut manifest = Self {
            headgate_backup: MANIFEST_FORMAT,
            headgate: env!("CARGO_PKG_VERSION").to_owned(),
            made_at: Rfc3339(now_micros()).to_string(),
            first_offset,
            next_offset,
            files,
            check: String::new(),
        };
        manifest.check = manifest.digest();
        Ok(manifest)
    }

    /// The digest that `check` has to be.
    fn digest(&self) -> String {
        let unchecked = Self { check: String::new(), ..self.clone() };
        let bytes = serde_json::to_vec(&unchecked).expect("names and numbers are JSON");
        blake3::hash(&bytes).to_hex().to_string()
    }

    /// As it is written.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = serde_json::to_vec_pretty(self).expect("names and numbers are JSON");
        bytes.push(b'\n');
        bytes
    }

    /// Reads and checks that of the backup in `dir`. The files are not checked.
    ///
    /// # Errors
    /// [`ManifestError`].
    pub fn read(dir: &Path) -> Result<Self, ManifestError> {
        let file = match File::open(dir.join(MANIFEST_FILE_NAME)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(ManifestError::Missing),
            file => file?,
        };
        let mut bytes = Vec::new();
        file.take(BACKUP_MANIFEST_BYTES_MAX).read_to_end(&mut bytes)?;
        Self::decode(&bytes)
    }

    fn decode(bytes: &[u8]) -> Result<Self, ManifestError> {
        let damaged = |error: serde_json::Error| ManifestError::Damaged(error.to_string());
        // The version comes before the rest: a newer one may have other members.
        let value: serde_json::Value = serde_json::from_slice(bytes).map_err(damaged)?;
        match value["headgate_backup"].as_u64() {
            Some(version) if version > u64::from(MANIFEST_FORMAT) => {
                return Err(ManifestError::Newer(version));
            }
            _ => {}
        }
        let manifest: Self = serde_json::from_value(value).map_err(damaged)?;
        if manifest.check != manifest.digest() {
            return Err(ManifestError::Damaged("its digest does not match".to_owned()));
        }
        if let Some(file) = manifest.files.iter().find(|file| !is_plain_path(&file.path)) {
            return Err(ManifestError::Damaged(format!("it names {:?}", file.path)));
        }
        Ok(manifest)
    }
}

/// Whether a path stays in its directory: a name, or one in `log/`, of letters, digits and `.-_` alone.
pub(super) fn is_plain_path(path: &str) -> bool {
    let name = path.strip_prefix("log/").unwrap_or(path);
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
    name.bytes().all(is_plain) && name.starts_with(|first: char| first.is_ascii_alphanumeric())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> BackupManifest {
        let file = |path: &str, format| BackupFile {
            path: path.to_owned(),
            bytes: 7,
            blake3: "00".to_owned(),
            format,
        };
        BackupManifest::new(
            3,
            9,
            vec![file("registry.db", Some(4)), file("log/00000000000000000003.log", None)],
        )
        .expect("plain names")
    }

    #[test]
    fn a_manifest_is_read_as_it_was_written_and_no_changed_byte_is_believed() {
        let (manifest, bytes) = (manifest(), manifest().encode());
        assert_eq!(BackupManifest::decode(&bytes).expect("whole").files, manifest.files);
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] = changed[at].wrapping_add(1);
            let read = BackupManifest::decode(&changed).ok().map(|manifest| manifest.files);
            assert!(read.is_none_or(|files| files == manifest.files), "byte {at}");
            assert!(BackupManifest::decode(&bytes[..at.max(1) - 1]).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn a_newer_one_and_one_that_names_what_is_elsewhere_are_refused() {
        let mut newer = manifest();
        newer.headgate_backup = 2;
        assert!(matches!(BackupManifest::decode(&newer.encode()), Err(ManifestError::Newer(2))));
        for path in ["../x", "/etc/x", "log/../x", "a/b", "", "log/", ".x", "log/log/x", "x\0"] {
            let mut elsewhere = manifest();
            elsewhere.files[0].path = path.to_owned();
            elsewhere.check = elsewhere.digest();
            let read = BackupManifest::decode(&elsewhere.encode());
            assert!(matches!(read, Err(ManifestError::Damaged(_))), "{path:?}");
            let made = BackupManifest::new(3, 9, elsewhere.files);
            assert!(matches!(made, Err(BackupError::Name { .. })), "{path:?}");
        }
    }
}
