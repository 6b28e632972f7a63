//! Benchmark scores: the likelihoods of answers, and what a user meets.

use crate::common::{MICRO, Place, program};
use routegrad::config::{Config, Layers};
use routegrad::model::Model;
use routegrad::model::batch::Sequences;
use routegrad::ops::spans::Spans;
use routegrad::routers;
use std::fs;

fn model(router: &str) -> Model {
    let mut layers = Layers::preset("tiny");
    layers.set = MICRO.iter().map(|s| s.to_string()).collect();
    layers.set.push(format!("router.name={router}"));
    layers.set.push("train.dtype=\"f64\"".into());
    Model::new(&Config::load(&layers, &routers::resolve).unwrap()).unwrap()
}

#[test]
fn answers_behind_a_shared_beginning_score_as_whole_texts_alone() {
    for router in ["topk", "default", "remoe"] {
        let model = model(router);
        let text = |n: usize, of: usize| (0..n).map(move |i| ((i * i + 7 * of) % 251) as i32);
        let prompt: Vec<i32> = text(9, 1).collect();
        let answers: Vec<Vec<i32>> = [(1, 2), (4, 3), (7, 4)]
            .map(|(n, of)| text(n, of).collect())
            .into();
        let mut spans = Spans::default();
        let first = spans.add(prompt.len());
        let (mut tokens, mut targets) = (prompt.clone(), Vec::new());
        for answer in &answers {
            let begin = tokens.len();
            targets.push((prompt.len() - 1, answer[0]));
            targets.extend(answer[1..].iter().enumerate().map(|(i, t)| (begin + i, *t)));
            if answer.len() > 1 {
                spans.add_behind(first, answer.len() - 1).unwrap();
            }
            tokens.extend(&answer[..answer.len() - 1]);
        }
        let mut found = model.score(&tokens, spans, &targets).unwrap().into_iter();
        for answer in &answers {
            let whole = [&prompt[..], answer].concat();
            let losses = model.token_losses(Sequences::new(&whole, 1)).unwrap();
            for expected in &losses[prompt.len() - 1..] {
                let scored = found.next().unwrap();
                let error = (scored.log_probability + expected).abs();
                assert!(error <= 1e-12, "{router}: {error:e}");
            }
        }
    }
}

#[test]
fn the_likeliest_token_is_known_as_such_and_no_other() {
    let model = model("topk");
    let tokens = [5, 9, 200];
    let logits = model.next_token_logits(&tokens, 1).unwrap();
    let best = (0..logits.len()).fold(0, |b, i| if logits[i] > logits[b] { i } else { b });
    let mut spans = Spans::default();
    spans.add(3);
    let targets: Vec<(usize, i32)> = (0..logits.len()).map(|t| (2, t as i32)).collect();
    let scored = model.score(&tokens, spans, &targets).unwrap();
    let likeliest: Vec<usize> = (0..scored.len()).filter(|t| scored[*t].likeliest).collect();
    assert_eq!(likeliest, [best]);
    let sum: f64 = scored.iter().map(|s| s.log_probability.exp()).sum();
    assert!((sum - 1.0).abs() <= 1e-12);
}

#[test]
fn rows_and_tokens_out_of_range_are_refused() {
    let model = model("topk");
    for target in [(3, 0), (0, 256), (0, -1)] {
        let mut spans = Spans::default();
        spans.add(3);
        assert!(model.score(&[1, 2, 3], spans, &[target]).is_err());
    }
    let mut long = Spans::default();
    long.add(17);
    let e = model
        .score(&[1; 17], long, &[(0, 0)])
        .unwrap_err()
        .to_string();
    assert!(e.contains("model.sequence_length = 16"), "{e}");
}

/// Runs `eval --tasks` on the run `m`: standard output and error.
fn eval(place: &Place, arguments: &[&str]) -> (String, String) {
    let mut command = program();
    command.arg("eval").arg("--model").arg(place.path("m"));
    command
        .arg("--task-data")
        .arg(place.path("docs"))
        .args(arguments);
    let output = command.output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (text(output.stdout), text(output.stderr))
}

