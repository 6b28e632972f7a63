//! Tests of the guarantees of checkpoints, except those that kill the process (see `tests/`).

use super::*;
use crate::tensor::Tensor;
use crate::tensor::dtype::DType;
use serde_json::json;
use std::f64::consts::PI;

/// A snapshot whose content follows from its step.
fn snapshot(step: u64) -> Snapshot<'static> {
    let values: Vec<f32> = (0..6).map(|i| i as f32 + step as f32).collect();
    Snapshot {
        step,
        config: json!({ "hidden_size": 2 }),
        model: vec![
            Array::copied("norm.weight", &Tensor::from_slice([2, 3], &values)),
            Array::copied("ids", &Tensor::from_slice([2], &[step as i32, -1])),
        ],
        trainer: vec![Array::copied("exact", &Tensor::scalar(PI))],
        state: json!({ "step": step }),
    }
}

/// Saves the snapshot of a step in one file for the model and one for the trainer.
fn saved(folder: &Path, step: u64, keep: usize) -> PathBuf {
    save(folder, &snapshot(step), keep, SHARD_BYTES).unwrap()
}

fn step_of_newest(folder: &Path) -> u64 {
    newest(folder).unwrap().0.unwrap().step()
}

fn folders(folder: &Path) -> Vec<String> {
    let mut names = names(folder).unwrap();
    names.sort();
    names
}

#[test]
fn what_was_saved_comes_back_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("runs/a/checkpoints");
    let path = saved(&folder, 7, 2);
    assert_eq!(path, folder.join("step-7"));
    let (found, damaged) = newest(&folder).unwrap();
    let checkpoint = found.unwrap();
    assert!(damaged.is_empty());
    assert_eq!((checkpoint.step(), checkpoint.path()), (7, path.as_path()));
    assert_eq!(checkpoint.config().unwrap(), json!({ "hidden_size": 2 }));
    assert_eq!(checkpoint.state().unwrap(), json!({ "step": 7 }));
    let mut model = checkpoint.model().unwrap();
    let weights = model.take("norm.weight", DType::F32, [2, 3]).unwrap();
    assert_eq!(weights.slice::<f32>(), [7.0, 8.0, 9.0, 10.0, 11.0, 12.0]);
    let ids = model.take("ids", DType::I32, [2]).unwrap();
    assert_eq!(ids.slice::<i32>(), [7, -1]);
    model.finish().unwrap();
    let mut trainer = checkpoint.trainer().unwrap();
    let exact = trainer.take("exact", DType::F64, []).unwrap();
    assert_eq!(exact.item().unwrap(), PI);
}

#[test]
fn only_the_newest_are_kept_and_files_of_interrupted_saves_are_removed() {
    let dir = tempfile::tempdir().unwrap();
    let half = dir.path().join(".unfinished-step-3");
    fs::create_dir(&half).unwrap();
    fs::write(half.join("model.safetensors"), "half").unwrap();
    for step in [2, 9, 10, 11] {
        saved(dir.path(), step, 2);
    }
    assert_eq!(folders(dir.path()), ["step-10", "step-11"]);
    saved(dir.path(), 12, 1);
    assert_eq!(folders(dir.path()), ["step-12"]);
}

