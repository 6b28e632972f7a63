//! Checkpoints that are written while training goes on, and those in several files.

use crate::common::*;
use routegrad::study::exchange::Source;
use routegrad::train::checkpoint::{
    self, Checkpoint, Place as Folder, SHARD_BYTES, Saver, Snapshot,
};
use routegrad::train::step::StepExecutor;
use std::fs;
use std::path::Path;

/// Small enough for several files of every kind.
const SMALL_SHARDS: u64 = 4000;
/// Where training is taken up again, and where it ends.
const MIDDLE: u64 = 20;
const END: u64 = 40;

/// A run to its end, all of its checkpoints kept.
fn whole(place: &Place) {
    let steps = END.to_string();
    let options = [
        "--steps",
        &steps,
        "--router",
        "default",
        "--set",
        "train.keep_checkpoints=9",
    ];
    succeed(&mut place.train("whole", &options));
}

/// A run that stands in the middle of the whole one, its checkpoint written by `save`.
fn standing(place: &Place, name: &str, save: impl FnOnce(&Path, &Snapshot)) {
    let (whole, out) = (place.path("whole"), place.path(name));
    fs::create_dir(&out).unwrap();
    for file in fs::read_dir(&whole).unwrap() {
        let path = file.unwrap().path();
        if path.is_file() {
            fs::copy(&path, out.join(path.file_name().unwrap())).unwrap();
        }
    }
    let saved = Checkpoint::open(&whole.join(format!("checkpoints/step-{MIDDLE}"))).unwrap();
    let (model, state) = checkpoint::load_model(&saved).unwrap();
    let mut trainer = StepExecutor::new(&state.config.train, &model);
    checkpoint::load_trainer(&saved, &state, &model, &mut trainer).unwrap();
    let snapshot = checkpoint::snapshot(&model, &trainer, &state).unwrap();
    save(&out.join("checkpoints"), &snapshot);
}

fn saver(folder: &Path) -> Saver {
    Saver::new(Folder {
        folder: folder.into(),
        logs: Vec::new(),
        keep: 2,
        shard_bytes: SHARD_BYTES,
    })
}

/// Names and contents of the files of the checkpoint in the middle.
fn middle_files(run: &Path) -> Vec<(String, Vec<u8>)> {
    files(&run.join(format!("checkpoints/step-{MIDDLE}")))
}

fn assert_resumes_to_the_same_end(place: &Place, name: &str) {
    let (_, stderr) = succeed(&mut place.resume(name));
    assert!(
        stderr.contains(&format!("from step {MIDDLE} to {END}")),
        "{stderr}"
    );
    assert_same_end(&place.path("whole"), &place.path(name), END);
}

#[test]
fn a_run_goes_on_alike_from_a_save_in_the_background_and_one_in_the_foreground() {
    let place = Place::new();
    whole(&place);
    standing(&place, "background", |folder, snapshot| {
        let mut saver = saver(folder);
        saver.save(snapshot, || None).unwrap();
    });
    standing(&place, "foreground", |folder, snapshot| {
        saver(folder).save_now(snapshot).unwrap();
    });
    // The whole run saved this one in the background.
    let expected = middle_files(&place.path("whole"));
    assert!(middle_files(&place.path("background")) == expected);
    assert!(middle_files(&place.path("foreground")) == expected);
    for name in ["background", "foreground"] {
        assert_resumes_to_the_same_end(&place, name);
    }
    let log = fs::read_to_string(place.path("whole/metrics.jsonl")).unwrap();
    let records = log.lines().map(|l| serde_json::from_str(l).unwrap());
    let saved: Vec<serde_json::Value> = records
        .flat_map(|r: serde_json::Value| r["saved"].as_array().cloned().unwrap_or_default())
        .collect();
    assert!(!saved.is_empty() && saved.iter().all(|s| s["background"] == true));
}

