//! A subject is NATS' word for a topic. This module converts between the two like nats-server's own MQTT
//! (`server/mqtt.go`): a `/` between levels is a `.` between tokens, and a `.` within a level is `//`. So
//! `spindle/temp` is `spindle.temp`, and `v1.2/temp` is `v1//2.temp`.
//!
//! The mapping is one to one. A topic that has no subject does not cross: one with an empty level (a subject
//! has no empty token), with white space (which ends a subject on the wire), or with a level `*` or `>`
//! (wildcards of NATS). The fronts refuse such a message for good; egress leaves such a record out and counts
//! it.

use std::fmt::Write;

use crate::message::DatasourceId;

/// The first token of a subject, which tells its purpose. A subject is `{space}.{datasource}.{topic}`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SubjectSpace {
    /// Messages from devices.
    Ingest,
    /// The validated stream.
    Stream,
    /// Records in quarantine. Consumers of the stream do not see them.
    Quarantine,
}

/// Why a topic or subject cannot be converted. The text is for the person who chose it, and does not repeat
/// it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SubjectError {
    /// White space, or another control character.
    #[error("a topic with white space in it cannot be a NATS subject")]
    Space,
    /// `a//b`, `/a` or `a/`, or the same with dots.
    #[error("a topic with an empty level (a//b, /a, a/) cannot be a NATS subject")]
    EmptyLevel,
    /// A level that is `*` or `>`.
    #[error("a topic with a level '*' or '>' cannot be a NATS subject: those are wildcards there")]
    Wildcard,
    /// A single `/` in a subject.
    #[error("a '/' in a subject is half of '//', which is a '.' in the topic: levels are divided by '.'")]
    LoneSlash,
    /// A subject that names no datasource, or no topic in it.
    #[error("a subject is {{space}}.{{datasource}}.{{topic}}, as in ingest.press-4.spindle.temp")]
    Incomplete,
}

impl SubjectSpace {
    /// The token.
    pub fn as_str(self) -> &'static str {
        match self {
            SubjectSpace::Ingest => "ingest",
            SubjectSpace::Stream => "stream",
            SubjectSpace::Quarantine => "quarantine",
        }
    }

    /// Appends the subject of a topic in a datasource to `to`. An error may leave a part of it there.
    ///
    /// # Errors
    /// [`SubjectError`] for a topic that cannot cross.
    pub fn write_subject(self, datasource: &str, topic: &str, to: &mut String) -> Result<(), SubjectError> {
        to.push_str(self.as_str());
        to.push('.');
        to.push_str(datasource);
        to.push('.');
        write_tokens(topic, to)
    }

    /// The wildcard for all subjects of the space: `{space}.>`.
    pub fn space_wildcard(self) -> String {
        format!("{}.>", self.as_str())
    }

    /// The subject wildcards for the topics that an MQTT filter matches. They do not overlap, and together
    /// may match more than the filter. The filter is one within the datasource; without a datasource, its
    /// first level matches datasources. Empty if the filter matches no topic that crosses.
    pub fn filter_wildcards(self, datasource: Option<&DatasourceId>, filter: &str) -> Vec<String> {
        let mut subject = self.as_str().to_owned();
        if let Some(datasource) = datasource {
            // Writing to a string does not fail.
            let _ = write!(subject, ".{datasource}");
        }
        for level in filter.split('/') {
            match level {
                "+" => subject.push_str(".*"),
                // `#` matches its parent level too.
                "#" if filter != "#" => return vec![subject.clone(), subject + ".>"],
                "#" => return vec![subject + ".>"],
                level => {
                    subject.push('.');
                    if write_tokens(level, &mut subject).is_err() {
                        return Vec::new();
                    }
                }
            }
        }
        vec![subject]
    }

    /// Splits a subject of this space into its datasource and the tokens of its topic, for [`topic_from_tokens`].
    /// Checks neither of them.
    ///
    /// # Errors
    /// [`SubjectError::Incomplete`] for a subject of another space, or with too few tokens.
    pub fn split(self, subject: &str) -> Result<(&str, &str), SubjectError> {
        let rest = subject.strip_prefix(self.as_str()).and_then(|rest| rest.strip_prefix('.'));
        let parts = rest.and_then(|rest| rest.split_once('.'));
        match parts {
            Some((datasource, tokens)) if !datasource.is_empty() && !tokens.is_empty() => {
                Ok((datasource, tokens))
            }
            _ => Err(SubjectError::Incomplete),
        }
    }
}

