//! What the payloads of stored records hold: the newest values and the samples, read from each payload once. In a large
//! transaction, which storage makes when it is behind, a thread of its own reads them while the rows are inserted.

use std::mem;
use std::sync::LazyLock;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::{self, Scope, ScopedJoinHandle};

use super::ids::RowIds;
use super::newest::{NewestValues, read_members};
use super::samples::{NewSamples, OpenChunks, SampledRecord};
use crate::message::RecordRef;
use crate::shares::processors;
use crate::values::samples::JsonMember;

/// Payloads that are handed to the other thread at once.
const BLOCK_PAYLOADS: usize = 512;
/// Payloads of a transaction that are read without another thread: at the tail of the log there are no more.
const ALONE_PAYLOADS_MAX: usize = 4096;
/// Blocks that wait for the other thread at most.
const WAITING_BLOCKS_MAX: usize = 16;

/// Whether a thread of its own has a processor of its own.
static HAS_PROCESSORS: LazyLock<bool> = LazyLock::new(|| processors() > 1);

/// The payload of a record that was inserted.
pub(super) struct StoredPayload<'a> {
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

    fn read(&mut self, payload: &StoredPayload<'a>) {
        let StoredPayload { record, row, text } = payload;
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

    fn read_all(&mut self, payloads: &[StoredPayload<'a>]) {
        payloads.iter().for_each(|payload| self.read(payload));
    }
}

/// Reads the payloads of one transaction.
pub(super) struct PayloadReading<'scope, 'env, 'a> {
    scope: &'scope Scope<'scope, 'env>,
    place: ReadingPlace<'scope, 'a>,
    block: Vec<StoredPayload<'a>>,
    count: usize,
}

/// Where payloads are read.
enum ReadingPlace<'scope, 'a> {
    Here(PayloadValues<'a>),
    Thread(SyncSender<Vec<StoredPayload<'a>>>, ScopedJoinHandle<'scope, PayloadValues<'a>>),
}

impl<'scope, 'env, 'a: 'scope> PayloadReading<'scope, 'env, 'a> {
    pub(super) fn new(scope: &'scope Scope<'scope, 'env>, values: PayloadValues<'a>) -> Self {
        Self { scope, place: ReadingPlace::Here(values), block: Vec::new(), count: 0 }
    }

    /// Takes the next payload.
    #[inline]
    pub(super) fn add(&mut self, payload: StoredPayload<'a>) {
        self.block.push(payload);
        if self.block.len() == BLOCK_PAYLOADS {
            self.end_block();
        }
    }

    fn end_block(&mut self) {
        self.count += self.block.len();
        let next = Vec::with_capacity(self.block.capacity());
        let block = mem::replace(&mut self.block, next);
        match &mut self.place {
            ReadingPlace::Here(values) => {
                values.read_all(&block);
                if self.count >= ALONE_PAYLOADS_MAX && *HAS_PROCESSORS {
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
        let (blocks, taken) = sync_channel::<Vec<StoredPayload<'a>>>(WAITING_BLOCKS_MAX);
        let reading = move || {
            let mut values = handed.recv().expect("whoever begins this thread hands them over");
            taken.iter().for_each(|block| values.read_all(&block));
            values
        };
        let begun = thread::Builder::new().name("payloads".to_owned()).spawn_scoped(self.scope, reading);
        let Ok(thread) = begun else { return };
        if let ReadingPlace::Here(values) =
            mem::replace(&mut self.place, ReadingPlace::Thread(blocks, thread))
        {
            drop(hand_over.send(values));
        }
    }

    /// What they hold, once all are read.
    pub(super) fn finish(mut self) -> PayloadValues<'a> {
        let block = mem::take(&mut self.block);
        match self.place {
            ReadingPlace::Here(mut values) => {
                values.read_all(&block);
                values
            }
            ReadingPlace::Thread(blocks, thread) => {
                drop(blocks.send(block));
                drop(blocks);
                thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            }
        }
    }
}
