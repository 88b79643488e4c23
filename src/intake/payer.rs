//! Who pays for the memory of a draft: a key for each message, charged in steps as the draft grows.

use std::sync::Arc;

use super::{Draft, IncomingMessage, Refusal};
use crate::limits::MEMORY_STEP_BYTES_MAX;
use crate::log::Section;
use crate::memory::{MemoryAccount, MemoryCharge, MemoryExceeded};
use crate::message::KeyId;

/// A key that pays for the memory of some messages of a draft.
pub(super) struct DraftPayer {
    key_id: KeyId,
    charge: MemoryCharge,
    /// What its messages take, of what is charged.
    used_bytes: usize,
}

impl DraftPayer {
    /// Gives back what was charged and is not used.
    pub(super) fn trim(&mut self) {
        self.charge.set_held(self.used_bytes);
    }

    /// Charges what a message needs, in steps, so that most messages charge nothing.
    #[inline]
    pub(super) fn make_room(&mut self, message: &IncomingMessage<'_>) -> Result<(), MemoryExceeded> {
        let bytes = message.payload.len() + message.properties.len() + MESSAGE_MEMORY_BYTES;
        let (needed, charged) = (self.used_bytes + bytes, self.charge.bytes());
        if needed <= charged {
            return Ok(());
        }
        let step = charged.clamp(MEMORY_STEP_BYTES_MIN, MEMORY_STEP_BYTES_MAX);
        self.charge.grow(step.max(needed - charged))
    }
}

/// What a message takes beside its bytes: its answer, and what is counted for it.
const MESSAGE_MEMORY_BYTES: usize = 64;
/// The first step in which a draft is charged for.
const MEMORY_STEP_BYTES_MIN: usize = 1 << 10;

impl Draft {
    /// Charges the memory of the messages that are added from now on to this account, which is of a key: a message
    /// that does not fit is refused.
    pub fn charge_to(&mut self, account: &Arc<MemoryAccount>, key_id: KeyId) {
        let known = self.payers.iter().rposition(|payer| payer.key_id == key_id);
        let payer = match known {
            Some(at) => self.payers.swap_remove(at),
            None => DraftPayer { key_id, charge: account.charge_held(0), used_bytes: 0 },
        };
        self.payers.push(payer);
    }

    /// The key whose memory the next message takes, if one was named.
    pub fn payer(&self) -> Option<KeyId> {
        self.payers.last().map(|payer| payer.key_id)
    }

    /// What it takes in memory.
    pub fn memory_bytes(&self) -> usize {
        self.sections.iter().map(Section::memory_bytes).sum()
    }

    /// What a section takes before a message is added to it; nothing if it is new.
    pub(super) fn memory_bytes_before(&self, origin: usize) -> usize {
        let section = &self.sections[origin];
        if self.payers.is_empty() || section.records() == 0 { 0 } else { section.memory_bytes() }
    }

    /// Notes what a message took, now that it is added.
    pub(super) fn note_memory(&mut self, origin: usize, bytes_before: usize) {
        if let Some(payer) = self.payers.last_mut() {
            payer.used_bytes += self.sections[origin].memory_bytes() - bytes_before + MESSAGE_MEMORY_BYTES;
        }
    }

    /// As [`Draft::reserve`], where the memory is charged: the section need not grow to twice what it takes then.
    ///
    /// # Errors
    /// [`Refusal::Memory`].
    pub fn reserve_charged(&mut self, bytes: usize) -> Result<(), Refusal> {
        let (Some(section), Some(payer)) = (self.sections.last_mut(), self.payers.last_mut()) else {
            return Ok(());
        };
        payer.charge.resize((payer.used_bytes + bytes).max(payer.charge.bytes()))?;
        let bytes_before = section.memory_bytes();
        section.reserve(bytes);
        payer.used_bytes += section.memory_bytes() - bytes_before;
        Ok(())
    }
}
