//! A lent body: a request's body that comes back when whoever was to read it lets it go.
//!
//! HTTP/2 resets a stream whose answer is complete before its body is. Clients that were still
//! sending take that for a failure and drop the answer, so that they never learn why they were
//! refused. So a little of such a body is taken off the stream, unlooked at, before the answer ends.
//! HTTP/1 has the same trouble one layer further down, where `socket` deals with it.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, HttpBody};
use bytes::Bytes;
use futures_util::StreamExt;
use hyper::body::{Frame, SizeHint};
use tokio::sync::oneshot;

use crate::limits::HTTP_LINGER_BYTES_MAX;

/// How long is waited for the rest of a body that nobody wants.
const LINGER_MAX: Duration = Duration::from_secs(2);

/// Where a lent body comes back.
pub(super) struct Lender(oneshot::Receiver<Body>);

impl Lender {
    /// Lends `body`.
    pub(super) fn lend(body: Body) -> (Body, Self) {
        let (back, returned) = oneshot::channel();
        (Body::new(Lent { body, back: Some(back) }), Self(returned))
    }

    /// Reads what is left of the body and throws it away, up to [`HTTP_LINGER_BYTES_MAX`] and for
    /// [`LINGER_MAX`]; nothing if it was not let go.
    pub(super) async fn discard(mut self) {
        let Ok(body) = self.0.try_recv() else { return };
        let mut chunks = body.into_data_stream();
        let rest = async {
            let mut bytes = 0;
            while let Some(Ok(chunk)) = chunks.next().await {
                bytes += chunk.len();
                if bytes > HTTP_LINGER_BYTES_MAX {
                    return;
                }
            }
        };
        // Over the time or not, the answer goes out now.
        let _ = tokio::time::timeout(LINGER_MAX, rest).await;
    }
}

struct Lent {
    body: Body,
    back: Option<oneshot::Sender<Body>>,
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(back) = self.back.take() {
            // Nobody waits for it when the request was let in.
            let _ = back.send(std::mem::take(&mut self.body));
        }
    }
}

impl HttpBody for Lent {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
