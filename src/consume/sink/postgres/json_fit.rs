//! Whether PostgreSQL takes a payload as `jsonb`. One value that it refuses ends the whole copy that the value is in, so
//! that each is looked at before. What this lets through PostgreSQL takes; some of what this refuses it would take too.

/// Objects and arrays inside one another. PostgreSQL parses by recursion, within `max_stack_depth`.
const JSON_DEPTH_MAX: usize = 256;
/// The largest exponent of a number, and the sum of all exponents of a payload: `1e999` is three bytes as it comes, and a
/// thousand whenever it is read.
const JSON_EXPONENT_MAX: u32 = 400;
const JSON_EXPONENTS_MAX: u32 = 100_000;
/// Digits of a number.
const JSON_DIGITS_MAX: usize = 1000;

/// What a payload is for `jsonb`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum JsonFit {
    /// JSON that PostgreSQL takes.
    Fits,
    /// No JSON.
    NotJson,
    /// JSON that it may not take. The text says why.
    Beyond(&'static str),
}

/// Looks at a payload.
pub(super) fn fit_of(text: &str) -> JsonFit {
    let mut scan = JsonScan { bytes: text.as_bytes(), at: 0, exponents: 0, beyond: None };
    match scan.document() {
        Some(()) => scan.beyond.map_or(JsonFit::Fits, JsonFit::Beyond),
        None => JsonFit::NotJson,
    }
}

/// A place in a text that may be JSON (RFC 8259). `None` of a method: it is not.
struct JsonScan<'a> {
    bytes: &'a [u8],
    at: usize,
    exponents: u32,
    /// Why PostgreSQL may not take it, if it is JSON.
    beyond: Option<&'static str>,
}

