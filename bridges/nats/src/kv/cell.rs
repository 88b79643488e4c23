//! Writes and removes single rows, each by itself. Of two writers who know the same revision of a row, the
//! second is refused.

use std::time::Duration;

use async_nats::jetstream::context::PublishErrorKind;
use async_nats::{HeaderMap, HeaderValue, header};
use bytes::Bytes;
use futures_util::StreamExt;

use super::{KvBucket, KvError, KvRevision};

impl KvBucket {
    /// Writes a row if it has the revision `expected` (0: there is none); `None`: whatever it has. The value must
    /// not be empty. With `lasts` the row expires after that time. Returns the new revision.
    ///
    /// # Errors
    /// [`KvError::Conflict`]; [`KvError::Away`]: whether it was written is not known.
    pub async fn put(
        &self,
        key: &str,
        value: Bytes,
        expected: Option<KvRevision>,
        lasts: Option<Duration>,
    ) -> Result<KvRevision, KvError> {
        let mut headers = HeaderMap::new();
        if let Some(expected) = expected {
            headers.insert(header::NATS_EXPECTED_LAST_SUBJECT_SEQUENCE, HeaderValue::from(expected));
        }
        if let Some(lasts) = lasts {
            headers.insert(header::NATS_MESSAGE_TTL, HeaderValue::from(lasts.as_secs().max(1)));
        }
        let written = async {
            let sent = self.context.publish_with_headers(self.subject(key), headers, value).await?;
            sent.await
        };
        match self.await_answer(written).await? {
            Ok(acknowledged) => Ok(acknowledged.sequence),
            Err(error) if error.kind() == PublishErrorKind::WrongLastSequence => Err(KvError::Conflict),
            Err(error) => Err(self.away_error(&error)),
        }
    }

    /// Removes a row without a trace, whatever its revision. The later of a write and a removal counts.
    ///
    /// # Errors
    /// [`KvError::Away`].
    pub async fn remove(&self, key: &str) -> Result<(), KvError> {
        let purged = self.stream.purge().filter(self.subject(key)).into_future();
        self.await_answer(purged).await?.map(|_| ()).map_err(|error| self.away_error(&error))
    }

    /// The keys of the rows that begin with this part and a dot. The time that they take grows with their number.
    ///
    /// # Errors
    /// [`KvError::Away`].
    pub async fn keys_below(&self, part: &str) -> Result<Vec<String>, KvError> {
        let rows = async {
            let mut subjects = self.stream.info_with_subjects(self.subject(&format!("{part}.>"))).await?;
            let mut keys = Vec::new();
            while let Some(row) = subjects.next().await {
                let (subject, _) = row?;
                keys.extend(subject.strip_prefix(&self.subject("")).map(str::to_owned));
            }
            Ok::<_, async_nats::Error>(keys)
        };
        self.await_answer(rows).await?.map_err(|error| self.away_error(&error))
    }

    /// Whether the key of a row begins with this part and a dot.
    ///
    /// # Errors
    /// [`KvError::Away`].
    pub async fn has_any_below(&self, part: &str) -> Result<bool, KvError> {
        let rows = async {
            let mut subjects = self.stream.info_with_subjects(self.subject(&format!("{part}.>"))).await?;
            Ok::<_, async_nats::Error>(subjects.next().await.transpose()?.is_some())
        };
        self.await_answer(rows).await?.map_err(|error| self.away_error(&error))
    }
}
