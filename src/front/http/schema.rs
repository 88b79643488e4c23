//! The schemas of a datasource: sets and reads those that are enforced, and proposes schemas inferred from
//! stored records. A key that may read records may read both; setting needs an admin key.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::credentials::{Caller, DataCaller};
use super::members::stated;
use super::{HttpFrontState, PathParameters, query, run_blocking};
use crate::auth::{Datasource, Scope};
use crate::consume::schema_inference::Inference;
use crate::filter::TopicFilter;
use crate::front::problem::Problem;
use crate::limits::HTTP_SCHEMAS_BYTES_MAX;
use crate::observe::cause::{Cause, ProblemKind};
use crate::validate::{Rules, RulesError, SchemaError, Validation, WrittenRule};

/// The body of a request that sets schemas: `schema` for one schema for every topic, or `schemas` for a
/// list, in which the first entry whose filter matches a message's topic counts.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SetSchemasRequest {
    #[serde(default, deserialize_with = "stated")]
    schema: Option<Value>,
    #[serde(default, deserialize_with = "stated")]
    schemas: Option<Vec<WrittenRule>>,
}

/// A schema that is enforced.
#[derive(Serialize)]
struct EnforcedSchema<'a> {
    filter: &'a str,
    version: u32,
    schema: &'a Value,
}

impl<'a> EnforcedSchema<'a> {
    fn all(rules: Option<&'a Rules>) -> Vec<Self> {
        Self::among(rules, None)
    }

    /// Those that may be for one of these topics, or all of them.
    fn among(rules: Option<&'a Rules>, topics: Option<&[TopicFilter]>) -> Vec<Self> {
        let rules = rules.into_iter().flat_map(Rules::iter);
        rules
            .filter(|rule| {
                topics.is_none_or(|topics| topics.iter().any(|topic| topic.overlaps(&rule.filter)))
            })
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
    State(shared): State<Arc<HttpFrontState>>,
    caller: Caller,
    PathParameters(id): PathParameters<String>,
    request: Request,
) -> Result<Response, Problem> {
    caller.require_scope(Scope::Admin, &id)?;
    let datasource = shared.datasource(&id)?;
    let SetSchemasRequest { schema, schemas } =
        shared.read_json_up_to(request, HTTP_SCHEMAS_BYTES_MAX).await?;
    let written = match (schema, schemas) {
        (Some(schema), None) => WrittenRule::for_all(schema),
        (None, Some(schemas)) => schemas,
        _ => {
            let words = "Give a schema for every topic as \"schema\", or a list as \"schemas\".";
            return Err(Problem::new(Cause::Malformed, words).after_body_read());
        }
    };
    let actor = caller.actor();
    run_blocking(move || {
        let _one_at_a_time = shared.setting_schemas.lock();
        let rules = replacement_rules(&datasource, written)?;
        shared.registry().set_datasource_schemas(&actor, &datasource.id, Some(rules.to_stored_json()))?;
        #[derive(Serialize)]
        struct EnforcedSchemasResponse<'a> {
            enforced: Vec<EnforcedSchema<'a>>,
        }
        Ok(Json(EnforcedSchemasResponse { enforced: EnforcedSchema::all(Some(&rules)) }).into_response())
    })
    .await
    .map_err(Problem::after_body_read)
}

/// The rules that replace those of a datasource.
fn replacement_rules(datasource: &Datasource, written: Vec<WrittenRule>) -> Result<Rules, Problem> {
    let validation = Validation::from_setting(&datasource.schemas);
    let none = Rules::default();
    // Rules that cannot be read are dropped: the new ones replace them anyway.
    let before = validation.rules().ok().flatten().unwrap_or(&none);
    Ok(before.replace(written)?)
}

/// The first rules of a datasource, checked before it is created.
pub(super) fn initial_rules(schema: Value) -> Result<Rules, Problem> {
    Ok(Rules::default().replace(WrittenRule::for_all(schema))?)
}

/// `GET /v1/datasources/{datasource}/schema`
pub(super) async fn show(
    State(shared): State<Arc<HttpFrontState>>,
    DataCaller(caller): DataCaller,
    PathParameters(id): PathParameters<String>,
) -> Result<Response, Problem> {
    caller.require_scope(Scope::Subscribe, &id)?;
    let datasource = shared.datasource(&id)?;
    let validation = Validation::from_setting(&datasource.schemas);
    let topics = caller.0.topics_within(&id);
    query::run_query(&shared, &caller, move |stored| {
        #[derive(Serialize)]
        struct SchemasResponse<'a> {
            enforced: Vec<EnforcedSchema<'a>>,
            #[serde(flatten)]
            inference: Inference,
        }
        let inference = stored.inference(&datasource.scope(), topics.as_deref())?;
        let enforced = EnforcedSchema::among(validation.rules().ok().flatten(), topics.as_deref());
        Ok(Json(SchemasResponse { enforced, inference }).into_response())
    })
    .await
}

impl From<RulesError> for Problem {
    fn from(error: RulesError) -> Self {
        let kind = match error {
            RulesError::TooMany
            | RulesError::Filter(_)
            | RulesError::Unreadable(_)
            | RulesError::Schema { error: SchemaError::NoSchema, .. } => ProblemKind::Malformed,
            // What has the form of JSON Schemas, and is none that counts.
            RulesError::Twice(_) | RulesError::Schema { .. } => ProblemKind::NotPossible,
        };
        Self::new(Cause::Schema, format!("{error}.")).with_kind(kind).after_body_read()
    }
}
