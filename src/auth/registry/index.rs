//! The index finds the key for a digest. Every presented key is looked up here, among a million that do not
//! fit in the processor's cache, so the cost of a lookup is its number of cache misses. Here that is
//! two, one for the slot and one for the key, which holds its whole digest; a general map has a node in
//! between. Slots and keys are in huge pages, because a TLB miss on a small page would add one more
//! memory access each.
//!
//! The table uses open addressing with linear probing: the digest's first bytes choose the slot where a
//! search begins, and at most half of the slots are in use. A slot, once in use, belongs to its digest for
//! good: it points to the key, or marks it as revoked. Readers take no lock. Changes are made one at a
//! time; [`seize`] frees removed keys and outgrown tables when no reader can hold them any more.

use parking_lot::Mutex;
use std::alloc::{Layout, alloc_zeroed, handle_alloc_error};
use std::collections::HashMap;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};

use headgate_format::key::Digest;
use seize::{Collector, Guard, reclaim};

use super::key::Key;

/// The smallest number of slots in a table.
const KEY_SLOTS_MIN: usize = 64;
/// The size of a huge page, where the system has them.
const HUGE_PAGE_BYTES: usize = 2 << 20;
/// The smallest table for which huge pages are requested.
const HUGE_PAGES_TABLE_BYTES_MIN: usize = 2 * HUGE_PAGE_BYTES;
/// The smallest number of keys that makes a huge page worthwhile: a quarter of what would fit.
const HUGE_PAGE_KEYS_MIN: usize = HUGE_PAGE_BYTES / (4 * size_of::<Key>());

/// Keys by their digests, revoked ones among them.
pub(super) struct KeyIndex {
    collector: Collector,
    table: AtomicPtr<KeyTable>,
    /// The number of slots in use. Locked by every change.
    used: Mutex<usize>,
}

/// The result of looking up a digest.
pub(in crate::auth) enum KeyLookup {
    /// The key, which may have expired.
    Key(Arc<Key>),
    /// The key existed and was revoked.
    Revoked,
}

/// The slots; their number is a power of two.
struct KeyTable(Box<[KeySlot]>);

/// Empty as long as `key` is null.
#[derive(Default)]
struct KeySlot {
    /// The digest's first bytes. No two keys share them, because they begin with the key's id. Written once,
    /// before `key`.
    head: AtomicU64,
    /// From [`Arc::into_raw`], or [`REVOKED_KEY`].
    key: AtomicPtr<Key>,
}

/// Marks a revoked key. Never dereferenced.
const REVOKED_KEY: *mut Key = ptr::without_provenance_mut(align_of::<Key>());

impl KeyIndex {
    /// An empty index with room for this many digests.
    pub(super) fn with_capacity(digests: usize) -> Self {
        let table = Box::into_raw(Box::new(KeyTable::for_digests(digests)));
        Self { collector: Collector::new(), table: AtomicPtr::new(table), used: Mutex::new(0) }
    }

    /// Looks up a digest.
    pub(super) fn find(&self, digest: &Digest) -> Option<KeyLookup> {
        self.find_head(digest_head(digest), |key| key.digest == *digest)
    }

    /// Looks up the one key whose digest begins so.
    pub(super) fn find_beginning(&self, beginning: [u8; 8]) -> Option<KeyLookup> {
        self.find_head(head_of(beginning), |_| true)
    }

    #[inline]
    fn find_head(&self, head: u64, is_it: impl Fn(&Key) -> bool) -> Option<KeyLookup> {
        let guard = self.collector.enter();
        let table = guard.protect(&self.table, Ordering::Acquire);
        // SAFETY: a table exists from the beginning, and is retired only after it was replaced; the guard
        // keeps it alive until this returns.
        let table = unsafe { &*table };
        for slot in table.slots_from(head) {
            let key = guard.protect(&slot.key, Ordering::Acquire);
            if key.is_null() {
                return None;
            }
            if slot.head.load(Ordering::Relaxed) != head {
                continue;
            }
            if key == REVOKED_KEY {
                return Some(KeyLookup::Revoked);
            }
            // SAFETY: a pointer that is neither null nor `REVOKED_KEY` came from `Arc::into_raw`, and its
            // reference count is released only by `release_key`, which cannot run while the guard lives.
            unsafe {
                if is_it(&*key) {
                    Arc::increment_strong_count(key);
                    return Some(KeyLookup::Key(Arc::from_raw(key)));
                }
            }
        }
        None
    }

