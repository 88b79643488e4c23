//! Managing keys: create, list, rotate, revoke; those of one datasource or, as `*`, those for all
//! datasources. A key's secret is in the answer that creates it and nowhere else.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::connect::Connect;
use super::credentials::Caller;
use super::problem::{Kind, Problem};
use super::{InPath, Shared, limits, off_the_runtime};
use crate::auth::usage::{Used, User};
use crate::auth::{ApiKey, Key, Scope, Scopes};
use crate::limits::{GRACE_DEFAULT_S, GRACE_S_MAX, USAGE_KEYS_PER_CHANGE};
use crate::message::{DatasourceId, KeyId, Offset, now_micros};
use crate::quota::Limits;
use crate::time::{Rfc3339, parse_time};

/// The body of a request that creates a key.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Create {
    #[serde(default)]
    label: String,
    scopes: Option<Scopes>,
    expires_at: Option<String>,
    #[serde(default)]
    limits: Value,
}

/// The answer to creating a key.
#[derive(Serialize)]
struct Created<'a> {
    key: NewKey<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    connect: Option<Connect>,
}

/// The answer to listing keys.
#[derive(Serialize)]
struct List<'a> {
    keys: Vec<Listed<'a>>,
}

/// The state of a key.
#[derive(Serialize)]
#[serde(rename_all = "lowercase")]
enum Standing {
    /// Valid until it expires, if it ever does.
    Active,
    /// Valid until its grace ends; then another key takes its place.
    Rotating,
    /// Past its expiry.
    Expired,
}

/// A key, as the API shows it.
#[derive(Serialize)]
pub(super) struct View<'a> {
    id: KeyId,
    label: &'a str,
    scopes: Scopes,
    state: Standing,
    created_at: Rfc3339,
    expires_at: Option<Rfc3339>,
    /// The key that it replaces.
    #[serde(skip_serializing_if = "Option::is_none")]
    replaces: Option<KeyId>,
    /// The key that replaces it.
    #[serde(skip_serializing_if = "Option::is_none")]
    replaced_by: Option<KeyId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    grace_ends_at: Option<Rfc3339>,
    /// The limits of the key itself, without those of its datasource.
    limits: Limits,
}

impl<'a> View<'a> {
    pub(super) fn of(key: &'a Key) -> Self {
        let rotation = key.rotation();
        let (replaced_by, grace_ends_at) = rotation.replaced_by.unzip();
        Self {
            id: key.id,
            label: &key.label,
            scopes: key.scopes,
            state: match replaced_by {
                _ if key.has_expired() => Standing::Expired,
                Some(_) => Standing::Rotating,
                None => Standing::Active,
            },
            created_at: Rfc3339(key.created_at),
            expires_at: key.expires_at().map(Rfc3339),
            replaces: rotation.replaces,
            replaced_by,
            grace_ends_at: grace_ends_at.map(Rfc3339),
            limits: limits::shown(&key.limits),
        }
    }
}

/// A key and its use, as the list shows it.
#[derive(Serialize)]
struct Listed<'a> {
    #[serde(flatten)]
    key: View<'a>,
    accepted: u64,
    refused: u64,
    /// Open connections at this moment.
    connections: usize,
    last_used: Option<LastUsed<'a>>,
    users: &'a [User],
}

/// When a key was last used: the newest of its users, and the newest record under it.
#[derive(Serialize)]
struct LastUsed<'a> {
    #[serde(flatten)]
    by: &'a User,
    offset: Option<Offset>,
}

impl<'a> Listed<'a> {
    fn of(key: &'a Key, used: &'a Used) -> Self {
        Self {
            key: View::of(key),
            accepted: used.accepted,
            refused: used.refused,
            connections: key.connected(),
            last_used: used.users.first().map(|by| LastUsed { by, offset: used.offset }),
            users: &used.users,
        }
    }
}

