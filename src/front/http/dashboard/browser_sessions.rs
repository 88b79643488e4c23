//! Browser sessions: who has signed in on the dashboard. A session stands for a key, and is never more than it: each use
//! looks the key up, so that it ends with it. What the browser has is a random token; here is its digest alone, and only
//! in memory.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::Instant;

use parking_lot::Mutex;
use rand::TryRng;
use rand::rngs::{SysError, SysRng};

use crate::auth::Key;
use crate::limits::{
    BROWSER_SESSION_AGE_MAX, BROWSER_SESSION_IDLE_MAX, BROWSER_SESSIONS_MAX, BROWSER_SESSIONS_PER_KEY_MAX,
};
use crate::message::{DatasourceId, KeyId};

/// What a token is kept under.
const TOKEN_CONTEXT: &str = "headgate 2026-11 browser session token digest";
/// What a page proves with that it was given the session and not only the cookie.
const PROOF_CONTEXT: &str = "headgate 2026-11 browser session proof";

/// A session's token, as the cookie has it: 64 hexadecimal digits.
pub(in super::super) struct SessionToken(String);

/// Names a session, and opens none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(in super::super) struct SessionDigest([u8; 32]);

impl SessionToken {
    fn generate() -> Result<Self, SysError> {
        let mut bytes = [0; 32];
        SysRng.try_fill_bytes(&mut bytes)?;
        Ok(Self(blake3::Hash::from_bytes(bytes).to_hex().to_string()))
    }

    /// A token that a cookie has; `None` if it cannot be one.
    pub(in super::super) fn parse(text: &str) -> Option<Self> {
        let is_token = text.len() == 64 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        is_token.then(|| Self(text.to_owned()))
    }

    /// The token, for the cookie.
    pub(in super::super) fn expose(&self) -> &str {
        &self.0
    }

    fn digest(&self) -> SessionDigest {
        SessionDigest(blake3::derive_key(TOKEN_CONTEXT, self.0.as_bytes()))
    }

    /// What every request that changes something has to have in a header: no other page knows it, even if it gets the
    /// browser to send the cookie.
    pub(in super::super) fn proof(&self) -> String {
        let proof = blake3::derive_key(PROOF_CONTEXT, self.0.as_bytes());
        blake3::Hash::from_bytes(proof).to_hex()[..32].to_owned()
    }
}

/// One session.
struct BrowserSession {
    datasource: DatasourceId,
    key_id: KeyId,
    begun: Instant,
    used: Instant,
}

impl BrowserSession {
    fn holds(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.used) < BROWSER_SESSION_IDLE_MAX
            && now.saturating_duration_since(self.begun) < BROWSER_SESSION_AGE_MAX
    }
}

/// A session that there is.
pub(in super::super) struct FoundBrowserSession {
    pub(in super::super) digest: SessionDigest,
    /// Its key's datasource, or `*`.
    pub(in super::super) datasource: DatasourceId,
    pub(in super::super) key_id: KeyId,
    pub(in super::super) begun: Instant,
}

/// The sessions of this gateway.
#[derive(Default)]
pub(in super::super) struct BrowserSessions(Mutex<HashMap<SessionDigest, BrowserSession>>);

impl BrowserSessions {
    /// Begins a session for a key. If the key has too many, the one that was not used for longest ends; if there are too
    /// many in all, that of the key that has most, of the datasource whose keys have most.
    pub(in super::super) fn begin(&self, key: &Key, now: Instant) -> Result<SessionToken, SysError> {
        let token = SessionToken::generate()?;
        let mut sessions = self.0.lock();
        sessions.retain(|_, session| session.holds(now));
        let oldest_of = |belongs: &dyn Fn(&BrowserSession) -> bool| {
            let crowded = sessions.iter().filter(|(_, session)| belongs(session));
            crowded.min_by_key(|(_, session)| session.used).map(|(digest, _)| *digest)
        };
        let of_key = sessions.values().filter(|session| session.key_id == key.id).count();
        let ends = if of_key >= BROWSER_SESSIONS_PER_KEY_MAX {
            oldest_of(&|session| session.key_id == key.id)
        } else if sessions.len() >= BROWSER_SESSIONS_MAX {
            let datasource = most_common(sessions.values().map(|session| &session.datasource));
            let of_datasource = sessions.values().filter(|session| Some(&session.datasource) == datasource);
            let crowded = most_common(of_datasource.map(|session| session.key_id));
            oldest_of(&|session| Some(session.key_id) == crowded)
        } else {
            None
        };
        if let Some(digest) = ends {
            sessions.remove(&digest);
        }
        let (datasource, key_id) = (key.datasource.clone(), key.id);
        sessions.insert(token.digest(), BrowserSession { datasource, key_id, begun: now, used: now });
        Ok(token)
    }

    /// The session of a token, which counts as used now.
    pub(in super::super) fn find(&self, token: &SessionToken, now: Instant) -> Option<FoundBrowserSession> {
        let digest = token.digest();
        let mut sessions = self.0.lock();
        let session = sessions.get_mut(&digest).filter(|session| session.holds(now))?;
        session.used = now;
        let BrowserSession { datasource, key_id, begun, .. } = session;
        Some(FoundBrowserSession { digest, datasource: datasource.clone(), key_id: *key_id, begun: *begun })
    }

