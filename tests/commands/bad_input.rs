//! Whatever is wrong with what the program is given, it says so, ends with exit code 1, and loses
//! nothing that was saved; or it just works.

use crate::common::*;
use routegrad::config::{Config, Layers};
use routegrad::model::Model;
use routegrad::routers;
use routegrad::train::checkpoint::{self, TrainerState};
use routegrad::train::step::StepExecutor;
use std::fs;
use std::path::Path;

fn has(line: &str, parts: &[&str]) {
    for part in parts {
        assert!(line.contains(part), "no `{part}` in: {line}");
    }
}

/// `eval` of the model at `path` on the text of `place`.
fn eval(path: &Path) -> std::process::Command {
    let mut command = program();
    command.arg("eval").arg("--model").arg(path);
    command
}

#[test]
fn a_folder_that_is_not_what_a_command_needs_is_told_apart_from_none() {
    let place = Place::new();
    fs::create_dir(place.path("folder")).unwrap();
    for (command, needed) in [
        (
            &["generate", "--model"][..],
            "a run, or one of its checkpoints",
        ),
        (&["data", "inspect"], "a folder of tokens"),
    ] {
        for (name, got) in [
            ("folder", "without manifest.json"),
            ("none", "no such folder"),
        ] {
            let mut program = program();
            program.args(command).arg(place.path(name));
            has(&fail(&mut program), &[needed, got]);
        }
    }
    let said = fail(&mut place.resume("none"));
    has(&said, &["a run to resume", "no config.toml"]);
    assert!(!place.path("none").exists());
}

#[test]
fn a_negative_number_is_answered_as_a_value() {
    let place = Place::new();
    for (flag, key) in [
        ("--steps", "train.steps"),
        ("--learning-rate", "train.learning_rate"),
        ("--rank-timeout", "--rank-timeout"),
    ] {
        has(&fail(&mut place.train("new", &[flag, "-1"])), &[key, "-1"]);
    }
}

#[test]
fn unusable_text_is_named_and_leaves_no_run_behind() {
    let place = Place::new();
    let mut packed = fs::read("data/embedded/sotu.txt.zst").unwrap();
    packed.truncate(50_000);
    fs::write(place.path("cut.txt.zst"), packed).unwrap();
    fs::write(place.path("empty.txt"), "").unwrap();
    fs::write(place.path("latin.txt"), b"na\xefve").unwrap();
    fs::write(place.path("short.txt"), "a\n\n\nb").unwrap();
    fs::create_dir(place.path("folder")).unwrap();
    for (name, part) in [
        ("none.txt", "check the path"),
        ("empty.txt", "empty"),
        ("cut.txt.zst", "cut-off"),
        ("latin.txt", "offset 2"),
        ("short.txt", "more than 16 tokens"),
        ("folder", ".txt"),
    ] {
        let mut command = program();
        command.args(["train", "--set", "model.sequence_length=16", "--out"]);
        command
            .arg(place.path("run"))
            .arg("--data")
            .arg(place.path(name));
        let line = fail(&mut command);
        has(&line, &[part]);
        if name != "short.txt" {
            has(&line, &[name]);
        }
        assert!(!place.path("run").exists());
    }
}

#[test]
fn wrong_words_name_the_nearest_right_ones() {
    let place = Place::new();
    for (arguments, parts) in [
        (&["--preset", "tinny"][..], &["--preset", "`tiny`"][..]),
        (&["--experts", "8x4"], &["--experts", "NcK"]),
        (&["--router", "defualt"], &["\"default\""]),
        (
            &["--set", "train.step=3"],
            &["`train.step`", "`train.steps`"],
        ),
        (&["--set", "router.bta=0.5"], &["router.beta"]),
        (
            &["--set", "model.top_k=5"],
            &["model.top_k", "num_experts = 4"],
        ),
        (
            &["--set", "train.micro_batch=3"],
            &["train.micro_batch", "divisor"],
        ),
        (&["--steps", "0"], &["train.steps"]),
        (&["--threads", "0"], &["--threads"]),
        (&["--threads", "100000"], &["--threads", "1024"]),
        (&["--set", "train.eps=1e-46"], &["train.eps", "f32"]),
    ] {
        has(&fail(&mut place.train("run", arguments)), parts);
        assert!(!place.path("run").exists());
    }
}