impl JsonScan<'_> {
    fn document(&mut self) -> Option<()> {
        // For each object or array that is open, whether it is an object.
        let mut open: Vec<bool> = Vec::new();
        loop {
            self.skip_space();
            // A value begins here.
            match self.peek()? {
                byte @ (b'{' | b'[') => {
                    self.at += 1;
                    self.skip_space();
                    let is_object = byte == b'{';
                    if open.len() >= JSON_DEPTH_MAX {
                        self.beyond.get_or_insert("it is nested too deep");
                    }
                    if self.peek()? == byte + 2 {
                        self.at += 1;
                    } else {
                        open.push(is_object);
                        if is_object {
                            self.name()?;
                        }
                        continue;
                    }
                }
                b'"' => self.string()?,
                b'-' | b'0'..=b'9' => self.number()?,
                b't' => self.word(b"true")?,
                b'f' => self.word(b"false")?,
                b'n' => self.word(b"null")?,
                _ => return None,
            }
            // A value has ended, and with it perhaps what it is in.
            loop {
                self.skip_space();
                let Some(is_object) = open.last().copied() else {
                    return (self.at == self.bytes.len()).then_some(());
                };
                match self.next()? {
                    b',' => {
                        if is_object {
                            self.skip_space();
                            self.name()?;
                        }
                        break;
                    }
                    b'}' if is_object => drop(open.pop()),
                    b']' if !is_object => drop(open.pop()),
                    _ => return None,
                }
            }
        }
    }

    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    fn next(&mut self) -> Option<u8> {
        let byte = self.peek()?;
        self.at += 1;
        Some(byte)
    }

    fn skip_space(&mut self) {
        while let Some(b' ' | b'\t' | b'\n' | b'\r') = self.peek() {
            self.at += 1;
        }
    }

    fn word(&mut self, word: &[u8]) -> Option<()> {
        let is_there = self.bytes[self.at..].starts_with(word);
        self.at += word.len();
        is_there.then_some(())
    }

    /// A name and its colon.
    fn name(&mut self) -> Option<()> {
        (self.peek()? == b'"').then_some(())?;
        self.string()?;
        self.skip_space();
        (self.next()? == b':').then_some(())
    }

    fn string(&mut self) -> Option<()> {
        self.at += 1;
        let mut high_surrogate = false;
        loop {
            let byte = self.next()?;
            if byte == b'\\' && self.peek() == Some(b'u') {
                self.at += 1;
                let unit = self.hex4()?;
                match (unit, high_surrogate) {
                    (0, _) => drop(self.beyond.get_or_insert("it has \\u0000 in a text")),
                    (0xdc00..=0xdfff, true) => {}
                    (0xdc00..=0xdfff, false) | (_, true) => {
                        self.beyond.get_or_insert("it has half a surrogate pair in a text");
                    }
                    _ => {}
                }
                high_surrogate = (0xd800..=0xdbff).contains(&unit);
                continue;
            }
            if high_surrogate {
                self.beyond.get_or_insert("it has half a surrogate pair in a text");
                high_surrogate = false;
            }
            match byte {
                b'"' => return Some(()),
                b'\\' => match self.next()? {
                    b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' => {}
                    _ => return None,
                },
                0..=0x1f => return None,
                _ => {}
            }
        }
    }

    fn hex4(&mut self) -> Option<u32> {
        (0..4).try_fold(0, |unit, _| Some(unit * 16 + char::from(self.next()?).to_digit(16)?))
    }

    fn number(&mut self) -> Option<()> {
        let begin = self.at;
        if self.peek() == Some(b'-') {
            self.at += 1;
        }
        match self.next()? {
            b'0' => {}
            b'1'..=b'9' => self.digits(),
            _ => return None,
        }
        if self.peek() == Some(b'.') {
            self.at += 1;
            self.one_digit()?;
        }
        if self.at - begin > JSON_DIGITS_MAX {
            self.beyond.get_or_insert("it has a number with too many digits");
        }
        if let Some(b'e' | b'E') = self.peek() {
            self.at += 1;
            if let Some(b'+' | b'-') = self.peek() {
                self.at += 1;
            }
            let digits = self.at;
            self.one_digit()?;
            let exponent = self.bytes[digits..self.at].iter().fold(0_u32, |exponent, digit| {
                exponent.saturating_mul(10).saturating_add(u32::from(digit - b'0'))
            });
            self.exponents = self.exponents.saturating_add(exponent);
            if exponent > JSON_EXPONENT_MAX || self.exponents > JSON_EXPONENTS_MAX {
                self.beyond.get_or_insert("it has a number beyond what numeric is for");
            }
        }
        Some(())
    }

    fn one_digit(&mut self) -> Option<()> {
        self.next()?.is_ascii_digit().then_some(())?;
        self.digits();
        Some(())
    }

    fn digits(&mut self) {
        while self.peek().is_some_and(|byte| byte.is_ascii_digit()) {
            self.at += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::value::RawValue;

    use super::*;

    #[test]
    fn what_postgresql_cannot_take_is_known_before() {
        for text in [
            "{}",
            " [ ] ",
            "21.50",
            "-0",
            "1e400",
            "\"\\ud83d\\ude00\"",
            "{\"a\": [1, {\"b\": null}, true], \"c\": \"\\n\"}",
        ] {
            assert_eq!(fit_of(text), JsonFit::Fits, "{text}");
        }
        for text in [
            "",
            "on",
            "{",
            "[1,]",
            "{\"a\":1,}",
            "01",
            "1.",
            "\"\u{1}\"",
            "\"\\x\"",
            "1 2",
            "{\"a\" 1}",
            "[1}",
            "\0",
        ] {
            assert_eq!(fit_of(text), JsonFit::NotJson, "{text}");
        }
        let deep = format!("{}{}", "[".repeat(JSON_DEPTH_MAX + 1), "]".repeat(JSON_DEPTH_MAX + 1));
        let many = format!("[{}1]", "1e400,".repeat(251));
        let long = "1".repeat(JSON_DIGITS_MAX + 1);
        for text in [
            "\"\\u0000\"",
            "{\"\\u0000\": 1}",
            "\"\\ud800\"",
            "\"\\ude00\"",
            "\"\\ud800x\"",
            "1e401",
            &deep,
            &many,
            &long,
        ] {
            assert!(matches!(fit_of(text), JsonFit::Beyond(_)), "{text}");
        }
    }

    proptest! {
        #[test]
        fn json_is_what_it_is_to_another_parser(text in r#"[\[\]{}:,"\\ue0-9.+\- tfn1a]{0,24}"#) {
            let is_json = serde_json::from_str::<&RawValue>(&text).is_ok();
            prop_assert_eq!(fit_of(&text) != JsonFit::NotJson, is_json, "{}", text);
        }
    }
}