    /// Whether a session is not over. It counts as used now.
    pub(in super::super) fn keep(&self, digest: &SessionDigest, now: Instant) -> bool {
        let mut sessions = self.0.lock();
        let session = sessions.get_mut(digest).filter(|session| session.holds(now));
        session.map(|session| session.used = now).is_some()
    }

    /// Ends a session.
    pub(in super::super) fn end(&self, token: &SessionToken) {
        self.0.lock().remove(&token.digest());
    }

    /// Ends all sessions of a key that is dead.
    pub(in super::super) fn end_of_key(&self, key_id: KeyId) {
        self.0.lock().retain(|_, session| session.key_id != key_id);
    }
}

/// What comes most often.
fn most_common<T: Eq + Hash>(all: impl Iterator<Item = T>) -> Option<T> {
    let mut counts: HashMap<T, usize> = HashMap::new();
    all.for_each(|one| *counts.entry(one).or_default() += 1);
    counts.into_iter().max_by_key(|(_, count)| *count).map(|(one, _)| one)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;
    use crate::auth::{Actor, Registry, Scope, Scopes};

    fn keys(count: usize) -> (tempfile::TempDir, Vec<Arc<Key>>) {
        let dir = tempfile::tempdir().expect("temporary directory");
        let registry = Registry::open(dir.path()).expect("opens");
        let (all, scopes) = (DatasourceId::all(), Scopes::from_slice(&[Scope::Subscribe]));
        let create = |_| registry.create_key(&Actor::SYSTEM, &all, "", scopes, None).expect("created").0;
        let keys = (0..count).map(create).collect();
        (dir, keys)
    }

    #[test]
    fn a_session_lasts_as_long_as_it_is_used_and_not_for_ever() {
        let (_dir, keys) = keys(1);
        let (sessions, begun) = (BrowserSessions::default(), Instant::now());
        let token = sessions.begin(&keys[0], begun).expect("begun");
        let known = SessionToken::parse(token.expose()).expect("a token");
        let id = |now| sessions.find(&known, now).map(|found| found.key_id);
        let just_before = BROWSER_SESSION_IDLE_MAX - Duration::from_millis(1);
        let mut now = begun;
        while now + just_before < begun + BROWSER_SESSION_AGE_MAX {
            now += just_before;
            assert_eq!(id(now), Some(keys[0].id));
        }
        assert_eq!(id(begun + BROWSER_SESSION_AGE_MAX), None, "however much it was used");
        let other = sessions.begin(&keys[0], begun).expect("begun");
        assert!(sessions.find(&other, begun + BROWSER_SESSION_IDLE_MAX).is_none(), "not used");
        let other = sessions.begin(&keys[0], begun).expect("begun");
        sessions.end(&other);
        assert!(sessions.find(&other, begun).is_none());
        let other = sessions.begin(&keys[0], begun).expect("begun");
        let digest = sessions.find(&other, begun).expect("there").digest;
        assert!(sessions.keep(&digest, begun + just_before), "watching is a use");
        assert!(sessions.keep(&digest, begun + just_before + just_before));
        assert!(!sessions.keep(&digest, begun + BROWSER_SESSION_AGE_MAX), "and not for ever");
        sessions.end_of_key(keys[0].id);
        assert!(sessions.find(&other, begun).is_none());
    }

    #[test]
    fn only_a_token_opens_a_session_and_what_proves_it_is_no_token() {
        let (_dir, keys) = keys(1);
        let (sessions, now) = (BrowserSessions::default(), Instant::now());
        let token = sessions.begin(&keys[0], now).expect("begun");
        assert_eq!(token.proof().len(), 32);
        for text in ["", "0", &token.proof(), &token.expose().to_uppercase(), &format!("{}0", token.expose())]
        {
            assert!(SessionToken::parse(text).is_none(), "{text}");
        }
        let other = SessionToken::parse(&"0".repeat(64)).expect("the form of one");
        assert!(sessions.find(&other, now).is_none());
        assert_ne!(token.proof(), other.proof());
    }

    #[test]
    fn a_key_with_many_sessions_ends_its_own_and_a_crowd_those_of_who_has_most() {
        let per_key = BROWSER_SESSIONS_PER_KEY_MAX;
        let (_dir, keys) = keys(BROWSER_SESSIONS_MAX / per_key + 2);
        let (sessions, begun) = (BrowserSessions::default(), Instant::now());
        let mut now = begun;
        let mut begin = |key: &Key| {
            now += Duration::from_millis(1);
            sessions.begin(key, now).expect("begun")
        };
        let other = begin(&keys[0]);
        let first = begin(&keys[1]);
        let rest: Vec<_> = (0..per_key).map(|_| begin(&keys[1])).collect();
        let is_there = |token: &SessionToken| sessions.0.lock().contains_key(&token.digest());
        assert!(!is_there(&first) && rest.iter().all(is_there) && is_there(&other));
        for key in &keys[2..] {
            (0..per_key).for_each(|_| drop(begin(key)));
        }
        assert_eq!(sessions.0.lock().len(), BROWSER_SESSIONS_MAX);
        assert!(is_there(&other), "who has one keeps it");
    }
}
