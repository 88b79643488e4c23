//! Which problem each error is.

use std::time::Duration;

use serde_json::json;

use super::Problem;
use crate::auth::{GrantDenial, RegistryError, RejectedKey};
use crate::consume::query::QueryError;
use crate::intake::Refusal;
use crate::limits::RETRY_AFTER;
use crate::log::AppendError;
use crate::memory::MemoryExceeded;
use crate::message::NameError;
use crate::observe::cause::Cause;
use crate::quota::LimitExceeded;
use crate::sqlite::SqliteError;

/// The same words for a stranger, a key of another datasource and a dead key, so that they reveal nothing.
const UNAUTHORIZED_DETAIL: &str = "Send a valid API key of this datasource in a header: \
    'Authorization: Bearer KEY', 'Authorization: KEY' or 'X-API-Key: KEY'.";

impl From<RejectedKey> for Problem {
    fn from(rejected: RejectedKey) -> Self {
        let mut problem = Self::from(rejected.denied);
        (problem.0.note.key_id, problem.0.note.key_shape) = (rejected.key_id, rejected.shape);
        problem
    }
}

impl From<GrantDenial> for Problem {
    fn from(denied: GrantDenial) -> Self {
        let cause = denied.cause();
        let words = denied.to_string();
        let mut problem = match denied {
            GrantDenial::NoKey
            | GrantDenial::Malformed
            | GrantDenial::Unknown
            | GrantDenial::Expired
            | GrantDenial::Revoked => Self::new(cause, UNAUTHORIZED_DETAIL),
            GrantDenial::OtherDatasource { key_id } => {
                Self::new(cause, UNAUTHORIZED_DETAIL).with_key_id(key_id)
            }
            GrantDenial::DamagedToken | GrantDenial::UnknownToken => Self::new(cause, UNAUTHORIZED_DETAIL),
            // It was made here, so that who has it is no stranger.
            GrantDenial::ExpiredToken => Self::new(cause, "The access token has expired: ask for a new one."),
            GrantDenial::TokenTopics { key_id } => {
                Self::new(cause, "The access token is for other topics than this.").with_key_id(key_id)
            }
            GrantDenial::TokenUse { key_id, .. } => {
                Self::new(cause, format!("{}.", sentence(&words))).with_key_id(key_id)
            }
            // These words may be specific: they follow from the request alone and reveal nothing about a key.
            GrantDenial::Ambiguous => {
                Self::new(cause, "The request carries two different API keys. Send one, in one header.")
            }
            GrantDenial::MissingScope { key_id, scope } => {
                let name = json!(scope);
                let words = format!("API key {key_id} lacks the scope {name}.");
                Self::new(cause, words).with("scope", name).with_key_id(key_id)
            }
            GrantDenial::TooManyFailures { retry_after } => {
                Self::new(cause, format!("{words}.")).with_retry_after(retry_after)
            }
        };
        // For logs and metrics only; the client is not told.
        problem.0.note.words = words;
        problem
    }
}

/// Words with a capital letter at their beginning.
fn sentence(words: &str) -> String {
    let (first, rest) = words.split_at(words.chars().next().map_or(0, char::len_utf8));
    first.to_uppercase() + rest
}

impl From<Refusal> for Problem {
    fn from(refusal: Refusal) -> Self {
        let (cause, words, retry_after) = (refusal.cause(), refusal.to_string(), refusal.retry_after());
        let problem = match refusal {
            Refusal::Denied(denied) => denied.into(),
            Refusal::Asked(asked) => return asked.refusal.into(),
            Refusal::Limited(limited) => Self::limited(cause, limited, &words),
            Refusal::TooLarge { bytes_max, .. } => Self::new(cause, words).with("limit", bytes_max),
            Refusal::Quarantined(quarantined) => {
                Self::new(cause, words).with("pointer", quarantined.reason.pointer.into_owned())
            }
            Refusal::Busy { in_flight_bytes_max, .. } => {
                Self::new(cause, words).with("limit", in_flight_bytes_max)
            }
            Refusal::Memory(exceeded) => (*exceeded).into(),
            Refusal::Log(AppendError::Budget { retention_bytes }) => {
                Self::new(cause, words).with("limit", retention_bytes)
            }
            _ => Self::new(cause, words),
        };
        match retry_after {
            Some(after) => problem.with_retry_after(after),
            None => problem,
        }
    }
}

