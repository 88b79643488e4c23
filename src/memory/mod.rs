//! The memory budget: one count of the bytes that clients make the gateway hold, as they are in memory. What a
//! request brings is charged while it is read and decompressed, while its draft is built and waits for the log, and
//! what it is answered until the client has taken it.
//!
//! Every charge has owners: a key and its datasource, or the address of a stranger and all strangers together. No
//! owner may have more than its share, which is far less than the whole, so that nobody can take the memory of
//! others. An owner that holds little may go on when the whole is used up, from a reserve that is kept for that.
//!
//! A charge that is refused is told to the client (HTTP, NATS), or the client is read from again when there is room
//! (MQTT). Nobody waits while holding what others wait for: a request that cannot grow ends, and what MQTT has read
//! goes to the log, which frees it.

mod charge;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::limits::{
    MEMORY_BYTES_PER_ADDRESS_MAX, MEMORY_LIGHT_BYTES_MAX, MEMORY_RESERVE_BYTES, MEMORY_STRANGERS_BYTES_MAX,
};
use crate::message::{DatasourceId, KeyId};
use crate::network::source_of;
use crate::scheduler::polite_lock;

pub use charge::{MemoryAccount, MemoryCharge};

/// The bytes that clients make the gateway hold. Cheap to clone.
#[derive(Clone)]
pub struct MemoryBudget(Arc<BudgetState>);

struct BudgetState {
    /// What all charges together may be.
    bytes_max: AtomicUsize,
    /// What the charges of one key, or of one datasource, may be.
    share_bytes_max: AtomicUsize,
    all: MemoryUse,
    owners: Mutex<OwnerTable>,
}

/// The owners with an account. An entry whose owner has none left goes when the table is cleared up.
#[derive(Default)]
struct OwnerTable {
    uses: HashMap<MemoryOwner, Weak<OwnerUse>>,
    /// How many entries there may be before those without an account are removed.
    clear_up_at: usize,
}

/// Who is charged.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum MemoryOwner {
    /// A key.
    Key(KeyId),
    /// A datasource, with all its keys.
    Datasource(DatasourceId),
    /// The address of clients without a valid key.
    Address(IpAddr),
    /// All clients without a valid key.
    Strangers,
}

/// The charges of one owner.
struct OwnerUse {
    owner: MemoryOwner,
    held: MemoryUse,
}

/// Bytes that are charged, and who waits for them.
#[derive(Default)]
struct MemoryUse {
    bytes: AtomicUsize,
    /// Those who wait, by what for: what is enough for one kind is not for another, and one of each is told.
    queues: [WaitingQueue; WaitKind::COUNT],
}

/// What somebody waits for.
#[derive(Clone, Copy)]
enum WaitKind {
    /// To take in anything.
    Room,
    /// To prepare anything to be sent.
    RoomToSend,
    /// A number of bytes.
    Bytes,
}

impl WaitKind {
    const COUNT: usize = 3;

    /// It may take one part in so many of a share.
    fn parts(self) -> usize {
        match self {
            Self::RoomToSend => charge::SEND_PARTS,
            Self::Room | Self::Bytes => 1,
        }
    }
}

#[derive(Default)]
struct WaitingQueue {
    waiting: AtomicUsize,
    freed: Notify,
    /// What may be held for those who wait to go on, and how many wait for that.
    held_max: Mutex<BTreeMap<usize, usize>>,
}

impl WaitingQueue {
    fn has_waiting(&self) -> bool {
        self.waiting.load(Ordering::SeqCst) > 0
    }

    /// Tells one of those that wait, if anybody does.
    fn tell_one(&self) {
        if self.has_waiting() {
            self.freed.notify_one();
        }
    }

    /// Whether any of those that wait could go on with so much held.
    fn has_one_for(&self, held: usize) -> bool {
        let is_enough = |held_max: &BTreeMap<usize, usize>| {
            held_max.last_key_value().is_some_and(|(&held_max, _)| held <= held_max)
        };
        self.has_waiting() && is_enough(&polite_lock(&self.held_max))
    }
}

/// A charge does not fit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryExceeded {
    /// Whose share is used up; `None` for the memory of all clients together.
    pub owner: Option<MemoryOwner>,
    /// The share, or the whole, in bytes.
    pub bytes_max: usize,
    /// It does not fit even if nothing else is held, so that waiting does not help.
    pub is_too_large: bool,
}

impl fmt::Display for MemoryExceeded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { owner, bytes_max, is_too_large } = self;
        let verb = if *is_too_large { "takes" } else { "would take" };
        match owner {
            None => write!(
                f,
                "it {verb} the memory of all clients over {bytes_max} bytes (intake.memory_bytes_max)"
            ),
            Some(MemoryOwner::Key(id)) => {
                write!(
                    f,
                    "it {verb} key {id} over its share of {bytes_max} bytes of memory (intake.memory_share_bytes_max)"
                )
            }
            Some(MemoryOwner::Datasource(id)) => write!(
                f,
                "it {verb} datasource {id} over its share of {bytes_max} bytes of memory (intake.memory_share_bytes_max)"
            ),
            Some(MemoryOwner::Address(address)) => {
                write!(
                    f,
                    "it {verb} clients without a key at {address} over their share of {bytes_max} bytes of memory"
                )
            }
            Some(MemoryOwner::Strangers) => {
                write!(f, "it {verb} clients without a key over their share of {bytes_max} bytes of memory")
            }
        }
    }
}

