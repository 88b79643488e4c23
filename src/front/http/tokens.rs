//! `POST /v1/datasources/{datasource}/keys/{key_id}/tokens`: makes an access token of a key, for where a key must not be,
//! as in a page of a browser. Nothing is written for it: it dies with its key, and ends by itself. An admin of the
//! datasource makes one, or the key itself; a token makes none.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};

use super::credentials::Caller;
use super::keys::{key_owner, no_key_problem};
use super::members::stated;
use super::{HttpFrontState, PathParameters, run_blocking};
use crate::auth::{Key, Scope, Scopes};
use crate::filter::TopicFilter;
use crate::front::problem::Problem;
use crate::limits::{TOKEN_TOPICS_BYTES_MAX, TOKEN_TOPICS_MAX, TOKEN_TTL_DEFAULT_S, TOKEN_TTL_S_MAX};
use crate::message::{DatasourceId, KeyId};
use crate::observe::cause::Cause;
use crate::time::{Rfc3339, cluster_micros};
use crate::whole_number::WholeNumber;

/// The body of a request that makes a token.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CreateTokenRequest {
    /// For how long it is good, in seconds.
    #[serde(default, deserialize_with = "stated")]
    ttl_s: Option<WholeNumber>,
    /// The topics that it is for; all without.
    #[serde(default, deserialize_with = "stated")]
    topics: Option<Vec<String>>,
    /// What it may be used for; what its key may be, but for managing, without.
    #[serde(default, deserialize_with = "stated")]
    scopes: Option<Scopes>,
}

impl CreateTokenRequest {
    /// For how long the token is to be good, in microseconds.
    fn ttl_us(&self) -> Result<i64, Problem> {
        let WholeNumber(ttl_s) = self.ttl_s.unwrap_or(WholeNumber(TOKEN_TTL_DEFAULT_S));
        if (1..=TOKEN_TTL_S_MAX).contains(&ttl_s) {
            return Ok(i64::try_from(ttl_s).unwrap_or(i64::MAX).saturating_mul(1_000_000));
        }
        let words = format!("ttl_s is {ttl_s}: it has to be between 1 and {TOKEN_TTL_S_MAX}.");
        Err(Problem::new(Cause::Malformed, words).with("limit", TOKEN_TTL_S_MAX).with("pointer", "/ttl_s"))
    }

    /// The topics that the token is to be for; none are all.
    fn topic_filters(&self) -> Result<Vec<TopicFilter>, Problem> {
        let Some(topics) = &self.topics else { return Ok(Vec::new()) };
        let problem =
            |words: String, pointer: String| Problem::new(Cause::Malformed, words).with("pointer", pointer);
        let refuse = |words, pointer| Err(problem(words, pointer));
        let bytes: usize = topics.iter().map(String::len).sum();
        if topics.is_empty() || topics.len() > TOKEN_TOPICS_MAX || bytes > TOKEN_TOPICS_BYTES_MAX {
            let words = format!(
                "topics has to be a list of 1 to {TOKEN_TOPICS_MAX} topic filters with at most {TOKEN_TOPICS_BYTES_MAX} \
                 bytes in all. Without it the token is for all topics."
            );
            let refused = problem(words, "/topics".to_owned());
            // A schema counts the topics, and not their bytes.
            let is_in_order = (1..=TOKEN_TOPICS_MAX).contains(&topics.len());
            return Err(if is_in_order { refused.not_possible() } else { refused });
        }
        let mut filters = Vec::with_capacity(topics.len());
        for (place, topic) in topics.iter().enumerate() {
            match TopicFilter::new(topic) {
                Ok(filter) if !topic.starts_with('$') => filters.push(filter),
                Ok(_) => {
                    let words = "No topic begins with $, and a token joins no group.".to_owned();
                    return refuse(words, format!("/topics/{place}"));
                }
                Err(error) => return refuse(format!("{error}."), format!("/topics/{place}")),
            }
        }
        Ok(filters)
    }
}

