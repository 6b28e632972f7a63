//! A run that is interrupted, killed or cut into other threads ends in the same bytes as one that
//! is not.

use crate::common::*;
use routegrad::routers::ROUTERS;
use routegrad::tensor::random::{Purpose, Stream};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};
use std::process::Command;

fn signal(pid: u32, signal: i32) {
    let status = Command::new("kill")
        .args([format!("-{signal}"), pid.to_string()])
        .status();
    assert!(status.unwrap().success());
}

#[test]
#[ignore = "slow"]
fn stopping_and_resuming_changes_no_byte_with_any_router() {
    let first_version = (
        "sparsemixer",
        &["model.top_k=1", "router.version=\"v1\""][..],
    );
    let all = ROUTERS.iter().map(|r| (r.name, &["model.top_k=2"][..]));
    let rounded = ("topk", &["train.bf16_moments=true"][..]);
    let sampled = ("default", &["router.source=sampled"][..]);
    for (i, (router, set)) in all.chain([first_version, rounded, sampled]).enumerate() {
        let place = Place::new();
        let mut options = vec!["--router", router, "--steps", "120"];
        set.iter().for_each(|s| options.extend(["--set", s]));
        succeed(&mut place.train("whole", &options));
        let out = place.path("cut");
        let mut command = place.train("cut", &options);
        let mut child = command.spawn().unwrap();
        let mut stops = 0;
        for (n, at) in [7 + i, 30 + 5 * i, 90].into_iter().enumerate() {
            if !wait_for_step(&mut child, &out, at) {
                break;
            }
            signal(child.id(), [SIGINT, SIGHUP, SIGTERM, SIGUSR1][n % 4]);
            let output = child.wait_with_output().unwrap();
            assert!(output.status.success(), "{}", text(&output.stderr));
            let said = text(&output.stdout);
            stops += u32::from(said.contains("stopped and saved at step"));
            child = place.resume("cut").spawn().unwrap();
        }
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        assert!(
            stops >= 2,
            "{router}: only {stops} stops came before the end"
        );
        assert_same_end(&place.path("whole"), &out, 120);
    }
}

#[test]
fn analyses_on_the_way_change_no_byte_of_the_training() {
    for router in ["default", "sparsemixer"] {
        let place = Place::new();
        let options = [
            "--router",
            router,
            "--steps",
            "30",
            "--set",
            "model.top_k=2",
        ];
        succeed(&mut place.train("plain", &options));
        let analysed = [&options[..], &["--set", "train.analyze_interval=10"]].concat();
        succeed(&mut place.train("analysed", &analysed));
        for step in [10, 20, 30] {
            let report = format!("analysed/analysis/step-{step}/report.html");
            assert!(place.path(&report).is_file(), "{report}");
        }
        // The analyses together: a row for each of them and each MoE layer.
        let trend = place.path("analysed/analysis/gradients-over-training.csv");
        let rows = std::fs::read_to_string(&trend).unwrap();
        let step = |row: &str| row.split(',').next().unwrap().to_owned();
        let layers = rows.lines().filter(|row| step(row) == "10").count();
        let steps: Vec<String> = rows.lines().skip(1).step_by(layers).map(step).collect();
        assert_eq!(steps, ["10", "20", "30"], "{rows}");
        assert!(trend.with_extension("svg").is_file());
        assert_eq!(
            metrics(&place.path("plain")),
            metrics(&place.path("analysed"))
        );
        let file = |run: &str, name: &str| {
            std::fs::read(place.path(&format!("{run}/checkpoints/step-30/{name}"))).unwrap()
        };
        for name in ["model.safetensors", "trainer.safetensors"] {
            assert!(file("plain", name) == file("analysed", name), "{name}");
        }
    }
}

#[test]
fn benchmark_scores_on_the_way_change_no_byte_of_the_training() {
    for router in ["default", "sparsemixer"] {
        let place = Place::new();
        let question = |i| {
            format!(
                r#"{{"doc_id": {i}, "doc": {{"goal": "g{i}", "choices": ["a{i}", "b"], "gold": {}}}}}"#,
                i % 2
            )
        };
        let questions: Vec<String> = (0..6).map(question).collect();
        std::fs::write(place.path("piqa.jsonl"), questions.join("\n")).unwrap();
        let options = [
            "--router",
            router,
            "--steps",
            "30",
            "--set",
            "model.top_k=2",
        ];
        succeed(&mut place.train("plain", &options));
        let folder = format!("train.task_data={:?}", place.folder.path());
        let scored = [
            &options[..],
            &[
                "--set",
                "train.tasks_interval=10",
                "--set",
                &folder,
                "--set",
                "train.tasks_limit=5",
            ],
        ]
        .concat();
        let (_, stderr) = succeed(&mut place.train("scored", &scored));
        assert_eq!(
            stderr.matches("average of 1 benchmarks").count(),
            3,
            "{stderr}"
        );
        let mut records = metrics(&place.path("scored"));
        let mut steps = Vec::new();
        for record in &mut records {
            if let Some(tasks) = record.as_object_mut().unwrap().remove("tasks") {
                assert!(tasks["piqa"]["acc"].is_f64() && tasks["piqa"]["improvement"].is_f64());
                steps.push(record["step"].as_u64().unwrap());
            }
        }
        assert_eq!(steps, [10, 20, 30]);
        assert_eq!(metrics(&place.path("plain")), records);
        assert!(place.path("scored/tasks.svg").is_file());
        let file = |run: &str, name: &str| {
            std::fs::read(place.path(&format!("{run}/checkpoints/step-30/{name}"))).unwrap()
        };
        for name in ["model.safetensors", "trainer.safetensors"] {
            assert!(file("plain", name) == file("scored", name), "{name}");
        }
    }
}

