//! Keys and access tokens: the registry, its audit, leak reports, failed authentications.

/// A presented key or access token before anything looks at it; a real key has 53 characters.
pub const PRESENTED_KEY_BYTES_MAX: usize = 1_024;
/// How long an access token is good for if the request says nothing, in seconds.
pub const TOKEN_TTL_DEFAULT_S: u64 = 3_600;
/// The longest time that an access token is good for, in seconds.
pub const TOKEN_TTL_S_MAX: u64 = 24 * 3_600;
/// Topic filters of an access token.
pub const TOKEN_TOPICS_MAX: usize = 16;
/// What these may have in all, in bytes: the token carries them.
pub const TOKEN_TOPICS_BYTES_MAX: usize = 512;
/// The latest users of a key that its list shows.
pub const USERS_PER_KEY_MAX: usize = 8;
/// Keys whose usage is written in one transaction; other changes of the registry wait for it.
pub const USAGE_KEYS_PER_CHANGE: usize = 1_000;
/// Key ids that an entry of the audit names.
pub const AUDIT_KEY_IDS_MAX: usize = 1_000;
/// Ended keys that are written in one transaction; other changes of the registry wait for it. Each can be two rows,
/// the key's and its audit entry, and in a cluster a change is all or nothing up to 1,000 rows.
pub const KEY_ENDS_PER_CHANGE: usize = 500;
/// Room on the disk that is kept for the ends of keys: some fifty revocations on a disk that stays full.
pub const REGISTRY_RESERVE_BYTES: u64 = 1 << 20;
/// The part of it that is given up at a time, so that others cannot take all of it at once.
pub const REGISTRY_RESERVE_STEP_BYTES: u64 = 256 << 10;
/// Keys whose usage is read or written in the cluster's bucket concurrently.
pub const USAGE_READS_MAX: usize = 64;
/// The grace of a rotated key if the request gives none, in seconds.
pub const GRACE_DEFAULT_S: u64 = 24 * 3_600;
/// The longest grace of a rotated key, in seconds.
pub const GRACE_S_MAX: u64 = 366 * 24 * 3_600;
/// Audit entries on one page, at most.
pub const AUDIT_ENTRIES_MAX: usize = 10_000;
/// Audit entries that are read at a time.
pub const AUDIT_ENTRIES_PER_READ: usize = 500;
/// Audit entries on a page if the request gives no limit.
pub const AUDIT_ENTRIES_DEFAULT: usize = 100;
/// Secrets that the gateway checks in one leak report.
pub const LEAKS_PER_REPORT_MAX: usize = 100;
/// The part of a leak report's URL that the audit stores.
pub const LEAK_URL_BYTES_MAX: usize = 500;
/// Leak reports that may come from one address at once.
pub const LEAK_REPORTS_BURST: u64 = 20;
/// How many a second after that.
pub const LEAK_REPORTS_PER_S: u64 = 1;
/// Default: failed authentications that an address may have at once.
pub const AUTH_FAILURES_BURST: u64 = 100;
/// Default: failed authentications forgotten per second.
pub const AUTH_FAILURES_PER_S: u64 = 1;
/// Counters of failed authentications, 8 bytes each; addresses share them by hash.
pub const AUTH_FAILURES_COUNTERS: usize = 1 << 16;
