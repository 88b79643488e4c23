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

use super::charged_list::ChargedList;
use super::connect::ConnectLines;
use super::credentials::Caller;
use super::members::stated;
use super::{HttpFrontState, PathParameters, limits, run_blocking, run_in_turn};
use crate::auth::usage::{KeyClientUse, KeyUsage};
use crate::auth::{ApiKey, Key, NewKey, RegistryError, Scope, Scopes};
use crate::front::problem::Problem;
use crate::limits::{GRACE_DEFAULT_S, GRACE_S_MAX, USAGE_KEYS_PER_CHANGE};
use crate::message::{DatasourceId, KeyId, Offset};
use crate::observe::cause::Cause;
use crate::quota::QuotaLimits;
use crate::time::{Rfc3339, cluster_micros, parse_time};
use crate::whole_number::WholeNumber;

/// The body of a request that creates a key.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct CreateKeyRequest {
    #[serde(default)]
    label: String,
    #[serde(default, deserialize_with = "stated")]
    scopes: Option<Scopes>,
    expires_at: Option<String>,
    #[serde(default)]
    limits: Value,
}

/// The answer to creating a key.
#[derive(Serialize)]
struct CreateKeyResponse<'a> {
    key: NewKeyView<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    connect: Option<ConnectLines>,
}

/// The state of a key.
#[derive(Serialize)]
#[serde(rename_all = "lowercase")]
enum KeyState {
    /// Valid until it expires, if it ever does.
    Active,
    /// Valid until its grace ends; then another key takes its place.
    Rotating,
    /// Past its expiry.
    Expired,
}

/// A key, as the API shows it.
#[derive(Serialize)]
pub(super) struct KeyView<'a> {
    id: KeyId,
    label: &'a str,
    scopes: Scopes,
    state: KeyState,
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
    limits: QuotaLimits,
}

impl<'a> KeyView<'a> {
    pub(super) fn new(key: &'a Key) -> Self {
        let rotation = key.rotation();
        let (replaced_by, grace_ends_at) = rotation.replaced_by.unzip();
        Self {
            id: key.id,
            label: &key.label,
            scopes: key.scopes,
            state: match replaced_by {
                _ if key.has_expired() => KeyState::Expired,
                Some(_) => KeyState::Rotating,
                None => KeyState::Active,
            },
            created_at: Rfc3339(key.created_at),
            expires_at: key.expires_at().map(Rfc3339),
            replaces: rotation.replaces,
            replaced_by,
            grace_ends_at: grace_ends_at.map(Rfc3339),
            limits: limits::current_limits(&key.limits),
        }
    }
}

/// A key and its use, as the list shows it.
#[derive(Serialize)]
struct KeyUsageView<'a> {
    #[serde(flatten)]
    key: KeyView<'a>,
    accepted: u64,
    refused: u64,
    /// Open connections at this moment.
    connections: usize,
    last_used: Option<KeyLastUse<'a>>,
    users: &'a [KeyClientUse],
}

/// When a key was last used: the newest of its users, and the newest record under it.
#[derive(Serialize)]
struct KeyLastUse<'a> {
    #[serde(flatten)]
    by: &'a KeyClientUse,
    offset: Option<Offset>,
}

impl<'a> KeyUsageView<'a> {
    fn new(key: &'a Key, used: &'a KeyUsage) -> Self {
        Self {
            key: KeyView::new(key),
            accepted: used.accepted,
            refused: used.refused,
            connections: key.connection_count(),
            last_used: used.users.first().map(|by| KeyLastUse { by, offset: used.offset }),
            users: &used.users,
        }
    }
}

/// The body of a request that rotates a key.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RotateKeyRequest {
    #[serde(default, deserialize_with = "stated")]
    grace_seconds: Option<WholeNumber>,
    #[serde(default)]
    undo: bool,
}

impl RotateKeyRequest {
    /// How long the old key stays valid.
    fn grace(&self) -> Result<Duration, Problem> {
        let WholeNumber(seconds) = self.grace_seconds.unwrap_or(WholeNumber(GRACE_DEFAULT_S));
        let problem = if self.undo && self.grace_seconds.is_some() {
            let words = "grace_seconds cannot be given together with undo.";
            Problem::new(Cause::Malformed, words)
        } else if seconds > GRACE_S_MAX {
            let words = format!("grace_seconds is {seconds}: it has to be {GRACE_S_MAX} at most.");
            Problem::new(Cause::Malformed, words).with("limit", GRACE_S_MAX)
        } else {
            return Ok(Duration::from_secs(seconds));
        };
        Err(problem.with("pointer", "/grace_seconds"))
    }
}

/// The answer to rotating a key.
#[derive(Serialize)]
struct RotateKeyResponse<'a> {
    key: NewKeyView<'a>,
    replaced: ReplacedKeyView,
    #[serde(skip_serializing_if = "Option::is_none")]
    connect: Option<ConnectLines>,
}

