//! A chunk of samples: those of one topic from a run of its records, as one text in `sample_chunks`.
//!
//! A row for each sample would cost more than the record that it is from: a chunk costs as much as one row. Its text is
//! JSON, so that the view `samples` can take it apart: `{"KEY":[[OFFSET,TIME,VALUE],…],…}`, without any blanks. Offsets count
//! from the chunk's `first_offset` and times, in microseconds, from its `base_us`; every list has a sample. What an object of JSON
//! has twice cannot be told apart, so that each key is there once.

use std::collections::HashMap;
use std::fmt::Write as _;

use memchr::memmem;

use super::chunk_numbers::NumberScanner;

/// One sample of a chunk.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(in crate::consume) struct ChunkSample {
    pub(in crate::consume) offset: i64,
    pub(in crate::consume) at: i64,
    pub(in crate::consume) value: f64,
}

/// What offsets and times in a chunk count from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::consume) struct ChunkBase {
    pub(in crate::consume) first_offset: i64,
    pub(in crate::consume) base_us: i64,
}

/// The lists of a chunk's text: the JSON of each key, and its samples without the outer brackets.
pub(in crate::consume) fn chunk_lists(text: &str) -> impl Iterator<Item = (&str, &str)> {
    let mut rest = text.strip_prefix('{').unwrap_or_default();
    std::iter::from_fn(move || {
        let key_bytes = json_text_bytes(rest)?;
        let (key, list) = rest.split_at(key_bytes);
        let list = list.strip_prefix(":[")?;
        // Numbers have no brackets: this is the end of the last sample.
        let end = memmem::find(list.as_bytes(), b"]]")? + 1;
        rest = list[end + 1..].strip_prefix(',').unwrap_or_default();
        Some((key, &list[..end]))
    })
}

