//! A quota: what a key or a datasource may use, and what it has used. Intake checks it for every message,
//! between the authorizer and the log, and the fronts for every connection.
//!
//! A key or datasource that has [`QuotaLimits`] has [`Meters`], which are kept beside the limits in the
//! registry's live view. All connections of a key share its meters, without a lock. When limits change,
//! new meters replace the old ones, also for live connections and for messages that are held back.
//!
//! Usage is only in memory. After a change of the limits or a restart, buckets are full and no topic has
//! been seen.
//!
//! **Holding back.** A message over a rate reserves its turn and stays undecoded where it was read; its
//! connection is not read meanwhile. A timer wakes it once, in the order in which the turns were reserved; a
//! change of the limits wakes it at once, to be checked again. If its turn is further away than
//! `intake.hold_back_ms_max`, it waits for that long, and the connection closes without an acknowledgement.

pub mod bucket;
pub mod limits;
mod topics;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use self::bucket::{Moment, RateBucket};
pub use self::limits::{Limit, LimitPolicy, LimitSetting, LimitsError, QuotaLimits};
use self::topics::SeenTopics;
use crate::message::{DatasourceId, KeyId};

/// The owner of limits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LimitOwner {
    /// One key.
    Key(KeyId),
    /// One datasource: all its keys together, and keys for all datasources that publish to it.
    Datasource(DatasourceId),
}

impl fmt::Display for LimitOwner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LimitOwner::Key(id) => write!(f, "API key {id}"),
            LimitOwner::Datasource(id) => write!(f, "datasource {id}"),
        }
    }
}

/// A message or connection that is over a limit.
#[derive(Debug, Clone)]
pub struct LimitExceeded {
    /// The limit.
    pub limit: Limit,
    /// Its setting.
    pub setting: LimitSetting,
    /// Its owner.
    pub owner: LimitOwner,
    /// How long until it may go on; zero if waiting does not help.
    pub wait: Duration,
    /// How much of the limit is left.
    pub standing: QuotaStanding,
    /// Its units are taken already: after the wait it goes on without another check.
    reserved: bool,
    /// Cancelled when the limits are changed.
    replaced: CancellationToken,
}

impl LimitExceeded {
    /// A count of a datasource, or of the keys for all (`*`), that cannot go up.
    pub fn of_count(limit: Limit, setting: LimitSetting, datasource: &DatasourceId) -> Self {
        Self {
            limit,
            setting,
            owner: LimitOwner::Datasource(datasource.clone()),
            wait: Duration::ZERO,
            standing: QuotaStanding { burst: setting.max, left: 0, full_in: Duration::ZERO },
            reserved: false,
            replaced: CancellationToken::new(),
        }
    }

    /// Whether the policy is to wait instead of refusing.
    pub fn is_held_back(&self) -> bool {
        self.setting.policy == LimitPolicy::HoldBack
    }

    /// Whether the policy is quarantine instead of refusing.
    pub fn is_for_quarantine(&self) -> bool {
        self.setting.policy == LimitPolicy::Quarantine
    }

    /// Waits for its turn, but for no longer than `patience`. `Ok(true)`: it may go on, and its units are
    /// taken. `Ok(false)`: the limits have changed, and it has to be checked again.
    ///
    /// # Errors
    /// Itself, if its turn does not come within `patience`.
    pub async fn wait_turn(self, patience: Duration) -> Result<bool, Self> {
        let wait = if self.reserved { self.wait } else { patience };
        match tokio::time::timeout(wait, self.replaced.cancelled()).await {
            Ok(()) => Ok(false),
            Err(_) if self.reserved => Ok(true),
            Err(_) => Err(self),
        }
    }
}

impl fmt::Display for LimitExceeded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let LimitExceeded { limit, setting, owner, wait, .. } = self;
        write!(f, "over the limit {} {} of {owner}", limit.name(), setting.max)?;
        if !wait.is_zero() {
            write!(f, "; wait {}", Seconds(*wait))?;
        }
        Ok(())
    }
}

/// A duration for people: `0.4 s`, rounded up, so that a client that waits for it is not too early.
struct Seconds(Duration);

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tenths = self.0.as_millis().div_ceil(100).max(1);
        write!(f, "{}.{} s", tenths / 10, tenths % 10)
    }
}

