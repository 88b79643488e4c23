//! A label: the topic and the media type of a record. A section keeps each label once, in a table in its
//! head, and its records say where theirs is.

use std::ops::Range;

use super::record::put_postcard;

/// How many of a table's latest labels are searched for the label of a new record: more than a connection
/// has topic aliases, so that a few bytes from a client never become a topic of a kilobyte twice.
const LABELS_SEARCH_MAX: usize = 64;
const _: () = assert!(LABELS_SEARCH_MAX >= 2 * crate::limits::MQTT_TOPIC_ALIAS_MAXIMUM as usize);

/// The labels of a section while it is filled.
#[derive(Default)]
pub(super) struct LabelTable {
    /// One label after the other, each as postcard: topic, media type.
    bytes: Vec<u8>,
    last: Option<LabelPlace>,
    /// The latest labels other than the last, in no order.
    recent: Vec<LabelPlace>,
    /// Which of them gives way next.
    oldest: usize,
}

/// Where a label is in the table.
#[derive(Clone)]
struct LabelPlace {
    at: u32,
    hash: u32,
    topic: Range<usize>,
    content_type: Range<usize>,
}

impl LabelTable {
    /// The table as it is written.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// What it has on the heap, in bytes.
    pub(super) fn memory_bytes(&self) -> usize {
        self.bytes.capacity() + self.recent.capacity() * size_of::<LabelPlace>()
    }

    /// Returns the place of a label, which it adds if it does not know it.
    #[inline]
    pub(super) fn place(&mut self, topic: &str, content_type: &str) -> u32 {
        if let Some(last) = &self.last
            && self.is_at(last, topic, content_type)
        {
            return last.at;
        }
        let hash = crc32fast::hash(topic.as_bytes());
        let is_it = |known: &LabelPlace| known.hash == hash && self.is_at(known, topic, content_type);
        let found = self.recent.iter().position(is_it);
        let place = match found {
            Some(known) => self.recent.swap_remove(known),
            None => self.add(topic, content_type, hash),
        };
        let at = place.at;
        if let Some(last) = self.last.replace(place) {
            self.remember(last);
        }
        at
    }

    fn remember(&mut self, place: LabelPlace) {
        if self.recent.len() < LABELS_SEARCH_MAX {
            return self.recent.push(place);
        }
        self.recent[self.oldest] = place;
        self.oldest = (self.oldest + 1) % LABELS_SEARCH_MAX;
    }

    #[inline]
    fn is_at(&self, place: &LabelPlace, topic: &str, content_type: &str) -> bool {
        let is_type = if content_type.is_empty() {
            // Most have none. Comparing nothing with nothing by memcmp takes tens of ns where its masked load
            // of a dangling pointer is a fault that the processor has to suppress (AMD, glibc's AVX-512 version).
            place.content_type.is_empty()
        } else {
            &self.bytes[place.content_type.clone()] == content_type.as_bytes()
        };
        is_type && &self.bytes[place.topic.clone()] == topic.as_bytes()
    }

    fn add(&mut self, topic: &str, content_type: &str, hash: u32) -> LabelPlace {
        let at = u32::try_from(self.bytes.len()).expect("in-flight bytes are bounded far below 4 GiB");
        put_postcard(topic, &mut self.bytes);
        let topic = self.bytes.len() - topic.len()..self.bytes.len();
        put_postcard(content_type, &mut self.bytes);
        let content_type = self.bytes.len() - content_type.len()..self.bytes.len();
        LabelPlace { at, hash, topic, content_type }
    }
}

/// The label at a place of a table: topic and media type.
pub(super) fn label_at(table: &[u8], at: u32) -> Option<(&str, &str)> {
    let bytes = table.get(usize::try_from(at).ok()?..)?;
    let (topic, rest) = postcard::take_from_bytes(bytes).ok()?;
    let (content_type, _) = postcard::take_from_bytes(rest).ok()?;
    Some((topic, content_type))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_is_kept_once_however_the_labels_alternate() {
        let mut table = LabelTable::default();
        let topics: Vec<String> =
            (0..LABELS_SEARCH_MAX).map(|n| format!("{n}/{}", "x".repeat(1000))).collect();
        let places: Vec<u32> = topics.iter().map(|topic| table.place(topic, "text/plain")).collect();
        let bytes = table.bytes().len();
        for _ in 0..10 {
            for (topic, place) in topics.iter().zip(&places) {
                assert_eq!(table.place(topic, "text/plain"), *place);
                assert_eq!(label_at(table.bytes(), *place), Some((&topic[..], "text/plain")));
            }
        }
        assert_eq!(table.bytes().len(), bytes);
        let other = table.place(&topics[0], "");
        assert_eq!(label_at(table.bytes(), other), Some((&topics[0][..], "")));
    }

    #[test]
    fn with_more_labels_than_are_searched_each_is_still_right() {
        let mut table = LabelTable::default();
        for n in (0..3 * LABELS_SEARCH_MAX).chain(0..3 * LABELS_SEARCH_MAX) {
            let at = table.place(&n.to_string(), "");
            assert_eq!(label_at(table.bytes(), at), Some((&n.to_string()[..], "")));
        }
        assert_eq!(label_at(table.bytes(), u32::MAX), None);
    }
}
