//! What the commands do when all is well.

use crate::common::*;
use std::fs;
use std::process::Stdio;

#[test]
fn a_run_leaves_its_configuration_log_pictures_and_newest_checkpoints() {
    let place = Place::new();
    let (out, err) = succeed(&mut place.train("run", &["--steps", "60"]));
    assert!(
        out.contains("validation loss") && out.contains("after 60 steps"),
        "{out}"
    );
    assert!(
        err.contains("step 60/60"),
        "no line without a terminal: {err}"
    );
    let run = place.path("run");
    let mut names: Vec<String> = fs::read_dir(&run)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    let expected = [
        "checkpoints",
        "config.toml",
        "events.out.tfevents.routegrad",
        "load.svg",
        "loss.svg",
        "metrics.jsonl",
    ];
    assert_eq!(names, expected);
    assert!(run.join("checkpoints/step-50").is_dir() && run.join("checkpoints/step-60").is_dir());
    let records = metrics(&run);
    assert_eq!(records.len(), 60);
    for (i, r) in records.iter().enumerate() {
        let step = i as u64 + 1;
        assert_eq!(
            (r["step"].as_u64(), r["tokens"].as_u64()),
            (Some(step), Some(step * 64))
        );
        let evaluated = step % 25 == 0 || step == 60;
        assert_eq!(r.get("validation_loss").is_some(), evaluated, "step {step}");
        // One MoE layer, one expert for each of 64 tokens.
        let load = r["load"].as_array().unwrap();
        assert_eq!(load.len(), 1);
        let rows = load[0]
            .as_array()
            .unwrap()
            .iter()
            .map(|n| n.as_u64().unwrap());
        assert_eq!(rows.sum::<u64>(), 64);
        // The auxiliary loss is its coefficient when balanced, more when not.
        let auxiliary = r["auxiliary_loss"].as_f64().unwrap();
        assert!((0.009..0.05).contains(&auxiliary), "{auxiliary}");
    }
    let (first, last) = (&records[0]["loss"], &records[59]["loss"]);
    assert!(
        first.as_f64().unwrap() > last.as_f64().unwrap() + 0.5,
        "{first} to {last}"
    );
}

#[test]
fn the_configuration_that_a_run_left_repeats_it() {
    let place = Place::new();
    let wide = [
        "--steps",
        "12",
        "--router",
        "topk",
        "--seed",
        "3",
        "--set",
        "model.top_k=2",
    ];
    succeed(
        place
            .train("run", &wide)
            .args(["--set", "router.renormalize=true"]),
    );
    let mut again = program();
    again
        .args(["train", "--config"])
        .arg(place.path("run/config.toml"));
    succeed(again.arg("--out").arg(place.path("again")));
    assert_same_end(&place.path("run"), &place.path("again"), 12);
    let read = |run: &str| fs::read(place.path(run).join("config.toml")).unwrap();
    assert_eq!(read("run"), read("again"));
}

#[test]
fn evaluation_agrees_with_that_of_the_training() {
    let place = Place::new();
    let all = ["--steps", "25", "--set", "train.eval_sequences=0"];
    succeed(&mut place.train("run", &all));
    let records = metrics(&place.path("run"));
    let trained = records[24]["validation_loss"].as_f64().unwrap();
    for model in ["run", "run/checkpoints/step-25"] {
        let (out, _) = succeed(program().args(["eval", "--model"]).arg(place.path(model)));
        let value = |name: &str| -> f64 {
            let line = out.lines().find_map(|l| l.strip_prefix(name)).unwrap();
            line.split_whitespace().next().unwrap().parse().unwrap()
        };
        let loss = value("validation loss");
        assert!((loss - trained).abs() < 1e-4, "{loss} is not {trained}");
        assert!((value("perplexity") - trained.exp()).abs() < 1e-2);
        assert!((value("bits per byte") - trained / 2f64.ln()).abs() < 1e-3);
    }
    // Another text gives another loss.
    let other = place.path("other.txt");
    fs::write(
        &other,
        ["QUICK BROWN FOX "; 40].concat() + "\n\n\n" + &["JUMPS "; 40].concat(),
    )
    .unwrap();
    let mut command = program();
    command
        .args(["eval", "--model"])
        .arg(place.path("run"))
        .arg("--data")
        .arg(&other);
    let (out, _) = succeed(&mut command);
    assert!(!out.contains(&format!("{trained:.4}")), "{out}");
}

