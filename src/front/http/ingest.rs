//! Ingest: messages by HTTP POST. The key is checked before any of the body is read, the body is
//! taken apart (see [`super::messages`]), and all its messages go through intake as one draft: all
//! of them are kept, at offsets that follow each other, or none. The answer comes when they are
//! durable.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use axum::http::HeaderMap;
use axum::http::header::CONTENT_TYPE;
use serde::Serialize;

use super::body::{self, Received};
use super::credentials::Caller;
use super::messages::Messages;
use super::problem::{Kind, Problem};
use super::{InPath, Shared, off_the_runtime};
use crate::auth::{Grant, Scope};
use crate::intake::{Draft, Incoming, Intake, Refusal};
use crate::limits::HTTP_INLINE_BYTES_MAX;
use crate::message::{DatasourceId, Offset, RecordFlags, Transport};

/// The topic of messages that were posted to a datasource without one.
const TOPIC_DEFAULT: &str = "data";

/// Every message of the request is durable.
#[derive(Debug, Serialize)]
pub(super) struct Accepted {
    accepted: u64,
    first_offset: Offset,
    last_offset: Offset,
}

/// `POST /v1/ingest/{datasource}`
pub(super) async fn to_datasource(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    InPath(datasource): InPath<String>,
    request: Request,
) -> Result<Json<Accepted>, Problem> {
    ingest(&shared, caller, &datasource, TOPIC_DEFAULT.to_owned(), request).await
}

/// `POST /v1/ingest/{datasource}/{topic…}`
pub(super) async fn to_topic(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    InPath((datasource, topic)): InPath<(String, String)>,
    request: Request,
) -> Result<Json<Accepted>, Problem> {
    ingest(&shared, caller, &datasource, topic, request).await
}

async fn ingest(
    shared: &Shared,
    Caller(grant): Caller,
    datasource: &str,
    topic: String,
    request: Request,
) -> Result<Json<Accepted>, Problem> {
    grant.allows(Scope::Ingest, datasource)?;
    let datasource = shared.datasource(datasource)?.id.clone();
    let (parts, body) = request.into_parts();
    let content_type = content_type(&parts.headers)?;
    let body = body::read(&parts.headers, body, shared.body_limits(), &shared.bodies).await?;

    let intake = shared.parts.intake.clone();
    let upload = Upload { grant, datasource, topic, content_type, body };
    let kept = async {
        let (draft, upload) = if upload.body.bytes.len() <= HTTP_INLINE_BYTES_MAX {
            (upload.draft(&intake)?, upload)
        } else {
            let intake = intake.clone();
            off_the_runtime(move || Ok((upload.draft(&intake)?, upload))).await?
        };
        let offsets = intake.submit(draft).await.map_err(|refusal| match &refusal {
            // The key died on the way; intake counted each message then.
            Refusal::Denied(_) => Problem::from(refusal).counted(),
            _ => refusal.into(),
        })?;
        // Until here the body has counted as in memory, and with it the draft made of it.
        drop(upload);
        offsets.ok_or_else(|| Problem::internal(&"a draft of messages came back without offsets"))
    };
    let offsets = kept.await.map_err(Problem::body_read)?;
    let (first_offset, last_offset) = offsets.into_inner();
    Ok(Json(Accepted { accepted: last_offset - first_offset + 1, first_offset, last_offset }))
}

fn content_type(headers: &HeaderMap) -> Result<String, Problem> {
    let Some(value) = headers.get(CONTENT_TYPE) else { return Ok(String::new()) };
    let text = value.to_str().map(str::to_owned);
    text.map_err(|_| Problem::new(Kind::Malformed, "The Content-Type is not printable ASCII."))
}

/// A request whose body is there.
struct Upload {
    grant: Grant,
    datasource: DatasourceId,
    topic: String,
    content_type: String,
    body: Received,
}

impl Upload {
    /// The draft of all its messages.
    fn draft(&self, intake: &Intake) -> Result<Draft, Problem> {
        let messages = Messages::split(&self.content_type, &self.body.bytes)?;
        let mut draft = intake.draft(Transport::Http);
        for (index, payload) in messages.payloads.iter().enumerate() {
            let message = Incoming {
                topic: &self.topic,
                payload,
                content_type: messages.content_type,
                properties: &[],
                flags: RecordFlags::default(),
            };
            draft
                .push(&self.grant, Some(&self.datasource), message)
                .map_err(|refusal| messages.locate(index, refusal.into()))?;
        }
        Ok(draft)
    }
}
