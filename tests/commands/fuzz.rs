//! The command line given odd values: every command line ends soon, in bounded memory, with an answer or an error that says
//! what to do, and without a panic.

use crate::common::*;
use clap::CommandFactory;
use routegrad::cli::Cli;
use routegrad::config::{Config, Layers};
use routegrad::routers;
use routegrad::tensor::random::{Purpose, Stream};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Command lines to try, the longest time of one, and the most address space in kB.
const RUNS: u64 = 240;
const LIMIT: Duration = Duration::from_secs(30);
const SPACE: u64 = 6 << 20;

/// What a value may not be, or be at the edge of.
const ODD: &[&str] = &[
    "",
    " ",
    "-1",
    "0",
    "1",
    "2",
    "3.5",
    "NaN",
    "inf",
    "-inf",
    "1e999",
    "1e-46",
    "true",
    "[]",
    "[[1]]",
    "{}",
    "\"",
    "é\u{1F600}",
    "4294967296",
    "16777216",
    "9223372036854775807",
    "18446744073709551616",
    "../../nope",
    "/dev/null",
    "a=b=c",
    "--",
    "cpu",
    "all",
    "8c1",
    "0c0",
];

/// Commands that end soon whatever they are given; those that train or measure for long are given bounds below.
const COMMANDS: &[&str] = &[
    "train",
    "train",
    "train",
    "plan",
    "config",
    "eval",
    "analyze",
    "generate",
    "export",
    "dump",
    "import",
    "ablate",
    "data",
    "routers",
    "status",
    "floors",
    "ops",
    "bench",
    "hardware-check",
];

struct Choice {
    random: Stream,
    drawn: u64,
}

impl Choice {
    fn below(&mut self, n: usize) -> usize {
        self.drawn += 1;
        (self.random.uniform(self.drawn) as f64 * n as f64) as usize % n
    }

    fn of<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.below(all.len())]
    }
}

/// Keys of the configuration.
fn keys() -> Vec<String> {
    let config = Config::load(&Layers::preset("tiny"), &routers::resolve).unwrap();
    let table: toml::Table = config.to_toml().unwrap().parse().unwrap();
    let sections = table.iter().flat_map(|(section, keys)| {
        let keys = keys.as_table().unwrap().keys();
        keys.map(move |key| format!("{section}.{key}"))
    });
    sections.collect()
}

/// A command with odd values for some of its flags.
fn command(choice: &mut Choice, keys: &[String], place: &Place) -> Vec<String> {
    let name = *choice.of(COMMANDS);
    let all = Cli::command();
    let mut declared = all.find_subcommand(name).unwrap();
    let mut line = vec![name.to_string()];
    if let Some(inner) = declared.get_subcommands().find(|c| c.get_name() != "help") {
        line.push(inner.get_name().into());
        declared = inner;
    }
    let out = place.path(&format!("out-{}", choice.drawn));
    let bounds: &[&str] = match name {
        "train" => &[
            "--quiet",
            "--no-checkpoint",
            "--steps",
            "1",
            "--set",
            "model.hidden=16",
            "--set",
            "model.heads=2",
        ],
        "ablate" => &["--dry-run"],
        "bench" | "hardware-check" => &["--list"],
        _ => &[],
    };
    line.extend(bounds.iter().map(|s| s.to_string()));
    let flags: Vec<_> = declared
        .get_arguments()
        .filter(|a| {
            a.get_long()
                .is_some_and(|l| !["help", "version", "out", "steps"].contains(&l))
        })
        .collect();
    if declared
        .get_arguments()
        .any(|a| a.get_long() == Some("out"))
    {
        line.extend(["--out".into(), out.display().to_string()]);
    }
    for _ in 0..choice.below(3) {
        if flags.is_empty() {
            break;
        }
        let flag = *choice.of(&flags);
        let long = flag.get_long().unwrap();
        line.push(format!("--{long}"));
        if flag.get_action().takes_values() {
            line.push(match long {
                "set" => format!("{}={}", choice.of(keys), choice.of(ODD)),
                _ => choice.of(ODD).to_string(),
            });
        }
    }
    if name == "train" {
        if !line.iter().any(|word| word == "--data") {
            line.extend(["--data".into(), place.text.display().to_string()]);
        }
        let (key, value) = (choice.of(keys), choice.of(ODD));
        line.extend(["--set".into(), format!("{key}={value}")]);
    }
    line
}

/// Runs the program with little address space; none where it does not end in time.
fn run(line: &[String], folder: &Path) -> Option<Output> {
    let mut child = Command::new("sh")
        .args(["-c", &format!("ulimit -v {SPACE} && exec \"$0\" \"$@\"")])
        .arg(env!("CARGO_BIN_EXE_routegrad"))
        .args(["--threads", "1"])
        .args(line)
        .current_dir(folder)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Output is read while it comes: a full pipe would be taken for a hang.
    let pid = child.id();
    let begun = Instant::now();
    let stdout = child.stdout.take().unwrap();
    let stderr = child.stderr.take().unwrap();
    let read = |pipe: Box<dyn std::io::Read + Send>| {
        std::thread::spawn(move || {
            let (mut pipe, mut bytes) = (pipe, Vec::new());
            let _ = pipe.read_to_end(&mut bytes);
            bytes
        })
    };
    let (stdout, stderr) = (read(Box::new(stdout)), read(Box::new(stderr)));
    while begun.elapsed() < LIMIT {
        if let Some(status) = child.try_wait().unwrap() {
            let (stdout, stderr) = (stdout.join().unwrap(), stderr.join().unwrap());
            return Some(Output {
                status,
                stdout,
                stderr,
            });
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    println!("killing {pid}");
    let _ = child.kill();
    let _ = child.wait();
    None
}

#[test]
#[ignore = "slow"]
fn odd_values_end_in_an_answer_or_an_error_without_a_panic() {
    let (place, keys) = (Place::new(), keys());
    let random = Stream::new(2026, Purpose::Check, 0, 0);
    let mut choice = Choice { random, drawn: 0 };
    let (mut fine, mut refused) = (0, 0);
    for n in 0..RUNS {
        let line = command(&mut choice, &keys, &place);
        let said = format!("run {n}: routegrad {}", line.join(" "));
        let Some(output) = run(&line, place.folder.path()) else {
            panic!("{said}\nhas not ended in {} s", LIMIT.as_secs());
        };
        let stderr = text(&output.stderr);
        assert!(!stderr.contains("panicked"), "{said}\n{stderr}");
        assert_eq!(output.status.signal(), None, "{said}\n{stderr}");
        match output.status.code() {
            Some(0) => fine += 1,
            Some(1 | 2) => {
                refused += 1;
                assert!(stderr.contains("error: "), "{said}\n{stderr}");
            }
            code => panic!("{said}\nended with {code:?}: {stderr}"),
        }
    }
    println!("{fine} answered, {refused} refused");
    assert!(
        fine > 10 && refused > 10,
        "{fine} answered, {refused} refused"
    );
}