/// Checks that a topic can be a subject.
///
/// # Errors
/// [`SubjectError`] if it cannot.
pub fn check_topic_has_subject(topic: &str) -> Result<(), SubjectError> {
    topic.split('/').try_for_each(check_level)
}

fn check_level(level: &str) -> Result<(), SubjectError> {
    match level {
        "" => Err(SubjectError::EmptyLevel),
        "*" | ">" => Err(SubjectError::Wildcard),
        _ if level.bytes().any(is_space) => Err(SubjectError::Space),
        _ => Ok(()),
    }
}

/// Appends the tokens of a topic to `to`.
///
/// # Errors
/// [`SubjectError`] for a topic that cannot cross.
pub fn write_tokens(topic: &str, to: &mut String) -> Result<(), SubjectError> {
    let mut first = true;
    for level in topic.split('/') {
        check_level(level)?;
        if !std::mem::take(&mut first) {
            to.push('.');
        }
        for (n, part) in level.split('.').enumerate() {
            if n > 0 {
                to.push_str("//");
            }
            to.push_str(part);
        }
    }
    Ok(())
}

/// The topic for the tokens of a subject.
///
/// # Errors
/// [`SubjectError`] for tokens that no topic maps to.
pub fn topic_from_tokens(tokens: &str) -> Result<String, SubjectError> {
    let mut topic = String::with_capacity(tokens.len());
    for token in tokens.split('.') {
        match token {
            "" | "/" => return Err(SubjectError::EmptyLevel),
            "*" | ">" => return Err(SubjectError::Wildcard),
            _ => {}
        }
        if token.bytes().any(is_space) {
            return Err(SubjectError::Space);
        }
        if !topic.is_empty() {
            topic.push('/');
        }
        let mut rest = token;
        while let Some((before, after)) = rest.split_once('/') {
            let Some(after) = after.strip_prefix('/') else {
                // nats-server writes an empty level as a `/` at the edge of a token: `/.a` is `/a`.
                let at_the_edge = token.starts_with('/') || token.ends_with('/');
                return Err(if at_the_edge { SubjectError::EmptyLevel } else { SubjectError::LoneSlash });
            };
            topic.push_str(before);
            topic.push('.');
            rest = after;
        }
        topic.push_str(rest);
    }
    Ok(topic)
}

