//! Numbers that look random and follow from a seed, for the model tests.

/// SplitMix64: small, and the same on every machine.
pub struct SeededRandom(pub u64);

impl SeededRandom {
    /// A number below `end`.
    pub fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((z ^ (z >> 31)) % end as u64).expect("below a usize")
    }

    /// True in so many of a hundred cases.
    pub fn percent(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    /// A number from 1 to `most`, small.
    pub fn packet_id(&mut self, most: u16) -> u16 {
        1 + u16::try_from(self.below(most.into())).expect("small")
    }
}
