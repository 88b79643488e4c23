//! A trie of topic filters: finds the filters that match a topic without testing each.
//!
//! Its levels are those of the filters, with the datasource as the first: the filter `spindle/#` of a key
//! of `press-4` is at `press-4/spindle/#`. So one look-up is enough to skip a section of the log whose
//! datasource no filter names.

use std::collections::HashMap;

/// Filters, each with the values entered under it.
pub(super) struct Trie<T> {
    root: TrieNode<T>,
}

struct TrieNode<T> {
    children: HashMap<Box<str>, TrieNode<T>>,
    /// The child for `+`.
    any: Option<Box<TrieNode<T>>>,
    /// The values of filters that end here.
    here: Vec<T>,
    /// The values of filters that continue with `#`: they match this level too.
    below: Vec<T>,
}

impl<T> Default for TrieNode<T> {
    fn default() -> Self {
        Self { children: HashMap::new(), any: None, here: Vec::new(), below: Vec::new() }
    }
}

impl<T> TrieNode<T> {
    fn is_empty(&self) -> bool {
        self.children.is_empty() && self.any.is_none() && self.here.is_empty() && self.below.is_empty()
    }

    /// The child for a filter's level, created if missing.
    fn child(&mut self, level: &str) -> &mut TrieNode<T> {
        match level {
            "+" => self.any.get_or_insert_default(),
            level => self.children.entry(level.into()).or_default(),
        }
    }

    /// The values of the filter whose levels are `levels`, from here on.
    fn values<'l>(&mut self, mut levels: impl Iterator<Item = &'l str>) -> &mut Vec<T> {
        match levels.next() {
            None => &mut self.here,
            Some("#") => &mut self.below,
            Some(level) => self.child(level).values(levels),
        }
    }

    /// Removes values of a filter, and the nodes that become empty.
    fn remove<'l>(&mut self, mut levels: impl Iterator<Item = &'l str>, gone: &mut dyn FnMut(&T) -> bool) {
        match levels.next() {
            None => self.here.retain(|value| !gone(value)),
            Some("#") => self.below.retain(|value| !gone(value)),
            Some("+") => {
                let Some(child) = &mut self.any else { return };
                child.remove(levels, gone);
                if child.is_empty() {
                    self.any = None;
                }
            }
            Some(level) => {
                let Some(child) = self.children.get_mut(level) else { return };
                child.remove(levels, gone);
                if child.is_empty() {
                    self.children.remove(level);
                }
            }
        }
    }

    fn visit(&self, topic: Option<&str>, found: &mut impl FnMut(&T)) {
        self.below.iter().for_each(&mut *found);
        let Some(topic) = topic else {
            return self.here.iter().for_each(found);
        };
        let (level, rest) = match topic.split_once('/') {
            Some((level, rest)) => (level, Some(rest)),
            None => (topic, None),
        };
        if let Some(child) = self.children.get(level) {
            child.visit(rest, found);
        }
        if let Some(child) = &self.any {
            child.visit(rest, found);
        }
    }
}

impl<T> Default for Trie<T> {
    fn default() -> Self {
        Self { root: TrieNode::default() }
    }
}

impl<T> Trie<T> {
    /// Whether there is no filter in it.
    pub(super) fn is_empty(&self) -> bool {
        self.root.is_empty()
    }

    /// The values that were entered under `filter`, to be added to.
    pub(super) fn values(&mut self, filter: &str) -> &mut Vec<T> {
        self.root.values(filter.split('/'))
    }

    /// Removes the values of `filter` for which `gone` holds.
    pub(super) fn remove(&mut self, filter: &str, mut gone: impl FnMut(&T) -> bool) {
        self.root.remove(filter.split('/'), &mut gone);
    }

    /// The filters that can match a topic of `datasource`.
    pub(super) fn for_datasource(&self, datasource: &str) -> DatasourceFilters<'_, T> {
        DatasourceFilters {
            all: &self.root.below,
            named: self.root.children.get(datasource),
            any: self.root.any.as_deref(),
        }
    }
}

/// The parts of a [`Trie`] that concern one datasource.
pub(super) struct DatasourceFilters<'a, T> {
    all: &'a [T],
    named: Option<&'a TrieNode<T>>,
    any: Option<&'a TrieNode<T>>,
}

impl<T> DatasourceFilters<'_, T> {
    /// Whether no filter can match.
    pub(super) fn is_empty(&self) -> bool {
        self.all.is_empty() && self.named.is_none() && self.any.is_none()
    }

    /// Calls `found` with each value of each filter that matches `topic`.
    pub(super) fn visit(&self, topic: &str, mut found: impl FnMut(&T)) {
        self.all.iter().for_each(&mut found);
        for node in [self.named, self.any].into_iter().flatten() {
            node.visit(Some(topic), &mut found);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::filter::TopicFilter;

    fn found(trie: &Trie<usize>, datasource: &str, topic: &str) -> Vec<usize> {
        let mut values = Vec::new();
        trie.for_datasource(datasource).visit(topic, |value| values.push(*value));
        values.sort_unstable();
        values
    }

    proptest! {
        #[test]
        fn it_finds_the_filters_that_match_and_no_others(
            filters in prop::collection::vec("(a|b|\\+)(/(a|b||\\+)){0,3}(/#)?|#", 0..12),
            removed in prop::collection::vec(any::<bool>(), 12),
            topics in prop::collection::vec("(a|b|)(/(a|b|)){0,3}", 1..8),
        ) {
            let mut trie = Trie::default();
            for (n, filter) in filters.iter().enumerate() {
                trie.values(filter).push(n);
            }
            for (n, filter) in filters.iter().enumerate().filter(|(n, _)| removed[*n]) {
                trie.remove(filter, |value| *value == n);
            }
            for topic in topics {
                for datasource in ["a", "b", "c"] {
                    let whole = format!("{datasource}/{topic}");
                    let matching: Vec<usize> = (0..filters.len())
                        .filter(|n| !removed[*n])
                        .filter(|n| TopicFilter::new(&filters[*n]).expect("a filter").matches(&whole))
                        .collect();
                    prop_assert_eq!(&found(&trie, datasource, &topic), &matching);
                    prop_assert!(matching.is_empty() || !trie.for_datasource(datasource).is_empty());
                }
            }
        }
    }

    #[test]
    fn nothing_is_left_of_filters_that_were_taken_out() {
        let mut trie = Trie::default();
        for filter in ["a/b/c", "a/+/c", "a/#", "#", "+/b"] {
            trie.values(filter).push(1);
        }
        for filter in ["a/b/c", "a/+/c", "a/#", "#", "+/b", "never/there"] {
            trie.remove(filter, |_| true);
        }
        assert!(trie.root.is_empty());
    }
}
