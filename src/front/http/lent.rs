//! A lent body: a request's body that comes back when the handler drops it.
//!
//! HTTP/2 resets a stream whose answer is complete before its body is. Clients that are still sending take
//! that for a failure and drop the answer, so that they never learn why they were refused. So a little of
//! such a body is read and discarded before the answer ends. HTTP/1 has the same problem one layer
//! further down, where `socket` handles it, once it is told that a body was not read.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{Body, HttpBody};
use bytes::Bytes;
use futures_util::StreamExt;
use hyper::body::{Frame, SizeHint};
use tokio::sync::oneshot;

use crate::limits::HTTP_LINGER_BYTES_MAX;

/// How long the rest of an unread body is waited for.
const LENT_BODY_LINGER_MAX: Duration = Duration::from_secs(2);

/// The lender: receives the body when the handler has dropped it.
pub(super) struct BodyLender(oneshot::Receiver<Body>);

impl BodyLender {
    /// Lends `body`.
    pub(super) fn lend(body: Body) -> (Body, Self) {
        let (back, returned) = oneshot::channel();
        (Body::new(LentBody { body, is_over: false, back: Some(back) }), Self(returned))
    }

    /// The body, if the handler has dropped it before its end.
    pub(super) fn unread(mut self) -> Option<UnreadBody> {
        self.0.try_recv().ok().map(UnreadBody)
    }
}

/// A body that was not read to its end.
pub(super) struct UnreadBody(Body);

impl UnreadBody {
    /// Reads and discards the rest of the body, for at most [`HTTP_LINGER_BYTES_MAX`] and [`LENT_BODY_LINGER_MAX`].
    pub(super) async fn discard(self) {
        let mut chunks = self.0.into_data_stream();
        let rest = async {
            let mut bytes = 0;
            while let Some(Ok(chunk)) = chunks.next().await {
                bytes += chunk.len();
                if bytes > HTTP_LINGER_BYTES_MAX {
                    return;
                }
            }
        };
        // Whether the rest came in time or not, the answer goes out now.
        let _ = tokio::time::timeout(LENT_BODY_LINGER_MAX, rest).await;
    }
}

struct LentBody {
    body: Body,
    /// It was read to its end.
    is_over: bool,
    back: Option<oneshot::Sender<Body>>,
}

impl Drop for LentBody {
    fn drop(&mut self) {
        if let Some(back) = self.back.take().filter(|_| !self.is_over && !self.body.is_end_stream()) {
            // The receiver is gone if nobody asks for the rest.
            let _ = back.send(std::mem::take(&mut self.body));
        }
    }
}

impl HttpBody for LentBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        self.is_over = !matches!(frame, Some(Ok(_)));
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