/// How many bytes the JSON text at the beginning takes, with its quotes.
fn json_text_bytes(json: &str) -> Option<usize> {
    let bytes = json.as_bytes();
    let mut at = usize::from(bytes.first() == Some(&b'"'));
    while at > 0 {
        match bytes.get(at)? {
            b'"' => return Some(at + 1),
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
    None
}

/// The samples of a list in a chunk with this base. What is no sample is left out.
pub(in crate::consume) fn list_samples(list: &str, base: ChunkBase) -> impl Iterator<Item = ChunkSample> {
    let mut scanner = NumberScanner::new(list);
    std::iter::from_fn(move || {
        while !scanner.is_at_end() {
            match scan_sample(&mut scanner) {
                Some((offset, at, value)) => {
                    return Some(ChunkSample {
                        offset: base.first_offset.saturating_add(offset),
                        at: base.base_us.saturating_add(at),
                        value,
                    });
                }
                None => scanner.skip_behind(b"],"),
            }
        }
        None
    })
}

/// Scans `[OFFSET,TIME,VALUE]` and the comma behind it.
fn scan_sample(scanner: &mut NumberScanner<'_>) -> Option<(i64, i64, f64)> {
    scanner.expect(b'[')?;
    let offset = scanner.integer()?;
    scanner.expect(b',')?;
    let at = scanner.integer()?;
    scanner.expect(b',')?;
    let value = scanner.number()?;
    scanner.expect(b']')?;
    if !scanner.is_at_end() {
        scanner.expect(b',')?;
    }
    Some((offset, at, value))
}

/// The JSON of a key, as chunks have it.
pub(in crate::consume) fn key_json(key: &str) -> String {
    serde_json::Value::from(key).to_string()
}

/// A chunk that is being put together.
pub(super) struct NewChunk {
    pub(super) base: ChunkBase,
    pub(super) last_offset: i64,
    pub(super) oldest_us: i64,
    pub(super) newest_us: i64,
    lists: Vec<ChunkList>,
    /// The position of each key in `lists`.
    places: HashMap<Box<str>, usize>,
    bytes: usize,
}

/// The samples of one key.
struct ChunkList {
    key: Box<str>,
    json: String,
    samples: Vec<u8>,
}

impl NewChunk {
    /// A chunk with this base, whose first record is at `offset`.
    pub(super) fn new(base: ChunkBase, offset: i64) -> Self {
        Self {
            base,
            last_offset: offset,
            oldest_us: i64::MAX,
            newest_us: i64::MIN,
            lists: Vec::new(),
            places: HashMap::new(),
            bytes: 0,
        }
    }

    /// About how many bytes its text has.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// How many keys it has.
    pub(super) fn keys(&self) -> usize {
        self.lists.len()
    }

    /// Adds a sample of a record that is not older than those before. Records of one topic mostly have the same keys in the same
    /// order, so the search begins at the sample's `place` in its record.
    pub(super) fn push(&mut self, place: usize, key: &str, sample: ChunkSample) {
        let place = match self.lists.get(place) {
            Some(list) if *list.key == *key => place,
            _ => self.place_of(key),
        };
        let list = &mut self.lists[place].samples;
        let before = list.len();
        if before > 0 {
            list.push(b',');
        }
        let (offset, at) =
            (sample.offset - self.base.first_offset, sample.at.saturating_sub(self.base.base_us));
        if let Err(error) = serde_json::to_writer(&mut *list, &(offset, at, sample.value)) {
            // Into memory, of numbers.
            tracing::error!(%error, "a sample has no JSON form");
        }
        self.bytes += self.lists[place].samples.len() - before;
        self.last_offset = sample.offset;
        self.oldest_us = self.oldest_us.min(sample.at);
        self.newest_us = self.newest_us.max(sample.at);
    }

    fn place_of(&mut self, key: &str) -> usize {
        if let Some(place) = self.places.get(key) {
            return *place;
        }
        let json = key_json(key);
        self.bytes += json.len() + 4;
        self.places.insert(key.into(), self.lists.len());
        self.lists.push(ChunkList { key: key.into(), json, samples: Vec::new() });
        self.lists.len() - 1
    }

    /// Its text, behind the samples of an `earlier` chunk with the same base.
    pub(super) fn text(&self, earlier: &str) -> String {
        let mut text = String::with_capacity(earlier.len() + self.bytes + 2);
        let mut is_added = vec![false; self.lists.len()];
        for (key, samples) in chunk_lists(earlier) {
            // The JSON of a key is always the same, so that it is found without reading it.
            let more = self.lists.iter().position(|list| list.json == key);
            begin_list(&mut text, key);
            text.push_str(samples);
            if let Some(more) = more {
                is_added[more] = true;
                text.push(',');
                push_ascii(&mut text, &self.lists[more].samples);
            }
            text.push(']');
        }
        for (list, _) in self.lists.iter().zip(is_added).filter(|(_, is_added)| !is_added) {
            begin_list(&mut text, &list.json);
            push_ascii(&mut text, &list.samples);
            text.push(']');
        }
        text.push(if text.is_empty() { '{' } else { '}' });
        text
    }
}

fn begin_list(text: &mut String, key: &str) {
    let begin = if text.is_empty() { '{' } else { ',' };
    let _ = write!(text, "{begin}{key}:[");
}

fn push_ascii(text: &mut String, numbers: &[u8]) {
    text.push_str(std::str::from_utf8(numbers).unwrap_or_default());
}

/// A chunk's text without the samples of some records, and the times and the last offset of what is left. `None` if nothing
/// is.
pub(super) fn without_offsets(
    text: &str,
    base: ChunkBase,
    is_removed: impl Fn(i64) -> bool,
) -> Option<(String, NewChunk)> {
    let mut left = NewChunk::new(base, base.first_offset);
    let mut last_offset = base.first_offset;
    for (place, (key, list)) in chunk_lists(text).enumerate() {
        let Ok(key) = serde_json::from_str::<String>(key) else { continue };
        for sample in list_samples(list, base).filter(|sample| !is_removed(sample.offset)) {
            left.push(place, &key, sample);
            last_offset = last_offset.max(sample.offset);
        }
    }
    left.last_offset = last_offset;
    (left.bytes > 0).then(|| (left.text(""), left))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: ChunkBase = ChunkBase { first_offset: 100, base_us: 1_000_000 };

    fn samples_of(text: &str, key: &str) -> Vec<(i64, i64, f64)> {
        let key = key_json(key);
        let lists = chunk_lists(text).filter(|(of, _)| **of == *key);
        let samples = lists.flat_map(|(_, list)| list_samples(list, BASE));
        samples.map(|sample| (sample.offset, sample.at, sample.value)).collect()
    }

    fn chunk(samples: &[(&str, i64, i64, f64)]) -> NewChunk {
        let mut chunk = NewChunk::new(BASE, 100);
        for (place, (key, offset, at, value)) in samples.iter().enumerate() {
            chunk.push(place, key, ChunkSample { offset: *offset, at: *at, value: *value });
        }
        chunk
    }

    #[test]
    fn samples_come_back_as_they_were_written_and_together_with_later_ones() {
        let first =
            chunk(&[("t", 100, 1_000_000, 21.5), ("a\"]],\\", 100, 0, -0.0), ("t", 101, 2_000_000, 1e300)]);
        let text = first.text("");
        assert!(serde_json::from_str::<serde_json::Value>(&text).is_ok(), "{text}");
        assert_eq!(samples_of(&text, "t"), [(100, 1_000_000, 21.5), (101, 2_000_000, 1e300)]);
        assert_eq!(samples_of(&text, "a\"]],\\"), [(100, 0, -0.0)]);
        assert_eq!((first.oldest_us, first.newest_us, first.last_offset), (0, 2_000_000, 101));

        let both = chunk(&[("new", 102, 7, 1.0), ("t", 103, 8, 0.1)]).text(&text);
        assert_eq!(samples_of(&both, "t"), [(100, 1_000_000, 21.5), (101, 2_000_000, 1e300), (103, 8, 0.1)]);
        assert_eq!(samples_of(&both, "new"), [(102, 7, 1.0)]);
        assert_eq!(chunk_lists(&both).count(), 3);
    }

    #[test]
    fn what_is_taken_out_leaves_the_rest() {
        let text =
            chunk(&[("t", 100, 5, 1.0), ("u", 100, 5, 2.0), ("t", 101, 9, 3.0), ("t", 102, 7, 4.0)]).text("");
        let (left, of) = without_offsets(&text, BASE, |offset| offset == 100).expect("two are left");
        assert_eq!(samples_of(&left, "t"), [(101, 9, 3.0), (102, 7, 4.0)]);
        assert_eq!(chunk_lists(&left).count(), 1);
        assert_eq!((of.oldest_us, of.newest_us, of.last_offset, of.base), (7, 9, 102, BASE));
        assert!(without_offsets(&text, BASE, |_| true).is_none());
    }

    #[test]
    fn a_text_that_is_none_has_no_samples() {
        for text in ["", "{", "{}", "[]", "{\"t\":", "{\"t\":[", "{\"t\":[[1,2,3]", "{\"t", "{\"t\\"] {
            assert_eq!(chunk_lists(text).count(), 0, "{text}");
        }
        assert_eq!(list_samples("[1,2]", BASE).count(), 0);
        assert_eq!(list_samples("[1,2,x],[1,2,3]", BASE).count(), 1);
    }
}
