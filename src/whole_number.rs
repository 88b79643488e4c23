//! Whole numbers in JSON as JSON Schema has them: `3.0` is the number `3`. Languages that know one kind of number alone
//! write them so.

use serde::{Deserialize, Deserializer, de};
use serde_json::Number;

/// Beyond it a float may have lost digits, and is no number that its sender has meant.
const EXACT_FLOAT_MAX: f64 = 9_007_199_254_740_991.0;

/// A whole number that is not negative, however it is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct WholeNumber(pub u64);

impl WholeNumber {
    /// The number, if it is one of these.
    pub fn of(number: &Number) -> Option<Self> {
        let of_float = || {
            let float = number.as_f64()?;
            let is_whole = float.fract() == 0.0 && (0.0..=EXACT_FLOAT_MAX).contains(&float);
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "it is whole, not negative, and below 2^53"
            )]
            is_whole.then_some(float as u64)
        };
        number.as_u64().or_else(of_float).map(Self)
    }
}

impl<'de> Deserialize<'de> for WholeNumber {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let number = Number::deserialize(deserializer)?;
        let fault = || de::Error::custom(format!("{number} is no whole number from 0 on"));
        Self::of(&number).ok_or_else(fault)
    }
}

/// Reads a member of a narrower type, for [`serde`]'s `deserialize_with`.
///
/// # Errors
/// For what is no whole number, and for one that is too large for the type.
pub fn narrowed<'de, D: Deserializer<'de>, T: TryFrom<u64>>(deserializer: D) -> Result<T, D::Error> {
    let WholeNumber(number) = WholeNumber::deserialize(deserializer)?;
    T::try_from(number).map_err(|_| de::Error::custom(format!("{number} is too large")))
}

/// Reads a member that may be `null`, for [`serde`]'s `deserialize_with`.
///
/// # Errors
/// For what is neither.
pub fn or_null<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    Ok(Option::<WholeNumber>::deserialize(deserializer)?.map(|WholeNumber(number)| number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_whole_however_it_is_written() {
        let read = |json: &str| serde_json::from_str::<WholeNumber>(json).ok().map(|WholeNumber(n)| n);
        for (json, number) in [
            ("0", Some(0)),
            ("3", Some(3)),
            ("3.0", Some(3)),
            ("3e2", Some(300)),
            ("-0.0", Some(0)),
            ("18446744073709551615", Some(u64::MAX)),
            ("9007199254740991.0", Some(9_007_199_254_740_991)),
            ("1e16", None),
            ("3.5", None),
            ("-1", None),
            ("-1.0", None),
            ("\"3\"", None),
            ("null", None),
            ("true", None),
        ] {
            assert_eq!(read(json), number, "{json}");
        }
    }
}