/// The body of a request that rotates a key.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Rotate {
    grace_seconds: Option<u64>,
    #[serde(default)]
    undo: bool,
}

/// The answer to rotating a key.
#[derive(Serialize)]
struct Rotated<'a> {
    key: NewKey<'a>,
    replaced: Replaced,
    #[serde(skip_serializing_if = "Option::is_none")]
    connect: Option<Connect>,
}

/// The key that was replaced.
#[derive(Serialize)]
struct Replaced {
    id: KeyId,
    grace_ends_at: Rfc3339,
}

/// The answer to undoing a rotation.
#[derive(Serialize)]
struct Undone<'a> {
    key: View<'a>,
    revoked: Option<KeyId>,
}

/// A new key with its secret, which is shown only this once.
#[derive(Serialize)]
pub(super) struct NewKey<'a> {
    #[serde(flatten)]
    key: View<'a>,
    secret: &'a str,
}

impl<'a> NewKey<'a> {
    pub(super) fn of(key: &'a Key, secret: &'a ApiKey) -> Self {
        Self { key: View::of(key), secret: secret.expose() }
    }
}

/// `POST /v1/datasources/{datasource}/keys`
pub(super) async fn create(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    InPath(datasource): InPath<String>,
    headers: HeaderMap,
    request: Request,
) -> Result<Response, Problem> {
    caller.may(Scope::Admin, &datasource)?;
    let datasource = owner(&shared, &datasource)?;
    let Create { label, scopes, expires_at, limits } = shared.read_json(request).await?;
    let limits = limits::parse(&limits).map_err(Problem::body_read)?;
    let expires_at = match expires_at {
        None => None,
        Some(text) => {
            let time = parse_time(&text).filter(|&time| time > now_micros());
            Some(time.ok_or_else(|| {
                let words = "expires_at has to be a future RFC 3339 time such as 2027-01-31T12:00:00Z.";
                Problem::new(Kind::Malformed, words).with("pointer", "/expires_at").body_read()
            })?)
        }
    };
    let scopes = scopes.unwrap_or(Scopes::of(&[Scope::Ingest]));
    let registry = shared.registry().clone();
    let owner = datasource.clone();
    let actor = caller.actor();
    let created = off_the_runtime(move || {
        let created = registry.create_key(&actor, &owner, &label, scopes, expires_at)?;
        // The secret is not given out yet, so nobody can have used the key without its limits.
        if !limits.is_empty() {
            registry.set_key_limits(&actor, &owner, created.0.id, limits.text())?;
        }
        Ok(created)
    });
    let created = created.await;
    let (key, secret) = created.map_err(Problem::body_read)?;
    // A key for all datasources has no single datasource to connect to.
    let connect = (!datasource.is_all()).then(|| Connect::new(&datasource, scopes, &shared.parts, &headers));
    let body = Created { key: NewKey::of(&key, &secret), connect };
    Ok((StatusCode::CREATED, Json(body)).into_response())
}

/// `GET /v1/datasources/{datasource}/keys`
pub(super) async fn list(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    InPath(datasource): InPath<String>,
) -> Result<Response, Problem> {
    caller.may(Scope::Admin, &datasource)?;
    let owner = owner(&shared, &datasource)?;
    let listed = off_the_runtime(move || {
        let keys = shared.registry().keys(&owner);
        let mut used = Vec::with_capacity(keys.len());
        // Changes of the registry wait during each read, so usage is read in small chunks.
        for some in keys.chunks(USAGE_KEYS_PER_CHANGE) {
            used.extend(shared.registry().usage(some)?);
        }
        let keys = keys.iter().zip(&used).map(|(key, used)| Listed::of(key, used)).collect();
        Ok(Json(List { keys }).into_response())
    });
    listed.await
}

