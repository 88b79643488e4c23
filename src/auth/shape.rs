//! The shape of a presented key that was not good: as much as may be told of it. A length that is right
//! or not, whether it begins as keys do, and whether its checksum fits: none of the characters that
//! make a key.

use serde::Serialize;

use super::key::{KEY_CHARS, PREFIX, checksum_fits};

/// How long it is, white space around it left out.
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
    /// They are: it is a key of some gateway, of this one once, or a forgery.
    Right,
    /// They are not: it is misspelt, cut, or made up.
    Wrong,
}

/// The shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Shape {
    /// How long it is.
    pub length: Length,
    /// Whether it begins with `hgk_`.
    pub prefix: bool,
    /// Whether its checksum fits.
    pub checksum: Checksum,
}

impl Shape {
    /// Of what was presented.
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
