//! `GET /problems/{kind}`: the page behind the `type` of a problem document. It says what the kind means, and for each
//! cause that comes to it what to do: the advice of `headgate refusals`, word for word.

use axum::http::header::{CONTENT_SECURITY_POLICY, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};

use super::{PathParameters, dashboard};
use crate::front::problem::Problem;
use crate::observe::cause::{Cause, ProblemKind};

/// It shows text, in the style of the dashboard, and nothing else.
const PROBLEM_PAGE_POLICY: &str = "default-src 'none'; style-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'; \
     frame-ancestors 'none'";

/// `GET /problems/{kind}`
pub(super) async fn show(PathParameters(slug): PathParameters<String>) -> Result<Response, Problem> {
    let Some(kind) = ProblemKind::ALL.iter().find(|kind| kind.slug() == slug) else {
        let known: Vec<_> = ProblemKind::ALL.iter().map(|kind| kind.slug()).collect();
        let words = format!("There is no such kind of problem; those that there are: {}.", known.join(", "));
        return Err(Problem::new(Cause::NotFound, words));
    };
    let headers =
        [(CONTENT_TYPE, "text/html; charset=utf-8"), (CONTENT_SECURITY_POLICY, PROBLEM_PAGE_POLICY)];
    Ok((headers, page_of(*kind)).into_response())
}

fn page_of(kind: ProblemKind) -> String {
    let causes = Cause::ALL.iter().filter(|cause| cause.kind() == kind);
    let causes: String = causes
        .map(|cause| {
            let advice = cause.advice();
            let (first, rest) = advice.split_at(advice.chars().next().map_or(0, char::len_utf8));
            let (name, advice) = (escaped(cause.name()), escaped(&(first.to_uppercase() + rest)));
            format!("<dt><code>{name}</code></dt><dd>{advice}.</dd>\n")
        })
        .collect();
    let (status, slug, title) = (kind.status(), kind.slug(), escaped(kind.title()));
    let again = match status {
        429 | 503 => "The same request may succeed later: <code>Retry-After</code> says when.",
        500 => "It is not the request that is wrong. The gateway's log has the reason.",
        _ => "The same request fails again: something has to change first.",
    };
    let version = dashboard::version();
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>{title} · Headgate</title>\n\
         <link rel=\"icon\" type=\"image/svg+xml\" href=\"/dashboard/{version}/icon.svg\">\n\
         <link rel=\"stylesheet\" href=\"/dashboard/{version}/styles.css\">\n</head>\n<body>\n<main>\n\
         <h1>{title}</h1>\n<p class=\"muted\"><code>/problems/{slug}</code>, HTTP {status}. {again}</p>\n\
         <section class=\"panel causes\">\n<h2>Causes, and what to do</h2>\n<dl>\n{causes}</dl>\n</section>\n\
         <p class=\"muted\">The answer's <code>detail</code> is about the one request. <code>headgate refusals</code>, and \
         Refusals on the dashboard, name the cause of each and whose it was.</p>\n</main>\n</body>\n</html>\n"
    )
}

/// A text as HTML has it.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_a_page_with_the_advice_on_each_of_its_causes() {
        for kind in ProblemKind::ALL {
            let page = page_of(*kind);
            let causes: Vec<_> = Cause::ALL.iter().filter(|cause| cause.kind() == *kind).collect();
            assert_eq!(page.matches("<dt>").count(), causes.len(), "{kind:?}");
            for cause in causes {
                assert!(page.contains(&format!("<code>{}</code>", cause.name())), "{cause:?}");
                assert!(page.contains(&escaped(cause.advice())[4..]), "{cause:?}");
            }
        }
        assert_eq!(escaped("a < b && c > d"), "a &lt; b &amp;&amp; c &gt; d");
    }
}
