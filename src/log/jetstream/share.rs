//! Places in the log that several gateways share: each record goes to one of those who take from a place,
//! and to another if that one's gateway is gone or it does not deal with it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use headgate_bridge_nats::StreamError;
use headgate_bridge_nats::stream::{Receipt, SharedPlace, SharedSettings, Taking};

use super::Shared;
use super::message::{LastTime, decode};
use crate::log::{Batch, Place, Withheld};
use crate::message::Offset;

/// After how long a record goes to another, if nothing was said of it: its gateway was killed.
const REDELIVERED_AFTER: Duration = Duration::from_secs(6);
/// How often it has to be said of a record that it is still being dealt with.
pub const KEEP_EVERY: Duration = Duration::from_secs(2);

/// The places. Cheap to clone.
#[derive(Clone)]
pub struct SharedPlaces {
    shared: Arc<Shared>,
}

/// Why a place cannot be used now.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub struct ShareError(String);

/// Records that were asked for, as they come.
pub struct SharedRecords(Taking);

/// One of them.
pub struct Given {
    /// What it is in.
    pub batch: Batch,
    /// Where in it.
    pub place: Place,
    /// What is to be said of it.
    pub receipt: Receipt,
}

impl SharedPlaces {
    pub(super) fn of(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// The offset behind everything that can be read here.
    pub fn next_offset(&self) -> Offset {
        self.shared.tail.next_offset()
    }

    /// What is to be left out.
    pub fn withheld(&self) -> &Arc<Withheld> {
        &self.shared.withheld
    }

    /// The oldest offset, as far as is known.
    pub fn first_offset(&self) -> Offset {
        self.shared.first_offset.load(Ordering::Acquire)
    }

    /// Makes a place that begins at `from`, or finds it, wherever that is then. It stays for as long as somebody
    /// takes from it, and as `kept` says after that; `None`: for ever.
    ///
    /// # Errors
    /// [`ShareError`].
    pub async fn open(
        &self,
        name: &str,
        subjects: Vec<String>,
        from: Offset,
        kept: Option<Duration>,
    ) -> Result<SharedPlace, ShareError> {
        let (name, redelivered_after) = (name.to_owned(), REDELIVERED_AFTER);
        let settings = SharedSettings { name, subjects, from, redelivered_after, kept };
        Ok(self.shared.stream.share(&settings).await?)
    }

    /// Gives up a place, if nobody takes from it.
    ///
    /// # Errors
    /// [`ShareError`].
    pub async fn give_up(&self, name: &str) -> Result<(), ShareError> {
        Ok(self.shared.stream.give_up_shared(name).await?)
    }

    /// Somebody is to be told how many records retention has removed before anybody took them. Returns how
    /// many; 0 if another was told.
    ///
    /// # Errors
    /// [`ShareError`].
    pub async fn told_of_skipped(&self, name: &str) -> Result<u64, ShareError> {
        Ok(self.shared.stream.told_of_skipped(name).await?)
    }

    /// Returns when NATS has been told all that was said of records.
    pub async fn flush(&self) {
        // While it is away it cannot be told.
        let _ = self.shared.stream.nats().client().flush().await;
    }

    /// Asks a place for up to `max` records.
    ///
    /// # Errors
    /// [`ShareError`].
    pub async fn take(&self, name: &str, max: usize) -> Result<SharedRecords, ShareError> {
        Ok(SharedRecords(self.shared.stream.take(name, max).await?))
    }
}

impl SharedRecords {
    /// The next record, when there is one; `None` when no more come, and it is to be asked again. May be dropped
    /// and called again.
    pub async fn next(&mut self) -> Option<Given> {
        loop {
            let taken = self.0.next().await?;
            let mut sections = Vec::new();
            if decode(&taken.stored, &mut LastTime::default(), &mut sections) {
                let batch = Batch::gather(taken.stored.sequence, &sections);
                if let Some(place) = batch.place(taken.stored.sequence) {
                    return Some(Given { batch, place, receipt: taken.receipt });
                }
            }
            // It is none that a gateway has written: `follow` says so.
            taken.receipt.done().await;
        }
    }

    /// Whether all that were asked for have come.
    pub fn are_all(&self) -> bool {
        self.0.is_full()
    }

    /// Takes no more, which JetStream knows when this returns. What it sent a moment before and did not arrive
    /// goes to others after a while; returned is what is to be said of what did.
    pub async fn end(self) -> Vec<Receipt> {
        self.0.end().await
    }
}

impl ShareError {
    /// JetStream has given nothing, and did not wait until there was something.
    pub fn refused() -> Self {
        Self("JetStream gives no records to one more who waits for them, or has no leader now".to_owned())
    }
}

impl From<StreamError> for ShareError {
    fn from(error: StreamError) -> Self {
        Self(error.to_string())
    }
}
