//! The `admin.key` of a gateway on this machine, kept in step when the key in it is rotated: whoever rotates it with the
//! commands would lock himself out when the grace is over.

use std::io::ErrorKind;
use std::path::PathBuf;

use anyhow::Context;
use serde_json::Value;

use super::client::{KeySecret, KeySource};
use crate::gateway::write_secret;
use crate::message::KeyId;

/// The file, with the key that was read from it.
pub(super) struct AdminKeyFile {
    path: PathBuf,
    secret: String,
    key_id: KeyId,
}

impl AdminKeyFile {
    /// The file that a key was read from, if it was.
    pub(super) fn of(key: &KeySecret) -> Option<Self> {
        match key.source() {
            KeySource::AdminKey(path) => {
                Some(Self { path: path.clone(), secret: key.expose().to_owned(), key_id: key.id()? })
            }
            _ => None,
        }
    }

    /// Follows a rotation by the gateway's answer to it. Returns what was done, in words, if anything was.
    pub(super) fn follow(&self, answer: &Value) -> anyhow::Result<Option<String>> {
        let own_id = self.key_id.to_string();
        let path = self.path.display();
        if answer["replaced"]["id"] == own_id.as_str()
            && let Some(secret) = answer["key"]["secret"].as_str()
        {
            // Until the grace is over the old one is wanted again if this is undone.
            write_secret(&self.place_of_replaced(), &self.secret).with_context(|| self.words())?;
            write_secret(&self.path, secret).with_context(|| self.words())?;
            return Ok(Some(format!("{path} has the new key now")));
        }
        if answer["revoked"] == own_id.as_str() {
            let before = self.place_of_replaced();
            let text = match std::fs::read_to_string(&before) {
                Ok(text) => text,
                Err(error) if error.kind() == ErrorKind::NotFound => String::new(),
                Err(error) => return Err(error).with_context(|| before.display().to_string()),
            };
            let old = KeySecret::new(&text);
            if old.id().is_none_or(|id| answer["key"]["id"] != id.to_string().as_str()) {
                return Ok(Some(format!("{path} has the key that is dead now: put the old one there")));
            }
            write_secret(&self.path, old.expose()).with_context(|| self.words())?;
            std::fs::remove_file(&before).with_context(|| before.display().to_string())?;
            return Ok(Some(format!("{path} has the old key again")));
        }
        Ok(None)
    }

    /// Where the key is that was replaced last.
    fn place_of_replaced(&self) -> PathBuf {
        let mut name = self.path.as_os_str().to_owned();
        name.push(".replaced");
        name.into()
    }

    fn words(&self) -> String {
        format!("{} could not be renewed", self.path.display())
    }
}
