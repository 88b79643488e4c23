//! Backups over HTTP: one is begun, and its progress asked for. For admin keys of the whole gateway, because it is written on
//! the gateway's own machine.

use std::path::PathBuf;
use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};

use super::credentials::Caller;
use super::{HttpFrontState, run_blocking};
use crate::auth::RegistryError;
use crate::backup::{BackupError, BackupPace, BackupReport};
use crate::front::problem::Problem;
use crate::observe::cause::Cause;

/// The body of a request for a backup.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct BackupRequest {
    dir: PathBuf,
    /// As fast as the disk allows, whoever waits for it meanwhile.
    #[serde(default)]
    fast: bool,
}

/// The answer to a request for a backup, and to one for its progress.
#[derive(Serialize)]
struct BackupResponse {
    /// The last one since the start.
    backup: Option<BackupReport>,
}

/// `POST /v1/backup`: answers once the backup has begun.
pub(super) async fn begin(
    State(shared): State<Arc<HttpFrontState>>,
    caller: Caller,
    request: Request,
) -> Result<Response, Problem> {
    caller.require_gateway_admin()?;
    let BackupRequest { dir, fast } = shared.read_json(request).await?;
    let (backups, actor) = (shared.parts.backups.clone(), caller.actor());
    let pace = if fast { BackupPace::Fast } else { BackupPace::Paced };
    let begun = run_blocking(move || Ok(backups.begin(&dir, pace, &actor)?)).await;
    let backup = Some(begun.map_err(Problem::after_body_read)?);
    Ok((StatusCode::ACCEPTED, Json(BackupResponse { backup })).into_response())
}

/// `GET /v1/backup`
pub(super) async fn show(
    State(shared): State<Arc<HttpFrontState>>,
    caller: Caller,
) -> Result<Response, Problem> {
    caller.require_gateway_admin()?;
    Ok(Json(BackupResponse { backup: shared.parts.backups.report() }).into_response())
}

impl From<BackupError> for Problem {
    fn from(error: BackupError) -> Self {
        // The key has ended meanwhile.
        if let BackupError::Registry(error @ RegistryError::Denied(_)) = error {
            return error.into();
        }
        let cause = if error.is_refusal() { Cause::BackupRefused } else { Cause::BackupFailed };
        Self::new(cause, format!("{error}."))
    }
}
