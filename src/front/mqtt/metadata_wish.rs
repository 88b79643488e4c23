//! The wish for metadata: the user property `headgate-metadata` of a SUBSCRIBE.

/// Whether a SUBSCRIBE asks for the metadata of its messages; `None` if it does not say.
///
/// # Errors
/// The words for the client, if it says neither yes nor no.
pub(super) fn parse_metadata_wish<'a>(
    mut properties: impl Iterator<Item = (&'a str, &'a str)>,
) -> Result<Option<bool>, &'static str> {
    properties.try_fold(None, |wish, property| match property {
        ("headgate-metadata", "true") => Ok(Some(true)),
        ("headgate-metadata", "false") => Ok(Some(false)),
        ("headgate-metadata", _) => Err("headgate-metadata is true or false"),
        _ => Ok(wish),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_is_asked_for_with_true_and_no_other_word() {
        let parse = |pairs: &[(&'static str, &'static str)]| parse_metadata_wish(pairs.iter().copied());
        assert_eq!(parse(&[("headgate-metadata", "true"), ("colour", "red")]), Ok(Some(true)));
        assert_eq!(parse(&[("headgate-metadata", "false")]), Ok(Some(false)));
        assert_eq!(parse(&[("tail", "10")]), Ok(None));
        assert!(parse(&[("headgate-metadata", "yes")]).is_err());
    }
}