#[test]
fn the_newest_whole_checkpoint_wins_and_damaged_ones_are_named() {
    for (file, fault) in [
        (CONFIG, "digest"),
        ("model.safetensors", "digest"),
        ("trainer.safetensors", "digest"),
        (STATE, "digest"),
        ("model.safetensors", "cut"),
        (MANIFEST, "cut"),
        ("model.safetensors", "gone"),
        (MANIFEST, "gone"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        saved(dir.path(), 1, 3);
        saved(dir.path(), 2, 3);
        let path = dir.path().join("step-2").join(file);
        let mut bytes = fs::read(&path).unwrap();
        match fault {
            "digest" => {
                *bytes.last_mut().unwrap() ^= 1;
                fs::write(&path, bytes).unwrap();
            }
            "cut" => fs::write(&path, &bytes[..bytes.len() / 2]).unwrap(),
            _ => fs::remove_file(&path).unwrap(),
        }
        let (found, damaged) = newest(dir.path()).unwrap();
        assert_eq!(found.unwrap().step(), 1, "{file} {fault}");
        assert_eq!(damaged.len(), 1);
        let e = damaged[0].to_string();
        assert!(e.contains("step-2") && e.contains(file), "{e}");
        // Training reaches step 2 again and replaces the damaged folder.
        saved(dir.path(), 2, 3);
        assert_eq!(step_of_newest(dir.path()), 2);
        assert_eq!(folders(dir.path()), ["step-1", "step-2"]);
    }
}

#[test]
fn a_whole_checkpoint_is_never_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let path = saved(dir.path(), 5, 2);
    let file = path.join("model.safetensors");
    let modified = || fs::metadata(&file).unwrap().modified().unwrap();
    let before = modified();
    saved(dir.path(), 5, 2);
    assert_eq!(before, modified());
}

#[test]
fn a_damaged_newer_checkpoint_does_not_remove_the_one_just_saved() {
    let dir = tempfile::tempdir().unwrap();
    saved(dir.path(), 10, 1);
    fs::remove_file(dir.path().join("step-10").join("model.safetensors")).unwrap();
    saved(dir.path(), 4, 1);
    assert_eq!(step_of_newest(dir.path()), 4);
}

#[test]
fn a_foreign_checkpoint_names_the_tensor() {
    let dir = tempfile::tempdir().unwrap();
    saved(dir.path(), 1, 1);
    let checkpoint = newest(dir.path()).unwrap().0.unwrap();
    let take = |name: &str, shape: &[usize]| {
        let taken = checkpoint.model().unwrap().take(name, DType::F32, shape);
        taken.unwrap_err().to_string()
    };
    let e = take("lm_head.weight", &[4]);
    assert!(
        e.contains("`lm_head.weight`") && e.contains("none of that name"),
        "{e}"
    );
    let e = take("norm.weight", &[3, 2]);
    assert!(e.contains("f32 [3, 2]") && e.contains("f32 [2, 3]"), "{e}");
    let e = take("ids", &[2]);
    assert!(e.contains("i32 [2]"), "{e}");
    let e = checkpoint.model().unwrap().finish().unwrap_err();
    assert!(e.to_string().contains("`ids`"), "{e}");
}

#[test]
fn a_folder_that_cannot_be_written_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let e = save(&file.join("checkpoints"), &snapshot(1), 1, SHARD_BYTES).unwrap_err();
    assert!(e.to_string().starts_with("cannot create"), "{e}");
    for (name, expected) in [("", "manifest.json"), ("none", "no such folder")] {
        let e = Checkpoint::open(&dir.path().join(name)).err().unwrap();
        assert!(e.to_string().contains(expected), "{e}");
    }
    assert!(newest(&dir.path().join("none")).unwrap().0.is_none());
}

#[test]
fn the_same_snapshot_gives_the_same_bytes() {
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    for dir in &dirs {
        saved(dir.path(), 3, 1);
    }
    let [a, b] = dirs.each_ref().map(|dir| dir.path().join("step-3"));
    let files = folders(&a);
    assert_eq!((files.len(), &files), (5, &folders(&b)));
    for file in files {
        let read = |folder: &Path| fs::read(folder.join(&file)).unwrap();
        assert_eq!(read(&a), read(&b), "{file}");
    }
}

#[test]
fn a_manifest_without_a_digest_of_its_own_is_read_as_before() {
    let dir = tempfile::tempdir().unwrap();
    let path = saved(dir.path(), 3, 1).join(MANIFEST);
    let mut manifest: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    assert!(manifest.as_object_mut().unwrap().remove("blake3").is_some());
    fs::write(&path, manifest.to_string()).unwrap();
    assert_eq!(step_of_newest(dir.path()), 3);
}

