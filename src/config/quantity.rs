//! Quantities as people write them: `64MiB`, `1.5GB`, `10s`, `1h30m`. A setting's name says in which unit its
//! number is; a text with a unit is converted to that, exactly or not at all.

/// What the number of a setting counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SettingUnit {
    /// Bytes.
    Bytes,
    /// Milliseconds.
    Milliseconds,
    /// Seconds.
    Seconds,
    /// Anything else: connections, messages, attempts a second.
    Count,
}

/// Sizes, by what is written after the number in lower case. A bare `M` is none: half the world reads it as a
/// million, and the other half as 1,048,576.
const BYTE_UNITS: [(&str, u128); 13] = [
    ("b", 1),
    ("kb", 1_000),
    ("mb", 1_000_000),
    ("gb", 1_000_000_000),
    ("tb", 1_000_000_000_000),
    ("kib", 1 << 10),
    ("mib", 1 << 20),
    ("gib", 1 << 30),
    ("tib", 1 << 40),
    ("ki", 1 << 10),
    ("mi", 1 << 20),
    ("gi", 1 << 30),
    ("ti", 1 << 40),
];

/// Times in nanoseconds, by what is written after the number.
const TIME_UNITS: [(&str, u128); 11] = [
    ("ns", 1),
    ("us", 1_000),
    ("µs", 1_000),
    ("ms", 1_000_000),
    ("s", 1_000_000_000),
    ("sec", 1_000_000_000),
    ("m", 60_000_000_000),
    ("min", 60_000_000_000),
    ("h", 3_600_000_000_000),
    ("d", 86_400_000_000_000),
    ("w", 604_800_000_000_000),
];

/// A time in milliseconds: `250ms`, `30s`, `1h30m`, or a number of seconds.
pub fn parse_duration_ms(text: &str) -> Option<u64> {
    match text.parse::<u64>() {
        Ok(seconds) => seconds.checked_mul(1_000),
        Err(_) => SettingUnit::Milliseconds.read(text).ok(),
    }
}

/// A quantity in the unit that its name says: `stored_age_s` of `7d`, `payload_bytes` of `4KiB`.
///
/// # Errors
/// What it has to be.
pub fn parse_quantity(name: &str, text: &str) -> Result<u64, &'static str> {
    SettingUnit::of_setting(name).read(text)
}

/// Digits after a decimal point: more would not be exact in 128 bits.
const FRACTION_DIGITS_MAX: usize = 9;

impl SettingUnit {
    /// The unit that a setting's name says: `body_bytes_max`, `drain_ms_max`, `expiry_s`.
    pub(super) fn of_setting(name: &str) -> Self {
        let words: Vec<&str> = name.split('_').collect();
        let is_rate = words.contains(&"per");
        match words.iter().find(|word| matches!(**word, "bytes" | "ms" | "s")) {
            _ if is_rate => Self::Count,
            Some(&"bytes") => Self::Bytes,
            Some(&"ms") => Self::Milliseconds,
            Some(_) => Self::Seconds,
            None => Self::Count,
        }
    }

    /// Reads a number, with or without a unit, as a number in this unit.
    ///
    /// # Errors
    /// What it has to be, for the setting's owner.
    pub(super) fn read(self, text: &str) -> Result<u64, &'static str> {
        let text = text.trim();
        let (units, in_one, rule): (&[(&str, u128)], u128, _) = match self {
            Self::Count => return whole_number(text).ok_or("it has to be a whole number, without a unit"),
            Self::Bytes => (
                &BYTE_UNITS,
                1,
                "it has to be whole bytes, as a number or with a unit: 64MiB, 1.5GiB (1024), 64MB, 500kB (1000)",
            ),
            Self::Milliseconds => (
                &TIME_UNITS,
                1_000_000,
                "it has to be whole milliseconds, as a number or with units: 500ms, 10s, 1m30s, 24h",
            ),
            Self::Seconds => (
                &TIME_UNITS,
                1_000_000_000,
                "it has to be whole seconds, as a number or with units: 10s, 1m30s, 24h, 7d",
            ),
        };
        if let Some(number) = whole_number(text) {
            return Ok(number);
        }
        let total = sum_of_parts(text, units).ok_or(rule)?;
        if total % in_one != 0 {
            return Err(rule);
        }
        u64::try_from(total / in_one).map_err(|_| rule)
    }
}