/// Step of each event of the run's event file, and whether it has a step's numbers.
fn events(run: &std::path::Path) -> Vec<(u64, bool)> {
    let bytes = std::fs::read(run.join("events.out.tfevents.routegrad")).unwrap();
    let (mut found, mut rest) = (Vec::new(), &bytes[..]);
    while !rest.is_empty() {
        let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
        let event = &rest[12..12 + length];
        // Behind the time, the key of the step and its one byte: these runs are short.
        assert!(event[9] == 16 && event[10] < 128);
        let numbers = event.windows(13).any(|w| w == b"loss/training");
        found.push((event[10].into(), numbers));
        rest = &rest[12 + length + 4..];
    }
    found
}

#[test]
fn the_event_file_of_a_run_that_was_killed_and_resumed_has_every_step_once() {
    let place = Place::new();
    let out = place.path("run");
    let mut child = place.train("run", &["--steps", "100"]).spawn().unwrap();
    for at in [13, 37, 71] {
        assert!(wait_for_step(&mut child, &out, at));
        child.kill().unwrap();
        child.wait().unwrap();
        // A crash of the machine may leave half of an event.
        let file = out.join("events.out.tfevents.routegrad");
        let mut bytes = std::fs::read(&file).unwrap();
        bytes.extend_from_within(..20);
        std::fs::write(&file, bytes).unwrap();
        child = place.resume("run").spawn().unwrap();
    }
    let output = child.wait_with_output().unwrap();
    let stderr = text(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    let events = events(&out);
    let steps: Vec<u64> = events.iter().filter(|e| e.1).map(|e| e.0).collect();
    assert_eq!(steps, (1..=100).collect::<Vec<_>>());
    assert!(events.is_sorted_by_key(|e| e.0));
    // Before them the file's version; then, at the start and at each resumption, program and configuration. A
    // resumption cuts what an earlier one from the same step or a later one was told.
    let told: Vec<u64> = events.iter().filter(|e| !e.1).map(|e| e.0).collect();
    assert_eq!(told[0], 0);
    let starts: Vec<u64> = told[1..].chunks(2).map(|pair| pair[0]).collect();
    assert!(told[1..].chunks(2).all(|pair| pair == [pair[0]; 2]));
    assert!(starts.is_sorted_by(|a, b| a < b), "{starts:?}");
    assert_eq!(starts.first(), Some(&1));
    assert_eq!(starts.last(), Some(&(resumed_from(&stderr) as u64 + 1)));
    let config = std::fs::read_to_string(out.join("config.toml")).unwrap();
    assert!(config.starts_with("# routegrad "), "{config}");
}

#[test]
fn the_number_of_threads_changes_no_byte() {
    let place = Place::new();
    for threads in ["1", "2", "4"] {
        succeed(&mut place.train(threads, &["--threads", threads, "--steps", "30"]));
    }
    assert_same_end(&place.path("1"), &place.path("2"), 30);
    assert_same_end(&place.path("1"), &place.path("4"), 30);
}

/// The step that a resumed run says it goes on from.
fn resumed_from(stderr: &str) -> usize {
    let line = stderr.lines().find_map(|l| l.strip_prefix("from step "));
    line.map_or(0, |l| l.split(' ').next().unwrap().parse().unwrap())
}

#[test]
#[ignore = "slow"]
fn kills_at_every_point_of_a_save_and_at_any_time_lose_at_most_the_save_under_way() {
    const STEPS: usize = 1200;
    const INTERVAL: usize = 10;
    let place = Place::new();
    let steps = STEPS.to_string();
    succeed(&mut place.train("whole", &["--steps", &steps]));

    let out = place.path("killed");
    let random = Stream::new(11, Purpose::Check, 0, 0);
    // The 18 points that a save passes (the last only once there is an old checkpoint to remove),
    // each followed by a kill at any other moment.
    for n in 0..36u64 {
        let before = steps_logged(&out);
        let mut command = match n {
            0 => place.train("killed", &["--steps", &steps]),
            _ => place.resume("killed"),
        };
        let at_point = n % 2 == 0;
        if at_point {
            command.env("ROUTEGRAD_FAULT_POINT", (n / 2 + 1).to_string());
        }
        let mut child = command.spawn().unwrap();
        if !at_point {
            let ahead = 5 + (random.uniform(n) * 20.0) as usize;
            wait_for_step(&mut child, &out, before + ahead);
            child.kill().unwrap();
        }
        let output = child.wait_with_output().unwrap();
        let stderr = text(&output.stderr);
        assert_eq!(
            output.status.code(),
            None,
            "kill {n} came too late: {stderr}"
        );
        assert!(
            !stderr.contains("warning"),
            "{n}: a damaged checkpoint: {stderr}"
        );
        // The last save that was begun may have been under way: training had gone on. The one before it is there.
        let saved = (before.saturating_sub(1) / INTERVAL * INTERVAL).saturating_sub(INTERVAL);
        let from = resumed_from(&stderr);
        assert!(
            from >= saved,
            "{n}: {before} steps were done, it went on from {from}"
        );
    }
    let (_, stderr) = succeed(&mut place.resume("killed"));
    assert!(resumed_from(&stderr) > 0);
    assert_same_end(&place.path("whole"), &out, STEPS as u64);
    // What the kills left is gone.
    let left: Vec<String> = std::fs::read_dir(out.join("checkpoints"))
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    assert!(left.iter().all(|n| n.starts_with("step-")), "{left:?}");
    assert_eq!(left.len(), 2);
}