/// The key that was replaced.
#[derive(Serialize)]
struct ReplacedKeyView {
    id: KeyId,
    grace_ends_at: Rfc3339,
}

/// The answer to undoing a rotation.
#[derive(Serialize)]
struct UndoRotationResponse<'a> {
    key: KeyView<'a>,
    revoked: Option<KeyId>,
}

/// The answer to a call that has ended keys, as long as that is not durable.
#[derive(Serialize)]
struct UndurableEndResponse<'a> {
    revoked: bool,
    durable: bool,
    detail: &'a str,
}

/// A new key with its secret, which is shown only this once.
#[derive(Serialize)]
pub(super) struct NewKeyView<'a> {
    #[serde(flatten)]
    key: KeyView<'a>,
    secret: &'a str,
}

impl<'a> NewKeyView<'a> {
    pub(super) fn new(key: &'a Key, secret: &'a ApiKey) -> Self {
        Self { key: KeyView::new(key), secret: secret.expose() }
    }
}

/// `POST /v1/datasources/{datasource}/keys`
pub(super) async fn create(
    State(shared): State<Arc<HttpFrontState>>,
    caller: Caller,
    PathParameters(datasource): PathParameters<String>,
    headers: HeaderMap,
    request: Request,
) -> Result<Response, Problem> {
    caller.require_scope(Scope::Admin, &datasource)?;
    let datasource = key_owner(&shared, &datasource)?;
    let CreateKeyRequest { label, scopes, expires_at, limits } = shared.read_json(request).await?;
    let limits = limits::parse(&limits).and_then(limits::of_key).map_err(Problem::after_body_read)?;
    let expires_at = match expires_at {
        None => None,
        Some(text) => {
            let refused = |cause| {
                let words = "expires_at has to be a future RFC 3339 time such as 2027-01-31T12:00:00Z.";
                Problem::new(cause, words).with("pointer", "/expires_at").after_body_read()
            };
            let time = parse_time(&text).ok_or_else(|| refused(Cause::Malformed))?;
            if time <= cluster_micros() {
                return Err(refused(Cause::NotPossible));
            }
            Some(time)
        }
    };
    let scopes = scopes.unwrap_or(Scopes::from_slice(&[Scope::Ingest]));
    let registry = shared.clone();
    let owner = datasource.clone();
    let actor = caller.actor();
    let created = run_blocking(move || {
        let limits = limits.text();
        let (label, limits) = (label.as_str(), limits.as_deref());
        let new = NewKey { datasource: &owner, label, scopes, expires_at, limits };
        // Of two concurrent requests, one is counted before the other.
        let _one_at_a_time = registry.limiting.lock();
        registry.check_key_count(&owner, 1)?;
        Ok(registry.registry().create_key_with(&actor, &new)?)
    });
    let created = created.await;
    let (key, secret) = created.map_err(Problem::after_body_read)?;
    // A key for all datasources has no single datasource to connect to.
    let lines = || ConnectLines::new(&datasource, scopes, &shared.parts, &headers, caller.1.is_https);
    let connect = (!datasource.is_all()).then(lines);
    let body = CreateKeyResponse { key: NewKeyView::new(&key, &secret), connect };
    Ok((StatusCode::CREATED, Json(body)).into_response())
}

/// `GET /v1/datasources/{datasource}/keys`
pub(super) async fn list(
    State(shared): State<Arc<HttpFrontState>>,
    caller: Caller,
    PathParameters(datasource): PathParameters<String>,
) -> Result<Response, Problem> {
    caller.require_scope(Scope::Admin, &datasource)?;
    let owner = key_owner(&shared, &datasource)?;
    let turns = shared.clone();
    let account = shared.parts.intake.memory_account(&caller.0);
    let listed = run_in_turn(&turns, &caller, move || {
        let mut list = ChargedList::json(&account, "{\"keys\":[")?;
        let keys = shared.registry().keys(&owner);
        // Changes of the registry wait during each read, so usage is read in small chunks.
        for some in keys.chunks(USAGE_KEYS_PER_CHANGE) {
            let used = shared.registry().usage(some)?;
            some.iter().zip(&used).try_for_each(|(key, used)| list.push(&KeyUsageView::new(key, used)))?;
        }
        Ok(list.finish("]}"))
    });
    listed.await
}

