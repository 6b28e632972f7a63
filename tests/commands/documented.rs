//! The commands of README and guide do what they say: each runs, in the order of its page, on a small model and small texts
//! under the names that the page uses.

#[path = "../common/pages.rs"]
mod pages;

use crate::common::{MICRO, program, succeed, text};
use crate::tokens;
use pages::{Call, calls, parts};
use safetensors::tensor::{Dtype, TensorView};
use std::fs;
use std::path::Path;

/// Commands that do not run here, by their beginning, and why.
const LEFT_OUT: &[(&str, &str)] = &[
    ("train --preset 557m", "takes a GPU"),
    ("hardware-check --budget", "takes a GPU"),
    ("hardware-check --only", "takes a GPU"),
    (
        "hardware-check --device sim",
        "tests/commands/hardware.rs runs its tasks",
    ),
    ("bench --only", "takes a GPU"),
    (
        "gradcheck --device sim",
        "tests/training/devices.rs does what it does",
    ),
];
/// Those that are left out whole, without further arguments.
const LEFT_OUT_ALONE: &[(&str, &str)] = &[
    ("hardware-check", "takes a GPU"),
    ("gradcheck", "tests/training/gradcheck.rs does what it does"),
];

/// What a command gets besides, so that it is done in seconds: (its beginning, before its own arguments, behind them).
fn besides(command: &str) -> (Vec<String>, Vec<String>) {
    let sets = |keys: &[&str]| -> Vec<String> {
        let pairs = keys.iter().flat_map(|key| ["--set", key]);
        pairs.map(str::to_string).collect()
    };
    let words = |words: &[&str]| words.iter().map(|w| w.to_string()).collect();
    let begins = |with: &str| command.starts_with(with);
    let has = |flag: &str| command.contains(flag);
    if begins("train") && has("--resume") || has("--report-only") {
        return (vec![], vec![]);
    }
    if begins("train") {
        // The runs that the page goes on with are there already.
        let out = match ["--out", "--name", "--preset"].iter().any(|flag| has(flag)) {
            true => vec![],
            false => words(&["--out", "runs/new"]),
        };
        let [sets, steps] = if has("--device sim") {
            let sim = [
                "model.layers=2",
                "model.sequence_length=64",
                "train.sequences_per_step=2",
            ];
            [sets(&sim), vec![]]
        } else if has("--config") {
            let short = ["model.sequence_length=16", "train.eval_sequences=2"];
            [sets(&short), words(&["--steps", "4"])]
        } else {
            [sets(MICRO), words(&["--steps", "4"])]
        };
        (sets, [steps, out].concat())
    } else if begins("ablate --figure") {
        (sets(MICRO), words(&["--scale", "1e-9"]))
    } else if has("--grid configs/") {
        (sets(MICRO), words(&["--steps", "4", "--seed", "0"]))
    } else if begins("ablate") {
        (sets(MICRO), words(&["--steps", "4"]))
    } else if begins("import") {
        let small = [
            "train.steps=4",
            "train.sequences_per_step=2",
            "train.micro_batch=2",
            "train.eval_sequences=2",
        ];
        (vec![], sets(&small))
    } else if begins("bench --baseline") {
        let short = [
            "--only",
            "rmsnorm",
            "--device",
            "cpu",
            "--fail-slower",
            "1000%",
        ];
        (vec![], words(&short))
    } else if command == "bench" {
        (vec![], words(&["--only", "rmsnorm", "--device", "cpu"]))
    } else {
        (vec![], vec![])
    }
}

/// The command's arguments with those of [`besides`]; a flag of theirs replaces the command's own.
fn shortened(call: &Call) -> Vec<String> {
    let own = &call.arguments[1..];
    let (before, behind) = besides(&own.join(" "));
    let commands = own
        .iter()
        .take_while(|w| !w.starts_with('-'))
        .count()
        .min(1);
    let mut arguments: Vec<String> = own[..commands].to_vec();
    arguments.extend(before);
    let mut rest = own[commands..].iter();
    while let Some(word) = rest.next() {
        if word != "--set" && behind.contains(word) {
            rest.next();
        } else {
            arguments.push(word.clone());
        }
    }
    arguments.extend(behind);
    arguments
}

/// The value of a flag.
fn value<'a>(arguments: &'a [String], flag: &str) -> Option<&'a String> {
    let at = arguments.iter().position(|w| w == flag)?;
    arguments.get(at + 1)
}

/// Runs the program in a folder, to success.
fn run(folder: &Path, arguments: &[&str]) {
    succeed(program().current_dir(folder).args(arguments));
}

