//! A JSON value by its pointer (RFC 6901), found without building the value around it.

use std::fmt;

use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use super::samples::MemberName;

/// The text of the value at `pointer`, if `text` is JSON that has it. Of a member that comes twice, the first one
/// counts, as in `latest`.
pub(super) fn value_at<'a>(text: &'a str, pointer: &str) -> Option<&'a str> {
    let mut found = text;
    for part in pointer.split('/').skip(1) {
        let name = unescape(part);
        let mut json = serde_json::Deserializer::from_str(found);
        found = json.deserialize_any(PartVisitor { name: &name }).ok()??.get();
        // What follows the outermost value would make it no JSON; inside, the parser has checked that.
        json.end().ok()?;
    }
    Some(found.trim_ascii())
}

fn unescape(part: &str) -> std::borrow::Cow<'_, str> {
    match part.contains('~') {
        true => part.replace("~1", "/").replace("~0", "~").into(),
        false => part.into(),
    }
}

/// Finds a member or an element, and reads to the end of what it is in.
struct PartVisitor<'n> {
    name: &'n str,
}

impl<'a> Visitor<'a> for PartVisitor<'_> {
    type Value = Option<&'a RawValue>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object or an array")
    }

    fn visit_map<A: MapAccess<'a>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut found = None;
        while let Some(MemberName(name)) = map.next_key::<MemberName<'a>>()? {
            if found.is_none() && name == self.name {
                found = Some(map.next_value()?);
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(found)
    }

    fn visit_seq<A: SeqAccess<'a>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let is_index = self.name == "0" || !self.name.starts_with(['0', '+']);
        let wanted = self.name.parse::<usize>().ok().filter(|_| is_index);
        let (mut at, mut found) = (0, None);
        loop {
            if wanted == Some(at) {
                let Some(element) = seq.next_element()? else { return Ok(None) };
                found = Some(element);
            } else if seq.next_element::<IgnoredAny>()?.is_none() {
                return Ok(found);
            }
            at += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pointer_finds_the_first_member_of_its_name_at_any_depth() {
        let text = r#" {"a": {"b/c": [1, {"~": 2.50}]}, "t": 1, "t": 2, "\u0074": 3, "": 7} "#;
        for (pointer, value) in [
            ("/t", Some("1")),
            ("/a/b~1c/1/~0", Some("2.50")),
            ("/a/b~1c/0", Some("1")),
            ("/", Some("7")),
            ("/a/b~1c/01", None),
            ("/a/b~1c/+1", None),
            ("/a/b~1c/2", None),
            ("/x", None),
            ("/t/x", None),
        ] {
            assert_eq!(value_at(text, pointer), value, "{pointer}");
        }
        for text in ["", "{", r#"{"t": 1} x"#, r#"{"t": 1, "a": }"#, "[", "\u{feff}{\"t\": 1}"] {
            assert_eq!(value_at(text, "/t"), None, "{text}");
        }
    }
}
