//! The rules of one datasource: which topics have to meet which schema. The registry keeps them as JSON,
//! and they are compiled when they are set and when the gateway starts.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::json::{JsonError, parse_unique_json};
use super::schema::{Schema, SchemaError, cut_reason_text};
use crate::filter::TopicFilter;
use crate::limits::SCHEMA_RULES_MAX;
use crate::log::QuarantineReason;
use crate::whole_number;

/// The rules of a datasource, in the order in which filters are matched.
#[derive(Debug, Default)]
pub struct Rules {
    rules: Vec<Rule>,
    /// The highest version that a rule of the datasource has or ever had.
    last_version: u32,
}

/// A topic filter, and the schema for messages to its topics.
#[derive(Debug)]
pub struct Rule {
    /// The topics that it applies to.
    pub filter: TopicFilter,
    /// Its version, which no other rule of the datasource has or ever had.
    pub version: u32,
    /// The schema that messages have to meet.
    pub schema: Schema,
}

/// A rule as a request states it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WrittenRule {
    /// The topic filter; all topics if it is left out.
    #[serde(default = "all_topics")]
    pub filter: String,
    /// The JSON Schema.
    pub schema: Value,
}

impl WrittenRule {
    /// A list of one rule, for every topic.
    pub fn for_all(schema: Value) -> Vec<Self> {
        vec![Self { filter: all_topics(), schema }]
    }
}

fn all_topics() -> String {
    "#".to_owned()
}

/// Why rules cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RulesError {
    /// Too many.
    #[error("a datasource has at most {SCHEMA_RULES_MAX} schemas")]
    TooMany,
    /// A filter that cannot be parsed.
    #[error("{0}")]
    Filter(String),
    /// A filter that occurs twice: the second rule could never count.
    #[error("the filter {0:?} comes twice; the first one that matches a topic is the one that counts")]
    Twice(String),
    /// A schema that cannot be used.
    #[error("the schema for {filter:?} cannot be used: {error}")]
    Schema {
        /// The filter of its rule.
        filter: String,
        /// Why not.
        error: SchemaError,
    },
    /// Text that this code has not written.
    #[error("the schemas that the registry has cannot be read: {0}")]
    Unreadable(String),
}

/// The form of the rules in the registry.
#[derive(Serialize, Deserialize)]
struct StoredRules {
    #[serde(deserialize_with = "whole_number::narrowed")]
    last_version: u32,
    rules: Vec<StoredRule>,
}

#[derive(Serialize, Deserialize)]
struct StoredRule {
    filter: String,
    #[serde(deserialize_with = "whole_number::narrowed")]
    version: u32,
    schema: Value,
}

impl Rules {
    /// The rules that replace `self`. Unchanged rules keep their versions; the others get a new one.
    ///
    /// # Errors
    /// [`RulesError`], for the first rule that cannot be used.
    pub fn replace(&self, written: Vec<WrittenRule>) -> Result<Self, RulesError> {
        let version = self.last_version.saturating_add(1);
        let mut last_version = self.last_version;
        let mut kept = Vec::with_capacity(written.len());
        for WrittenRule { filter, schema } in written {
            let same = |rule: &&Rule| rule.filter.as_str() == filter && *rule.schema.source() == schema;
            let version = self.rules.iter().find(same).map_or(version, |rule| rule.version);
            last_version = last_version.max(version);
            kept.push(StoredRule { filter, version, schema });
        }
        Self::compile(StoredRules { last_version, rules: kept })
    }

    /// Parses the output of [`Rules::to_stored_json`].
    ///
    /// # Errors
    /// [`RulesError`], if the text is anything else.
    pub fn from_stored_json(kept: &str) -> Result<Self, RulesError> {
        let kept = serde_json::from_str(kept).map_err(|error| RulesError::Unreadable(error.to_string()))?;
        Self::compile(kept)
    }

    /// Parses the text that the registry has for a datasource.
    pub(super) fn from_registry_text(kept: Option<&str>) -> Result<Self, RulesError> {
        kept.map_or(Ok(Self::default()), |kept| {
            Self::from_stored_json(kept).map_err(|error| RulesError::Unreadable(error.to_string()))
        })
    }

    /// The JSON text for the registry.
    pub fn to_stored_json(&self) -> String {
        let rules = self.rules.iter().map(|rule| StoredRule {
            filter: rule.filter.as_str().to_owned(),
            version: rule.version,
            schema: rule.schema.source().clone(),
        });
        let kept = StoredRules { last_version: self.last_version, rules: rules.collect() };
        serde_json::to_string(&kept).expect("JSON values and text are JSON")
    }

    fn compile(kept: StoredRules) -> Result<Self, RulesError> {
        if kept.rules.len() > SCHEMA_RULES_MAX {
            return Err(RulesError::TooMany);
        }
        let mut rules: Vec<Rule> = Vec::with_capacity(kept.rules.len());
        for StoredRule { filter, version, schema } in kept.rules {
            let filter = TopicFilter::new(&filter)
                .map_err(|error| RulesError::Filter(format!("{}: {error}", cut_reason_text(&filter))))?;
            if rules.iter().any(|rule| rule.filter == filter) {
                return Err(RulesError::Twice(filter.as_str().to_owned()));
            }
            let schema = Schema::compile(schema)
                .map_err(|error| RulesError::Schema { filter: filter.as_str().to_owned(), error })?;
            rules.push(Rule { filter, version, schema });
        }
        Ok(Self { rules, last_version: kept.last_version })
    }