/// How much of a limit is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuotaStanding {
    /// What may come at once when nothing is used.
    pub burst: u64,
    /// What may come at once now.
    pub left: u64,
    /// How long until nothing is used any more.
    pub full_in: Duration,
}

/// The limits of one owner, and what it has used.
#[derive(Debug)]
pub struct Meters {
    owner: LimitOwner,
    limits: QuotaLimits,
    messages: RateBucket,
    bytes: RateBucket,
    topics: SeenTopics,
    /// Cancelled when other meters replace these.
    replaced: CancellationToken,
}

impl Meters {
    /// Meters for `limits`, with nothing used.
    pub fn new(owner: LimitOwner, limits: QuotaLimits) -> Self {
        Self {
            owner,
            limits,
            messages: RateBucket::default(),
            bytes: RateBucket::default(),
            topics: SeenTopics::default(),
            replaced: CancellationToken::new(),
        }
    }

    /// Meters for limits as the registry keeps them: JSON that was checked when it was set. Text that
    /// cannot be parsed nevertheless is logged, and limits nothing.
    pub fn from_text(owner: LimitOwner, text: Option<&str>) -> Self {
        let limits = text.map_or(Ok(QuotaLimits::default()), QuotaLimits::parse).unwrap_or_else(|error| {
            tracing::error!(%owner, %error, "the limits that are kept cannot be read; nothing is limited");
            QuotaLimits::default()
        });
        Self::new(owner, limits)
    }

    /// The limits.
    pub fn limits(&self) -> &QuotaLimits {
        &self.limits
    }

    /// Marks that other meters replace these: messages that are held back are checked against those.
    pub fn mark_replaced(&self) {
        self.replaced.cancel();
    }

    fn bucket(&self, limit: Limit) -> &RateBucket {
        if limit == Limit::BytesPerS { &self.bytes } else { &self.messages }
    }

    fn standing(&self, limit: Limit, setting: LimitSetting, now: Moment) -> QuotaStanding {
        match limit {
            Limit::MessagesPerS | Limit::BytesPerS => {
                let (bucket, rate) = (self.bucket(limit), setting.rate());
                QuotaStanding {
                    burst: setting.burst,
                    left: bucket.left(rate, now),
                    full_in: bucket.full_in(now),
                }
            }
            Limit::Topics => QuotaStanding {
                burst: setting.max,
                left: setting.max.saturating_sub(self.topics.count()),
                full_in: Duration::ZERO,
            },
            _ => QuotaStanding { burst: setting.max, left: 0, full_in: Duration::ZERO },
        }
    }

    fn limit_exceeded(
        &self,
        limit: Limit,
        setting: LimitSetting,
        wait: Duration,
        reserved: bool,
    ) -> LimitExceeded {
        let (owner, replaced) = (self.owner.clone(), self.replaced.clone());
        let standing = self.standing(limit, setting, Moment::now());
        LimitExceeded { limit, setting, owner, wait, standing, reserved, replaced }
    }

    /// Fails if `used` is more than a limit allows that is not a rate.
    fn check(&self, limit: Limit, used: u64) -> Result<(), LimitExceeded> {
        match self.limits.get(limit) {
            Some(setting) if used > setting.max => {
                Err(self.limit_exceeded(limit, setting, Duration::ZERO, false))
            }
            _ => Ok(()),
        }
    }
}

/// The meters that apply to a message of one key in one datasource.
#[derive(Debug, Clone)]
pub struct Quota([Option<Arc<Meters>>; 2]);

impl Quota {
    /// The quota of a key and a datasource; `None` if neither has meters.
    pub fn new(key: Option<Arc<Meters>>, datasource: Option<Arc<Meters>>) -> Option<Self> {
        (key.is_some() || datasource.is_some()).then_some(Self([key, datasource]))
    }

    fn meters(&self) -> impl Iterator<Item = &Meters> {
        self.0.iter().flatten().map(Arc::as_ref)
    }

    /// Checks the size of a payload and the topic, and remembers the topic as seen.
    ///
    /// # Errors
    /// [`LimitExceeded`], for which waiting does not help.
    pub fn check(
        &self,
        datasource: &DatasourceId,
        topic: &str,
        payload_bytes: usize,
    ) -> Result<(), LimitExceeded> {
        for meters in self.meters() {
            meters.check(Limit::PayloadBytes, payload_bytes as u64)?;
        }
        for meters in self.meters() {
            if let Some(setting) = meters.limits.get(Limit::Topics)
                && !meters.topics.try_insert(datasource.as_str(), topic, setting.max)
            {
                return Err(meters.limit_exceeded(Limit::Topics, setting, Duration::ZERO, false));
            }
        }
        Ok(())
    }

