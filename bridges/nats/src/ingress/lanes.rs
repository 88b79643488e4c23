//! Messages that wait for their batch, a lane for each sender. A batch takes from every lane in turn, so that whoever
//! sends more than is taken waits behind itself alone.

use std::collections::{HashMap, VecDeque};

use super::IngressSettings;
use crate::inlet::{LaneMemory, Parcel, ParcelOverflow};

/// The part of a batch (one in so many) that one lane fills at most while it is formed: what arrives for another lane
/// meanwhile is in the next one.
const LANE_BATCH_PART: usize = 4;

/// The steps in which the memory of a lane is counted.
const LANE_MEMORY_STEP_BYTES: usize = 16 << 10;

/// The waiting messages of one sender, in the order of their arrival.
#[derive(Default)]
struct ParcelLane {
    parcels: VecDeque<Parcel>,
    bytes: usize,
    /// What these bytes are counted against, and how many are counted.
    memory: Option<Box<dyn LaneMemory>>,
    held: usize,
    /// For how many answers about its sender it waits.
    introductions: usize,
}

impl ParcelLane {
    /// Counts `bytes`, in steps if there is room for one.
    fn try_hold(&mut self, bytes: usize) -> bool {
        let Some(memory) = &mut self.memory else { return true };
        let stepped = bytes.next_multiple_of(LANE_MEMORY_STEP_BYTES);
        if bytes <= self.held && self.held <= stepped + LANE_MEMORY_STEP_BYTES {
            return true;
        }
        let tried = [stepped, bytes].into_iter().find(|bytes| memory.try_hold(*bytes));
        self.held = tried.unwrap_or(self.held);
        tried.is_some()
    }
}

/// All waiting messages.
#[derive(Default)]
pub(super) struct ParcelLanes {
    lanes: HashMap<u64, ParcelLane>,
    /// Those that are not empty, the one whose turn it is first.
    turns: VecDeque<u64>,
    messages: usize,
    bytes: usize,
}

impl ParcelLanes {
    /// Takes a message, or gives it back if its sender has too many waiting: at most as many as there is room left for
    /// others, and as the lane's `memory` has room for.
    pub(super) fn push(
        &mut self,
        lane: u64,
        parcel: Parcel,
        settings: &IngressSettings,
        memory: impl FnOnce(&Parcel) -> Option<Box<dyn LaneMemory>>,
    ) -> Result<(), (Parcel, ParcelOverflow)> {
        let (messages, bytes) = self.lanes.get(&lane).map_or((0, 0), |of| (of.parcels.len(), of.bytes));
        let weight = parcel.weight();
        let has_room = self.messages + messages < settings.waiting_messages_max
            && self.bytes + bytes + weight <= settings.waiting_bytes_max;
        if !has_room {
            return Err((parcel, ParcelOverflow::Waiting));
        }
        let of = self.lanes.entry(lane).or_default();
        if of.memory.is_none() {
            of.memory = memory(&parcel);
        }
        if !of.try_hold(bytes + weight) {
            self.remove_idle(lane);
            return Err((parcel, ParcelOverflow::Memory { bytes: weight }));
        }
        if of.parcels.is_empty() {
            self.turns.push_back(lane);
        }
        of.bytes += weight;
        of.parcels.push_back(parcel);
        self.messages += 1;
        self.bytes += weight;
        Ok(())
    }

    /// Holds a lane back until as many calls of [`ParcelLanes::resume`].
    pub(super) fn pause(&mut self, lane: u64) {
        self.lanes.entry(lane).or_default().introductions += 1;
    }

    /// Lets a lane go on.
    pub(super) fn resume(&mut self, lane: u64) {
        if let Some(of) = self.lanes.get_mut(&lane) {
            of.introductions = of.introductions.saturating_sub(1);
            self.remove_idle(lane);
        }
    }

