//! The shape of a rejected key: everything about it that may be shown to an operator. It says whether
//! the length, the prefix and the checksum are right, and reveals none of the key's characters.

use serde::Serialize;

use super::key::{KEY_CHARS, PREFIX, checksum_fits};

/// The length of what was presented, without surrounding white space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Length {
    /// Shorter than a key.
    TooShort,
    /// As long as a key.
    Right,
    /// Longer than a key.
    TooLong,
}

/// Whether the last characters are the checksum of those before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Checksum {
    /// They match: a key of another gateway, a former key of this one, or a forgery.
    Right,
    /// They do not match: the key is mistyped, truncated or made up.
    Wrong,
}

/// What may be shown of a rejected key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Shape {
    /// The length, compared with a key's.
    pub length: Length,
    /// Whether it begins with `hgk_`.
    pub prefix: bool,
    /// Whether the checksum matches.
    pub checksum: Checksum,
}

impl Shape {
    /// The shape of a presented text.
    pub fn of(presented: &[u8]) -> Self {
        let key = presented.trim_ascii();
        let length = match key.len() {
            KEY_CHARS => Length::Right,
            ..KEY_CHARS => Length::TooShort,
            _ => Length::TooLong,
        };
        let checksum = if checksum_fits(key) { Checksum::Right } else { Checksum::Wrong };
        Self { length, prefix: key.starts_with(PREFIX), checksum }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::ApiKey;

    #[test]
    fn a_shape_tells_what_is_wrong_with_a_key() {
        let key = ApiKey::generate();
        let text = key.expose();
        let shape = |text: &str| {
            let Shape { length, prefix, checksum } = Shape::of(text.as_bytes());
            (length, prefix, checksum)
        };
        assert_eq!(shape(text), (Length::Right, true, Checksum::Right));
        assert_eq!(shape(&format!(" {text}\n")), (Length::Right, true, Checksum::Right));
        assert_eq!(shape(&text[..52]), (Length::TooShort, true, Checksum::Wrong));
        assert_eq!(shape(&format!("{text}x")), (Length::TooLong, true, Checksum::Wrong));
        assert_eq!(shape(&text[4..]), (Length::TooShort, false, Checksum::Wrong));
        let swapped =
            format!("{}{}", &text[..47], if text.ends_with("000000") { "111111" } else { "000000" });
        assert_eq!(shape(&swapped), (Length::Right, true, Checksum::Wrong));
        assert_eq!(shape("secret"), (Length::TooShort, false, Checksum::Wrong));
    }
}