#[test]
fn generation_continues_the_prompt_and_depends_on_the_seed_alone() {
    let place = Place::new();
    succeed(&mut place.train("run", &["--steps", "30"]));
    let speak = |arguments: &[&str]| {
        let mut command = program();
        command
            .args(["generate", "--tokens", "40", "--model"])
            .arg(place.path("run"));
        succeed(command.args(arguments)).0
    };
    let first = speak(&["--prompt", "word1 word", "--seed", "4"]);
    assert!(
        first.starts_with("word1 word") && first.len() > 45,
        "{first}"
    );
    assert_eq!(
        first,
        speak(&["--prompt", "word1 word", "--seed", "4", "--threads", "1"])
    );
    assert_ne!(first, speak(&["--prompt", "word1 word", "--seed", "5"]));
    let likeliest = speak(&["--temperature", "0", "--seed", "1"]);
    assert_eq!(likeliest, speak(&["--temperature", "0", "--seed", "2"]));
    assert_eq!(likeliest, speak(&["--top-k", "1", "--seed", "3"]));
    speak(&["--prompt", ""]);
    let several = speak(&["--prompt", "word1 word", "--seed", "4", "--samples", "2"]);
    let texts: Vec<&str> = several.split("--- 2 ---\n").collect();
    assert_eq!(texts[0], format!("--- 1 ---\n{first}"));
    assert_ne!(texts[1], first);
    std::fs::write(place.path("prompt.txt"), "word1 word").unwrap();
    let mut command = program();
    command.current_dir(place.folder.path());
    command.args([
        "generate", "--tokens", "40", "--seed", "4", "--model", "run",
    ]);
    let (read, rate) = succeed(command.args(["--prompt-file", "prompt.txt"]));
    assert_eq!(read, first);
    assert!(
        rate.contains("40 tokens in ") && rate.contains("per second"),
        "{rate}"
    );
}

#[test]
fn recomputed_layers_give_the_same_weights() {
    let place = Place::new();
    for router in ["topk", "default"] {
        let name = |kind: &str| format!("{kind}-{router}");
        let options = ["--steps", "8", "--router", router, "--set"];
        succeed(
            place
                .train(&name("kept"), &options)
                .arg("train.recompute=false"),
        );
        for (kind, layers) in [("all", "true"), ("some", "[1]")] {
            let set = format!("train.recompute={layers}");
            succeed(place.train(&name(kind), &options).arg(set));
            let weights = |kind: &str| {
                let run = place.path(&name(kind));
                fs::read(run.join("checkpoints/step-8/model.safetensors")).unwrap()
            };
            assert!(weights(kind) == weights("kept"), "{kind} {router}");
        }
    }
}

#[test]
fn every_option_of_the_model_trains_and_resumes() {
    let place = Place::new();
    let options: &[&[&str]] = &[
        &["model.norm=layernorm", "model.tied_embeddings=true"],
        &[
            "model.qkv_bias=true",
            "model.qk_norm=head",
            "model.heads=4",
            "model.kv_heads=2",
        ],
        &[
            "model.qk_norm=full",
            "model.head_dim=6",
            "model.shared_expert_width=10",
        ],
        &[
            "model.dense_layers=[]",
            "balance.z_coefficient=0.001",
            "balance.aux_scope=micro",
        ],
        &[
            "model.layers=3",
            "model.dense_layers=[0,2]",
            "balance.aux_reduction=mean",
        ],
        &[
            "train.dtype=f64",
            "train.gradient_clip=0",
            "train.micro_batch=1",
        ],
    ];
    for (i, options) in options.iter().enumerate() {
        let run = i.to_string();
        let set: Vec<&str> = options.iter().flat_map(|o| ["--set", o]).collect();
        succeed(place.train(&run, &set).args(["--steps", "10"]));
        succeed(place.resume(&run).args(["--steps", "20"]));
        let records = metrics(&place.path(&run));
        assert!(records.iter().all(|r| r["applied"] == true));
        let loss = |i: usize| records[i]["loss"].as_f64().unwrap();
        assert!(
            loss(19) < loss(0),
            "{options:?}: {} to {}",
            loss(0),
            loss(19)
        );
        succeed(program().args(["eval", "--model"]).arg(place.path(&run)));
    }
}

#[test]
fn a_run_may_be_quiet_and_without_checkpoints() {
    let place = Place::new();
    let (out, err) =
        succeed(&mut place.train("run", &["--steps", "5", "--quiet", "--no-checkpoint"]));
    assert!(err.is_empty(), "{err}");
    assert!(
        out.contains("after 5 steps") && !out.contains("generate"),
        "{out}"
    );
    assert!(!place.path("run/checkpoints").exists());
}

