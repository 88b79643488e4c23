//! An API key: its form, its digest, and nothing that could show it by accident.
//!
//! A key is `hgk_`, then 256 random bits as 43 base62 characters, then the CRC-32 of all of that as
//! 6 more. The checksum keeps no secret: it lets [`Digest::from_presented`] turn away a mistyped or
//! made-up key before anything is hashed or looked up, and lets a secret scanner tell a leaked key
//! from a chance match. Headgate stores only a key's [`Digest`]. A key has 256 random bits, so a
//! plain fast hash protects it: there is no dictionary to try, and a slow password hash would only
//! give strangers a way to keep the processor busy.

use std::fmt;
use std::sync::LazyLock;

use blake3::hazmat::{ContextKey, HasherExt, hash_derive_key_context};
use rand::TryRng;
use rand::rngs::SysRng;

use crate::message::{KeyId, holds_key};

/// The prefix of every key.
pub const API_KEY_PREFIX: &[u8; 4] = b"hgk_";
/// 256 bits in base62: 62⁴³ is a little more than 2²⁵⁶.
const SECRET_CHARS: usize = 43;
/// 32 bits in base62.
pub const CHECKSUM_CHARS: usize = 6;
/// Offset of the checksum, which covers everything before it.
const KEY_CHECKSUM_AT: usize = API_KEY_PREFIX.len() + SECRET_CHARS;
/// Length of a whole key.
pub const KEY_CHARS: usize = KEY_CHECKSUM_AT + CHECKSUM_CHARS;

const _: () = assert!(KEY_CHARS == 53);

/// Separates these digests from every other use of BLAKE3. A change here invalidates every stored key.
const DIGEST_CONTEXT: &str = "headgate 2026-11 api key digest";

/// The context, hashed once: `blake3::derive_key` hashes it again at every call, which doubles the
/// price of a key (84 ns instead of 172 ns; cloning a prepared hasher, all 1,920 bytes of it, 107 ns).
static DIGEST_CONTEXT_KEY: LazyLock<ContextKey> = LazyLock::new(|| hash_derive_key_context(DIGEST_CONTEXT));

/// A key's secret. Shown once, at creation; `Debug` shows no part of it.
pub struct ApiKey(String);

impl ApiKey {
    /// A new key: 256 bits from the operating system's generator.
    ///
    /// # Panics
    /// If the operating system gives no random bytes: a key made of anything else could be guessed.
    pub fn generate() -> Self {
        let mut bits = [0; 32];
        SysRng.try_fill_bytes(&mut bits).expect("the operating system's random generator works");
        Self::from_bits(bits)
    }

    fn from_bits(bits: [u8; 32]) -> Self {
        let mut text = [0; KEY_CHARS];
        text[..API_KEY_PREFIX.len()].copy_from_slice(API_KEY_PREFIX);
        write_base62(bits, &mut text[API_KEY_PREFIX.len()..KEY_CHECKSUM_AT]);
        let checksum = text_checksum(&text[..KEY_CHECKSUM_AT]);
        text[KEY_CHECKSUM_AT..].copy_from_slice(&checksum);
        Self(text.iter().copied().map(char::from).collect())
    }

    /// The secret's text, for the one response that shows it.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// The digest that is stored in place of the secret.
    pub fn digest(&self) -> Digest {
        Digest::hash_key(self.0.as_bytes())
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiKey(redacted)")
    }
}

/// The stored form of a key: BLAKE3 in key derivation mode, 32 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// The digest of a presented key: trims ASCII white space around it, checks length, prefix,
    /// alphabet and checksum, and only then hashes. `None` when the form is wrong. Allocates nothing.
    pub fn from_presented(presented: &[u8]) -> Option<Digest> {
        let key = presented.trim_ascii();
        is_well_formed(key).then(|| Self::hash_key(key))
    }

    fn hash_key(key: &[u8]) -> Digest {
        let mut hasher = blake3::Hasher::new_from_context_key(&DIGEST_CONTEXT_KEY);
        hasher.update(key);
        Digest(*hasher.finalize().as_bytes())
    }

    /// The digest's first 8 bytes, by which it is found among those of all keys.
    pub fn beginning(&self) -> [u8; 8] {
        *self.0.first_chunk().expect("32 bytes")
    }

    /// The key id: the digest's first 6 bytes, safe to log.
    pub fn key_id(&self) -> KeyId {
        let [a, b, c, d, e, f, ..] = self.0;
        KeyId([a, b, c, d, e, f])
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({}…)", self.key_id())
    }
}