/// `POST /v1/datasources/{datasource}/keys/{key_id}/rotate`: replaces the key by a new one, or with `undo`
/// takes that back.
pub(super) async fn rotate(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    InPath((datasource, key_id)): InPath<(String, String)>,
    headers: HeaderMap,
    request: Request,
) -> Result<Response, Problem> {
    let called = Instant::now();
    caller.may(Scope::Admin, &datasource)?;
    let owner = owner(&shared, &datasource)?;
    let key_id = KeyId::parse(&key_id)?;
    let Rotate { grace_seconds, undo } = shared.read_json(request).await?;
    let grace_seconds = match grace_seconds {
        Some(_) if undo => {
            let words = "grace_seconds cannot be given together with undo.";
            return Err(Problem::new(Kind::Malformed, words).with("pointer", "/grace_seconds").body_read());
        }
        Some(seconds) if seconds > GRACE_S_MAX => {
            let words = format!("grace_seconds is {seconds}: it has to be {GRACE_S_MAX} at most.");
            let problem = Problem::new(Kind::Malformed, words).with("limit", GRACE_S_MAX);
            return Err(problem.with("pointer", "/grace_seconds").body_read());
        }
        seconds => seconds.unwrap_or(GRACE_DEFAULT_S),
    };
    let (registry, actor) = (shared.registry().clone(), caller.actor());
    let of = owner.clone();
    if undo {
        let undone = off_the_runtime(move || Ok(registry.undo_rotation(&actor, &of, key_id)?)).await;
        let undone = undone.map_err(Problem::body_read)?.ok_or_else(|| no_key(key_id).body_read())?;
        let dead: Vec<_> = undone.dead.into_iter().collect();
        shared.settle(&caller, &dead, called).await;
        let body = Undone { key: View::of(&undone.key), revoked: dead.first().map(|key| key.id) };
        return Ok(Json(body).into_response());
    }
    let grace = Duration::from_secs(grace_seconds);
    let rotated = off_the_runtime(move || Ok(registry.rotate_key(&actor, &of, key_id, grace)?)).await;
    let rotated = rotated.map_err(Problem::body_read)?.ok_or_else(|| no_key(key_id).body_read())?;
    if let Some(dead) = rotated.dead {
        shared.settle(&caller, &[dead], called).await;
    }
    let scopes = rotated.key.scopes;
    let body = Rotated {
        key: NewKey::of(&rotated.key, &rotated.secret),
        replaced: Replaced { id: key_id, grace_ends_at: Rfc3339(rotated.grace_ends_at) },
        connect: (!owner.is_all()).then(|| Connect::new(&owner, scopes, &shared.parts, &headers)),
    };
    Ok((StatusCode::CREATED, Json(body)).into_response())
}

/// `DELETE /v1/datasources/{datasource}/keys/{key_id}`: answers once the key is dead and nothing more can
/// come in under it.
pub(super) async fn revoke(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    InPath((datasource, key_id)): InPath<(String, String)>,
) -> Result<StatusCode, Problem> {
    let called = Instant::now();
    caller.may(Scope::Admin, &datasource)?;
    let datasource = owner(&shared, &datasource)?;
    let key_id = KeyId::parse(&key_id)?;
    let (registry, actor) = (shared.registry().clone(), caller.actor());
    let dead = off_the_runtime(move || Ok(registry.revoke_key(&actor, &datasource, key_id)?)).await?;
    let dead = dead.ok_or_else(|| no_key(key_id))?;
    shared.settle(&caller, &[dead], called).await;
    Ok(StatusCode::NO_CONTENT)
}

fn no_key(key_id: KeyId) -> Problem {
    Problem::new(Kind::NotFound, format!("There is no key {key_id} here.")).cause("no_key_id")
}

/// The owner of the keys that a path names: an existing datasource, or all of them (`*`).
pub(super) fn owner(shared: &Shared, datasource: &str) -> Result<DatasourceId, Problem> {
    let all = DatasourceId::all();
    if datasource == all.as_str() { Ok(all) } else { Ok(shared.datasource(datasource)?.id.clone()) }
}
