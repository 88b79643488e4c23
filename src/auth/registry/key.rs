//! A key, live: everything but its secret, with the lease and the connections that end when it dies.
//!
//! There may be a million keys, so a [`Key`] holds only what every key has; what few keys have is behind one
//! pointer.

use std::fmt;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, OnceLock};

use arc_swap::ArcSwapOption;
use headgate_format::key::Digest;

use super::setting::JsonSetting;
use super::usage::PendingKeyUsage;
use crate::auth::connections::{CloseReason, KeyConnections};
use crate::auth::scope::Scopes;
use crate::message::{DatasourceId, KeyId, Lease, TimeMicros};
use crate::time::cluster_micros;

/// The end of a key that has none.
const TIME_NEVER: TimeMicros = TimeMicros::MAX;
/// The end of a key that has ended: no clock that is set back can be before it.
pub(super) const TIME_ENDED: TimeMicros = TimeMicros::MIN;

/// One key, live: everything but its secret.
///
/// The order of the fields matters: those that a lookup reads come first, next to the reference count of
/// the `Arc`, so that they cost one cache miss.
#[repr(C)]
pub struct Key {
    /// The digest that is looked up.
    pub(super) digest: Digest,
    /// When the key ends by itself: at its expiry, or at the end of its grace period if that is earlier.
    ends_at: AtomicI64,
    /// State created on first use: few of a million keys are in use.
    opened: OnceLock<Box<KeyUseState>>,
    /// The datasource that it belongs to, or `*`.
    pub datasource: DatasourceId,
    /// The display name, or empty.
    pub label: Box<str>,
    /// When it was created.
    pub created_at: TimeMicros,
    /// When it expires, or [`TIME_NEVER`].
    expires_at: TimeMicros,
    /// Its part in a rotation, if it has one.
    rotation: ArcSwapOption<Rotation>,
    /// The key's own limits.
    pub limits: JsonSetting,
    /// The public handle; no other key has or had the same one.
    pub id: KeyId,
    /// What it may be used for.
    pub scopes: Scopes,
}

/// The state of a key that is created on first use.
#[derive(Default)]
struct KeyUseState {
    /// Whether the key is still valid.
    lease: Lease,
    /// The connections that it has opened.
    connections: Arc<KeyConnections>,
    /// The usage that is not yet written.
    usage: PendingKeyUsage,
}

/// A key's part in rotations, in each of which one key replaces another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rotation {
    /// The key that this one replaces.
    pub replaces: Option<KeyId>,
    /// The key that replaces this one, and when this one's grace period ends.
    pub replaced_by: Option<(KeyId, TimeMicros)>,
}

impl Key {
    /// When it expires, if it does.
    pub fn expires_at(&self) -> Option<TimeMicros> {
        (self.expires_at != TIME_NEVER).then_some(self.expires_at)
    }

    /// When the key ends by itself, if it does: at its expiry or at the end of its grace period.
    pub fn ends_at(&self) -> Option<TimeMicros> {
        let ends_at = self.ends_at.load(Ordering::Acquire);
        (ends_at != TIME_NEVER).then_some(ends_at)
    }

    /// Whether its end has passed.
    pub fn has_expired(&self) -> bool {
        self.ends_at().is_some_and(|ends_at| ends_at <= cluster_micros())
    }

    /// Whether its lease is still valid: an atomic load or two. Does not check the clock.
    pub fn holds(&self) -> bool {
        // Ending a key creates this state, so a key without it has not ended.
        self.opened.get().is_none_or(|opened| opened.lease.holds())
    }

    /// Its lease, for holders that check it again later.
    pub fn lease(&self) -> &Lease {
        &self.opened().lease
    }

    /// Its live connections.
    pub fn connections(&self) -> &Arc<KeyConnections> {
        &self.opened().connections
    }

    /// The number of its live connections.
    pub fn connection_count(&self) -> usize {
        self.opened.get().map_or(0, |opened| opened.connections.count())
    }

    /// Ends the key for every holder, and tells its connections to close.
    pub(super) fn end(&self) {
        // The lease first: it stops messages that are already past the lookup.
        self.lease().end();
        self.connections().close_all(CloseReason::KeyDead);
    }

    /// Marks a key that has ended: no clock that is set back makes it valid again.
    pub(super) fn mark_ended(&self) {
        self.ends_at.store(TIME_ENDED, Ordering::Release);
    }

    /// Its usage, to be added to. Creates it on first use.
    pub(super) fn usage(&self) -> &PendingKeyUsage {
        &self.opened().usage
    }

    /// Its usage, if it was ever used.
    pub(super) fn recorded_usage(&self) -> Option<&PendingKeyUsage> {
        self.opened.get().map(|opened| &opened.usage)
    }

    fn opened(&self) -> &KeyUseState {
        self.opened.get_or_init(Box::default)
    }

    /// Its part in a rotation.
    pub fn rotation(&self) -> Rotation {
        self.rotation.load().as_deref().copied().unwrap_or_default()
    }

    /// Sets its part in a rotation, and its end with it: every holder of the key sees the new end.
    pub(super) fn set_rotation(&self, rotation: Rotation) {
        let grace_ends_at = rotation.replaced_by.map_or(TIME_NEVER, |(_, at)| at);
        let any = (rotation != Rotation::default()).then(|| Arc::new(rotation));
        self.rotation.store(any);
        self.ends_at.store(self.expires_at.min(grace_ends_at), Ordering::Release);
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Key")
            .field("id", &self.id)
            .field("datasource", &self.datasource)
            .field("scopes", &self.scopes)
            .field("label", &self.label)
            .finish_non_exhaustive()
    }
}

/// The attributes of a key at its creation; it gets the rest during its life.
pub(super) struct KeyAttributes<'a> {
    pub(super) digest: Digest,
    pub(super) datasource: DatasourceId,
    pub(super) scopes: Scopes,
    pub(super) label: &'a str,
    pub(super) created_at: TimeMicros,
    pub(super) expires_at: Option<TimeMicros>,
    pub(super) rotation: Rotation,
    pub(super) limits: Option<&'a str>,
}

impl From<KeyAttributes<'_>> for Key {
    fn from(new: KeyAttributes<'_>) -> Self {
        let expires_at = new.expires_at.unwrap_or(TIME_NEVER);
        let key = Self {
            digest: new.digest,
            id: new.digest.key_id(),
            scopes: new.scopes,
            datasource: new.datasource,
            label: new.label.into(),
            created_at: new.created_at,
            expires_at,
            ends_at: AtomicI64::new(expires_at),
            rotation: ArcSwapOption::empty(),
            limits: JsonSetting::new(new.limits),
            opened: OnceLock::new(),
        };
        if new.rotation != Rotation::default() {
            key.set_rotation(new.rotation);
        }
        key
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_that_nobody_uses_costs_little() {
        // A million keys in less than 400 MB leave no room for more.
        assert!(size_of::<Key>() <= 136, "{}", size_of::<Key>());
    }
}
