//! A scope: one kind of operation that a key permits, and the set of scopes that a key has.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// What a key may be used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// Publish messages.
    Ingest,
    /// Read records, live and stored.
    Subscribe,
    /// Manage datasources and keys; implies the other two.
    Admin,
}

impl Scope {
    /// Every scope there is, in the order in which sets of them are shown.
    pub const ALL: [Scope; 3] = [Scope::Ingest, Scope::Subscribe, Scope::Admin];

    /// The word for it, as in the API, on the command line and in the registry.
    pub fn as_str(self) -> &'static str {
        match self {
            Scope::Ingest => "ingest",
            Scope::Subscribe => "subscribe",
            Scope::Admin => "admin",
        }
    }

    const fn bit(self) -> u8 {
        1 << self as u8
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The text is not a scope, or the list is empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the scopes of a key are one or more of ingest, subscribe and admin")]
pub struct ScopeError;

impl FromStr for Scope {
    type Err = ScopeError;

    fn from_str(text: &str) -> Result<Self, ScopeError> {
        Scope::ALL.into_iter().find(|scope| scope.as_str() == text).ok_or(ScopeError)
    }
}

/// A set of [`Scope`]s: a list in JSON, `["ingest", "subscribe"]`, and `ingest,subscribe` as text. A set
/// parsed from JSON or text has at least one scope.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scopes(u8);

impl Scopes {
    /// The set of the given scopes.
    pub fn from_slice(scopes: &[Scope]) -> Self {
        Self(scopes.iter().fold(0, |bits, scope| bits | scope.bit()))
    }

    /// Whether a key with this set may do `scope` (admin may do all).
    pub fn allow(self, scope: Scope) -> bool {
        self.0 & (scope.bit() | Scope::Admin.bit()) != 0
    }

    /// Whether the set has no scope. A key with an empty set could do nothing.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The scopes of both sets. Admin counts as the other two, and is in none: what is made from a key manages nothing.
    #[must_use]
    pub fn of_token(self, asked: Scopes) -> Scopes {
        let both = |scope: &Scope| *scope != Scope::Admin && self.allow(*scope) && asked.allow(*scope);
        Self(Scope::ALL.into_iter().filter(both).fold(0, |bits, scope| bits | scope.bit()))
    }

    /// A bit for each scope, in the order of [`Scope::ALL`].
    pub(super) fn bits(self) -> u8 {
        self.0
    }

    /// The set with these bits; `None` for an empty one, and for bits that are no scope.
    pub(super) fn from_bits(bits: u8) -> Option<Self> {
        let known = Scope::ALL.into_iter().fold(0, |known, scope| known | scope.bit());
        (bits != 0 && bits & !known == 0).then_some(Self(bits))
    }

    /// The scopes that were given; those that admin implies are not added.
    pub fn iter(self) -> impl Iterator<Item = Scope> {
        Scope::ALL.into_iter().filter(move |scope| self.0 & scope.bit() != 0)
    }
}

impl fmt::Display for Scopes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, scope) in self.iter().enumerate() {
            let comma = if i > 0 { "," } else { "" };
            write!(f, "{comma}{scope}")?;
        }
        Ok(())
    }
}

impl FromStr for Scopes {
    type Err = ScopeError;

    fn from_str(text: &str) -> Result<Self, ScopeError> {
        let bits =
            text.split(',').try_fold(0, |bits, word| Ok(bits | word.trim().parse::<Scope>()?.bit()))?;
        Ok(Self(bits))
    }
}

impl Serialize for Scopes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.iter())
    }
}

impl<'de> Deserialize<'de> for Scopes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let scopes = Scopes::from_slice(&Vec::<Scope>::deserialize(deserializer)?);
        if scopes.is_empty() { Err(serde::de::Error::custom(ScopeError)) } else { Ok(scopes) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn admin_implies_the_other_scopes_and_no_other_scope_implies_any() {
        for scope in Scope::ALL {
            assert!(Scopes::from_slice(&[Scope::Admin]).allow(scope));
            assert!(!Scopes::from_slice(&[]).allow(scope));
        }
        assert!(Scopes::from_slice(&[Scope::Ingest]).allow(Scope::Ingest));
        assert!(!Scopes::from_slice(&[Scope::Ingest]).allow(Scope::Subscribe));
        assert!(!Scopes::from_slice(&[Scope::Ingest, Scope::Subscribe]).allow(Scope::Admin));
    }

    #[test]
    fn scopes_are_a_list_in_json_and_a_comma_separated_list_in_text() {
        let both = Scopes::from_slice(&[Scope::Subscribe, Scope::Ingest]);
        assert_eq!(serde_json::to_string(&both).expect("serialises"), r#"["ingest","subscribe"]"#);
        assert_eq!(serde_json::from_str::<Scopes>(r#"["subscribe","ingest"]"#).expect("a list"), both);
        assert_eq!(both.to_string(), "ingest,subscribe");
        assert_eq!("subscribe, ingest".parse(), Ok(both));
        assert_eq!(both.iter().collect::<Vec<_>>(), [Scope::Ingest, Scope::Subscribe]);
        for bad in ["[]", r#"["root"]"#, r#""ingest""#, "3"] {
            assert!(serde_json::from_str::<Scopes>(bad).is_err(), "{bad}");
        }
        for bad in ["", "root", "ingest,", "Ingest"] {
            assert_eq!(bad.parse::<Scopes>(), Err(ScopeError), "{bad:?}");
        }
    }
}
