//! Members of a request's JSON and of its query, as strictly as its description has them: what is not described as `null`
//! is refused with it, and a number is one that every client can hold.

use serde::de::{DeserializeOwned, Error};
use serde::{Deserialize, Deserializer};

/// The greatest number in a query, and the greatest offset: what programs with signed integers of 64 bits can hold.
pub(super) const PARAMETER_MAX: u64 = i64::MAX.unsigned_abs();

/// A member that is there. `null` is there too: it is refused unless `T` takes it.
pub(super) fn stated<'de, D: Deserializer<'de>, T: DeserializeOwned>(
    deserializer: D,
) -> Result<Option<T>, D::Error> {
    T::deserialize(deserializer).map(Some)
}

/// A whole number in a query: an offset, an amount.
pub(super) fn whole_parameter<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    let number = u64::deserialize(deserializer)?;
    match number <= PARAMETER_MAX {
        true => Ok(Some(number)),
        false => Err(Error::custom(format!("{number} is over {PARAMETER_MAX}"))),
    }
}

#[cfg(test)]
mod tests {
    use axum::extract::Query;
    use axum::http::Uri;

    use super::*;

    #[derive(Deserialize)]
    struct Example {
        #[serde(default, deserialize_with = "stated")]
        text: Option<String>,
        #[serde(default, deserialize_with = "whole_parameter")]
        number: Option<u64>,
    }

    #[test]
    fn null_is_not_the_same_as_nothing() {
        let text = |json: &str| serde_json::from_str::<Example>(json).map(|read| read.text).ok();
        assert_eq!(text("{}"), Some(None));
        assert_eq!(text("{\"text\": \"\"}"), Some(Some(String::new())));
        assert_eq!(text("{\"text\": null}"), None);
    }

    #[test]
    fn a_number_in_a_query_is_one_that_every_client_can_hold() {
        let number = |query: &str| {
            let uri: Uri = format!("/?{query}").parse().expect("a path");
            Query::<Example>::try_from_uri(&uri).map(|Query(read)| read.number).ok()
        };
        assert_eq!(number(""), Some(None));
        assert_eq!(number("number=0"), Some(Some(0)));
        assert_eq!(number("number=9223372036854775807"), Some(Some(PARAMETER_MAX)));
        for wrong in ["9223372036854775808", "18446744073709551616", "-1", "1.0", ""] {
            assert_eq!(number(&format!("number={wrong}")), None, "{wrong}");
        }
    }
}