#[test]
fn a_token_beyond_the_vocabulary_is_named() {
    let place = Place::new();
    let line = fail(&mut place.train("run", &["--set", "model.vocab_size=100"]));
    has(&line, &["model.vocab_size = 100", "offset"]);
    let small = ["--set", "model.vocab_size=128", "--steps", "2"];
    succeed(&mut place.train("small", &small));
    let mut generate = program();
    generate
        .args(["generate", "--prompt", "é", "--model"])
        .arg(place.path("small"));
    has(&fail(&mut generate), &["--prompt", "128"]);
}

#[test]
fn a_run_is_not_overwritten_and_a_missing_one_not_resumed() {
    let place = Place::new();
    succeed(&mut place.train("run", &["--steps", "3"]));
    let before = fs::read(place.path("run/metrics.jsonl")).unwrap();
    has(
        &fail(&mut place.train("run", &[])),
        &["holds a run", "--resume", "--name"],
    );
    assert_eq!(fs::read(place.path("run/metrics.jsonl")).unwrap(), before);
    has(
        &fail(&mut place.resume("none")),
        &["none", "a run to resume"],
    );
    // Another model cannot go on from its checkpoint; another number of steps can.
    let line = fail(place.resume("run").args(["--set", "model.hidden=32"]));
    has(&line, &["model", "began"]);
    let line = fail(place.resume("run").args(["--seed", "5"]));
    has(&line, &["train.seed"]);
    let (out, _) = succeed(place.resume("run").args(["--steps", "5"]));
    has(&out, &["after 5 steps"]);
    assert_eq!(steps_logged(&place.path("run")), 5);
}

