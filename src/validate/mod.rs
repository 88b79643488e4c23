//! Validation: the schemas, if any, that the messages of a datasource have to meet.
//!
//! Intake checks each message here on its way in. A message that does not meet its schema is not let in:
//! it goes into quarantine, with the [`QuarantineReason`].
//!
//! A datasource has a list of [`rules`]: a topic filter and a schema each. **Only the first rule whose
//! filter matches the topic counts**; so narrow filters come first and `#` comes last. A message whose
//! topic matches no rule is let in unchecked. Every change of the list gives the rules that it adds or
//! changes a new version number, which is never used again in the datasource; an unchanged rule keeps its
//! version.
//!
//! A message that is checked has each member of its objects once: see [`json`].
//!
//! A [`schema`] is JSON Schema, draft 2020-12, compiled once for each change. A schema whose check could
//! take unbounded time is refused when it is set.

pub mod json;
pub mod rules;
pub mod schema;

use std::sync::Arc;

pub use rules::{Rules, RulesError, WrittenRule};
pub use schema::{Schema, SchemaError};

use crate::auth::setting::JsonSetting;
use crate::log::QuarantineReason;

/// A snapshot of the rules of one datasource.
#[derive(Clone, Default)]
pub struct Validation(Option<Arc<Result<Rules, RulesError>>>);

impl Validation {
    /// The rules in the schemas of a datasource. Compiles them if nobody has since they were set.
    pub fn from_setting(schemas: &JsonSetting) -> Self {
        let made = schemas.is_set().then(|| schemas.made(Rules::from_registry_text));
        Self(made)
    }

    /// The rules, if any were ever set.
    ///
    /// # Errors
    /// [`RulesError::Unreadable`], if the registry has text that this version has not written.
    pub fn rules(&self) -> Result<Option<&Rules>, &RulesError> {
        self.0.as_ref().map(|rules| rules.as_ref().as_ref()).transpose()
    }

    /// Checks a message against the rules.
    ///
    /// # Errors
    /// Why the message goes into quarantine. If the rules cannot be read, every message does: it can be
    /// let in from there, but a message that was let in wrongly could not be taken back.
    pub fn check(&self, topic: &str, payload: &[u8]) -> Result<(), Box<QuarantineReason<'static>>> {
        let Some(rules) = &self.0 else { return Ok(()) };
        match &**rules {
            Ok(rules) => rules.check(topic, payload),
            Err(error) => Err(Box::new(QuarantineReason {
                keyword: "schema".into(),
                pointer: "".into(),
                words: schema::cut_reason_text(&error.to_string()).into(),
                schema_version: 0,
            })),
        }
    }
}