    /// Sets the key with this digest, or with `None` marks it as revoked. Every lookup that begins after this
    /// has returned sees the change.
    pub(super) fn set(&self, digest: &Digest, key: Option<Arc<Key>>) {
        debug_assert!(key.as_ref().is_none_or(|key| key.digest == *digest), "a key stands at its own digest");
        let mut used = self.used.lock();
        let guard = self.collector.enter();
        let mut table = guard.protect(&self.table, Ordering::Acquire);
        // SAFETY: as in `find`; and nobody else replaces the table while `used` is locked.
        if unsafe { &*table }.is_full(*used) {
            let larger = Box::into_raw(Box::new(unsafe { &*table }.copy_for(*used + 1)));
            self.table.store(larger, Ordering::Release);
            // SAFETY: it came from `Box::into_raw`, and no later reader finds it. Its slots are not dropped:
            // the larger table owns their keys now.
            unsafe { guard.defer_retire(table, reclaim::boxed) };
            table = larger;
        }
        let head = digest_head(digest);
        // SAFETY: as above.
        let slots = unsafe { &*table }.slots_from(head);
        let mut free = slots.map(|slot| (slot, slot.key.load(Ordering::Relaxed)));
        let (slot, before) = free
            .find(|(slot, key)| key.is_null() || slot.head.load(Ordering::Relaxed) == head)
            .expect("half of the slots are empty");
        let after = key.map_or(REVOKED_KEY, |key| Arc::into_raw(key).cast_mut());
        if before.is_null() {
            slot.head.store(head, Ordering::Relaxed);
            *used += 1;
        }
        slot.key.store(after, Ordering::Release);
        if !before.is_null() && before != REVOKED_KEY {
            // SAFETY: it came from `Arc::into_raw`, and no later reader finds it.
            unsafe { guard.defer_retire(before, release_key) };
        }
    }

    /// Moves the memory of keys into huge pages, where many keys are close together. To be called once all
    /// keys of a registry are set.
    pub(super) fn gather(&self) {
        let guard = self.collector.enter();
        let table = guard.protect(&self.table, Ordering::Acquire);
        // SAFETY: as in `find`.
        let keys = unsafe { &*table }.0.iter().map(|slot| slot.key.load(Ordering::Acquire));
        let mut keys_of_page = HashMap::<_, usize>::new();
        for key in keys.filter(|key| !key.is_null() && *key != REVOKED_KEY) {
            *keys_of_page.entry(key.map_addr(|at| at - at % HUGE_PAGE_BYTES)).or_default() += 1;
        }
        for (page, keys) in keys_of_page {
            if keys >= HUGE_PAGE_KEYS_MIN {
                collapse_huge_page(page.cast());
            }
        }
    }
}

impl Drop for KeyIndex {
    fn drop(&mut self) {
        // SAFETY: `&mut self` excludes all others, and the table came from `Box::into_raw`.
        let table = unsafe { Box::from_raw(*self.table.get_mut()) };
        for slot in table.0 {
            let key = slot.key.into_inner();
            if !key.is_null() && key != REVOKED_KEY {
                // SAFETY: it came from `Arc::into_raw`.
                drop(unsafe { Arc::from_raw(key) });
            }
        }
    }
}

impl KeyTable {
    fn for_digests(digests: usize) -> Self {
        let slots = (2 * digests).next_power_of_two().max(KEY_SLOTS_MIN);
        let layout = Layout::array::<KeySlot>(slots).expect("a table is far smaller than memory can be");
        // SAFETY: the layout is not empty; a slot of zeros is an empty slot; the box owns the allocation and
        // has the same layout.
        let slots = unsafe {
            let first = alloc_zeroed(layout).cast::<KeySlot>();
            if first.is_null() {
                handle_alloc_error(layout);
            }
            advise_huge_pages(first.cast(), layout.size());
            Box::from_raw(ptr::slice_from_raw_parts_mut(first, slots))
        };
        Self(slots)
    }

    /// All slots in probing order, beginning at the slot for these first bytes of a digest.
    fn slots_from(&self, head: u64) -> impl Iterator<Item = &KeySlot> {
        let mask = self.0.len() - 1;
        #[expect(clippy::cast_possible_truncation, reason = "any bits of it will do")]
        let first = head as usize;
        (0..self.0.len()).map(move |step| &self.0[(first.wrapping_add(step)) & mask])
    }

    /// Whether one more digest would fill more than half of the slots.
    fn is_full(&self, used: usize) -> bool {
        2 * (used + 1) > self.0.len()
    }

    /// A larger copy with the same entries, and room for twice this many digests.
    fn copy_for(&self, digests: usize) -> Self {
        let larger = Self::for_digests(2 * digests);
        for slot in &self.0 {
            let (head, key) = (slot.head.load(Ordering::Relaxed), slot.key.load(Ordering::Relaxed));
            if key.is_null() {
                continue;
            }
            let empty = larger.slots_from(head).find(|slot| slot.key.load(Ordering::Relaxed).is_null());
            let empty = empty.expect("it is larger");
            empty.head.store(head, Ordering::Relaxed);
            empty.key.store(key, Ordering::Relaxed);
        }
        larger
    }
}

/// Requests huge pages for memory that nobody has touched yet: with more small pages than the TLB holds,
/// translating an address costs as much as reading it. Has no effect if no huge pages are available.
fn advise_huge_pages(first: *mut libc::c_void, bytes: usize) {
    #[cfg(target_os = "linux")]
    {
        const SMALL_PAGE_BYTES: usize = 4096;
        let skipped = first.addr().next_multiple_of(SMALL_PAGE_BYTES) - first.addr();
        if let Some(bytes) = bytes.checked_sub(skipped).filter(|bytes| *bytes >= HUGE_PAGES_TABLE_BYTES_MIN) {
            // SAFETY: the range is within the allocation, and the advice does not change its contents.
            unsafe { libc::madvise(first.byte_add(skipped), bytes, libc::MADV_HUGEPAGE) };
        }
    }
}

