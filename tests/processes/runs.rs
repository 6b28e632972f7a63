//! Several processes under a launcher of MPI train what one does, and refuse to begin when they are not of one run.

use crate::common::*;
use crate::launchers::*;
use routegrad::config::{Config, Layers};
use routegrad::data::Tokenizer;
use routegrad::dist::{self, Collective, Ranks, ThreadRank, doing};
use routegrad::routers::{self, ROUTERS};
use routegrad::study::{hooks, tasks};
use routegrad::train::{RunOptions, checkpoint};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

/// The largest relative difference of a number of the log between two runs up to step `steps`; NaN is infinite.
fn difference(a: &Path, b: &Path, key: &str, steps: usize) -> f64 {
    let (a, b) = (metrics(a), metrics(b));
    assert_eq!(a.len(), b.len());
    let pairs = a.iter().zip(&b).take(steps);
    let differences = pairs.map(|(a, b)| {
        let [a, b] = [a, b].map(|record| record[key].as_f64().unwrap_or(f64::NAN));
        (a - b).abs() / a.abs().max(b.abs())
    });
    differences.fold(0.0, |most: f64, d| {
        if d <= most {
            most
        } else if d.is_nan() {
            f64::INFINITY
        } else {
            d
        }
    })
}

#[test]
#[ignore = "slow"]
fn every_router_trains_the_same_on_one_two_and_four_processes() {
    let launchers = launchers();
    let (Some(first), Some(last)) = (launchers.first(), launchers.last()) else {
        return;
    };
    let first_version = (
        "sparsemixer",
        &["--set", "model.top_k=1", "--set", "router.version=\"v1\""][..],
    );
    let all = ROUTERS
        .iter()
        .map(|r| (r.name, &["--set", "model.top_k=2"][..]));
    let mut worst = 0.0;
    for (router, set) in all.chain([first_version]) {
        let place = Place::new();
        let options = [
            &[
                "--router",
                router,
                "--steps",
                "8",
                "--set",
                "train.dtype=\"f64\"",
            ],
            set,
        ]
        .concat();
        succeed(&mut train(&place, "1", &options));
        for (ranks, launcher) in [(2, first), (4, last)] {
            let name = ranks.to_string();
            succeed(&mut launcher.ranks(ranks, &train(&place, &name, &options)));
            let (one, several) = (place.path("1"), place.path(&name));
            let found = difference(&one, &several, "loss", 8);
            assert!(found <= 1e-12, "{router}, {ranks} processes: {found:.1e}");
            worst = found.max(worst);
            let loads =
                |run: &Path| -> Vec<_> { metrics(run).iter().map(|r| r["load"].clone()).collect() };
            assert_eq!(loads(&one), loads(&several), "{router}, {ranks} processes");
        }
    }
    println!("largest relative difference of a loss: {worst:.1e}");
}

#[test]
fn f32_losses_of_two_and_four_processes_stay_close_to_those_of_one() {
    for launcher in launchers().into_iter().take(1) {
        let place = Place::new();
        let options = ["--router", "default", "--steps", "12"];
        succeed(&mut train(&place, "1", &options));
        for ranks in [2, 4] {
            let name = ranks.to_string();
            succeed(&mut launcher.ranks(ranks, &train(&place, &name, &options)));
            let (one, several) = (place.path("1"), place.path(&name));
            for (steps, most) in [(1, 1e-6), (12, 1e-4)] {
                let found = difference(&one, &several, "loss", steps);
                assert!(
                    found <= most,
                    "{ranks} processes, {steps} steps: {found:.1e}"
                );
            }
        }
    }
}

/// The run of `train` in threads of this process.
pub fn train_in_threads(place: &Place, out: &str, ranks: usize, set: &[&str]) {
    let mut layers = Layers::preset("tiny");
    layers.set = MICRO.iter().map(|s| s.to_string()).collect();
    let pairs = SHARED.iter().chain(set).filter(|s| **s != "--set");
    layers.set.extend(pairs.map(|s| s.to_string()));
    let data = place.text.to_string_lossy().into_owned();
    layers.flags = vec![("--data", "data.source", data.into())];
    let config = Config::load(&layers, &routers::resolve).unwrap();
    let options = RunOptions {
        out: place.path(out),
        resume: false,
        checkpoints: true,
        timeline: false,
        quiet: true,
    };
    let ended = ThreadRank::run(ranks, |rank| {
        let stop = AtomicBool::new(false);
        let dist: Arc<dyn Collective> = Arc::new(rank);
        hooks::train_on(dist, config.clone(), &options, &stop).map(|s| s.step)
    });
    for steps in ended {
        assert_eq!(steps.unwrap(), 20);
    }
}