/// The six base62 characters of the CRC-32 over a text, which a key and an access token end with.
pub fn text_checksum(covered: &[u8]) -> [u8; CHECKSUM_CHARS] {
    let mut checksum = [0; CHECKSUM_CHARS];
    write_base62(crc32fast::hash(covered).to_be_bytes(), &mut checksum);
    checksum
}

/// Whether a text may contain an API key, with or without its prefix: `hgk_` in any case, or a run of
/// letters and digits that is as long as a key and has digits, lower case and upper case; or an access token. Such a text
/// is not shown, logged or stored.
pub fn may_hold_key(text: &str) -> bool {
    if holds_key(text) {
        return true;
    }
    text.as_bytes().split(|byte| !byte.is_ascii_alphanumeric()).any(|run| {
        let has = |kind: fn(&u8) -> bool| run.iter().any(kind);
        (40..=53).contains(&run.len())
            && has(u8::is_ascii_digit)
            && has(u8::is_ascii_lowercase)
            && has(u8::is_ascii_uppercase)
    })
}

/// Whether an already trimmed text has a key's form and a matching checksum.
pub fn is_well_formed(key: &[u8]) -> bool {
    if key.len() != KEY_CHARS || !key.starts_with(API_KEY_PREFIX) {
        return false;
    }
    let (covered, checksum) = key.split_at(KEY_CHECKSUM_AT);
    // No early exit, so that the compiler can vectorize the loop.
    let base62 =
        covered[API_KEY_PREFIX.len()..].iter().fold(true, |all, byte| all & byte.is_ascii_alphanumeric());
    base62 && read_base62(checksum) == Some(u64::from(crc32fast::hash(covered)))
}

const BASE62_DIGITS: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";

/// Writes the big-endian `number` into `digits`, most significant digit first. The caller provides
/// enough digits for any number of that many bytes.
fn write_base62<const N: usize>(mut number: [u8; N], digits: &mut [u8]) {
    for digit in digits.iter_mut().rev() {
        let mut remainder = 0;
        for byte in &mut number {
            let part = remainder << 8 | u16::from(*byte);
            // The remainder of the byte before is below 62, so the quotient is below 256.
            #[expect(clippy::cast_possible_truncation, reason = "(61 * 256 + 255) / 62 = 255")]
            {
                *byte = (part / 62) as u8;
            }
            remainder = part % 62;
        }
        *digit = BASE62_DIGITS[usize::from(remainder)];
    }
    debug_assert!(number.iter().all(|&byte| byte == 0), "enough digits for the number");
}

