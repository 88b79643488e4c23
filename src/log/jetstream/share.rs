//! Shared places: places in the log that several gateways share. Each record goes to one of the takers,
//! and to another if that one's gateway is gone or it does not finish the record.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use headgate_bridge_nats::StreamError;
use headgate_bridge_nats::stream::{
    DeliveryReceipt, SharedDelivery, SharedPlace, SharedPull, SharedSettings,
};

use super::JetstreamLogShared;
use super::fences::fenced_key;
use crate::log::nats_message::{ParsedTimeCache, decode_record};
use crate::log::{Batch, RecordPlace, WithheldRules};
use crate::message::Offset;

/// After this silence about a record its gateway counts as killed, and the record goes to another taker.
const SHARED_REDELIVERY_DELAY: Duration = Duration::from_secs(6);
/// How often a taker has to report that it still works on a record.
pub const SHARED_KEEP_INTERVAL: Duration = Duration::from_secs(2);

/// The shared places of a log. Cheap to clone.
#[derive(Clone)]
pub struct SharedPlaces {
    shared: Arc<JetstreamLogShared>,
}

/// Why a place cannot be used now.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub struct ShareError(String);

/// Requested records, as they arrive.
pub struct SharedRecords {
    pull: SharedPull,
    shared: Arc<JetstreamLogShared>,
    /// A record that has arrived before this gateway has followed the stream so far: a fence may be before it.
    early: Option<SharedDelivery>,
}

/// One record from a shared place.
pub struct DeliveredRecord {
    /// The batch that holds it.
    pub batch: Batch,
    /// Its place in the batch.
    pub place: RecordPlace,
    /// Reports to JetStream what became of it.
    pub receipt: DeliveryReceipt,
}

impl SharedPlaces {
    pub(super) fn new(shared: Arc<JetstreamLogShared>) -> Self {
        Self { shared }
    }

    /// The offset behind all records that can be read here.
    pub fn next_offset(&self) -> Offset {
        self.shared.tail.next_offset()
    }

    /// The records that no reader may see.
    pub fn withheld(&self) -> &Arc<WithheldRules> {
        &self.shared.withheld
    }

    /// The oldest offset, as far as is known.
    pub fn first_offset(&self) -> Offset {
        self.shared.first_offset.load(Ordering::Acquire)
    }

    /// Makes a place that begins at `from`, or opens the existing one where it is now. It stays while
    /// anybody takes from it, and for `kept` after that; `None`: for ever.
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
        let (name, redelivered_after) = (name.to_owned(), SHARED_REDELIVERY_DELAY);
        let settings = SharedSettings { name, subjects, from, redelivered_after, kept };
        Ok(self.shared.stream.share(&settings).await?)
    }

    /// Deletes a place, if nobody takes from it.
    ///
    /// # Errors
    /// [`ShareError`].
    pub async fn give_up(&self, name: &str) -> Result<(), ShareError> {
        Ok(self.shared.stream.give_up_shared(name).await?)
    }

    /// How many records retention removed before anybody took them. Only one caller gets the number; the
    /// others get 0.
    ///
    /// # Errors
    /// [`ShareError`].
    pub async fn told_of_skipped(&self, name: &str) -> Result<u64, ShareError> {
        Ok(self.shared.stream.mark_skipped_told(name).await?)
    }

    /// Returns when all receipts have been sent to NATS.
    pub async fn flush(&self) {
        // Nothing can be sent while NATS is away.
        let _ = self.shared.stream.nats().client().flush().await;
    }

    /// Asks a place for up to `max` records.
    ///
    /// # Errors
    /// [`ShareError`].
    pub async fn take(&self, name: &str, max: usize) -> Result<SharedRecords, ShareError> {
        let pull = self.shared.stream.take(name, max).await?;
        Ok(SharedRecords { pull, shared: self.shared.clone(), early: None })
    }
}

impl SharedRecords {
    /// Waits for the next record; `None` when no more come and the caller has to ask again. Safe to drop
    /// and call again.
    pub async fn next(&mut self) -> Option<DeliveredRecord> {
        loop {
            if self.early.is_none() {
                self.early = Some(self.pull.next().await?);
            }
            let sequence = self.early.as_ref()?.stored.sequence;
            // Never fails: the sender is in `shared`.
            let _ = self.shared.tail.subscribe().wait_for(|next| *next > sequence).await;
            let taken = self.early.take()?;
            if self.shared.fences.shut_out(&taken.stored) || fenced_key(&taken.stored).is_some() {
                taken.receipt.done().await;
                continue;
            }
            let mut sections = Vec::new();
            if decode_record(&taken.stored, &mut ParsedTimeCache::default(), &mut sections) {
                let batch = Batch::gather(taken.stored.sequence, &sections);
                if let Some(place) = batch.place(taken.stored.sequence) {
                    return Some(DeliveredRecord { batch, place, receipt: taken.receipt });
                }
            }
            // No gateway wrote this message; `follow` warns about it.
            taken.receipt.done().await;
        }
    }

    /// Whether all requested records have arrived.
    pub fn is_complete(&self) -> bool {
        self.early.is_none() && self.pull.is_full()
    }

    /// Ends the request; JetStream knows when this returns. Records that it sent just before and that did not
    /// arrive go to other takers after a while. Returns the receipts of those that did arrive.
    pub async fn end(self) -> Vec<DeliveryReceipt> {
        let mut receipts = self.pull.end().await;
        receipts.extend(self.early.map(|early| early.receipt));
        receipts
    }
}

impl ShareError {
    /// JetStream ended the request at once, without a record.
    pub fn refused() -> Self {
        Self("JetStream accepts no more waiting requests for this place, or has no leader now".to_owned())
    }
}

impl From<StreamError> for ShareError {
    fn from(error: StreamError) -> Self {
        Self(error.to_string())
    }
}