#[test]
fn a_folder_of_documents_becomes_a_table_and_files() {
    let place = Place::new();
    let trained = place
        .train("m", &["--steps", "2", "--quiet"])
        .status()
        .unwrap();
    assert!(trained.success());
    let docs = place.path("docs");
    fs::create_dir(&docs).unwrap();
    let piqa: Vec<String> = (0..5)
        .map(|i| format!(r#"{{"doc_id": {i}, "doc": {{"goal": "g{i}", "choices": ["a{i}", "bb"], "gold": {}}}}}"#, i % 2))
        .collect();
    fs::write(docs.join("piqa.jsonl"), piqa.join("\n")).unwrap();
    let lambada = r#"{"doc_id": 0, "doc": {"query": "one two three four", "choices": ["five"]}}"#;
    fs::write(docs.join("lambada.jsonl"), lambada).unwrap();
    let out = place.path("scores");
    let (table, _) = eval(
        &place,
        &[
            "--tasks",
            "all",
            "--limit",
            "4",
            "--out",
            out.to_str().unwrap(),
        ],
    );
    assert!(
        table.contains("piqa") && table.contains("2 tasks"),
        "{table}"
    );
    assert!(
        table.contains("100.0%"),
        "every prompt is longer than 16 bytes: {table}"
    );
    let answers = fs::read_to_string(out.join("piqa.jsonl")).unwrap();
    assert_eq!(answers.lines().count(), 4);
    let scores: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(out.join("scores.json")).unwrap()).unwrap();
    assert_eq!(scores["scores"][1]["questions"], 4);
    // Default vectors left out at evaluation: other likelihoods.
    let without = place.path("without");
    eval(
        &place,
        &[
            "--tasks",
            "piqa",
            "--limit",
            "4",
            "--out",
            without.to_str().unwrap(),
            "--without-default-vectors",
        ],
    );
    assert_ne!(
        answers,
        fs::read_to_string(without.join("piqa.jsonl")).unwrap()
    );

    // Both, side by side: each as it is alone.
    let both = place.path("both");
    let out = both.to_str().unwrap();
    let compared = [
        "--tasks",
        "piqa",
        "--limit",
        "4",
        "--out",
        out,
        "--compare-default-vectors",
    ];
    let (table, error) = eval(&place, &compared);
    assert!(
        table.contains("with vectors %") && table.contains("paper, default"),
        "{table}{error}"
    );
    let read = |path: &str| fs::read_to_string(both.join(path)).unwrap();
    assert_eq!(read("piqa.jsonl"), answers);
    let alone = fs::read_to_string(without.join("piqa.jsonl")).unwrap();
    assert_eq!(read("without-default-vectors/piqa.jsonl"), alone);

    let error = |arguments: &[&str]| eval(&place, arguments).1;
    let nothing = place.path("nothing");
    fs::create_dir(&nothing).unwrap();
    let mut command = program();
    command.arg("eval").arg("--model").arg(place.path("m"));
    let e = crate::common::fail(command.args(["--tasks", "all", "--task-data"]).arg(nothing));
    assert!(e.contains("expected documents of benchmarks"), "{e}");
    let e = error(&["--tasks", "hellaswag"]);
    assert!(e.contains("hellaswag.jsonl or hellaswag.jsonl.zst"), "{e}");
    let e = error(&["--tasks", "pica"]);
    assert!(e.contains("did you mean piqa?"), "{e}");
    for doc in [
        r#"{"query":"q"}"#,
        r#"{"choices":["no","yes"],"gold":2,"query":"q"}"#,
    ] {
        let line = format!(r#"{{"doc_id": 0, "doc": {doc}}}"#);
        fs::write(docs.join("boolq.jsonl"), line).unwrap();
        let e = error(&["--tasks", "boolq"]);
        assert!(
            e.contains("a document of boolq in line 1") && e.contains(doc),
            "{e}"
        );
    }
    fs::write(docs.join("sciq.jsonl"), piqa[0].split_at(20).0).unwrap();
    let e = error(&["--tasks", "sciq"]);
    assert!(e.contains("a document of sciq in line 1"), "{e}");
}
