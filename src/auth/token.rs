//! An access token: what stands in for a key where a key must not be, as in a page of a browser. It is made for a short
//! time from a key, and says itself what it is for: nothing is written for one, and nothing is remembered.
//!
//! A token is `hgt_`, then its claims and their signature in base64url, then the CRC-32 of all of that as 6 base62
//! characters, as a key has it: a mistyped or cut token is refused before anything is hashed. The signature is keyed
//! BLAKE3 under a secret that all gateways of one registry share (`registry/token_secret.rs`).
//!
//! ```text
//! version   1 byte, 1
//! key       8 bytes, the first of its digest, of which 6 are its id
//! ends at   8 bytes, microseconds since the Unix epoch, big-endian
//! scopes    1 byte, a bit for each
//! topics    1 byte for their number, then each filter behind 2 bytes for its length; none are all
//! signature 32 bytes, over all before it
//! ```

use std::fmt;

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use headgate_format::key::{CHECKSUM_CHARS, text_checksum};

use super::scope::Scopes;
use crate::filter::TopicFilter;
use crate::limits::{TOKEN_TOPICS_BYTES_MAX, TOKEN_TOPICS_MAX};
use crate::message::{KeyId, TimeMicros, holds_access_token};

/// The prefix of every access token.
pub const ACCESS_TOKEN_PREFIX: &[u8; 4] = b"hgt_";
/// The form of the claims.
const ACCESS_TOKEN_VERSION: u8 = 1;
/// The length of a signature.
const SIGNATURE_BYTES: usize = 32;
/// The longest claims.
const CLAIMS_BYTES_MAX: usize = 1 + 8 + 8 + 1 + 1 + 2 * TOKEN_TOPICS_MAX + TOKEN_TOPICS_BYTES_MAX;
/// The longest token.
pub const ACCESS_TOKEN_CHARS_MAX: usize =
    ACCESS_TOKEN_PREFIX.len() + (4 * (CLAIMS_BYTES_MAX + SIGNATURE_BYTES)).div_ceil(3) + CHECKSUM_CHARS;

const _: () = assert!(ACCESS_TOKEN_CHARS_MAX <= crate::limits::PRESENTED_KEY_BYTES_MAX);

/// What a token says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenClaims {
    /// How the digest of the key begins that it stands in for, and dies with.
    pub key: [u8; 8],
    /// What it may be used for; not managing.
    pub scopes: Scopes,
    /// When it ends.
    pub ends_at: TimeMicros,
    /// The topics that it is for, as its key knows them; empty for all.
    pub topics: Vec<TopicFilter>,
}

/// A token's text. `Debug` shows no part of it.
pub struct AccessToken(String);

/// What tokens are signed with. `Debug` shows no part of it.
#[derive(Clone, PartialEq, Eq)]
pub struct TokenSecret(pub [u8; 32]);

/// Why a text gives no claims.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenFault {
    /// It is cut, mistyped, or of a form that this Headgate does not know.
    Damaged,
    /// It was signed with another secret, or by nobody.
    Unsigned,
}

impl AccessToken {
    /// The token with these claims.
    pub fn sign(claims: &TokenClaims, secret: &TokenSecret) -> Self {
        let mut bytes = claims.encode();
        let signature = secret.signature_of(&bytes);
        bytes.extend_from_slice(signature.as_bytes());
        let mut text = String::from_utf8_lossy(ACCESS_TOKEN_PREFIX).into_owned();
        BASE64_URL_SAFE_NO_PAD.encode_string(&bytes, &mut text);
        let checksum = text_checksum(text.as_bytes());
        text.extend(checksum.map(char::from));
        Self(text)
    }

    /// The token's text, for the one response that shows it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for AccessToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AccessToken(redacted)")
    }
}

impl TokenSecret {
    fn signature_of(&self, claims: &[u8]) -> blake3::Hash {
        blake3::keyed_hash(&self.0, claims)
    }
}

impl fmt::Debug for TokenSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TokenSecret(redacted)")
    }
}

/// Whether a presented text, without white space before it, is meant to be an access token. A user name such as
/// `hgt_sensor` is not.
pub fn is_access_token(presented: &[u8]) -> bool {
    let start = presented.get(..ACCESS_TOKEN_LIKE_CHARS);
    let start = start.filter(|start| start.starts_with(ACCESS_TOKEN_PREFIX));
    start.is_some_and(|start| std::str::from_utf8(start).is_ok_and(holds_access_token))
}

/// As many characters of a token, its prefix among them, as [`holds_access_token`] asks for.
const ACCESS_TOKEN_LIKE_CHARS: usize = 28;