    /// Forgets a lane in which nothing waits, and for which nothing is waited for.
    fn remove_idle(&mut self, lane: u64) {
        if self.lanes.get(&lane).is_some_and(|of| of.parcels.is_empty() && of.introductions == 0) {
            self.lanes.remove(&lane);
        }
    }

    /// Whether none waits.
    pub(super) fn is_empty(&self) -> bool {
        self.messages == 0
    }

    /// Takes the next batch.
    pub(super) fn take_batch(&mut self, settings: &IngressSettings) -> Option<Vec<Parcel>> {
        let (mut batch, mut bytes) = (Vec::new(), 0);
        let messages_of_lane_max = (settings.batch_messages_max / LANE_BATCH_PART).max(1);
        let bytes_of_lane_max = settings.batch_bytes_max / LANE_BATCH_PART;
        for _ in 0..self.turns.len() {
            let Some(lane) = self.turns.pop_front() else { break };
            let Some(of) = self.lanes.get_mut(&lane) else { continue };
            if of.introductions > 0 {
                self.turns.push_back(lane);
                continue;
            }
            let (mut taken, mut taken_bytes) = (0, 0);
            let mut is_full = false;
            while let Some(parcel) = of.parcels.front() {
                let weight = parcel.weight();
                is_full = batch.len() >= settings.batch_messages_max
                    || !batch.is_empty() && bytes + weight > settings.batch_bytes_max;
                let has_share =
                    taken == 0 || taken < messages_of_lane_max && taken_bytes + weight <= bytes_of_lane_max;
                if is_full || !has_share {
                    break;
                }
                let Some(parcel) = of.parcels.pop_front() else { break };
                (taken, taken_bytes, bytes) = (taken + 1, taken_bytes + weight, bytes + weight);
                of.bytes -= weight;
                batch.push(parcel);
            }
            // Fewer are always held.
            of.try_hold(of.bytes);
            if of.parcels.is_empty() {
                self.remove_idle(lane);
            } else if is_full && taken == 0 {
                self.turns.push_front(lane);
            } else {
                self.turns.push_back(lane);
            }
            if is_full {
                break;
            }
        }
        self.messages -= batch.len();
        self.bytes -= bytes;
        (!batch.is_empty()).then_some(batch)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn parcel(payload: &str) -> Parcel {
        Parcel::new(b"a.b", None, b"", payload.as_bytes())
    }

    fn payloads(batch: &[Parcel]) -> Vec<String> {
        batch.iter().map(|parcel| String::from_utf8_lossy(parcel.payload()).into_owned()).collect()
    }

    #[test]
    fn whoever_floods_waits_behind_itself_alone() {
        let (settings, mut lanes) = (IngressSettings::small(), ParcelLanes::default());
        let flood = (0..1_000)
            .filter(|n| lanes.push(1, parcel(&format!("f{n}")), &settings, |_| None).is_ok())
            .count();
        assert_eq!(flood, 50, "half of the room");
        for n in 0..3 {
            assert!(lanes.push(2, parcel(&format!("o{n}")), &settings, |_| None).is_ok());
        }
        assert!(lanes.push(3, parcel("p0"), &settings, |_| None).is_ok());
        let batch = lanes.take_batch(&settings).expect("many wait");
        assert_eq!(payloads(&batch), ["f0", "f1", "o0", "o1", "p0"]);
        let batch = lanes.take_batch(&settings).expect("many wait");
        assert_eq!(payloads(&batch), ["f2", "f3", "o2"]);
    }

    #[test]
    fn each_lane_keeps_its_order_and_nothing_is_lost() {
        let (settings, mut lanes) = (IngressSettings::small(), ParcelLanes::default());
        for n in 0..60 {
            assert!(lanes.push(n % 5, parcel(&format!("{}-{:02}", n % 5, n)), &settings, |_| None).is_ok());
        }
        let mut all = Vec::new();
        while let Some(batch) = lanes.take_batch(&settings) {
            assert!(batch.len() <= settings.batch_messages_max);
            all.extend(payloads(&batch));
        }
        assert!(lanes.is_empty() && lanes.bytes == 0 && lanes.lanes.is_empty());
        assert_eq!(all.len(), 60);
        for lane in 0..5 {
            let of: Vec<&String> = all.iter().filter(|one| one.starts_with(&format!("{lane}-"))).collect();
            assert!(of.is_sorted() && of.len() == 12, "{of:?}");
        }
    }

    #[test]
    fn a_lane_that_is_held_back_keeps_its_messages_and_delays_no_other() {
        let (settings, mut lanes) = (IngressSettings::small(), ParcelLanes::default());
        lanes.pause(1);
        lanes.pause(1);
        for (lane, text) in [(1, "a"), (2, "b"), (1, "c")] {
            assert!(lanes.push(lane, parcel(text), &settings, |_| None).is_ok());
        }
        assert_eq!(payloads(&lanes.take_batch(&settings).expect("one of another lane")), ["b"]);
        lanes.resume(1);
        assert!(lanes.take_batch(&settings).is_none() && !lanes.is_empty());
        lanes.resume(1);
        assert_eq!(payloads(&lanes.take_batch(&settings).expect("both")), ["a", "c"]);
        lanes.pause(3);
        lanes.resume(3);
        assert!(lanes.lanes.is_empty() && lanes.turns.is_empty());
    }

    #[test]
    fn one_message_over_the_bytes_of_a_batch_is_a_batch_of_its_own() {
        let (mut settings, mut lanes) = (IngressSettings::small(), ParcelLanes::default());
        settings.batch_bytes_max = 16;
        for lane in 0..3 {
            assert!(
                lanes
                    .push(lane, parcel("a payload that is longer than a batch"), &settings, |_| None)
                    .is_ok()
            );
        }
        for _ in 0..3 {
            assert_eq!(lanes.take_batch(&settings).map(|batch| batch.len()), Some(1));
        }
        assert!(lanes.take_batch(&settings).is_none());
    }

    /// So many bytes at most, of all lanes that have one of these.
    struct SharedMemory(Arc<AtomicUsize>, usize);

    impl LaneMemory for SharedMemory {
        fn try_hold(&mut self, bytes: usize) -> bool {
            let others = self.0.load(Ordering::Relaxed) - self.1;
            let fits = bytes <= self.1 || others + bytes <= 100_000;
            if fits {
                self.0.store(others + bytes, Ordering::Relaxed);
                self.1 = bytes;
            }
            fits
        }
    }

    impl Drop for SharedMemory {
        fn drop(&mut self) {
            self.0.fetch_sub(self.1, Ordering::Relaxed);
        }
    }

    #[test]
    fn what_waits_is_counted_before_it_is_taken_and_what_does_not_fit_is_refused() {
        let (settings, mut lanes) = (IngressSettings::small(), ParcelLanes::default());
        let held = Arc::new(AtomicUsize::new(0));
        let memory = |_: &Parcel| Some(Box::new(SharedMemory(held.clone(), 0)) as Box<dyn LaneMemory>);
        let large = "x".repeat(9_000);
        let mut refused = None;
        for n in 0..40 {
            refused = lanes.push(n % 2, parcel(&large), &settings, memory).err();
            assert!(held.load(Ordering::Relaxed) >= lanes.bytes, "everything that waits is counted");
            if refused.is_some() {
                break;
            }
        }
        let (parcel_back, full) = refused.expect("there is room for few");
        assert_eq!(full, ParcelOverflow::Memory { bytes: parcel_back.weight() });
        assert!((8..12).contains(&lanes.messages), "{}", lanes.messages);
        // A third lane that finds no room leaves nothing behind.
        assert!(lanes.push(7, parcel(&large), &settings, memory).is_err());
        assert_eq!(lanes.lanes.len(), 2);
        while lanes.take_batch(&settings).is_some() {
            assert!(held.load(Ordering::Relaxed) >= lanes.bytes);
        }
        assert_eq!((held.load(Ordering::Relaxed), lanes.lanes.len()), (0, 0));
    }
}