/// `POST /v1/datasources/{datasource}/keys/{key_id}/rotate`: replaces the key by a new one, or with `undo`
/// takes that back.
pub(super) async fn rotate(
    State(shared): State<Arc<HttpFrontState>>,
    caller: Caller,
    PathParameters((datasource, key_id)): PathParameters<(String, String)>,
    headers: HeaderMap,
    request: Request,
) -> Result<Response, Problem> {
    let called = Instant::now();
    caller.require_scope(Scope::Admin, &datasource)?;
    let owner = key_owner(&shared, &datasource)?;
    let key_id = KeyId::parse(&key_id)?;
    let asked: RotateKeyRequest = shared.read_json(request).await?;
    let grace = asked.grace().map_err(Problem::after_body_read)?;
    let (registry, actor) = (shared.registry().clone(), caller.actor());
    let of = owner.clone();
    if asked.undo {
        let undone = run_blocking(move || Ok(registry.undo_rotation(&actor, &of, key_id)?)).await;
        let undone = undone
            .map_err(Problem::after_body_read)?
            .ok_or_else(|| no_key_problem(key_id).after_body_read())?;
        let dead: Vec<_> = undone.dead.into_iter().collect();
        shared.settle(&caller, &dead, called).await;
        let body =
            UndoRotationResponse { key: KeyView::new(&undone.key), revoked: dead.first().map(|key| key.id) };
        return Ok(Json(body).into_response());
    }
    // A rotation is not refused for a key that is there: what is allowed beside is for the old ones' grace.
    shared.check_key_count(&of, 2).map_err(Problem::after_body_read)?;
    let rotated = run_blocking(move || Ok(registry.rotate_key(&actor, &of, key_id, grace))).await;
    let rotated = match rotated.map_err(Problem::after_body_read)? {
        Err(RegistryError::NotReplaced { dead, why }) => {
            shared.settle(&caller, std::slice::from_ref(&dead), called).await;
            let unwritten = shared.registry().describe_unwritten(&owner, Some(key_id));
            let error = RegistryError::NotReplaced { dead, why };
            let words = match unwritten {
                Some(detail) => format!("{error}. Its end is {detail}."),
                None => format!("{error}."),
            };
            return Err(Problem::new(Cause::Unavailable, words).after_body_read());
        }
        rotated => rotated.map_err(|error| Problem::from(error).after_body_read())?,
    };
    let rotated = rotated.ok_or_else(|| no_key_problem(key_id).after_body_read())?;
    if let Some(dead) = rotated.dead {
        shared.settle(&caller, &[dead], called).await;
    }
    let scopes = rotated.key.scopes;
    let lines = || ConnectLines::new(&owner, scopes, &shared.parts, &headers, caller.1.is_https);
    let body = RotateKeyResponse {
        key: NewKeyView::new(&rotated.key, &rotated.secret),
        replaced: ReplacedKeyView { id: key_id, grace_ends_at: Rfc3339(rotated.grace_ends_at) },
        connect: (!owner.is_all()).then(lines),
    };
    Ok((StatusCode::CREATED, Json(body)).into_response())
}

/// `DELETE /v1/datasources/{datasource}/keys/{key_id}`: answers once the key is dead and nothing more can
/// come in under it; with 202 as long as that is not durable.
pub(super) async fn revoke(
    State(shared): State<Arc<HttpFrontState>>,
    caller: Caller,
    PathParameters((datasource, key_id)): PathParameters<(String, String)>,
) -> Result<Response, Problem> {
    let called = Instant::now();
    caller.require_scope(Scope::Admin, &datasource)?;
    let owner = key_owner(&shared, &datasource)?;
    let key_id = KeyId::parse(&key_id)?;
    let (registry, actor, of) = (shared.registry().clone(), caller.actor(), owner.clone());
    let dead = run_blocking(move || Ok(registry.revoke_key(&actor, &of, key_id)?)).await?;
    if let Some(dead) = &dead {
        shared.settle(&caller, std::slice::from_ref(dead), called).await;
    }
    match (shared.registry().describe_unwritten(&owner, Some(key_id)), dead) {
        (Some(detail), _) => Ok(undurable_answer(&format!("The end of key {key_id} is {detail}."))),
        (None, Some(_)) => Ok(StatusCode::NO_CONTENT.into_response()),
        (None, None) => Err(no_key_problem(key_id)),
    }
}

/// The answer to a call that has ended keys when that could not be made durable: it is tried again.
pub(super) fn undurable_answer(detail: &str) -> Response {
    let body = UndurableEndResponse { revoked: true, durable: false, detail };
    (StatusCode::ACCEPTED, Json(body)).into_response()
}

pub(super) fn no_key_problem(key_id: KeyId) -> Problem {
    Problem::new(Cause::NoKeyId, format!("There is no key {key_id} here."))
}

/// The owner of the keys that a path names: an existing datasource, or all of them (`*`).
pub(super) fn key_owner(shared: &HttpFrontState, datasource: &str) -> Result<DatasourceId, Problem> {
    let all = DatasourceId::all();
    if datasource == all.as_str() { Ok(all) } else { Ok(shared.datasource(datasource)?.id.clone()) }
}