#[test]
fn a_checkpoint_in_several_files_serves_wherever_one_in_one_does() {
    let place = Place::new();
    whole(&place);
    standing(&place, "one", |folder, snapshot| {
        checkpoint::save(folder, snapshot, 2, SHARD_BYTES).unwrap();
    });
    standing(&place, "several", |folder, snapshot| {
        checkpoint::save(folder, snapshot, 2, SMALL_SHARDS).unwrap();
    });
    let names: Vec<String> = middle_files(&place.path("several"))
        .into_iter()
        .map(|f| f.0)
        .collect();
    for stem in ["model", "trainer"] {
        assert!(names.contains(&format!("{stem}.safetensors.index.json")));
        assert!(!names.contains(&format!("{stem}.safetensors")));
        let shards = names.iter().filter(|n| n.contains("-of-"));
        assert!(shards.filter(|n| n.starts_with(stem)).count() > 2);
    }

    let evaluated = ["one", "several"].map(|name| {
        let (out, _) = succeed(program().arg("eval").arg("--model").arg(place.path(name)));
        // The first line names the checkpoint.
        out.split_once('\n').unwrap().1.to_string()
    });
    assert_eq!(evaluated[0], evaluated[1]);

    let exported = ["one", "several"].map(|name| {
        let out = place.path(&format!("{name}-hf"));
        let mut command = program();
        command
            .args(["export", "--to", "hf", "--model"])
            .arg(place.path(name));
        succeed(command.arg("--out").arg(&out));
        fs::read(out.join("model.safetensors")).unwrap()
    });
    assert!(exported[0] == exported[1]);

    // As any model of transformers is read.
    let read = |name: &str| {
        let source = Source::open(&place.path(name)).unwrap();
        let config = source.config(&routegrad::config::Layers::preset("tiny"));
        let (model, _) = source.model(&config.unwrap()).unwrap();
        let parameters = model.parameters.iter();
        parameters
            .map(|p| p.value.to_f64().unwrap())
            .collect::<Vec<_>>()
    };
    assert!(read("one") == read("several"));

    assert_resumes_to_the_same_end(&place, "several");
    // Older ones go, in however many files.
    let more = ["--steps", "50", "--set", "train.keep_checkpoints=1"];
    succeed(place.resume("several").args(more));
    let left = fs::read_dir(place.path("several/checkpoints")).unwrap();
    let left: Vec<_> = left.map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["step-50"]);
}

#[test]
fn an_export_in_several_files_holds_what_one_file_does() {
    let place = Place::new();
    succeed(&mut place.train("run", &["--steps", "2", "--router", "default"]));
    let (found, _) = routegrad::study::exchange::Saved::open(&place.path("run")).unwrap();
    let read = |name: &str, shard_bytes: u64| {
        let out = place.path(name);
        routegrad::study::export::run(
            &found,
            &out,
            routegrad::tensor::dtype::DType::F32,
            shard_bytes,
        )
        .unwrap();
        let mut found = std::collections::BTreeMap::new();
        for entry in fs::read_dir(out).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|e| e == "safetensors") {
                let bytes = fs::read(path).unwrap();
                let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
                for (name, view) in tensors.iter() {
                    found.insert(name.to_string(), view.data().to_vec());
                }
            }
        }
        found
    };
    assert!(read("one", SHARD_BYTES) == read("several", SMALL_SHARDS));
    let index = fs::read_to_string(place.path("several/model.safetensors.index.json")).unwrap();
    let index: serde_json::Value = serde_json::from_str(&index).unwrap();
    let map = index["weight_map"].as_object().unwrap();
    let shards: std::collections::BTreeSet<_> = map.values().map(|v| v.as_str().unwrap()).collect();
    assert!(shards.len() > 2);
    for shard in shards {
        assert!(place.path("several").join(shard).is_file(), "{shard}");
    }
}

#[test]
fn a_disk_that_fills_up_during_a_save_stops_the_run_and_costs_no_checkpoint() {
    let place = Place::new();
    let steps = END.to_string();
    succeed(&mut place.train("whole", &["--steps", &steps]));
    // A save makes five files: the run fails at each of the second one's.
    for file in 6..=10 {
        let name = format!("full-{file}");
        let mut command = place.train(&name, &["--steps", &steps]);
        let e = fail(command.env("ROUTEGRAD_DISK_FULL", file.to_string()));
        assert!(
            e.contains("cannot write") && e.contains("step-20") && e.contains("free some space"),
            "{e}"
        );
        // It ended when it was noticed, not at the next save.
        let done = steps_logged(&place.path(&name));
        assert!(
            (20..=30).contains(&done),
            "{file}: it went on up to step {done}"
        );
        let (found, damaged) = checkpoint::find(&place.path(&name)).unwrap();
        assert!((found.step(), damaged.len()) == (10, 0));
        let (_, stderr) = succeed(&mut place.resume(&name));
        assert!(stderr.contains("from step 10 to 40"), "{stderr}");
        assert_same_end(&place.path("whole"), &place.path(&name), END);
    }
}

#[test]
fn the_end_says_how_long_training_stood_still() {
    let place = Place::new();
    let (_, stderr) = succeed(&mut place.train("run", &["--steps", "25"]));
    assert!(
        stderr.contains("checkpoints: saving paused training for "),
        "{stderr}"
    );
    let (_, stderr) =
        succeed(&mut place.train("none", &["--steps", "25", "--no-checkpoint", "--quiet"]));
    assert!(!stderr.contains("checkpoints:"), "{stderr}");
}