#[test]
#[ignore = "slow"]
fn checkpoints_have_the_same_bytes_again_with_another_library_and_in_threads() {
    let launchers = launchers();
    let Some(first) = launchers.first() else {
        return;
    };
    let place = Place::new();
    let set = [
        "--set",
        "train.steps=20",
        "--set",
        "router.name=\"default\"",
    ];
    succeed(&mut first.ranks(2, &train(&place, "first", &set)));
    succeed(&mut first.ranks(2, &train(&place, "again", &set)));
    assert_same_end(&place.path("first"), &place.path("again"), 20);
    for other in &launchers[1..] {
        succeed(&mut other.ranks(2, &train(&place, "other", &set)));
        assert_same_end(&place.path("first"), &place.path("other"), 20);
    }
    train_in_threads(&place, "threads", 2, &set);
    assert_same_end(&place.path("first"), &place.path("threads"), 20);
    // Moments in bf16, whose rounding draws numbers by the place in the parameter.
    let rounded = [&set[..], &["--set", "train.bf16_moments=true"]].concat();
    succeed(&mut first.ranks(4, &train(&place, "rounded", &rounded)));
    train_in_threads(&place, "rounded-threads", 4, &rounded);
    assert_same_end(&place.path("rounded"), &place.path("rounded-threads"), 20);
}

#[test]
fn one_process_of_a_launcher_is_a_plain_run_and_so_is_one_that_ignores_it() {
    let (place, steps) = (Place::new(), ["--steps", "20"]);
    succeed(&mut train(&place, "plain", &steps));
    for launcher in launchers() {
        let [launched, ignoring] =
            ["launched", "ignoring"].map(|name| format!("{name}-{launcher:?}"));
        let (out, err) = succeed(&mut launcher.ranks(1, &train(&place, &launched, &steps)));
        assert_same_end(&place.path("plain"), &place.path(&launched), 20);
        assert!(
            out.contains("validation loss") && !err.contains("ranks"),
            "{out}{err}"
        );
        let command = train(&place, &ignoring, &["--steps", "20", "--ranks", "none"]);
        succeed(&mut launcher.ranks(1, &command));
        assert_same_end(&place.path("plain"), &place.path(&ignoring), 20);
    }
}

#[test]
fn ranks_of_another_configuration_text_or_program_are_refused_with_the_difference() {
    for launcher in launchers() {
        let place = Place::new();
        let own = train(&place, "run", &["--steps", "20"]);
        let mut other = train(&place, "run", &["--steps", "21"]);
        let said = refused(launcher.start(&[(1, &own), (1, &other)]));
        let expected = "the configurations `train.steps = 20` and `train.steps = 21`";
        assert!(said.len() == 1 && said[0].contains(expected), "{said:?}");

        let changed = place.path("elsewhere");
        std::fs::create_dir(&changed).unwrap();
        let text = std::fs::read_to_string(&place.text).unwrap();
        // The same path on another host, as a folder that each process enters for itself.
        for (folder, text) in [("a", text.clone()), ("b", text.replace("word3", "Word3"))] {
            std::fs::create_dir(changed.join(folder)).unwrap();
            std::fs::write(changed.join(folder).join("text.txt"), text).unwrap();
        }
        let program = env!("CARGO_BIN_EXE_routegrad");
        let in_folder = |folder: &str| {
            let mut command = Command::new("sh");
            let out = place.path("run");
            let arguments = own.get_args().map(|a| format!("'{}'", a.to_string_lossy()));
            let arguments: Vec<String> = arguments
                .map(|a| a.replace(&*place.text.to_string_lossy(), "text.txt"))
                .collect();
            let line = format!(
                "cd {} && exec {program} {} --out {}",
                changed.join(folder).display(),
                arguments
                    .join(" ")
                    .replace(&format!("'--out' '{}'", out.display()), ""),
                out.display()
            );
            command.args(["-c", &line]);
            command
        };
        let said = refused(launcher.start(&[(1, &in_folder("a")), (1, &in_folder("b"))]));
        let expected = "on rank 0 and rank 1 data with the digests";
        assert!(said.len() == 1 && said[0].contains(expected), "{said:?}");

        let copy = place.path("routegrad-of-another-build");
        let mut bytes = std::fs::read(program).unwrap();
        bytes.push(0);
        std::fs::write(&copy, bytes).unwrap();
        let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(&copy, executable).unwrap();
        other = Command::new(&copy);
        other.args(own.get_args());
        let said = refused(launcher.start(&[(1, &own), (1, &other)]));
        let expected = "on rank 0 and rank 1 the programs";
        assert!(said.len() == 1 && said[0].contains(expected), "{said:?}");
        assert!(!place.path("run").exists());
    }
}