    /// Whether its versions are some that counting from 1 gives.
    pub fn is_numbered(&self) -> bool {
        self.rules.iter().all(|rule| (1..=self.last_version).contains(&rule.version))
    }

    /// The rules, in the order in which filters are matched.
    pub fn iter(&self) -> impl Iterator<Item = &Rule> {
        self.rules.iter()
    }

    /// Checks a message against the first rule whose filter matches its topic.
    ///
    /// # Errors
    /// Why the message goes into quarantine.
    pub fn check(&self, topic: &str, payload: &[u8]) -> Result<(), Box<QuarantineReason<'static>>> {
        let Some(rule) = self.rules.iter().find(|rule| rule.filter.matches(topic)) else { return Ok(()) };
        let checked = match parse_unique_json(payload) {
            Ok(value) => rule.schema.check(&value),
            Err(error) => Err(Box::new(unreadable(error))),
        };
        checked.map_err(|mut reason| {
            reason.schema_version = rule.version;
            reason
        })
    }
}

/// The keyword in the reason for an object that has a member twice; JSON Schema has no such keyword.
const DUPLICATE_MEMBER_KEYWORD: &str = "duplicate";

/// Why a payload cannot be checked. The version of its rule is not in it.
fn unreadable(error: JsonError) -> QuarantineReason<'static> {
    let (keyword, pointer, words) = match error {
        JsonError::Malformed(error) => {
            ("json", String::new(), format!("the payload is not JSON, and there is a schema for it: {error}"))
        }
        JsonError::DuplicateMember { pointer } => {
            let words =
                "an object has this member twice; which of the two counts is not the same for every reader";
            (DUPLICATE_MEMBER_KEYWORD, pointer, words.to_owned())
        }
    };
    QuarantineReason {
        keyword: keyword.into(),
        pointer: cut_reason_text(&pointer).into(),
        words: cut_reason_text(&words).into(),
        schema_version: 0,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn rule(filter: &str, kind: &str) -> WrittenRule {
        WrittenRule { filter: filter.to_owned(), schema: json!({ "type": kind }) }
    }

    fn versions(rules: &Rules) -> Vec<u32> {
        rules.iter().map(|rule| rule.version).collect()
    }

    #[test]
    fn the_first_rule_that_matches_counts_and_no_other() {
        let rules = Rules::default()
            .replace(vec![rule("spindle/temp", "number"), rule("spindle/#", "object")])
            .expect("rules");
        assert_eq!(rules.check("spindle/temp", b"21.5"), Ok(()));
        assert_eq!(rules.check("spindle/rpm", b"{}"), Ok(()));
        assert_eq!(rules.check("door", b"not JSON at all"), Ok(()), "no rule is for it");
        let reason = rules.check("spindle/temp", b"{}").expect_err("no number");
        assert_eq!((&*reason.keyword, reason.schema_version), ("type", 1));
        let reason = rules.check("spindle/rpm", b"\xff").expect_err("no JSON");
        assert_eq!((&*reason.keyword, &*reason.pointer), ("json", ""));
    }

    #[test]
    fn a_version_names_one_schema_for_ever() {
        let first = Rules::default().replace(vec![rule("a", "number"), rule("b", "string")]).expect("rules");
        assert_eq!(versions(&first), [1, 1]);
        let second = first.replace(vec![rule("b", "string"), rule("a", "object")]).expect("rules");
        assert_eq!(versions(&second), [1, 2], "the one that stayed kept its own");
        let none = second.replace(vec![]).expect("rules");
        assert!(versions(&none).is_empty());
        let third = Rules::from_stored_json(&none.to_stored_json()).expect("reads back");
        let third = third.replace(vec![rule("a", "object")]).expect("rules");
        assert_eq!(versions(&third), [3], "also what was taken away is not used again");
        let again = Rules::from_stored_json(&third.to_stored_json()).expect("reads back");
        assert_eq!(versions(&again), [3]);
    }

    #[test]
    fn rules_that_cannot_count_or_are_none_are_refused() {
        let refused = |written| Rules::default().replace(written).expect_err("refused");
        assert!(matches!(refused(vec![rule("a/#/b", "number")]), RulesError::Filter(_)));
        assert!(matches!(refused(vec![rule("a", "number"), rule("a", "string")]), RulesError::Twice(_)));
        assert!(matches!(refused(vec![rule("a", "flaot")]), RulesError::Schema { .. }));
        let many = |n| (0..n).map(|n| rule(&format!("t/{n}"), "number")).collect::<Vec<_>>();
        assert!(Rules::default().replace(many(SCHEMA_RULES_MAX)).is_ok());
        assert_eq!(refused(many(SCHEMA_RULES_MAX + 1)), RulesError::TooMany);
    }
}