/// A whole number, with `_` between its digits as TOML allows it.
fn whole_number(text: &str) -> Option<u64> {
    let is_plain = text.starts_with(|c: char| c.is_ascii_digit())
        && text.ends_with(|c: char| c.is_ascii_digit())
        && !text.contains("__");
    is_plain.then(|| text.replace('_', "").parse().ok()).flatten()
}

/// The sum of parts that are a number and a unit each: `1h30m`.
fn sum_of_parts(text: &str, units: &[(&str, u128)]) -> Option<u128> {
    let (mut rest, mut total) = (text, 0u128);
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, after) = rest.split_at(digits);
        let after = after.trim_start();
        let end = after.find(|c: char| c.is_ascii_digit()).unwrap_or(after.len());
        let (unit, next) = after.split_at(end);
        let unit = unit.trim().to_lowercase();
        let (_, in_one) = units.iter().find(|(name, _)| *name == unit)?;
        total = total.checked_add(scaled(number, *in_one)?)?;
        rest = next;
    }
    (!text.is_empty()).then_some(total)
}

/// A decimal number times `in_one`, if that is whole.
fn scaled(number: &str, in_one: u128) -> Option<u128> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    if fraction.len() > FRACTION_DIGITS_MAX || fraction.is_empty() {
        return None;
    }
    let power = 10u128.pow(u32::try_from(fraction.len()).ok()?);
    let digits: u128 = whole.parse::<u64>().ok()?.into();
    let fraction: u128 = fraction.parse::<u64>().ok()?.into();
    let scaled = digits.checked_mul(power)?.checked_add(fraction)?.checked_mul(in_one)?;
    (scaled % power == 0).then_some(scaled / power)
}

#[cfg(test)]
mod tests {
    use super::SettingUnit::{Bytes, Count, Milliseconds, Seconds};
    use super::*;

    #[test]
    fn a_setting_s_name_says_its_unit() {
        for (name, unit) in [
            ("body_bytes_max", Bytes),
            ("segment_bytes", Bytes),
            ("drain_ms_max", Milliseconds),
            ("session_expiry_s_max", Seconds),
            ("dedup_window_s", Seconds),
            ("failures_per_s", Count),
            ("connections_max", Count),
        ] {
            assert_eq!(SettingUnit::of_setting(name), unit, "{name}");
        }
    }

    #[test]
    fn sizes_and_times_are_read_with_and_without_a_unit() {
        for (unit, text, number) in [
            (Bytes, "67108864", 67_108_864),
            (Bytes, "64MiB", 67_108_864),
            (Bytes, " 64 mib ", 67_108_864),
            (Bytes, "64Mi", 67_108_864),
            (Bytes, "64MB", 64_000_000),
            (Bytes, "1.5GiB", 1_610_612_736),
            (Bytes, "1_024", 1_024),
            (Milliseconds, "10s", 10_000),
            (Milliseconds, "0.5s", 500),
            (Milliseconds, "1m30s", 90_000),
            (Seconds, "24h", 86_400),
            (Seconds, "7d", 604_800),
            (Seconds, "2000ms", 2),
            (Count, "100_000", 100_000),
        ] {
            assert_eq!(unit.read(text), Ok(number), "{text}");
        }
    }

    #[test]
    fn what_is_not_exact_or_could_be_read_in_two_ways_is_an_error() {
        for (unit, text) in [
            (Bytes, "64M"),
            (Bytes, "1.5B"),
            (Bytes, "10s"),
            (Bytes, "-1"),
            (Bytes, "MiB"),
            (Bytes, ""),
            (Bytes, "99999999TiB"),
            (Milliseconds, "1500us"),
            (Seconds, "1500ms"),
            (Seconds, "1h30"),
            (Seconds, "1..5s"),
            (Seconds, "é1s"),
            (Count, "10k"),
            (Count, "1__0"),
            (Count, "18446744073709551616"),
        ] {
            assert!(unit.read(text).is_err(), "{text}");
        }
    }
}
