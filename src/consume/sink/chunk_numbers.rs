//! A scanner of the numbers in a chunk of samples. A day of a busy topic has a million of them, so they are read byte by byte,
//! once; what is longer than usual is left to Rust's own parser.

use memchr::memmem;

/// Digits of which any number fits in an `i64`, and is exact in an `f64`.
const INTEGER_DIGITS_MAX: usize = 18;
const EXACT_DIGITS_MAX: usize = 15;

/// Powers of ten that are exact in an `f64`.
const EXACT_POWERS: [f64; 23] = [
    1e0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9, 1e10, 1e11, 1e12, 1e13, 1e14, 1e15, 1e16, 1e17, 1e18,
    1e19, 1e20, 1e21, 1e22,
];

/// Scans a text from its beginning to its end.
pub(super) struct NumberScanner<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> NumberScanner<'a> {
    pub(super) fn new(text: &'a str) -> Self {
        Self { text, at: 0 }
    }

    #[inline]
    pub(super) fn is_at_end(&self) -> bool {
        self.at >= self.text.len()
    }

    #[inline]
    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    /// Takes this byte, if it comes next.
    #[inline]
    pub(super) fn expect(&mut self, byte: u8) -> Option<()> {
        (self.peek()? == byte).then(|| self.at += 1)
    }

    /// Goes on behind the next place where `mark` is, or at the end.
    pub(super) fn skip_behind(&mut self, mark: &[u8]) {
        let rest = self.text.as_bytes().get(self.at..).unwrap_or_default();
        self.at = memmem::find(rest, mark).map_or(self.text.len(), |place| self.at + place + mark.len());
    }

    /// Takes digits. Returns what they are behind `before`, and how many there were; right as long as all fit in a `u64`.
    #[inline]
    fn digits(&mut self, before: u64) -> (u64, usize) {
        let (begin, mut value) = (self.at, before);
        while let Some(digit) = self.peek().map(|byte| byte.wrapping_sub(b'0')).filter(|digit| *digit < 10) {
            value = value.wrapping_mul(10).wrapping_add(u64::from(digit));
            self.at += 1;
        }
        (value, self.at - begin)
    }

    /// Takes an integer.
    #[inline]
    pub(super) fn integer(&mut self) -> Option<i64> {
        let begin = self.at;
        let is_negative = self.expect(b'-').is_some();
        match self.digits(0) {
            (value, 1..=INTEGER_DIGITS_MAX) => {
                Some(if is_negative { -value.cast_signed() } else { value.cast_signed() })
            }
            _ => self.text.get(begin..self.at)?.parse().ok(),
        }
    }

    /// Takes a number. One of few digits without an exponent is a quotient of two numbers that an `f64` has exactly, and so
    /// is rounded once, correctly.
    #[inline]
    pub(super) fn number(&mut self) -> Option<f64> {
        let begin = self.at;
        let is_negative = self.expect(b'-').is_some();
        let (whole, whole_digits) = self.digits(0);
        let (value, digits) = match self.expect(b'.') {
            Some(()) => self.digits(whole),
            None => (whole, 0),
        };
        let is_short = whole_digits > 0 && whole_digits + digits <= EXACT_DIGITS_MAX;
        if is_short && matches!(self.peek(), None | Some(b',' | b']')) {
            #[expect(clippy::cast_precision_loss, reason = "of 15 digits, so that it is exact")]
            let value = value as f64 / EXACT_POWERS[digits];
            return Some(if is_negative { -value } else { value });
        }
        self.at += self.text.as_bytes()[self.at..].iter().take_while(|byte| !b",]".contains(byte)).count();
        self.text.get(begin..self.at)?.parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seeded_random::SeededRandom;

    #[test]
    fn numbers_are_what_rusts_own_parser_reads() {
        let mut random = SeededRandom(1);
        let mut texts: Vec<String> = [
            "0",
            "-0",
            "0.0",
            "-0.0",
            "21.5",
            "-3.25",
            "900.0",
            "1e300",
            "-1e-300",
            "1.5e3",
            "123456789012345",
            "0.1",
            "1234567890123456",
            "0.000000000000001",
            "0.0000000000000000000000001",
            "9007199254740993",
            "1e999",
            "4.35",
            "123456789.123456789",
            "000000000000000000000000000001.5",
            "179769313486231570000000000000000000000.0",
        ]
        .map(str::to_owned)
        .into();
        for _ in 0..20_000 {
            let count = 1 + random.below(18);
            let digits: String = (0..count).map(|_| char::from(b"0123456789"[random.below(10)])).collect();
            let (whole, fraction) = digits.split_at(random.below(digits.len() + 1));
            let sign = if random.percent(30) { "-" } else { "" };
            texts.push(format!("{sign}{}.{}0", if whole.is_empty() { "0" } else { whole }, fraction));
            texts
                .push(serde_json::to_string(&f64::from_bits(random.below(usize::MAX) as u64)).expect("JSON"));
        }
        for text in texts.iter().filter(|text| *text != "null") {
            for end in ["", "]", ",1"] {
                let number = format!("{text}{end}");
                let mut scanner = NumberScanner::new(&number);
                let read = scanner.number().map(f64::to_bits);
                assert_eq!(read, text.parse::<f64>().ok().map(f64::to_bits), "{text}");
                assert_eq!(scanner.at, text.len(), "{text}");
            }
        }
        for text in ["", "-", "x", ".", "-.", "1x"] {
            assert_eq!(NumberScanner::new(text).number(), text.parse::<f64>().ok(), "{text}");
        }
    }

    #[test]
    fn integers_are_what_rusts_own_parser_reads() {
        for text in [
            "0",
            "-0",
            "7",
            "-7",
            "999999999999999999",
            "1000000000000000000",
            "9223372036854775807",
            "-9223372036854775808",
            "9223372036854775808",
            "",
            "-",
            "99999999999999999999999999",
            "0000000000000000000000000000007",
        ] {
            assert_eq!(NumberScanner::new(text).integer(), text.parse::<i64>().ok(), "{text}");
        }
    }
}