    /// Takes messages and their bytes from every rate. Where the policy is to hold back, units that come
    /// within `patience` are reserved for the caller, who has to wait for them.
    ///
    /// # Errors
    /// [`LimitExceeded`]: by the first limit whose wait is over `patience`, and then nothing is taken; or, with
    /// the units reserved, by the limit with the longest wait.
    pub fn take(&self, messages: u64, bytes: u64, patience: Duration) -> Result<(), LimitExceeded> {
        let now = Moment::now();
        let rates = || {
            let units = [(Limit::MessagesPerS, messages), (Limit::BytesPerS, bytes)];
            self.meters().flat_map(move |meters| {
                let set = move |(limit, units)| Some((meters, limit, meters.limits.get(limit)?, units));
                units.into_iter().filter_map(set)
            })
        };
        let mut longest: Option<(&Meters, Limit, LimitSetting, Duration)> = None;
        for (taken, (meters, limit, setting, units)) in rates().enumerate() {
            let patience = if setting.policy == LimitPolicy::HoldBack { patience } else { Duration::ZERO };
            match meters.bucket(limit).take(setting.rate(), units, now, patience) {
                Ok(wait) if wait.is_zero() => {}
                Ok(wait) => {
                    if longest.is_none_or(|(.., longest)| wait > longest) {
                        longest = Some((meters, limit, setting, wait));
                    }
                }
                Err(wait) => {
                    for (meters, limit, setting, units) in rates().take(taken) {
                        meters.bucket(limit).give_back(setting.rate(), units);
                    }
                    return Err(meters.limit_exceeded(limit, setting, wait, false));
                }
            }
        }
        match longest {
            None => Ok(()),
            Some((meters, limit, setting, wait)) => Err(meters.limit_exceeded(limit, setting, wait, true)),
        }
    }

    /// How much of the message rate is used: the key's or the datasource's, whichever has less left.
    pub fn standing(&self) -> Option<QuotaStanding> {
        let now = Moment::now();
        let of = |meters: &Meters| {
            Some(meters.standing(Limit::MessagesPerS, meters.limits.get(Limit::MessagesPerS)?, now))
        };
        self.meters().filter_map(of).min_by_key(|standing| standing.left)
    }

