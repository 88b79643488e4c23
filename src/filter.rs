//! An MQTT topic filter (MQTT 5 section 4.7), with which a client selects one or more topics. `+` stands
//! for one level, `#` at the end for all that follow and for the level before it.

use crate::limits::TOPIC_BYTES_MAX;
use crate::message::holds_key;

/// A topic filter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TopicFilter(String);

/// A text that is no topic filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "a topic filter has 1 to {TOPIC_BYTES_MAX} bytes, none of them an API key's; '+' stands alone in its \
     level, '#' alone in the last one"
)]
pub struct FilterError;

impl TopicFilter {
    /// Checks and takes a filter.
    ///
    /// # Errors
    /// [`FilterError`] when a wildcard shares its level or `#` is not the last one, and for a text
    /// that is empty, longer than any topic, or holds an API key: filters are stored.
    pub fn new(filter: &str) -> Result<Self, FilterError> {
        if filter.is_empty() || filter.len() > TOPIC_BYTES_MAX || holds_key(filter) {
            return Err(FilterError);
        }
        let mut levels = filter.split('/').peekable();
        while let Some(level) = levels.next() {
            let sound = match level {
                "+" => true,
                "#" => levels.peek().is_none(),
                _ => !level.contains(['+', '#']),
            };
            if !sound {
                return Err(FilterError);
            }
        }
        Ok(Self(filter.to_owned()))
    }

    /// The filter as the client gave it.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The one topic that this filter names, if it has no wildcard.
    pub fn exact(&self) -> Option<&str> {
        (!self.0.contains(['+', '#'])).then_some(&*self.0)
    }

    /// Whether the filter selects `topic`.
    pub fn matches(&self, topic: &str) -> bool {
        self.matches_levels(topic.split('/'))
    }