#[test]
fn a_changed_number_in_the_manifest_is_detected() {
    let dir = tempfile::tempdir().unwrap();
    let path = saved(dir.path(), 3, 1).join(MANIFEST);
    let text = fs::read_to_string(&path).unwrap();
    for other in [text.replace("\"step\": 3", "\"step\": 7"), text + " "] {
        fs::write(&path, other).unwrap();
        let (found, damaged) = newest(dir.path()).unwrap();
        assert!(found.is_none() && damaged.len() == 1);
    }
}

/// Files of the sharded [`snapshot`]: one array per file.
const SHARDS: [&str; 2] = [
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
];

#[test]
fn a_sharded_checkpoint_has_the_same_content_as_one_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = save(dir.path(), &snapshot(7), 2, 10).unwrap();
    assert_eq!(
        folders(&path),
        [
            CONFIG,
            MANIFEST,
            SHARDS[0],
            SHARDS[1],
            "model.safetensors.index.json",
            STATE,
            "trainer.safetensors",
        ]
    );
    let checkpoint = newest(dir.path()).unwrap().0.unwrap();
    // Arrays can be taken in any order.
    let mut model = checkpoint.model().unwrap();
    let ids = model.take("ids", DType::I32, [2]).unwrap();
    assert_eq!(ids.slice::<i32>(), [7, -1]);
    let weights = model.take("norm.weight", DType::F32, [2, 3]).unwrap();
    assert_eq!(weights.slice::<f32>(), [7.0, 8.0, 9.0, 10.0, 11.0, 12.0]);
    let e = model.take("ids", DType::I32, [2]).unwrap_err().to_string();
    assert!(
        e.contains("index.json") && e.contains("none of that name"),
        "{e}"
    );
    model.finish().unwrap();
    let mut model = checkpoint.model().unwrap();
    let e = model.take("ids", DType::F32, [2]).unwrap_err().to_string();
    assert!(e.contains(SHARDS[1]) && e.contains("i32 [2]"), "{e}");
    let e = model.finish().unwrap_err().to_string();
    assert!(e.contains("`norm.weight`"), "{e}");
}

#[test]
fn a_missing_or_foreign_shard_is_refused() {
    let index = "model.safetensors.index.json";
    for (what, named) in [
        ("gone", SHARDS[1]),
        ("swapped", SHARDS[0]),
        ("of another step", SHARDS[1]),
        ("without index", index),
        ("index of another", index),
    ] {
        let dir = tempfile::tempdir().unwrap();
        save(dir.path(), &snapshot(1), 3, 10).unwrap();
        let path = save(dir.path(), &snapshot(2), 3, 10).unwrap();
        let [a, b] = SHARDS.map(|s| path.join(s));
        match what {
            "gone" => fs::remove_file(&b).unwrap(),
            "swapped" => {
                fs::rename(&a, path.join("c")).unwrap();
                fs::rename(&b, &a).unwrap();
                fs::rename(path.join("c"), &b).unwrap();
            }
            "of another step" => {
                fs::copy(dir.path().join("step-1").join(SHARDS[1]), &b).unwrap();
            }
            "without index" => fs::remove_file(path.join(index)).unwrap(),
            _ => {
                let text = fs::read_to_string(path.join(index)).unwrap();
                fs::write(path.join(index), text.replace(SHARDS[0], SHARDS[1])).unwrap();
            }
        }
        let (found, damaged) = newest(dir.path()).unwrap();
        assert_eq!(found.unwrap().step(), 1, "{what}");
        let e = damaged[0].to_string();
        assert!(e.contains(named), "{what}: {e}");
        // Reading also detects the damage if the checkpoint is opened directly.
        let read = |checkpoint: Checkpoint| -> Result<()> {
            let mut model = checkpoint.model()?;
            model.take("norm.weight", DType::F32, [2, 3])?;
            model.take("ids", DType::I32, [2])?;
            model.finish()
        };
        let e = Checkpoint::open(&path).and_then(read).unwrap_err();
        assert!(e.to_string().contains(named), "{what}: {e}");
    }
}