#[test]
fn what_ranks_cannot_share_and_commands_of_one_process_are_refused() {
    let Some(launcher) = launchers().into_iter().next() else {
        return;
    };
    let place = Place::new();
    let said = refused(launcher.ranks(3, &train(&place, "run", &[])));
    let expected = "a multiple of 3 sequences";
    assert!(said.len() == 1 && said[0].contains(expected), "{said:?}");
    let mut routers = program();
    routers.arg("routers");
    let said = refused(launcher.ranks(2, &routers));
    let expected = "only `train`, `ablate`, `eval` and `analyze` run on several";
    assert!(said[0].contains(expected), "{said:?}");
}

#[test]
fn a_missing_library_is_one_sentence_and_the_program_links_neither_mpi_nor_nccl() {
    let place = Place::new();
    let mut command = train(&place, "run", &["--ranks", "mpi"]);
    let line = fail(command.env("ROUTEGRAD_MPI", "/nonexistent/libmpi.so"));
    let expected = "expected one of the libraries /nonexistent/libmpi.so";
    assert!(
        line.contains(expected) && line.contains("--ranks none"),
        "{line}"
    );
    let linked = Command::new("ldd")
        .arg(env!("CARGO_BIN_EXE_routegrad"))
        .output();
    let linked = text(&linked.unwrap().stdout).to_lowercase();
    assert!(linked.contains("libc.so"), "{linked}");
    assert!(
        !linked.contains("mpi") && !linked.contains("nccl"),
        "{linked}"
    );
}

#[test]
fn a_library_of_the_standard_abi_gives_the_same_bytes() {
    if !launchers().contains(&Launcher::Mpich) {
        return;
    }
    let place = Place::new();
    let library = place.path("libmpi_abi.so.0");
    let source = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/processes/launchers/standard_abi.c"
    );
    let mut compiler = Command::new("cc");
    compiler
        .args(["-shared", "-fPIC", source, "-ldl", "-o"])
        .arg(&library);
    succeed(&mut compiler);
    let steps = ["--steps", "10"];
    succeed(&mut Launcher::Mpich.ranks(2, &train(&place, "own", &steps)));
    let mut command = Launcher::Mpich.ranks(2, &train(&place, "standard", &steps));
    succeed(command.env("ROUTEGRAD_MPI", &library));
    assert_same_end(&place.path("own"), &place.path("standard"), 10);
}

/// Not a test of its own: what each process of the next one does.
#[test]
fn a_rank_of_the_test_of_calls() {
    let Ok(place) = std::env::var("ROUTEGRAD_TEST_CALLS") else {
        return;
    };
    let dist = dist::start(Ranks::Auto, Duration::from_secs(5)).unwrap();
    let rank = dist.rank();
    // Sums of few and of many values are those of threads.
    let value = |rank: usize, i: usize| (1.0 + rank as f64 * 0.37) / (1.0 + i as f64);
    for n in [0, 1, 1000, 3_000_001] {
        let mut values: Vec<f64> = (0..n).map(|i| value(rank, i)).collect();
        dist.sum(&mut values).unwrap();
        let exact = (0..n).map(|i| value(0, i) + value(1, i) + value(2, i));
        assert!(values.iter().copied().eq(exact), "{n} values");
    }
    // An exchange, in one piece and in several, leaves this rank's own row as it was.
    for n in [2, 5_000_001] {
        let mut all = vec![99; 3 * n];
        let row = |to: usize| vec![(10 * rank + to) as u8; n];
        dist.exchange(&[row(0), row(1), row(2)].concat(), &mut all)
            .unwrap();
        for (from, row) in all.chunks(n).enumerate() {
            let expected = if from == rank {
                99
            } else {
                (10 * from + rank) as u8
            };
            assert!(
                row.iter().all(|b| *b == expected),
                "{n} bytes of rank {from}"
            );
        }
    }
    doing(format!("the test on rank {rank}"));
    dist.barrier().unwrap();
    let begun = Instant::now();
    let error = match rank {
        2 => dist.gather(&[0.0; 2]).unwrap_err(),
        _ => dist.gather(&[0.0]).unwrap_err(),
    };
    let seconds = begun.elapsed().as_secs_f64();
    let line = format!("{seconds} {error}");
    let file = |rank: usize| Path::new(&place).join(rank.to_string());
    std::fs::write(file(rank), line).unwrap();
    // A launcher ends the other ranks as soon as one has failed.
    wait_until(10.0, "the errors of all ranks", || {
        (0..3).all(|rank| file(rank).exists())
    });
    let _ = dist::conclude(Err(error));
    std::process::exit(1);
}

