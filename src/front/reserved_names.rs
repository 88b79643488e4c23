//! The names of properties and headers that are Headgate's own. What it says about a message has such a name, so
//! that nobody else can say it: a publisher's are dropped and counted, over every transport.

/// What they begin with, in any case.
const RESERVED_NAME_PREFIX: &str = "headgate-";

/// Whether a user property or header is Headgate's own.
pub(super) fn is_reserved_name(name: &str) -> bool {
    let begin = name.as_bytes().get(..RESERVED_NAME_PREFIX.len());
    begin.is_some_and(|begin| begin.eq_ignore_ascii_case(RESERVED_NAME_PREFIX.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reserved_name_begins_with_the_prefix_in_any_case() {
        for name in ["headgate-offset", "Headgate-Key-Id", "HEADGATE-", "headgate-\u{e9}"] {
            assert!(is_reserved_name(name), "{name}");
        }
        for name in ["headgate", "", "x-headgate-offset", "headgat\u{e9}-x", "offset"] {
            assert!(!is_reserved_name(name), "{name}");
        }
    }
}
