//! One JSON Schema (draft 2020-12), compiled.
//!
//! The time to check a message is bounded by the schema. Patterns run on an engine whose time is linear in
//! the text (so there are no look-arounds and no back-references). References must not lead out of the
//! schema, nor into themselves, nor unfold into more than [`SCHEMA_NODES_MAX`] subschemas, of which those count several times
//! that are validated several times. No file is read and nothing is fetched.

use std::borrow::Cow;
use std::collections::HashMap;

use jsonschema::{Draft, PatternOptions, Validator};
use percent_encoding::percent_decode_str;
use serde_json::Value;

use crate::limits::{
    REASON_BYTES_MAX, SCHEMA_BYTES_MAX, SCHEMA_DEPTH_MAX, SCHEMA_NODES_MAX, SCHEMA_REGEX_BYTES_MAX,
};
use crate::log::QuarantineReason;

/// The only supported draft, as `$schema` may name it.
const SCHEMA_DRAFT_URL: &str = "https://json-schema.org/draft/2020-12/schema";

/// Why a schema cannot be used. The text is for the person who wrote it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SchemaError {
    /// The JSON is neither an object nor a boolean.
    #[error("a JSON Schema is an object, true or false")]
    NoSchema,
    /// It has too many bytes.
    #[error("a schema has at most {SCHEMA_BYTES_MAX} bytes")]
    TooLarge,
    /// It nests too deep.
    #[error("a schema nests at most {SCHEMA_DEPTH_MAX} levels deep")]
    TooDeep,
    /// It unfolds into too many parts.
    #[error(
        "with every $ref unfolded the schema has more than {SCHEMA_NODES_MAX} parts (beside unevaluatedProperties or unevaluatedItems a part counts four times)"
    )]
    TooCostly,
    /// It names another draft.
    #[error("$schema is {0:?}; only draft 2020-12 is understood ({SCHEMA_DRAFT_URL:?})")]
    Draft(String),
    /// A reference that leads out of the schema.
    #[error(
        "{pointer}: {reference:?} is not in this schema. References to files and URLs are not followed: put what they name under $defs and write \"#/$defs/NAME\""
    )]
    Remote {
        /// Where in the schema, as a JSON pointer.
        pointer: String,
        /// What it names.
        reference: String,
    },
    /// A reference to a part of the schema that is not there.
    #[error("{pointer}: there is nothing at {reference:?}")]
    Dangling {
        /// Where in the schema, as a JSON pointer.
        pointer: String,
        /// What it names.
        reference: String,
    },
    /// A reference that leads back to itself.
    #[error(
        "{pointer}: {reference:?} leads back to itself; a schema that contains itself could take unbounded time"
    )]
    Recursive {
        /// Where in the schema, as a JSON pointer.
        pointer: String,
        /// What it names.
        reference: String,
    },
    /// A keyword that is not supported.
    #[error("{pointer}: {keyword} is not supported")]
    Keyword {
        /// Where in the schema, as a JSON pointer.
        pointer: String,
        /// The keyword.
        keyword: &'static str,
    },
    /// The schema compiler reports an error.
    #[error("{pointer}: {words}")]
    Invalid {
        /// Where in the schema, as a JSON pointer.
        pointer: String,
        /// The error.
        words: String,
    },
}

/// A compiled schema.
pub struct Schema {
    source: Value,
    validator: Validator,
}

impl Schema {
    /// Checks and compiles a schema.
    ///
    /// # Errors
    /// [`SchemaError`]: the first error in it.
    pub fn compile(source: Value) -> Result<Self, SchemaError> {
        if !source.is_object() && !source.is_boolean() {
            return Err(SchemaError::NoSchema);
        }
        if source.to_string().len() > SCHEMA_BYTES_MAX {
            return Err(SchemaError::TooLarge);
        }
        if let Some(draft) = source.get("$schema")
            && draft.as_str().is_none_or(|draft| draft.trim_end_matches('#') != SCHEMA_DRAFT_URL)
        {
            return Err(SchemaError::Draft(draft.as_str().unwrap_or_default().chars().take(100).collect()));
        }
        let mut cost = SchemaCost { root: &source, known: HashMap::new(), open: Vec::new() };
        cost.count_parts(&source, &mut String::new(), 0)?;
        let patterns =
            PatternOptions::regex().size_limit(SCHEMA_REGEX_BYTES_MAX).dfa_size_limit(SCHEMA_REGEX_BYTES_MAX);
        let options = jsonschema::options()
            .with_draft(Draft::Draft202012)
            .should_validate_formats(true)
            .with_pattern_options(patterns)
            .offline();
        let validator = options.build(&source).map_err(|error| SchemaError::Invalid {
            pointer: error.instance_path().to_string(),
            words: cut_reason_text(&error.to_string()),
        })?;
        Ok(Self { source, validator })
    }