impl TokenClaims {
    /// The claims of a presented token, whose form and signature are right. Whether it has ended is not looked at.
    ///
    /// # Errors
    /// [`TokenFault`].
    pub fn read(presented: &[u8], secret: Option<&TokenSecret>) -> Result<Self, TokenFault> {
        let bytes = signed_bytes(presented.trim_ascii()).ok_or(TokenFault::Damaged)?;
        let (claims, signature) = bytes.split_last_chunk::<SIGNATURE_BYTES>().ok_or(TokenFault::Damaged)?;
        // Compared in the same time whatever differs.
        let is_signed = secret.is_some_and(|secret| secret.signature_of(claims) == *signature);
        if !is_signed {
            return Err(TokenFault::Unsigned);
        }
        Self::decode(claims).ok_or(TokenFault::Damaged)
    }

    /// The id of its key.
    pub fn key_id(&self) -> KeyId {
        let [id @ .., _, _] = self.key;
        KeyId(id)
    }

    fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![ACCESS_TOKEN_VERSION];
        bytes.extend_from_slice(&self.key);
        bytes.extend_from_slice(&self.ends_at.to_be_bytes());
        bytes.push(self.scopes.bits());
        bytes.push(u8::try_from(self.topics.len()).expect("a token has few topics"));
        for topic in &self.topics {
            let length = u16::try_from(topic.as_str().len()).expect("a filter is no longer than a topic");
            bytes.extend_from_slice(&length.to_be_bytes());
            bytes.extend_from_slice(topic.as_str().as_bytes());
        }
        bytes
    }

    fn decode(mut bytes: &[u8]) -> Option<Self> {
        fn take<'a>(bytes: &mut &'a [u8], count: usize) -> Option<&'a [u8]> {
            let (taken, rest) = bytes.split_at_checked(count)?;
            *bytes = rest;
            Some(taken)
        }
        fn text<'a>(bytes: &mut &'a [u8], length: usize) -> Option<&'a str> {
            std::str::from_utf8(take(bytes, length)?).ok()
        }
        let bytes = &mut bytes;
        if take(bytes, 1)? != [ACCESS_TOKEN_VERSION] {
            return None;
        }
        let key = take(bytes, 8)?.try_into().ok()?;
        let ends_at = TimeMicros::from_be_bytes(take(bytes, 8)?.try_into().ok()?);
        let scopes = Scopes::from_bits(take(bytes, 1)?[0])?;
        let topics = (0..take(bytes, 1)?[0]).map(|_| {
            let length = u16::from_be_bytes(take(bytes, 2)?.try_into().ok()?);
            TopicFilter::new(text(bytes, length.into())?).ok()
        });
        let topics = topics.collect::<Option<Vec<_>>>()?;
        bytes.is_empty().then_some(Self { key, scopes, ends_at, topics })
    }
}