/// Whether a byte ends a subject on the wire, or is not allowed in one.
fn is_space(byte: u8) -> bool {
    byte <= b' ' || byte == 0x7f
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tokens_of(topic: &str) -> Result<String, SubjectError> {
        let mut tokens = String::new();
        write_tokens(topic, &mut tokens).map(|()| tokens)
    }

    #[test]
    fn a_topic_and_its_subject_as_nats_server_has_them() {
        for (topic, tokens) in [
            ("temp", "temp"),
            ("spindle/temp", "spindle.temp"),
            ("v1.2/temp", "v1//2.temp"),
            ("a/.b", "a.//b"),
            ("a./b", "a//.b"),
            ("..", "////"),
            (".", "//"),
            ("a*b/>c", "a*b.>c"),
            ("°C/temp", "°C.temp"),
        ] {
            assert_eq!(tokens_of(topic).as_deref(), Ok(tokens), "{topic:?}");
            assert_eq!(topic_from_tokens(tokens).as_deref(), Ok(topic), "{tokens:?}");
        }
    }

    #[test]
    fn a_filter_has_the_subjects_of_what_it_names() {
        let press = DatasourceId::new("press-4").expect("a slug");
        for (of, filter, subjects) in [
            (Some(&press), "spindle/temp", &["stream.press-4.spindle.temp"][..]),
            (Some(&press), "+/v1.2/+", &["stream.press-4.*.v1//2.*"]),
            (Some(&press), "#", &["stream.press-4.>"]),
            (Some(&press), "spindle/#", &["stream.press-4.spindle", "stream.press-4.spindle.>"]),
            (Some(&press), "a//b", &[]),
            (Some(&press), "a b/#", &[]),
            (None, "#", &["stream.>"]),
            (None, "+/spindle", &["stream.*.spindle"]),
            (None, "press-4/#", &["stream.press-4", "stream.press-4.>"]),
        ] {
            assert_eq!(SubjectSpace::Stream.filter_wildcards(of, filter), subjects, "{filter:?}");
        }
    }

    #[test]
    fn a_topic_that_cannot_cross_is_told_why() {
        use SubjectError::{EmptyLevel, Space, Wildcard};
        for (topic, why) in [
            ("", EmptyLevel),
            ("/", EmptyLevel),
            ("/a", EmptyLevel),
            ("a/", EmptyLevel),
            ("a//b", EmptyLevel),
            ("a b", Space),
            ("a/\tb", Space),
            ("a\r\nPUB x 0", Space),
            ("a/*", Wildcard),
            (">", Wildcard),
        ] {
            assert_eq!(tokens_of(topic), Err(why), "{topic:?}");
        }
    }

    #[test]
    fn a_subject_that_no_topic_becomes_is_told_why() {
        use SubjectError::{EmptyLevel, LoneSlash, Space, Wildcard};
        for (tokens, why) in [
            ("", EmptyLevel),
            ("a..b", EmptyLevel),
            ("/.a", EmptyLevel),
            ("a./", EmptyLevel),
            ("a./.b", EmptyLevel),
            ("/a", EmptyLevel),
            ("a///", EmptyLevel),
            ("a/b", LoneSlash),
            ("a///b", LoneSlash),
            ("a.*", Wildcard),
            (">", Wildcard),
            ("a b", Space),
        ] {
            assert_eq!(topic_from_tokens(tokens), Err(why), "{tokens:?}");
        }
    }

    #[test]
    fn a_subject_names_datasource_and_topic() {
        let mut subject = String::new();
        SubjectSpace::Stream.write_subject("press-4", "spindle/temp", &mut subject).expect("crosses");
        assert_eq!(subject, "stream.press-4.spindle.temp");
        assert_eq!(SubjectSpace::Stream.split(&subject), Ok(("press-4", "spindle.temp")));
        assert_eq!(SubjectSpace::Ingest.space_wildcard(), "ingest.>");
        for incomplete in
            ["", "stream", "stream.", "stream.a", "stream.a.", "stream..a", "streams.a.b", "ingest.a.b"]
        {
            assert_eq!(
                SubjectSpace::Stream.split(incomplete),
                Err(SubjectError::Incomplete),
                "{incomplete:?}"
            );
        }
    }

    proptest! {
        #[test]
        fn a_topic_that_crosses_comes_back_as_it_was(topic in "[a-c./ *>°]{0,12}") {
            if let Ok(tokens) = tokens_of(&topic) {
                prop_assert_eq!(topic_from_tokens(&tokens), Ok(topic));
            }
        }

        #[test]
        fn a_subject_that_crosses_comes_back_as_it_was(tokens in "[a-c./ *>°]{0,12}") {
            if let Ok(topic) = topic_from_tokens(&tokens) {
                prop_assert_eq!(tokens_of(&topic), Ok(tokens));
            }
        }

        #[test]
        fn what_crosses_is_a_subject_that_a_server_takes(topic in "\\PC{0,40}") {
            if let Ok(tokens) = tokens_of(&topic) {
                prop_assert!(!tokens.is_empty() && !tokens.bytes().any(is_space));
                prop_assert!(tokens.split('.').all(|token| !matches!(token, "" | "*" | ">")));
            }
        }
    }
}