impl MemoryUse {
    fn bytes(&self) -> usize {
        self.bytes.load(Ordering::SeqCst)
    }

    /// Adds `bytes` if no more than `bytes_max` are charged then.
    fn try_add(&self, bytes: usize, bytes_max: usize) -> bool {
        let more = |held: usize| held.checked_add(bytes).filter(|&sum| sum <= bytes_max);
        self.bytes.fetch_update(Ordering::SeqCst, Ordering::SeqCst, more).is_ok()
    }

    fn add(&self, bytes: usize) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    fn release(&self, bytes: usize) {
        self.bytes.fetch_sub(bytes, Ordering::SeqCst);
        self.queues.iter().for_each(WaitingQueue::tell_one);
    }

    /// Takes back what was added for a charge that is refused. Nothing is freed by it; but somebody may have looked while
    /// it was there, and have room now.
    fn take_back(&self, bytes: usize) {
        self.bytes.fetch_sub(bytes, Ordering::SeqCst);
        [WaitKind::Room, WaitKind::RoomToSend, WaitKind::Bytes]
            .into_iter()
            .for_each(|kind| self.tell_who_fits(kind));
    }

    /// Tells one of those that wait for a kind, if there is room for any of them.
    fn tell_who_fits(&self, kind: WaitKind) {
        let queue = &self.queues[kind as usize];
        if queue.has_one_for(self.bytes()) {
            queue.freed.notify_one();
        }
    }
}

impl MemoryBudget {
    /// A budget of `bytes_max` in all, and `share_bytes_max` for each key and each datasource.
    pub fn new(bytes_max: usize, share_bytes_max: usize) -> Self {
        let (bytes_max, share_bytes_max) = (AtomicUsize::new(bytes_max), AtomicUsize::new(share_bytes_max));
        let (all, owners) = (MemoryUse::default(), Mutex::default());
        Self(Arc::new(BudgetState { bytes_max, share_bytes_max, all, owners }))
    }

    /// Sets other limits, for what is charged from now on.
    pub fn set_limits(&self, bytes_max: usize, share_bytes_max: usize) {
        self.0.bytes_max.store(bytes_max, Ordering::Relaxed);
        self.0.share_bytes_max.store(share_bytes_max, Ordering::Relaxed);
    }

    /// Bytes that are charged at the moment.
    pub fn held_bytes(&self) -> usize {
        self.0.all.bytes()
    }

    /// The account of a key and its datasource. A key for all datasources has a share of its own alone.
    pub fn account_of_key(&self, key_id: KeyId, datasource: &DatasourceId) -> Arc<MemoryAccount> {
        let mut owners = polite_lock(&self.0.owners);
        let key = self.owner(&mut owners, MemoryOwner::Key(key_id));
        let datasource = (!datasource.is_all())
            .then(|| self.owner(&mut owners, MemoryOwner::Datasource(datasource.clone())));
        Arc::new(MemoryAccount::new(self.0.clone(), key, datasource))
    }

    /// The account of a client without a valid key: of its address, or for IPv6 of its /64.
    pub fn account_of_stranger(&self, address: IpAddr) -> Arc<MemoryAccount> {
        let mut owners = polite_lock(&self.0.owners);
        let address = self.owner(&mut owners, MemoryOwner::Address(source_of(address)));
        let strangers = self.owner(&mut owners, MemoryOwner::Strangers);
        Arc::new(MemoryAccount::new(self.0.clone(), address, Some(strangers)))
    }

    /// The account of clients without a valid key whose address is not known.
    pub fn account_of_strangers(&self) -> Arc<MemoryAccount> {
        let mut owners = polite_lock(&self.0.owners);
        let strangers = self.owner(&mut owners, MemoryOwner::Strangers);
        Arc::new(MemoryAccount::new(self.0.clone(), strangers, None))
    }

    fn owner(&self, owners: &mut OwnerTable, owner: MemoryOwner) -> Arc<OwnerUse> {
        if let Some(known) = owners.uses.get(&owner).and_then(Weak::upgrade) {
            return known;
        }
        if owners.uses.len() >= owners.clear_up_at {
            owners.uses.retain(|_, held| held.strong_count() > 0);
            owners.clear_up_at = 2 * owners.uses.len() + 64;
        }
        let held = Arc::new(OwnerUse { owner: owner.clone(), held: MemoryUse::default() });
        owners.uses.insert(owner, Arc::downgrade(&held));
        held
    }
}

impl BudgetState {
    /// What an owner may hold.
    fn share_of(&self, owner: &MemoryOwner) -> usize {
        match owner {
            MemoryOwner::Key(_) | MemoryOwner::Datasource(_) => self.share_bytes_max.load(Ordering::Relaxed),
            MemoryOwner::Address(_) => MEMORY_BYTES_PER_ADDRESS_MAX,
            MemoryOwner::Strangers => MEMORY_STRANGERS_BYTES_MAX,
        }
    }

    /// What all charges together may be, for an owner that holds so much: the reserve is for those that hold little.
    fn bytes_max_of(&self, owner_bytes: usize) -> usize {
        let is_light = owner_bytes <= MEMORY_LIGHT_BYTES_MAX;
        self.bytes_max.load(Ordering::Relaxed) + if is_light { MEMORY_RESERVE_BYTES } else { 0 }
    }
}