    /// The JSON that it was compiled from.
    pub fn source(&self) -> &Value {
        &self.source
    }

    /// Checks a value.
    ///
    /// # Errors
    /// The first violation. Its `schema_version` is left at 0.
    pub fn check(&self, value: &Value) -> Result<(), Box<QuarantineReason<'static>>> {
        self.validator.validate(value).map_err(|error| {
            Box::new(QuarantineReason {
                keyword: error.kind().keyword().to_owned().into(),
                pointer: cut_reason_text(&error.instance_path().to_string()).into(),
                words: cut_reason_text(&error.to_string()).into(),
                schema_version: 0,
            })
        })
    }
}

impl std::fmt::Debug for Schema {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Schema").field(&self.source).finish()
    }
}

/// At most [`REASON_BYTES_MAX`] of a text, without control characters: it goes into headers and reason
/// strings, and may quote the message.
pub(super) fn cut_reason_text(text: &str) -> String {
    let mut out = String::with_capacity(text.len().min(REASON_BYTES_MAX));
    for c in text.chars().map(|c| if c.is_control() || crate::message::is_noncharacter(c) { ' ' } else { c })
    {
        if out.len() + c.len_utf8() > REASON_BYTES_MAX - '…'.len_utf8() {
            out.push('…');
            break;
        }
        out.push(c);
    }
    out
}

/// Keywords whose subschemas no `unevaluatedProperties` or `unevaluatedItems` beside them validates again: which members or
/// elements they are for is known without that.
const VALIDATED_ONCE: [&str; 5] =
    ["properties", "patternProperties", "additionalProperties", "prefixItems", "items"];

/// How often the parts of a schema are validated: each `unevaluatedProperties` and `unevaluatedItems` validates what is
/// beside it again to learn what that evaluates, so that one in the other they take 2 to 3.2 times as long for each level.
fn rounds(members: &serde_json::Map<String, Value>) -> usize {
    let unevaluated = ["unevaluatedProperties", "unevaluatedItems"];
    unevaluated.iter().filter(|keyword| members.contains_key(**keyword)).fold(1, |rounds, _| 4 * rounds)
}

/// Counts the parts of a schema with every reference unfolded, each as often as it may be validated. It visits all values,
/// even those that are not schemas (`enum`, `const`): a member named `$ref` counts as a reference there too.
struct SchemaCost<'a> {
    root: &'a Value,
    /// The number of parts of each target that was unfolded.
    known: HashMap<String, usize>,
    /// The targets that are being unfolded, outermost first.
    open: Vec<String>,
}

impl<'a> SchemaCost<'a> {
    fn count_parts(
        &mut self,
        value: &'a Value,
        pointer: &mut String,
        depth: usize,
    ) -> Result<usize, SchemaError> {
        if depth > SCHEMA_DEPTH_MAX {
            return Err(SchemaError::TooDeep);
        }
        let mut parts = 1_usize;
        let at = pointer.len();
        match value {
            Value::Object(members) => {
                let rounds = rounds(members);
                for (key, member) in members {
                    pointer.push('/');
                    pointer.push_str(&key.replace('~', "~0").replace('/', "~1"));
                    let once = self.count_member(key, member, pointer, depth)?;
                    let times = if VALIDATED_ONCE.contains(&key.as_str()) { 1 } else { rounds };
                    parts = parts.saturating_add(once.saturating_mul(times));
                    pointer.truncate(at);
                }
            }
            Value::Array(elements) => {
                for (index, element) in elements.iter().enumerate() {
                    pointer.push_str(&format!("/{index}"));
                    parts = parts.saturating_add(self.count_parts(element, pointer, depth + 1)?);
                    pointer.truncate(at);
                }
            }
            _ => {}
        }
        if parts > SCHEMA_NODES_MAX { Err(SchemaError::TooCostly) } else { Ok(parts) }
    }

