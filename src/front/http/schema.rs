//! The schemas of a datasource: sets and reads those that are enforced, and proposes schemas inferred from
//! stored records. A key that may read records may read both; setting needs an admin key.

use std::sync::{Arc, PoisonError};

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::credentials::Caller;
use super::problem::{Kind, Problem};
use super::{InPath, Shared, off_the_runtime, query};
use crate::auth::{Actor, Datasource, Registry, Scope};
use crate::consume::schema_inference::Inference;
use crate::limits::HTTP_SCHEMAS_BYTES_MAX;
use crate::validate::{Rules, RulesError, Validation, Written};

/// The body of a request that sets schemas: `schema` for one schema for every topic, or `schemas` for a
/// list, in which the first entry whose filter matches a message's topic counts.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Set {
    schema: Option<Value>,
    schemas: Option<Vec<Written>>,
}

/// A schema that is enforced.
#[derive(Serialize)]
struct Enforced<'a> {
    filter: &'a str,
    version: u32,
    schema: &'a Value,
}

impl<'a> Enforced<'a> {
    fn all(rules: Option<&'a Rules>) -> Vec<Self> {
        let rules = rules.into_iter().flat_map(Rules::iter);
        rules
            .map(|rule| Self {
                filter: rule.filter.as_str(),
                version: rule.version,
                schema: rule.schema.source(),
            })
            .collect()
    }
}

/// `PUT /v1/datasources/{datasource}/schema`: once this answers, every message is checked against them.
pub(super) async fn set(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    InPath(id): InPath<String>,
    request: Request,
) -> Result<Response, Problem> {
    caller.may(Scope::Admin, &id)?;
    let datasource = shared.datasource(&id)?;
    let Set { schema, schemas } = shared.read_json_up_to(request, HTTP_SCHEMAS_BYTES_MAX).await?;
    let written = match (schema, schemas) {
        (Some(schema), None) => Written::for_all(schema),
        (None, Some(schemas)) => schemas,
        _ => {
            let words = "Give a schema for every topic as \"schema\", or a list as \"schemas\".";
            return Err(Problem::new(Kind::Malformed, words).body_read());
        }
    };
    let actor = caller.actor();
    off_the_runtime(move || {
        let _one_at_a_time = shared.setting_schemas.lock().unwrap_or_else(PoisonError::into_inner);
        let rules = replace(&datasource, written)?;
        put(shared.registry(), &actor, &datasource, &rules)?;
        #[derive(Serialize)]
        struct Answer<'a> {
            enforced: Vec<Enforced<'a>>,
        }
        Ok(Json(Answer { enforced: Enforced::all(Some(&rules)) }).into_response())
    })
    .await
    .map_err(Problem::body_read)
}

/// The rules that replace those of a datasource.
fn replace(datasource: &Datasource, written: Vec<Written>) -> Result<Rules, Problem> {
    let validation = Validation::of(&datasource.schemas);
    let none = Rules::default();
    // Rules that cannot be read are dropped: the new ones replace them anyway.
    let before = validation.rules().ok().flatten().unwrap_or(&none);
    Ok(before.replace(written)?)
}

/// Sets the rules, durably.
fn put(registry: &Registry, actor: &Actor, datasource: &Datasource, rules: &Rules) -> Result<(), Problem> {
    Ok(registry.set_datasource_schemas(actor, &datasource.id, Some(rules.to_kept()))?)
}

/// The first rules of a datasource, checked before it is created.
pub(super) fn initial(schema: Value) -> Result<Rules, Problem> {
    Ok(Rules::default().replace(Written::for_all(schema))?)
}

/// Sets the rules of a new datasource.
pub(super) fn begin_with(
    registry: &Registry,
    actor: &Actor,
    datasource: &Datasource,
    rules: &Rules,
) -> Result<(), Problem> {
    put(registry, actor, datasource, rules)
}

/// `GET /v1/datasources/{datasource}/schema`
pub(super) async fn show(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    InPath(id): InPath<String>,
) -> Result<Response, Problem> {
    caller.may(Scope::Subscribe, &id)?;
    let datasource = shared.datasource(&id)?;
    let validation = Validation::of(&datasource.schemas);
    query::run(&shared, move |stored| {
        #[derive(Serialize)]
        struct Answer<'a> {
            enforced: Vec<Enforced<'a>>,
            #[serde(flatten)]
            inference: Inference,
        }
        let inference = stored.inference(&datasource.id)?;
        let enforced = Enforced::all(validation.rules().ok().flatten());
        Ok(Json(Answer { enforced, inference }).into_response())
    })
    .await
}

impl From<RulesError> for Problem {
    fn from(error: RulesError) -> Self {
        Self::new(Kind::Malformed, format!("{error}.")).cause("schema").body_read()
    }
}
