//! The pages of the documentation and the commands in them.

#![allow(dead_code)]

use std::fs;
use std::path::{Path, PathBuf};

/// README, the guide, and what else a reader is sent to.
pub fn pages() -> Vec<PathBuf> {
    let mut pages: Vec<PathBuf> = [
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "SECURITY.md",
    ]
    .map(PathBuf::from)
    .into();
    pages.extend(
        [
            "benches/results/README.md",
            "kernels/README.md",
            "kernels/sim/README.md",
            "python/README.md",
        ]
        .map(PathBuf::from),
    );
    pages.extend(guide());
    pages
}

/// The pages of `docs/`.
pub fn guide() -> Vec<PathBuf> {
    let entries = fs::read_dir("docs").unwrap().map(|e| e.unwrap().path());
    let mut found: Vec<_> = entries
        .filter(|p| p.extension().is_some_and(|e| e == "md"))
        .collect();
    found.sort();
    found
}

/// The text of a page and the code blocks in it, each with its language.
pub fn parts(page: &Path) -> (String, Vec<(String, String)>) {
    let text = fs::read_to_string(page).unwrap_or_else(|e| panic!("{}: {e}", page.display()));
    let (mut prose, mut blocks) = (String::new(), Vec::new());
    for (i, part) in text.split("\n```").enumerate() {
        // Behind a closing fence stands prose again.
        match (i % 2, part.split_once('\n')) {
            (1, Some((language, code))) => blocks.push((language.trim().into(), code.into())),
            _ => prose += part,
        }
        prose.push('\n');
    }
    (prose, blocks)
}

/// A command line of the program in a block of shell code.
pub struct Call {
    /// What it is started by, as `mpirun -n 4`.
    pub launcher: Vec<String>,
    /// `routegrad` and its arguments.
    pub arguments: Vec<String>,
    /// The file that its output goes to.
    pub into: Option<String>,
}

/// The calls of the program in a block of shell code.
pub fn calls(code: &str) -> Vec<Call> {
    let code = code.replace("\\\n", " ");
    let commands = code.lines().flat_map(|line| line.split("&&"));
    let found = commands.filter_map(|command| {
        let words: Vec<String> = shlex::split(command)?;
        let program = words
            .iter()
            .position(|w| w == "routegrad" || w == "target/release/routegrad");
        let cargo = ["cargo", "run", "--release", "--"];
        let (launcher, first) = match program {
            Some(i) => (words[..i].to_vec(), i),
            None if words.len() >= 4 && words[..4] == cargo => (Vec::new(), 3),
            None => return None,
        };
        let end = |w: &String| ["|", ">", ";"].contains(&w.as_str());
        let rest = &words[first + 1..];
        let count = rest.iter().position(end).unwrap_or(rest.len());
        let mut arguments = vec!["routegrad".to_string()];
        arguments.extend_from_slice(&rest[..count]);
        let into = (rest.get(count).is_some_and(|w| w == ">")).then(|| rest[count + 1].clone());
        Some(Call {
            launcher,
            arguments,
            into: into.map(|file| file.trim_end_matches(';').to_string()),
        })
    });
    found.collect()
}
