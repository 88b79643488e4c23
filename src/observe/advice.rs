//! Advice: what an operator can do about a refusal, in one sentence.

use super::cause::Cause;
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
        let fixed = self.cause.advice();
        match self.cause {
            Cause::RevokedKey => {
                format!("{key} {}: give the client one that is live", end.unwrap_or("was revoked"))
            }
            Cause::MalformedKey | Cause::UnknownKey => self.key_shape.map_or(fixed, shape_advice).to_owned(),
            _ => match fixed.strip_prefix("the key ") {
                Some(rest) => format!("{key} {rest}"),
                None => fixed.to_owned(),
            },
        }
    }
}

/// What is wrong with a key that was never given out.
pub(crate) fn shape_advice(shape: KeyShape) -> &'static str {
    match shape {
        KeyShape { prefix: false, .. } => {
            "what it sent is no Headgate key: those begin with hgk_. Check which secret it was given"
        }
        KeyShape { length: KeyLength::TooShort, .. } => "the key is cut short: copy all of its 53 characters",
        KeyShape { length: KeyLength::TooLong, .. } => {
            "there is something behind the key: it has 53 characters"
        }
        KeyShape { checksum: KeyChecksum::Wrong, .. } => "the key is misspelt: copy it again",
        KeyShape { checksum: KeyChecksum::Right, .. } => {
            "the key is well-formed and was never given out here: is it another gateway's?"
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{KeyId, Transport};

    fn entry(cause: Cause, key_id: Option<KeyId>) -> RefusalEntry {
        RefusalEntry {
            transport: Transport::Http,
            cause,
            words: String::new(),
            address: None,
            client: String::new(),
            datasource: String::new(),
            key_id,
            key_shape: None,
            limit: None,
            count: 1,
            first_at: 0,
            last_at: 0,
        }
    }

    #[test]
    fn a_known_key_is_named_by_its_id() {
        let key_id = KeyId([7; 6]);
        for (cause, end, advice) in [
            (
                Cause::RevokedKey,
                Some("was revoked at 9"),
                "was revoked at 9: give the client one that is live",
            ),
            (Cause::RevokedKey, None, "was revoked: give the client one that is live"),
            (Cause::ExpiredKey, None, "has expired: give the client a new one"),
            (Cause::MissingScope, None, "lacks a scope: create a key with it"),
        ] {
            assert_eq!(entry(cause, Some(key_id)).advice(end), format!("key {key_id} {advice}"));
        }
        let unnamed = entry(Cause::ExpiredKey, None).advice(None);
        assert_eq!(unnamed, "the key has expired: give the client a new one");
        let other = entry(Cause::Topic, Some(key_id)).advice(None);
        assert_eq!(other, Cause::Topic.advice());
    }
}