    /// Counts a member at `pointer`, and refuses the keywords that lead elsewhere.
    fn count_member(
        &mut self,
        key: &str,
        member: &'a Value,
        pointer: &mut String,
        depth: usize,
    ) -> Result<usize, SchemaError> {
        let keyword = match (key, member) {
            ("$ref", Value::String(reference)) => return self.unfold(reference, pointer),
            ("$dynamicRef" | "$dynamicAnchor", Value::String(_)) => "$dynamicRef",
            ("$anchor", Value::String(_)) => "$anchor",
            // An `$id` would change the base of references; without it they resolve as written.
            ("$id", Value::String(_)) if depth > 0 => "$id in a part of a schema",
            // Counted where it is referred to. Elsewhere it may be a property of that name, whose schema is run.
            ("$defs", defs) if depth == 0 => return self.count_parts(defs, pointer, depth + 1).map(|_| 0),
            _ => return self.count_parts(member, pointer, depth + 1),
        };
        Err(SchemaError::Keyword { pointer: std::mem::take(pointer), keyword })
    }

    fn unfold(&mut self, reference: &'a str, at: &str) -> Result<usize, SchemaError> {
        let (pointer, named) = (at.to_owned(), reference.chars().take(200).collect());
        let Some(target) = reference.strip_prefix('#') else {
            return Err(SchemaError::Remote { pointer, reference: named });
        };
        // The validator takes it for part of a URL and decodes it.
        let Ok(mut target) = percent_decode_str(target).decode_utf8().map(Cow::into_owned) else {
            return Err(SchemaError::Dangling { pointer, reference: named });
        };
        if self.open.contains(&target) || target.is_empty() {
            return Err(SchemaError::Recursive { pointer, reference: named });
        }
        if let Some(parts) = self.known.get(&target) {
            return Ok(*parts);
        }
        let Some(value) = self.root.pointer(&target) else {
            return Err(SchemaError::Dangling { pointer, reference: named });
        };
        self.open.push(target.clone());
        // Starting at the number of open references bounds the recursion over all of them together.
        let parts = self.count_parts(value, &mut target, self.open.len())?;
        if let Some(target) = self.open.pop() {
            self.known.insert(target, parts);
        }
        Ok(parts)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn refused(source: Value) -> SchemaError {
        Schema::compile(source).expect_err("not to be used")
    }

    #[test]
    fn a_value_fails_where_and_for_what_it_does() {
        let schema = Schema::compile(json!({
            "type": "object",
            "required": ["timestamp", "value"],
            "properties": {
                "value": {"type": "number", "maximum": 200},
                "timestamp": {"type": "string", "format": "date-time"},
                "unit": {"type": "string", "pattern": "^°[CF]$"},
            },
        }))
        .expect("compiles");
        let good = json!({"timestamp": "2013-12-02T21:15:00Z", "value": 73.9, "unit": "°F"});
        assert_eq!(schema.check(&good), Ok(()));
        for (pointer, value, at, keyword) in [
            ("/value", json!(300), "/value", "maximum"),
            ("/value", json!("73.9"), "/value", "type"),
            ("/timestamp", json!("yesterday"), "/timestamp", "format"),
            ("/unit", json!("K"), "/unit", "pattern"),
            ("", json!({"value": 1}), "", "required"),
            ("", json!([]), "", "type"),
        ] {
            let mut bad = good.clone();
            *bad.pointer_mut(pointer).expect("is there") = value;
            let reason = schema.check(&bad).expect_err("bad");
            assert_eq!((&*reason.pointer, &*reason.keyword), (at, keyword), "{reason}");
        }
    }

    #[test]
    fn a_reference_stays_within_its_schema_and_leads_to_an_end() {
        let defs = |to: &str| json!({"$ref": to, "$defs": {"a": {"type": "string"}}});
        assert!(Schema::compile(defs("#/$defs/a")).is_ok());
        for remote in ["https://example.com/s.json", "s.json", "file:///etc/passwd", "//example.com/s#/a"] {
            let error = refused(defs(remote));
            let SchemaError::Remote { pointer, reference } = &error else { panic!("{error}") };
            assert_eq!((pointer.as_str(), reference.as_str()), ("/$ref", remote));
        }
        assert!(matches!(refused(defs("#/$defs/b")), SchemaError::Dangling { .. }));
        assert!(matches!(refused(defs("#")), SchemaError::Recursive { .. }));
        let circle = json!({"$defs": {
            "a": {"properties": {"x": {"$ref": "#/$defs/b"}}},
            "b": {"items": {"$ref": "#/$defs/a"}},
        }});
        assert!(matches!(refused(circle), SchemaError::Recursive { .. }));
        // Up to where it stands itself.
        let up = json!({"properties": {"x": {"$ref": "#/properties"}}});
        assert!(matches!(refused(up), SchemaError::Recursive { .. }));
    }

    #[test]
    fn a_schema_is_bounded_in_bytes_depth_and_what_it_unfolds_into() {
        let long = |bytes: usize| json!({"title": "x".repeat(bytes - r#"{"title":""}"#.len())});
        assert!(Schema::compile(long(SCHEMA_BYTES_MAX)).is_ok());
        assert_eq!(refused(long(SCHEMA_BYTES_MAX + 1)), SchemaError::TooLarge);

        let deep = |levels| (0..levels).fold(json!({}), |inner, _| json!({ "not": inner }));
        assert!(Schema::compile(deep(SCHEMA_DEPTH_MAX)).is_ok());
        assert_eq!(refused(deep(SCHEMA_DEPTH_MAX + 1)), SchemaError::TooDeep);

        // Each twice the one before: 2²⁰ ways through 20 definitions.
        let mut defs = serde_json::Map::new();
        defs.insert("d0".to_owned(), json!({"type": "string"}));
        for level in 1..=20 {
            let half = json!({"$ref": format!("#/$defs/d{}", level - 1)});
            defs.insert(format!("d{level}"), json!({"anyOf": [half, half]}));
        }
        assert_eq!(refused(json!({"$ref": "#/$defs/d20", "$defs": defs})), SchemaError::TooCostly);
    }

    #[test]
    fn a_property_named_like_the_definitions_is_counted() {
        for keyword in ["properties", "dependentSchemas", "patternProperties"] {
            let mut defs = serde_json::Map::new();
            defs.insert("d0".to_owned(), json!({"type": "object"}));
            for level in 1..=20 {
                let half = json!({"$ref": format!("#/$defs/d{}", level - 1)});
                defs.insert(format!("d{level}"), json!({keyword: {"$defs": {"allOf": [half, half]}}}));
            }
            let costly = json!({"$ref": "#/$defs/d20", "$defs": defs});
            assert_eq!(refused(costly), SchemaError::TooCostly, "{keyword}");
        }
    }

    /// Each doubles or trebles at each level what a message costs, without a reference.
    #[test]
    fn what_unevaluated_keywords_validate_again_is_counted() {
        let kinds: [fn(Value) -> Value; 6] = [
            |inner| json!({"if": inner, "unevaluatedProperties": {"type": "integer"}}),
            |inner| json!({"allOf": [inner], "unevaluatedProperties": {"type": "integer"}}),
            |inner| json!({"anyOf": [{"properties": {"x": inner}}], "unevaluatedProperties": false}),
            |inner| json!({"dependentSchemas": {"x": inner}, "unevaluatedProperties": {"type": "integer"}}),
            |inner| json!({"contains": inner, "unevaluatedItems": false}),
            |inner| json!({"not": inner, "unevaluatedItems": true, "unevaluatedProperties": true}),
        ];
        let nested =
            |kind: fn(Value) -> Value, levels| (0..levels).fold(json!({"type": "object"}), |s, _| kind(s));
        let flat = json!({"x": 1, "y": 2});
        let deep = (0..SCHEMA_DEPTH_MAX).fold(flat.clone(), |inner, _| json!({ "x": inner }));
        let array = (0..SCHEMA_DEPTH_MAX).fold(json!(1), |inner, _| json!([inner]));
        for (n, kind) in kinds.into_iter().enumerate() {
            let compiles = |levels| Schema::compile(nested(kind, levels)).is_ok();
            let levels =
                (1..SCHEMA_DEPTH_MAX).take_while(|levels| compiles(*levels)).last().expect("one is in order");
            assert!((2..10).contains(&levels), "{n}: {levels} levels");
            assert_eq!(refused(nested(kind, levels + 1)), SchemaError::TooCostly, "{n}");
            let schema = Schema::compile(nested(kind, levels)).expect("compiles");
            let began = std::time::Instant::now();
            for value in [&flat, &deep, &array] {
                let _ = schema.check(value);
            }
            assert!(began.elapsed() < std::time::Duration::from_secs(2), "{n}: {:?}", began.elapsed());
        }
        // A form of many levels, each of which is closed, costs no more than its parts.
        let form = |inner| json!({"properties": {"x": inner, "y": {}}, "unevaluatedProperties": false});
        assert!(Schema::compile(nested(form, SCHEMA_DEPTH_MAX / 2 - 1)).is_ok());
    }

    #[test]
    fn a_reference_is_decoded_as_the_validator_decodes_it() {
        let doubled = json!({"properties": {"x": {"allOf": [{"$ref": "#/a%62"}, {"$ref": "#/a%62"}]}}});
        let decoy = json!({"a%62": {}, "ab": doubled, "$ref": "#/a%62"});
        assert!(matches!(refused(decoy), SchemaError::Recursive { .. }));
        // Each time spelt in another way.
        let circle = json!({"$ref": "#/ab", "ab": {"properties": {"x": {"$ref": "#/%61b"}}}});
        assert!(matches!(refused(circle), SchemaError::Recursive { .. }));
        assert!(matches!(refused(json!({"$ref": "#/%ff"})), SchemaError::Dangling { .. }));
        let spaced = json!({"$ref": "#/$defs/a%20name", "$defs": {"a name": {"type": "string"}}});
        let schema = Schema::compile(spaced).expect("compiles");
        assert!(schema.check(&json!("x")).is_ok() && schema.check(&json!(1)).is_err());
    }

    #[test]
    fn a_pattern_runs_in_linear_time_or_is_refused() {
        for pattern in ["^(?=a)", r"(a)\1", "("] {
            let error = refused(json!({ "pattern": pattern }));
            assert!(matches!(error, SchemaError::Invalid { .. }), "{pattern}: {error}");
        }
        assert!(matches!(refused(json!({"pattern": "(a{1000}){1000}"})), SchemaError::Invalid { .. }));
        // What takes a backtracking engine for ever.
        let schema = Schema::compile(json!({"pattern": "^(a+)+$"})).expect("compiles");
        let text = json!(format!("{}b", "a".repeat(100_000)));
        let began = std::time::Instant::now();
        assert!(schema.check(&text).is_err());
        assert!(began.elapsed() < std::time::Duration::from_secs(2));
    }

    #[test]
    fn other_drafts_and_what_is_no_schema_are_refused() {
        assert!(Schema::compile(json!({ "$schema": SCHEMA_DRAFT_URL })).is_ok());
        assert!(Schema::compile(json!(true)).is_ok());
        let old = json!({"$schema": "http://json-schema.org/draft-07/schema#"});
        assert!(matches!(refused(old), SchemaError::Draft(_)));
        for none in [json!(1), json!("x"), json!([]), json!(null)] {
            assert_eq!(refused(none), SchemaError::NoSchema);
        }
        let error = refused(json!({"properties": {"a": {"type": "flaot"}}}));
        let SchemaError::Invalid { pointer, .. } = &error else { panic!("{error}") };
        assert_eq!(pointer, "/properties/a/type");
    }

    #[test]
    fn words_are_cut_to_what_a_reason_string_holds() {
        let schema = Schema::compile(json!({"type": "number"})).expect("compiles");
        let reason = schema.check(&json!("€\n".repeat(10_000))).expect_err("a string");
        assert!(reason.words.len() <= REASON_BYTES_MAX && reason.words.ends_with('…'), "{reason}");
        assert!(!reason.words.chars().any(char::is_control));
    }
}