impl From<MemoryExceeded> for Problem {
    fn from(exceeded: MemoryExceeded) -> Self {
        let problem = Self::new(exceeded.cause(), format!("This request cannot be held: {exceeded}."))
            .with("limit", exceeded.bytes_max);
        if exceeded.is_too_large { problem } else { problem.with_retry_after(RETRY_AFTER) }
    }
}

impl Problem {
    /// The problem for an exceeded limit of a key or datasource.
    fn limited(cause: Cause, limited: Box<LimitExceeded>, words: &str) -> Self {
        let mut problem = Self::new(cause, format!("This is {words}."))
            .with("limit", limited.setting.max)
            .with("limit_name", limited.limit.name())
            .with("limit_of", limited.owner.to_string());
        problem.0.note.limited = Some(limited);
        problem
    }
}

impl From<RegistryError> for Problem {
    fn from(error: RegistryError) -> Self {
        let words = error.to_string();
        let cause = match error {
            RegistryError::Exists(_) | RegistryError::KeyExists { .. } => Cause::Conflict,
            RegistryError::Rotation(_) => Cause::Rotation,
            RegistryError::LastAdmin => Cause::LastAdminKey,
            RegistryError::Denied(denied) => return denied.into(),
            RegistryError::NoDatasource(_) => Cause::NotFound,
            RegistryError::InvalidName(_) => Cause::Malformed,
            RegistryError::NoSlug(_) => Cause::NotPossible,
            RegistryError::TooLarge(_) => Cause::TooLarge,
            RegistryError::Away(_) => Cause::ClusterAway,
            RegistryError::Overtaken | RegistryError::UnreadRules(_) | RegistryError::NotReplaced { .. } => {
                Cause::Unavailable
            }
            _ => {
                tracing::error!(error = words, "the registry could not be changed");
                let words = "The registry cannot be written; nothing was changed.";
                return Self::new(Cause::Unavailable, words);
            }
        };
        Self::new(cause, words)
    }
}

/// When to come again if PostgreSQL is away.
const STORE_AWAY_RETRY_AFTER: Duration = Duration::from_secs(5);

impl From<QueryError> for Problem {
    fn from(error: QueryError) -> Self {
        match error {
            QueryError::Filter(_) => Self::new(Cause::Malformed, error.to_string()),
            QueryError::PostgresAway => {
                let words = "The stored records are in PostgreSQL, which does not answer now. Messages are let in as \
                             ever, and are stored once it is back: see /readyz.";
                Self::new(Cause::StoreAway, words).with_retry_after(STORE_AWAY_RETRY_AFTER)
            }
            QueryError::PostgresBusy => {
                Self::new(Cause::StoreBusy, "All connections to PostgreSQL are in use by other reads.")
            }
            QueryError::Postgres(ref fault) if fault.is_canceled() => {
                let words = "PostgreSQL has not answered within the time that a read has.";
                Self::new(Cause::StoreBusy, words)
            }
            QueryError::Database(SqliteError::Unmade { .. }) => {
                Self::new(Cause::Unavailable, "records.db is only being made: ask again, or see /readyz.")
            }
            QueryError::Database(_) | QueryError::Postgres(_) | QueryError::PostgresUnfit(_) => {
                tracing::error!(%error, "a query of stored records failed");
                Self::new(Cause::Unavailable, "The stored records cannot be read now: see /readyz.")
            }
        }
    }
}

impl From<NameError> for Problem {
    fn from(error: NameError) -> Self {
        Self::new(Cause::Malformed, error.to_string())
    }
}
