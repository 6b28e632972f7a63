//! The documentation holds: its links lead somewhere, its commands are the program's, every page is in the guide.

#[path = "../common/pages.rs"]
mod pages;

use clap::Parser;
use pages::{calls, guide, pages, parts};
use routegrad::cli::Cli;
use routegrad::config::{Config, Layers, described};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// What GitHub and mdBook make of a heading as a target of links.
fn anchor(heading: &str) -> String {
    let kept = heading.to_lowercase().replace(' ', "-");
    kept.chars()
        .filter(|c| c.is_alphanumeric() || "-_".contains(*c))
        .collect()
}

#[test]
fn every_link_of_the_docs_leads_to_a_file_and_a_heading() {
    let mut count = 0;
    for page in pages() {
        let (prose, _) = parts(&page);
        for link in prose.split("](").skip(1) {
            let link = link.split(')').next().unwrap();
            if link.contains("://") || link.contains(char::is_whitespace) {
                continue;
            }
            let (file, heading) = link.split_once('#').unwrap_or((link, ""));
            let target = match file {
                "" => page.clone(),
                file => page.parent().unwrap().join(file),
            };
            assert!(target.exists(), "{}: {link} leads nowhere", page.display());
            assert!(
                !page.starts_with("docs") || !file.contains('/'),
                "{}: {link} is not in the guide as it is built: name the path without a link",
                page.display()
            );
            if !heading.is_empty() {
                let (text, _) = parts(&target);
                let headings = text.lines().filter(|l| l.starts_with('#'));
                let mut anchors = headings.map(|l| anchor(l.trim_start_matches('#').trim()));
                assert!(
                    anchors.any(|a| a == heading),
                    "{}: no heading of {link}",
                    page.display()
                );
            }
            count += 1;
        }
    }
    assert!(count > 50, "only {count} links were found");
}

#[test]
fn the_summary_of_the_guide_has_every_page_once() {
    let (summary, _) = parts(Path::new("docs/SUMMARY.md"));
    let links = summary
        .split("](")
        .skip(1)
        .map(|l| l.split(')').next().unwrap().to_string());
    let links: Vec<String> = links.collect();
    let listed: BTreeSet<&str> = links.iter().map(String::as_str).collect();
    assert_eq!(
        listed.len(),
        links.len(),
        "a page stands there twice: {links:?}"
    );
    let names: Vec<String> = guide()
        .iter()
        .map(|p| p.file_name().unwrap().to_string_lossy().into_owned())
        .collect();
    let expected: BTreeSet<&str> = names
        .iter()
        .map(String::as_str)
        .filter(|n| *n != "SUMMARY.md")
        .collect();
    assert_eq!(listed, expected);
}

#[test]
fn every_command_in_the_docs_is_one_that_the_program_takes() {
    let mut count = 0;
    for page in pages() {
        for (language, code) in parts(&page).1 {
            if language != "sh" {
                continue;
            }
            for call in calls(&code) {
                let arguments = call.arguments;
                count += 1;
                if let Err(e) = Cli::try_parse_from(&arguments) {
                    let asked = matches!(
                        e.kind(),
                        clap::error::ErrorKind::DisplayHelp
                            | clap::error::ErrorKind::DisplayVersion
                    );
                    assert!(asked, "{}: {}\n{e}", page.display(), arguments.join(" "));
                }
            }
        }
    }
    assert!(count > 40, "only {count} commands were found");
}

#[test]
fn the_page_of_commands_is_what_the_command_line_says() {
    let options = clap_markdown::MarkdownOptions::new()
        .title("Commands".into())
        .show_footer(false)
        .show_table_of_contents(false);
    let made = clap_markdown::help_markdown_custom::<Cli>(&options);
    assert_page("docs/commands.md", &as_page(&made));
}

/// The help of all commands with their examples as code, and with lists that have no headings of their own.
fn as_page(help: &str) -> String {
    let (mut page, mut code) = (String::new(), false);
    for line in help.lines() {
        let example = line
            .strip_prefix("  ")
            .filter(|_| code || page.ends_with("\nExamples:\n"));
        if example.is_some() != code {
            page += if code { "```\n" } else { "```sh\n" };
            code = !code;
        }
        page += &example.unwrap_or(line).replace("###### ", "");
        page.push('\n');
    }
    page
}

/// A page that is generated: `UPDATE_DOCS=1` writes it.
fn assert_page(page: &str, made: &str) {
    if std::env::var_os("UPDATE_DOCS").is_some() {
        fs::write(page, made).unwrap();
    }
    let found = fs::read_to_string(page).unwrap_or_default();
    assert!(
        found == made,
        "{page} is old: UPDATE_DOCS=1 cargo test --release --test code docs"
    );
}

#[test]
fn the_page_of_the_configuration_has_every_key() {
    let resolve = &routegrad::routers::resolve;
    let mut text = "# Configuration\n\n\
        The values of the keys come from the preset, `--config FILE.toml`, `--set KEY=VALUE` and the other flags. If several of these set a key,\n\
        the last one in this order is used. The `config.toml` in the folder of a run contains every key with its value. An unknown key or an\n\
        invalid value is an error that names the key and the values that are allowed.\n\n\
        ```sh\n\
        routegrad config --preset small --router topk > my.toml\n\
        routegrad train --config my.toml --learning-rate 1e-3 --batch 32\n\
        ```\n\n\
        The preset `tiny`, as `routegrad config` prints it:\n\n```toml\n"
        .to_string();
    let config = Config::load(&Layers::preset("tiny"), resolve).unwrap();
    let settings = routegrad::routers::find("default").unwrap().settings;
    text += &described(&config, &config, settings).unwrap();
    text += "\n```\n\nOther routers have other settings: [routers](routers.md).\n";
    assert_page("docs/configuration.md", &text);
}