/// `train` of the micro model there.
fn train(folder: &Path, out: &str, arguments: &[&str]) {
    let sets = MICRO.iter().flat_map(|set| ["--set", set]);
    let all: Vec<&str> = ["train", "--quiet", "--out", out]
        .into_iter()
        .chain(sets)
        .chain(arguments.iter().copied())
        .collect();
    run(folder, &all);
}

/// Texts, tokens, tokenizers and questions as the pages name them.
fn write_data(folder: &Path) {
    let documents = tokens::documents(60);
    let plain: Vec<String> = (documents
        .iter()
        .map(|(text, _)| text.replace(['\n', '<'], " ")))
    .collect();
    let plain = plain.join("\n\n\n");
    for name in [
        "my-books",
        "my-texts",
        "text",
        "fineweb",
        "fineweb-edu",
        "llama-3",
        "eval",
        "downloads",
        "docs",
        "from-node",
    ] {
        fs::create_dir(folder.join(name)).unwrap();
    }
    for name in ["my-books/a.txt", "my-texts/a.txt", "other.txt"] {
        fs::write(folder.join(name), &plain).unwrap();
    }
    // Of this one a sequence of 512 tokens is held out.
    fs::write(folder.join("text/a.txt"), vec![plain; 30].join("\n\n\n")).unwrap();
    for name in ["fineweb/a.parquet", "fineweb-edu/a.parquet"] {
        tokens::parquet_of(&folder.join(name), &documents, 20);
    }
    let books = tokens::json_lines(&documents).replace("\"text\"", "\"content\"");
    let level = ruzstd::encoding::CompressionLevel::Fastest;
    fs::write(
        folder.join("books.jsonl.zst"),
        ruzstd::encoding::compress_to_vec(books.as_bytes(), level),
    )
    .unwrap();
    let held_out =
        tokens::json_lines(&tokens::documents(70)[60..]).replace("\"text\"", "\"content\"");
    fs::write(folder.join("held-out.jsonl"), held_out).unwrap();
    tokens::tokenizer(folder, 0);
    tokens::tokenizer(&folder.join("llama-3"), 0);
    let question = r#"{"doc_id": 0, "doc": {"query": "one", "choices": ["two", "three"], "gold": 1, "goal": "one"}}"#;
    for name in ["hellaswag", "piqa"] {
        fs::write(folder.join(format!("eval/{name}.jsonl")), question).unwrap();
    }
    let last_word = r#"{"doc_id": 0, "doc": {"query": "one two three", "choices": ["four"]}}"#;
    fs::write(folder.join("eval/lambada.jsonl"), last_word).unwrap();
    let tokens: Vec<u8> = (0..18)
        .flat_map(|t: i64| (t * t % 97).to_le_bytes())
        .collect();
    let view = TensorView::new(Dtype::I64, vec![2, 9], &tokens).unwrap();
    safetensors::serialize_to_file([("tokens", view)], None, &folder.join("tokens.safetensors"))
        .unwrap();
}

/// Runs, a downloaded model, records and a grid as the pages name them.
fn write_models(folder: &Path) {
    train(
        folder,
        "runs/tiny-default",
        &[
            "--steps",
            "600",
            "--set",
            "train.checkpoint_interval=600",
            "--set",
            "train.eval_interval=600",
        ],
    );
    for router in ["default", "topk"] {
        let out = format!("runs/{router}-0");
        train(folder, &out, &["--router", router, "--steps", "4"]);
        for name in [format!("runs/small-{router}"), "runs/tiny-topk".into()] {
            if !folder.join(&name).exists() && (name != "runs/tiny-topk" || router == "topk") {
                copy(&folder.join(&out), &folder.join(name));
            }
        }
    }
    let prepare = [
        "data",
        "prepare",
        "text/",
        "--quiet",
        "--validation-fraction",
        "0.2",
        "--tokenizer",
        "tokenizer.json",
        "--out",
    ];
    run(folder, &[&prepare[..], &["tokens/own"]].concat());
    let on_tokens = [
        "--router",
        "topk",
        "--data",
        "tokens/own",
        "--steps",
        "2",
        "--set",
        "model.sequence_length=512",
    ];
    train(folder, "runs/published", &on_tokens);
    run(
        folder,
        &[
            "export",
            "--model",
            "runs/published",
            "--to",
            "hf",
            "--out",
            "downloads/OLMoE",
        ],
    );
    fs::write(
        folder.join("my-grid.toml"),
        "[base]\npreset = \"tiny\"\nsteps = 4\n[axes]\nrouter = [\"topk\", \"lossfree\"]\n",
    )
    .unwrap();
    run(
        folder,
        &[
            "bench", "--only", "rmsnorm", "--device", "cpu", "--budget", "60", "--out", "timed",
        ],
    );
    let record = fs::read_dir(folder.join("timed"))
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    for name in ["bench.jsonl", "before.jsonl", "peers.jsonl"] {
        fs::copy(&record, folder.join(name)).unwrap();
    }
    let repository = Path::new(env!("CARGO_MANIFEST_DIR"));
    copy(
        &repository.join("benches/results"),
        &folder.join("benches/results"),
    );
    copy(&repository.join("configs"), &folder.join("configs"));
    let records = "hardware-nvidia-h200.jsonl";
    fs::copy(
        repository.join("benches/results").join(records),
        folder.join("from-node").join(records),
    )
    .unwrap();
    for page in ["README.md", "docs/kernel-status.md"] {
        fs::copy(repository.join(page), folder.join(page)).unwrap();
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let target = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &target),
            false => drop(fs::copy(entry.path(), target).unwrap()),
        }
    }
}