    /// Checks the number of open connections, of the key and of the datasource.
    ///
    /// # Errors
    /// [`LimitExceeded`].
    pub fn check_connections(
        &self,
        of_key: impl Fn() -> usize,
        of_datasource: impl Fn() -> usize,
    ) -> Result<(), LimitExceeded> {
        for meters in self.meters().filter(|meters| meters.limits.get(Limit::Connections).is_some()) {
            let open = if matches!(meters.owner, LimitOwner::Key(_)) { of_key() } else { of_datasource() };
            meters.check(Limit::Connections, open as u64)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const KEY: KeyId = KeyId([7; 6]);

    fn datasource() -> DatasourceId {
        DatasourceId::new("a").expect("a slug")
    }

    fn meters(owner: LimitOwner, value: &Value) -> Option<Arc<Meters>> {
        let limits = QuotaLimits::from_json(value).expect("good limits");
        Some(Arc::new(Meters::new(owner, limits)))
    }

    fn of_key(value: &Value) -> Quota {
        Quota::new(meters(LimitOwner::Key(KEY), value), None).expect("limited")
    }

    #[test]
    fn who_is_not_limited_has_no_quota() {
        assert!(Quota::new(None, None).is_none());
        let quota = Quota::new(None, meters(LimitOwner::Datasource(datasource()), &json!({ "topics": 1 })));
        assert!(quota.expect("limited").standing().is_none(), "it has no rate");
    }

    #[test]
    fn a_refusal_names_the_limit_its_value_the_owner_and_the_wait() {
        let quota = of_key(&json!({ "messages_per_s": { "max": 2, "burst": 1, "policy": "reject" } }));
        quota.take(1, 0, Duration::ZERO).expect("the burst");
        let limited = quota.take(1, 0, Duration::MAX).expect_err("one above");
        let words = limited.to_string();
        assert_eq!(words, "over the limit messages_per_s 2 of API key 070707070707; wait 0.5 s");
        assert!(!limited.is_held_back() && !limited.reserved);
        assert_eq!((limited.standing.burst, limited.standing.left), (1, 0));
    }

    #[test]
    fn what_one_limit_refuses_is_not_taken_from_the_others() {
        let key = meters(LimitOwner::Key(KEY), &json!({ "messages_per_s": 1_000, "bytes_per_s": 1_000_000 }));
        let one = json!({ "messages_per_s": { "max": 1, "policy": "reject" } });
        let quota = Quota::new(key, meters(LimitOwner::Datasource(datasource()), &one)).expect("limited");
        quota.take(1, 10, Duration::ZERO).expect("the burst");
        for _ in 0..2_000 {
            let limited = quota.take(1, 10, Duration::ZERO).expect_err("over");
            assert_eq!(limited.owner, LimitOwner::Datasource(datasource()));
        }
    }

    #[tokio::test]
    async fn who_is_held_back_goes_on_when_it_is_its_turn() {
        let quota = of_key(&json!({ "messages_per_s": { "max": 20, "burst": 1 } }));
        let began = std::time::Instant::now();
        quota.take(1, 0, Duration::ZERO).expect("the burst");
        let patience = Duration::from_secs(30);
        let limited = quota.take(1, 0, patience).expect_err("it has to wait");
        assert!(limited.is_held_back() && limited.reserved);
        assert!(limited.wait_turn(patience).await.expect("its turn comes"));
        assert!(began.elapsed() >= Duration::from_millis(50), "{:?}", began.elapsed());
    }

    #[tokio::test]
    async fn who_would_wait_too_long_is_told_after_the_patience() {
        let quota = of_key(&json!({ "messages_per_s": { "max": 1, "burst": 1 } }));
        quota.take(60, 0, Duration::ZERO).expect("a full bucket lets in more than the burst, and it is owed");
        let patience = Duration::from_millis(50);
        let limited = quota.take(1, 0, patience).expect_err("a minute away");
        let began = std::time::Instant::now();
        let limited = limited.wait_turn(patience).await.expect_err("not within the patience");
        assert!(began.elapsed() >= patience);
        assert!(limited.wait > Duration::from_secs(50), "{:?}", limited.wait);
    }

    #[tokio::test]
    async fn who_is_held_back_asks_again_when_the_limits_change() {
        let meters = meters(LimitOwner::Key(KEY), &json!({ "messages_per_s": 1 })).expect("limited");
        let quota = Quota::new(Some(meters.clone()), None).expect("limited");
        quota.take(60, 0, Duration::ZERO).expect("a full bucket");
        let limited = quota.take(1, 0, Duration::ZERO).expect_err("a minute away");
        meters.mark_replaced();
        assert!(!limited.wait_turn(Duration::MAX).await.expect("the limits have changed"));
    }

    #[test]
    fn limits_that_cannot_be_read_limit_nothing() {
        for text in ["", "{", "{\"speed\": 1}"] {
            assert!(Meters::from_text(LimitOwner::Key(KEY), Some(text)).limits.is_empty(), "{text}");
        }
        assert!(!Meters::from_text(LimitOwner::Key(KEY), Some("{\"topics\": 1}")).limits.is_empty());
    }

    #[test]
    fn payload_topics_and_connections_hold_at_the_limit_and_one_above() {
        let quota = of_key(&json!({ "payload_bytes": 4, "topics": 1, "connections": 2 }));
        quota.check(&datasource(), "t", 4).expect("at the limit");
        let over = |result: Result<(), LimitExceeded>| result.expect_err("one above").limit;
        assert_eq!(over(quota.check(&datasource(), "u", 5)), Limit::PayloadBytes);
        assert_eq!(over(quota.check(&datasource(), "u", 4)), Limit::Topics);
        quota.check_connections(|| 2, || 100).expect("at the limit, and the datasource has none");
        assert_eq!(over(quota.check_connections(|| 3, || 0)), Limit::Connections);
    }

    #[test]
    fn waits_are_told_in_tenths_rounded_up() {
        for (ms, words) in [(0, "0.1 s"), (100, "0.1 s"), (101, "0.2 s"), (400, "0.4 s"), (12_340, "12.4 s")]
        {
            assert_eq!(Seconds(Duration::from_millis(ms)).to_string(), words);
        }
    }
}
