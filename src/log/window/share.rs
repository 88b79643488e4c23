//! The shares of datasources in the window: the message ids of each, and how many exchanges it has open.

use std::collections::HashMap;

use crate::log::once::OnceId;
use crate::log::shelf::{KnownId, ShareNumber, Shelf};

/// The part of all ids that is made room for at once when there are too many: a level is not found for each one.
const LEVEL_ROOM_DIVISOR: usize = 64;

/// The shares of all datasources that have known ids.
#[derive(Default)]
pub(super) struct WindowShares {
    numbers: HashMap<Box<str>, ShareNumber>,
    /// By number; `None` for a number that is free.
    shares: Vec<Option<DatasourceShare>>,
    /// How many message ids there are in all.
    messages: usize,
}

/// What one datasource has in the window.
#[derive(Default)]
struct DatasourceShare {
    messages: Shelf,
    exchanges: usize,
}

impl DatasourceShare {
    fn is_empty(&self) -> bool {
        self.messages.len() == 0 && self.exchanges == 0
    }
}

impl WindowShares {
    /// The number of a datasource's share. Makes one if it has none.
    pub(super) fn number(&mut self, datasource: &str) -> ShareNumber {
        if let Some(number) = self.numbers.get(datasource) {
            return *number;
        }
        let free = self.shares.iter().position(Option::is_none).unwrap_or(self.shares.len());
        if free == self.shares.len() {
            self.shares.push(None);
        }
        self.shares[free] = Some(DatasourceShare::default());
        let number = ShareNumber(u32::try_from(free).expect("there are far fewer datasources"));
        self.numbers.insert(datasource.into(), number);
        number
    }

    fn share(&self, datasource: &str) -> Option<&DatasourceShare> {
        let number = self.numbers.get(datasource)?;
        self.shares.get(number.0 as usize)?.as_ref()
    }

    fn share_mut(&mut self, number: ShareNumber) -> Option<&mut DatasourceShare> {
        self.shares.get_mut(number.0 as usize)?.as_mut()
    }

    /// A message id of a datasource, if it is known.
    pub(super) fn message(&self, datasource: &str, id: OnceId) -> Option<&KnownId> {
        self.share(datasource)?.messages.get(id)
    }

    /// How many exchanges a datasource has open.
    pub(super) fn exchanges(&self, datasource: &str) -> usize {
        self.share(datasource).map_or(0, |share| share.exchanges)
    }

    /// Adds a message id to the share of its owner, which then has `len_max` at most. Returns how many it lost.
    pub(super) fn insert_message(&mut self, known: KnownId, len_max: usize) -> u64 {
        let Some(share) = self.share_mut(known.owner) else { return 0 };
        let before = share.messages.len();
        share.messages.insert(known);
        let mut evicted = 0;
        while share.messages.len() > len_max && share.messages.pop_oldest().is_some() {
            evicted += 1;
        }
        let after = share.messages.len();
        self.messages = self.messages + after - before;
        evicted
    }

    /// Counts an exchange of a datasource as open, or no more.
    pub(super) fn count_exchange(&mut self, owner: ShareNumber, opened: bool) {
        if let Some(share) = self.share_mut(owner) {
            share.exchanges = if opened { share.exchanges + 1 } else { share.exchanges.saturating_sub(1) };
        }
    }

    /// Nobody has an exchange open any more.
    pub(super) fn forget_exchanges(&mut self) {
        self.shares.iter_mut().flatten().for_each(|share| share.exchanges = 0);
    }

    /// Removes the message ids that are over their age, and shares without any ids.
    pub(super) fn expire(&mut self, is_over_age: impl Fn(u32) -> bool) {
        for share in self.shares.iter_mut().flatten() {
            while let Some(oldest) = share.messages.oldest()
                && is_over_age(oldest.entry.since_s)
            {
                share.messages.pop_oldest();
                self.messages -= 1;
            }
        }
        let shares = &mut self.shares;
        self.numbers.retain(|_, number| {
            let share = &mut shares[number.0 as usize];
            share.take_if(|share| share.is_empty());
            share.is_some()
        });
        while let Some(None) = self.shares.last() {
            self.shares.pop();
        }
    }

