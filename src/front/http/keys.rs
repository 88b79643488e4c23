//! Managing keys: create, list, revoke, for one datasource or, as `*`, for those of all of them. A
//! key's secret is in the answer that creates it and nowhere else.

use std::sync::{Arc, PoisonError};

use axum::Json;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};

use super::connect::Connect;
use super::credentials::Caller;
use super::problem::{Kind, Problem};
use super::{InPath, Shared, off_the_runtime};
use crate::auth::{ApiKey, Key, Registry, Scope, Scopes};
use crate::consume::render::{Rfc3339, parse_time};
use crate::message::{DatasourceId, KeyId, now_micros};

/// What creating a key takes.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Create {
    #[serde(default)]
    label: String,
    scopes: Option<Scopes>,
    expires_at: Option<String>,
}

/// What creating a key answers.
#[derive(Serialize)]
struct Created<'a> {
    key: NewKey<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    connect: Option<Connect>,
}

/// What listing keys answers.
#[derive(Serialize)]
struct List<'a> {
    keys: Vec<View<'a>>,
}

/// A key, as the API shows it.
#[derive(Serialize)]
struct View<'a> {
    id: KeyId,
    label: &'a str,
    scopes: Scopes,
    created_at: Rfc3339,
    expires_at: Option<Rfc3339>,
}

impl<'a> View<'a> {
    fn of(key: &'a Key) -> Self {
        Self {
            id: key.id,
            label: &key.label,
            scopes: key.scopes,
            created_at: Rfc3339(key.created_at),
            expires_at: key.expires_at.map(Rfc3339),
        }
    }
}

/// A key that was just created: the one time that its secret is shown.
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
    let Create { label, scopes, expires_at } = shared.read_json(request).await?;
    let expires_at = match expires_at {
        None => None,
        Some(text) => {
            let time = parse_time(&text).filter(|&time| time > now_micros());
            Some(time.ok_or_else(|| {
                let words = "A key expires at a time to come, as RFC 3339 has it: 2027-01-31T12:00:00Z.";
                Problem::new(Kind::Malformed, words).with("pointer", "/expires_at").body_read()
            })?)
        }
    };
    let scopes = scopes.unwrap_or(Scopes::of(&[Scope::Ingest]));
    let registry = shared.registry().clone();
    let owner = datasource.clone();
    let created = off_the_runtime(move || Ok(registry.create_key(&owner, &label, scopes, expires_at)?)).await;
    let (key, secret) = created.map_err(Problem::body_read)?;
    // A key for all datasources has no one place to connect to.
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
    let keys = shared.registry().keys(&owner(&shared, &datasource)?);
    let keys = keys.iter().map(|key| View::of(key)).collect();
    Ok(Json(List { keys }).into_response())
}

/// `DELETE /v1/datasources/{datasource}/keys/{key_id}`: answers when the key is dead and nothing more
/// can come in under it.
pub(super) async fn revoke(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    InPath((datasource, key_id)): InPath<(String, String)>,
) -> Result<StatusCode, Problem> {
    caller.may(Scope::Admin, &datasource)?;
    let datasource = owner(&shared, &datasource)?;
    let key_id = KeyId::parse(&key_id)?;
    let for_change = shared.clone();
    let dead = off_the_runtime(move || {
        let _one_at_a_time = for_change.revoking.lock().unwrap_or_else(PoisonError::into_inner);
        let registry = for_change.registry();
        if datasource.is_all() && is_last_admin(registry, key_id) {
            let words = "This is the last admin key for all datasources; create another one first.";
            return Err(Problem::new(Kind::Conflict, words).cause("last_admin_key"));
        }
        Ok(registry.revoke_key(&datasource, key_id)?)
    });
    match dead.await? {
        Some(key) => {
            shared.parts.intake.settle(&[key]).await;
            Ok(StatusCode::NO_CONTENT)
        }
        None => {
            Err(Problem::new(Kind::NotFound, format!("There is no key {key_id} here.")).cause("no_key_id"))
        }
    }
}

/// What the keys of a path belong to: a datasource that there is, or all of them.
fn owner(shared: &Shared, datasource: &str) -> Result<DatasourceId, Problem> {
    let all = DatasourceId::all();
    if datasource == all.as_str() { Ok(all) } else { Ok(shared.datasource(datasource)?.id.clone()) }
}

/// Whether without this key nobody could manage anything any more.
fn is_last_admin(registry: &Registry, key_id: KeyId) -> bool {
    let keys = registry.keys(&DatasourceId::all());
    let mut admins = keys.iter().filter(|key| key.scopes.allow(Scope::Admin) && !key.has_expired());
    admins.next().is_some_and(|key| key.id == key_id) && admins.next().is_none()
}