/// What a command that is not run here begins with, or is, in the lists of those; nothing where a launcher starts it.
fn left_out(call: &Call) -> Option<&'static str> {
    let command = call.arguments[1..].join(" ");
    if !call.launcher.is_empty() || command.contains("--ranks-per-run") {
        return Some(""); // tests/processes start launchers
    }
    let begins = LEFT_OUT
        .iter()
        .map(|(begin, _)| *begin)
        .find(|begin| command.starts_with(begin));
    begins.or_else(|| {
        LEFT_OUT_ALONE
            .iter()
            .map(|(whole, _)| *whole)
            .find(|whole| command == *whole)
    })
}

/// Runs a command of a page: what went wrong.
fn failure(folder: &Path, call: &Call) -> Option<String> {
    let arguments = shortened(call);
    let goes_on = [
        "--resume",
        "--report-only",
        "--merge",
        "bench",
        "hardware-check",
    ];
    let anew = !arguments.iter().any(|a| goes_on.contains(&a.as_str()));
    if let Some(out) = value(&arguments, "--out").filter(|_| anew) {
        let _ = fs::remove_dir_all(folder.join(out));
    }
    let output = program()
        .current_dir(folder)
        .args(&arguments)
        .output()
        .unwrap();
    if let Some(file) = &call.into {
        fs::write(folder.join(file), &output.stdout).unwrap();
    }
    let said = format!("{}{}", text(&output.stdout), text(&output.stderr));
    let last: Vec<&str> = said.lines().rev().take(3).collect();
    // A planted fault must be found, and what takes nvcc must be refused where the program was built without it.
    let planted = arguments.iter().any(|a| a == "--plant");
    let takes_nvcc = arguments.starts_with(&["status".into(), "--update".into()]);
    let refused = takes_nvcc && !cfg!(all(feature = "cuda", routegrad_cuda));
    if refused && !said.contains("built without nvcc") {
        return Some(format!("{}: was not refused: {said}", arguments.join(" ")));
    }
    (output.status.success() == (planted || refused))
        .then(|| format!("{}: {}", arguments.join(" "), last.join(" / ")))
}

#[test]
#[ignore = "slow"]
fn the_commands_of_readme_and_guide_run() {
    let template = tempfile::tempdir().unwrap();
    write_data(template.path());
    write_models(template.path());
    let (mut ran, mut failures, mut used) = (0, Vec::new(), Vec::new());
    for page in pages::pages() {
        let folder = tempfile::tempdir().unwrap();
        copy(template.path(), folder.path());
        let blocks = parts(&page)
            .1
            .into_iter()
            .filter(|(language, _)| language == "sh");
        for call in blocks.flat_map(|(_, code)| calls(&code)) {
            match left_out(&call) {
                Some(entry) => used.push(entry),
                None => {
                    ran += 1;
                    failures.extend(
                        failure(folder.path(), &call).map(|f| format!("{}: {f}", page.display())),
                    );
                }
            }
        }
    }
    assert!(
        failures.is_empty(),
        "{} of {ran}:\n{}",
        failures.len(),
        failures.join("\n")
    );
    assert!(ran > 80, "only {ran} commands were found");
    for (entry, _) in LEFT_OUT.iter().chain(LEFT_OUT_ALONE) {
        assert!(used.contains(entry), "no page has {entry}");
    }
}