    /// If there are more than `len_max` message ids, those who have most lose their oldest, until none of them has
    /// more than a common level. Returns how many are lost.
    pub(super) fn level(&mut self, len_max: usize) -> u64 {
        if self.messages <= len_max {
            return 0;
        }
        let mut lens: Vec<usize> = self.shares.iter().flatten().map(|share| share.messages.len()).collect();
        lens.sort_unstable();
        let mut room = len_max - len_max / LEVEL_ROOM_DIVISOR;
        let mut level = 0;
        for (nth, len) in lens.iter().enumerate() {
            level = room / (lens.len() - nth);
            if *len > level {
                break;
            }
            room -= len;
        }
        let mut evicted = 0;
        for share in self.shares.iter_mut().flatten() {
            // The newest is always known.
            while share.messages.len() > level.max(1) && share.messages.pop_oldest().is_some() {
                evicted += 1;
            }
        }
        self.messages -= evicted;
        evicted as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::once::{KeptRange, OnceEntry};
    use crate::message::DatasourceId;

    fn insert(shares: &mut WindowShares, datasource: &str, n: u32, len_max: usize) -> u64 {
        let owner = shares.number(datasource);
        let kept = KeptRange { first_offset: n.into(), records: 1 };
        let entry = OnceEntry { id: id(datasource, n), kept, since_s: n };
        shares.insert_message(KnownId { entry, digest: None, owner }, len_max)
    }

    fn id(datasource: &str, n: u32) -> OnceId {
        OnceId::of_message(&DatasourceId::new(datasource).expect("slug"), &n.to_string())
    }

    fn known(shares: &WindowShares, datasource: &str) -> Vec<u32> {
        (0..1000).filter(|n| shares.message(datasource, id(datasource, *n)).is_some()).collect()
    }

    #[test]
    fn who_has_too_many_loses_the_oldest_of_its_own() {
        let mut shares = WindowShares::default();
        assert_eq!((0..3).map(|n| insert(&mut shares, "oven", n, 3)).sum::<u64>(), 0);
        assert_eq!((0..5).map(|n| insert(&mut shares, "press-4", n, 3)).sum::<u64>(), 2);
        assert_eq!(insert(&mut shares, "press-4", 3, 3), 0, "a known one takes no more room");
        assert_eq!((known(&shares, "oven"), known(&shares, "press-4")), (vec![0, 1, 2], vec![2, 3, 4]));
        assert_eq!(shares.messages, 6);
    }

    #[test]
    fn when_there_are_too_many_in_all_those_who_have_most_lose() {
        let mut shares = WindowShares::default();
        for (datasource, len) in [("a", 400), ("b", 10), ("c", 300), ("d", 64)] {
            (0..len).for_each(|n| _ = insert(&mut shares, datasource, n, 1000));
        }
        assert_eq!(shares.level(774), 0);
        assert_eq!(shares.level(640), 774 - 630);
        assert_eq!(known(&shares, "a"), (122..400).collect::<Vec<_>>());
        assert_eq!(known(&shares, "c"), (22..300).collect::<Vec<_>>());
        assert_eq!((known(&shares, "b").len(), known(&shares, "d").len()), (10, 64));
        assert_eq!(shares.messages, 630);
        assert_eq!(shares.level(3), 630 - 4);
    }

    #[test]
    fn a_share_without_ids_is_no_share() {
        let mut shares = WindowShares::default();
        (0..4).for_each(|n| _ = insert(&mut shares, "oven", n, 10));
        let owner = shares.number("press-4");
        shares.count_exchange(owner, true);
        shares.expire(|since_s| since_s < 2);
        assert_eq!((known(&shares, "oven"), shares.exchanges("press-4")), (vec![2, 3], 1));
        shares.expire(|_| true);
        assert_eq!((shares.messages, shares.numbers.len(), shares.shares.len()), (0, 1, 2));
        shares.count_exchange(owner, false);
        shares.expire(|_| true);
        assert_eq!((shares.numbers.len(), shares.shares.len()), (0, 0));
    }
}
