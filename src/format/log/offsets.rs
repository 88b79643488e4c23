//! The offsets of an appended section: where its records are in the log.

use std::sync::Arc;

use crate::message::Offset;

/// The offsets of a section's records, in their order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offsets {
    first: Offset,
    records: u32,
    /// The offset of each record, unless they are consecutive: other gateways append to the same log.
    each: Option<Arc<[Offset]>>,
}

impl Offsets {
    /// `records` consecutive offsets.
    pub fn consecutive(first: Offset, records: u32) -> Self {
        Self { first, records, each: None }
    }

    /// The given offsets, in the order of the records.
    pub fn from_each(each: &[Offset]) -> Self {
        let first = each.first().copied().unwrap_or_default();
        let follow = each.iter().zip(first..).all(|(offset, expected)| *offset == expected);
        let records = u32::try_from(each.len()).expect("in-flight bytes bound the records");
        Self { first, records, each: (!follow).then(|| each.into()) }
    }

    /// How many records there are.
    pub fn records(&self) -> u32 {
        self.records
    }

    /// The first record's offset.
    pub fn first(&self) -> Offset {
        self.first
    }

    /// The last record's offset.
    pub fn last(&self) -> Offset {
        self.nth(self.records.saturating_sub(1) as usize)
    }

    /// The offset of one record, counted from 0.
    pub fn nth(&self, nth: usize) -> Offset {
        match &self.each {
            Some(each) => each.get(nth).or(each.last()).copied().unwrap_or(self.first),
            None => self.first + nth as Offset,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_are_those_of_each_record_whether_they_follow_each_other_or_not() {
        assert_eq!(Offsets::from_each(&[7, 8, 9]), Offsets::consecutive(7, 3));
        let apart = Offsets::from_each(&[7, 9, 12]);
        assert_eq!((apart.first(), apart.last(), apart.records()), (7, 12, 3));
        assert_eq!((0..3).map(|nth| apart.nth(nth)).collect::<Vec<_>>(), [7, 9, 12]);
        assert_eq!(Offsets::consecutive(7, 3).last(), 9);
    }
}
