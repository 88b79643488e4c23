//! The documentation: that what it links to is there, and that the commands and settings that it names exist.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{project, text};

/// Every page, by its path in the project.
fn pages() -> Vec<String> {
    let mut found: Vec<String> = [
        "README.md",
        "ARCHITECTURE.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "CHANGELOG.md",
        "config/cluster/README.md",
    ]
    .map(str::to_owned)
    .into();
    let docs = std::fs::read_dir(project("docs")).expect("docs");
    let docs = docs.map(|page| page.expect("readable").file_name().into_string().expect("UTF-8"));
    found.extend(docs.filter(|page| page.ends_with(".md")).map(|page| format!("docs/{page}")));
    found.sort();
    found
}

/// The lines of a page that are no code.
fn prose(page: &str) -> String {
    let mut is_code = false;
    let lines = text(page);
    let lines = lines.lines().filter(|line| {
        let is_fence = line.trim_start().starts_with("```");
        is_code ^= is_fence;
        !is_code && !is_fence
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// What a heading is linked to by, as GitHub makes it.
fn anchor(heading: &str) -> String {
    let heading = heading.to_lowercase();
    let kept = heading.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

fn anchors(page: &str) -> BTreeSet<String> {
    let prose = prose(page);
    let headings = prose.lines().filter(|line| line.starts_with('#'));
    headings.map(|line| anchor(line.trim_start_matches('#').trim())).collect()
}

/// The targets of `[…](…)`.
fn links(text: &str) -> Vec<String> {
    let ends = text.match_indices("](").map(|(at, _)| &text[at + 2..]);
    ends.filter_map(|rest| rest.split_once(')').map(|(target, _)| target.to_owned())).collect()
}

#[test]
fn every_link_between_pages_and_files_leads_somewhere() {
    let mut broken = Vec::new();
    for page in pages() {
        for target in links(&prose(&page)) {
            if target.starts_with("https://") || target.starts_with("http://") {
                continue;
            }
            let (path, heading) = target.split_once('#').unwrap_or((&target, ""));
            let place = match path {
                "" => project(&page),
                _ => project(&page).parent().expect("a directory").join(path),
            };
            let of = place.strip_prefix(env!("CARGO_MANIFEST_DIR")).unwrap_or(&place);
            let is_there = place.exists()
                && (heading.is_empty() || anchors(&simplified(of).to_string_lossy()).contains(heading));
            if !is_there {
                broken.push(format!("{page}: {target}"));
            }
        }
    }
    assert!(broken.is_empty(), "{broken:#?}");
}

/// A path without its `..`.
fn simplified(path: &Path) -> PathBuf {
    let mut simple = PathBuf::new();
    for part in path.components() {
        match part {
            std::path::Component::ParentDir => _ = simple.pop(),
            other => simple.push(other),
        }
    }
    simple
}

/// What a command takes: its sub-commands and options, as its help says.
struct CommandHelp {
    commands: BTreeSet<String>,
    options: BTreeSet<String>,
}

impl CommandHelp {
    fn of(path: &[&str]) -> Self {
        let output = Command::new(env!("CARGO_BIN_EXE_headgate"))
            .args(path)
            .arg("--help")
            .output()
            .expect("headgate runs");
        assert!(output.status.success(), "{path:?}");
        let help = String::from_utf8(output.stdout).expect("UTF-8");
        let is_name = |name: &&str| name.starts_with(|c: char| c.is_ascii_lowercase());
        let commands =
            help.split("\nCommands:\n").nth(1).map(|rest| rest.split("\n\n").next().unwrap_or(rest));
        let commands = commands.unwrap_or_default().lines();
        let commands = commands.filter(|line| line.starts_with("  ") && !line.starts_with("   "));
        let commands = commands.filter_map(|line| line.split_whitespace().next()).filter(is_name);
        Self { commands: commands.map(str::to_owned).collect(), options: options(&help) }
    }
}

/// Everything in a text that is an option.
fn options(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '-');
    words
        .filter(|word| {
            word.strip_prefix("--").is_some_and(|name| name.starts_with(|c: char| c.is_ascii_lowercase()))
        })
        .map(str::to_owned)
        .collect()
}

/// Every `headgate …` in a text: what stands behind it, up to where a shell or a sentence ends.
fn named_commands(text: &str) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    for (at, _) in text.match_indices("headgate ") {
        // Not the end of another word, a path, or a user's or database's name in a sentence.
        if text[..at].chars().next_back().is_some_and(|c| !matches!(c, '`' | ' ' | '\n' | '(' | '"')) {
            continue;
        }
        // A namespace of Kubernetes.
        if text[..at].ends_with("-n ") {
            continue;
        }
        let rest = &text[at + "headgate ".len()..];
        let end = rest.find(['`', '\n', '|', '#', '>', '<', ';', ')', '"']).unwrap_or(rest.len());
        found.push(rest[..end].split_whitespace().map(str::to_owned).collect());
    }
    found
}

/// All code of a page: blocks, and what stands in backquotes.
fn code(page: &str) -> String {
    let text = text(page);
    let mut code = String::new();
    for (n, block) in text.split("```").enumerate() {
        match n % 2 {
            1 => code.push_str(block),
            _ => block.split('`').skip(1).step_by(2).for_each(|inline| {
                code.push_str("\n`");
                code.push_str(inline);
            }),
        }
        code.push('\n');
    }
    code
}

#[test]
fn the_commands_that_the_pages_name_exist_with_their_options() {
    let mut helps: BTreeMap<Vec<String>, CommandHelp> = BTreeMap::new();
    let (mut wrong, mut seen) = (Vec::new(), 0);
    let pages = pages().into_iter().filter(|page| page != "CHANGELOG.md").map(|page| (code(&page), page));
    let files =
        ["config/kubernetes/headgate.yaml", "config/kubernetes/cluster.yaml", "config/deb/headgate.toml"];
    let files = files.map(|file| (text(file).replace('#', "\n"), file.to_owned()));
    for (code, page) in pages.chain(files) {
        for words in named_commands(&code) {
            let Some(first) = words.first().filter(|word| word.starts_with(|c: char| c.is_ascii_lowercase()))
            else {
                continue;
            };
            // A file, an image, an address.
            if !first.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-') {
                continue;
            }
            seen += 1;
            let mut path: Vec<String> = Vec::new();
            for word in &words {
                let of: Vec<&str> = path.iter().map(String::as_str).collect();
                let help = helps.entry(path.clone()).or_insert_with(|| CommandHelp::of(&of));
                if help.commands.is_empty() {
                    break;
                }
                if !help.commands.contains(word) {
                    if path.is_empty() || word.starts_with(|c: char| c.is_ascii_lowercase()) {
                        wrong.push(format!("{page}: headgate {}", words.join(" ")));
                    }
                    break;
                }
                path.push(word.clone());
            }
            let of: Vec<&str> = path.iter().map(String::as_str).collect();
            let help = helps.entry(path.clone()).or_insert_with(|| CommandHelp::of(&of));
            let taken: Vec<String> = options(&words.join(" ")).difference(&help.options).cloned().collect();
            if !taken.is_empty() && help.commands.is_empty() {
                wrong.push(format!("{page}: headgate {} takes no {}", path.join(" "), taken.join(", ")));
            }
        }
    }
    assert!(seen > 60, "{seen}");
    wrong.sort();
    wrong.dedup();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// A key in an argument can be read by everybody on the machine, in a URL it is kept in logs, in a page by whoever loads it.
#[test]
fn no_sample_has_a_key_in_an_argument_or_a_url() {
    for page in pages() {
        for (n, line) in code(&page).lines().enumerate() {
            let quoted = line.contains("printf '%s\\n'");
            let in_argument =
                ["-u $", "-P $", "-H \"Authorization: $", "-H 'Authorization: $", "?key=$", "--key $"];
            assert!(quoted || !in_argument.iter().any(|bad| line.contains(bad)), "{page}: {n}: {line}");
        }
    }
}

/// A page for scanning. What says more goes into docs/.
#[test]
fn the_readme_is_short() {
    let lines = text("README.md").lines().count();
    assert!((80..=160).contains(&lines), "{lines} lines");
    for page in pages().iter().filter(|page| page.starts_with("docs/")) {
        assert!(text("README.md").contains(&format!("({page})")), "README.md leads to {page}");
    }
}