/// Decodes at most 10 base62 digits (62¹⁰ is below 2⁶⁴). `None` if any byte is not a base62 digit.
fn read_base62(digits: &[u8]) -> Option<u64> {
    debug_assert!(digits.len() <= 10);
    digits.iter().try_fold(0, |number, &digit| {
        let value = match digit {
            b'0'..=b'9' => digit - b'0',
            b'A'..=b'Z' => digit - b'A' + 10,
            b'a'..=b'z' => digit - b'a' + 36,
            _ => return None,
        };
        Some(number * 62 + u64::from(value))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The reverse of `write_base62` for 256 bits: `None` if the digits write more than that.
    fn read_256_bits(digits: &[u8]) -> Option<[u8; 32]> {
        let mut number = [0u8; 32];
        for digit in digits {
            let mut carry = u32::try_from(BASE62_DIGITS.iter().position(|c| c == digit)?).ok()?;
            for byte in number.iter_mut().rev() {
                carry += u32::from(*byte) * 62;
                *byte = carry.to_le_bytes()[0];
                carry >>= 8;
            }
            if carry != 0 {
                return None;
            }
        }
        Some(number)
    }

    #[test]
    fn a_key_has_its_documented_form() {
        let key = ApiKey::generate();
        let text = key.expose();
        assert_eq!(text.len(), 53);
        assert!(text.starts_with("hgk_"));
        assert!(text[4..].bytes().all(|b| b.is_ascii_alphanumeric()));
        assert_ne!(text, ApiKey::generate().expose());
        assert_eq!(Digest::from_presented(text.as_bytes()), Some(key.digest()));
    }

    #[test]
    fn known_bits_make_a_known_key_and_digest() {
        // Computed outside this project (Python: int.from_bytes, zlib.crc32).
        assert_eq!(
            ApiKey::from_bits([0; 32]).expose(),
            "hgk_00000000000000000000000000000000000000000002R5lAf"
        );
        assert_eq!(
            ApiKey::from_bits([0xff; 32]).expose(),
            "hgk_yhjskwdA6OZ1AL1YmHWZWm8LLG7HjnuCA2j5rOw8Xp10qvaDx"
        );
        let key = ApiKey::from_bits([7; 32]);
        assert_eq!(key.digest().0, blake3::derive_key(DIGEST_CONTEXT, key.expose().as_bytes()));
        assert_eq!(key.digest().key_id().to_string(), blake3::Hash::from(key.digest().0).to_hex()[..12]);
    }

    #[test]
    fn any_changed_character_fails_the_checksum() {
        let key = ApiKey::from_bits([0x5a; 32]);
        for place in 0..KEY_CHARS {
            let mut text = key.expose().as_bytes().to_vec();
            let original = text[place];
            for other in (0..=255).filter(|&other| other != original) {
                text[place] = other;
                assert_eq!(Digest::from_presented(&text), None, "{other:#x} at {place}");
            }
        }
    }

    #[test]
    fn a_key_of_another_length_is_malformed_even_with_a_right_checksum() {
        let key = ApiKey::from_bits([1; 32]);
        let text = key.expose();
        assert_eq!(Digest::from_presented(&text.as_bytes()[..52]), None);
        assert_eq!(Digest::from_presented(format!("{text}0").as_bytes()), None);
        for secret_chars in [SECRET_CHARS - 1, SECRET_CHARS + 1] {
            let mut text = format!("hgk_{}", "a".repeat(secret_chars)).into_bytes();
            let mut checksum = [0; CHECKSUM_CHARS];
            write_base62(crc32fast::hash(&text).to_be_bytes(), &mut checksum);
            text.extend(checksum);
            assert_eq!(Digest::from_presented(&text), None, "{secret_chars} characters");
        }
    }

    #[test]
    fn a_right_checksum_does_not_excuse_a_wrong_prefix_or_alphabet() {
        for covered in [
            format!("hgx_{}", "a".repeat(SECRET_CHARS)),
            format!("HGK_{}", "a".repeat(SECRET_CHARS)),
            format!("hgk_{}-", "a".repeat(SECRET_CHARS - 1)),
        ] {
            let mut checksum = [0; CHECKSUM_CHARS];
            write_base62(crc32fast::hash(covered.as_bytes()).to_be_bytes(), &mut checksum);
            let text = [covered.as_bytes(), checksum.as_slice()].concat();
            assert_eq!(text.len(), KEY_CHARS);
            assert_eq!(Digest::from_presented(&text), None, "{covered}");
        }
    }

    #[test]
    fn white_space_around_a_key_is_no_part_of_it_and_inside_it_is_an_error() {
        let key = ApiKey::from_bits([9; 32]);
        let text = key.expose();
        assert_eq!(Digest::from_presented(format!(" \t{text}\r\n").as_bytes()), Some(key.digest()));
        let (a, b) = text.split_at(20);
        assert_eq!(Digest::from_presented(format!("{a} {b}").as_bytes()), None);
        assert_eq!(Digest::from_presented(b" "), None);
        assert_eq!(Digest::from_presented(b""), None);
    }

    #[test]
    fn debug_shows_no_part_of_a_key_and_only_the_handle_of_a_digest() {
        let key = ApiKey::generate();
        let shown = format!("{key:?} {key:#?}");
        assert!(
            key.expose().as_bytes()[4..]
                .windows(8)
                .all(|part| { !shown.as_bytes().windows(8).any(|shown| shown == part) })
        );
        assert_eq!(format!("{:?}", key.digest()), format!("Digest({}…)", key.digest().key_id()));
    }

    proptest! {
        #[test]
        fn the_characters_of_a_key_write_its_256_bits(bits: [u8; 32]) {
            let key = ApiKey::from_bits(bits);
            prop_assert_eq!(read_256_bits(&key.expose().as_bytes()[4..KEY_CHECKSUM_AT]), Some(bits));
            prop_assert_eq!(Digest::from_presented(key.expose().as_bytes()), Some(key.digest()));
        }

        #[test]
        fn six_characters_write_any_checksum(checksum: u32) {
            let mut digits = [0; CHECKSUM_CHARS];
            write_base62(checksum.to_be_bytes(), &mut digits);
            prop_assert_eq!(read_base62(&digits), Some(u64::from(checksum)));
        }

        #[test]
        fn no_bytes_are_too_strange_to_be_presented(bytes: Vec<u8>, tail in prop::collection::vec(any::<u8>(), 49)) {
            // A random CRC-32 fits one time in 2³²; not in this test.
            prop_assert_eq!(Digest::from_presented(&bytes), None);
            prop_assert_eq!(Digest::from_presented(&[API_KEY_PREFIX.as_slice(), &tail].concat()), None);
        }
    }
}