/// The answer: the token, which is shown only this once, and what it is good for.
#[derive(Serialize)]
struct CreateTokenResponse<'a> {
    token: &'a str,
    key_id: KeyId,
    datasource: &'a DatasourceId,
    scopes: Scopes,
    /// `null` for all.
    topics: Option<Vec<&'a str>>,
    expires_at: Rfc3339,
}

/// `POST /v1/datasources/{datasource}/keys/{key_id}/tokens`
pub(super) async fn create(
    State(shared): State<Arc<HttpFrontState>>,
    caller: Caller,
    PathParameters((datasource, key_id)): PathParameters<(String, String)>,
    request: Request,
) -> Result<Response, Problem> {
    let key_id = KeyId::parse(&key_id)?;
    let key = key_of_token(&shared, &caller, &datasource, key_id)?;
    let asked: CreateTokenRequest = shared.read_json(request).await?;
    let topics = asked.topic_filters().map_err(Problem::after_body_read)?;
    let ends_at = cluster_micros().saturating_add(asked.ttl_us().map_err(Problem::after_body_read)?);
    let scopes = match asked.scopes {
        Some(scopes) => usable_scopes(&key, scopes).map_err(Problem::after_body_read)?,
        None => Scopes::from_slice(&[Scope::Ingest, Scope::Subscribe]),
    };
    let registry = shared.registry().clone();
    let of = key.clone();
    // The first token of a registry waits for the disk.
    let made = run_blocking(move || Ok(registry.make_token(&of, scopes, ends_at, topics)?)).await;
    let made = made.map_err(Problem::after_body_read)?;
    // What is made with a dead key would outlive it.
    caller.0.check().map_err(|denied| Problem::from(denied).after_body_read())?;
    // It may have died meanwhile; then the token is good for nothing.
    if !key.holds() {
        return Err(no_key_problem(key_id).after_body_read());
    }
    let claims = &made.claims;
    let (by, expires_at) = (caller.0.key_id(), Rfc3339(claims.ends_at));
    tracing::info!(%datasource, %key_id, %by, %expires_at, scopes = %claims.scopes, "access token made");
    let topics: Vec<&str> = claims.topics.iter().map(TopicFilter::as_str).collect();
    let body = CreateTokenResponse {
        token: made.token.expose(),
        key_id,
        datasource: &key.datasource,
        scopes: claims.scopes,
        topics: (!topics.is_empty()).then_some(topics),
        expires_at,
    };
    Ok((StatusCode::CREATED, Json(body)).into_response())
}

/// The key that a token is made of: the caller's own, or one that it manages.
fn key_of_token(
    shared: &HttpFrontState,
    caller: &Caller,
    datasource: &str,
    key_id: KeyId,
) -> Result<Arc<Key>, Problem> {
    let own = caller.0.key();
    if own.id == key_id && own.datasource.as_str() == datasource {
        return Ok(own.clone());
    }
    caller.require_scope(Scope::Admin, datasource)?;
    let owner = key_owner(shared, datasource)?;
    let key = shared.registry().key(&owner, key_id).ok_or_else(|| no_key_problem(key_id))?;
    if key.has_expired() || !key.holds() {
        let words = format!("Key {key_id} has expired: a token of it would be good for nothing.");
        return Err(Problem::new(Cause::Conflict, words));
    }
    Ok(key)
}

/// The scopes that are asked for, if the key has all of them and a token may have them.
fn usable_scopes(key: &Key, asked: Scopes) -> Result<Scopes, Problem> {
    if asked.iter().any(|scope| scope == Scope::Admin) {
        let words = "An access token manages nothing: scopes are ingest and subscribe.";
        return Err(Problem::new(Cause::Malformed, words).with("pointer", "/scopes"));
    }
    match asked.iter().find(|scope| !key.scopes.allow(*scope)) {
        None => Ok(asked),
        Some(scope) => {
            let words = format!("Key {} lacks the scope {scope}, and so does what is made of it.", key.id);
            Err(Problem::new(Cause::NotPossible, words).with("pointer", "/scopes"))
        }
    }
}
