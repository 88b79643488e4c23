//! A presented key: whatever it is, it is told apart from one that Headgate made.

use headgate_format::key::{ApiKey, Digest};

/// Tries bytes as a key, alone and in the place of a part of a good one.
pub fn run(data: &[u8]) {
    if let Some(digest) = Digest::from_presented(data) {
        // The form is exact: changing any one byte of a key makes it none.
        let key = data.trim_ascii().to_vec();
        for at in 0..key.len() {
            let mut changed = key.clone();
            changed[at] ^= 1;
            assert!(Digest::from_presented(&changed).is_none(), "byte {at}");
        }
        assert!(Digest::from_presented(&key).is_some_and(|again| again == digest));
    }
    let good = ApiKey::generate();
    assert!(Digest::from_presented(good.expose().as_bytes()).is_some_and(|digest| digest == good.digest()));
    if let Some((&at, bytes)) = data.split_first() {
        let mut mixed = good.expose().as_bytes().to_vec();
        let at = usize::from(at) % mixed.len();
        let end = (at + bytes.len()).min(mixed.len());
        mixed[at..end].copy_from_slice(&bytes[..end - at]);
        let same = mixed == good.expose().as_bytes();
        // Up to four bytes are within the reach of a CRC-32: it finds every such change.
        if !same && end - at <= 4 && mixed[at..end].iter().all(|byte| !byte.is_ascii_whitespace()) {
            assert!(Digest::from_presented(&mixed).is_none(), "{}..{end}", at);
        } else {
            let _ = Digest::from_presented(&mixed);
        }
    }
}
