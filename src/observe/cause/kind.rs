//! The kind of a problem: the coarse form of a [`Cause`](super::Cause), which a client switches on. It is the
//! `type` of a problem document, with its HTTP status and its title.

/// Defines [`ProblemKind`]: a row is a kind, its status, its slug and its title.
macro_rules! problem_kinds {
    ($($kind:ident $status:literal $slug:literal $title:literal;)*) => {
        /// The kinds of problem.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum ProblemKind {
            $(#[doc = concat!($status, " ", $slug, ": ", $title, ".")] $kind,)*
        }

        impl ProblemKind {
            /// Every kind, in the order of `openapi.json`.
            pub const ALL: &[ProblemKind] = &[$(ProblemKind::$kind,)*];

            /// The HTTP status.
            pub const fn status(self) -> u16 {
                match self { $(ProblemKind::$kind => $status,)* }
            }

            /// The last part of the document's `type`; it never changes.
            pub const fn slug(self) -> &'static str {
                match self { $(ProblemKind::$kind => $slug,)* }
            }

            /// The title, for people.
            pub const fn title(self) -> &'static str {
                match self { $(ProblemKind::$kind => $title,)* }
            }
        }
    };
}

problem_kinds! {
    Malformed        400 "malformed"          "Malformed request";
    Topic            400 "topic"              "The topic cannot be used";
    Unauthorized     401 "unauthorized"       "A valid API key is needed";
    KeyInUrl         401 "key_in_url"         "An API key does not belong in a URL";
    MissingScope     403 "missing_scope"      "The API key lacks a scope";
    BeyondToken      403 "beyond_token"       "The access token is not for this";
    NotFound         404 "not_found"          "Not found";
    MethodNotAllowed 405 "method_not_allowed" "Method not allowed";
    Timeout          408 "timeout"            "The request took too long to arrive";
    Conflict         409 "conflict"           "Already exists, or in conflict with what exists";
    TooLarge         413 "too_large"          "The request is over a limit";
    ContentEncoding  415 "content_encoding"   "The content encoding is not supported";
    Validation       422 "validation"         "A message does not meet its schema";
    UpgradeRequired  426 "upgrade_required"   "Another protocol is spoken here";
    IdConflict       422 "id_conflict"        "The id belongs to another message";
    NotPossible      422 "not_possible"       "In order, and not possible as things are";
    OverLimit        422 "over_limit"         "A limit is reached; waiting does not help";
    TooManyRequests  429 "too_many_requests"  "A limit is reached for now";
    Internal         500 "internal"           "Internal error";
    Unavailable      503 "unavailable"        "Not available right now";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_a_slug_of_its_own() {
        let slugs: std::collections::BTreeSet<_> = ProblemKind::ALL.iter().map(|kind| kind.slug()).collect();
        assert_eq!(slugs.len(), ProblemKind::ALL.len(), "{slugs:?}");
    }

    #[test]
    fn openapi_has_an_example_of_every_kind_as_it_is() {
        let openapi = include_str!("../../front/http/openapi.json");
        let openapi: serde_json::Value = serde_json::from_str(openapi).expect("openapi.json is JSON");
        let responses = openapi["components"]["responses"].as_object().expect("responses");
        let mut shown = std::collections::BTreeSet::new();
        for (name, response) in responses {
            let Some(examples) = response["content"]["application/problem+json"].get("examples") else {
                continue;
            };
            for (slug, example) in examples.as_object().expect("examples") {
                let kind = ProblemKind::ALL.iter().find(|kind| kind.slug() == slug);
                let kind = kind.unwrap_or_else(|| panic!("{name}: {slug}"));
                let problem = &example["value"];
                assert_eq!(problem["type"], format!("/problems/{slug}"), "{name}");
                assert_eq!(problem["status"], kind.status(), "{name}");
                assert_eq!(problem["title"], kind.title(), "{name}");
                shown.insert(kind.slug());
            }
        }
        // What is answered where there is no operation.
        shown.insert(ProblemKind::MethodNotAllowed.slug());
        let all: std::collections::BTreeSet<_> = ProblemKind::ALL.iter().map(|kind| kind.slug()).collect();
        assert_eq!(shown, all);
    }
}
