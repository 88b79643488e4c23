//! A trie of topic filters: finds the filters that match a topic without testing each.
//!
//! Its levels are those of the filters, with the datasource as the first: the filter `spindle/#` of a key
//! of `press-4` is at `press-4/spindle/#`. So one look-up is enough to skip a section of the log whose
//! datasource no filter names.

use std::collections::HashMap;
use std::ops::ControlFlow;

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

    /// Goes through the values of the filters that match what is left of a topic. Breaks when `found` does, or
    /// when `steps` are spent.
    fn visit(
        &self,
        topic: Option<&str>,
        steps: &mut usize,
        found: &mut impl FnMut(&T) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        visit_values(&self.below, steps, found)?;
        let Some(topic) = topic else { return visit_values(&self.here, steps, found) };
        let (level, rest) = match topic.split_once('/') {
            Some((level, rest)) => (level, Some(rest)),
            None => (topic, None),
        };
        if let Some(child) = self.children.get(level) {
            child.visit(rest, steps, found)?;
        }
        if let Some(child) = &self.any {
            child.visit(rest, steps, found)?;
        }
        ControlFlow::Continue(())
    }
}

/// One step, and one for each value.
fn visit_values<T>(
    values: &[T],
    steps: &mut usize,
    found: &mut impl FnMut(&T) -> ControlFlow<()>,
) -> ControlFlow<()> {
    *steps = steps.saturating_sub(1 + values.len());
    if *steps == 0 { ControlFlow::Break(()) } else { values.iter().try_for_each(found) }
}

impl<T> Default for Trie<T> {
    fn default() -> Self {
        Self { root: TrieNode::default() }
    }
}

impl<T> Trie<T> {
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

    /// Calls `found` with each value of each filter that matches `topic`, until it breaks. Takes the steps that
    /// this needs from `steps`; when there are none left, it stops, and `steps` is 0.
    pub(super) fn visit(&self, topic: &str, steps: &mut usize, mut found: impl FnMut(&T) -> ControlFlow<()>) {
        let mut visit = || {
            visit_values(self.all, steps, &mut found)?;
            [self.named, self.any]
                .into_iter()
                .flatten()
                .try_for_each(|node| node.visit(Some(topic), steps, &mut found))
        };
        let _ = visit();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::filter::TopicFilter;

    fn found(trie: &Trie<usize>, datasource: &str, topic: &str) -> Vec<usize> {
        let mut values = Vec::new();
        trie.for_datasource(datasource).visit(topic, &mut usize::MAX.clone(), |value| {
            values.push(*value);
            ControlFlow::Continue(())
        });
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
    fn a_look_up_ends_when_its_steps_are_spent() {
        let mut trie = Trie::default();
        for n in 0..100 {
            trie.values(&format!("a/{}", ["+/", "b/"].map(|level| level.repeat(n % 7)).concat())).push(n);
            trie.values("a/#").push(n);
        }
        let (mut steps, mut seen) = (50, 0);
        trie.for_datasource("a").visit("b/b", &mut steps, |_| {
            seen += 1;
            ControlFlow::Continue(())
        });
        assert_eq!((steps, seen), (0, 0), "a hundred values are too many");
        let mut steps = 103;
        trie.for_datasource("a").visit("b/b", &mut steps, |_| {
            seen += 1;
            if seen == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        assert_eq!((steps, seen), (1, 3), "whoever asks may end it");
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
