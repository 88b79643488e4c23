//! Times as PostgreSQL has them: microseconds from 2000-01-01 on.

use std::error::Error;

use bytes::{BufMut, BytesMut};
use tokio_postgres::types::{FromSql, IsNull, ToSql, Type, to_sql_checked};

/// From the Unix epoch to PostgreSQL's, 2000-01-01, in microseconds.
pub(crate) const POSTGRES_EPOCH_US: i64 = 946_684_800_000_000;

/// A `timestamptz`, in microseconds since the Unix epoch. The least and the greatest number stand for the infinities; whatever
/// else is beyond PostgreSQL's calendar is its nearest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PostgresTime(pub i64);

/// Microseconds since PostgreSQL's epoch, within what it has days for: 4713 BC to 294276 AD.
pub(crate) fn timestamp_of(unix_us: i64) -> i64 {
    const FIRST: i64 = -211_813_488_000_000_000;
    const LAST: i64 = 9_223_371_331_199_999_999;
    unix_us.saturating_sub(POSTGRES_EPOCH_US).clamp(FIRST, LAST)
}

impl<'a> FromSql<'a> for PostgresTime {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn Error + Sync + Send>> {
        let at = i64::from_be_bytes(raw.try_into()?);
        Ok(Self(at.saturating_add(POSTGRES_EPOCH_US)))
    }

    fn accepts(of: &Type) -> bool {
        *of == Type::TIMESTAMPTZ
    }
}

impl ToSql for PostgresTime {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn Error + Sync + Send>> {
        out.put_i64(match self.0 {
            i64::MIN | i64::MAX => self.0,
            at => timestamp_of(at),
        });
        Ok(IsNull::No)
    }

    fn accepts(of: &Type) -> bool {
        *of == Type::TIMESTAMPTZ
    }

    to_sql_checked!();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_count_from_2000_and_stay_within_the_calendar() {
        assert_eq!(timestamp_of(POSTGRES_EPOCH_US + 5), 5);
        assert_eq!(timestamp_of(i64::MIN), -211_813_488_000_000_000);
        assert!(timestamp_of(i64::MAX) <= 9_223_371_331_199_999_999);
    }

    #[test]
    fn a_time_comes_back_as_it_was_given() {
        for at in [0, -1, 1_795_426_119_000_120, POSTGRES_EPOCH_US] {
            let mut raw = BytesMut::new();
            PostgresTime(at).to_sql(&Type::TIMESTAMPTZ, &mut raw).expect("a time");
            assert_eq!(PostgresTime::from_sql(&Type::TIMESTAMPTZ, &raw).expect("a time"), PostgresTime(at));
        }
    }
}