#[test]
fn damaged_and_foreign_checkpoints_are_named_and_older_ones_used() {
    let place = Place::new();
    succeed(&mut place.train("run", &["--steps", "20"]));
    let checkpoints = place.path("run/checkpoints");
    let newest = checkpoints.join("step-20");
    let weights = newest.join("model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    fs::write(&weights, &bytes).unwrap();
    has(
        &fail(&mut eval(&newest)),
        &["model.safetensors", "digest", "damaged"],
    );
    let (out, _) = succeed(&mut eval(&place.path("run")));
    has(&out, &["step-10"]);
    let (_, err) = succeed(&mut place.resume("run"));
    has(&err, &["warning", "step-20", "from step 10"]);
    succeed(&mut eval(&newest));

    // A checkpoint of another model under this run's name.
    succeed(&mut place.train(
        "wide",
        &["--steps", "20", "--set", "model.expert_ffn_width=24"],
    ));
    fs::remove_dir_all(&newest).unwrap();
    fs::rename(place.path("wide/checkpoints/step-20"), &newest).unwrap();
    has(&fail(&mut place.resume("run")), &["model", "began"]);
    // A folder of something else.
    has(
        &fail(&mut eval(place.folder.path())),
        &["a run, or one of its checkpoints", "without manifest.json"],
    );
    has(&fail(&mut eval(&place.path("none"))), &["no such folder"]);
}

#[test]
fn a_run_whose_checkpoints_are_all_damaged_is_not_resumed_and_stays_as_it_is() {
    let place = Place::new();
    succeed(&mut place.train("run", &["--steps", "20"]));
    let run = place.path("run");
    let step = |n: u64| run.join(format!("checkpoints/step-{n}"));
    // One loses its end, one its manifest.
    let weights = step(20).join("model.safetensors");
    let bytes = fs::read(&weights).unwrap();
    fs::write(&weights, &bytes[..bytes.len() / 2]).unwrap();
    fs::remove_file(step(10).join("manifest.json")).unwrap();
    let kept = ["metrics.jsonl", "config.toml"].map(|f| run.join(f));
    let before = kept.each_ref().map(|f| fs::read(f).unwrap());
    let arguments: [&[&str]; 2] = [&[], &["--steps", "30"]];
    for more in arguments {
        let line = fail(place.resume("run").args(more));
        has(
            &line,
            &["2 damaged", "step-20", "step-10", "begin again", "--out"],
        );
        assert_eq!(kept.each_ref().map(|f| fs::read(f).unwrap()), before);
        assert!(step(10).is_dir());
        assert_eq!(fs::read(&weights).unwrap(), bytes[..bytes.len() / 2]);
    }
    // The advice can be followed.
    succeed(&mut place.train("anew", &["--steps", "3"]));
    // One complete checkpoint is enough.
    fs::write(&weights, &bytes).unwrap();
    let (out, _) = succeed(place.resume("run").args(["--steps", "25"]));
    has(&out, &["after 25 steps"]);
    assert_eq!(steps_logged(&run), 25);
}

/// A checkpoint of the micro model whose tensors `change` has changed.
fn crafted(place: &Place, name: &str, change: impl FnOnce(&mut Model)) -> std::path::PathBuf {
    let mut layers = Layers::preset("tiny");
    layers.set = MICRO.iter().map(|s| s.to_string()).collect();
    layers
        .set
        .push(format!("data.source={}", place.text.display()));
    let config = Config::load(&layers, &routers::resolve).unwrap();
    let mut model = Model::new(&config).unwrap();
    change(&mut model);
    let trainer = StepExecutor::new(&config.train, &model);
    let state = TrainerState {
        step: 1,
        optimizer_steps: 1,
        skipped_in_a_row: 0,
        data: String::new(),
        config,
    };
    let snapshot = checkpoint::snapshot(&model, &trainer, &state).unwrap();
    checkpoint::save(&place.path(name), &snapshot, 1, checkpoint::SHARD_BYTES).unwrap()
}

#[test]
fn a_weight_that_is_not_a_number_is_named() {
    let place = Place::new();
    let path = crafted(&place, "nan", |model| {
        let parameter = model
            .parameters
            .iter_mut()
            .find(|p| p.name.contains("o_proj"));
        let value = &mut parameter.unwrap().value;
        value.change(|w| w.slice_mut::<f32>()[3] = f32::NAN);
    });
    has(
        &fail(eval(&path).arg("--data").arg(&place.text)),
        &["layers.0.self_attn.o_proj.weight", "not finite"],
    );
    // Finite weights whose logits are not.
    let path = crafted(&place, "huge", |model| {
        let head = &mut model.parameters.last_mut().unwrap().value;
        head.change(|head| {
            let numbers = head.slice_mut::<f32>().iter_mut();
            numbers.for_each(|w| *w = w.signum() * 3e38);
        });
    });
    has(
        &fail(eval(&path).arg("--data").arg(&place.text)),
        &["validation loss", "not finite"],
    );
    let mut generate = program();
    has(
        &fail(generate.args(["generate", "--model"]).arg(&path)),
        &["not finite"],
    );
}

#[test]
fn a_foreign_tensor_is_named() {
    let place = Place::new();
    let path = crafted(&place, "foreign", |model| {
        let part = &mut model.parameters.last_mut().unwrap().parts[0];
        part.name = "output.weight".into();
    });
    has(
        &fail(&mut eval(&path)),
        &["lm_head.weight", "none of that name"],
    );
}

#[test]
fn a_loss_that_stays_infinite_stops_the_run_and_keeps_what_was_saved() {
    let place = Place::new();
    succeed(&mut place.train(
        "run",
        &["--steps", "10", "--set", "train.max_skipped_steps=4"],
    ));
    let mut command = place.resume("run");
    command.args(["--steps", "200", "--set", "train.learning_rate=1e30"]);
    command.args(["--set", "train.checkpoint_interval=1000"]);
    let line = fail(&mut command);
    has(
        &line,
        &["not finite", "4 consecutive steps", "train.learning_rate"],
    );
    let records = metrics(&place.path("run"));
    let left_out: Vec<bool> = records.iter().map(|r| r["applied"] == false).collect();
    assert!(
        left_out.ends_with(&[false, true, true, true, true]),
        "{left_out:?}"
    );
    succeed(&mut eval(&place.path("run/checkpoints/step-10")));
}

#[test]
fn a_disk_that_fills_up_during_a_save_costs_nothing_saved_before() {
    let place = Place::new();
    succeed(&mut place.train("run", &["--steps", "10"]));
    let saved = place.path("run/checkpoints/step-10");
    // A file may grow to 16 KB and no further, enough for the logs: the next save fails in the middle of a file. The
    // shell makes the limit an error of the write instead of a signal.
    let mut command = std::process::Command::new("sh");
    command.args(["-c", "trap '' XFSZ; ulimit -f 32; exec \"$0\" \"$@\""]);
    command.arg(env!("CARGO_BIN_EXE_routegrad"));
    command
        .args(["train", "--resume", "--steps", "20", "--out"])
        .arg(place.path("run"));
    let line = fail(&mut command);
    has(&line, &["cannot write", "step-20", "intact"]);
    let left: Vec<_> = fs::read_dir(place.path("run/checkpoints"))
        .unwrap()
        .collect();
    assert_eq!(left.len(), 1, "the unfinished save stayed: {left:?}");
    succeed(&mut eval(&saved));
    let (out, _) = succeed(place.resume("run").args(["--steps", "20"]));
    has(&out, &["after 20 steps"]);
}

#[test]
fn a_folder_that_cannot_be_written_is_named() {
    let place = Place::new();
    // Not even the superuser can write below a file.
    fs::write(place.path("file"), "").unwrap();
    has(
        &fail(&mut place.train("file/run", &[])),
        &["cannot create", "file/run"],
    );
    fs::create_dir(place.path("run")).unwrap();
    let mut permissions = fs::metadata(place.path("run")).unwrap().permissions();
    permissions.set_readonly(true);
    fs::set_permissions(place.path("run"), permissions).unwrap();
    if fs::write(place.path("run/probe"), "").is_ok() {
        println!("skipped: this user may write to read-only folders");
        return;
    }
    has(
        &fail(&mut place.train("run", &[])),
        &["cannot write", "permissions"],
    );
}

#[test]
fn a_model_that_cannot_fit_in_memory_is_refused_before_it_is_made() {
    let place = Place::new();
    let huge = [
        "model.hidden=1048576",
        "model.heads=1024",
        "model.layers=1000",
    ];
    let huge: Vec<&str> = huge.iter().flat_map(|s| ["--set", s]).collect();
    has(
        &fail(&mut place.train("run", &huge)),
        &["free memory", "GiB", "smaller"],
    );
    let line = fail(&mut place.train(
        "run",
        &[
            "--set",
            "train.sequences_per_step=16000000",
            "--set",
            "model.sequence_length=1000000",
        ],
    ));
    has(&line, &["GiB"]);
    assert!(!place.path("run").exists());
}

#[test]
fn one_token_a_step_trains() {
    let place = Place::new();
    let one = [
        "model.sequence_length=1",
        "train.sequences_per_step=1",
        "train.micro_batch=1",
    ];
    let one: Vec<&str> = one.iter().flat_map(|s| ["--set", s]).collect();
    for info in routers::ROUTERS {
        let mut command = place.train(info.name, &one);
        let (out, _) = succeed(command.args(["--steps", "5", "--router", info.name]));
        has(&out, &["validation loss"]);
    }
}

#[test]
fn experts_that_never_get_a_token_do_no_harm() {
    let place = Place::new();
    // Two tokens a micro-batch and 64 experts: most get none in any step.
    let few = [
        "model.num_experts=64",
        "model.expert_ffn_width=8",
        "model.sequence_length=2",
        "train.micro_batch=1",
        "train.sequences_per_step=2",
    ];
    let few: Vec<&str> = few.iter().flat_map(|s| ["--set", s]).collect();
    for router in ["topk", "default"] {
        succeed(
            place
                .train(router, &few)
                .args(["--steps", "6", "--router", router]),
        );
        for record in metrics(&place.path(router)) {
            let load = record["load"][0].as_array().unwrap();
            assert!(load.iter().filter(|n| **n == 0).count() >= 60, "{load:?}");
            assert!(
                record["loss"].is_f64() && record["applied"] == true,
                "{record}"
            );
        }
    }
}

#[test]
fn a_second_process_in_the_folder_of_a_run_is_refused_until_the_first_has_gone() {
    let place = Place::new();
    let out = place.path("run");
    let mut first = place.train("run", &["--steps", "100000"]).spawn().unwrap();
    assert!(wait_for_step(&mut first, &out, 12));
    let expected = format!("process {} on ", first.id());
    let line = fail(place.resume("run").args(["--steps", "100001"]));
    has(&line, &[&expected, "since 20", "choose another folder"]);
    // A killed process holds nothing.
    first.kill().unwrap();
    first.wait().unwrap();
    let steps = (steps_logged(&out) + 5).to_string();
    succeed(place.resume("run").args(["--steps", &steps]));
}

#[test]
fn a_resume_says_what_it_changes() {
    let place = Place::new();
    succeed(&mut place.train("run", &["--steps", "10"]));
    let (_, said) = succeed(&mut place.resume("run"));
    has(&said, &["all 10 steps are done; set a larger --steps"]);
    let line = fail(place.resume("run").args(["--steps", "5"]));
    has(
        &line,
        &[
            "at least 10, the number of steps that are done",
            "train.steps = 5",
        ],
    );
    let line = fail(place.resume("run").args(["--seed", "7"]));
    has(&line, &["train.seed = 0", "got 7"]);
    let line = fail(place.resume("run").args(["--set", "model.top_k=2"]));
    has(&line, &["model.top_k = 1", "got 2"]);
    let (_, said) = succeed(place.resume("run").args(["--steps", "20"]));
    has(
        &said,
        &["the learning rate of step 11 is", "until now would be"],
    );
}

#[test]
fn a_run_that_ends_with_steps_left_out_says_how_many() {
    let place = Place::new();
    let mut command = place.train("run", &["--steps", "3", "--no-checkpoint"]);
    command.args(["--set", "train.learning_rate=1e30"]);
    let (out, _) = succeed(&mut command);
    assert!(out.contains("2 of 3 steps were skipped"), "{out}");
}

#[test]
fn a_value_of_another_router_or_device_is_answered_by_what_it_is_for() {
    let place = Place::new();
    let refused = |arguments: &[&str]| fail(&mut place.train("run", arguments));
    has(
        &refused(&["--router", "topk", "--set", "router.beta=0.5"]),
        &["router.beta", "it is a setting of default"],
    );
    has(
        &refused(&["--set", "router.shrink=runing"]),
        &["expected a number from 0 up, or \"running\""],
    );
    has(
        &refused(&["--timeline"]),
        &["--timeline", "a device with kernels, sim or cuda"],
    );
}

#[test]
fn a_run_without_a_checkpoint_is_called_that_and_what_to_do_is_named() {
    let place = Place::new();
    succeed(&mut place.train("run", &["--steps", "3", "--no-checkpoint"]));
    let run = place.path("run");
    let tokens = place.path("tokens.safetensors");
    let out = place.path("out");
    let (tokens, out) = (tokens.to_str().unwrap(), out.to_str().unwrap());
    for arguments in [
        &["eval"][..],
        &["analyze"],
        &["generate"],
        &["export", "--to", "hf", "--out", out],
        &["dump", "--tokens", tokens, "--out", out],
    ] {
        // Before its first save a run has no folder of checkpoints, and later for a moment an empty one.
        for empty in [false, true] {
            if empty {
                fs::create_dir_all(run.join("checkpoints")).unwrap();
            } else {
                let _ = fs::remove_dir(run.join("checkpoints"));
            }
            let mut command = program();
            command.args(arguments).arg("--model").arg(&run);
            let line = fail(&mut command);
            has(
                &line,
                &["a run without a checkpoint", "wait", "train --resume --out"],
            );
            assert!(!line.contains("manifest.json"), "{line}");
        }
    }
    // The advice can be followed.
    succeed(&mut place.resume("run"));
    succeed(&mut eval(&run));
}

#[test]
fn a_wrong_value_is_reported_before_a_folder_that_is_taken() {
    let place = Place::new();
    succeed(&mut place.train("run", &["--steps", "1"]));
    for (arguments, part) in [
        (&["--set", "train.step=3"][..], "train.step"),
        (&["--data", "missing.txt"], "missing.txt"),
        (
            &["--router", "topk", "--set", "router.renormalize=true"],
            "router.renormalize",
        ),
        (&["--set", "model.vocab_size=64"], "model.vocab_size"),
        (&["--timeline"], "--timeline"),
    ] {
        let mut command = program();
        command.arg("train").args(arguments);
        let line = fail(command.arg("--out").arg(place.path("run")));
        has(&line, &[part]);
        assert!(!line.contains("holds a run"), "{line}");
    }
    has(&fail(&mut place.train("run", &[])), &["holds a run"]);
}

#[test]
fn a_refused_argument_or_value_ends_with_2_and_any_other_failure_with_1() {
    let place = Place::new();
    let code = |command: &mut std::process::Command| command.output().unwrap().status.code();
    for refused in [
        &["--stepss", "3"][..],
        &["--steps", "many"],
        &["--steps", "0"],
        &["--threads", "0"],
        &["--preset", "tinny"],
        &["--experts", "8x4"],
        &["--router", "defualt"],
        &["--set", "train.step=3"],
        &["--set", "train.steps=many"],
        &["--set", "model.top_k=5"],
        &["--set", "router.beta=2"],
        &["--timeline"],
        &["--rank-timeout", "0"],
        &["--rank-timeout", "1e300"],
        &["--sim-arch", "sm_90"],
    ] {
        assert_eq!(
            code(&mut place.train("run", refused)),
            Some(2),
            "{refused:?}"
        );
    }
    assert_eq!(code(program().args(["ablate", "--jobs", "0"])), Some(2));
    assert_eq!(code(program().args(["floors", "--tokens", "0"])), Some(2));
    // Options of `eval` for the loss do not go with those for benchmarks.
    let tasks = ["--tasks", "piqa", "--task-data", "eval"];
    for ignored in [
        &["--task-data", "eval"][..],
        &["--limit", "3"],
        &[&tasks[..], &["--data", "other.txt"]].concat()[..],
        &[&tasks[..], &["--sequences", "3"]].concat()[..],
    ] {
        let mut command = eval(&place.path("none"));
        assert_eq!(code(command.args(ignored)), Some(2), "{ignored:?}");
    }
    for failed in [["--data", "missing.txt"], ["--config", "missing.toml"]] {
        let mut command = program();
        command.args(["train", "--out"]).arg(place.path("run"));
        assert_eq!(code(command.args(failed)), Some(1), "{failed:?}");
    }
    assert_eq!(code(&mut eval(&place.path("none"))), Some(1));
    assert_eq!(code(&mut place.train("run", &["--steps", "1"])), Some(0));
    assert_eq!(code(&mut place.train("run", &["--steps", "1"])), Some(1));
}

#[test]
fn numbers_on_the_command_line_are_answered_without_words_of_the_parser() {
    for (arguments, expected) in [
        (&["train", "--steps", "many"][..], "expected a whole number"),
        (&["train", "--learning-rate", "fast"], "expected a number"),
        (
            &["floors", "--tokens", "-1"],
            "expected a whole number, 0 or more",
        ),
    ] {
        let output = program().args(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(2));
        let said = text(&output.stderr);
        assert!(
            said.contains(expected) && said.contains(arguments[1]),
            "{said}"
        );
        assert!(
            !said.contains("literal") && !said.contains("digit"),
            "{said}"
        );
    }
}
