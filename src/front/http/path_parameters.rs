//! The parameters in a request's path.

use std::sync::Arc;

use axum::extract::{FromRequestParts, Path};
use axum::http::request::Parts as RequestParts;
use serde::de::DeserializeOwned;

use super::HttpFrontState;
use crate::front::problem::Problem;

/// The parameters in a request's path, decoded. A path that cannot be decoded becomes a [`Problem`].
pub(super) struct PathParameters<T>(pub T);

impl<T: DeserializeOwned + Send> FromRequestParts<Arc<HttpFrontState>> for PathParameters<T> {
    type Rejection = Problem;

    async fn from_request_parts(
        parts: &mut RequestParts,
        shared: &Arc<HttpFrontState>,
    ) -> Result<Self, Problem> {
        let Path(parameters) = Path::from_request_parts(parts, shared).await?;
        Ok(Self(parameters))
    }
}