#[test]
fn a_run_is_named_after_what_it_trains() {
    let place = Place::new();
    let mut command = place.train("x", &["--steps", "1", "--set", "router.name=topk"]);
    // The same arguments without --out, in the temporary folder.
    let arguments: Vec<_> = command.get_args().map(|a| a.to_owned()).collect();
    command = program();
    command
        .current_dir(place.folder.path())
        .arg("train")
        .args(&arguments[3..]);
    succeed(&mut command);
    assert!(place.path("runs/tiny-topk/config.toml").exists());
    succeed(command.args(["--experts", "8c2", "--set", "model.hidden=16"]));
    assert!(place.path("runs/tiny-8c2-topk/config.toml").exists());
}

#[test]
fn a_comparison_of_default_vectors_uses_them_or_says_why_it_cannot() {
    let place = Place::new();
    let train = |run: &str, sets: &[&str]| {
        let mut command = place.train(run, &["--steps", "5", "--quiet"]);
        for set in sets {
            command.args(["--set", set]);
        }
        succeed(&mut command);
    };
    let eval = |model: &str, more: &[&str]| {
        let mut command = program();
        command.args(["eval", "--model"]).arg(place.path(model));
        command.args(more);
        command
    };
    let perplexities = |more: &[&str]| -> Vec<String> {
        let (said, _) = succeed(&mut eval("off", more));
        let line = said.lines().find(|line| line.starts_with("perplexity"));
        let words = line.unwrap().split_whitespace().skip(1);
        words.map(String::from).collect()
    };
    // Large vectors, which the evaluation of the run leaves out.
    train(
        "off",
        &["router.use_at_evaluation=false", "router.init_std=1"],
    );
    let compared = perplexities(&["--compare-default-vectors"]);
    assert_ne!(compared[0], compared[1]);
    assert_eq!(perplexities(&[])[0], compared[1]);

    train("backward", &["router.pass_forward=false"]);
    train("topk", &["router.name=topk"]);
    train(
        "layernorm",
        &["router.use_at_evaluation=false", "model.norm=layernorm"],
    );
    let mut export = program();
    export.args(["export", "--to", "hf", "--model"]);
    export.arg(place.path("layernorm"));
    succeed(export.arg("--out").arg(place.path("exported")));
    for (model, flag, part) in [
        (
            "backward",
            "--compare-default-vectors",
            "pass_forward = false",
        ),
        ("topk", "--compare-default-vectors", "topk"),
        ("topk", "--without-default-vectors", "topk"),
        ("exported", "--compare-default-vectors", "in an export"),
    ] {
        let line = fail(&mut eval(model, &[flag]));
        assert!(line.contains(flag) && line.contains(part), "{line}");
    }
}

#[test]
fn help_and_the_list_of_routers_name_what_there_is() {
    let (out, _) = succeed(program().arg("--help"));
    for command in ["train", "eval", "generate", "gradcheck", "routers"] {
        assert!(out.contains(command), "{out}");
    }
    let (out, _) = succeed(program().args(["train", "--help"]));
    assert!(
        out.contains("Examples:") && out.contains("--resume"),
        "{out}"
    );
    let (out, _) = succeed(program().arg("routers"));
    for info in routegrad::routers::ROUTERS {
        assert!(
            out.contains(info.name) && out.contains(info.source),
            "{out}"
        );
    }
    let (out, _) = succeed(program().args(["gradcheck", "rope"]));
    assert!(out.contains("derivatives pass"), "{out}");
}

#[test]
fn the_floors_in_docs_are_what_the_command_prints() {
    let (out, _) = succeed(program().arg("floors"));
    assert!(
        out == include_str!("../../docs/moe-layer-floors.md"),
        "run: routegrad floors > docs/moe-layer-floors.md"
    );
    for (arguments, part) in [
        (["--preset", "1.96"], "`1.96b`"),
        (["--tokens", "0"], "--tokens"),
    ] {
        let line = fail(program().arg("floors").args(arguments));
        assert!(line.contains(part), "{line}");
    }
}

#[test]
fn a_list_that_nobody_reads_to_its_end_ends_quietly() {
    for command in [&["routers"][..], &["hardware-check", "--list"], &["config"]] {
        let mut child = program()
            .args(command)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        let done = child.wait_with_output().unwrap();
        let said = text(&done.stderr);
        // A pipe takes what a short list has before it is closed, or not.
        assert!(
            done.status.success() && said.is_empty(),
            "{command:?}: {said}"
        );
    }
}

/// A program that is not in the project's folder has the project's records.
#[test]
fn a_plan_takes_recorded_speeds_wherever_it_is_made() {
    let elsewhere = tempfile::tempdir().unwrap();
    let plan = ["plan", "--preset", "557m", "--device", "H200"];
    let (out, _) = succeed(program().args(plan).current_dir(elsewhere.path()));
    assert!(out.contains("on one NVIDIA H200, recorded on 20"), "{out}");
}