#[test]
fn sums_are_those_of_threads_and_different_calls_are_an_error_on_all_ranks_within_a_second() {
    wait_for_other_tests();
    for launcher in launchers().into_iter().chain([Launcher::Torchrun]) {
        let place = tempfile::tempdir().unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args([
            "--exact",
            "runs::a_rank_of_the_test_of_calls",
            "--nocapture",
        ]);
        let mut command = launcher.start(&[(3, &child)]);
        let output = command
            .env("ROUTEGRAD_TEST_CALLS", place.path())
            .output()
            .unwrap();
        assert!(!output.status.success());
        for rank in 0..3 {
            let line = std::fs::read_to_string(place.path().join(rank.to_string()));
            let line =
                line.unwrap_or_else(|e| panic!("rank {rank}: {e}\n{}", text(&output.stderr)));
            let (seconds, error) = line.split_once(' ').unwrap();
            assert!(
                seconds.parse::<f64>().unwrap() <= 1.0,
                "rank {rank}: {line}"
            );
            let expected = "all_gather of 8 bytes (the test on rank 0) on rank 0";
            assert!(error.contains(expected), "{error}");
            assert!(
                error.contains("all_gather of 16 bytes (the test on rank 2) on rank 2"),
                "{error}"
            );
        }
    }
}

#[test]
fn benchmark_scores_of_several_ranks_have_the_bytes_of_one() {
    let place = Place::new();
    let question = |i: u64| {
        format!(
            r#"{{"doc_id": {i}, "doc": {{"query": "word{i}", "goal": "word{} word{i}", "choices": ["word1 word2", "word{}"], "gold": {}}}}}"#,
            i % 7,
            i % 5,
            i % 2
        )
    };
    let questions: Vec<String> = (0..40).map(question).collect();
    std::fs::write(place.path("piqa.jsonl"), questions.join("\n")).unwrap();
    let folder = format!("train.task_data={:?}", place.folder.path());
    let train_options = [
        "--steps",
        "4",
        "--router",
        "default",
        "--set",
        "train.tasks_interval=4",
        "--set",
        &folder,
    ];
    succeed(&mut train(&place, "run", &train_options));
    let (found, _) = checkpoint::find(&place.path("run")).unwrap();
    let tasks = tasks::choose(&["piqa".into()], place.folder.path()).unwrap();
    let benchmarks = tasks::read(&tasks, place.folder.path(), 0).unwrap();
    // So few tokens that the questions make many batches.
    let options = tasks::Options {
        tokens: 16,
        quiet: true,
    };
    let scores = |ranks: usize| {
        let all = ThreadRank::run(ranks, |rank| {
            let (model, _) = checkpoint::load_model_on(&found, |_| (), Arc::new(rank)).unwrap();
            let tokenizer = Tokenizer::bytes();
            let results = tasks::run(&model, &tokenizer, &benchmarks, &options, None).unwrap();
            (
                serde_json::to_string(&results.scores).unwrap(),
                results.tokens,
            )
        });
        assert!(all.iter().all(|one| *one == all[0]));
        all[0].clone()
    };
    let one = scores(1);
    assert!(one.0.contains("piqa"), "{}", one.0);
    assert_eq!(scores(2), one);
    assert_eq!(scores(3), one);
    for launcher in launchers() {
        let name = format!("{launcher:?}");
        succeed(&mut launcher.ranks(2, &train(&place, &name, &train_options)));
        let scores = |run: &str| metrics(&place.path(run))[3]["tasks"]["piqa"].clone();
        assert!(scores(&name)["acc"].is_f64());
        assert_eq!(scores(&name)["acc"], scores("run")["acc"]);
    }
}

#[test]
fn analyses_during_training_on_two_ranks_are_those_of_the_checkpoint_on_one() {
    let Some(launcher) = launchers().into_iter().next() else {
        return;
    };
    let place = Place::new();
    let options = [
        "--steps",
        "12",
        "--set",
        "train.analyze_interval=6",
        "--set",
        "train.checkpoint_interval=6",
        "--router",
        "default",
        "--rank-timeout",
        "1",
    ];
    let (_, said) = succeed(&mut launcher.ranks(2, &train(&place, "run", &options)));
    assert_eq!(said.matches("the router analysed in").count(), 2, "{said}");
    let folder = place.path("run/analysis");
    let mut analyze = program();
    analyze.args(["analyze", "--sequences", "8", "--model"]);
    analyze.arg(place.path("run/checkpoints/step-12"));
    succeed(analyze.arg("--out").arg(place.path("alone")));
    let mut compared = 0;
    for file in std::fs::read_dir(place.path("alone")).unwrap() {
        let name = file.unwrap().file_name();
        let read = |folder: &Path| std::fs::read(folder.join(&name)).unwrap();
        assert!(
            read(&folder.join("step-12")) == read(&place.path("alone")),
            "{name:?}"
        );
        compared += 1;
    }
    assert!(compared > 5, "{compared} files");
    assert!(folder.join("step-6/report.html").exists());
}