/// The claims and the signature of a token whose form and checksum are right.
fn signed_bytes(token: &[u8]) -> Option<Vec<u8>> {
    if token.len() > ACCESS_TOKEN_CHARS_MAX {
        return None;
    }
    let (covered, checksum) = token.split_last_chunk::<CHECKSUM_CHARS>()?;
    let encoded = covered.strip_prefix(ACCESS_TOKEN_PREFIX)?;
    if text_checksum(covered) != *checksum {
        return None;
    }
    BASE64_URL_SAFE_NO_PAD.decode(encoded).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::auth::Scope;

    const SECRET: TokenSecret = TokenSecret([7; 32]);

    fn claims(topics: &[&str]) -> TokenClaims {
        TokenClaims {
            key: [1, 2, 3, 4, 5, 6, 7, 8],
            scopes: Scopes::from_slice(&[Scope::Subscribe]),
            ends_at: 1_800_000_000_000_000,
            topics: topics.iter().map(|topic| TopicFilter::new(topic).expect("a filter")).collect(),
        }
    }

    fn read(text: &[u8]) -> Result<TokenClaims, TokenFault> {
        TokenClaims::read(text, Some(&SECRET))
    }

    /// A token of this covered text, with a right checksum.
    fn sealed(covered: &str) -> Vec<u8> {
        [covered.as_bytes(), &text_checksum(covered.as_bytes())].concat()
    }

    #[test]
    fn a_token_says_what_it_was_made_for() {
        for claims in [claims(&[]), claims(&["spindle/#", "a/+/b"])] {
            let token = AccessToken::sign(&claims, &SECRET);
            assert_eq!(read(token.expose().as_bytes()), Ok(claims.clone()));
            assert_eq!(read(format!(" {}\r\n", token.expose()).as_bytes()), Ok(claims));
            let is_plain = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
            assert!(token.expose().starts_with("hgt_") && token.expose().bytes().all(is_plain));
            assert!(crate::message::holds_key(token.expose()));
            assert!(headgate_format::key::may_hold_key(&format!("a {} b", token.expose())));
        }
        assert_eq!(claims(&[]).key_id(), KeyId([1, 2, 3, 4, 5, 6]));
    }

    #[test]
    fn any_changed_character_and_any_cut_is_damage() {
        let token = AccessToken::sign(&claims(&["a/#"]), &SECRET);
        let text = token.expose().as_bytes();
        for place in 0..text.len() {
            assert_eq!(read(&text[..place]), Err(TokenFault::Damaged), "cut at {place}");
            for other in [b'A', b'z', b'0', b'-', b' ', 0, 0xff] {
                let mut text = text.to_vec();
                if std::mem::replace(&mut text[place], other) != other {
                    assert_eq!(read(&text), Err(TokenFault::Damaged), "{other:#x} at {place}");
                }
            }
        }
        assert_eq!(read(&[text, b"0"].concat()), Err(TokenFault::Damaged));
        assert_eq!(read(&b"a".repeat(ACCESS_TOKEN_CHARS_MAX + 1)), Err(TokenFault::Damaged));
    }

    #[test]
    fn a_forged_token_is_signed_by_nobody() {
        let token = AccessToken::sign(&claims(&["a/#"]), &SECRET);
        let encoded = &token.expose()[4..token.expose().len() - CHECKSUM_CHARS];
        let bytes = BASE64_URL_SAFE_NO_PAD.decode(encoded).expect("base64url");
        for bit in 0..8 * bytes.len() {
            let mut bytes = bytes.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let forged = sealed(&format!("hgt_{}", BASE64_URL_SAFE_NO_PAD.encode(&bytes)));
            assert_eq!(read(&forged), Err(TokenFault::Unsigned), "bit {bit}");
        }
        let text = token.expose().as_bytes();
        assert_eq!(TokenClaims::read(text, Some(&TokenSecret([8; 32]))), Err(TokenFault::Unsigned));
        assert_eq!(TokenClaims::read(text, None), Err(TokenFault::Unsigned));
        // Too short to have a signature.
        assert_eq!(read(&sealed("hgt_AAAA")), Err(TokenFault::Damaged));
    }

    #[test]
    fn the_largest_token_is_within_its_bound() {
        let length = TOKEN_TOPICS_BYTES_MAX / TOKEN_TOPICS_MAX;
        let topics = vec!["t".repeat(length); TOKEN_TOPICS_MAX];
        let topics: Vec<&str> = topics.iter().map(String::as_str).collect();
        let claims = claims(&topics);
        let token = AccessToken::sign(&claims, &SECRET);
        assert_eq!(token.expose().len(), ACCESS_TOKEN_CHARS_MAX);
        assert_eq!(read(token.expose().as_bytes()), Ok(claims));
    }

    #[test]
    fn a_name_that_begins_like_a_token_is_none() {
        let token = AccessToken::sign(&claims(&[]), &SECRET);
        let text = token.expose().as_bytes();
        assert!(is_access_token(text) && is_access_token(&text[..ACCESS_TOKEN_LIKE_CHARS]));
        for name in [
            &text[..ACCESS_TOKEN_LIKE_CHARS - 1],
            b"hgt_",
            b"hgt_sensor",
            b"hgt_sensor of the left press, 4 m high",
        ] {
            assert!(!is_access_token(name), "{name:?}");
        }
    }

    #[test]
    fn debug_shows_no_part_of_a_token_or_of_its_secret() {
        let shown = format!("{:?} {:?}", AccessToken::sign(&claims(&[]), &SECRET), SECRET);
        assert_eq!(shown, "AccessToken(redacted) TokenSecret(redacted)");
    }

    proptest! {
        #[test]
        fn whatever_a_token_says_is_read_back(
            key: [u8; 8], ends_at: i64, scopes in 1u8..4, secret: [u8; 32],
            topics in prop::collection::vec("[a-zé/+]{1,20}", 0..8),
        ) {
            let topics: Vec<_> = topics.iter().filter_map(|topic| TopicFilter::new(topic).ok()).collect();
            let scopes = Scopes::from_bits(scopes).expect("scopes");
            let claims = TokenClaims { key, scopes, ends_at, topics };
            let secret = TokenSecret(secret);
            let token = AccessToken::sign(&claims, &secret);
            prop_assert!(token.expose().len() <= ACCESS_TOKEN_CHARS_MAX);
            prop_assert_eq!(TokenClaims::read(token.expose().as_bytes(), Some(&secret)), Ok(claims));
        }

        #[test]
        fn no_bytes_are_too_strange_to_be_presented(bytes: Vec<u8>, text in "[A-Za-z0-9_-]{0,200}") {
            prop_assert_eq!(read(&bytes), Err(TokenFault::Damaged));
            let fault = read(&sealed(&format!("hgt_{text}")));
            prop_assert!(fault.is_err());
        }
    }
}
