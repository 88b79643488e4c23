//! The shape of a rejected key: everything about it that may be shown to an operator. It says whether
//! the length, the prefix and the checksum are right, and reveals none of the key's characters.

use headgate_format::key::{API_KEY_PREFIX, KEY_CHARS, is_well_formed};
use serde::Serialize;

/// The length of what was presented, without surrounding white space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum KeyLength {
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
pub enum KeyChecksum {
    /// They match: a key of another gateway, a former key of this one, or a forgery.
    Right,
    /// They do not match: the key is mistyped, truncated or made up.
    Wrong,
}

/// What may be shown of a rejected key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct KeyShape {
    /// The length, compared with a key's.
    pub length: KeyLength,
    /// Whether it begins with `hgk_`.
    pub prefix: bool,
    /// Whether the checksum matches.
    pub checksum: KeyChecksum,
}

impl KeyShape {
    /// The shape of a presented text.
    pub fn from_presented(presented: &[u8]) -> Self {
        let key = presented.trim_ascii();
        let length = match key.len() {
            KEY_CHARS => KeyLength::Right,
            ..KEY_CHARS => KeyLength::TooShort,
            _ => KeyLength::TooLong,
        };
        let checksum = if is_well_formed(key) { KeyChecksum::Right } else { KeyChecksum::Wrong };
        Self { length, prefix: key.starts_with(API_KEY_PREFIX), checksum }
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
            let KeyShape { length, prefix, checksum } = KeyShape::from_presented(text.as_bytes());
            (length, prefix, checksum)
        };
        assert_eq!(shape(text), (KeyLength::Right, true, KeyChecksum::Right));
        assert_eq!(shape(&format!(" {text}\n")), (KeyLength::Right, true, KeyChecksum::Right));
        assert_eq!(shape(&text[..52]), (KeyLength::TooShort, true, KeyChecksum::Wrong));
        assert_eq!(shape(&format!("{text}x")), (KeyLength::TooLong, true, KeyChecksum::Wrong));
        assert_eq!(shape(&text[4..]), (KeyLength::TooShort, false, KeyChecksum::Wrong));
        let swapped =
            format!("{}{}", &text[..47], if text.ends_with("000000") { "111111" } else { "000000" });
        assert_eq!(shape(&swapped), (KeyLength::Right, true, KeyChecksum::Wrong));
        assert_eq!(shape("secret"), (KeyLength::TooShort, false, KeyChecksum::Wrong));
    }
}
