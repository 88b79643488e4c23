//! What the payloads of stored records hold: the newest values and the samples, read from each payload once. In a large
//! transaction, which storage makes when it is behind, a thread of its own reads them while the rows are inserted.

use std::mem;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, LazyLock};
use std::thread::{self, Scope, ScopedJoinHandle};

use super::ids::RowIds;
use super::newest::{NewestValues, read_members};
use super::samples::{NewSamples, OpenChunks, SampledRecord};
use crate::message::RecordRef;
use crate::shares::processors;
use crate::values::samples::JsonMember;

/// Payloads that are handed to the other thread at once.
const BLOCK_PAYLOADS: usize = 512;
/// Bytes of them, from which on there are no more in a block: so the keys in them are bounded too.
const BLOCK_BYTES: usize = 64 << 10;
/// Payloads of a transaction that are read without another thread: at the tail of the log there are no more.
const ALONE_PAYLOADS_MAX: usize = 4096;
/// Blocks that wait for the other thread at most.
const WAITING_BLOCKS_MAX: usize = 8;

/// Whether a thread of its own has a processor of its own.
static HAS_PROCESSORS: LazyLock<bool> = LazyLock::new(|| processors() > 1);

/// The payload of a record that was inserted.
pub(super) struct InsertedPayload<'a> {
    pub(super) record: RecordRef<'a>,
    pub(super) row: RowIds,
    /// The payload, if it is text.
    pub(super) text: Option<&'a str>,
}

/// What the payloads of one transaction hold.
pub(super) struct PayloadValues<'a> {
    pub(super) newest: NewestValues<'a>,
    pub(super) samples: NewSamples,
    /// Where the samples of topics go.
    pub(super) open_chunks: OpenChunks,
    keeps_samples: bool,
    /// Of the present payload; kept for its allocation.
    members: Vec<JsonMember<'a>>,
}

impl<'a> PayloadValues<'a> {
    pub(super) fn new(keeps_samples: bool, open_chunks: OpenChunks) -> Self {
        let (newest, samples, members) = Default::default();
        Self { newest, samples, open_chunks, keeps_samples, members }
    }

    fn read(&mut self, payload: &InsertedPayload<'a>) {
        let InsertedPayload { record, row, text } = payload;
        let is_object = text.is_some_and(|text| read_members(text, &mut self.members));
        if self.keeps_samples {
            let sampled = SampledRecord {
                offset: record.offset,
                received_at: record.received_at,
                event_at: record.event_at,
                topic: record.topic,
                content_type: record.content_type,
                text: *text,
                members: is_object.then_some(&*self.members),
            };
            self.samples.observe(row.topic, &sampled, &self.open_chunks);
        }
        self.newest.observe(*row, record, *text, is_object.then_some(&mut self.members));
    }

    /// Reads these. Returns whether there is so much that it is to be written before more is read.
    fn read_all(&mut self, payloads: &[InsertedPayload<'a>]) -> bool {
        payloads.iter().for_each(|payload| self.read(payload));
        self.samples.is_full() || self.newest.is_full()
    }
}

/// Reads the payloads of one transaction.
pub(super) struct PayloadReading<'scope, 'env, 'a> {
    scope: &'scope Scope<'scope, 'env>,
    place: ReadingPlace<'scope, 'a>,
    block: Vec<InsertedPayload<'a>>,
    block_bytes: usize,
    count: usize,
    /// What they hold is to be written before there is more of it.
    is_full: Arc<AtomicBool>,
}

/// Where payloads are read.
enum ReadingPlace<'scope, 'a> {
    Here(Box<PayloadValues<'a>>),
    Thread(SyncSender<Vec<InsertedPayload<'a>>>, ScopedJoinHandle<'scope, PayloadValues<'a>>),
}

impl<'scope, 'env, 'a: 'scope> PayloadReading<'scope, 'env, 'a> {
    pub(super) fn new(scope: &'scope Scope<'scope, 'env>, values: PayloadValues<'a>) -> Self {
        let (block, is_full) = Default::default();
        Self { scope, place: ReadingPlace::Here(Box::new(values)), block, block_bytes: 0, count: 0, is_full }
    }

    /// Takes the next payload. Returns whether it takes more.
    #[inline]
    pub(super) fn add(&mut self, payload: InsertedPayload<'a>) -> bool {
        self.block_bytes += payload.record.payload.len();
        self.block.push(payload);
        if self.block.len() < BLOCK_PAYLOADS && self.block_bytes < BLOCK_BYTES {
            return true;
        }
        self.end_block();
        !self.is_full.load(Ordering::Relaxed)
    }

    fn end_block(&mut self) {
        self.count += self.block.len();
        self.block_bytes = 0;
        let next = Vec::with_capacity(self.block.capacity());
        let block = mem::replace(&mut self.block, next);
        match &mut self.place {
            ReadingPlace::Here(values) => {
                if values.read_all(&block) {
                    self.is_full.store(true, Ordering::Relaxed);
                } else if self.count >= ALONE_PAYLOADS_MAX && *HAS_PROCESSORS {
                    self.begin_thread();
                }
            }
            // It takes all until there are no more. If it has panicked, so does who waits for it.
            ReadingPlace::Thread(blocks, _) => drop(blocks.send(block)),
        }
    }

    /// Goes on in a thread of its own, if the system has one. It has the priority of this one.
    fn begin_thread(&mut self) {
        let (hand_over, handed) = sync_channel::<PayloadValues<'a>>(1);
        let (blocks, taken) = sync_channel::<Vec<InsertedPayload<'a>>>(WAITING_BLOCKS_MAX);
        let is_full = self.is_full.clone();
        let reading = move || {
            let mut values = handed.recv().expect("whoever begins this thread hands them over");
            for block in &taken {
                if values.read_all(&block) {
                    is_full.store(true, Ordering::Relaxed);
                }
            }
            values
        };
        let begun = thread::Builder::new().name("payloads".to_owned()).spawn_scoped(self.scope, reading);
        let Ok(thread) = begun else { return };
        if let ReadingPlace::Here(values) =
            mem::replace(&mut self.place, ReadingPlace::Thread(blocks, thread))
        {
            drop(hand_over.send(*values));
        }
    }

    /// What they hold, once all are read.
    pub(super) fn finish(mut self) -> PayloadValues<'a> {
        let block = mem::take(&mut self.block);
        match self.place {
            ReadingPlace::Here(mut values) => {
                values.read_all(&block);
                *values
            }
            ReadingPlace::Thread(blocks, thread) => {
                drop(blocks.send(block));
                drop(blocks);
                thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            }
        }
    }
}
