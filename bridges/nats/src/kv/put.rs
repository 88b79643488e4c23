//! Writes rows of a bucket: all or none, and only if no other writer was first.

use std::time::Duration;

use async_nats::client::PublishErrorKind;
use async_nats::connection::State;
use async_nats::jetstream::ErrorCode;
use async_nats::jetstream::publish::PublishAck;
use async_nats::jetstream::response::Response;
use async_nats::{HeaderMap, Subscriber, header};
use bytes::Bytes;
use futures_util::StreamExt;
use tokio::time::{Instant, sleep, timeout_at};

use super::{
    KV_ANSWER_WAIT_MAX, KV_BATCH_ROWS_MAX, KV_OPERATION_DELETE, KV_OPERATION_HEADER, KV_RETRY_PAUSE,
    KvBucket, KvError, KvRevision,
};
use crate::stream::stream_error_of_jetstream;

/// How long to try to find out whether a batch was written, after its answer was lost.
const KV_VERIFY_WAIT_MAX: Duration = Duration::from_secs(5);

/// One row that is to be written.
#[derive(Debug, Clone)]
pub struct KvPut {
    /// Its key.
    pub key: String,
    /// What it is to hold; `None` deletes it.
    pub value: Option<Bytes>,
    /// The revision that the row has to have now; 0: it never existed; `None`: any. A deleted row has the
    /// revision of its deletion.
    pub expected: Option<KvRevision>,
}

impl KvPut {
    /// The headers of the row in its batch, where it has the place `place`, from 1 on.
    fn headers(&self, batch: &str, place: usize) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(header::NATS_BATCH_ID, batch);
        headers.insert(header::NATS_BATCH_SEQUENCE, place.to_string());
        if let Some(expected) = self.expected {
            headers.insert(header::NATS_EXPECTED_LAST_SUBJECT_SEQUENCE, expected.to_string());
        }
        if self.value.is_none() {
            headers.insert(KV_OPERATION_HEADER, KV_OPERATION_DELETE);
        }
        headers
    }
}

impl KvBucket {
    /// Writes rows, all or none, and returns the revision of the last one; the rows before it have the
    /// revisions before it. `last` is the newest revision that the bucket may have (see
    /// [`KvUpdate::revision`](super::KvUpdate)): if there is a newer one, nothing is written.
    ///
    /// # Errors
    /// [`KvError::Conflict`] if `last` or a row's expected revision does not match; [`KvError::TooLarge`] for
    /// a row that does not fit in a message, or more than [`KV_BATCH_ROWS_MAX`]; [`KvError::Away`] while NATS is
    /// away, or if it goes away for so long that the outcome stays unknown; [`KvError::Refused`] for what
    /// JetStream does not take.
    pub async fn put_all(&self, puts: &[KvPut], last: Option<KvRevision>) -> Result<KvRevision, KvError> {
        let client = self.nats.client();
        if puts.len() > KV_BATCH_ROWS_MAX {
            let text = format!("{} rows at once, and at most {KV_BATCH_ROWS_MAX} fit", puts.len());
            return Err(KvError::TooLarge(text));
        }
        // The client would buffer the batch and send it after a reconnect, long after the caller gave up.
        if client.connection_state() != State::Connected {
            return Err(self.silent_error());
        }
        let mut connections = self.nats.connections();
        connections.mark_unchanged();
        let inbox = client.new_inbox();
        // As unique as an inbox, and short enough for a batch.
        let id = inbox.rsplit('.').next().unwrap_or(&inbox).to_owned();
        let mut answers = client.subscribe(inbox.clone()).await.map_err(|_| self.silent_error())?;
        for (place, put) in puts.iter().enumerate() {
            let mut headers = put.headers(&id, place + 1);
            if let Some(last) = last.filter(|_| place == 0) {
                headers.insert(header::NATS_EXPECTED_LAST_SEQUENCE, last.to_string());
            }
            if place + 1 == puts.len() {
                headers.insert(header::NATS_BATCH_COMMIT, header::NATS_BATCH_COMMIT_FINAL);
            }
            self.send_row(put, headers, &inbox).await?;
        }
        let Some(end) = puts.last() else { return Ok(last.unwrap_or_default()) };
        let answer = tokio::select! {
            answer = self.await_batch_ack(&mut answers) => answer,
            // An answer that was under way is lost with the connection.
            _ = connections.changed() => None,
        };
        match answer {
            Some(answer) => answer,
            None => self.verify(&end.key, &id).await,
        }
    }

