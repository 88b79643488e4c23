//! Held packets: a PUBLISH of QoS 2 and a PUBREL go out once the store has the packet identifier and the state that
//! they stand for. A gateway that is killed then knows what the client may have: it sends no message of QoS 2 under
//! another identifier, and no PUBLISH after its PUBREL.
//!
//! What one turn has written waits for one write of the store, so that a stream of QoS 2 costs a sync for each
//! [`MQTT_UNSENT_BYTES_MAX`](crate::limits::MQTT_UNSENT_BYTES_MAX) at most.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use super::Outbound;
use crate::consume::subscriber::sessions::{SessionStore, SessionStoreError};
use crate::message::Offset;

type StoreWait = Pin<Box<dyn Future<Output = Result<(), SessionStoreError>> + Send>>;

/// The packets of one turn that wait for the store.
struct HeldTurn {
    packets: Vec<u8>,
    stored: StoreWait,
    /// Records of the groups in these slots, which are the session's for good when it is stored.
    taken: Vec<(u32, Offset)>,
}

/// What is written in this turn and will have to wait.
struct WrittenTurn {
    /// Where in the output the first such packet is.
    from: usize,
    /// Records of groups that are sent with QoS 2.
    taken: Vec<(u32, Offset)>,
}

/// The packets that wait for the store. Small while there are none.
#[derive(Default)]
pub(super) struct HeldPackets {
    written: Option<Box<WrittenTurn>>,
    turn: Option<Box<HeldTurn>>,
}

impl HeldPackets {
    /// How many bytes wait.
    pub(super) fn bytes(&self) -> usize {
        self.turn.as_ref().map_or(0, |turn| turn.packets.len())
    }

    /// What comes into the output from here on has to wait.
    pub(super) fn begin(&mut self, out: &[u8]) {
        self.written.get_or_insert_with(|| Box::new(WrittenTurn { from: out.len(), taken: Vec::new() }));
    }

    /// A record of the group in this slot, written after [`HeldPackets::begin`], is the session's for good once the
    /// store has it.
    pub(super) fn take_for_good(&mut self, slot: u32, offset: Offset) {
        if let Some(written) = &mut self.written {
            written.taken.push((slot, offset));
        }
    }

    /// Ready when the store has what the packets stand for; they are in `out` then. Returns the records that were
    /// taken from groups.
    fn poll_stored(
        &mut self,
        store: &SessionStore,
        out: &mut Vec<u8>,
        cx: &mut Context<'_>,
    ) -> Poll<Vec<(u32, Offset)>> {
        let Some(turn) = &mut self.turn else { return Poll::Ready(Vec::new()) };
        loop {
            match ready!(turn.stored.as_mut().poll(cx)) {
                // A session that is in memory only is not there after a restart.
                Ok(()) | Err(SessionStoreError::Unopened(_)) => break,
                // The gateway ends, and this connection with it.
                Err(SessionStoreError::Closed) => turn.stored = Box::pin(std::future::pending()),
                // It is tried again all the time.
                Err(SessionStoreError::Database(_) | SessionStoreError::Bucket(_)) => {
                    turn.stored = Box::pin(store.write(Vec::new()));
                }
            }
        }
        out.extend_from_slice(&turn.packets);
        let taken = std::mem::take(&mut turn.taken);
        self.turn = None;
        Poll::Ready(taken)
    }
}

impl Outbound {
    /// Ready when no packets wait any more for the store.
    pub(in super::super) fn poll_held(&mut self, out: &mut Vec<u8>, cx: &mut Context<'_>) -> Poll<()> {
        let taken = ready!(self.packets.poll_stored(&self.subscribers.store, out, cx));
        taken.into_iter().for_each(|(slot, offset)| self.groups.keep(slot, offset));
        Poll::Ready(())
    }

    /// Takes what has to wait out of the output, and has the store write what it stands for.
    pub(super) fn hold_packets(&mut self, out: &mut Vec<u8>) {
        let Some(written) = self.packets.written.take() else { return };
        let WrittenTurn { from, taken } = *written;
        if from == out.len() {
            return;
        }
        if !self.session.is_durable() {
            // It ends with the connection, and so do its identifiers.
            taken.into_iter().for_each(|(slot, offset)| self.groups.keep(slot, offset));
            return;
        }
        let packets = out[from..].to_vec();
        out.truncate(from);
        let stored = self.save_progress();
        self.packets.turn = Some(Box::new(HeldTurn { packets, stored: Box::pin(stored), taken }));
    }

    /// The records of the group in this slot that wait for the store are the session's already: no other member gets
    /// them.
    pub(super) fn keep_held(&mut self, of: u32) {
        let Some(turn) = &mut self.packets.turn else { return };
        for (slot, offset) in turn.taken.extract_if(.., |(slot, _)| *slot == of) {
            self.groups.keep(slot, offset);
        }
    }

    /// Gives up what waits: the session has it in flight, and it is sent again to the next connection. A group that
    /// this gateway does not keep itself has its records back: another gateway may have taken the session by now,
    /// without what is not stored.
    pub(super) fn drop_held(&mut self) {
        let HeldPackets { written, turn } = std::mem::take(&mut self.packets);
        let taken = written.map_or(Vec::new(), |written| written.taken);
        let held = turn.map_or(Vec::new(), |turn| turn.taken);
        for (slot, offset) in held.into_iter().chain(taken) {
            match self.groups.is_kept_here(slot) {
                true => self.groups.keep(slot, offset),
                false => self.session.flights.take_back(offset),
            }
        }
        self.session.charge_flights();
    }

    /// Queues what is sent and not acknowledged for the store, as it is now.
    pub(super) fn save_progress(
        &mut self,
    ) -> impl Future<Output = Result<(), SessionStoreError>> + Send + 'static + use<> {
        self.session.position = self.position();
        self.report_progress();
        let stored = self.subscribers.store.write(vec![self.session.moved()]);
        self.feed.mailbox().set_written();
        stored
    }
}