/// Moves this range of small pages into one huge page, with all that is in it. Has no effect if that fails.
fn collapse_huge_page(page: *mut libc::c_void) {
    #[cfg(target_os = "linux")]
    // SAFETY: the advice does not change the contents, and has no effect where no memory is mapped.
    unsafe {
        libc::madvise(page, HUGE_PAGE_BYTES, libc::MADV_COLLAPSE);
    }
    #[cfg(not(target_os = "linux"))]
    let _ = page;
}

/// Releases the index's reference to a key.
///
/// # Safety
/// `key` came from [`Arc::into_raw`] and is not used again.
unsafe fn release_key(key: *mut Key, _collector: &Collector) {
    // SAFETY: as the caller says.
    drop(unsafe { Arc::from_raw(key) });
}

/// The digest's first bytes serve as its hash: they are uniform, and only brute force finds a chosen one.
fn digest_head(digest: &Digest) -> u64 {
    head_of(digest.beginning())
}

fn head_of(beginning: [u8; 8]) -> u64 {
    u64::from_le_bytes(beginning)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::sync::atomic::AtomicBool;

    use proptest::prelude::*;

    use super::super::key::{KeyAttributes, Rotation};
    use super::*;
    use crate::auth::Scopes;
    use crate::message::DatasourceId;

    fn key(digest: Digest) -> Arc<Key> {
        Arc::new(Key::from(KeyAttributes {
            digest,
            datasource: DatasourceId::all(),
            scopes: Scopes::from_slice(&[]),
            label: "",
            created_at: 0,
            expires_at: None,
            rotation: Rotation::default(),
            limits: None,
        }))
    }

    /// Digests whose first bytes lie close together, so that they meet in the table.
    fn digest(number: u16) -> Digest {
        let mut digest = Digest([0; 32]);
        digest.0[..2].copy_from_slice(&number.to_le_bytes());
        digest
    }

    fn is_what(found: Option<KeyLookup>, expected: Option<&Option<Arc<Key>>>) -> bool {
        match (found, expected) {
            (None, None) | (Some(KeyLookup::Revoked), Some(None)) => true,
            (Some(KeyLookup::Key(found)), Some(Some(expected))) => Arc::ptr_eq(&found, expected),
            _ => false,
        }
    }

    proptest! {
        #[test]
        fn it_says_what_a_map_would(changes in prop::collection::vec((0..400_u16, any::<bool>()), 0..600)) {
            let (index, mut map) = (KeyIndex::with_capacity(0), HashMap::new());
            for (number, revoked) in changes {
                let digest = digest(number);
                let key = (!revoked).then(|| key(digest));
                index.set(&digest, key.clone());
                map.insert(number, key);
            }
            index.gather();
            for number in 0..400 {
                prop_assert!(is_what(index.find(&digest(number)), map.get(&number)), "{}", number);
            }
        }
    }

    #[test]
    fn a_digest_that_begins_like_a_key_s_is_another() {
        let index = KeyIndex::with_capacity(1);
        let mut like = digest(7);
        index.set(&like, Some(key(like)));
        like.0[31] = 1;
        assert!(index.find(&like).is_none());
    }

    #[test]
    fn keys_are_let_go_when_they_are_revoked_and_when_the_index_goes() {
        let keys: Vec<_> = (0..500).map(|number| key(digest(number))).collect();
        let index = KeyIndex::with_capacity(10);
        for key in &keys {
            index.set(&key.digest, Some(Arc::clone(key)));
        }
        assert!(keys.iter().all(|key| Arc::strong_count(key) == 2));
        for key in &keys[..250] {
            index.set(&key.digest, None);
        }
        drop(index);
        assert!(keys.iter().all(|key| Arc::strong_count(key) == 1));
    }

    #[test]
    fn lookups_beside_changes_find_each_key_or_that_it_was_revoked() {
        let index = KeyIndex::with_capacity(0);
        let done = AtomicBool::new(false);
        index.set(&digest(0), Some(key(digest(0))));
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    let (mut newest, mut seen) = (0, 0_u64);
                    while !done.load(Ordering::Relaxed) || seen == 0 {
                        // Changes come in order: behind one that is there all are.
                        for number in 0..=newest {
                            let found = index.find(&digest(number)).expect("was there before");
                            if let KeyLookup::Key(key) = found {
                                assert_eq!(key.digest, digest(number));
                                seen += 1;
                            }
                        }
                        while newest < u16::MAX && index.find(&digest(newest + 1)).is_some() {
                            newest += 1;
                        }
                    }
                });
            }
            for number in 1..6_000 {
                index.set(&digest(number), Some(key(digest(number))));
                if number % 3 == 0 {
                    index.set(&digest(number / 2), None);
                }
            }
            done.store(true, Ordering::Relaxed);
        });
    }
}
