//! Which form of the stream a client asks for, by its `Accept`. Server-sent events are what browsers ask for, and what
//! comes to a client that has no preference.

use axum::http::HeaderMap;
use axum::http::header::ACCEPT;

use super::event::StreamForm;

/// The form that the client prefers.
pub(super) fn form_of(headers: &HeaderMap) -> StreamForm {
    let lines = headers.get_all(ACCEPT).iter().filter_map(|line| line.to_str().ok());
    let mut best = (0, StreamForm::Events);
    for range in lines.flat_map(|line| line.split(',')) {
        let mut parts = range.split(';').map(str::trim);
        let form = match parts.next().unwrap_or_default().to_ascii_lowercase().as_str() {
            "text/event-stream" | "text/*" | "*/*" => StreamForm::Events,
            "application/x-ndjson" | "application/ndjson" | "application/jsonl" | "application/*" => {
                StreamForm::Lines
            }
            _ => continue,
        };
        let quality = parts.find_map(|part| part.strip_prefix("q=")).map_or(1_000, thousandths);
        if quality > best.0 {
            best = (quality, form);
        }
    }
    best.1
}

/// A quality (RFC 9110, section 12.4.2) in thousandths; 0 for what is none.
fn thousandths(quality: &str) -> u32 {
    let (whole, fraction) = quality.split_once('.').unwrap_or((quality, ""));
    let fraction: String = fraction.chars().chain("000".chars()).take(3).collect();
    match (whole, fraction.parse::<u32>()) {
        ("1", _) => 1_000,
        ("0", Ok(fraction)) => fraction,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    #[test]
    fn a_client_gets_the_form_that_it_prefers() {
        for (accept, form) in [
            ("", StreamForm::Events),
            ("*/*", StreamForm::Events),
            ("text/event-stream", StreamForm::Events),
            ("application/x-ndjson", StreamForm::Lines),
            ("Application/X-NDJSON; charset=utf-8", StreamForm::Lines),
            ("application/x-ndjson, */*", StreamForm::Lines),
            ("application/x-ndjson;q=0.5, text/event-stream", StreamForm::Events),
            ("text/event-stream;q=0.1, application/x-ndjson;q=0.25", StreamForm::Lines),
            ("application/x-ndjson;q=0", StreamForm::Events),
            ("text/html, q=, ;;,", StreamForm::Events),
        ] {
            let headers = [(ACCEPT, HeaderValue::from_static(accept))].into_iter().collect();
            assert_eq!(form_of(&headers), form, "{accept:?}");
        }
        assert_eq!(form_of(&HeaderMap::new()), StreamForm::Events);
    }
}
