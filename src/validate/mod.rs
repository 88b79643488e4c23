//! Validation: the schemas that the messages of a datasource have to meet, if it has any.
//!
//! Intake asks here about each message on its way in. What does not meet its schema is not let in: it
//! goes into quarantine, with the [`Reason`].
//!
//! A datasource has a list of [`rules`]: a topic filter and a schema each. **The first rule whose
//! filter matches the topic is the one that counts**, and the others do not; so the narrow ones come
//! first and `#` comes last. A message whose topic no rule matches is let in as it is. Every change of
//! the list gives the rules that it adds or changes a new version number, and versions are never used
//! again in a datasource; a rule that stays as it was keeps its own.
//!
//! A [`schema`] is JSON Schema, draft 2020-12, compiled once for each change. What could cost an
//! unbounded time is refused when it is set.

pub mod rules;
pub mod schema;

use std::sync::Arc;

pub use rules::{Rule, Rules, RulesError, Written};
pub use schema::{Schema, SchemaError};

use crate::auth::setting::Setting;
use crate::log::Reason;

/// The rules of one datasource as they were at one moment.
#[derive(Clone, Default)]
pub struct Validation(Option<Arc<Result<Rules, RulesError>>>);

impl Validation {
    /// Of the datasource whose schemas this is. Compiles them if nobody has since they were set.
    pub fn of(schemas: &Setting) -> Self {
        let made = schemas.is_set().then(|| schemas.made(Rules::of_text));
        Self(made)
    }

    /// The rules, if there were any at any time.
    ///
    /// # Errors
    /// [`RulesError::Unreadable`], if the registry has something that this Headgate has not written.
    pub fn rules(&self) -> Result<Option<&Rules>, &RulesError> {
        self.0.as_ref().map(|rules| rules.as_ref().as_ref()).transpose()
    }

    /// Holds a message against the rules.
    ///
    /// # Errors
    /// Why it goes into quarantine. Where the rules cannot be read, everything does: it can be let in
    /// from there, and what was let in wrongly could not be taken back.
    pub fn check(&self, topic: &str, payload: &[u8]) -> Result<(), Box<Reason<'static>>> {
        let Some(rules) = &self.0 else { return Ok(()) };
        match &**rules {
            Ok(rules) => rules.check(topic, payload),
            Err(error) => Err(Box::new(Reason {
                keyword: "schema".into(),
                pointer: "".into(),
                words: schema::cut(&error.to_string()).into(),
                schema_version: 0,
            })),
        }
    }
}