    /// Whether the filter selects the topic of these levels.
    pub fn matches_levels<'t>(&self, mut levels: impl Iterator<Item = &'t str>) -> bool {
        for wanted in self.0.split('/') {
            match (wanted, levels.next()) {
                ("#", _) => return true,
                ("+", Some(_)) => {}
                (wanted, Some(level)) if wanted == level => {}
                _ => return false,
            }
        }
        levels.next().is_none()
    }

    /// Whether the filter selects every topic that `other` selects.
    pub fn covers(&self, other: &TopicFilter) -> bool {
        let (mut levels, mut others) = (self.0.split('/'), other.0.split('/'));
        loop {
            match (levels.next(), others.next()) {
                (Some("#"), _) | (None, None) => return true,
                (Some("+"), Some(level)) if level != "#" => {}
                (Some(level), Some(other)) if level == other => {}
                _ => return false,
            }
        }
    }

    /// Whether there is a topic that both filters select.
    pub fn overlaps(&self, other: &TopicFilter) -> bool {
        let (mut levels, mut others) = (self.0.split('/'), other.0.split('/'));
        loop {
            match (levels.next(), others.next()) {
                (Some("#"), _) | (_, Some("#")) | (None, None) => return true,
                (Some("+"), Some(_)) | (Some(_), Some("+")) => {}
                (Some(level), Some(other)) if level == other => {}
                _ => return false,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Topics of few levels, so that many filters meet; the empty one, which nobody can publish to, is one too.
    fn topics() -> Vec<String> {
        let levels = ["", "a", "b"];
        let two = levels.iter().flat_map(|a| levels.map(|b| format!("{a}/{b}")));
        let three: Vec<String> = two.clone().flat_map(|ab| levels.map(|c| format!("{ab}/{c}"))).collect();
        levels.iter().map(|a| (*a).to_owned()).chain(two).chain(three).collect()
    }

    fn any_filter() -> impl Strategy<Value = TopicFilter> {
        let level = prop::sample::select(vec!["", "a", "b", "+"]);
        let end = prop::sample::select(vec!["a", "b", "+", "#"]);
        (prop::collection::vec(level, 0..=2), end).prop_map(|(levels, end)| {
            let levels: Vec<&str> = levels.into_iter().chain([end]).collect();
            TopicFilter::new(&levels.join("/")).expect("a filter")
        })
    }

    proptest! {
        #[test]
        fn a_filter_covers_another_if_it_selects_all_its_topics(one in any_filter(), other in any_filter()) {
            let topics = topics();
            let both = topics.iter().any(|topic| one.matches(topic) && other.matches(topic));
            prop_assert_eq!(one.overlaps(&other), both, "{:?} {:?}", &one, &other);
            let all = topics.iter().filter(|topic| other.matches(topic)).all(|topic| one.matches(topic));
            // A level has more names than those here, and a topic more levels.
            let covers = one.covers(&other);
            prop_assert!(!covers || all, "{:?} {:?}", &one, &other);
            let is_literal = !other.as_str().contains(['+', '#']);
            prop_assert!(!is_literal || covers == all, "{:?} {:?}", &one, &other);
        }
    }

    #[test]
    fn what_a_filter_covers_and_what_it_does_not() {
        let covers = |one, other| {
            let [one, other] = [one, other].map(|text| TopicFilter::new(text).expect("a filter"));
            one.covers(&other)
        };
        for (one, other) in [
            ("#", "a/b/#"),
            ("a/#", "a"),
            ("a/#", "a/#"),
            ("a/#", "a/+/b"),
            ("+/b", "a/b"),
            ("+/+", "a/+"),
            ("a", "a"),
        ] {
            assert!(covers(one, other), "{one} {other}");
        }
        for (one, other) in [
            ("a/#", "#"),
            ("a/+", "a/#"),
            ("a/+", "a"),
            ("a", "a/#"),
            ("a/b", "a/+"),
            ("+", "#"),
            ("a/b", "a/b/c"),
        ] {
            assert!(!covers(one, other), "{one} {other}");
        }
    }

    fn matches(filter: &str, topic: &str) -> bool {
        TopicFilter::new(filter).expect("a filter").matches(topic)
    }

    #[test]
    fn filters_match_as_the_specification_has_it() {
        // The examples of MQTT 5, sections 4.7.1.2 and 4.7.1.3.
        for topic in
            ["sport/tennis/player1", "sport/tennis/player1/ranking", "sport/tennis/player1/score/wimbledon"]
        {
            assert!(matches("sport/tennis/player1/#", topic), "{topic}");
        }
        assert!(matches("sport/#", "sport"));
        assert!(matches("#", "sport/tennis"));
        assert!(matches("sport/tennis/+", "sport/tennis/player1"));
        assert!(!matches("sport/tennis/+", "sport/tennis/player1/ranking"));
        assert!(!matches("sport/+", "sport"));
        assert!(matches("sport/+", "sport/"));
        assert!(matches("+/+", "/finance"));
        assert!(matches("/+", "/finance"));
        assert!(!matches("+", "/finance"));
        assert!(matches("+/tennis/#", "sport/tennis"));
        assert!(matches("a/b", "a/b"));
        for other in ["a/bc", "a", "a/b/c", "a/b/"] {
            assert!(!matches("a/b", other), "{other}");
        }
    }

    #[test]
    fn a_wildcard_stands_alone_in_its_level_and_a_hash_is_last() {
        for good in ["#", "+", "a/+/b", "+/+/#", "/", "a//b"] {
            assert!(TopicFilter::new(good).is_ok(), "{good:?}");
        }
        for bad in ["", "a#", "a+", "a/#/b", "#/a", "a/b+/c", &"a".repeat(TOPIC_BYTES_MAX + 1)] {
            assert_eq!(TopicFilter::new(bad), Err(FilterError), "{bad:?}");
        }
    }

    #[test]
    fn a_filter_without_wildcards_is_one_topic() {
        assert_eq!(TopicFilter::new("a/b").expect("a filter").exact(), Some("a/b"));
        assert_eq!(TopicFilter::new("a/+").expect("a filter").exact(), None);
        assert_eq!(TopicFilter::new("a/#").expect("a filter").exact(), None);
    }
}