    /// Hands a row of a batch to the connection.
    async fn send_row(&self, put: &KvPut, headers: HeaderMap, inbox: &str) -> Result<(), KvError> {
        let (subject, value) = (self.subject(&put.key), put.value.clone().unwrap_or_default());
        let client = self.nats.client();
        let sent = client.publish_with_reply_and_headers(subject, inbox.to_owned(), headers, value);
        sent.await.map_err(|error| match error.kind() {
            // The server drops the unfinished batch after a while.
            PublishErrorKind::MaxPayloadExceeded => KvError::TooLarge(format!(
                "row {} is larger than a message of this NATS may be: {error}",
                put.key
            )),
            PublishErrorKind::InvalidSubject => {
                KvError::Refused(format!("{:?} is not the key of a row", put.key))
            }
            PublishErrorKind::Send => self.silent_error(),
        })
    }

    /// JetStream's answer to a batch; `None` if none comes in time.
    async fn await_batch_ack(&self, answers: &mut Subscriber) -> Option<Result<KvRevision, KvError>> {
        let until = Instant::now() + KV_ANSWER_WAIT_MAX;
        loop {
            let answer = timeout_at(until, answers.next()).await.ok()??;
            if answer.status.is_some() {
                // No responders: JetStream is off, or the stream has no leader now.
                return Some(Err(self.silent_error()));
            }
            // JetStream answers every row of a batch except the last with an empty message.
            if answer.payload.is_empty() {
                continue;
            }
            return Some(match serde_json::from_slice::<Response<PublishAck>>(&answer.payload) {
                Ok(Response::Ok(ack)) => Ok(ack.sequence),
                Ok(Response::Err { error }) => Err(match error.error_code() {
                    ErrorCode::STREAM_WRONG_LAST_SEQUENCE
                    | ErrorCode::STREAM_WRONG_LAST_SEQUENCE_CONSTANT => KvError::Conflict,
                    // A new leader does not know the rows that its predecessor received.
                    ErrorCode::ATOMIC_PUBLISH_INCOMPLETE_BATCH
                    | ErrorCode::ATOMIC_PUBLISH_TOO_MANY_INFLIGHT => self.away_error(&error),
                    ErrorCode::ATOMIC_PUBLISH_TOO_LARGE_BATCH => KvError::TooLarge(error.to_string()),
                    _ => stream_error_of_jetstream(format!("bucket {}: {error}", self.name), &error).into(),
                }),
                Err(error) => Err(KvError::Refused(format!("bucket {}: {error}", self.name))),
            });
        }
    }

    /// Finds out whether a batch was written although its answer was lost: the last row names its batch.
    async fn verify(&self, key: &str, id: &str) -> Result<KvRevision, KvError> {
        let until = Instant::now() + KV_VERIFY_WAIT_MAX;
        let subject = self.subject(key);
        while Instant::now() < until {
            if self.nats.client().connection_state() == State::Connected
                && let Ok(Ok(found)) = timeout_at(until, self.last_of(&subject)).await
            {
                let of_batch = |headers: &HeaderMap| {
                    headers.get(header::NATS_BATCH_ID).is_some_and(|found| found.as_str() == id)
                };
                return match found {
                    Some((row, headers)) if of_batch(&headers) => Ok(row.revision),
                    _ => Err(self.silent_error()),
                };
            }
            sleep(KV_RETRY_PAUSE).await;
        }
        Err(self.silent_error())
    }
}
